"""separable_conv: depthwise k x k convolution, then 1x1 convolution, each with bias and activation, and an optional residual."""

from __future__ import annotations

from torch import Tensor

from .. import checks

NAME = "separable_conv"
SCHEMA = (
    "Tensor x, Tensor dw_weight, Tensor? dw_bias, str dw_act, Tensor pw_weight, Tensor? pw_bias=None, str pw_act='none', "
    "int stride=1, int padding=1, bool residual=False"
)
INPUTS = ("x",)


def infer_shape(
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
) -> tuple[int, ...]:
    """Check the arguments; the output's shape."""
    checks.image(NAME, x)
    channels = x.shape[1]
    checks.depthwise(NAME, "dw_weight", dw_weight, channels)
    checks.bias(NAME, "dw_bias", dw_bias, channels)
    checks.act(NAME, "dw_act", dw_act)
    out_channels = checks.pointwise(NAME, "pw_weight", pw_weight, channels)
    checks.bias(NAME, "pw_bias", pw_bias, out_channels)
    checks.act(NAME, "pw_act", pw_act)
    checks.same_kind(NAME, x, dw_weight=dw_weight, dw_bias=dw_bias, pw_weight=pw_weight, pw_bias=pw_bias)
    height, width = checks.window(NAME, x, dw_weight.shape[2], stride, padding)
    out = (x.shape[0], out_channels, height, width)
    checks.residual(NAME, residual, x, out)
    return out


def accumulation_length(x: Tensor, dw_weight: Tensor, dw_bias: Tensor | None, dw_act: str, pw_weight: Tensor, *_: object) -> int:
    """K of the error budget: the longest sum one output element is made of."""
    return max(dw_weight[0].numel(), pw_weight.shape[1])
