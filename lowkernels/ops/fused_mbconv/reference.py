"""The eager reference of fused_mbconv."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..eager import activate, add, unsupported_input, unsupported_weights

__all__ = ["forward", "pack", "unsupported_input", "unsupported_weights"]


def pack(*weights: object) -> list[Tensor]:
    return []


def forward(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    act: str,
    stride: int,
    padding: int,
    residual: bool,
    packed: list[Tensor] | None,
) -> Tensor:
    out = activate(F.conv2d(x, conv_weight, conv_bias, stride, padding), act)
    out = F.conv2d(out, project_weight, project_bias)
    return add(out, x) if residual else out
