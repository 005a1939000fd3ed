"""Every layer of the model against every rival: how many times longer the rival takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import rows
from ..plans import MAIN_MODEL
from ..rows import Results, Row
from ..subjects import layers_of
from . import Missing, source
from .style import BLUE, GREEN, INK, MUTED, OURS, PURPLE, SKY, heading, legend, new, note, plain_numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = 224
_MARKS = {
    "eager": ("o", MUTED),
    "eager, BatchNorm folded, channels_last": ("s", INK),
    "TorchScript, optimize_for_inference": ("v", SKY),
    "torch.compile": ("<", BLUE),
    "torch.compile, max-autotune, freezing": ("D", BLUE),
    "ONNX Runtime": ("^", GREEN),
    "OpenVINO": ("P", PURPLE),
}


def draw(results: Results) -> Figure:
    """One line a layer in the order they run, one mark a rival."""
    groups = _groups(results)
    if not groups:
        raise Missing(f"no layer of {MAIN_MODEL} at {SIZE} px was timed against a rival")
    first = groups[0][0]
    labels = list(dict.fromkeys(r.label for g in groups for r in g if not r.ours and r.ms is not None))
    figure, axes = new(8.6, 1.9 + 0.34 * len(groups))
    ends = [0.8, 1.3]
    for line, group in enumerate(groups):
        mine = min(r.ms for r in group if r.ours and r.ms is not None)
        shown = [(r.label, r.ms / mine, r.disturbed) for r in group if not r.ours and r.ms is not None]
        ends += [ratio for _, ratio, _ in shown]
        axes.plot(
            [1, min(ratio for _, ratio, _ in shown)], [line, line], color=OURS, linewidth=5, alpha=0.35, solid_capstyle="butt"
        )
        for label, ratio, disturbed in shown:
            shape, color = mark(label)
            face = "none" if disturbed else color
            axes.plot(ratio, line, shape, color=color, markerfacecolor=face, markersize=6, label=label, zorder=3)
    axes.axvline(1, color=OURS, linewidth=1.5)
    note(axes, "lowkernels", 1, -0.75, OURS, ha="center", fontweight="bold")
    axes.set_xscale("log")
    axes.set_xlim(0.93 * min(ends), 1.06 * max(ends))
    axes.set_xticks(
        [t for t in (0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16) if min(ends) * 0.93 <= t <= max(ends) * 1.06]
    )
    axes.minorticks_off()
    plain_numbers(axes.xaxis)
    axes.set_xlabel("time of the rival / time of lowkernels (logarithmic)")
    axes.set_yticks(range(len(groups)), [g[0].subject for g in groups])
    axes.tick_params("y", length=0, labelcolor=INK)
    axes.set_ylim(len(groups) - 0.4, -1.1)
    axes.spines["left"].set_visible(False)
    handles = {h.get_label(): h for h in axes.get_lines() if h.get_label() in labels}
    legend([handles[n] for n in labels], axes, ncols=3)
    dtype = rows.SHORT_DTYPES[first.dtype]
    title = f"Speed-up of each layer of {MAIN_MODEL} over every rival"
    heading(figure, title, f"{SIZE} px, batch {first.batch}, {dtype}; bars reach to the fastest rival", source(results))
    return figure


def mark(label: str) -> tuple[str, str]:
    """Marker and colour of a rival; one replayed from a CUDA graph has that of its contender."""
    return _MARKS.get(label.removesuffix(", CUDA graph"), ("X", MUTED))


def _groups(results: Results) -> list[list[Row]]:
    """What was measured of the model's layers together with ours and a rival, at the batch and dtype most of them have."""
    order = [layer.name for layer in layers_of(MAIN_MODEL, SIZE)]
    found = [
        g
        for g in results.groups().values()
        if g[0].kind == "op"
        and g[0].subject in order
        and any(r.ours and r.ms is not None for r in g)
        and any(not r.ours and r.ms is not None for r in g)
    ]
    kinds = [(g[0].batch, g[0].dtype) for g in found]
    if not kinds:
        return []
    most = max(dict.fromkeys(kinds), key=kinds.count)
    return sorted((g for g, kind in zip(found, kinds, strict=True) if kind == most), key=lambda g: order.index(g[0].subject))
