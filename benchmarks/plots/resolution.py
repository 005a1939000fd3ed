"""Latency against resolution, with and without the downsampling inside Lowtention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import rows
from ..experiments.experiment import SHORT, best, taking_part
from ..experiments.resolution import pairs
from ..rows import Results
from . import Missing, source
from .style import COLORS, OURS, end_labels, heading, new, plain_numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(results: Results) -> Figure:
    """One colour a contender, one line for each form of the model."""
    found = pairs(results)
    if len(found) < 2:
        raise Missing("fewer than two resolutions were measured")
    first = results.rows[0]
    figure, axes = new(8.6, 4.8)
    labels = []
    for name in taking_part(results):
        color = COLORS.get(name, OURS)
        for downsampled, style in ((True, "-"), (False, (0, (4, 2)))):
            timed = [(size, best(pair.get(downsampled, []), name)) for size, pair in found.items()]
            points = [(size, row.ms) for size, row in timed if row is not None and row.ms is not None]
            if points:
                axes.plot(*zip(*points, strict=True), color=color, linestyle=style, marker="o", markersize=4, linewidth=1.8)
                labels.append((points[-1][1], SHORT[name] + ("" if downsampled else ", full resolution"), color))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(list(found))
    axes.minorticks_off()
    plain_numbers(axes.xaxis)
    plain_numbers(axes.yaxis)
    low, high = axes.get_ylim()
    axes.set_yticks([t for t in (m * 10**e for e in range(-2, 6) for m in (1, 2, 5)) if low <= t <= high])
    axes.set_ylim(low, high)
    end_labels(axes, labels)
    axes.set_xlabel("image size, pixels a side (logarithmic)")
    axes.set_ylabel("latency, ms (logarithmic)")
    model = "" if first.point is None else first.point["model"]
    text = f"{model}, batch 1, {rows.SHORT_DTYPES[first.dtype]}. Dashed: Lowtention without its stride, four times the positions"
    heading(figure, "Latency against resolution", text, source(results))
    return figure
