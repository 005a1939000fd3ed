"""conv_act in the tier of compute capability 9.0 (``csrc/cuda/conv_act_sm90.cu``): which pixels and output channels one CTA makes.

It is for layers of many channels, whose time is products: a CTA reads the window under its pixels once, where the other kernels
read it once for every tap and every 128 output channels. What it does not serve, images of three channels for one, the others do.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from torch import Tensor

from . import chains, hopper, tiling
from .pack import STEP, rounded_up
from .tiling import Device

# csrc/cuda/conv_act_sm90.cu: kMostPooled.
_MOST_POOLED = 4
# Cycles of a scheduler that bias, activation and storing of one warp's 16 rows and 128 columns take.
_EPILOGUE = 700


class Config(NamedTuple):
    """A compiled shape of a CTA: warpgroups of 64 rows each, slabs under way, and CTAs on a multiprocessor."""

    number: int
    warpgroups: int
    stages: int
    per_processor: int

    @property
    def rows(self) -> int:
        return 64 * self.warpgroups


# csrc/cuda/conv_act_sm90.cu: LK_WIDE_CONVS.
CONFIGS = (Config(0, 3, 5, 1), Config(1, 2, 3, 2))


class Conv(NamedTuple):
    """One call, as far as its division matters. With ``pool`` a CTA makes whole images."""

    shape: chains.Shape
    pool: bool

    @property
    def plane(self) -> int:
        height, width = self.shape.output
        return height * width

    @property
    def blocks(self) -> int:
        """Of 128 output channels."""
        return -(-self.shape.out_channels // hopper.SLAB_COLUMNS)


class Tile(NamedTuple):
    """``pixels`` of a CTA, how many CTAs share the output channels of the same pixels, and the number of the :class:`Config`."""

    pixels: int
    column_ctas: int
    config: int


def _as_chain(tile: Tile) -> tiling.Tile:
    return tiling.Tile(0, 1, tile.pixels, tile.config)


def images_of(conv: Conv, tile: Tile) -> int:
    """Images that a CTA pools; 1 where nothing is pooled."""
    return tile.pixels // conv.plane if conv.pool else 1


def shared_bytes(conv: Conv, tile: Tile) -> int:
    """Shared memory of one CTA, as the launcher asks for it."""
    config = CONFIGS[tile.config]
    rows, pitch = chains.window(conv.shape, _as_chain(tile))
    steps = conv.shape.kernel**2 * conv.shape.depth // STEP
    totals = images_of(conv, tile) * 4 * config.warpgroups * 4 * hopper.SLAB_COLUMNS if conv.pool else 0
    return config.stages * hopper.SLAB_BYTES + totals + 2 * (16 + rows * pitch) + 4 * steps


def _resident(conv: Conv, tile: Tile, device: Device) -> int:
    """CTAs that a multiprocessor has room for."""
    return max(1, min(CONFIGS[tile.config].per_processor, device.shared_per_processor // (shared_bytes(conv, tile) + 1024)))


def _cost(conv: Conv, tile: Tile, device: Device) -> float:
    """Cycles of the busiest multiprocessor."""
    config, shape = CONFIGS[tile.config], conv.shape
    ctas = -(-shape.batch * conv.plane // tile.pixels) * tile.column_ctas
    blocks = -(-conv.blocks // tile.column_ctas)
    slabs = blocks * -(-(shape.kernel**2 * shape.depth) // hopper.SLAB_DEPTH)
    together = min(_resident(conv, tile, device), -(-ctas // device.processors))
    products = hopper.SLAB_CYCLES * config.warpgroups * slabs
    weights = hopper.SLAB_BYTES * slabs / hopper.l2_rate(ctas, device)
    epilogues = blocks * config.warpgroups * _EPILOGUE
    if together > 1:
        # One CTA's products run while the other stores, or waits.
        busy = together * max(products, weights, epilogues)
    else:
        busy = max(hopper.WAITING * products, weights) + epilogues
    waves = -(-ctas // (device.processors * together))
    return waves * (busy + together * chains.around(shape, _as_chain(tile)))


@functools.lru_cache(maxsize=4096)
def divisions(conv: Conv, device: Device, config: int | None = None) -> list[Tile]:
    """Every division that fits the device, the cheapest first; of one config if it is named. Empty for channels the kernels do not
    serve."""
    shape = conv.shape
    if shape.channels % 4 or shape.out_channels % 4:
        return []
    tiles = []
    for c in CONFIGS if config is None else CONFIGS[config : config + 1]:
        if conv.pool:
            counts = [n * conv.plane for n in range(1, min(_MOST_POOLED, shape.batch) + 1) if n * conv.plane <= c.rows]
        else:
            counts = chains.counts(shape, c.rows)
        shares = sorted({-(-conv.blocks // each) for each in range(1, conv.blocks + 1)})
        tiles += [Tile(count, share, c.number) for count in counts for share in shares]
    fitting = [tile for tile in tiles if shared_bytes(conv, tile) <= device.shared]
    return sorted(fitting, key=lambda tile: _cost(conv, tile, device))


def choose(conv: Conv, x: Tensor, others: float) -> Tile | None:
    """The division by warpgroups of a call with weights packed for them; None where the other kernels, which take ``others``
    cycles, are to serve it."""
    return hopper.accepted("conv_act", x, _wanted(conv, x, others))


def candidates(conv: Conv, x: Tensor, chosen: Tile | None) -> list[dict[str, int]]:
    """Settings of this tier for a tuner to try besides what :func:`choose` says."""
    if hopper.unusable(x.device) is not None:
        return []
    found = [hopper.setting_of(tile) for tile in divisions(conv, tiling.device_of(x)) if tile != chosen]
    return found[: tiling.CANDIDATES]


def remark(conv: Conv, x: Tensor, others: float) -> str | None:
    """Why a call that the tier would serve is served without it, or None."""
    return hopper.said("conv_act", x, lambda: _wanted(conv, x, others))


def _wanted(conv: Conv, x: Tensor, others: float) -> Tile | None:
    device = tiling.device_of(x)
    return hopper.wanted(lambda config: divisions(conv, device, config), lambda: _faster(conv, device, others))


@functools.lru_cache(maxsize=4096)
def _faster(conv: Conv, device: Device, others: float) -> Tile | None:
    tile = next(iter(divisions(conv, device)), None)
    return tile if tile is not None and _cost(conv, tile, device) < others else None


def pack(weight: Tensor) -> list[Tensor]:
    """The weights as the tier has them; empty where no call of theirs can take it, or gains by it: the depth of a classifier's
    fully connected layers leaves no room for the pixels of a warpgroup."""
    columns, channels = weight.shape[:2]
    if columns % 4 or channels % 4 or hopper.unusable(weight.device) is not None:
        return []
    least = min(config.stages for config in CONFIGS) * hopper.SLAB_BYTES + 2 * 64 * (rounded_up(channels, STEP) + 8)
    return [hopper.convolution(weight)] if least <= tiling.device_of(weight).shared else []
