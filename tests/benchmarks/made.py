"""Results that nobody measured: rows of every experiment with times that follow from a formula."""

from __future__ import annotations

import contextlib
from typing import Any

from benchmarks import rows
from benchmarks.experiments import Experiment
from benchmarks.rows import Results, Row

RUN: dict[str, Any] = {
    "kind": "run",
    "command": "python -m benchmarks models",
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "dirty": False,
    "date": "2026-01-02 03:04 UTC",
    "device": "cpu",
    "device_name": "Some(R) Processor 9 16-Core",
    "threads": 2,
    "cores": 2,
    "system": "Linux",
    "versions": {"python": "3.12.1", "torch": "2.13.0+cpu"},
    "disturbance_seen_by": "a gauge",
}
CEILING: dict[str, Any] = {"kind": "ceiling", "dtype": "float32", "product": "matrix product", "tflops": 0.5, "gb_per_s": 40.0}


def timed(key: tuple[Any, ...], contender: str, ms: float, **given: Any) -> Row:
    """A row that was measured, undisturbed."""
    error = {"frobenius": 0.0, "maximum": 0.0, "frobenius_budget": 1.0, "maximum_budget": 1.0}
    fields = {"ms_low": 0.98 * ms, "ms_high": 1.02 * ms, "images_per_s": 1e3 * key[3] / ms, "turns": 9, "error": error, **given}
    return Row(*key, contender, ours=contender.startswith("lowkernels"), ms=ms, **fields)


def experiment_results(experiment: Experiment, scale: str, device: str = "cpu") -> Results:
    """What an experiment gives if every contender takes half as long as the one before, and each subject 1 ms longer."""
    found = Results(runs=[{**RUN, "experiment": experiment.name}], ceilings=[CEILING])
    for index, item in enumerate(experiment.items(device, scale)):
        group = [
            timed(
                item.key,
                name,
                (index + 1) * 8.0 / 2**place,
                point=item.point,
                tflops=0.1 * 2**place,
                operator=item.key[1].split()[0] if item.key[0] == "op" else None,
            )
            for place, name in enumerate(experiment.contenders)
        ]
        rows.fill_ratios(group)
        found.rows += group
    return found


@contextlib.contextmanager
def no_module(monkeypatch: Any, name: str) -> Any:
    """Inside, a module cannot be imported."""
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, name, None)
        yield
