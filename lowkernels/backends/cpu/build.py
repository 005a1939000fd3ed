"""Building and loading the C++ kernels of ``csrc/cpu``.

They are compiled once for each version of the sources and of torch, with the user's g++ and ninja, into a cache directory. That
happens the first time an operator asks for them (about half a minute on two cores, announced by one line of the
``lowkernels`` logger), never at import. ``lowkernels build`` does it ahead of time; with ``--output`` it puts the library into a
folder, and this one (``lowkernels/backends/cpu``) is looked into before the cache. Every instruction set of the machine's
architecture is compiled; the best one is chosen when the library is loaded.

Environment variables: those of :mod:`lowkernels.backends.native`; ``CXX``, the compiler (default: ``g++``);
``LOWKERNELS_CPU_ISA``, one of :data:`INSTRUCTION_SETS` instead of the best one.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import native
from ..native import JIT_VARIABLE, NO_NINJA, BuildError, Link, Loading, Unit, cache_folder

ISA_VARIABLE = "LOWKERNELS_CPU_ISA"

# Flags of each architecture's instruction sets, best last. g++ tunes skylake-avx512 for 256-bit vectors unless told otherwise.
_AVX512 = ("-march=skylake-avx512", "-mprefer-vector-width=512")
_X86 = {
    "avx2": ("-mavx2", "-mfma"),
    "avx512": _AVX512,
    "avx512_bf16": (*_AVX512, "-mavx512bf16"),
}
ISA_FLAGS: dict[str, dict[str, tuple[str, ...]]] = {"x86_64": _X86, "AMD64": _X86, "aarch64": {"neon": ()}}
INSTRUCTION_SETS: tuple[str, ...] = ("avx2", "avx512", "avx512_bf16", "neon")

_COMMON_FLAGS = ("-std=c++20", "-fopenmp", "-fPIC", "-Wall", "-Wextra")
KERNEL_FLAGS = (*_COMMON_FLAGS, "-O3", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
_TORCH_FLAGS = (*_COMMON_FLAGS, "-O2")
_MINIMUM_GCC = 11

_loading = Loading()


def sources() -> Path:
    """The folder of the C++ sources."""
    return native.sources("cpu")


def compiler() -> str | None:
    """The compiler's path, or None. Nothing is run."""
    return shutil.which(os.environ.get("CXX") or "g++")


def _abi() -> int:
    return int(torch.compiled_with_cxx11_abi())


def _depends_on() -> tuple[object, ...]:
    """What a library depends on besides the sources."""
    return ISA_FLAGS.get(platform.machine()), KERNEL_FLAGS, _TORCH_FLAGS, torch.__version__, _abi(), platform.machine()


@functools.cache
def library_name() -> str:
    """The library's file name: it holds a digest of the sources, the flags, torch's version and ABI, and the architecture."""
    digest = hashlib.sha256(repr((native.digest(sources()), _depends_on())).encode())
    return f"lowkernels_cpu-{digest.hexdigest()[:20]}.so"


def built() -> Path | None:
    """The library for these sources and this torch, if there is one."""
    for folder in (Path(__file__).parent, cache_folder()):
        path = folder / library_name()
        if path.is_file():
            return path
    return None


def _openmp() -> list[str]:
    # torch's own OpenMP library by its path: a second one would bring a second pool of threads.
    own = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return [str(own[0])] if own else ["-lgomp"]


def _checked_compiler() -> tuple[str, str]:
    """The compiler, and what it says of itself."""
    path = compiler()
    if path is None:
        raise BuildError(f"no C++ compiler: {os.environ.get('CXX') or 'g++'} is not on PATH")
    # clang brings an OpenMP runtime of its own, which must not meet torch's.
    try:
        macros = subprocess.run([path, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"the compiler {path} does not run: {error}") from error
    defined = dict(line.split(" ", 2)[1:] for line in macros.splitlines() if line.count(" ") >= 2)
    version = defined.get("__GNUC__", "0")
    if "__clang__" in defined or int(version) < _MINIMUM_GCC:
        kind = "clang" if "__clang__" in defined else f"g++ {version}"
        raise BuildError(f"the compiler {path} is {kind}; needed is g++ {_MINIMUM_GCC} or newer")
    return path, macros


def compile_library(output: Path, objects: Path | None = None) -> None:
    """Compile the library to ``output``, replacing it at once when done.

    Args:
        output: a file name.
        objects: a folder whose folders keep object files for the next build; None: they are not kept.

    Raises:
        BuildError: no usable compiler, no ninja, or it failed.
    """
    instruction_sets = ISA_FLAGS.get(platform.machine())
    if instruction_sets is None:
        raise BuildError(f"there are no kernels for {platform.machine()} processors; there are for {', '.join(ISA_FLAGS)}")
    path, identity = _checked_compiler()
    torch_folder = Path(torch.__file__).parent
    includes = (f"-isystem{torch_folder / 'include'}", f"-isystem{torch_folder / 'include/torch/csrc/api/include'}")
    units = [
        Unit("register", "register.cpp", (path, *_TORCH_FLAGS, *includes, f"-D_GLIBCXX_USE_CXX11_ABI={_abi()}")),
        *(
            Unit(name, "kernels.cpp", (path, *KERNEL_FLAGS, *flags, f"-DLOWKERNELS_ISA={name}"))
            for name, flags in instruction_sets.items()
        ),
    ]
    link = Link((path, "-shared"), (f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10", *_openmp()))
    native.build_library(output, sources(), units, link, objects=objects, depends_on=(*_depends_on(), path, identity))


def _build_once() -> Path:
    what = f"CPU kernels with {compiler()}, about half a minute"
    return native.build_once(cache_folder() / library_name(), built, compile_library, what)


def unusable() -> str | None:
    """Why the kernels cannot be used, as far as that can be said without compiling or loading anything, or None."""
    if _loading.done:
        return _loading.reason
    if sys.platform != "linux" or platform.machine() not in ISA_FLAGS:
        return f"the CPU kernels are for Linux on x86_64 and aarch64; this is {sys.platform} on {platform.machine()}"
    if platform.machine() != "aarch64" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX"):
        return "this processor has no AVX2"
    try:
        if built() is None:
            if os.environ.get(JIT_VARIABLE) == "0":
                return f"the CPU kernels are not built, and {JIT_VARIABLE}=0 forbids building them on first use (lowkernels build)"
            if compiler() is None:
                return f"the CPU kernels are not built, and there is no compiler: {os.environ.get('CXX') or 'g++'} is not on PATH"
            if native.ninja() is None:
                return f"the CPU kernels are not built, and {NO_NINJA}"
    except BuildError as error:
        return str(error)
    return None


def load() -> str | None:
    """Load the kernels, building them first if need be; why that failed, or None. The outcome is kept for the process."""
    return _loading.once(lambda: unusable() or _load())


def _load() -> str | None:
    try:
        torch.ops.load_library(str(built() or _build_once()))
        torch.ops.lowkernels_cpu.layout(False)
    except (BuildError, OSError, RuntimeError) as error:
        return f"the CPU kernels could not be built or loaded: {error}"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """``lowkernels build``: build ahead of time."""
    parser = argparse.ArgumentParser(prog="lowkernels build", description="Build the native CPU kernels.")
    parser.add_argument("--output", type=Path, help="folder to put the library into (default: the cache)")
    parser.add_argument("--objects", type=Path, help="with --output, folder to keep object files in (default: none)")
    asked = parser.parse_args(arguments)
    try:
        with native.shown():
            if asked.output is None:
                path = built() or _build_once()
            else:
                path = asked.output / library_name()
                compile_library(path, asked.objects)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(path)
    return 0
