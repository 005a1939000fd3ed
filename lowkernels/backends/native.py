"""What the backends made of C++ have in common: where their libraries are kept, building one once with ninja, loading one once.

A build folder keeps a copy of the sources, the object files, and what ninja knows of both. It is named after everything that object
files depend on besides the sources: flags, the compilers, PyTorch, the processor. A copied file changes when its content does,
whatever the time of the original says, so that ninja makes again what depends on it, and nothing else. Of each backend the
:data:`FOLDERS_KEPT` folders used last stay; what is older is removed after a build, unless somebody builds in it.

Environment variables: ``LOWKERNELS_CACHE_DIR``, the directory of the cache (default: ``$XDG_CACHE_HOME/lowkernels`` or
``~/.cache/lowkernels``); ``LOWKERNELS_JIT=0``, never compile on first use, only use what is built; ``MAX_JOBS``, how many compilers
run at once (default: as many as there are processors).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

CACHE_VARIABLE = "LOWKERNELS_CACHE_DIR"
JIT_VARIABLE = "LOWKERNELS_JIT"
JOBS_VARIABLE = "MAX_JOBS"
NO_NINJA = "there is no ninja: it is neither installed (pip install ninja) nor on PATH"

# Build folders of one backend that stay: each is of another compiler, PyTorch or set of flags.
FOLDERS_KEPT = 4
# What a build folder is renamed to before it is removed, so that it is gone at once.
_REMOVED = ".removed-"

# Lines of a failed build that a BuildError quotes: the first error is what matters.
_QUOTED_LINES = 40

_log = logging.getLogger("lowkernels")


class BuildError(RuntimeError):
    """The kernels could not be compiled."""


class Unit(NamedTuple):
    """One object file.

    Attributes:
        name: its file name without ``.o``.
        source: the name of the file it is compiled from.
        command: the compiler and its flags, without those that name files.
    """

    name: str
    source: str
    command: tuple[str, ...]


class Link(NamedTuple):
    """How object files become a library: the linker and its flags, and the libraries that come after the object files."""

    command: tuple[str, ...]
    libraries: tuple[str, ...]


def cache_folder() -> Path:
    """Where libraries, object files, and tables of ``lowkernels tune``, are kept."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lowkernels"


def objects_folder() -> Path:
    """The folder in the cache whose folders keep object files."""
    return cache_folder() / "build"


def sources(backend: str) -> Path:
    """The folder ``csrc/<backend>``: in the package, or beside it in a checkout.

    Raises:
        BuildError: it is in neither place.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "csrc" / backend, package.parent / "csrc" / backend):
        if folder.is_dir():
            return folder
    raise BuildError(f"the sources csrc/{backend} are neither in {package} nor beside it")


@functools.cache
def digest(folder: Path) -> str:
    """Names and contents of the files in a folder of sources, when this process first looked at it."""
    return _digest(_contents(folder))


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def _digest(contents: dict[str, bytes]) -> str:
    return hashlib.sha256(repr(sorted(contents.items())).encode()).hexdigest()


def ninja() -> str | None:
    """The path of ninja: of the Python package of that name, or on PATH. None if there is neither. Nothing is run."""
    try:
        from ninja import BIN_DIR as folder
    except ImportError:
        folder = ""
    return (shutil.which("ninja", path=folder) if folder else None) or shutil.which("ninja")


def run(command: Sequence[str]) -> str:
    """Run a compiler to ask it something; what it printed.

    Raises:
        BuildError: it failed, with the end of what it printed.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"{command[0]} does not run: {error}") from error
    if done.returncode:
        tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-20:])
        raise BuildError(f"`{' '.join(command)}` failed:\n{tail}")
    return done.stdout + done.stderr


def build_library(
    output: Path, sources: Path, units: Sequence[Unit], link: Link, *, objects: Path | None, depends_on: object
) -> str:
    """Build a library with ninja and put it to ``output``, replacing what is there at once when done.

    Whoever else builds in the same folder, in this process or another, is waited for, even if only its compilers are still alive.

    Args:
        output: a file name.
        sources: the folder of the sources. It must be as it was when :func:`digest` was first asked for it.
        units: what to compile.
        link: what to make of that.
        objects: the folder whose folders keep object files, so that the next build only makes what has changed; None: not kept.
            All but the :data:`FOLDERS_KEPT` of them that builds of ``sources.name`` used last are removed.
        depends_on: what object files depend on besides the sources and the files they include; its ``repr`` has to tell all.

    Returns:
        What the compilers printed.

    Raises:
        BuildError: there is no ninja, a compiler failed, or a folder cannot be written to.
    """
    path = ninja()
    if path is None:
        raise BuildError(NO_NINJA)
    name = f"{sources.name}-{hashlib.sha256(repr(depends_on).encode()).hexdigest()[:20]}"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            if objects is None:
                objects = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=output.parent, prefix=".build-")))
            folder = objects.absolute() / name
            lock = stack.enter_context(_locked(folder / ".lock"))
            _stage(sources, folder / "csrc" / sources.name)
            (folder / "build.ninja").write_text(_graph(f"csrc/{sources.name}", units, link), encoding="utf-8")
            said = _run_ninja(path, folder, lock)
            _publish(folder / "library.so", output)
            _prune(folder)
    except OSError as error:
        raise BuildError(f"{output} could not be built: {error}") from error
    return said


@contextlib.contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[int]:
    """Within it, nobody else has this lock; the descriptor of its file, which whoever inherits it keeps locked.

    Raises:
        BlockingIOError: somebody has it, and this is not to ``wait``.
    """
    import fcntl  # not on every platform; those without it have no kernels either

    with contextlib.ExitStack() as stack:
        while True:
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                lock = stack.enter_context(open(path, "w"))
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                # Meanwhile its folder may have been removed, and somebody else have locked a new file in a new one.
                if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                    break
            stack.close()
        yield lock.fileno()


def _prune(used: Path) -> None:
    """Remove the build folders of the same backend beside ``used`` that were used the longest ago, but for those in use."""

    def last_use(folder: Path) -> int:
        with contextlib.suppress(OSError):  # every build writes it
            return (folder / "build.ninja").stat().st_mtime_ns
        return 0

    backend = used.name.rpartition("-")[0]
    others = [path for path in used.parent.iterdir() if re.fullmatch(rf"{re.escape(backend)}-[0-9a-f]{{20}}", path.name)]
    others.remove(used)
    for folder in sorted(others, key=last_use, reverse=True)[FOLDERS_KEPT - 1 :]:
        # Its user has the lock; somebody may also have removed it already.
        with contextlib.suppress(OSError), _locked(folder / ".lock", wait=False):
            folder.rename(folder.with_name(f"{_REMOVED}{folder.name}-{os.getpid()}"))
    # Those of processes that were killed here, too.
    for path in used.parent.glob(f"{_REMOVED}*"):
        shutil.rmtree(path, ignore_errors=True)


def _stage(sources: Path, folder: Path) -> None:
    """Make ``folder`` a copy of ``sources``, leaving alone what is the same."""
    contents = _contents(sources)
    if _digest(contents) != digest(sources):
        raise BuildError(f"{sources} has changed since this process first looked at it; start a new one")
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.name not in contents:
            path.unlink()
    for name, content in contents.items():
        path = folder / name
        if not path.is_file() or path.read_bytes() != content:
            path.write_bytes(content)


def _graph(sources: str, units: Sequence[Unit], link: Link) -> str:
    """The text of build.ninja. Paths are relative to its folder, so that compilers name files as a checkout does."""

    def value(command: Sequence[str]) -> str:
        return shlex.join(command).replace("$", "$$")

    lines = [
        "rule compile",
        "  command = $compiler -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out from $in",
        "rule link",
        "  command = $linker $in -o $out $libraries",
        "  description = $out",
    ]
    for unit in units:
        lines += [f"build {unit.name}.o: compile {sources}/{unit.source}", f"  compiler = {value(unit.command)}"]
    lines += [
        f"build library.so: link {' '.join(f'{unit.name}.o' for unit in units)}",
        f"  linker = {value(link.command)}",
        f"  libraries = {value(link.libraries)}",
    ]
    return "\n".join(lines) + "\n"


def jobs() -> int:
    """How many compilers may run at once.

    Raises:
        BuildError: ``MAX_JOBS`` is not a number of 1 or more.
    """
    asked = os.environ.get(JOBS_VARIABLE)
    if not asked:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not asked.isdecimal() or int(asked) < 1:
        raise BuildError(f"{JOBS_VARIABLE} is {asked!r}; allowed are whole numbers of 1 or more")
    return int(asked)


def _run_ninja(path: str, folder: Path, lock: int) -> str:
    """Make what has to be made. Steps are logged as they end."""
    said: list[str] = []
    # With the lock's descriptor: if this process is killed, nobody starts before its compilers have come to an end.
    with subprocess.Popen(
        [path, "-j", str(jobs())],
        cwd=folder,
        env={**os.environ, "NINJA_STATUS": "step %f of %t: "},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        pass_fds=(lock,),
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if re.match(r"step \d+ of \d+: ", line):
                _log.info("%s", line.strip())
            else:
                said.append(line)
    if process.returncode:
        first = next((number for number, line in enumerate(said) if line.startswith(("FAILED", "ninja: error"))), 0)
        left_out = len(said) - first - _QUOTED_LINES
        more = f"... and {left_out} more lines" if left_out > 0 else ""
        raise BuildError(f"ninja failed in {folder}:\n{''.join(said[first : first + _QUOTED_LINES])}{more}".rstrip())
    return "".join(said)


def _publish(library: Path, output: Path) -> None:
    """Copy a file to where others may be reading the one before."""
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        shutil.copy(library, temporary)
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)


def build_once(path: Path, built: Callable[[], Path | None], compile_library: Callable[[Path, Path], None], what: str) -> Path:
    """The library ``path`` in the cache, built by whichever process comes first; the others wait for it.

    Args:
        path: where it is put.
        built: asked, once it is this process's turn, whether it is there by now.
        compile_library: puts it there, with a folder for object files.
        what: which kernels, by what and how long it takes, for the log.

    Raises:
        BuildError: ``compile_library`` failed, or the cache cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            if built() is None:
                _log.warning("compiling the %s, into %s, once (%s=0 turns this off)", what, path.parent, JIT_VARIABLE)
                start = time.monotonic()
                compile_library(path, objects_folder())
                _log.info("compiled in %.0f s", time.monotonic() - start)
    except OSError as error:
        raise BuildError(f"{path} could not be built: {error}") from error
    return path


@contextlib.contextmanager
def shown() -> Iterator[None]:
    """Within it, what is logged of a build goes to stderr: for a command line."""
    handler = logging.StreamHandler(sys.stderr)
    level = _log.level
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)
    try:
        yield
    finally:
        _log.setLevel(level)
        _log.removeHandler(handler)


class Loading:
    """Whether a library is loaded, which is tried once in a process.

    Attributes:
        done: it was tried.
        reason: why it failed, if it did.
    """

    def __init__(self) -> None:
        self.done = False
        self.reason: str | None = None
        self._lock = threading.Lock()

    def once(self, load: Callable[[], str | None]) -> str | None:
        """:attr:`reason`, after ``load``, which returns it, was called by whichever thread came first."""
        if not self.done:
            with self._lock:
                if not self.done:
                    self.reason = load()
                    self.done = True
        return self.reason
