"""Which pixels one CTA makes of two products back to back: the plan of fused_mbconv and gn_mlp (``csrc/cuda/expand_project.cuh``).

The cost of a division is counted, in cycles of a multiprocessor: multiply-adds of the tensor cores, bytes of shared memory each of
them needs, bytes from the L2 cache, and how many CTAs come after each other.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

from ...choosing.settings import Setting
from . import split
from .pack import GROUP, STEP, rounded_up
from .tiling import CANDIDATES, Device, Tile

WARPS = 8
# Elements of an image whose statistics every CTA may take for itself; beyond, a launch before takes them.
INLINE_STATISTICS = 2**16
# Pieces of an image in that launch.
PIECES = 32

# Multiply-adds a cycle, bytes a cycle from L2 where all multiprocessors ask and where one does, and cycles that a CTA needs before
# and after its products.
_MULTIPLY_ADDS, L2_BYTES, _L2_BYTES_ALONE, _AROUND = 1024, 32, 64, 3000
# A CTA alone on its multiprocessor has nothing to do while it loads and stores; a warp alone on its scheduler while it waits for
# operands.
_ALONE, _ONE_WARP = 1.15, 1.3


class Chain(NamedTuple):
    """A compiled shape, as ``Chain`` in csrc/cuda/expand_project.cuh has it: of a warp, 16-row tiles, groups of expanded
    channels at a time and groups of output channels; and how many warps split the expanded channels of the same rows."""

    tiles: int
    expand: int
    groups: int
    split: int

    @property
    def rows(self) -> int:
        return WARPS // self.split * self.tiles * 16

    @property
    def columns(self) -> int:
        return self.groups * GROUP

    @property
    def chunk(self) -> int:
        """Expanded channels of a CTA at a time."""
        return self.expand * self.split * GROUP

    @property
    def splits(self) -> bool:
        """Whether several CTAs may share the expanded channels of the same outputs."""
        return self.expand == 1

    @property
    def per_processor(self) -> int:
        return 1 if self.tiles * (self.expand + self.groups) * 8 > 96 else 2

    @property
    def ring(self) -> int:
        """Bytes of weights under way."""
        few = self.expand * self.split <= 8
        return (16 * 4 if few else 32 * 3) * 512

    @property
    def sums(self) -> int:
        """Bytes of the sums of warps that share rows."""
        return WARPS // 2 * self.tiles * self.groups * 1024 if self.split > 1 else 0


# csrc/cuda/expand_project.cuh: LK_CHAINS. gn_mlp has all but the first, which is for few output channels.
CHAINS = (
    Chain(1, 4, 4, 1),
    Chain(2, 4, 8, 1),
    Chain(2, 4, 8, 2),
    Chain(2, 2, 10, 1),
    Chain(1, 4, 16, 1),
    Chain(1, 4, 16, 4),
    Chain(1, 1, 16, 4),
)


class Shape(NamedTuple):
    """One call, as far as its division matters. With ``norm`` the pixels of an image are one column: the width is 1."""

    batch: int
    channels: int
    height: int
    width: int
    out_channels: int
    kernel: int
    stride: int
    padding: int
    expanded: int
    norm: bool

    @property
    def output(self) -> tuple[int, int]:
        height, width = ((n + 2 * self.padding - self.kernel) // self.stride + 1 for n in (self.height, self.width))
        return height, width

    @property
    def depth(self) -> int:
        return rounded_up(self.channels, STEP)


def window(shape: Shape, tile: Tile) -> tuple[int, int]:
    """Rows and elements between rows of the window in shared memory: ``layout_of`` in csrc/cuda/expand_project.cuh."""
    height, width = shape.output
    lines, crossings, across = tile.height, 0, tile.width
    if tile.images == 0:
        across = width
        lines = tile.width // width if tile.width % width == 0 else (tile.width + width - 2) // width + 1
        whole, rest = divmod(tile.width, height * width)
        crossings = whole - 1 if rest == 0 else (lines - 2) // height + 1 if lines > 1 else 0
    rows = (lines - 1) * shape.stride + shape.kernel + crossings * max(0, shape.kernel - shape.stride)
    columns = (across - 1) * shape.stride + shape.kernel
    held = columns if shape.stride == 1 else rounded_up(columns, 2)
    pixel = shape.depth + 8
    return rows, held * pixel + (across // shape.stride - held) * (pixel // 8) % 8 * 8


def shared_bytes(shape: Shape, tile: Tile) -> int:
    """Shared memory of one CTA, as the launchers ask for it."""
    chain = CHAINS[tile.config]
    rows, pitch = window(shape, tile)
    needed = chain.ring + rows * pitch * 2 + shape.kernel**2 * shape.depth // STEP * 4
    return 32 + max(needed, chain.sums) + 64 * shape.norm


def counts(shape: Shape, rows: int) -> list[int]:
    """Numbers of consecutive pixels for a CTA of that many rows, largest first: all rows, whole images, an image in equal parts."""
    height, width = shape.output
    plane = height * width
    whole = (n * plane for n in range(1, min(shape.batch, rows // plane) + 1))
    return sorted({min(rows, shape.batch * plane), *whole, -(-plane // -(-plane // rows))}, reverse=True)


def _tiles(shape: Shape, config: int) -> Iterator[Tile]:
    rows = CHAINS[config].rows
    for count in counts(shape, rows):
        yield Tile(0, 1, count, config)
    if shape.norm:
        yield Tile(0, 1, 1, config)
        return
    height, width = shape.output
    # Rectangles, from the largest down; one of a single pixel comes last.
    for tile_width in sorted({-(-width // n) for n in range(1, width + 1)}, reverse=True):
        for tile_height in sorted({-(-height // n) for n in range(1, height + 1)}, reverse=True):
            if tile_width * tile_height <= rows:
                yield Tile(1, tile_height, tile_width, config)


def _statistics(shape: Shape, tile: Tile) -> float:
    """Cycles that a CTA takes to read the images it shares with others, twice."""
    plane = shape.output[0]
    if not shape.norm or tile.width % plane == 0:
        return 0
    if plane * shape.channels > INLINE_STATISTICS:
        return _AROUND
    images = min(shape.batch, (tile.width - 2) // plane + 2)
    return 2 * 2 * images * plane * shape.channels / L2_BYTES


def around(shape: Shape, tile: Tile) -> float:
    """Cycles of a CTA besides its products."""
    rows, pitch = window(shape, tile)
    return _AROUND + 2 * rows * pitch / L2_BYTES + _statistics(shape, tile)


def ctas(shape: Shape, tile: Tile) -> int:
    """CTAs of a launch that is not split."""
    height, width = shape.output
    if tile.images == 0:
        tiles = -(-shape.batch * height * width // (tile.height * tile.width))
    else:
        tiles = shape.batch * -(-height // tile.height) * -(-width // tile.width)
    return tiles * -(-shape.out_channels // CHAINS[tile.config].columns)


@functools.lru_cache(maxsize=65536)
def splits(shape: Shape, tile: Tile, device: Device) -> int:
    """How many CTAs share each one's expanded channels."""
    chain = CHAINS[tile.config]
    if not chain.splits:
        return 1
    chunks = -(-shape.expanded // chain.chunk)
    return split.cheapest(ctas(shape, tile), chunks, device, lambda count: _cost(shape, tile, device, count))


def _cost(shape: Shape, tile: Tile, device: Device, shared: int | None = None) -> float:
    """Cycles of the busiest multiprocessor. ``shared``: how many CTAs share the expanded channels; without it as many as
    :func:`splits` says."""
    chain = CHAINS[tile.config]
    pixels = tile.height * tile.width
    count = splits(shape, tile, device) if shared is None else shared
    all_ctas = ctas(shape, tile) * count
    depth, expanded = shape.kernel**2 * shape.depth, rounded_up(-(-shape.expanded // count), chain.chunk)
    # The first product waits for shared memory where one mma needs more bytes than the 256 that pass in its time: it needs
    # 256 / tiles + 256 / expand.
    first = max(1.0, 1 / chain.tiles + 1 / chain.expand)
    row = expanded * (depth * first + chain.columns)
    # Schedulers take every fourth warp; warps without pixels do nothing.
    live, row_warps = -(-pixels // (16 * chain.tiles)), WARPS // chain.split
    busy = max(sum(warp % row_warps < live for warp in range(scheduler, WARPS, 4)) for scheduler in range(4))
    # Of the multiply-adds a cycle, a scheduler has a quarter.
    products = 4 * busy * 16 * chain.tiles * row / chain.split / _MULTIPLY_ADDS * (_ONE_WARP if busy == 1 else 1.0)
    rate = min(_L2_BYTES_ALONE, L2_BYTES * device.processors / all_ctas) if all_ctas < device.processors else L2_BYTES
    weights = 2 * expanded * (depth + chain.columns) / rate
    resident = max(1, min(chain.per_processor, device.shared_per_processor // (shared_bytes(shape, tile) + 1024)))
    alone = _ALONE if resident < 2 else 1.0
    joining = split.joining(count, pixels * min(shape.out_channels, chain.columns))
    return -(-all_ctas // device.processors) * (max(products, weights) * alone + around(shape, tile) / resident + joining)


def _fitting(shape: Shape, device: Device) -> Iterator[Tile]:
    """Every division that fits the device."""
    tiles = (tile for config in range(1 if shape.norm else 0, len(CHAINS)) for tile in _tiles(shape, config))
    return (tile for tile in tiles if shared_bytes(shape, tile) <= device.shared)


@functools.lru_cache(maxsize=4096)
def choose(shape: Shape, device: Device) -> Tile | None:
    """The cheapest division that fits the device, or None if not even one pixel at a time does."""
    return min(_fitting(shape, device), key=lambda tile: _cost(shape, tile, device), default=None)


def cost(shape: Shape, device: Device) -> float:
    """Cycles of the busiest multiprocessor with :func:`choose`'s division; infinite where there is none."""
    tile = choose(shape, device)
    return math.inf if tile is None else _cost(shape, tile, device)


def candidates(shape: Shape, device: Device) -> list[dict[str, int]]:
    """The next cheapest divisions after :func:`choose`'s, as settings: what a tuner tries."""
    tiles = sorted(_fitting(shape, device), key=lambda tile: _cost(shape, tile, device))
    return [tile._asdict() for tile in tiles[1 : 1 + CANDIDATES]]


@functools.lru_cache(maxsize=4096)
def _asked_for(shape: Shape, device: Device, tile: Tile) -> Tile | None:
    return tile if tile in _fitting(shape, device) else None


def division(shape: Shape, device: Device, setting: Setting) -> Tile:
    """The division of a call whose weights were found to be supported: what its setting says, else the cheapest."""
    asked = _asked_for(shape, device, Tile(**setting)) if setting.keys() == set(Tile._fields) else None
    tile = asked or choose(shape, device)
    assert tile is not None, shape
    return tile


def least_shared(channels: int, kernel: int) -> int:
    """Shared memory of a CTA that makes a single pixel."""
    shape = Shape(1, channels, kernel, kernel, GROUP, kernel, 1, 0, GROUP, kernel == 1)
    return min(shared_bytes(shape, Tile(1, 1, 1, config)) for config in range(1, len(CHAINS)))


def pieces(shape: Shape, tile: Tile) -> int:
    """Into how many pieces the launch for the statistics cuts an image; 0: it is not needed."""
    quads = shape.height * shape.channels // 4
    if tile.width % shape.height == 0 or 4 * quads <= INLINE_STATISTICS:
        return 0
    return min(PIECES, math.ceil(quads / 1024))
