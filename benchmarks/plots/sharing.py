"""Several processes on one device: what all of them get done, and how long each takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import rows
from ..experiments.experiment import SHORT, best, taking_part
from ..experiments.sharing import by_count
from ..rows import Results
from . import Missing, source
from .style import COLORS, OURS, end_labels, heading, new

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(results: Results) -> Figure:
    """Throughput on the left, latency on the right."""
    found = by_count(results)
    if len(found) < 2:
        raise Missing("fewer than two numbers of processes were measured")
    first = results.rows[0]
    figure, (throughput, latency) = new(8.6, 4.2, ncols=2)
    labels: dict[bool, list[tuple[float, str, str]]] = {True: [], False: []}
    for name in taking_part(results):
        timed = [(count, best(group, name)) for count, group in found.items()]
        points = [(count, r.images_per_s * count, r.ms) for count, r in timed if r is not None and r.images_per_s and r.ms]
        color = COLORS.get(name, OURS)
        for axes, column in ((throughput, 1), (latency, 2)):
            axes.plot([p[0] for p in points], [p[column] for p in points], color=color, marker="o", markersize=5, linewidth=1.8)
            labels[axes is throughput].append((points[-1][column], SHORT[name], color))
    for axes, words in ((throughput, "images/s, all processes"), (latency, "latency in each process, ms")):
        axes.set_ylim(bottom=0)
        axes.set_xticks(list(found))
        axes.set_xlabel("processes")
        axes.set_ylabel(words)
        end_labels(axes, labels[axes is throughput])
    model = "" if first.point is None else first.point["model"]
    threads = ", ".join(str((g[0].point or {})["threads"]) for g in found.values())
    text = (
        f"{model}, {first.size} px, batch {first.batch} in each process, {rows.SHORT_DTYPES[first.dtype]}; threads each: {threads}"
    )
    heading(figure, "Several processes on one device", text, source(results))
    return figure
