"""The eager reference of separable_conv."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..eager import activate, add, unsupported_input, unsupported_weights

__all__ = ["forward", "pack", "unsupported_input", "unsupported_weights"]


def pack(*weights: object) -> list[Tensor]:
    return []


def forward(
    x: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    dw_act: str,
    pw_weight: Tensor,
    pw_bias: Tensor | None,
    pw_act: str,
    stride: int,
    padding: int,
    residual: bool,
    packed: list[Tensor] | None,
) -> Tensor:
    out = activate(F.conv2d(x, dw_weight, dw_bias, stride, padding, groups=x.shape[1]), dw_act)
    out = activate(F.conv2d(out, pw_weight, pw_bias), pw_act)
    return add(out, x) if residual else out
