"""The experiments that the papers behind this library argue with, on the device at hand: one command each.

``python -m benchmarks experiment NAME`` measures one. Its rows are those of any other run, timed and checked the same way, with a
``point`` that says where in the experiment they stand; its table and its picture are made of them alone.

To add one: write a module with an ``EXPERIMENT`` here, name it below, and draw it in ``benchmarks/plots``.
"""

from __future__ import annotations

from collections.abc import Sequence

from .. import render
from ..plots import PLOTS, pictures
from ..rows import Results
from . import fusing, pixels, protocol, resolution, sharing
from .experiment import FULL, QUICK, TINY, Experiment

__all__ = ["EXPERIMENTS", "FULL", "QUICK", "TINY", "Experiment", "document"]

EXPERIMENTS: dict[str, Experiment] = {m.EXPERIMENT.name: m.EXPERIMENT for m in (protocol, resolution, fusing, pixels, sharing)}


def document(measured: Sequence[Results]) -> str:
    """All experiments in Markdown: what each asks, its picture and table on every device, and the command where it was not run.

    Args:
        measured: results of every device.
    """
    return "\n\n".join(_section(experiment, measured) for experiment in EXPERIMENTS.values())


def _section(experiment: Experiment, measured: Sequence[Results]) -> str:
    parts = [f"## {experiment.title}", experiment.question, f"Source: {experiment.source}."]
    for results in measured:
        found = results.experiments.get(experiment.name)
        if found is not None:
            parts.append(f"### {render.device_title({**found.run, 'cpu': None})}")
            parts += [text for p in PLOTS.values() if p.experiment == experiment.name and (text := pictures.markdown(p, found))]
            parts.append(experiment.report(found))
    done = {results.device for results in measured if experiment.name in results.experiments}
    for device, kind in (("cuda", "gpu"), ("cpu", "cpu")):
        if kind not in done:
            parts.append(f"Not measured yet on a {kind.upper()}: `{experiment.command(device)}`")
    return "\n\n".join(parts)
