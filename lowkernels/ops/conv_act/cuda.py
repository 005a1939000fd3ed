"""conv_act in CUDA C++: an implicit product with everything else in its epilogue, one launch, pooling included.

Weights are packed twice where warpgroup products may serve a call: see :mod:`lowkernels.backends.cuda.hopper_conv`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ...backends.cuda import chains, hopper_conv, launch, tiling
from ...backends.cuda import pack as packing
from ...backends.cuda.pack import ACTIVATION_NUMBERS, GROUP, STEP, rounded_up
from ...choosing import settings


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


@functools.lru_cache(maxsize=4096)
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
def configs(batch: int, pixels: int, columns: int, depth: int, pool: bool, device: tiling.Device) -> list[Config]:
    """Shapes of a CTA that fit, the cheapest first, for images of ``pixels`` outputs of ``columns`` channels, each of ``depth``
    inputs."""
    fitting = [c for c in CONFIGS if (c.pools or not pool) and c.shared(_images(c, batch, pixels) if pool else 0) <= device.shared]
    return sorted(fitting, key=lambda c: _cost(c, batch, pixels, columns, depth, pool, device))


class _Plan(NamedTuple):
    """How one call runs: its shape, and by the kernels of every GPU: shapes of a CTA, the cheapest first, and what that costs."""

    conv: hopper_conv.Conv
    configs: list[Config]
    cost: float

    @property
    def config(self) -> Config:
        """The shape of a CTA: the one that a setting names, else the cheapest."""
        setting = settings.current()
        return next((c for c in self.configs if setting == _setting_of(c)), self.configs[0])


def _setting_of(config: Config) -> dict[str, int]:
    return {"config": config.number}


def _plan(x: Tensor, weight: Tensor, stride: int, padding: int, pool: bool) -> _Plan:
    columns, _, kernel, _ = weight.shape
    shape = chains.Shape(*launch.sizes(x), columns, kernel, stride, padding, 0, False)
    # The mean of one pixel is that pixel.
    conv = hopper_conv.Conv(shape, pool and shape.output != (1, 1))
    call = shape.batch, conv.plane, columns, rounded_up(kernel**2 * shape.channels, STEP), conv.pool, tiling.device_of(x)
    fitting = configs(*call)
    return _Plan(conv, fitting, _cost(fitting[0], *call))


def unsupported_weights(weight: Tensor, *rest: object) -> str | None:
    return packing.unsupported(weight.dtype) or launch.load()


def unsupported_input(x: Tensor, *args: object) -> str | None:
    return None


def pack(weight: Tensor, bias: Tensor | None, *rest: object) -> list[Tensor]:
    matrix = weight.permute(2, 3, 1, 0).flatten(0, 2)
    return [packing.vector(bias, weight, weight.shape[0], GROUP), packing.fragments(matrix), *hopper_conv.pack(weight)]


def remark(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act: str,
    stride: int,
    padding: int,
    residual: Tensor | None,
    pool: bool,
) -> str | None:
    plan = _plan(x, weight, stride, padding, pool)
    return hopper_conv.remark(plan.conv, x, plan.cost)


def candidates(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act: str,
    stride: int,
    padding: int,
    residual: Tensor | None,
    pool: bool,
) -> list[dict[str, int]]:
    plan = _plan(x, weight, stride, padding, pool)
    chosen = hopper_conv.choose(plan.conv, x, plan.cost)
    wide = hopper_conv.candidates(plan.conv, x, chosen)
    return wide + [_setting_of(c) for c in plan.configs if chosen is not None or c != plan.configs[0]]


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
    plan = _plan(x, weight, stride, padding, pool)
    conv, config = plan.conv, plan.config
    batch, pixels, kernel, columns = x.shape[0], conv.plane, conv.shape.kernel, weight.shape[0]
    if pool:
        result = x.new_empty(batch, columns)
        out = result[:, :, None, None]
    else:
        result = out = launch.empty_nhwc(x, (batch, columns, *conv.shape.output))
    skip = [] if residual is None else [launch.aligned(residual.contiguous(memory_format=torch.channels_last))]
    packed_bias, fragments, slabs = packed[0], packed[1], packed[2:]
    tail = packed_bias, skip, out, kernel, stride, padding, ACTIVATION_NUMBERS[act], conv.pool
    wide = hopper_conv.choose(conv, x, plan.cost) if slabs else None
    if wide is not None:
        images = hopper_conv.images_of(conv, wide)
        torch.ops.lowkernels_cuda.conv_act_sm90.default(launch.aligned(x), *slabs, *tail, images, *wide)
    else:
        images = _images(config, batch, pixels) if conv.pool else 1
        torch.ops.lowkernels_cuda.conv_act.default(launch.aligned(x), fragments, *tail, images, config.number)
    return result
