"""The command ``lowkernels``: ``info`` for bug reports, ``build`` to compile native kernels ahead of time, ``tune`` to measure what
``auto`` chooses by, and ``demo``, which does the main job on the photograph that ships with the package."""

from __future__ import annotations

import argparse
import importlib.resources
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import backends
from ._version import __version__
from .choosing import measured
from .dispatch import requested
from .errors import LowkernelsError
from .ops import OPERATORS

if TYPE_CHECKING:
    import lowformer

_DEMO_MODEL = "lowformer_b1"
_DTYPES = ("float32", "float16", "bfloat16")
# Rounds of the demo's timing: enough for a median, few enough to stay within seconds on a laptop.
_DEMO_ROUNDS = 15
_PACKAGES = (
    "triton",
    "numpy",
    "timm",
    "torchvision",
    "safetensors",
    "huggingface_hub",
    "Pillow",
    "rich",
    "onnxruntime",
    "openvino",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with ``argv`` (default: the process's arguments) and return its exit code.

    0: done, and the demo's results agree; 1: they do not, or the output's reader has gone; 2: could not start; 130: interrupted.
    """
    try:
        try:
            args = _parser().parse_args(argv)
            code: int = args.run(args)
        finally:
            # Not sys.stdout.flush(): a process may have been started without one.
            print(end="", flush=True)
    except LowkernelsError as error:
        print(f"lowkernels: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lowkernels: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output (head, less) has seen enough; without this Python complains when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def _parser() -> argparse.ArgumentParser:
    description = "Fused kernels for convolutional-transformer vision backbones."
    parser = argparse.ArgumentParser(prog="lowkernels", description=description)
    parser.add_argument("--version", action="version", version=f"lowkernels {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="versions, devices and backends, for bug reports")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)

    build = commands.add_parser(
        "build",
        help="compile the native kernels now rather than on first use",
        description="Compile the C++ CPU kernels, or the CUDA ones, into the cache (or a folder), if they are not there yet.",
    )
    build.add_argument("--cuda", action="store_true", help="the CUDA kernels (needs nvcc, no GPU) instead of the CPU kernels")
    build.add_argument("--output", metavar="FOLDER", help="put the library there instead of into the cache")
    build.add_argument("--objects", metavar="FOLDER", help="with --output, where to keep object files (default: nowhere)")
    build.set_defaults(run=_build)

    tune = commands.add_parser(
        "tune",
        help="measure the backends on this machine, for auto to choose by",
        description="Measure every backend, and the settings it offers, on the operator calls of LowFormer models, and keep the "
        "result in the cache folder, where auto finds it. Calls measured before are kept unless measured again.",
    )
    tune.add_argument("--models", nargs="+", default=[_DEMO_MODEL], metavar="MODEL", help="default: %(default)s")
    tune.add_argument("--operators", nargs="+", default=[], choices=list(OPERATORS), metavar="OPERATOR", help="default: all")
    tune.add_argument("--sizes", nargs="+", type=_positive, default=[224], metavar="PIXELS", help="of the images; default: 224")
    tune.add_argument("--batches", nargs="+", type=_positive, metavar="N", help="default: 1 16 256 on cuda, else 1 8")
    tune.add_argument("--dtypes", nargs="+", choices=_DTYPES, help="default: float16 on cuda, else float32")
    tune.add_argument("--seconds", type=_positive, default=1200, help="for everything; default: %(default)s")
    tune.add_argument("--device", default=None, help="default: cuda where there is one, else cpu")
    tune.add_argument(
        "--from",
        dest="results",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="measure nothing: take the tuning lines of these results files of `python -m benchmarks gpu`",
    )
    tune.add_argument(
        "--export",
        type=Path,
        metavar="FOLDER",
        help="write it into FOLDER instead of the cache, as a table that ships with the package (lowkernels/data/measured)",
    )
    tune.set_defaults(run=_tune)

    demo = commands.add_parser(
        "demo",
        help="classify the photograph that ships with the package, eager and accelerated side by side",
        description=f"Run {_DEMO_MODEL} on a photograph with plain PyTorch and with the fused operators, and compare.",
    )
    demo.add_argument("photo", nargs="?", help="another photograph")
    demo.add_argument("--backend", default="auto", help="backend of the fused operators (default: %(default)s)")
    demo.add_argument("--device", default=None, help="default: cuda where there is one, else cpu")
    demo.add_argument("--dtype", choices=_DTYPES, default=None, help="default: float16 on cuda, else float32")
    demo.add_argument(
        "--weights",
        default="auto",
        metavar="FILE|hub|none|auto",
        help="auto: the published weights if the network gives them within seconds, untrained ones otherwise",
    )
    demo.set_defaults(run=_demo)
    return parser


def environment() -> dict[str, Any]:
    """Versions, devices and the state of every backend, as ``lowkernels info`` prints them. Starts no GPU."""
    packages: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    gpus = []
    machines = [measured.machine(torch.device("cpu"))]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            gpus.append(f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB")
            machines.append(measured.machine(torch.device("cuda", i)))
    state = {}
    for name in backends.PRIORITY:
        backend = backends.load(name)
        reasons = {device: backend.unavailable(device) for device in ("cpu", "cuda")}
        if not gpus:
            reasons["cuda"] = "PyTorch sees no CUDA device"
        state[name] = {"about": backend.describe(), **{device: reason or "usable" for device, reason in reasons.items()}}
    return {
        "lowkernels": __version__,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": f"{measured.cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "gpus": gpus,
        "packages": packages,
        "backends": state,
        "tables": [measured.summary(of) for of in machines if of is not None],
        "requested": "{} (from {})".format(*requested(None)),
        "environment": {k: v for k, v in os.environ.items() if k.startswith(("LOWKERNELS_", "LOWFORMER_", "TRITON_"))},
    }


def _build(args: argparse.Namespace) -> int:
    from .backends.cpu import build as cpu_build
    from .backends.cuda import build as cuda_build

    options = [] if args.output is None else ["--output", args.output]
    options += [] if args.objects is None else ["--objects", args.objects]
    return cuda_build.main(options) if args.cuda else cpu_build.main(options)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _tune(args: argparse.Namespace) -> int:
    from .choosing import tuning

    if args.results:
        try:
            lines = [line for path in args.results for line in path.read_text(encoding="utf-8").splitlines()]
            tables = tuning.rows_of_facts(lines)
        except (OSError, ValueError, KeyError) as error:
            print(f"lowkernels: error: --from {' '.join(map(str, args.results))}: {error}", file=sys.stderr)
            return 2
    else:
        allowed = "cpu, cuda and cuda:N" if torch.cuda.is_available() else "cpu (no CUDA device is available)"
        try:
            device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
            of = measured.machine(device)
        except (RuntimeError, AssertionError):
            of = None
        if of is None:
            print(f"lowkernels: error: --device {args.device}: nothing is measured there; allowed: {allowed}", file=sys.stderr)
            return 2
        cuda = device.type == "cuda"
        dtypes = [getattr(torch, name) for name in args.dtypes or ("float16" if cuda else "float32",)]
        calls = tuning.calls_of(args.models, args.sizes, args.batches or ((1, 16, 256) if cuda else (1, 8)), dtypes, args.operators)
        print(f"{', '.join(of)}: {len(calls)} calls, at most {args.seconds} s")
        tables = {of: tuning.tune(calls, device, args.seconds, say=print)}
    if not any(tables.values()):
        print("lowkernels: error: nothing was measured", file=sys.stderr)
        return 1
    for of, rows in tables.items():
        path = measured.user_path(of) if args.export is None else measured.shipped_path(of, args.export)
        together = measured.add(path, of, rows)
        print(f"{len(rows)} calls measured, {len(together)} in {path}")
    measured.forget()
    return 0


def _info(args: argparse.Namespace) -> int:
    found = environment()
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    for key in ("lowkernels", "torch", "torch_cuda", "python", "platform", "cpu"):
        print(f"{key:12} {found[key]}")
    print(f"{'gpus':12} {'; '.join(found['gpus']) or 'none'}")
    print(f"{'packages':12} {', '.join(f'{k} {v}' for k, v in found['packages'].items() if v)}")
    for name, state in found["backends"].items():
        print(f"backend {name}: {state['about']}")
        print(f"    on cpu tensors:  {state['cpu']}")
        print(f"    on cuda tensors: {state['cuda']}")
    for table in found["tables"]:
        print(f"{'measured':12} {table}")
    print(f"{'requested':12} {found['requested']}")
    for key, value in found["environment"].items():
        print(f"{key}={value}")
    return 0


def _demo(args: argparse.Namespace) -> int:
    import lowformer
    from lowformer.imagenet import class_names
    from lowformer.transforms import eval_transform, load_image

    from . import report
    from .testing import error_budget, measure_error

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, args.dtype or ("float16" if device.type == "cuda" else "float32"))
    try:
        if args.photo is None:
            packaged = importlib.resources.files("lowkernels") / "data" / "chelsea.jpg"
            with importlib.resources.as_file(packaged) as path:
                image = load_image(path)
        else:
            image = load_image(args.photo)
    except (OSError, ImportError, ValueError) as error:
        print(f"lowkernels: error: {error}", file=sys.stderr)
        return 2
    x = eval_transform()(image).unsqueeze(0)

    eager = lowformer.create_model(_DEMO_MODEL, kernels="eager")
    try:
        label = _load_demo_weights(eager, args.weights)
    except (lowformer.WeightsUnavailableError, lowformer.CheckpointError, OSError) as error:
        print(f"lowkernels: error: {error}", file=sys.stderr)
        return 2
    accelerated = lowformer.create_model(_DEMO_MODEL, kernels=args.backend)
    accelerated.load_state_dict(eager.state_dict())
    truth = lowformer.create_model(_DEMO_MODEL, kernels="eager")
    truth.load_state_dict(eager.state_dict())

    eager, accelerated = (m.eval().to(device, dtype) for m in (eager, accelerated))
    x = x.to(device, dtype).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = truth.eval().double()(x.cpu().double())
        # Weights rounded to the dtype are part of both contenders' inputs, and so of the reference's.
        if dtype != torch.float32:
            truth.load_state_dict({k: v.double() for k, v in eager.state_dict().items()})
            expected = truth(x.cpu().double())
        results = {"eager": eager(x), "lowkernels": accelerated(x)}
        times = _alternate({"eager": lambda: eager(x), "lowkernels": lambda: accelerated(x)}, device)
    errors = {name: measure_error(out, expected) for name, out in results.items()}
    budget = error_budget(errors["eager"], expected, dtype, accumulation_length=_longest_sum(eager))

    print(f"{_DEMO_MODEL}, {label}, {args.photo or 'the photograph of a cat that ships with the package'}")
    kind = str(dtype).removeprefix("torch.")
    print(f"{device}, {kind}, {x.shape[2]}x{x.shape[3]}, batch 1, {torch.get_num_threads()} CPU threads\n")
    names = class_names()
    top = {name: out[0].float().softmax(0).topk(5) for name, out in results.items()}
    print(f"{'eager':40}lowkernels")
    for rank in range(5):
        cells = [f"{t.values[rank]:6.1%}  {names[int(t.indices[rank])]}" for t in top.values()]
        print(f"{cells[0]:40.39}{cells[1]}")
    same = bool(torch.equal(top["eager"].indices, top["lowkernels"].indices))
    # Classes closer to each other than the error cannot be told apart in this dtype; their order is no result.
    logits = expected[0]
    apart = logits[top["eager"].indices.cpu()] - logits[top["lowkernels"].indices.cpu()]
    tied = bool(apart.abs().max() <= 2 * budget.maximum)
    ours = errors["lowkernels"]
    print(f"\nsame top-5: {'yes' if same else 'yes, up to ties below the error' if tied else 'NO'}")
    print(f"largest difference from float64: {ours.maximum:.2e} (eager {errors['eager'].maximum:.2e}, budget {budget.maximum:.2e})")
    eager_ms, ours_ms = (statistics.median(times[name]) for name in ("eager", "lowkernels"))
    ratio = f"eager {eager_ms:.2f} ms, lowkernels {ours_ms:.2f} ms ({eager_ms / ours_ms:.2f}x)"
    print(f"time, median of {_DEMO_ROUNDS} alternating rounds: {ratio}\n")
    print(report(accelerated))
    if not (ours.within(budget) and (same or tied)):
        print("\nlowkernels: the accelerated model's output is outside its error budget", file=sys.stderr)
        return 1
    return 0


def _longest_sum(model: nn.Module) -> int:
    """K of the error budget for a whole model: its longest convolution or linear sum."""
    weights = (m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    return max(w[0].numel() for w in weights)


def _load_demo_weights(model: lowformer.LowFormer, weights: str) -> str:
    """Load what was asked for; returns the label to print."""
    import lowformer

    if weights in ("auto", "hub"):
        try:
            path = lowformer.fetch_weights(_DEMO_MODEL)
        except lowformer.WeightsUnavailableError as error:
            if weights == "hub":
                raise
            print(f"note: {error}", file=sys.stderr)
        else:
            lowformer.load_checkpoint(model, path)
            return "published ImageNet-1k weights"
    elif weights != "none":
        lowformer.load_checkpoint(model, weights)
        return f"weights of {weights}"
    _randomise(model)
    return "UNTRAINED WEIGHTS (the classes below mean nothing)"


def _randomise(model: nn.Module) -> None:
    """Deterministic weights with BatchNorm statistics that are not the trivial ones, so that folding has something to do."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                fan_in = module.weight[0].numel()
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * (1.4 / fan_in**0.5))
            elif isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) * 0.1)
                module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)


def _alternate(contenders: dict[str, Callable[[], Tensor]], device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of each contender, taking turns."""
    synchronize: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for run in (*contenders.values(), *contenders.values()):
        run()
    for _ in range(_DEMO_ROUNDS):
        for name, run in contenders.items():
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times
