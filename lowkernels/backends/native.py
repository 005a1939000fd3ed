"""What the backends made of C++ have in common: where their libraries are kept, building one once, loading one once.

Environment variables: ``LOWKERNELS_CACHE_DIR``, the directory of the cache (default: ``$XDG_CACHE_HOME/lowkernels`` or
``~/.cache/lowkernels``); ``LOWKERNELS_JIT=0``, never compile on first use, only use what is built.
"""

from __future__ import annotations

import logging
import os
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

CACHE_VARIABLE = "LOWKERNELS_CACHE_DIR"
JIT_VARIABLE = "LOWKERNELS_JIT"

_log = logging.getLogger("lowkernels")


class BuildError(RuntimeError):
    """The kernels could not be compiled."""


def cache_folder() -> Path:
    """Where libraries, and tables of ``lowkernels tune``, are kept."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lowkernels"


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


def run(command: Sequence[str]) -> str:
    """Run a compiler; what it printed.

    Raises:
        BuildError: it failed, with the end of what it printed.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-20:])
        raise BuildError(f"`{' '.join(command)}` failed:\n{tail}")
    return done.stdout + done.stderr


def build_once(path: Path, built: Callable[[], Path | None], compile_library: Callable[[Path], None], what: str) -> Path:
    """The library ``path`` in the cache, built by whichever process comes first; the others wait for it.

    Args:
        path: where it is put.
        built: asked, once it is this process's turn, whether it is there by now.
        compile_library: puts it there.
        what: which kernels, by what and how long it takes, for the log.

    Raises:
        BuildError: ``compile_library`` failed.
    """
    import fcntl  # not on every platform; those without it have no kernels either

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if built() is None:
            _log.warning("compiling the %s, into %s, once (%s=0 turns this off)", what, path.parent, JIT_VARIABLE)
            start = time.monotonic()
            compile_library(path)
            _log.info("compiled in %.0f s", time.monotonic() - start)
    return path


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
