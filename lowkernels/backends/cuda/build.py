"""Building and loading the CUDA kernels of ``csrc/cuda``.

They are compiled by the user's nvcc, g++ and ninja into a cache directory, once for each version of the sources, the
first time an operator asks for them on a machine with a GPU; never at import. ``lowkernels build --cuda`` does it ahead of time and
needs no GPU; with ``--output`` it puts the library into a folder, and the one that this file is in is looked into before the cache.
The library uses PyTorch's stable ABI: one file serves PyTorch 2.10 and every later one.

Environment variables: ``TORCH_CUDA_ARCH_LIST``, compute capabilities to compile for, such as ``"8.0;9.0a+PTX"`` (default: those of
the GPUs here for a build on first use, :data:`ARCHITECTURES` and PTX for later ones ahead of time); ``CUDA_HOME``, where nvcc is if
it is not on PATH; ``CXX``, nvcc's host compiler (default: ``g++``); and those of :mod:`lowkernels.backends.native`.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import logging
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import native
from ..native import JIT_VARIABLE, NO_NINJA, BuildError, Link, Loading, Unit, cache_folder

ARCHITECTURES_VARIABLE = "TORCH_CUDA_ARCH_LIST"
ARCHITECTURES = "8.0+PTX;8.6;8.9;9.0a;10.0;12.0"
MINIMUM_CAPABILITY = (8, 0)
# The first nvcc that knows all of ARCHITECTURES.
_MINIMUM_NVCC = (12, 8)
_PREBUILT = "lowkernels_cuda.so"
# Texts that csrc/cuda/bind.cpp leaves in the library.
_VERSION = b"lowkernels-cuda-version:"
_COMPILED_FOR = b"lowkernels-cuda-architectures:"

_KERNELS: tuple[str, ...] = ("conv_act", "separable_conv", "mbconv", "fused_mbconv", "gn_mlp", "lowtention")
_KERNELS += ("conv_act_sm90", "fused_mbconv_sm90", "gn_mlp_sm90", "mbconv_sm90")
# The Python files that lay out what the library is called with.
_ARGUMENTS = ("library.py", "pack.py", "tiling.py", "chains.py", "hopper.py", "hopper_conv.py")
# -Xptxas=-v: what each kernel takes of registers and memory, for the logger.
_NVCC_FLAGS = ("-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v")
# TORCH_TARGET_VERSION 2.10: nothing newer than that release's ABI is used.
_HOST_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000")

_log = logging.getLogger("lowkernels")
_loading = Loading()


def sources() -> Path:
    """The folder of the CUDA sources."""
    return native.sources("cuda")


@functools.cache
def version() -> str:
    """What a library must have been built from: a digest of the sources, and of the Python files that lay out its arguments."""
    python = Path(__file__).parent
    parts = native.digest(sources()), [(python / name).read_bytes() for name in _ARGUMENTS]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]


def compiler() -> str | None:
    """nvcc's path, or None. Nothing is run."""
    home = os.environ.get("CUDA_HOME")
    inside = [f"{home}/bin/nvcc"] if home else []
    return next((found for name in (*inside, "nvcc", "/usr/local/cuda/bin/nvcc") if (found := shutil.which(name))), None)


def architectures(listed: str) -> list[tuple[str, str]]:
    """nvcc's (compute, code) pairs for a list such as ``"8.0;9.0a+PTX"``, without what the kernels cannot run on.

    Raises:
        BuildError: an entry is not a compute capability, or none is left.
    """
    pairs: list[tuple[str, str]] = []
    for entry in re.split(r"[;,\s]+", listed.strip()):
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if found is None:
            raise BuildError(f"{ARCHITECTURES_VARIABLE} has {entry!r}; allowed are compute capabilities like 8.0, 9.0a or 8.6+PTX")
        major, minor, suffix, ptx = found.groups()
        if (int(major), int(minor)) < MINIMUM_CAPABILITY:
            continue
        name = f"{major}{minor}{suffix}"
        pairs.append((f"compute_{name}", f"sm_{name}"))
        if ptx:
            pairs.append((f"compute_{name}", f"compute_{name}"))
    if not pairs:
        raise BuildError(f"{ARCHITECTURES_VARIABLE} is {listed!r}; the CUDA kernels need a compute capability of 8.0 or more")
    return pairs


def architecture_for(capability: tuple[int, int]) -> str:
    """The entry of :data:`ARCHITECTURES` whose code a GPU of this compute capability runs.

    That is the one of the same major and the highest minor version that is not above its own; GPUs without one translate the PTX of
    the first entry.
    """
    entries = ARCHITECTURES.split(";")
    for entry in reversed(entries):
        major, minor = map(int, re.findall(r"\d+", entry))
        if major == capability[0] and minor <= capability[1]:
            return entry.removesuffix("+PTX")
    return entries[0]


@functools.cache
def _present() -> str | None:
    """What to compile for the GPUs here, as TORCH_CUDA_ARCH_LIST has it."""
    if not torch.cuda.is_available():
        return None
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return ";".join(dict.fromkeys(architecture_for(capability) for capability in sorted(found)))


def _listed() -> str:
    return os.environ.get(ARCHITECTURES_VARIABLE) or _present() or ARCHITECTURES


def library_name() -> str:
    """The file name in the cache: it holds a digest of the version, the architectures and the flags."""
    parts = (version(), architectures(_listed()), _NVCC_FLAGS, _HOST_FLAGS)
    return f"lowkernels_cuda-{hashlib.sha256(repr(parts).encode()).hexdigest()[:20]}.so"


def library_version(path: Path) -> str | None:
    """The version a library was built from, read without loading it; None if it is not one of ours."""
    return _text(path, _VERSION)


def library_architectures(path: Path) -> str | None:
    """The compute capabilities a library was compiled for, as TORCH_CUDA_ARCH_LIST has them."""
    return _text(path, _COMPILED_FOR)


@functools.cache
def compiled_for(architecture: str) -> bool:
    """Whether the library at hand has machine code for an entry of TORCH_CUDA_ARCH_LIST such as ``9.0a``."""
    path = built()
    listed = library_architectures(path) if path is not None else None
    return architecture in (entry.removesuffix("+PTX") for entry in re.split(r"[;,\s]+", listed or ""))


def _text(path: Path, marker: bytes) -> str | None:
    content = path.read_bytes()
    at = content.find(marker)
    if at < 0:
        return None
    return content[at + len(marker) :].split(b"\0", 1)[0].decode(errors="replace")


@functools.cache
def _prebuilt() -> tuple[Path | None, str | None]:
    """The library in the package's folder if it is of this version; otherwise why not, if there is one."""
    path = Path(__file__).parent / _PREBUILT
    if not path.is_file():
        return None, None
    found = library_version(path)
    if found == version():
        return path, None
    return None, f"{path} is of version {found}, not of {version()}: build it again"


def built() -> Path | None:
    """The library for these sources, if there is one."""
    path = _prebuilt()[0]
    if path is not None:
        return path
    path = cache_folder() / library_name()
    return path if path.is_file() and library_version(path) == version() else None


def _checked_compiler() -> tuple[str, str]:
    """nvcc, and what it says of itself."""
    path = compiler()
    if path is None:
        raise BuildError("no CUDA compiler: nvcc is neither in $CUDA_HOME/bin nor on PATH")
    identity = native.run([path, "--version"])
    found = re.search(r"release (\d+)\.(\d+)", identity)
    if found is None:
        raise BuildError(f"{path} --version names no release")
    release = int(found[1]), int(found[2])
    if release < _MINIMUM_NVCC:
        raise BuildError(f"{path} is nvcc {found[1]}.{found[2]}; needed is {_MINIMUM_NVCC[0]}.{_MINIMUM_NVCC[1]} or newer")
    return path, identity


def kernel_command(nvcc: str, pairs: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """The command that compiles a kernel file, without the names of files."""
    host = os.environ.get("CXX")
    targets = (f"-gencode=arch={compute},code={code}" for compute, code in pairs)
    return nvcc, *(("-ccbin", host) if host else ()), *_NVCC_FLAGS, *targets


def compile_library(output: Path, objects: Path | None = None, listed: str | None = None) -> None:
    """Compile the library to ``output``, replacing it at once when done. The ``lowkernels`` logger gets, as a debug message, what
    the compiler says of the registers and memory of the kernels it compiled.

    Args:
        output: a file name.
        objects: a folder whose folders keep object files for the next build; None: they are not kept.
        listed: compute capabilities as in ``TORCH_CUDA_ARCH_LIST``; None: as the module's documentation says.

    Raises:
        BuildError: no usable compiler, no ninja, or it failed.
    """
    nvcc, identity = _checked_compiler()
    host = shutil.which(os.environ.get("CXX") or "g++")
    if host is None:
        raise BuildError(f"no C++ compiler: {os.environ.get('CXX') or 'g++'} is not on PATH")
    torch_folder = Path(torch.__file__).parent
    listed = listed or _listed()
    pairs = architectures(listed)
    # The version differs with every edit of a source, so it is in the one file that does not take long to compile.
    defines = f'-DLOWKERNELS_VERSION="{version()}"', f'-DLOWKERNELS_ARCHITECTURES="{listed}"'
    units = [Unit(name, f"{name}.cu", kernel_command(nvcc, pairs)) for name in _KERNELS]
    units.append(Unit("bind", "bind.cpp", (host, *_HOST_FLAGS, *defines, f"-isystem{torch_folder / 'include'}")))
    # The CUDA runtime goes in whole: no version of libcudart is asked for, and without a driver the library still loads.
    libraries = f"-L{torch_folder / 'lib'}", "-Xlinker=--no-as-needed", "-ltorch_cpu", "-Xlinker=--exclude-libs,ALL"
    link = Link((nvcc, "-ccbin", host, "-shared", "-cudart=static"), libraries)
    depends_on = pairs, _NVCC_FLAGS, _HOST_FLAGS, torch.__version__, nvcc, identity, host, native.run([host, "--version"])
    said = native.build_library(output, sources(), units, link, objects=objects, depends_on=depends_on)
    _log.debug("%s", said)


def _build_once() -> Path:
    what = f"CUDA kernels with {compiler()}, about half a minute for each architecture"
    return native.build_once(cache_folder() / library_name(), built, compile_library, what)


def unusable() -> str | None:
    """Why the kernels cannot be used, as far as that can be said without compiling or loading anything, or None."""
    if _loading.done:
        return _loading.reason
    if sys.platform != "linux":
        return f"the CUDA kernels are for Linux; this is {sys.platform}"
    try:
        if built() is None:
            stale = _prebuilt()[1]
            state = "the CUDA kernels are not built" if stale is None else stale
            if os.environ.get(JIT_VARIABLE) == "0":
                return f"{state}, and {JIT_VARIABLE}=0 forbids building them on first use (lowkernels build --cuda)"
            if compiler() is None:
                return f"{state}, and there is no compiler: nvcc is neither in $CUDA_HOME/bin nor on PATH"
            if native.ninja() is None:
                return f"{state}, and {NO_NINJA}"
    except BuildError as error:
        return str(error)
    return None


def load() -> str | None:
    """Load the kernels, building them first if need be; why that failed, or None. The outcome is kept for the process."""
    return _loading.once(lambda: unusable() or _load())


def _load() -> str | None:
    try:
        path = built() or _build_once()
    except (BuildError, OSError) as error:
        return f"the CUDA kernels could not be built: {error}"
    return load_library(path)


def load_library(path: Path) -> str | None:
    """Load one library file; why it was refused, or None."""
    from . import library  # defines the operators the file implements

    assert library.SCHEMAS
    try:
        found = library_version(path)
        if found != version():
            return f"{path} is of version {found}, not of {version()}: build it again"
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"the CUDA kernels could not be loaded: {error}"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """``lowkernels build --cuda``: build ahead of time."""
    parser = argparse.ArgumentParser(prog="lowkernels build --cuda", description="Build the CUDA kernels.")
    parser.add_argument("--output", type=Path, help="folder to put the library into (default: the cache)")
    parser.add_argument("--objects", type=Path, help="with --output, folder to keep object files in (default: none)")
    asked = parser.parse_args(arguments)
    try:
        with native.shown():
            if asked.output is None:
                path = built() or _build_once()
            else:
                path = asked.output / _PREBUILT
                compile_library(path, asked.objects, os.environ.get(ARCHITECTURES_VARIABLE) or ARCHITECTURES)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(path)
    return 0
