"""lowtention: LowFormer's attention at reduced resolution and half the channels, as a whole block.

[GroupNorm(1)] -> depthwise k x k, stride s -> 1x1 to q, k, v -> softmax(q k^T / sqrt(d)) v -> transposed convolution with stride s
-> crop to the input's size [+ x]. Source: Nottebaum et al., "LowFormer", WACV 2025, arXiv 2409.03460, section 3.
"""

from __future__ import annotations

from torch import Tensor

from .. import checks

NAME = "lowtention"
SCHEMA = (
    "Tensor x, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor dw_weight, Tensor? dw_bias, Tensor qkv_weight, "
    "Tensor up_weight, Tensor? up_bias, int num_heads, int stride=1, bool residual=False"
)
INPUTS = ("x",)


def infer_shape(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    qkv_weight: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    num_heads: int,
    stride: int,
    residual: bool,
) -> tuple[int, ...]:
    """Check the arguments; the output's shape."""
    checks.image(NAME, x)
    channels = x.shape[1]
    checks.group_norm(NAME, norm_weight, norm_bias, eps, channels)
    checks.depthwise(NAME, "dw_weight", dw_weight, channels)
    checks.bias(NAME, "dw_bias", dw_bias, channels)
    qkv_channels = checks.pointwise(NAME, "qkv_weight", qkv_weight, channels)
    if num_heads < 1:
        checks.fail(NAME, "num_heads", f"is {num_heads}; allowed is 1 or more")
    if qkv_channels % (3 * num_heads):
        checks.fail(NAME, "qkv_weight", f"has {qkv_channels} output channels; allowed are multiples of 3 * {num_heads} heads")
    if stride not in (1, 2):
        checks.fail(NAME, "stride", f"is {stride}; allowed are 1 and 2")
    size = 3 if stride == 1 else 4
    if up_weight.dim() != 4 or up_weight.shape[1] < 1:
        checks.fail(NAME, "up_weight", f"has shape {tuple(up_weight.shape)}; allowed is (C_qkv / 3, C_out, {size}, {size})")
    expected = (qkv_channels // 3, up_weight.shape[1], size, size)
    checks.shape(NAME, "up_weight", up_weight, expected, f"(C_qkv / 3, C_out, k, k) with k = {size} for stride {stride}")
    checks.bias(NAME, "up_bias", up_bias, up_weight.shape[1])
    checks.same_kind(
        NAME,
        x,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        dw_weight=dw_weight,
        dw_bias=dw_bias,
        qkv_weight=qkv_weight,
        up_weight=up_weight,
        up_bias=up_bias,
    )
    out = (x.shape[0], up_weight.shape[1], x.shape[2], x.shape[3])
    checks.residual(NAME, residual, x, out)
    return out


def accumulation_length(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    qkv_weight: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    num_heads: int,
    stride: int,
    *_: object,
) -> int:
    """K of the error budget: the longest sum one output element is made of."""
    tokens = -(-x.shape[2] // stride) * -(-x.shape[3] // stride)
    statistics = 0 if norm_weight is None else x.shape[1] * x.shape[2] * x.shape[3]
    taps = (up_weight.shape[2] // stride) ** 2
    return max(statistics, dw_weight[0].numel(), qkv_weight.shape[1], tokens, up_weight.shape[0] * taps)
