"""The same number of pixels as more and smaller images: time per megapixel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import rows
from ..experiments.experiment import SHORT, best, taking_part
from ..experiments.pixels import by_factor
from ..rows import Results
from . import Missing, source
from .style import COLORS, OURS, end_labels, heading, new, plain_numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(results: Results) -> Figure:
    """One line a contender, the largest images on the left."""
    found = by_factor(results)
    if len(found) < 2:
        raise Missing("fewer than two resolutions were measured")
    first = results.rows[0]
    figure, axes = new(8.6, 4.2)
    labels, places = [], {factor: place for place, factor in enumerate(found)}
    for name in taking_part(results):
        points = []
        for factor, group in found.items():
            row = best(group, name)
            if row is not None and row.ms is not None and row.point is not None:
                points.append((places[factor], row.ms / row.point["pixels"] * 1e6))
        color = COLORS.get(name, OURS)
        axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=5, linewidth=1.8)
        labels.append((points[-1][1], SHORT[name], color))
    axes.set_ylim(bottom=0)
    plain_numbers(axes.yaxis)
    axes.set_xticks(list(places.values()), [f"{g[0].batch} of {g[0].size} px" for g in found.values()])
    axes.grid(False, axis="x")
    end_labels(axes, labels)
    axes.set_ylabel("ms per megapixel")
    axes.set_xlabel("images in a batch, pixels a side")
    text = f"{first.subject}, {rows.SHORT_DTYPES[first.dtype]}; every batch has the same number of pixels"
    heading(figure, "The same pixels at lower resolution", text, source(results))
    return figure
