"""lowtention in CUDA C++: a CTA makes the whole block of one image, up to 256 tokens as far as its shared memory goes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...cuda import launch, tiling
from ...cuda import pack as packing
from ...cuda.pack import GROUP, STEP, attention_channels, rounded_up

MAX_TOKENS = 256
MAX_HEAD_DIM = 64
# Tokens go through the CTA in blocks of so many; csrc/cuda/lowtention.cu: kRows.
_ROWS = 64


def shared_bytes(channels: int, inner: int, tokens: int) -> int:
    """Shared memory of the CTA, as the launcher in csrc/cuda/lowtention.cu asks for it; ``inner`` with heads rounded up."""
    rows = rounded_up(tokens, _ROWS)
    return 2 * (_ROWS * (rounded_up(channels, STEP) + 8) + (rows + 1) * (3 * inner + 8)) + 64


def _inner(up_weight: Tensor, num_heads: int) -> int:
    return num_heads * attention_channels(up_weight.shape[0] // num_heads)


def unsupported_weights(
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    qkv_weight: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    num_heads: int,
    *rest: object,
) -> str | None:
    reason = packing.unsupported(dw_weight.dtype, C=dw_weight.shape[0], C_out=up_weight.shape[1])
    if reason is not None:
        return reason
    head_dim = up_weight.shape[0] // num_heads
    if head_dim > MAX_HEAD_DIM:
        return f"heads have {head_dim} channels; the CUDA kernel serves at most {MAX_HEAD_DIM}"
    return _too_much(dw_weight, _inner(up_weight, num_heads), 1) or launch.load()


def _too_much(dw_weight: Tensor, inner: int, tokens: int) -> str | None:
    needed, available = shared_bytes(dw_weight.shape[0], inner, tokens), tiling.device_of(dw_weight).shared
    if needed > available:
        return f"an image of {tokens} tokens needs {needed} bytes of shared memory, of {available}"
    return None


def unsupported_input(
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
    *rest: object,
) -> str | None:
    tokens = -(-x.shape[2] // stride) * -(-x.shape[3] // stride)
    if tokens > MAX_TOKENS:
        return f"an image has {tokens} tokens; the CUDA kernel serves at most {MAX_TOKENS}"
    return _too_much(dw_weight, _inner(up_weight, num_heads), tokens)


def pack(
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
    *rest: object,
) -> list[Tensor]:
    channels = dw_weight.shape[0]
    norm = [] if norm_weight is None else [packing.vector(v, dw_weight, channels, STEP) for v in (norm_weight, norm_bias)]
    return [
        packing.depthwise(dw_weight, STEP),
        packing.vector(dw_bias, dw_weight, channels, STEP),
        packing.query_key_value(qkv_weight, num_heads),
        packing.transposed(up_weight, num_heads, stride),
        packing.vector(up_bias, dw_weight, up_weight.shape[1], GROUP),
        *norm,
    ]


def forward(
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
    packed: list[Tensor] | None,
) -> Tensor:
    if packed is None:
        packed = pack(norm_weight, norm_bias, eps, dw_weight, dw_bias, qkv_weight, up_weight, up_bias, num_heads, stride)
    weights, norm = packed[:5], packed[5:]
    out = launch.empty_nhwc(x, (x.shape[0], up_weight.shape[1], *x.shape[2:]))
    scale = 1 / math.sqrt(up_weight.shape[0] // num_heads)
    inner = _inner(up_weight, num_heads)
    torch.ops.lowkernels_cuda.lowtention.default(
        launch.aligned(x), norm, *weights, out, eps, scale, num_heads, inner, dw_weight.shape[2], stride, residual
    )
    return out
