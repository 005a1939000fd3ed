"""The least cost of lowtention."""

from __future__ import annotations

from torch import Tensor

from ..cost import Cost, Step, block, size
from . import contract


def cost(
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
) -> Cost:
    """Flops and bytes of one call; reads shapes and dtypes only."""
    affine, weights = (norm_weight, norm_bias), (dw_weight, dw_bias, qkv_weight, up_weight, up_bias)
    n, channels, height, width = contract.infer_shape(
        x, norm_weight, norm_bias, eps, dw_weight, dw_bias, qkv_weight, up_weight, up_bias, num_heads, stride, residual
    )
    tokens, element = -(-height // stride) * -(-width // stride), x.element_size()
    inner = up_weight.shape[0]
    small = n * tokens * x.shape[1] * element
    qkv, values = 3 * n * tokens * inner * element, n * tokens * inner * element
    out = n * height * width * channels * element
    skip = size(x) if residual else 0
    steps: tuple[Step, ...] = (
        Step("dw", 2 * n * tokens * dw_weight.numel(), size(x) + size(dw_weight, dw_bias) + small),
        Step("qkv", 2 * n * tokens * qkv_weight.numel(), small + size(qkv_weight) + qkv),
        Step("attention", 4 * n * tokens * tokens * inner, qkv + values),
        Step("up", 2 * n * tokens * up_weight.numel(), values + size(up_weight, up_bias) + skip + out),
    )
    if norm_weight is not None:
        steps = (Step("norm", 0, size(x) + size(*affine) + size(x)), *steps)
    return block("lowtention", size(x), out, size(*affine, *weights), steps)
