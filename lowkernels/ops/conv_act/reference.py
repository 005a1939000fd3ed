"""The eager reference of conv_act."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..eager import activate, add, unsupported_input, unsupported_weights

__all__ = ["forward", "pack", "unsupported_input", "unsupported_weights"]


def pack(*weights: object) -> list[Tensor]:
    return []


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act: str,
    stride: int,
    padding: int,
    residual: Tensor | None,
    pool: bool,
    packed: list[Tensor] | None,
) -> Tensor:
    out = activate(F.conv2d(x, weight, bias, stride, padding), act)
    if residual is not None:
        out = add(out, residual)
    return out.mean((2, 3)) if pool else out
