"""The waterline of a model: what rate its kernels could reach, one by one and block by block, and what was measured.

A kernel takes at least the larger of its operations over the peak rate and its bytes over the bandwidth. The operations of all
kernels over the sum of those times is the rate that no library can exceed that runs these kernels one after another: the
waterline (Lavin, arXiv 2404.03617).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lowkernels.costs import Cost, Step

from .. import rows
from ..plans import MAIN_MODEL
from ..rows import Results, Row
from ..subjects import blocks_of, layer_of
from . import Missing, ceilings, source
from .style import BLUE, FILL, GRID, INK, MUTED, OURS, heading, legend, new, note

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = 224


@dataclass(frozen=True)
class Layer:
    """All blocks of a model that are the same layer.

    Attributes:
        name: of the layer; of a subject, if it is an operator's.
        count: how often it runs.
        cost: of one of them.
    """

    name: str
    count: int
    cost: Cost


def layers(model: str, size: int, batch: int, dtype: torch.dtype) -> list[Layer]:
    """The layers of a model in the order they first run."""
    found: dict[str, Layer] = {}
    for block in blocks_of(model, size, batch, dtype):
        layer = layer_of(block.operator, block.args)
        name = f"linear {block.args[1].shape[0]}-{block.args[1].shape[1]}" if layer is None else layer.name
        found[name] = Layer(name, found[name].count + 1 if name in found else 1, block.cost)
    return list(found.values())


def waterline(steps: Iterable[Step], flops_per_s: float, bytes_per_s: float) -> float:
    """The rate, in operations a second, of a sequence of kernels each of which is as fast as these rates allow."""
    taken = list(steps)
    return sum(s.flops for s in taken) / sum(s.seconds(flops_per_s, bytes_per_s) for s in taken)


def draw(results: Results) -> Figure:
    """Two panels: kernel by kernel above, block by block below."""
    groups, batch, dtype = _measured(results)
    peak, copy = ceilings(results, dtype)
    model = layers(MAIN_MODEL, SIZE, batch, getattr(torch, dtype))
    total = sum(layer.count * layer.cost.fused.flops for layer in model)
    figure, panels = new(8.8, 7.0, nrows=2, sharex=True, sharey=True)
    sequences = (
        ("Kernel by kernel", [[s for s in layer.cost.steps if s.flops] for layer in model], False),
        ("Block by block", [[layer.cost.fused] for layer in model], True),
    )
    top = 0.0
    for axes, (heading_text, steps, ours) in zip(panels, sequences, strict=True):
        every = [s for x in model for _ in range(x.count) for s in (x.cost.steps if not ours else (x.cost.fused,))]
        level = waterline(every, peak, copy)
        top = max(top, _panel(axes, model, steps, groups, total, peak, copy, ours))
        axes.axhline(level / 1e12, color=BLUE, linewidth=1.6, zorder=4)
        share = f"waterline {level / 1e12:.3g} TFLOP/s"
        note(axes, share, 100.6, level / 1e12, BLUE, fontweight="bold", va="top")
        axes.axhline(peak / 1e12, color=MUTED, linewidth=1, linestyle=(0, (1, 2)), zorder=4)
        note(axes, f"peak {peak / 1e12:.3g}", 100.6, peak / 1e12, MUTED, va="bottom")
        whole = _model_rate(results, batch, dtype, ours)
        if whole is not None:
            color = OURS if ours else INK
            axes.axhline(whole[1], color=color, linewidth=1.2, linestyle=(0, (5, 3)), zorder=4)
            note(axes, f"whole model, {whole[0]}\n{whole[1]:.3g}", 100.6, whole[1], color)
        axes.set_title(heading_text, loc="left", fontsize=10, color=INK)
        axes.set_ylabel("TFLOP/s")
        axes.grid(False, axis="x")
        axes.tick_params("x", length=0)
    panels[0].set_ylim(0, 1.08 * max(top, peak / 1e12))
    panels[0].set_xlim(0, 100)
    _name_layers(panels[1], model, total)
    panels[1].set_xlabel("width: share of the model's operations")
    _legend(panels[0])
    _legend(panels[1])
    text = (
        f"{SIZE} px, batch {batch}, {rows.SHORT_DTYPES[dtype]}. "
        f"Attainable: the slower of arithmetic at {peak / 1e12:.3g} TFLOP/s and traffic at {copy / 1e9:.3g} GB/s, as measured"
    )
    if top > peak / 1e12:
        text += "\nOperations are those of the direct convolution; Winograd's way takes fewer, so that it can exceed the peak"
    heading(figure, f"Waterline of {MAIN_MODEL}", text, source(results))
    return figure


def _panel(
    axes: Axes,
    model: Sequence[Layer],
    steps: Sequence[Sequence[Step]],
    groups: dict[str, list[Row]],
    total: int,
    peak: float,
    copy: float,
    ours: bool,
) -> float:
    """Bars and marks of one sequence; the highest rate in it."""
    left, highest = 0.0, 0.0
    for layer, kernels in zip(model, steps, strict=True):
        width = 100 * layer.count * layer.cost.fused.flops / total
        begin = left
        for kernel in kernels:
            share = 100 * layer.count * kernel.flops / total
            rate = kernel.flops / kernel.seconds(peak, copy) / 1e12
            axes.bar(begin, rate, share, align="edge", color=FILL, edgecolor=GRID, linewidth=0.6)
            begin += share
        axes.plot([left, left], [0, peak / 1e12], color=MUTED, linewidth=0.6)
        for row, color, thickness in _marks(groups.get(layer.name, []), ours):
            rate = row.tflops or 0.0
            axes.plot([left, left + width], [rate, rate], color=color, linewidth=thickness, solid_capstyle="butt", zorder=5)
            highest = max(highest, rate)
        left += width
    return highest


def _name_layers(axes: Axes, model: Sequence[Layer], total: int) -> None:
    """Names under the layers that are wide enough for one."""
    left, centres, names = 0.0, [], []
    for layer in model:
        width = 100 * layer.count * layer.cost.fused.flops / total
        if width > 1.5:
            centres.append(left + width / 2)
            names.append(" ".join(layer.name.split(" ")[:2]) + (f" ×{layer.count}" if layer.count > 1 else ""))
        left += width
    axes.set_xticks(centres, names, rotation=55, ha="right", rotation_mode="anchor", fontsize=8, color=INK)


def _marks(group: Sequence[Row], ours: bool) -> list[tuple[Row, str, float]]:
    """The measured rows that a panel shows of a layer."""
    timed = [r for r in group if r.tflops is not None]
    best = min((r for r in timed if r.ours == ours), key=lambda r: r.ms or 0.0, default=None)
    if ours:
        return [] if best is None else [(best, OURS, 3.0)]
    eager = [r for r in timed if r.contender == "eager" and not r.graph]
    return [(r, MUTED, 3.0) for r in eager] + ([] if best is None else [(best, INK, 3.0)])


def _legend(axes: Any) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    ours = axes.get_subplotspec().rowspan.start == 1
    attainable = Patch(facecolor=FILL, edgecolor=GRID, label="attainable")
    measured = [(OURS, "lowkernels")] if ours else [(MUTED, "eager"), (INK, "fastest rival")]
    lines = [Line2D([], [], color=color, linewidth=3, label=f"measured, {name}") for color, name in measured]
    legend([attainable, *lines], axes, ncols=3)


def _measured(results: Results) -> tuple[dict[str, list[Row]], int, str]:
    """Rows of the model's layers by name, at the batch and dtype that most were measured at."""
    wanted = {layer.name for layer in layers(MAIN_MODEL, SIZE, 1, torch.float32)}
    groups = [g for g in results.groups().values() if g[0].kind == "op" and g[0].subject in wanted and any(r.ms for r in g)]
    kinds = [(g[0].batch, g[0].dtype) for g in groups]
    if not kinds:
        raise Missing(f"no layer of {MAIN_MODEL} at {SIZE} px was timed")
    batch, dtype = max(dict.fromkeys(kinds), key=kinds.count)
    return {g[0].subject: g for g, kind in zip(groups, kinds, strict=True) if kind == (batch, dtype)}, batch, dtype


def _model_rate(results: Results, batch: int, dtype: str, ours: bool) -> tuple[str, float] | None:
    """Who ran the whole model fastest, and at what rate."""
    group = results.groups().get(("model", MAIN_MODEL, SIZE, batch, dtype), [])
    best = min((r for r in group if r.tflops is not None and r.ours == ours), key=lambda r: r.ms or 0.0, default=None)
    return None if best is None or best.tflops is None else (best.label, best.tflops)
