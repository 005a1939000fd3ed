"""mbconv: the inverted residual of MobileNetV2: 1x1 expansion, depthwise k x k, 1x1 projection, and an optional residual."""

from __future__ import annotations

from torch import Tensor

from .. import checks

NAME = "mbconv"
SCHEMA = (
    "Tensor x, Tensor expand_weight, Tensor? expand_bias, Tensor dw_weight, Tensor? dw_bias, Tensor project_weight, "
    "Tensor? project_bias=None, str act='hardswish', int stride=1, int padding=1, bool residual=False"
)
INPUTS = ("x",)


def infer_shape(
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
) -> tuple[int, ...]:
    """Check the arguments; the output's shape."""
    checks.image(NAME, x)
    expanded = checks.pointwise(NAME, "expand_weight", expand_weight, x.shape[1])
    checks.bias(NAME, "expand_bias", expand_bias, expanded)
    checks.depthwise(NAME, "dw_weight", dw_weight, expanded)
    checks.bias(NAME, "dw_bias", dw_bias, expanded)
    out_channels = checks.pointwise(NAME, "project_weight", project_weight, expanded)
    checks.bias(NAME, "project_bias", project_bias, out_channels)
    checks.act(NAME, "act", act)
    checks.same_kind(
        NAME,
        x,
        expand_weight=expand_weight,
        expand_bias=expand_bias,
        dw_weight=dw_weight,
        dw_bias=dw_bias,
        project_weight=project_weight,
        project_bias=project_bias,
    )
    height, width = checks.window(NAME, x, dw_weight.shape[2], stride, padding)
    out = (x.shape[0], out_channels, height, width)
    checks.residual(NAME, residual, x, out)
    return out


def accumulation_length(
    x: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    project_weight: Tensor,
    *_: object,
) -> int:
    """K of the error budget: the longest sum one output element is made of."""
    return max(expand_weight.shape[1], dw_weight[0].numel(), project_weight.shape[1])
