"""conv_act in CUDA C++: an implicit product with everything else in its epilogue, one launch, pooling included."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ...backends.cuda import launch, tiling
from ...backends.cuda import pack as packing
from ...backends.cuda.pack import ACTIVATION_NUMBERS, GROUP, STEP, rounded_up


class Config(NamedTuple):
    """A compiled shape of a CTA: its pixels, its columns, the depth of one chunk and how many chunks it holds.

    ``row_warps`` is 0 where all warps share the rows and divide the depth; ``pools``: whether it is compiled with pooling.
    """

    number: int
    rows: int
    columns: int
    depth: int
    stages: int
    row_warps: int
    pools: bool

    @property
    def stage_bytes(self) -> int:
        return 2 * (self.rows * (self.depth + 8) + self.columns * self.depth)

    def shared(self, images: int) -> int:
        """Bytes of shared memory; ``images`` is 0 where nothing is pooled. csrc/cuda/conv_act.cu: launch_product."""
        sums = 8 * 1024 if self.row_warps == 0 else 4 * images * self.row_warps * self.columns
        return self.stages * self.stage_bytes + 16 * self.rows + sums


# csrc/cuda/conv_act.cu: LK_PRODUCTS.
CONFIGS = (
    Config(0, 128, 128, 32, 4, 2, False),
    Config(1, 64, 128, 64, 3, 2, True),
    Config(2, 64, 64, 64, 3, 2, True),
    Config(3, 128, 32, 32, 3, 4, True),
    Config(4, 16, 16, 256, 3, 0, False),
)
_MOST_IMAGES = 4


def _images(config: Config, batch: int, pixels: int) -> int:
    """How many images one CTA pools: as many as its rows hold."""
    return max(1, min(_MOST_IMAGES, batch, config.rows // pixels))


def _cost(config: Config, batch: int, pixels: int, columns: int, depth: int, pool: bool, device: tiling.Device) -> float:
    """Relative time of a call, in cycles of a multiprocessor."""
    if pool:
        images = _images(config, batch, pixels)
        blocks, ctas = -(-images * pixels // config.rows), -(-batch // images)
    else:
        images, blocks, ctas = 0, 1, -(-batch * pixels // config.rows)
    ctas *= -(-columns // config.columns)
    resident = max(1, min(2, device.shared_per_processor // (config.shared(images) + 1024)))
    chunks = blocks * -(-depth // config.depth)
    # A multiprocessor multiplies 1024 times a cycle, and gets some 40 bytes a cycle from the L2 cache.
    work = max(config.rows * config.columns / 1024, 2 * (config.rows + config.columns) / 40) * config.depth * chunks
    # Chunks under way together arrive together, some 800 cycles after they were asked for.
    waiting = 800 * (1 + chunks / (config.stages - 1))
    busiest = min(resident, -(-ctas // device.processors))
    return -(-ctas // (device.processors * resident)) * max(busiest * work, waiting + work)


@functools.lru_cache(maxsize=4096)
def choose(batch: int, pixels: int, columns: int, depth: int, pool: bool, device: tiling.Device) -> Config:
    """The cheapest shape of a CTA for images of ``pixels`` outputs, each of ``columns`` channels made of ``depth`` inputs."""
    fitting = [c for c in CONFIGS if (c.pools or not pool) and c.shared(_images(c, batch, pixels) if pool else 0) <= device.shared]
    return min(fitting, key=lambda c: _cost(c, batch, pixels, columns, depth, pool, device))


def unsupported_weights(weight: Tensor, *rest: object) -> str | None:
    return packing.unsupported(weight.dtype) or launch.load()


def unsupported_input(x: Tensor, *args: object) -> str | None:
    return None


def pack(weight: Tensor, bias: Tensor | None, *rest: object) -> list[Tensor]:
    matrix = weight.permute(2, 3, 1, 0).flatten(0, 2)
    return [packing.fragments(matrix), packing.vector(bias, weight, weight.shape[0], GROUP)]


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act: str,
    stride: int,
    padding: int,
    residual: Tensor | None,
    pool: bool,
    packed: list[Tensor] | None,
) -> Tensor:
    if packed is None:
        packed = pack(weight, bias)
    batch, channels, height, width = x.shape
    out_channels, kernel = weight.shape[0], weight.shape[2]
    out_height, out_width = ((n + 2 * padding - kernel) // stride + 1 for n in (height, width))
    pixels, depth = out_height * out_width, kernel * kernel * channels
    # The mean of one pixel is that pixel.
    pooling = pool and pixels > 1
    config = choose(batch, pixels, out_channels, rounded_up(depth, STEP), pooling, tiling.device_of(x))
    if pool:
        result = x.new_empty(batch, out_channels)
        out = result[:, :, None, None]
    else:
        result = out = launch.empty_nhwc(x, (batch, out_channels, out_height, out_width))
    skip = [] if residual is None else [launch.aligned(residual.contiguous(memory_format=torch.channels_last))]
    images = _images(config, batch, pixels) if pooling else 1
    torch.ops.lowkernels_cuda.conv_act.default(
        launch.aligned(x), *packed, skip, out, kernel, stride, padding, ACTIVATION_NUMBERS[act], pooling, images, config.number
    )
    return result
