"""Fused kernels for convolutional-transformer vision backbones."""

from __future__ import annotations

from . import nn, ops
from ._version import __version__
from .dispatch import Choice, use_backend
from .errors import BackendError, FrozenError, InputError, LowkernelsError
from .graphs import graphed
from .nn import freeze, repack
from .ops import explain
from .patching import accelerate, restore
from .report import Report, Row, report

__all__ = [
    "BackendError",
    "Choice",
    "FrozenError",
    "InputError",
    "LowkernelsError",
    "Report",
    "Row",
    "__version__",
    "accelerate",
    "explain",
    "freeze",
    "graphed",
    "nn",
    "ops",
    "repack",
    "report",
    "restore",
    "use_backend",
]
