"""lowtention in CUDA C++: a CTA makes the whole block of one image as long as its tokens fit into shared memory; three launches
beyond, with q, k and v in global memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...backends.cuda import launch, tiling
from ...backends.cuda import pack as packing
from ...backends.cuda.pack import GROUP, STEP, attention_channels, rounded_up

# Above this one CTA would work too long alone.
MAX_FUSED_TOKENS = 256
MAX_HEAD_DIM = 64
# Tokens go through the CTA in blocks of so many; csrc/cuda/lowtention.cu: kRows.
_ROWS = 64


def shared_bytes(channels: int, inner: int, tokens: int) -> int:
    """Shared memory of a CTA that does it all, as csrc/cuda/lowtention.cu asks for it. ``inner`` has heads rounded up."""
    rows = rounded_up(tokens, _ROWS)
    return 2 * (_ROWS * (rounded_up(channels, STEP) + 8) + (rows + 1) * (3 * inner + 8)) + 64


def shared_bytes_of_three(channels: int, inner: int, head: int, grid_width: int) -> int:
    """The most shared memory a CTA of the three launches asks for; ``head`` is a head's channels, rounded up."""
    tile = 2 * _ROWS * (rounded_up(channels, STEP) + 8) + 64
    return max(tile, 2 * (128 + 4 * _ROWS) * (head + 8), 2 * (_ROWS + 2 * (grid_width + 1) + 1) * (inner + 8))


def _grid(x: Tensor, stride: int) -> tuple[int, int]:
    return -(-x.shape[2] // stride), -(-x.shape[3] // stride)


def _fused(dw_weight: Tensor, inner: int, tokens: int) -> bool:
    fits = shared_bytes(dw_weight.shape[0], inner, tokens) <= tiling.device_of(dw_weight).shared
    return fits and tokens <= MAX_FUSED_TOKENS


def _too_much(dw_weight: Tensor, up_weight: Tensor, num_heads: int, grid: tuple[int, int]) -> str | None:
    inner = _inner(up_weight, num_heads)
    if _fused(dw_weight, inner, grid[0] * grid[1]):
        return None
    needed = shared_bytes_of_three(dw_weight.shape[0], inner, inner // num_heads, grid[1])
    available = tiling.device_of(dw_weight).shared
    if needed > available:
        size = f"{dw_weight.shape[0]} channels, {inner} in all heads, a grid of {grid[0]}x{grid[1]} tokens"
        return f"{size}: needs {needed} bytes of shared memory, of {available}"
    return None


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
    return _too_much(dw_weight, up_weight, num_heads, (1, 1)) or launch.load()


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
    return _too_much(dw_weight, up_weight, num_heads, _grid(x, stride))


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
    height, width = _grid(x, stride)
    scratch: list[Tensor] = []
    if not _fused(dw_weight, inner, height * width):
        scratch = [x.new_empty(x.shape[0], height * width, channels) for channels in (3 * inner, inner)]
    torch.ops.lowkernels_cuda.lowtention.default(
        launch.aligned(x), norm, *weights, scratch, out, eps, scale, num_heads, inner, dw_weight.shape[2], stride, residual
    )
    return out
