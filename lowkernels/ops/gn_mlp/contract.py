"""gn_mlp: GroupNorm with one group, 1x1 expansion, activation, 1x1 projection, and an optional residual."""

from __future__ import annotations

from torch import Tensor

from .. import checks

NAME = "gn_mlp"
SCHEMA = (
    "Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, "
    "Tensor? fc2_bias=None, str act='gelu', bool residual=False"
)
INPUTS = ("x",)


def infer_shape(
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
) -> tuple[int, ...]:
    """Check the arguments; the output's shape."""
    checks.image(NAME, x)
    checks.group_norm(NAME, norm_weight, norm_bias, eps, x.shape[1])
    hidden = checks.pointwise(NAME, "fc1_weight", fc1_weight, x.shape[1])
    checks.bias(NAME, "fc1_bias", fc1_bias, hidden)
    out_channels = checks.pointwise(NAME, "fc2_weight", fc2_weight, hidden)
    checks.bias(NAME, "fc2_bias", fc2_bias, out_channels)
    checks.act(NAME, "act", act)
    checks.same_kind(
        NAME,
        x,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        fc1_weight=fc1_weight,
        fc1_bias=fc1_bias,
        fc2_weight=fc2_weight,
        fc2_bias=fc2_bias,
    )
    out = (x.shape[0], out_channels, x.shape[2], x.shape[3])
    checks.residual(NAME, residual, x, out)
    return out


def accumulation_length(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    *_: object,
) -> int:
    """K of the error budget: the longest sum one output element is made of."""
    return max(x.shape[1] * x.shape[2] * x.shape[3], fc2_weight.shape[1])
