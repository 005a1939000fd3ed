"""The eager reference of lowtention."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..eager import add, group_norm, unsupported_input, unsupported_weights

__all__ = ["forward", "pack", "unsupported_input", "unsupported_weights"]


def pack(*weights: object) -> list[Tensor]:
    return []


def forward(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    qkv_weight: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    num_heads: int,
    stride: int,
    residual: bool,
    packed: list[Tensor] | None,
) -> Tensor:
    height, width = x.shape[2:]
    y = x if norm_weight is None else group_norm(x, norm_weight, norm_bias, eps)
    y = F.conv2d(y, dw_weight, dw_bias, stride, dw_weight.shape[2] // 2, groups=x.shape[1])
    qkv = F.conv2d(y, qkv_weight)
    grid = qkv.shape[2:]
    # Head-major, then q | k | v: (N, heads, 3 d, tokens). Tokens last is how NCHW has them; attention wants them before d.
    q, k, v = qkv.flatten(2).unflatten(1, (num_heads, -1)).transpose(2, 3).chunk(3, dim=3)
    o = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(1, 2).unflatten(2, grid)
    out = F.conv_transpose2d(o, up_weight, up_bias, stride, padding=1)[:, :, :height, :width]
    return add(out, x) if residual else out
