"""The least cost of fused_mbconv."""

from __future__ import annotations

from torch import Tensor

from ..cost import Cost, Step, block, size
from . import contract


def cost(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    act: str,
    stride: int,
    padding: int,
    residual: bool,
) -> Cost:
    """Flops and bytes of one call; reads shapes and dtypes only."""
    weights = (conv_weight, conv_bias, project_weight, project_bias)
    n, channels, height, width = contract.infer_shape(x, *weights, act, stride, padding, residual)
    pixels, element = n * height * width, x.element_size()
    hidden, out = pixels * conv_weight.shape[0] * element, pixels * channels * element
    conv, project = size(*weights[:2]), size(*weights[2:])
    skip = size(x) if residual else 0
    steps = (
        Step("conv", 2 * pixels * conv_weight.numel(), size(x) + conv + hidden),
        Step("project", 2 * pixels * project_weight.numel(), hidden + project + skip + out),
    )
    return block("fused_mbconv", size(x), out, conv + project, steps)
