"""The one command for a GPU machine: stages in order of importance, each in a process of its own, within a time limit.

A stage that crashes, hangs or runs out of time takes nothing with it: what it measured is on disk, it is started again after the
subject that killed it, and the next stage has its own process and its own CUDA context.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowkernels import backends
from lowkernels.choosing import tuning
from lowkernels.errors import LowkernelsError
from lowkernels.ops import OPERATORS
from lowkernels.testing import check_call

from . import plans, provenance, render, rows, runner
from .plans import MAIN_MODEL, Item
from .subjects import Layer, dtype_name, layers_of, lowformer_layers, mobile_layers
from .timing import QUICK, SMOKE

TOTAL_S = 540.0
"""All of it."""
RESERVED_S = 12.0
"""Kept for the report at the end."""
GRACE_S = 10.0
"""What a stage gets beyond its time to finish the subject at hand, before it is ended."""
RESTARTS = 3
LOG, REPORT = "log.txt", "report.md"


@dataclass(frozen=True)
class Stage:
    """One part of the run.

    Attributes:
        name: on the command line of its process.
        seconds: its share; what it leaves goes to the next.
        suite: the results file it writes to.
    """

    name: str
    seconds: float
    suite: str


STAGES = (
    Stage("correctness", 110, "correctness"),
    Stage("models", 90, "models"),
    Stage("ops", 90, "ops"),
    Stage("models-compiled", 120, "models"),
    Stage("tuning", 50, "tuning"),
    Stage("more-models", 40, "models"),
    Stage("more-ops", 40, "ops"),
)


def items_of(stage: str, device: str, smoke: bool) -> list[Item]:
    """The subjects of a measuring stage, in order of importance."""
    if smoke:
        return list(plans.smoke_ops(device) if stage == "ops" else plans.smoke_models(device) if stage == "models" else ())
    half, brain, full = plans.DTYPES["cuda"]
    slow = plans.without("measured in a later stage, if there is time", "compile")
    best = plans.without("left out of the nine-minute run", "compile", besides=("torch.compile",))
    others = [m for m in _variants() if m != MAIN_MODEL]
    plan: dict[str, Callable[[], Iterator[Item]]] = {
        "models": lambda: _models(device, [MAIN_MODEL, *others], (224,), (256, 1), (half,), slow),
        "ops": lambda: _layers(device, layers_of(MAIN_MODEL, 224), (256, 1), (half,), slow),
        "models-compiled": lambda: _compiled(device, half, best),
        "more-models": lambda: _rest_of_models(device, half, brain, full, others, slow),
        "more-ops": lambda: _layers(device, _rest_of_layers(), (256, 16), (half,), slow),
    }
    return list(plan[stage]())


def _variants() -> list[str]:
    import lowformer

    return lowformer.list_models()


def _models(
    device: str,
    models: Sequence[str],
    sizes: Sequence[int],
    batches: Sequence[int],
    dtypes: Sequence[torch.dtype],
    left_out: dict[str, str],
) -> Iterator[Item]:
    for size in sizes:
        for dtype in dtypes:
            for model in models:
                for batch in batches:
                    yield plans.model_item(model, size, batch, dtype, device, left_out)


def _compiled(device: str, half: torch.dtype, best: dict[str, str]) -> Iterator[Item]:
    # The quick compiler first; the slow one may not come to an end in time.
    for batch in (256, 1):
        yield plans.model_item(MAIN_MODEL, 224, batch, half, device, best)
    yield plans.model_item(MAIN_MODEL, 224, 16, half, device)


def _rest_of_models(
    device: str, half: torch.dtype, brain: torch.dtype, full: torch.dtype, others: list[str], left_out: dict[str, str]
) -> Iterator[Item]:
    yield from _models(device, [MAIN_MODEL], (224,), (256, 1), (brain, full), left_out)
    yield from _models(device, [MAIN_MODEL, *others], (512,), (16, 1), (half,), left_out)


def _layers(
    device: str, layers: Iterable[Layer], batches: Sequence[int], dtypes: Sequence[torch.dtype], left_out: dict[str, str]
) -> Iterator[Item]:
    for dtype in dtypes:
        for batch in batches:
            for layer in layers:
                yield plans.layer_item(layer, batch, dtype, device, left_out)


def _rest_of_layers() -> list[Layer]:
    main = set(layers_of(MAIN_MODEL, 224))
    return [x for x in (*lowformer_layers((224,)), *mobile_layers((224,)), *lowformer_layers((512,))) if x not in main]


def check_layers(
    layers: Sequence[Layer],
    dtypes: Sequence[torch.dtype],
    device: str,
    done: set[tuple[Any, ...]],
    time_left: Callable[[], float],
) -> Iterator[dict[str, Any]]:
    """Run every layer on every backend and dtype and hold it against its float64 budget.

    Yields:
        A ``started`` note and then an outcome for each: ``right``, ``wrong``, or ``refused`` where the backend says it cannot; with
        the reason for all but the first. One that is in ``done``, or comes after time is up, yields nothing.
    """
    for dtype in dtypes:
        for layer in layers:
            for backend in backends.PRIORITY:
                key = [backend, dtype_name(dtype), layer.name]
                if tuple(key) in done or time_left() <= 0:
                    continue
                yield {"kind": "started", "key": key, "stage": "correctness"}
                fact = {"kind": "correctness", "backend": backend, "dtype": key[1], "operator": layer.operator, "layer": layer.name}
                yield {**fact, **_outcome(layer, dtype, device, backend)}


def _outcome(layer: Layer, dtype: torch.dtype, device: str, backend: str) -> dict[str, str]:
    missing = backends.load(backend).unavailable(device)
    if missing is not None:
        return {"outcome": "refused", "reason": missing}
    try:
        args = layer.call(2, dtype, device)
        OPERATORS[layer.operator].explain(*args, backend=backend)
    except LowkernelsError as error:
        return {"outcome": "refused", "reason": str(error)}
    try:
        check_call(layer.operator, args, backend)
    except Exception as error:
        return {"outcome": "wrong", "reason": f"{type(error).__name__}: {error}"[:300]}
    return {"outcome": "right"}


def sweep(
    layers: Sequence[Layer], batches: Sequence[int], dtype: torch.dtype, device: str, time_left: Callable[[], float]
) -> Iterator[dict[str, Any]]:
    """Tuning rows of every backend: what :func:`lowkernels.choosing.tuning.facts` yields, with the layer it is about."""
    for batch in batches:
        for layer in layers:
            for backend in backends.PRIORITY:
                if time_left() <= 0 or backends.load(backend).unavailable(device) is not None:
                    continue
                about = {
                    "kind": "tuning",
                    "backend": backend,
                    "layer": layer.name,
                    "batch": batch,
                    "dtype": dtype_name(dtype),
                }
                try:
                    args = layer.call(batch, dtype, device)
                    for fact in tuning.facts(backend, layer.operator, args, time_left()):
                        yield {**about, **fact}
                except Exception as error:
                    yield {**about, "reason": f"{type(error).__name__}: {error}"[:300]}


def run_stage(name: str, out: Path, seconds: float, device: str, smoke: bool) -> None:
    """One stage, in this process."""
    stage = next(s for s in STAGES if s.name == name)
    time_left = runner.deadline(seconds)
    effort = SMOKE if smoke else dataclasses.replace(QUICK, max_s=6.0)
    session = runner.session_for(device, effort, time_left)
    dtypes = [torch.float32] if smoke else list(plans.DTYPES["cuda"])
    # One file a suite, whatever dtypes a stage has.
    path = runner.results_file(out, stage.suite, [dtype_name(d) for d in dtypes], session)
    if name in ("correctness", "tuning"):
        writer = rows.Writer(path)
        facts: Iterator[dict[str, Any]]
        if name == "correctness":
            layers = (
                plans.smoke_layers() if smoke else [*lowformer_layers((224,)), *mobile_layers((224,)), *lowformer_layers((512,))]
            )
            facts = check_layers(list(dict.fromkeys(layers)), dtypes, device, _checked(path), time_left)
        else:
            layers = plans.smoke_layers() if smoke else layers_of(MAIN_MODEL, 224)
            facts = sweep(layers, (2,) if smoke else (256, 1), dtypes[0], device, time_left)
        for fact in facts:
            writer.write(fact)
        writer.close()
        return
    runner.run_items(items_of(name, device, smoke), session, path, small=smoke, stage=name)


def _checked(path: Path) -> set[tuple[Any, ...]]:
    """What earlier processes checked, or died of: the latter is noted as wrong."""
    other = rows.read(path).other
    finished = {(f["backend"], f["dtype"], f["layer"]) for f in other if f["kind"] == "correctness"}
    begun = {tuple(f["key"]) for f in other if f["kind"] == "started"}
    writer = rows.Writer(path)
    for backend, dtype, layer in sorted(begun - finished):
        fact = {"kind": "correctness", "backend": backend, "dtype": dtype, "operator": layer.split()[0], "layer": layer}
        writer.write({**fact, "outcome": "wrong", "reason": "the process ended during the call"})
    writer.close()
    return begun | finished


Launch = Callable[[Sequence[str], float, Path], int | None]


def launch(command: Sequence[str], limit_s: float, log: Path) -> int | None:
    """Run a command, output appended to ``log``; its exit status, or None if it was ended for taking longer than ``limit_s``."""
    with log.open("ab") as file:
        process = subprocess.Popen(command, cwd=provenance.ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return process.wait(timeout=max(limit_s, 0.1))
        except subprocess.TimeoutExpired:
            # With its compiler workers, which it started in its own session.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None


def run_stages(
    out: Path,
    device: str,
    *,
    stages: Sequence[Stage] = STAGES,
    smoke: bool = False,
    total_s: float = TOTAL_S,
    launch: Launch = launch,
    now: Callable[[], float] = time.monotonic,
    say: Callable[[str], None] = print,
) -> dict[str, str]:
    """Run the stages one after another.

    Args:
        out: folder for the results, made if missing.
        device: ``"cuda"``, or ``"cpu"`` for a rehearsal.
        stages: in order of importance.
        smoke: small subjects.
        total_s: time for everything.
        launch, now: replaced in tests.
        say: progress.

    Returns:
        What became of each stage.
    """
    out.mkdir(parents=True, exist_ok=True)
    ends = now() + total_s - RESERVED_S
    outcome: dict[str, str] = {}
    spare = 0.0
    for stage in stages:
        began = now()
        share = stage.seconds * total_s / TOTAL_S + spare
        for attempt in range(1 + RESTARTS):
            left = min(began + share, ends) - now()
            if left <= 0:
                outcome.setdefault(stage.name, "no time left")
                break
            say(f"{stage.name}: {left:.0f} s")
            command = [sys.executable, "-m", "benchmarks", "stage", stage.name, "--out", str(out.resolve())]
            command += ["--seconds", f"{left:.1f}", "--device", device, *(["--smoke"] if smoke else [])]
            status = launch(command, min(left + GRACE_S, ends - now()), out / LOG)
            outcome[stage.name] = "done" if status == 0 else "out of time" if status is None else f"exit status {status}"
            if status in (0, None):
                break
            say(f"{stage.name}: exit status {status}, attempt {attempt + 1}; see {out / LOG}")
        spare = max(0.0, began + share - now())
    write_report(out, outcome)
    return outcome


def write_report(out: Path, outcome: dict[str, str]) -> Path:
    """Tables of everything in ``out``, and what became of the stages."""
    paths = sorted(out.glob("*.jsonl"))
    path = out / REPORT
    stages = "\n".join(f"- {name}: {what}" for name, what in outcome.items())
    body = render.report(rows.read(*paths)) if paths else "# Benchmarks\n\nNothing was measured.\n"
    path.write_text(body + (f"\n## Stages\n\n{stages}\n" if stages else ""))
    return path
