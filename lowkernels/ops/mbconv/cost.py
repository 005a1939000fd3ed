"""The least cost of mbconv."""

from __future__ import annotations

from torch import Tensor

from ..cost import Cost, Step, block, size
from . import contract


def cost(
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
) -> Cost:
    """Flops and bytes of one call; reads shapes and dtypes only."""
    weights = (expand_weight, expand_bias, dw_weight, dw_bias, project_weight, project_bias)
    n, channels, height, width = contract.infer_shape(x, *weights, act, stride, padding, residual)
    in_pixels, pixels = n * x.shape[2] * x.shape[3], n * height * width
    hidden, element = expand_weight.shape[0], x.element_size()
    before, after, out = in_pixels * hidden * element, pixels * hidden * element, pixels * channels * element
    expand, dw, project = (size(*weights[i : i + 2]) for i in (0, 2, 4))
    skip = size(x) if residual else 0
    steps = (
        Step("expand", 2 * in_pixels * expand_weight.numel(), size(x) + expand + before),
        Step("dw", 2 * pixels * dw_weight.numel(), before + dw + after),
        Step("project", 2 * pixels * project_weight.numel(), after + project + skip + out),
    )
    return block("mbconv", size(x), out, size(*weights), steps)
