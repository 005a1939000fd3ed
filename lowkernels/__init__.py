"""Fused kernels for convolutional-transformer vision backbones."""

from __future__ import annotations

from . import nn, ops
from ._version import __version__
from .dispatch import Choice, use_backend
from .errors import BackendError, FrozenError, InputError, LowkernelsError
from .nn import freeze, repack

__all__ = [
    "BackendError",
    "Choice",
    "FrozenError",
    "InputError",
    "LowkernelsError",
    "__version__",
    "freeze",
    "nn",
    "ops",
    "repack",
    "use_backend",
]
