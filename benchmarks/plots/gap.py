"""The efficiency gap: accuracy against latency, each model at the latency its operations would take at the peak rate and at those
it has (Lavin, arXiv 2404.03617). On the logarithmic axis a segment's length is the logarithm of one over the efficiency."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowformer.config import VARIANTS

from .. import rows
from ..rows import Results, Row
from . import Missing, ceilings, source
from .style import INK, MUTED, OURS, PAPER, heading, legend, new, plain_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = 224
APART = 0.2
"""Points of accuracy by which variants with the same accuracy are drawn apart."""
SOURCES = "Top-1 as published, 224 px: arXiv 2409.03460 (B), 2603.26551 (E)"


def draw(results: Results) -> Figure:
    """One horizontal line a variant, from its ideal latency to eager PyTorch's."""
    groups, batch, dtype = _groups(results)
    peak, _ = ceilings(results, dtype)
    figure, axes = new(8.6, 5.2)
    heights = _heights(list(groups))
    ends: list[float] = []
    for name, group in groups.items():
        y = heights[name]
        ours = _fastest(group, True)
        rival = _fastest(group, False)
        eager = next((r for r in group if r.contender == "eager" and not r.graph and r.ms is not None), None)
        assert ours is not None
        assert ours.ms is not None
        assert ours.tflops is not None
        ideal = ours.ms * ours.tflops * 1e12 / peak
        axes.plot([ideal, ours.ms], [y, y], color=OURS, linewidth=2.2, zorder=2)
        if eager is not None and eager.ms is not None:
            axes.plot([ours.ms, eager.ms], [y, y], color=MUTED, linewidth=1, zorder=1)
            axes.plot(eager.ms, y, "o", color=MUTED, markersize=6, zorder=3)
            ends.append(eager.ms)
        if rival is not None and rival.ms is not None and rival is not eager:
            axes.plot(rival.ms, y, "|", color=INK, markersize=11, markeredgewidth=2, zorder=4)
        axes.plot(ideal, y, "D", color=OURS, markerfacecolor=PAPER, markersize=6, markeredgewidth=1.4, zorder=5)
        axes.plot(ours.ms, y, "o", color=OURS, markerfacecolor=PAPER if ours.disturbed else OURS, markersize=7, zorder=5)
        text = f"{short(name)}  {100 * ideal / ours.ms:.0f} %"
        axes.annotate(text, (ideal, y), (-9, 0), textcoords="offset points", ha="right", va="center", color=INK)
        ends += [ideal, ours.ms]
    axes.set_xscale("log")
    left, right = 0.68 * min(ends), 1.12 * max(ends)
    axes.set_xlim(left, right)
    axes.set_xticks([t for t in (m * 10**e for e in range(-4, 5) for m in (1, 2, 5)) if left <= t <= right])
    axes.minorticks_off()
    plain_numbers(axes.xaxis)
    axes.set_xlabel(f"ms for a batch of {batch} (logarithmic)" if batch > 1 else "latency, ms for one image (logarithmic)")
    axes.set_ylabel("ImageNet-1k top-1 accuracy (%)")
    _legend(axes)
    missing = [short(n) for n in VARIANTS if n not in groups]
    text = (
        f"{SIZE} px, batch {batch}, {rows.SHORT_DTYPES[dtype]}. "
        f"Ideal: operations over the measured peak, {peak / 1e12:.3g} TFLOP/s; the share is ideal over measured.\n{SOURCES}"
        + (". Equal ones are drawn a little apart" if len({VARIANTS[n].top1 for n in groups}) < len(groups) else "")
        + (f". Not measured: {', '.join(missing)}" if missing else "")
    )
    heading(figure, "Efficiency gap of the LowFormer family", text, source(results))
    return figure


def _legend(axes: Axes) -> None:
    from matplotlib.lines import Line2D

    marks = [
        Line2D([], [], color=OURS, marker="D", markerfacecolor=PAPER, linestyle="", label="ideal"),
        Line2D([], [], color=OURS, marker="o", linewidth=2.2, label="lowkernels"),
        Line2D([], [], color=INK, marker="|", markersize=11, markeredgewidth=2, linestyle="", label="fastest rival that was timed"),
        Line2D([], [], color=MUTED, marker="o", linestyle="", label="eager"),
    ]
    legend(marks, axes, ncols=4)


def short(name: str) -> str:
    """What the papers call a variant."""
    text = name.removeprefix("lowformer_").upper()
    return "B1.5" if text == "B15" else text


def _heights(names: list[str]) -> dict[str, float]:
    """Where each variant is drawn: at its accuracy, those that share one a little apart."""
    found = {}
    for name in names:
        same = [n for n in names if VARIANTS[n].top1 == VARIANTS[name].top1]
        found[name] = VARIANTS[name].top1 + APART * (same.index(name) - (len(same) - 1) / 2)
    return found


def _fastest(group: list[Row], ours: bool) -> Row | None:
    return min((r for r in group if r.ours == ours and r.ms is not None), key=lambda r: r.ms or 0.0, default=None)


def _groups(results: Results) -> tuple[dict[str, list[Row]], int, str]:
    """What was measured of each variant, at the batch and dtype that most were measured at, the smallest such batch."""
    found = {
        key: g
        for key, g in results.groups().items()
        if key[0] == "model" and key[1] in VARIANTS and key[2] == SIZE and _fastest(g, True) is not None
    }
    kinds = [(key[3], key[4]) for key in found]
    if not kinds:
        raise Missing(f"no model was timed at {SIZE} px")
    batch, dtype = max(sorted(dict.fromkeys(kinds)), key=kinds.count)
    return {key[1]: g for key, g in found.items() if key[3:] == (batch, dtype)}, batch, dtype
