"""Depthwise and pointwise against dense convolutions: time against multiply-accumulates, and which is faster where."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lowformer.config import FUSED_BELOW

from .. import rows
from ..experiments.experiment import AUTO, FOLDED
from ..experiments.fusing import Pair, pairs
from ..rows import Results
from . import Missing, source
from .style import BLUE, FILL, INK, MUTED, ORANGE, PAPER, heading, new, plain_numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHAPES = ("s", "o", "^", "D", "v")
_TITLES = {FOLDED: "PyTorch (BatchNorm folded, channels_last)", AUTO: "lowkernels"}


def draw(results: Results) -> Figure:
    """A column without our kernels and one with them; times above, their ratio below."""
    found = {name: pairs(results, name) for name in (FOLDED, AUTO)}
    found = {name: some for name, some in found.items() if some}
    if not found:
        raise Missing("no pair of blocks was timed undisturbed")
    every = [pair for some in found.values() for pair in some]
    sides = sorted({pair.side for pair in every}, reverse=True)
    batches = sorted({pair.batch for pair in every})
    shapes = dict(zip(sides, _SHAPES, strict=False))
    figure, axes = new(8.8, 7.0, nrows=2, ncols=len(found), sharey="row", sharex="row", squeeze=False)
    for column, (name, some) in enumerate(found.items()):
        above, below = axes[0][column], axes[1][column]
        above.set_title(_TITLES[name], loc="left", fontsize=10, color=INK)
        for batch in batches:
            for side in sides:
                line = [p for p in some if (p.batch, p.side) == (batch, side)]
                if line:
                    _times(above, line, shapes[side], batch == batches[0])
                    _ratios(below, line, shapes[side], batch == batches[0])
    _finish_times(axes[0][0])
    channels = sorted({pair.channels for pair in every})
    for below in axes[1]:
        _finish_ratios(below, channels)
    axes[1][0].set_ylabel("time of MBConv / FusedMBConv")
    _legend(axes[0], shapes, batches)
    first = results.rows[0]
    text = (
        f"{rows.SHORT_DTYPES[first.dtype]}; expansion 4, 3x3, stride 1, residual; lines join the same resolution and batch. "
        f"The models are dense below {FUSED_BELOW} channels"
    )
    heading(figure, "Dense or depthwise: time against multiply-accumulates", text, source(results))
    return figure


def _times(axes: Any, line: list[Pair], shape: str, filled: bool) -> None:
    for color, points in (
        (BLUE, [(p.separable.point, p.separable.ms) for p in line]),
        (ORANGE, [(p.dense.point, p.dense.ms) for p in line]),
    ):
        x, y = [(point or {})["macs"] / 1e6 for point, _ in points], [ms for _, ms in points]
        face = color if filled else PAPER
        axes.plot(x, y, color=color, marker=shape, markerfacecolor=face, markersize=5, linewidth=1.1)


def _ratios(axes: Any, line: list[Pair], shape: str, filled: bool) -> None:
    x, y = [p.channels for p in line], [p.ratio for p in line]
    axes.plot(x, y, color=INK, marker=shape, markerfacecolor=INK if filled else PAPER, markersize=5, linewidth=1.1)


def _finish_times(axes: Any) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.minorticks_off()
    for axis in (axes.xaxis, axes.yaxis):
        plain_numbers(axis)
    axes.set_ylabel("ms (logarithmic)")
    axes.set_xlabel("million multiply-accumulates (logarithmic)")


def _finish_ratios(axes: Any, channels: list[int]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    left, right = 0.8 * channels[0], 1.25 * channels[-1]
    axes.set_xlim(left, right)
    below = [c for c in channels if c < FUSED_BELOW]
    if below:
        border = (below[-1] * FUSED_BELOW) ** 0.5
        axes.axvspan(left, min(border, right), color=FILL, linewidth=0, zorder=0)
    axes.axhline(1, color=MUTED, linewidth=1.2)
    low, high = axes.get_ylim()
    low, high = min(low, 0.8), max(high, 1.25)
    axes.set_ylim(low, high)
    axes.set_yticks([t for t in (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 20) if low <= t <= high])
    axes.set_xticks(channels)
    axes.minorticks_off()
    for axis in (axes.xaxis, axes.yaxis):
        plain_numbers(axis)
    for y, va, text in ((0.98, "top", "↑ dense is faster"), (0.02, "bottom", "↓ depthwise is faster")):
        axes.text(0.98, y, text, color=MUTED, fontsize=8.5, ha="right", va=va, transform=axes.transAxes)
    axes.set_xlabel("channels (logarithmic); shaded: dense in the models")


def _legend(panels: Any, shapes: dict[int, str], batches: list[int]) -> None:
    from matplotlib.lines import Line2D

    marks = [
        Line2D([], [], color=BLUE, linewidth=2, label="MBConv: 1x1, depthwise, 1x1"),
        Line2D([], [], color=ORANGE, linewidth=2, label="FusedMBConv: dense 3x3, 1x1"),
    ]
    panels[0].legend(handles=marks, loc="upper left", frameon=False, fontsize=8.5)
    kinds = [Line2D([], [], color=INK, marker=m, markersize=5, linestyle="", label=f"{s}x{s}") for s, m in shapes.items()]
    for index, batch in enumerate(batches):
        face = INK if index == 0 else PAPER
        kinds.append(
            Line2D([], [], color=INK, marker="o", markerfacecolor=face, linestyle="", markersize=5, label=f"batch {batch}")
        )
    panels[-1].legend(handles=kinds, loc="upper left", frameon=False, fontsize=8.5, ncols=2)
