"""The least cost of gn_mlp."""

from __future__ import annotations

from torch import Tensor

from ..cost import Cost, Step, block, size
from . import contract


def cost(
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
) -> Cost:
    """Flops and bytes of one call; reads shapes and dtypes only."""
    call = (x, norm_weight, norm_bias, eps, fc1_weight, fc1_bias, fc2_weight, fc2_bias, act, residual)
    n, channels, height, width = contract.infer_shape(*call)
    pixels, element = n * height * width, x.element_size()
    hidden, out = pixels * fc1_weight.shape[0] * element, pixels * channels * element
    norm, fc1, fc2 = size(norm_weight, norm_bias), size(fc1_weight, fc1_bias), size(fc2_weight, fc2_bias)
    skip = size(x) if residual else 0
    steps = (
        Step("norm", 0, size(x) + norm + size(x)),
        Step("fc1", 2 * pixels * fc1_weight.numel(), size(x) + fc1 + hidden),
        Step("fc2", 2 * pixels * fc2_weight.numel(), hidden + fc2 + skip + out),
    )
    return block("gn_mlp", size(x), out, norm + fc1 + fc2, steps)
