"""The least cost of separable_conv."""

from __future__ import annotations

from torch import Tensor

from ..cost import Cost, Step, block, size
from . import contract


def cost(
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
) -> Cost:
    """Flops and bytes of one call; reads shapes and dtypes only."""
    call = (x, dw_weight, dw_bias, dw_act, pw_weight, pw_bias, pw_act, stride, padding, residual)
    n, channels, height, width = contract.infer_shape(*call)
    pixels, element = n * height * width, x.element_size()
    middle, out = pixels * x.shape[1] * element, pixels * channels * element
    dw, pw = size(dw_weight, dw_bias), size(pw_weight, pw_bias)
    skip = size(x) if residual else 0
    steps = (
        Step("dw", 2 * pixels * dw_weight.numel(), size(x) + dw + middle),
        Step("pw", 2 * pixels * pw_weight.numel(), middle + pw + skip + out),
    )
    return block("separable_conv", size(x), out, dw + pw, steps)
