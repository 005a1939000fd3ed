"""The eager reference of mbconv. In half precision it rounds between its three convolutions, as any op-by-op PyTorch code does;
the fused backends do not."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..eager import activate, add, unsupported_input, unsupported_weights

__all__ = ["forward", "pack", "unsupported_input", "unsupported_weights"]


def pack(*weights: object) -> list[Tensor]:
    return []


def forward(
    x: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    act: str,
    stride: int,
    padding: int,
    residual: bool,
    packed: list[Tensor] | None,
) -> Tensor:
    out = activate(F.conv2d(x, expand_weight, expand_bias), act)
    out = activate(F.conv2d(out, dw_weight, dw_bias, stride, padding, groups=out.shape[1]), act)
    out = F.conv2d(out, project_weight, project_bias)
    return add(out, x) if residual else out
