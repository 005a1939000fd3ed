"""The same number of pixels as more and smaller images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from .. import plans, render, rows
from ..plans import MAIN_MODEL, Item
from ..rivals import EAGER
from ..rows import Results, Row
from .experiment import AUTO, FOLDED, FULL, QUICK, SHORT, TINY, Experiment, best, taking_part, time

BASE = {("cpu", FULL): (1, 1024), ("cpu", QUICK): (1, 512), ("cuda", FULL): (16, 1024), ("cuda", QUICK): (4, 1024)}
"""Batch and size of the largest images."""
FACTORS = (1, 2, 4, 8)


def items(device: str, scale: str) -> Sequence[Item]:
    """One subject a factor f: f squared as many images, each f times as small."""
    dtype = torch.float32 if device == "cpu" else torch.float16
    batch, size = BASE.get((device, scale), (1, 64))
    model, factors = ("lowformer_b0", FACTORS[:2]) if scale == TINY else (MAIN_MODEL, FACTORS)
    return [
        replace(
            plans.model_item(model, size // f, batch * f * f, dtype, device), point={"factor": f, "pixels": batch * size * size}
        )
        for f in factors
    ]


def by_factor(results: Results) -> dict[int, list[Row]]:
    """What was measured at each factor."""
    return {g[0].point["factor"]: g for g in results.groups().values() if g[0].point is not None}


def table(results: Results) -> str:
    """A line a factor: time for all the pixels, and per megapixel."""
    names, found = taking_part(results), by_factor(results)
    header = ["images", "GFLOP"]
    for name in names:
        header += [f"{SHORT[name]} ms", "ms per megapixel"]
    body = []
    for group in found.values():
        first = group[0]
        flops = next((r.tflops * r.ms for r in group if r.tflops is not None and r.ms is not None), None)
        cells = [f"{first.batch} of {first.size} px", render.number(flops)]
        for name in names:
            row = best(group, name)
            pixels = 1 if first.point is None else first.point["pixels"]
            cells += [time(row), "–" if row is None or row.ms is None else render.number(row.ms / pixels * 1e6)]
        body.append(cells)
    first = results.rows[0]
    return f"{first.subject}, {rows.SHORT_DTYPES[first.dtype]}:\n\n{render.table(header, body)}"


EXPERIMENT = Experiment(
    "pixels",
    "The same pixels at lower resolution",
    "What does a pixel cost in small images and in large ones? The batch grows as the images shrink, so that the number of pixels "
    "and, but for attention, that of operations stay the same.",
    "option `--facbs` of `eval_cls_model.py`, github.com/altair199797/LowFormer",
    items,
    table,
    contenders=(EAGER, FOLDED, AUTO),
)
