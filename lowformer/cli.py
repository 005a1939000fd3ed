"""The command `lowformer`: classify photographs, list the models."""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn

from lowformer import LowFormer, WeightsUnavailableError, create_model, load_checkpoint, read_checkpoint
from lowformer.config import VARIANTS, get_config
from lowformer.imagenet import class_names
from lowformer.transforms import eval_transform, load_image
from lowkernels._version import __version__
from lowkernels.errors import LowkernelsError

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})
"""What counts as an image in a folder. A file named on the command line is tried whatever its name."""

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}

UNTRAINED = "untrained weights"


class UsageError(Exception):
    """What was asked for cannot be started; the message says what to change."""


@dataclass(frozen=True)
class Prediction:
    """One class of one image: its index in the model's output, its name and its softmax probability."""

    index: int
    name: str
    probability: float


@dataclass(frozen=True)
class Classified:
    """An image and its most probable classes, best first."""

    file: str
    predictions: list[Prediction]


@dataclass(frozen=True)
class Failed:
    """An image without a result, and why."""

    file: str
    error: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv` (default: the process's arguments) and return its exit code.

    0: all done; 1: some image could not be classified; 2: could not start; 130: interrupted.
    """
    args = _parser().parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except UsageError as error:
        print(f"lowformer: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lowformer: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output (head, less) has seen enough; without this Python complains when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lowformer", description="LowFormer image classifiers.")
    parser.add_argument("--version", action="version", version=f"lowformer {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    classify = commands.add_parser(
        "classify",
        help="name what photographs show",
        description="Name what photographs show. Exit code 0: all classified; 1: some image could not be; 2: could not start.",
    )
    classify.add_argument("paths", nargs="+", metavar="PHOTO|FOLDER", help="folders are searched for images, all levels")
    classify.add_argument("--model", default="lowformer_b1", help="default: %(default)s; `lowformer list` shows all")
    classify.add_argument(
        "--weights",
        default="hub",
        metavar="FILE|hub|none",
        help="a checkpoint file (.safetensors, .pt, .pth); hub: the published weights, downloaded once; "
        "none: deterministic untrained weights, to try the program without any (default: %(default)s)",
    )
    classify.add_argument(
        "--kernels",
        default="auto",
        metavar="NAME",
        help="eager: plain PyTorch; auto: lowkernels' operators, the fastest backend that works here; "
        "or one backend's name, see `lowkernels info` (default: %(default)s)",
    )
    classify.add_argument("--topk", type=_positive, default=5, metavar="K", help="classes shown (default: %(default)s)")
    classify.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    classify.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one, else cpu)")
    classify.add_argument("--batch-size", type=_positive, default=16, metavar="N", help="default: %(default)s")
    classify.add_argument(
        "--size",
        type=_positive,
        default=224,
        metavar="PIXELS",
        help="side of the model's input (default: %(default)s)",
    )
    classify.add_argument("--json", metavar="FILE|-", help="write all results and how they were made; -: to stdout")
    classify.add_argument("--csv", metavar="FILE|-", help="write a row for each image and class; -: to stdout")
    classify.set_defaults(run=_classify)

    models = commands.add_parser("list", help="list the models")
    models.set_defaults(run=_list)
    return parser


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return number


def _list(args: argparse.Namespace) -> int:
    print(f"{'model':<15}{'params (M)':>10}{'MMACs at 224':>14}{'top-1 (%)':>11}  published weights")
    for config in VARIANTS.values():
        weights = config.hub_id if config.has_weights else "none"
        print(f"{config.name:<15}{config.params_m:>10.2f}{config.mmacs_224:>14}{config.top1:>11.1f}  {weights}")
    return 0


def _classify(args: argparse.Namespace) -> int:
    if args.json == "-" and args.csv == "-":
        raise UsageError("--json - and --csv - cannot both write to stdout")
    for target in (args.json, args.csv):
        _check_writable(target)
    files = find_images(args.paths)
    device = _device(args.device)
    try:
        transform = eval_transform(args.size)
    except ImportError as error:
        raise UsageError(str(error)) from error
    model, names, weights = _load_model(args.model, args.weights, args.kernels)
    model.eval().to(device, DTYPES[args.dtype])

    note = f"  [{UNTRAINED}]" if weights == UNTRAINED else ""
    as_text = "-" not in (args.json, args.csv)
    if as_text:
        print(f"{args.model}, {weights}, kernels {args.kernels}, {args.dtype} on {device}")

    classified: list[Classified] = []
    failed: list[Failed] = []
    with _progress(len(files), shown=len(files) > args.batch_size) as advance:
        for results in _results(model, files, transform, names, args.topk, args.batch_size):
            for result in results:
                if isinstance(result, Failed):
                    failed.append(result)
                    continue
                classified.append(result)
                if as_text:
                    print(f"{result.file}{note}")
                    for prediction in result.predictions:
                        print(f"  {prediction.probability:7.2%}  {prediction.name}")
            advance(len(results))

    if args.json:
        report = {
            "model": args.model,
            "weights": weights,
            "trained": weights != UNTRAINED,
            "kernels": args.kernels,
            "dtype": args.dtype,
            "device": str(device),
            "size": args.size,
            "versions": _versions(),
            "images": [asdict(result) for result in classified],
            "failed": [asdict(result) for result in failed],
        }
        with _open_output(args.json) as file:
            json.dump(report, file, indent=1)
            file.write("\n")
    if args.csv:
        with _open_output(args.csv) as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(["file", "rank", "index", "name", "probability", "model", "weights"])
            for result in classified:
                for rank, best in enumerate(result.predictions, 1):
                    rows.writerow(
                        [
                            result.file,
                            rank,
                            best.index,
                            best.name,
                            repr(best.probability),
                            args.model,
                            weights,
                        ]
                    )

    if failed:
        sys.stdout.flush()
        print(f"lowformer: {len(failed)} of {len(files)} images could not be classified:", file=sys.stderr)
        for result in failed:
            print(f"  {result.file}: {result.error}", file=sys.stderr)
    return 1 if failed else 0


def find_images(paths: Sequence[str]) -> list[Path]:
    """List the image files that `paths` name: files as they are, those in folders (all levels) sorted.

    A folder gives the files with `IMAGE_SUFFIXES`; hidden files and folders in it are left out. Raises
    UsageError for a path that is not there and where no image is found at all.
    """
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        raise UsageError(f"no such file or folder: {', '.join(missing)}")
    found: list[Path] = []
    for path in paths:
        found += _images_below(Path(path)) if os.path.isdir(path) else [Path(path)]
    if not found:
        raise UsageError(f"no image in {', '.join(paths)} (looked for {' '.join(sorted(IMAGE_SUFFIXES))})")
    return found


def _images_below(folder: Path) -> list[Path]:
    found: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(parent, name) for name in names if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
        ]
    return sorted(found)


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    # torch has no common error here: without CUDA it is an AssertionError.
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {name!r} cannot be used: {reason}") from error
    return device


def _load_model(name: str, weights: str, kernels: str) -> tuple[LowFormer, Sequence[str], str]:
    """Make the model; return it with the names of its classes and a word for its weights."""
    names: Sequence[str] = class_names()
    try:
        if weights == "none":
            torch.manual_seed(0)
            return create_model(name, kernels=kernels), names, UNTRAINED
        if weights == "hub":
            return create_model(name, kernels=kernels, pretrained=True), names, get_config(name).hub_id
        state = read_checkpoint(weights)
        classifier = state.get("classifier.weight")
        classes = classifier.shape[0] if classifier is not None and classifier.ndim == 2 else len(names)
        model = create_model(name, kernels=kernels, num_classes=classes)
        load_checkpoint(model, state)
    except WeightsUnavailableError as error:
        raise UsageError(f"{error} (here: --weights FILE; --weights none tries the program with untrained weights)") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(str(error)) from error
    if classes != len(names):
        names = [str(index) for index in range(classes)]
    return model, names, weights


def _results(
    model: nn.Module,
    files: Sequence[Path],
    transform: Callable[[Any], Tensor],
    names: Sequence[str],
    topk: int,
    batch_size: int,
) -> Iterator[list[Classified | Failed]]:
    """Yield the outcome of every file, in order, a batch at a time."""
    like = next(model.parameters())

    def load(path: Path) -> Tensor | Failed:
        try:
            return transform(load_image(path))
        # A damaged file makes Pillow's decoders raise errors of nearly any type, and must not end the run.
        except Exception as error:
            return Failed(_printable(path), f"{error}" or type(error).__name__)

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(files), batch_size):
            batch = files[start : start + batch_size]
            loaded = list(pool.map(load, batch))
            images = [image for image in loaded if isinstance(image, Tensor)]
            rows = iter(_probabilities(model, images, like) if images else ())
            yield [
                outcome if isinstance(outcome, Failed) else _best(next(rows), _printable(path), names, topk)
                for path, outcome in zip(batch, loaded, strict=True)
            ]


@torch.inference_mode()
def _probabilities(model: nn.Module, images: list[Tensor], like: Tensor) -> Tensor:
    """Return the softmax of the model's logits, (N, classes), on the CPU."""
    batch = torch.stack(images).to(like.device, like.dtype, memory_format=torch.channels_last)
    try:
        logits: Tensor = model(batch)
    except LowkernelsError as error:
        raise UsageError(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise UsageError("the device is out of memory; pass a smaller --batch-size or --size") from error
    # Half precision would round the probabilities to three digits.
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1).cpu()


def _best(probabilities: Tensor, file: str, names: Sequence[str], topk: int) -> Classified | Failed:
    if not probabilities.isfinite().all():
        return Failed(file, "the model's output is not finite; the numbers may not fit this --dtype")
    best = probabilities.topk(min(topk, len(names)))
    return Classified(
        file,
        [
            Prediction(index, names[index], probability)
            for probability, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ],
    )


@contextmanager
def _progress(total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """Show on stderr how many images are done: in a terminal a bar (with rich), else now and then a line."""
    if not shown:
        yield lambda count: None
        return
    if sys.stderr.isatty():
        try:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
        except ImportError:
            pass
        else:
            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            # Lines for the same terminal are printed above the bar; a pipe must get its lines itself.
            with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=sys.stdout.isatty()) as bar:
                task = bar.add_task("", total=total)
                yield lambda count: bar.advance(task, count)
            return

    done, printed = 0, time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, printed
        done += count
        if time.monotonic() - printed >= 5:
            printed = time.monotonic()
            print(f"{done} of {total} images", file=sys.stderr)

    yield advance


def _versions() -> dict[str, str]:
    return {
        "lowkernels": __version__,
        "torch": torch.__version__,
        "pillow": version("pillow"),
        "python": platform.python_version(),
    }


def _printable(path: Path) -> str:
    """Return the path as text that can be encoded: a name that is not UTF-8 keeps its odd bytes as \\xNN."""
    return os.fsencode(path).decode("utf-8", errors="backslashreplace")


def _check_writable(target: str | None) -> None:
    """Find out before the work, not after it, that an output file cannot be written."""
    if target is None or target == "-":
        return
    folder = os.path.dirname(target) or "."
    if os.path.isdir(target) or not os.path.isdir(folder):
        raise UsageError(f"cannot write {target!r}: it must be a file name in a folder that exists")


@contextmanager
def _open_output(target: str) -> Iterator[TextIO]:
    if target == "-":
        yield sys.stdout
        return
    try:
        with open(target, "w", encoding="utf-8", newline="") as file:
            yield file
    except OSError as error:
        raise UsageError(f"cannot write {target!r}: {error.strerror}") from error
