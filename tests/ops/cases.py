"""What the operators are tested on: backends, configurations, memory layouts.

A backend is put under every test of this folder by adding it to :data:`BACKENDS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lowkernels import BackendError
from lowkernels.ops import OPERATORS
from lowkernels.testing import random_call

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Target:
    """A backend on a device type, with the dtypes it serves there."""

    backend: str
    device: str = "cpu"
    dtypes: tuple[torch.dtype, ...] = (torch.float32, *HALF)

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}"


def _on_gpu(target: Target) -> Any:
    return pytest.param(target, marks=pytest.mark.gpu)


BACKENDS = [Target("eager"), Target("cpu", dtypes=(torch.float32, torch.bfloat16)), _on_gpu(Target("eager", "cuda"))]

# Two or more per operator, covering every branch of its schema; small, so that numerical Jacobians stay affordable.
_SMALL = {"channels": 4, "height": 5, "width": 4, "hidden": 8, "num_heads": 1, "head_dim": 4}
CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "conv_act": {
        "3x3-residual": {"act": "gelu", "residual": True},
        "5x5-stride2": {"kernel_size": 5, "stride": 2, "out_channels": 8, "act": "silu", "bias": False},
        "1x1-pool": {"kernel_size": 1, "out_channels": 8, "act": "hardswish", "pool": True},
        "residual-pool": {"residual": True, "pool": True},
    },
    "separable_conv": {
        "3x3-residual": {"act": "silu"},
        "5x5-stride2": {"kernel_size": 5, "stride": 2, "out_channels": 8, "act": "gelu_tanh", "bias": False},
    },
    "mbconv": {
        "3x3-residual": {"act": "hardswish"},
        "7x7-stride2": {"kernel_size": 7, "stride": 2, "out_channels": 8, "act": "gelu", "bias": False},
        "no-padding": {"padding": 0, "act": "relu"},
    },
    "fused_mbconv": {
        "3x3-residual": {"act": "hardswish"},
        "3x3-stride2": {"stride": 2, "out_channels": 8, "act": "silu", "bias": False},
        "no-padding": {"padding": 0, "act": "relu6"},
    },
    "lowtention": {
        "3x3-norm": {"num_heads": 2},
        "5x5-stride2": {"kernel_size": 5, "stride": 2, "bias": False, "norm": False},
        "widening": {"out_channels": 8},
    },
    "gn_mlp": {
        "residual": {"act": "gelu"},
        "widening": {"out_channels": 8, "act": "relu", "bias": False},
    },
}
CASES = [
    pytest.param(operator, config, id=f"{operator}-{name}")
    for operator, configs in CONFIGS.items()
    for name, config in configs.items()
]
FIRST_CASES = [pytest.param(op, next(iter(configs.values())), id=op) for op, configs in CONFIGS.items()]
NAMES = list(OPERATORS)


def arguments(operator: str, config: dict[str, Any] | None = None, **overrides: Any) -> tuple[Any, ...]:
    """The arguments of a small random call."""
    return random_call(operator, **(_SMALL | (config or {}) | overrides)).args


def tensors(args: tuple[Any, ...]) -> list[Tensor]:
    return [a for a in args if isinstance(a, Tensor)]


def map_tensors(args: tuple[Any, ...], change: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
    return tuple(change(a) if isinstance(a, Tensor) else a for a in args)


def with_grad(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies of the arguments, with the same strides, whose gradients are wanted."""
    return map_tensors(args, lambda t: t.detach().requires_grad_())


def named(operator: str, args: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(OPERATORS[operator].argument_names, args, strict=True))


def run(operator: str, args: tuple[Any, ...], backend: str = "eager") -> Tensor:
    out: Tensor = OPERATORS[operator].overload(*args, None, None, backend)
    return out


def run_on(target: Target, operator: str, args: tuple[Any, ...]) -> Tensor:
    """Run one call on a backend; where that does not serve such calls, the test is skipped with its reason."""
    try:
        OPERATORS[operator].explain(*args, backend=target.backend)
    except BackendError as error:
        pytest.skip(str(error))
    return run(operator, args, target.backend)


def canonical_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) == 2:
        return (shape[1], 1)
    _, c, h, w = shape
    return (c * h * w, 1, c * w, c)


def _sliced(t: Tensor) -> Tensor:
    """The same values inside a larger buffer."""
    larger = torch.full([size + 3 for size in t.shape], float("nan"), dtype=t.dtype, device=t.device)
    view = larger[tuple(slice(1, 1 + size) for size in t.shape)]
    return view.copy_(t)


def _strided(t: Tensor) -> Tensor:
    """The same values at every second position of a buffer, from an odd offset on."""
    larger = torch.full([*t.shape[:-1], 2 * t.shape[-1] + 1], float("nan"), dtype=t.dtype, device=t.device)
    return larger[..., 1::2].copy_(t)


def _expanded(t: Tensor) -> Tensor:
    """The first entry of the first dimension for all of them, in one place of memory."""
    return t[:1].expand(t.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nhwc": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t.contiguous(),
    "nchw": torch.Tensor.contiguous,
    "sliced": _sliced,
    "strided": _strided,
    "expanded": _expanded,
}

# Every layout of each operator's first configuration, the ordinary layout of the others.
LAID_OUT = [
    pytest.param(operator, config, layout, id=f"{operator}-{name}-{layout}")
    for operator, configs in CONFIGS.items()
    for i, (name, config) in enumerate(configs.items())
    for layout in (LAYOUTS if i == 0 else ["nhwc"])
]
