"""Every contender, in one place: what it needs, how it is built, and what it is called in the tables.

A contender takes a :class:`~benchmarks.subjects.Subject` and gives something callable. Each is built as its own makers recommend
for speed, gets inputs in the layout it likes best, and converts nothing inside the clock.

To add a contender: write its ``build`` function and name it in ``RIVALS``.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import lowkernels
from lowkernels import backends
from lowkernels.dispatch import AUTO

from .subjects import Subject, module_channels_last, served_by

EAGER = "eager"
OURS_PREFIX = "lowkernels"


@dataclass
class Built:
    """A contender ready to run.

    Attributes:
        run: takes what ``prepare`` gives. No gradients.
        prepare: from an NCHW batch in the subject's dtype and on its device to the input, outside the clock.
        result: from what ``run`` gives to a tensor, outside the clock.
        graph: a CUDA graph can be captured of ``run``.
        pytorch: memory and operators of a call go through PyTorch, and can be counted.
        served: how often each backend serves in one forward pass; None for rivals.
        modules: what became of each module of a model of ours, as rows have it; None for all others.
    """

    run: Callable[[Any], Any]
    prepare: Callable[[Tensor], Any] = field(default=lambda x: x)
    result: Callable[[Any], Tensor] = field(default=lambda y: y)
    graph: bool = True
    pytorch: bool = True
    served: Callable[[], dict[str, int]] | None = None
    modules: Callable[[], list[dict[str, Any]]] | None = None


@dataclass(frozen=True)
class Contender:
    """One entry of the tables.

    Attributes:
        name: in rows and tables.
        build: makes it for a subject; what it raises is shown in its row.
        absent: why it cannot be built here, or None. Cheap.
        cost: ``"light"``; ``"export"`` for a few seconds of export; ``"compile"`` for up to minutes of compilation.
        ours: built from this library.
    """

    name: str
    build: Callable[[Subject], Built]
    absent: Callable[[Subject], str | None] = lambda subject: None
    cost: str = "light"
    ours: bool = False


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def folded(module: nn.Module) -> nn.Module:
    """``module`` with every BatchNorm folded into the convolution listed right before it, in place."""
    for parent in list(module.modules()):
        children = list(parent.named_children())
        for (name, conv), (norm_name, norm) in itertools.pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(conv, norm))
                setattr(parent, norm_name, nn.Identity())
    return module


def _eager(subject: Subject) -> Built:
    return Built(subject.plain())


def _folded(subject: Subject) -> Built:
    return Built(module_channels_last(folded(subject.plain())), channels_last)


def own_code(module: nn.Module, name: str) -> Callable[[Tensor], Tensor]:
    """A function that calls ``module``, with a code object of its own: torch.compile keeps what it compiled by code object, so
    contenders that shared one would look through each other's guards and use up each other's recompilations."""

    def call(x: Tensor) -> Tensor:
        out: Tensor = module(x)
        return out

    code = call.__code__.replace(co_name=name)
    return types.FunctionType(code, call.__globals__, name, None, call.__closure__)


def _compiled(subject: Subject, mode: str, freezing: bool) -> Built:
    from torch._inductor import config

    # BatchNorm is folded for both, though only freezing would do it by itself: the faster of the two things a user can do.
    module = module_channels_last(folded(subject.plain()))
    run = torch.compile(own_code(module, f"{mode}_{freezing}".replace("-", "_")), mode=mode, dynamic=False)
    # Only the global flag packs weights. Compilation happens in the first call, so it need not outlive this block.
    with config.patch(freezing=freezing):
        run(channels_last(subject.inputs[0]))
    return Built(run, channels_last)


def _max_autotune(subject: Subject) -> Built:
    # With graphs of its own, PyTorch's compiler would hide its launches where the others show theirs; every contender
    # on a GPU is also replayed from a graph here.
    mode = "max-autotune-no-cudagraphs" if subject.device == "cuda" else "max-autotune"
    return _compiled(subject, mode, freezing=True)


def _torchscript(subject: Subject) -> Built:
    x = subject.inputs[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(subject.plain(), x, check_trace=False)
        run = torch.jit.optimize_for_inference(torch.jit.freeze(traced))
    # The profiling executor specialises in its first calls.
    for _ in range(3):
        run(x)
    return Built(run)


@functools.lru_cache(maxsize=1)
def exported(subject: Subject, dtype: torch.dtype) -> bytes:
    """The subject's plain module as ONNX with the batch size fixed, weights in ``dtype``."""
    module = subject.plain().to(dtype).to("cpu")
    x = subject.inputs[0].to(dtype).to("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(module, (x,), dynamo=True, verbose=False, input_names=["x"])
    assert program is not None
    model: bytes = program.model_proto.SerializeToString()
    return model


def _onnxruntime(subject: Subject) -> Built:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(exported(subject, subject.dtype), options, providers=["CPUExecutionProvider"])
    element = {torch.float32: 1, torch.bfloat16: 16}[subject.dtype]  # as ONNX's TensorProto numbers them
    out = torch.empty_like(subject.plain()(subject.inputs[0]), memory_format=torch.contiguous_format)

    def bind(x: Tensor) -> Any:
        # Bound by address, because numpy, the usual way in, has no bfloat16.
        binding = session.io_binding()
        binding.bind_input("x", "cpu", 0, element, x.shape, x.data_ptr())
        binding.bind_output(session.get_outputs()[0].name, "cpu", 0, element, out.shape, out.data_ptr())
        return binding

    return Built(session.run_with_iobinding, bind, lambda _: out, graph=False, pytorch=False)


def _openvino(subject: Subject) -> Built:
    import openvino

    core = openvino.Core()
    precision = "bf16" if subject.dtype == torch.bfloat16 else "f32"
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = core.compile_model(core.read_model(exported(subject, torch.float32)), "CPU", settings)
    request = compiled.create_infer_request()
    return Built(
        lambda x: request.infer([x], share_inputs=True, share_outputs=True)[0],
        # Its plugin takes float32 and rounds inside.
        lambda x: x.float().numpy(),
        lambda y: torch.from_numpy(y.copy()),
        graph=False,
        pytorch=False,
    )


def _timm_network(subject: Subject) -> nn.Module:
    network: nn.Module = _import_timm().create_model(subject.name)
    network.load_state_dict(subject.plain().state_dict())
    return network.eval().to(subject.dtype).to(subject.device)


def _timm(subject: Subject) -> Built:
    return Built(_timm_network(subject))


def _import_timm() -> Any:
    from tests.torchvision_stub import install

    install()
    import timm

    return timm


def _ours(subject: Subject, backend: str) -> Built:
    run, served = subject.ours(backend)
    modules = functools.partial(outcomes, run) if isinstance(run, nn.Module) else None
    return Built(run, channels_last, served=served, modules=modules)


def outcomes(network: nn.Module) -> list[dict[str, Any]]:
    """What :func:`lowkernels.report` says about a model after a forward pass, modules with the same outcome together."""
    found: dict[tuple[Any, ...], list[str]] = {}
    for row in lowkernels.report(network):
        found.setdefault((row.kind, row.replaced, row.ran_on, row.reason), []).append(row.name)
    names = ("kind", "replaced", "ran_on", "reason")
    return [{**dict(zip(names, outcome, strict=True)), "names": modules} for outcome, modules in found.items()]


def _accelerated(subject: Subject) -> Built:
    network = _timm_network(subject)
    lowkernels.accelerate(network)
    return Built(
        network,
        channels_last,
        served=functools.partial(served_by, network),
        modules=functools.partial(outcomes, network),
    )


def _missing(*modules: str, extra: str) -> str | None:
    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    return f"{' and '.join(missing)} not installed: pip install 'lowkernels[{extra}]'" if missing else None


def _no_compiler(subject: Subject) -> str | None:
    if subject.device == "cuda":
        return None if importlib.util.find_spec("triton") else "triton not installed"
    from torch._inductor import config, cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return f"no C++ compiler found (tried {config.cpp.cxx})"
    return None


def _cpu_only(subject: Subject) -> str | None:
    return None if subject.device == "cpu" else "measured on a CPU only"


def _no_timm(subject: Subject) -> str | None:
    if subject.kind != "model":
        return "measured on whole models only"
    if importlib.util.find_spec("timm") is None:
        return "timm not installed"
    try:
        _import_timm()
    except Exception as error:
        return f"timm cannot be imported: {error}"
    return None


def _no_torchscript(subject: Subject) -> str | None:
    if subject.dtype != torch.float32:
        return "the recipe is for float32"
    return _cpu_only(subject)


def _no_onnxruntime(subject: Subject) -> str | None:
    return _cpu_only(subject) or _missing("onnx", "onnxscript", "onnxruntime", extra="onnx")


def _no_openvino(subject: Subject) -> str | None:
    return _cpu_only(subject) or _missing("onnx", "onnxscript", extra="onnx") or _missing("openvino", extra="openvino")


RIVALS: tuple[Contender, ...] = (
    Contender(EAGER, _eager),
    Contender("eager, BatchNorm folded, channels_last", _folded),
    Contender("timm, eager", _timm, _no_timm),
    Contender("TorchScript, optimize_for_inference", _torchscript, _no_torchscript),
    Contender("torch.compile", lambda s: _compiled(s, "default", freezing=False), _no_compiler, cost="compile"),
    Contender("torch.compile, max-autotune, freezing", _max_autotune, _no_compiler, cost="compile"),
    Contender("ONNX Runtime", _onnxruntime, _no_onnxruntime, cost="export"),
    Contender("OpenVINO", _openvino, _no_openvino, cost="export"),
)
"""Everything the library is held against. An operator call has BatchNorm folded by contract, so on operators the rivals get it
folded for nothing."""


def _no_backend(backend: str, subject: Subject) -> str | None:
    return None if backend == AUTO else backends.load(backend).unavailable(subject.device)


def ours() -> tuple[Contender, ...]:
    """This library: as ``"auto"`` serves it, on each of its backends, and put into timm's model by ``accelerate``."""
    own = (
        Contender(
            ours_name(backend),
            functools.partial(_ours, backend=backend),
            functools.partial(_no_backend, backend),
            ours=True,
        )
        for backend in (AUTO, *backends.PRIORITY)
    )
    return (*own, Contender(f"{OURS_PREFIX}, accelerate(timm)", _accelerated, _no_timm, cost="export", ours=True))


def ours_name(backend: str) -> str:
    return f"{OURS_PREFIX}, {backend}"


def contenders() -> tuple[Contender, ...]:
    """All of them: the rivals, eager first, then this library's own."""
    return (*RIVALS, *ours())
