"""The eager reference of gn_mlp."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..eager import activate, add, group_norm, unsupported_input, unsupported_weights

__all__ = ["forward", "pack", "unsupported_input", "unsupported_weights"]


def pack(*weights: object) -> list[Tensor]:
    return []


def forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    act: str,
    residual: bool,
    packed: list[Tensor] | None,
) -> Tensor:
    y = group_norm(x, norm_weight, norm_bias, eps)
    y = activate(F.conv2d(y, fc1_weight, fc1_bias), act)
    y = F.conv2d(y, fc2_weight, fc2_bias)
    return add(y, x) if residual else y
