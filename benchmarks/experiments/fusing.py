"""Depthwise and pointwise convolutions against a dense one: time against multiply-accumulates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lowformer.config import BLOCK_EXPANSION, FUSED_BELOW

from .. import plans, render
from ..plans import Item
from ..rivals import EAGER
from ..rows import Results, Row
from ..subjects import Layer
from ..timing import Effort
from .experiment import AUTO, FOLDED, FULL, QUICK, TINY, Experiment, best, taking_part

BLOCKS = ("mbconv", "fused_mbconv")
CHANNELS = {FULL: (32, 64, 128, 192, 256, 384, 512), QUICK: (32, 64, 128, 256, 512), TINY: (8, 16)}
SIDES = {FULL: (56, 28, 14, 7), QUICK: (28, 14, 7), TINY: (7,)}
BATCHES = {"cpu": (1, 16), "cuda": (1, 200)}
MOST_MACS = {FULL: 2e12, QUICK: 8e9, TINY: 1e12}
"""Larger blocks are left out; those of a quick run would take it more than its time."""


def items(device: str, scale: str) -> Sequence[Item]:
    """Both blocks at every number of channels, resolution and batch."""
    dtype = torch.float32 if device == "cpu" else torch.float16
    batches = (2,) if scale == TINY else BATCHES[device]
    return [
        _item(block, channels, side, batch, dtype, device)
        for batch in batches
        for side in SIDES[scale]
        for channels in CHANNELS[scale]
        if macs("fused_mbconv", channels, side, batch) <= MOST_MACS[scale]
        for block in BLOCKS
    ]


def _layer(block: str, channels: int, side: int) -> Layer:
    return Layer(block, channels, channels, side, side, act="hardswish", hidden=BLOCK_EXPANSION * channels, residual=True)


def _item(block: str, channels: int, side: int, batch: int, dtype: torch.dtype, device: str) -> Item:
    item = plans.layer_item(_layer(block, channels, side), batch, dtype, device)
    point = {"channels": channels, "side": side, "macs": macs(block, channels, side, batch)}
    return replace(item, point=point)


def macs(block: str, channels: int, side: int, batch: int) -> int:
    """Multiply-accumulates of one call."""
    hidden = BLOCK_EXPANSION * channels
    pointwise = channels * hidden
    spatial = pointwise + 9 * hidden if block == "mbconv" else 9 * pointwise
    return (spatial + pointwise) * side * side * batch


@dataclass(frozen=True)
class Pair:
    """Both blocks at one place, timed by one contender."""

    channels: int
    side: int
    batch: int
    separable: Row
    dense: Row

    @property
    def ratio(self) -> float:
        """Time of the block with a depthwise convolution over that of the dense one: above 1, dense is faster."""
        assert self.separable.ms is not None
        assert self.dense.ms is not None
        return self.separable.ms / self.dense.ms


def pairs(results: Results, contender: str) -> list[Pair]:
    """Where a contender has timed both blocks, undisturbed, in the order of batch, resolution and channels."""
    found: dict[tuple[int, int, int], dict[str, Row]] = {}
    for group in results.groups().values():
        row, point = best(group, contender), group[0].point
        if row is not None and not row.disturbed and point is not None and row.operator is not None:
            found.setdefault((row.batch, point["side"], point["channels"]), {})[row.operator] = row
    both = {key: rows_ for key, rows_ in found.items() if set(rows_) == set(BLOCKS)}
    return [
        Pair(c, side, batch, both[batch, side, c]["mbconv"], both[batch, side, c]["fused_mbconv"])
        for batch, side, c in sorted(both)
    ]


def table(results: Results) -> str:
    """A line for each place: both blocks, and which is faster, without our kernels and with them."""
    names = taking_part(results, (FOLDED, AUTO))
    by_name = {name: {(p.batch, p.side, p.channels): p for p in pairs(results, name)} for name in names}
    words = {FOLDED: "PyTorch", AUTO: "lowkernels"}
    header = ["batch", "resolution", "channels", "MMACs MBConv", "MMACs FusedMBConv"]
    for name in names:
        header += [f"{words[name]}: MBConv ms", "FusedMBConv ms", "dense gains"]
    body = []
    for place in sorted(set().union(*by_name.values())):
        batch, side, channels = place
        cells = [str(batch), f"{side}x{side}", str(channels)]
        cells += [render.number(macs(block, channels, side, batch) / 1e6) for block in BLOCKS]
        for name in names:
            pair = by_name[name].get(place)
            cells += (
                ["–"] * 3 if pair is None else [render.spread(pair.separable), render.spread(pair.dense), render.ratio(pair.ratio)]
            )
        body.append(cells)
    parts = [render.table(header, body, left=0)]
    parts += [f"{words[name]}: {verdict(pairs(results, name))}" for name in names if by_name[name]]
    return "\n\n".join(parts)


def verdict(found: Sequence[Pair]) -> str:
    """How often the models' rule, dense below so many channels, names the faster block."""
    right = sum((pair.ratio > 1) == (pair.channels < FUSED_BELOW) for pair in found)
    return (
        f"the rule of the models, dense below {FUSED_BELOW} channels and depthwise from there on, names the faster block in "
        f"{right} of {len(found)} places."
    )


EXPERIMENT = Experiment(
    "fusing",
    "Depthwise and pointwise against dense convolutions",
    "Do fewer multiply-accumulates take less time? MBConv (1x1, depthwise 3x3, 1x1) and FusedMBConv (dense 3x3, 1x1) with "
    "the same channels, four times as many inside, both as PyTorch runs them and as this library does. The models have the dense "
    f"block below {FUSED_BELOW} channels.",
    "arXiv 2409.03460 and 2603.26551, which find depthwise convolutions slower than their multiply-accumulates suggest",
    items,
    table,
    contenders=(EAGER, FOLDED, AUTO),
    quick=Effort(turn_s=0.01, rounds=5, max_s=2.0),
)
