"""Latency against resolution, with and without the downsampling inside Lowtention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lowformer.blocks import Lowtention

from .. import render, rows
from ..plans import MAIN_MODEL, Item
from ..rivals import EAGER
from ..rows import Results, Row
from ..subjects import Variation, dtype_name, model_subject
from .experiment import AUTO, FOLDED, FULL, QUICK, SHORT, TINY, Experiment, best, over, taking_part, time

SIZES = {FULL: (224, 320, 384, 512, 640, 768, 896, 1024), QUICK: (224, 384, 512, 768, 1024), TINY: (64, 96)}


def keep_resolution(network: nn.Module) -> None:
    """Take the stride out of every Lowtention of a LowFormer, in place: stage 3 then attends to all its positions, like stage 4."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Lowtention) and child.stride > 1:
                setattr(parent, name, Lowtention(child.conv_proj.conv.in_channels, stride=1))


FULL_RESOLUTION = Variation("Lowtention at full resolution", keep_resolution)


def items(device: str, scale: str) -> Sequence[Item]:
    """Both forms of the model at every size."""
    dtype = torch.float32 if device == "cpu" else torch.float16
    model = "lowformer_b0" if scale == TINY else MAIN_MODEL
    return [_item(model, size, dtype, device, variation) for size in SIZES[scale] for variation in (None, FULL_RESOLUTION)]


def _item(model: str, size: int, dtype: torch.dtype, device: str, variation: Variation | None) -> Item:
    name = model if variation is None else f"{model}, {variation.name}"
    return Item(
        ("model", name, size, 1, dtype_name(dtype)),
        lambda cache: model_subject(model, size, 1, dtype, device, cache, variation),
        point={"model": model, "downsampled": variation is None},
    )


def pairs(results: Results) -> dict[int, dict[bool, list[Row]]]:
    """What was measured at each size, by whether Lowtention downsamples."""
    found: dict[int, dict[bool, list[Row]]] = {}
    for group in results.groups().values():
        if group[0].point is not None:
            found.setdefault(group[0].size, {})[group[0].point["downsampled"]] = group
    return dict(sorted(found.items()))


def table(results: Results) -> str:
    """A line a size: each contender on both models, and what the downsampling gains it."""
    names = taking_part(results)
    header = ["px", "positions attended to in stage 3"]
    for name in names:
        header += [f"{SHORT[name]} ms", "at full resolution", "gain"]
    body = []
    for size, pair in pairs(results).items():
        cells = [str(size), f"{(-(-size // 32)) ** 2:,}, {(-(-size // 16)) ** 2:,}"]
        for name in names:
            strided, full = (best(pair.get(down, []), name) for down in (True, False))
            cells += [time(strided), time(full), over(full, strided)]
        body.append(cells)
    first = results.rows[0]
    model = "" if first.point is None else first.point["model"]
    return f"{model}, batch 1, {rows.SHORT_DTYPES[first.dtype]}:\n\n{render.table(header, body)}"


EXPERIMENT = Experiment(
    "resolution",
    "Latency against resolution, with and without Lowtention's downsampling",
    "What does attention cost as images grow, and what does it gain to attend at half the resolution? Stage 3 of the model "
    "attends to positions at stride 32; the other form of the model, built for this, attends to all of them at stride 16, four "
    "times as many, so that the attention core costs sixteen times as much.",
    "arXiv 2409.03460 and 2603.26551, which attend at a lower resolution for this reason",
    items,
    table,
    contenders=(EAGER, FOLDED, AUTO),
)
