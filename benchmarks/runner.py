"""Running a plan: one subject after another, everything on disk as soon as it is known, within a time limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import ceilings as ceilings_of
from . import provenance, rows
from .measure import Session, measure
from .plans import Item
from .rivals import contenders
from .subjects import Subject
from .timing import Clock, CpuClock, CudaClock, Effort


def clock_for(device: str) -> Clock:
    return CudaClock() if device == "cuda" else CpuClock()


def deadline(seconds: float | None, now: Callable[[], float] = time.monotonic) -> Callable[[], float]:
    """A function that says how many of these seconds are left; without a limit there is always a day."""
    ends = now() + (86_400.0 if seconds is None else seconds)
    return lambda: ends - now()


def session_for(
    device: str,
    effort: Effort,
    time_left: Callable[[], float],
) -> Session:
    """A session of all contenders whose ceilings are not measured yet."""
    torch.backends.cudnn.benchmark = True
    return Session(device, clock_for(device), effort, {}, contenders(), time_left)


def results_file(
    out: Path,
    suite: str,
    dtypes: Sequence[str],
    session: Session,
    experiment: str | None = None,
    seen_by: str | None = None,
) -> Path:
    """The file a suite, or an experiment, writes to, with the provenance of what this process will add to it.

    ``seen_by`` says what disturbances are seen by, if not by the session's clock.
    """
    run = provenance.describe(session.device, seen_by or session.clock.source)
    if experiment is not None:
        run["experiment"] = experiment
    path = out / rows.file_name(suite, dtypes, run)
    known = [r for part in _parts(path) for r in part.runs] if path.exists() else []
    if not known or not rows.same_origin(run, known[-1]):
        writer = rows.Writer(path)
        writer.write(run)
        writer.close()
    return path


def ensure_ceilings(dtype: torch.dtype, session: Session, writer: rows.Writer, small: bool) -> None:
    """Measure the device's rates for ``dtype`` if this session has not."""
    if dtype in session.ceilings:
        return
    found = ceilings_of.measure(session.device, dtype, session.clock, session.effort, small)
    session.ceilings[dtype] = found
    writer.write(
        {
            "kind": "ceiling",
            "dtype": str(dtype).removeprefix("torch."),
            "product": found.product,
            "tflops": round(found.flops_per_s / 1e12, 4),
            "gb_per_s": round(found.bytes_per_s / 1e9, 2),
            "disturbed": found.disturbed,
        }
    )


def interrupted(path: Path, stage: str = "") -> set[tuple[Any, ...]]:
    """Subjects that an earlier process of this stage began and did not end."""
    begun: set[tuple[Any, ...]] = set()
    for fact in _notes(path, stage):
        if fact["kind"] == "started":
            begun.add(tuple(fact["key"]))
        else:
            begun.discard(tuple(fact["key"]))
    return begun


def ended(path: Path, stage: str = "") -> set[tuple[Any, ...]]:
    """Subjects that earlier processes of this stage dealt with, one way or another."""
    return {tuple(fact["key"]) for fact in _notes(path, stage) if fact["kind"] != "started"}


def _notes(path: Path, stage: str) -> list[dict[str, Any]]:
    kinds = ("started", "ended", "unmeasured")
    return [f for part in _parts(path) for f in part.other if f["kind"] in kinds and f["stage"] == stage]


def _parts(path: Path) -> list[rows.Results]:
    found = rows.read(path)
    return [found, *found.experiments.values()]


def memory_needed(subject: Subject) -> int:
    """Bytes that the largest step of the subject takes in a few contenders at once: room for what they keep between calls."""
    largest = max(step.bytes for block in subject.blocks for step in block.steps)
    return sum(x.numel() * x.element_size() for x in subject.inputs) + 4 * largest


def run_items(
    items: Sequence[Item],
    session: Session,
    path: Path,
    *,
    small: bool = False,
    stage: str = "",
    say: Callable[[str], None] = print,
) -> None:
    """Measure the items of a plan in order, until time is up.

    Args:
        items: what to measure.
        session: how.
        path: results file, which exists. Subjects it already has from the same stage are skipped, and one that a previous process
            did not survive is noted as that.
        small: measure ceilings at sizes for smoke tests.
        stage: name of the part of a longer run.
        say: progress, a line at a time.
    """
    writer = rows.Writer(path)

    def unmeasured(key: tuple[Any, ...], reason: str) -> None:
        writer.write({"kind": "unmeasured", "key": key, "stage": stage, "reason": reason})

    for key in interrupted(path, stage):
        unmeasured(key, "the process ended while it was measured")
    done = ended(path, stage)
    cache = provenance.cache_bytes(session.device)
    slowest = 0.0
    for item in items:
        name = " ".join(str(part) for part in item.key[1:])
        if item.key in done:
            continue
        if session.time_left() < min(slowest, 30.0):
            unmeasured(item.key, "no time left")
            continue
        writer.write({"kind": "started", "key": item.key, "stage": stage})
        started = time.monotonic()
        try:
            subject = item.make(cache)
            needed, free = memory_needed(subject), provenance.free_memory(session.device)
            if needed > free:
                unmeasured(item.key, f"needs about {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free")
                continue
            ensure_ceilings(subject.dtype, session, writer, small)
            found = measure(subject, session, item.left_out)
            for row in found:
                row.point = item.point
        except Exception as error:
            unmeasured(item.key, f"{type(error).__name__}: {error}"[:300])
            say(f"{name}: {type(error).__name__}: {error}")
            continue
        writer.write(*found, {"kind": "ended", "key": item.key, "stage": stage})
        slowest = max(slowest, time.monotonic() - started)
        say(f"{name}: {_summary(found)}")
    writer.close()


def _summary(found: Sequence[rows.Row]) -> str:
    timed = sorted((r for r in found if r.ms is not None), key=lambda r: r.ms or 0.0)
    parts = [f"{r.label} {r.ms:.3g} ms" for r in timed]
    wrong = [f"{r.label} WRONG: {r.reason}" for r in found if r.status == rows.WRONG]
    failed = [f"{r.label} failed: {r.reason}" for r in found if r.status == rows.FAILED]
    return "; ".join(parts + wrong + failed) or "nothing could be measured"


def finish(path: Path) -> None:
    """Take the progress notes out of a results file."""
    lines = [x for x in path.read_text().splitlines() if not x.startswith(('{"kind": "started"', '{"kind": "ended"'))]
    temporary = path.with_suffix(".part")
    temporary.write_text("\n".join(lines) + "\n")
    temporary.replace(path)
