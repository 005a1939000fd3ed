"""mbconv in the tier of compute capability 9.0 (``csrc/cuda/mbconv_sm90.cu``): which pixels one CTA makes.

It is for layers of many channels, stride 1 and 3x3 taps: LowFormer's last stages. The others are served by the kernels of every
GPU.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from . import hopper, tiling
from .pack import CHUNK
from .tiling import Device, Shape, Tile

_ROWS, _WARPGROUPS = 128, 2
# csrc/cuda/mbconv_sm90.cu: taps of a line, outputs of a line that a thread makes, and lines or parts of them that a CTA makes.
_TAPS, _SEGMENT, _SEGMENTS = 3, 8, 16
# Slabs beside each other for the output channels of a CTA; depth of a slab of the expansion, which has a chunk's columns.
_PARTS, _EXPANSION_DEPTH = 2, 128
_COLUMNS = _PARTS * hopper.SLAB_COLUMNS
# Bytes of 64 of depth of a CTA's rows, of X as of D.
_UNIT_BYTES = 2 * _ROWS * hopper.SLAB_DEPTH
# Cycles of a scheduler that a warp's part of one chunk takes: depthwise convolution, and bias and activation of both.
_CONVOLVED, _ACTIVATED = 400, 2 * 130

# Costs are counted, not measured: within so much of the cheapest they are alike.
_ALIKE = 1.05


class Config(NamedTuple):
    """A compiled shape: slabs under way."""

    number: int
    stages: int


# csrc/cuda/mbconv_sm90.cu: LK_WIDE_MBCONVS.
CONFIGS = (Config(0, 4), Config(1, 3))


def _slabs(channels: int) -> int:
    """Of one chunk's expansion."""
    return -(-channels // _EXPANSION_DEPTH)


def served(kernel: int, stride: int, channels: int) -> bool:
    """Whether the tier has a kernel for such layers. One slab for a chunk's expansion would leave D without a barrier."""
    return kernel == _TAPS and stride == 1 and _slabs(channels) > 1


def shared_bytes(shape: Shape, tile: Tile) -> int:
    """Shared memory of one CTA, as the launcher asks for it."""
    ring = CONFIGS[tile.config].stages * hopper.SLAB_BYTES
    return ring + (1 + 2 * _slabs(shape.channels)) * _UNIT_BYTES + tiling.window_bytes(shape, tile)


def _segments(tile: Tile) -> int:
    return tile.images * tile.height * -(-tile.width // _SEGMENT)


def _cost(shape: Shape, tile: Tile, device: Device) -> float:
    """Cycles of the busiest multiprocessor."""
    ctas = tiling.count(shape, tile, _COLUMNS)
    chunks, slabs = -(-shape.expanded // CHUNK), _slabs(shape.channels)
    # A slab of the expansion is twice as deep as one of the projection, and has half its columns: as many cycles.
    products = hopper.WAITING * hopper.SLAB_CYCLES * _WARPGROUPS * (slabs + _PARTS)
    # 128 bytes a cycle: the first operand is read for every 64 columns of the expansion and 128 of the projection, the second
    # by each warpgroup.
    reads = _WARPGROUPS * hopper.SLAB_BYTES * (2 * slabs + 1.5 * _PARTS)
    passed = reads + hopper.SLAB_BYTES * (slabs + _PARTS) + 4.5 * tiling.window_bytes(shape, tile)
    weights = hopper.SLAB_BYTES * (slabs + _PARTS) / hopper.l2_rate(ctas, device)
    cores = 2 * (_CONVOLVED + _ACTIVATED)
    busy = chunks * max(products, passed / 128, weights, cores)
    around = 3000 + 2 * tiling.inside(shape, tile) * shape.channels / hopper.l2_rate(ctas, device)
    return -(-ctas // device.processors) * (busy + around)


@functools.lru_cache(maxsize=4096)
def divisions(shape: Shape, device: Device, config: int | None = None) -> list[Tile]:
    """Every division that fits the device, the cheapest first; of one config if it is named. Empty for layers the kernel does not
    serve."""
    if not served(shape.kernel, shape.stride, shape.channels):
        return []
    tiles = (tile for c in CONFIGS if config in (None, c.number) for tile in tiling.tiles(shape, _ROWS, c.number))
    dealt = (tile for tile in tiles if tiling.inside(shape, tile) <= _ROWS and _segments(tile) <= _SEGMENTS)
    fitting = [tile for tile in dealt if shared_bytes(shape, tile) <= device.shared]
    cheapest = min((_cost(shape, tile, device) for tile in fitting), default=0.0)

    def order(tile: Tile) -> tuple[float, int, int]:
        # A CTA with fewer rows is hardly faster: of what is about as fast, the fewest CTAs and the most slabs under way.
        cost = max(_cost(shape, tile, device), _ALIKE * cheapest)
        return cost, tiling.count(shape, tile, _COLUMNS), -CONFIGS[tile.config].stages

    return sorted(fitting, key=order)


def choose(shape: Shape, x: Tensor) -> Tile | None:
    """The division by warpgroups of a call with weights packed for them; None where the other kernels are to serve it."""
    return hopper.accepted("mbconv", x, _wanted(shape, x))


def candidates(shape: Shape, x: Tensor) -> list[dict[str, int]]:
    """Settings of this tier for a tuner to try besides what :func:`choose` says."""
    if hopper.unusable(x.device) is not None:
        return []
    chosen = choose(shape, x)
    found = [hopper.setting_of(tile) for tile in divisions(shape, tiling.device_of(x)) if tile != chosen]
    return found[: tiling.CANDIDATES]


def remark(shape: Shape, x: Tensor) -> str | None:
    """Why a call that the tier would serve is served without it, or None."""
    return hopper.said("mbconv", x, lambda: _wanted(shape, x))


def _wanted(shape: Shape, x: Tensor) -> Tile | None:
    device = tiling.device_of(x)
    return hopper.wanted(lambda config: divisions(shape, device, config), lambda: _faster(shape, device))


@functools.lru_cache(maxsize=4096)
def _faster(shape: Shape, device: Device) -> Tile | None:
    tile = next(iter(divisions(shape, device)), None)
    return tile if tile is not None and _cost(shape, tile, device) < tiling.cost(shape, device) else None


def pack(expand: Tensor, dw: Tensor, project: Tensor, stride: int) -> list[Tensor]:
    """The products' weights in slabs in the order of their use, one stream for each :data:`_COLUMNS` output channels; empty where
    no call of theirs can take the tier.

    Of a stream: the first chunk's expansion, then for each chunk the next one's expansion and its own projection.

    Args:
        expand: a 1x1 convolution (E, C, 1, 1).
        dw: a depthwise convolution (E, 1, k, k).
        project: a 1x1 convolution (O, E, 1, 1).
        stride: of the depthwise convolution.
    """
    expanded, channels = expand.shape[:2]
    if not served(dw.shape[2], stride, channels) or hopper.unusable(expand.device) is not None:
        return []
    chunks, ctas = -(-expanded // CHUNK), -(-project.shape[0] // _COLUMNS)
    first = hopper.dealt_slabs(expand[:, :, 0, 0].t(), _EXPANSION_DEPTH, CHUNK, CHUNK)
    second = hopper.dealt_slabs(project[:, :, 0, 0].t(), CHUNK, _COLUMNS, hopper.SLAB_COLUMNS)
    # [column of slabs, depth, values] by chunk.
    expansions = first.transpose(0, 1).reshape(chunks, -1)
    projections = second.reshape(chunks, ctas, -1).transpose(0, 1)
    none = expansions.new_empty(0)
    streams = []
    for cta in projections:
        following = [*expansions[1:], none]
        streams += [expansions[0]] + [part for pair in zip(following, cta, strict=True) for part in pair]
    return [torch.cat(streams)]
