"""conv_act: a dense k x k convolution with bias, activation, an optional residual and an optional global average pool."""

from __future__ import annotations

from torch import Tensor

from .. import checks

NAME = "conv_act"
SCHEMA = (
    "Tensor x, Tensor weight, Tensor? bias=None, str act='none', int stride=1, int padding=0, Tensor? residual=None, "
    "bool pool=False"
)
INPUTS = ("x", "residual")


def infer_shape(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act: str,
    stride: int,
    padding: int,
    residual: Tensor | None,
    pool: bool,
) -> tuple[int, ...]:
    """Check the arguments; the output's shape."""
    checks.image(NAME, x)
    out_channels = checks.dense(NAME, "weight", weight, x.shape[1])
    checks.bias(NAME, "bias", bias, out_channels)
    checks.act(NAME, "act", act)
    checks.same_kind(NAME, x, weight=weight, bias=bias, residual=residual)
    height, width = checks.window(NAME, x, weight.shape[2], stride, padding)
    if residual is not None:
        checks.image(NAME, residual, "residual")
        expected = (x.shape[0], out_channels, height, width)
        if tuple(residual.shape) != expected:
            checks.fail(NAME, "residual", f"has shape {tuple(residual.shape)}; allowed is {expected}, the output's")
    return (x.shape[0], out_channels) if pool else (x.shape[0], out_channels, height, width)


def accumulation_length(x: Tensor, weight: Tensor, *_: object) -> int:
    """K of the error budget: the longest sum one output element is made of."""
    return weight[0].numel()
