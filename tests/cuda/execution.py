"""Runs the CUDA kernels' own source on the CPU, through the shim in ``tests/cuda/shim``, and says what was wrong with it.

Two libraries: *machine* (the shim and ``csrc/cuda/bind.cpp``, registered for CPU tensors), loaded once into a process, and
*kernels* (the .cu files), of which any number may be loaded, such as deliberately broken ones.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lowkernels.backends.cuda import build
from lowkernels.testing import error_budget, measure_error

SHIM = Path(__file__).parent / "shim"
SOURCES = build.sources()
KERNELS = ("conv_act", "separable_conv", "mbconv", "fused_mbconv", "gn_mlp", "lowtention")
# One warp after another, lanes upwards; warps in random order running ahead, lanes downwards.
SCHEDULES = ((0, 1), (1, 20250117))

_COMMON = ("-std=c++20", "-fPIC", "-fno-strict-aliasing", "-DLOWKERNELS_SHIM", f"-I{SOURCES}", f"-I{SHIM}")
# -fsanitize=thread turns every access to memory into a call, which the shim answers; its own runtime is not linked.
_KERNEL_FLAGS = (*_COMMON, "-O1", "-g1", "-fsanitize=thread", "-march=x86-64-v3", "-x", "c++")
_MACHINE_FLAGS = (*_COMMON, "-O2", "-march=x86-64-v3")


def unusable() -> str | None:
    """Why the shim cannot run here, or None."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"the shim is for x86-64; this is {platform.machine()}"
    if shutil.which("g++") is None:
        return "the shim needs g++ 12 or newer: there is none"
    version = subprocess.run(["g++", "-dumpversion"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.split(".")[0]) < 12:
        return f"the shim needs g++ 12 or newer: this is {version}"
    return None


class Traffic(NamedTuple):
    """Bytes of a tensor that one launch moved.

    Attributes:
        asked: read by warps, each byte once an instruction: what comes from the L2 cache if the L1 cache keeps nothing.
        once: read by CTAs, each byte once a CTA: what comes from there if the L1 cache keeps everything.
        written: written.
    """

    asked: int
    once: int
    written: int


@dataclass
class Outcome:
    """What one run under the shim showed.

    Attributes:
        reports: one line each: kind, place, how often, and the first case.
        barriers: every barrier that was met, as ``file:line``.
        blocks: CTAs run.
        launches: kernels launched.
        shared: the most shared memory a launch asked for, in bytes.
        traffic: what each launch moved, by the address of the tensor; empty unless asked for.
    """

    reports: list[str] = field(default_factory=list)
    barriers: list[str] = field(default_factory=list)
    blocks: int = 0
    launches: int = 0
    shared: int = 0
    traffic: list[dict[int, Traffic]] = field(default_factory=list)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-3000:]}"


def _library(name: str, sources: dict[str, bytes], compile_: Callable[[Path], None]) -> Path:
    """The library compiled from `sources`, kept in the temporary folder under a digest of them."""
    digest = hashlib.sha256(repr((sorted(sources.items()), _KERNEL_FLAGS, torch.__version__)).encode()).hexdigest()[:20]
    folder = Path(tempfile.gettempdir()) / f"lowkernels-shim-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-{digest}.so"
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.is_file():
            compile_(path)
    return path


def _contents(*folders: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for folder in folders for path in folder.iterdir() if path.is_file()}


@functools.cache
def machine() -> ctypes.CDLL:
    """The shim and the binding, loaded, with the operators of ``lowkernels_cuda`` registered for CPU tensors."""
    torch_folder = Path(torch.__file__).parent

    def compile_(path: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            include = ("-isystem", str(torch_folder / "include"))
            target = (
                "-DTORCH_TARGET_VERSION=0x020a000000000000",
                "-DLOWKERNELS_KEY=CPU",
                '-DLOWKERNELS_VERSION="shim"',
                '-DLOWKERNELS_ARCHITECTURES=""',
            )
            files = {SHIM / "shim.cpp": (), SHIM / "forward.cpp": (), SOURCES / "bind.cpp": (*include, *target)}
            objects = [f"{folder}/{source.stem}.o" for source in files]
            for (source, flags), output in zip(files.items(), objects, strict=True):
                _run(["g++", *_MACHINE_FLAGS, *flags, "-c", str(source), "-o", output])
            _run(["g++", "-shared", *objects, "-o", f"{folder}/out.so", f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-ldl"])
            shutil.move(f"{folder}/out.so", path)

    from lowkernels.backends.cuda import library

    assert set(library.SCHEMAS) >= set(KERNELS)
    path = _library("machine", _contents(SHIM, SOURCES), compile_)
    loaded = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    torch.ops.load_library(str(path))
    for name in ("shim_end", "shim_barriers", "shim_choose", "shim_traffic"):
        getattr(loaded, name).restype = ctypes.c_char_p
    loaded.shim_blocks.restype = ctypes.c_long
    loaded.shim_launches.restype = ctypes.c_long
    loaded.shim_most_shared.restype = ctypes.c_size_t
    return loaded


def kernels(changes: dict[str, Callable[[str], str]] | None = None, names: Sequence[str] = KERNELS) -> Path:
    """The kernels' library, compiled if need be.

    Args:
        changes: file name -> what to make of its text, for broken variants.
        names: the operators to compile.
    """
    texts = {name: content.decode() for name, content in _contents(SOURCES).items()}
    for name, change in (changes or {}).items():
        changed = change(texts[name])
        assert changed != texts[name], f"the change of {name} changes nothing"
        texts[name] = changed

    def compile_(path: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for name, text in texts.items():
                Path(folder, name).write_text(text)
            flags = [f"-I{folder}" if flag == f"-I{SOURCES}" else flag for flag in _KERNEL_FLAGS]
            objects = [f"{folder}/{name}.o" for name in names]
            commands = [["g++", *flags, "-c", f"{folder}/{name}.cu", "-o", out] for name, out in zip(names, objects, strict=True)]
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(_run, commands))
            _run(["g++", "-shared", *objects, "-o", f"{folder}/out.so"])
            shutil.move(f"{folder}/out.so", path)

    kept = {name: text.encode() for name, text in texts.items() if not name.endswith(".cu") or name[:-3] in names}
    kept["names"] = repr(tuple(names)).encode()
    kept["shim.h"] = (SHIM / "shim.h").read_bytes()
    return _library("kernels", kept, compile_)


def sums_are_right(found: NDArray[np.float32], expected: torch.Tensor, terms: int) -> bool:
    """Whether sums of ``terms`` products, which are exact in fp32, are within the error budget's bound for the largest element."""
    result = torch.from_numpy(np.ascontiguousarray(found))
    nothing = measure_error(expected, expected)
    return measure_error(result, expected).maximum <= error_budget(nothing, expected, torch.float32, terms).maximum


def alone(name: str, change: tuple[str, str] | None = None) -> Path:
    """A kernel of the tests, ``name``.cu here, compiled for the shim; ``change`` is a text in it and what to make of that."""
    text = (Path(__file__).parent / f"{name}.cu").read_text()
    if change is not None:
        assert change[0] in text, f"{name}.cu has no {change[0]!r}"
        text = text.replace(*change, 1)

    def compile_(path: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, f"{name}.cu").write_text(text)
            _run(["g++", *_KERNEL_FLAGS, "-c", f"{folder}/{name}.cu", "-o", f"{folder}/out.o"])
            _run(["g++", "-shared", f"{folder}/out.o", "-o", f"{folder}/out.so"])
            shutil.move(f"{folder}/out.so", path)

    headers = {file: text for file, text in _contents(SOURCES, SHIM).items() if file.endswith((".h", ".cuh"))}
    return _library(name, {**headers, f"{name}.cu": text.encode()}, compile_)


def on_gpu(name: str) -> ctypes.CDLL:
    """A kernel of the tests, compiled for the GPU here."""
    nvcc = build.compiler()
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    folder = Path(tempfile.mkdtemp())
    source = Path(__file__).parent / f"{name}.cu"
    command = build.kernel_command(nvcc, build.architectures(build._listed()))
    _run([*command, f"-I{SOURCES}", f"-I{SHIM}", "-c", str(source), "-o", str(folder / "out.o")])
    _run([nvcc, "-shared", "-cudart=static", str(folder / "out.o"), "-o", str(folder / "out.so")])
    return ctypes.CDLL(str(folder / "out.so"))


def choose(library: Path) -> None:
    """Make `library` the kernels that run from now on."""
    problem = machine().shim_choose(str(library).encode())
    assert problem is None, problem


def _located(report: str, library: Path) -> str:
    kind, place, count, text = report.split("\t")
    if place.startswith("+"):
        command = ["addr2line", "-e", str(library), "-i", "-s", hex(int(place[1:]) - 1)]
        frames = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        # Innermost first; the helpers of the headers are not what one wants to know.
        place = " < ".join(re.sub(r" \(discriminator.*", "", f) for f in frames if not f.startswith("shim.h"))
    return f"{kind} at {re.sub(r'[^ ]*/', '', place)} ({count} times; {text})"


@contextmanager
def watched(
    library: Path, schedule: tuple[int, int] = SCHEDULES[0], skip: str = "", only_last: int = 0, count: bool = False
) -> Iterator[Outcome]:
    """Within this context, calls of ``lowkernels_cuda`` on CPU tensors run `library`; afterwards the outcome is filled in.

    Args:
        library: from :func:`kernels`.
        schedule: one of :data:`SCHEDULES`.
        skip: a barrier, ``file:line``, that still stops threads but orders nothing.
        only_last: run only so many last blocks of each launch, and do not ask for the bytes that others would write.
        count: count the bytes that launches move.
    """
    choose(library)
    shim = machine()
    outcome = Outcome()
    shim.shim_begin(schedule[0], ctypes.c_ulonglong(schedule[1]), skip.encode())
    shim.shim_only_last(ctypes.c_long(only_last))
    if count:
        shim.shim_count()
    try:
        yield outcome
    finally:
        lines = shim.shim_end().decode().splitlines()
        outcome.reports = [_located(line, library) for line in lines]
        outcome.barriers = shim.shim_barriers().decode().splitlines()
        outcome.blocks = shim.shim_blocks()
        outcome.launches = shim.shim_launches()
        outcome.shared = shim.shim_most_shared()
        outcome.traffic = [{} for _ in range(outcome.launches)] if count else []
        for line in shim.shim_traffic().decode().splitlines():
            launch, address, *moved = map(int, line.split())
            outcome.traffic[launch - 1][address] = Traffic(*moved)


def run(operator: str, args: tuple[Any, ...], packed: bool = False) -> torch.Tensor:
    """One call of the public operator on the backend, inside of :func:`watched`."""
    from lowkernels.ops import OPERATORS

    op = OPERATORS[operator]
    weights = op.pack(*op.weights(args), backend="cuda") if packed else None
    result: torch.Tensor = op.overload(*args, *((weights.tensors, weights.backend) if weights else (None, None)), "cuda")
    return result
