"""Throughput at batch 200 and latency at batch 1, by the protocol of the LowFormer papers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lowformer.config import VARIANTS

from .. import rows
from ..experiments.experiment import SHORT, best, taking_part
from ..rows import Results, Row
from . import Missing, source
from .gap import short
from .style import COLORS, INK, OURS, heading, legend, new, plain_numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHAPES = {"eager": "o", "eager, BatchNorm folded, channels_last": "s", "TorchScript, optimize_for_inference": "v"}


def draw(results: Results) -> Figure:
    """One line a variant: latency on the left, throughput on the right."""
    dtype = results.rows[0].dtype if results.rows else ""
    groups = {(g[0].subject, g[0].batch): g for g in results.groups().values() if g[0].dtype == dtype and any(r.ms for r in g)}
    batches = sorted({batch for _, batch in groups})
    models = [name for name in VARIANTS if any(name == model for model, _ in groups)]
    if not groups:
        raise Missing("no model was timed")
    figure, axes = new(8.8, 1.7 + 0.36 * len(models), ncols=len(batches), sharey=True, squeeze=False)
    names = taking_part(results)
    for panel, batch in zip(axes[0], batches, strict=True):
        _panel(panel, [groups.get((model, batch), []) for model in models], names, batch)
    axes[0][0].set_yticks(range(len(models)), [short(model) for model in models])
    axes[0][0].set_ylim(len(models) - 0.5, -0.5)
    legend([_handle(name) for name in names], axes[0][-1], ncols=len(names))
    size = results.rows[0].size
    text = f"{size} px, {rows.SHORT_DTYPES[dtype]}; further left is better on the left, further right on the right"
    heading(figure, "The LowFormer family by the papers' protocol", text, source(results))
    return figure


def _panel(axes: Any, groups: list[list[Row]], names: list[str], batch: int) -> None:
    values = []
    for line, group in enumerate(groups):
        shown = [(name, row) for name in names if (row := best(group, name)) is not None]
        points = [(name, row.images_per_s if batch > 1 else row.ms) for name, row in shown]
        if points:
            ends = [value or 0.0 for _, value in points]
            axes.plot([min(ends), max(ends)], [line, line], color=INK, linewidth=0.8, alpha=0.4, zorder=1)
            values += ends
        for name, value in points:
            axes.plot(value, line, _SHAPES.get(name, "D"), color=COLORS.get(name, OURS), markersize=7, zorder=3)
    axes.set_xscale("log")
    left, right = 0.85 * min(values), 1.18 * max(values)
    axes.set_xlim(left, right)
    axes.set_xticks([t for t in (m * 10**e for e in range(-3, 7) for m in (1, 2, 3, 5, 7)) if left <= t <= right])
    axes.minorticks_off()
    plain_numbers(axes.xaxis)
    axes.set_xlabel(
        f"throughput at batch {batch}, images/s (logarithmic)" if batch > 1 else "latency of one image, ms (logarithmic)"
    )
    axes.tick_params("y", length=0, labelcolor=INK)


def _handle(name: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D(
        [], [], color=COLORS.get(name, OURS), marker=_SHAPES.get(name, "D"), markersize=7, linestyle="", label=SHORT[name]
    )
