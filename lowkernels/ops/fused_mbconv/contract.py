"""fused_mbconv: the block of EfficientNetV2: a dense k x k expansion with activation, 1x1 projection, and an optional residual."""

from __future__ import annotations

from torch import Tensor

from .. import checks

NAME = "fused_mbconv"
SCHEMA = (
    "Tensor x, Tensor conv_weight, Tensor? conv_bias, Tensor project_weight, Tensor? project_bias=None, "
    "str act='hardswish', int stride=1, int padding=1, bool residual=False"
)
INPUTS = ("x",)


def infer_shape(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    act: str,
    stride: int,
    padding: int,
    residual: bool,
) -> tuple[int, ...]:
    """Check the arguments; the output's shape."""
    checks.image(NAME, x)
    expanded = checks.dense(NAME, "conv_weight", conv_weight, x.shape[1])
    checks.bias(NAME, "conv_bias", conv_bias, expanded)
    out_channels = checks.pointwise(NAME, "project_weight", project_weight, expanded)
    checks.bias(NAME, "project_bias", project_bias, out_channels)
    checks.act(NAME, "act", act)
    checks.same_kind(
        NAME,
        x,
        conv_weight=conv_weight,
        conv_bias=conv_bias,
        project_weight=project_weight,
        project_bias=project_bias,
    )
    height, width = checks.window(NAME, x, conv_weight.shape[2], stride, padding)
    out = (x.shape[0], out_channels, height, width)
    checks.residual(NAME, residual, x, out)
    return out


def accumulation_length(x: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, project_weight: Tensor, *_: object) -> int:
    """K of the error budget: the longest sum one output element is made of."""
    return max(conv_weight[0].numel(), project_weight.shape[1])
