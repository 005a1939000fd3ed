"""Triton kernels: NVIDIA GPUs of compute capability 8.0 and up; CPU tensors only in Triton's interpreter.

The interpreter (``TRITON_INTERPRET=1`` in the environment before lowkernels is imported) is for tests: it is exact and very slow,
so ``auto`` does not choose it. Ask for it with ``backend="triton"``.

What the kernels of the operators share: ``device``: functions the kernels are made of; ``packing``: weight layouts; ``launch``:
from a planned launch to a running one; ``configs``: tile sizes by operator, architecture and shape; ``aot``: compiles every shipped
configuration without a GPU; ``layers``: the shapes of the LowFormer models, which the configurations are made for. None of them,
nor Triton, is imported before a call is served by this backend or asks why it cannot be.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .. import INTERPRETING

NAME = "triton"
KERNEL = "triton"
DEVICES = ("cpu",) if INTERPRETING else ("cuda",)
SELF_CHECK = not INTERPRETING

MINIMUM_ARCH = (8, 0)


@functools.cache
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed"
    return None


@functools.cache
def _unavailable_cuda() -> str | None:
    if _missing() is not None:
        return _missing()
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device is available"
    # Of several GPUs one may be too old: calls on that one are refused when they come.
    major, minor = max(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    if (major, minor) < MINIMUM_ARCH:
        return f"the GPU here has compute capability {major}.{minor}; its kernels need {MINIMUM_ARCH[0]}.{MINIMUM_ARCH[1]} or more"
    return None


def unavailable(device_type: str) -> str | None:
    if device_type == "cuda":
        return "its interpreter (TRITON_INTERPRET=1) serves CPU tensors only" if INTERPRETING else _unavailable_cuda()
    if device_type != "cpu":
        return f"it has no kernels for {device_type} tensors"
    if not INTERPRETING:
        return "it serves CPU tensors only in Triton's interpreter (set TRITON_INTERPRET=1 before lowkernels is imported)"
    return _missing()


def sizes(operator: str, call: Sequence[Any]) -> str:
    """Where the configuration that a call has without a setting is from: ``"table row 3"`` or ``"cost model"``."""
    from . import launch, model

    def empty(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        layout = torch.channels_last if value.dim() == 4 else torch.contiguous_format
        return torch.empty(value.shape, dtype=value.dtype, device="meta", memory_format=layout)

    # Whoever listens is not to hear of it, and tensors made under a fake mode would be fake.
    with _disable_current_modes():
        return model.launches(operator, tuple(map(empty, call)), launch.target(call[0]))[-1].origin


def describe() -> str:
    try:
        name = f"triton {version('triton')}"
    except PackageNotFoundError:
        return "triton is not installed"
    if INTERPRETING:
        return f"{name}, interpreting kernels on the CPU (TRITON_INTERPRET is set): for tests"
    return f"{name}; {_unavailable_cuda() or 'GPU kernels'}"
