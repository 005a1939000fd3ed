"""What a kernel is asked to run with instead of its own choice: tile sizes and the like, found by measuring.

A setting is a dict of names to integers that only the kernel's file understands. The tuner tries those that ``candidates`` of that
file lists; the dispatcher passes on the one a measured table names. It changes nothing but speed and the order of sums.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch

Setting = Mapping[str, int]

_current: ContextVar[Setting | None] = ContextVar("lowkernels_setting", default=None)


def current() -> Setting:
    """The setting of the call under way in this thread; empty where the kernel is to choose itself."""
    return _current.get() or {}


@contextlib.contextmanager
def using(setting: Setting) -> Iterator[None]:
    """Kernels that start within this context (and thread) run with ``setting``, whatever tables say; empty: as they choose."""
    token = _current.set(setting)
    try:
        yield
    finally:
        _current.reset(token)


class WithSetting:
    """A kernel file whose ``forward`` runs with a setting; everything else is the file's own."""

    def __init__(self, kernel: Any, setting: Setting) -> None:
        self._kernel = kernel
        self._setting = setting

    def forward(self, x: torch.Tensor, *args: Any) -> torch.Tensor:
        with contextlib.nullcontext() if _current.get() is not None else using(self._setting):
            out: torch.Tensor = self._kernel.forward(x, *args)
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)
