"""How much of an image one CTA makes: the plan of the kernels that hold a depthwise convolution (``csrc/cuda/window.cuh``)."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...choosing.settings import Setting
from . import split
from .pack import CHUNK, GROUP, rounded_up

# Elements between pixels of a window and between rows of a tile, as csrc/cuda/window.cuh has them.
_WINDOW_LENGTH = CHUNK + 16
_TILE_LENGTH = CHUNK + 8
# A cycle of a multiprocessor's.
_MULTIPLY_ADDS = 1024
# How many divisions a tuner tries besides the cheapest.
CANDIDATES = 6


class Device(NamedTuple):
    """What a plan depends on.

    Attributes:
        shared: bytes of shared memory a CTA may have.
        shared_per_processor: bytes all CTAs of a multiprocessor share.
        processors: number of multiprocessors.
    """

    shared: int
    shared_per_processor: int
    processors: int


class Config(NamedTuple):
    """A compiled shape: rows of 16 output pixels and columns of a CTA, how many CTAs its registers leave room for, and whether
    mbconv is compiled with split-K."""

    number: int
    tiles: int
    columns: int
    per_processor: int
    splits: bool = False


# csrc/cuda/window.cuh: LK_CONFIGS.
CONFIGS = (Config(0, 4, 32, 2), Config(1, 4, 128, 2), Config(2, 4, 256, 1, True), Config(3, 7, 256, 1))


class Shape(NamedTuple):
    """One call, as far as its division matters. ``expanded`` is 0 for separable_conv."""

    batch: int
    channels: int
    height: int
    width: int
    out_channels: int
    kernel: int
    stride: int
    padding: int
    expanded: int
    wide: bool

    @property
    def output(self) -> tuple[int, int]:
        height, width = ((n + 2 * self.padding - self.kernel) // self.stride + 1 for n in (self.height, self.width))
        return height, width


class Tile(NamedTuple):
    """The outputs of one CTA, and the number of its :class:`Config`."""

    images: int
    height: int
    width: int
    config: int


@functools.cache
def _cuda_device(index: int) -> Device:
    p = torch.cuda.get_device_properties(index)
    # Of what a multiprocessor has, the system keeps 1 KB for each CTA.
    shared = p.shared_memory_per_multiprocessor
    return Device(shared - 1024, shared, p.multi_processor_count)


# The least any GPU of compute capability 8.0 or more has; what kernels are planned for where there is none.
SMALLEST = Device(99 * 1024, 100 * 1024, 16)


def device_of(tensor: Tensor) -> Device:
    """The device kernels on ``tensor`` are planned for."""
    return _cuda_device(tensor.device.index) if tensor.is_cuda else SMALLEST


def window(shape: Shape, tile: Tile) -> tuple[int, int]:
    return (tile.height - 1) * shape.stride + shape.kernel, (tile.width - 1) * shape.stride + shape.kernel


def inside(shape: Shape, tile: Tile) -> int:
    """Pixels of the window that may lie in the image."""
    height, width = window(shape, tile)
    return tile.images * min(height, shape.height) * min(width, shape.width)


def _inputs(shape: Shape, tile: Tile) -> int:
    """Rows of X: pixels of the window that may lie in the image, rounded up to whole tiles."""
    return rounded_up(inside(shape, tile), 16)


def window_bytes(shape: Shape, tile: Tile) -> int:
    """Shared memory of one chunk's window."""
    height, width = window(shape, tile)
    # Expanded values are fp32 where inputs are bf16.
    return tile.images * height * width * _WINDOW_LENGTH * (4 if shape.expanded and shape.wide else 2)


def shared_bytes(shape: Shape, tile: Tile) -> int:
    """Shared memory of one CTA, as the launchers in csrc/cuda ask for it."""
    result = CONFIGS[tile.config].tiles * 16 * _TILE_LENGTH * 2
    if not shape.expanded:
        return result + window_bytes(shape, tile) * (2 if shape.channels > CHUNK else 1)
    depth = rounded_up(shape.channels, 16)
    return result + window_bytes(shape, tile) + _inputs(shape, tile) * ((depth + 8) * 2 + 4)


def tiles(shape: Shape, rows: int, config: int) -> Iterator[Tile]:
    """Tiles of up to ``rows`` outputs, of the config of that number: several whole images, or a rectangle of one."""
    height, width = shape.output
    for images in range(2, min(shape.batch, rows // (height * width)) + 1):
        yield Tile(images, height, width, config)
    # From the largest rows down; a tile of one pixel always comes last.
    for tile_width in sorted({-(-width // n) for n in range(1, width + 1)}, reverse=True):
        if tile_width <= rows:
            for tile_height in sorted({-(-height // n) for n in range(1, height + 1)}, reverse=True):
                if tile_width * tile_height <= rows:
                    yield Tile(1, tile_height, tile_width, config)


def count(shape: Shape, tile: Tile, columns: int) -> int:
    """CTAs of such tiles and of so many output channels that a call takes."""
    height, width = shape.output
    passes = -(-shape.out_channels // columns)
    return -(-shape.batch // tile.images) * -(-height // tile.height) * -(-width // tile.width) * passes


def ctas(shape: Shape, tile: Tile) -> int:
    """CTAs of a launch that is not split."""
    return count(shape, tile, CONFIGS[tile.config].columns)


@functools.lru_cache(maxsize=65536)
def splits(shape: Shape, tile: Tile, device: Device) -> int:
    """How many CTAs share each one's expanded channels."""
    if not shape.expanded or not CONFIGS[tile.config].splits:
        return 1
    chunks = -(-shape.expanded // CHUNK)
    return split.cheapest(ctas(shape, tile), chunks, device, lambda shared: _cost(shape, tile, device, shared))


def _cost(shape: Shape, tile: Tile, device: Device, shared: int | None = None) -> float:
    """Relative time of a call: multiply-adds of the busiest multiprocessor, padding included. ``shared``: how many CTAs share the
    expanded channels; without it as many as :func:`splits` says."""
    config = CONFIGS[tile.config]
    sharing = splits(shape, tile, device) if shared is None else shared
    all_ctas = ctas(shape, tile) * sharing
    resident = min(config.per_processor, device.shared_per_processor // (shared_bytes(shape, tile) + 1024))
    middle = rounded_up(-(-(shape.expanded or shape.channels) // sharing), CHUNK)
    rows = config.tiles * 16
    # Depthwise multiply-adds run outside of the tensor cores, at about a sixteenth of their rate.
    work = rows * (min(config.columns, rounded_up(shape.out_channels, GROUP)) + 16 * shape.kernel**2)
    if shape.expanded:
        work += _inputs(shape, tile) * rounded_up(shape.channels, 16)
    # Weights come from the L2 cache; a multiprocessor's share of its bandwidth brings a byte in the time of some 20 multiply-adds.
    work = max(work, 20 * 2 * (rounded_up(shape.channels, 16) * bool(shape.expanded) + config.columns))
    # One CTA alone leaves the multiprocessor idle in its barriers.
    alone = 1.5 if resident < 2 else 1.0
    waves = -(-all_ctas // (device.processors * max(1, resident)))
    elements = tile.images * tile.height * tile.width * min(config.columns, shape.out_channels)
    return waves * max(1, resident) * work * middle * alone + _MULTIPLY_ADDS * split.joining(sharing, elements)


def _fitting(shape: Shape, device: Device) -> Iterator[Tile]:
    """Every division that fits the device."""
    widest = next((c.columns for c in CONFIGS if shape.out_channels <= c.columns), CONFIGS[-1].columns)
    found = (tile for c in CONFIGS if c.columns == widest for tile in tiles(shape, c.tiles * 16, c.number))
    return (tile for tile in found if shared_bytes(shape, tile) <= device.shared)


@functools.lru_cache(maxsize=4096)
def choose(shape: Shape, device: Device) -> Tile | None:
    """The cheapest division that fits the device, or None if not even one pixel at a time does."""
    return min(_fitting(shape, device), key=lambda tile: _cost(shape, tile, device), default=None)


def cost(shape: Shape, device: Device) -> float:
    """Cycles of the busiest multiprocessor with :func:`choose`'s division; infinite where there is none."""
    tile = choose(shape, device)
    return math.inf if tile is None else _cost(shape, tile, device) / _MULTIPLY_ADDS


def candidates(shape: Shape, device: Device) -> list[dict[str, int]]:
    """The next cheapest divisions after :func:`choose`'s, as settings: what a tuner tries."""
    tiles = sorted(_fitting(shape, device), key=lambda tile: _cost(shape, tile, device))
    return [tile._asdict() for tile in tiles[1 : 1 + CANDIDATES]]


@functools.lru_cache(maxsize=4096)
def _asked_for(shape: Shape, device: Device, tile: Tile) -> Tile | None:
    return tile if tile in _fitting(shape, device) else None


def asked_for(shape: Shape, device: Device, setting: Setting) -> Tile | None:
    """The division a setting names, if it is one of this shape on this device."""
    if setting.keys() != set(Tile._fields):
        return None
    return _asked_for(shape, device, Tile(**setting))


def least_shared(shape: Shape) -> int:
    """Shared memory of a CTA that makes a single pixel."""
    config = next((c for c in CONFIGS if shape.out_channels <= c.columns), CONFIGS[2])
    return shared_bytes(shape, Tile(1, 1, 1, config.number))
