"""lowtention in CUDA C++: a CTA makes the whole block of one image, or of several with few tokens, as long as they fit into shared
memory; three launches beyond, with q, k and v in global memory."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ...backends.cuda import launch, tiling
from ...backends.cuda import pack as packing
from ...backends.cuda.pack import GROUP, STEP, attention_channels, rounded_up
from ...choosing import settings

# Above this one CTA would work too long alone.
MAX_FUSED_TOKENS = 256
MAX_HEAD_DIM = 64
# csrc/cuda/lowtention.cu: the most tokens that several images of a CTA may have together; rows it works on at a time otherwise;
# bytes of a row of its table, and of an image's statistics.
MAX_SHARED_TOKENS = 128
_ROWS = 64
_TABLE = 16
_STATISTICS = 8 + 2 * 8 * 4
# Of a multiprocessor.
_SCHEDULERS = 4


def shared_bytes(channels: int, inner: int, tokens: int, images: int = 1) -> int:
    """Shared memory of a CTA that does it all, as csrc/cuda/lowtention.cu asks for it. ``inner`` has heads rounded up."""
    rows = rounded_up(images * tokens, 16)
    block = MAX_SHARED_TOKENS if images > 1 and images * tokens > _ROWS else _ROWS
    tile = min(rows, block) * (rounded_up(channels, STEP) + 8)
    return 2 * (tile + (rows + 1) * (3 * inner + 8)) + _TABLE * rows + _STATISTICS * images


def shared_bytes_of_three(channels: int, inner: int, head: int, grid_width: int) -> int:
    """The most shared memory a CTA of the three launches asks for; ``head`` is a head's channels, rounded up."""
    tile = 2 * _ROWS * (rounded_up(channels, STEP) + 8) + _TABLE * _ROWS + _STATISTICS
    reach = _TABLE * _ROWS + 2 * (_ROWS + 2 * (grid_width + 1) + 1) * (inner + 8)
    return max(tile, 2 * (128 + 4 * 64) * (head + 8), reach)


@functools.lru_cache(maxsize=4096)
def images_of(batch: int, channels: int, inner: int, tokens: int, device: tiling.Device) -> tuple[int, ...]:
    """How many images a CTA may have, the best first.

    Weights are read once a CTA: the more images, the fewer bytes come through the L2 cache. But no multiprocessor may get more
    images than with one a CTA, or others would stand idle meanwhile.
    """
    most = max(1, min(batch, MAX_SHARED_TOKENS // tokens))
    able = [n for n in range(1, most + 1) if shared_bytes(channels, inner, tokens, n) <= device.shared]

    def busiest(images: int) -> int:
        ctas = math.ceil(batch / images)
        return images * math.ceil(ctas / device.processors)

    return tuple(sorted(able, key=lambda images: (busiest(images), -images)))


def shares_of(batch: int, out_channels: int, tokens: int, stride: int, images: int, device: tiling.Device) -> int:
    """How many CTAs have the same images, each with a share of the transposed convolution.

    No more than there are multiprocessors, and than leave each scheduler of a multiprocessor a warp with 64 or 128 rows and 32
    columns to do.
    """
    rows = MAX_SHARED_TOKENS if images > 1 and images * tokens > _ROWS else _ROWS
    tasks = stride**2 * math.ceil(images * tokens / rows) * math.ceil(out_channels / (2 * GROUP))
    idle = device.processors // math.ceil(batch / images) if batch else 1
    return max(1, min(idle, math.ceil(tasks / _SCHEDULERS)))


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


def candidates(
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
) -> list[dict[str, int]]:
    height, width = _grid(x, stride)
    inner = _inner(up_weight, num_heads)
    if not _fused(dw_weight, inner, height * width):
        return []
    able = images_of(x.shape[0], x.shape[1], inner, height * width, tiling.device_of(x))
    return [{"images": images} for images in able[1 : 1 + tiling.CANDIDATES]]


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
    images = shares = 1
    if _fused(dw_weight, inner, height * width):
        able = images_of(x.shape[0], x.shape[1], inner, height * width, tiling.device_of(x))
        asked = settings.current()
        images = asked["images"] if asked.keys() == {"images"} and asked["images"] in able else able[0]
        shares = shares_of(x.shape[0], up_weight.shape[1], height * width, stride, images, tiling.device_of(x))
    else:
        scratch = [x.new_empty(x.shape[0], height * width, channels) for channels in (3 * inner, inner)]
    sizes = num_heads, inner, dw_weight.shape[2], stride, images, shares
    torch.ops.lowkernels_cuda.lowtention.default(launch.aligned(x), norm, *weights, scratch, out, eps, scale, *sizes, residual)
    return out
