"""The least cost of conv_act."""

from __future__ import annotations

from torch import Tensor

from ..cost import Cost, Step, block, size
from . import contract


def cost(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act: str,
    stride: int,
    padding: int,
    residual: Tensor | None,
    pool: bool,
) -> Cost:
    """Flops and bytes of one call; reads shapes and dtypes only."""
    n, channels, height, width = contract.infer_shape(x, weight, bias, act, stride, padding, residual, False)
    pixels, element = n * height * width, x.element_size()
    out, weights = pixels * channels * element, size(weight, bias)
    steps = [Step("conv", 2 * pixels * weight.numel(), size(x, residual) + weights + out)]
    if pool:
        pooled = n * channels * element
        steps.append(Step("pool", 0, out + pooled))
        out = pooled
    return block("conv_act", size(x, residual), out, weights, tuple(steps))
