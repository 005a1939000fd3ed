"""The experiments that the papers behind this library argue with, on the device at hand: one command each.

``python -m benchmarks experiment NAME`` measures one. Its rows are those of any other run, timed and checked the same way, with a
``point`` that says where in the experiment they stand; its table and its picture are made of them alone.

To add one: write a module with an ``EXPERIMENT`` here, name it below, and draw it in ``benchmarks/plots``.
"""

from __future__ import annotations

from . import fusing, pixels, protocol, resolution, sharing
from .experiment import FULL, QUICK, TINY, Experiment

__all__ = ["EXPERIMENTS", "FULL", "QUICK", "TINY", "Experiment"]

EXPERIMENTS: dict[str, Experiment] = {m.EXPERIMENT.name: m.EXPERIMENT for m in (protocol, resolution, fusing, pixels, sharing)}
