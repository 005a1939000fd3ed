"""Several processes that share the device."""

from __future__ import annotations

import contextlib
import os
import random
import statistics
import time as clock
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from .. import plans, render, rows
from ..compare import Task, Worker
from ..measure import Session
from ..plans import MAIN_MODEL, Item
from ..provenance import ROOT
from ..rivals import EAGER
from ..rows import Results, Row
from ..subjects import dtype_name
from ..timing import DISTURBED_SHARE, Effort, Timing, Turn, repetitions_for, summarize
from .experiment import AUTO, FULL, QUICK, SHORT, TINY, TORCHSCRIPT, Experiment, best, taking_part

PROCESSES = {FULL: (1, 2, 3, 4, 6, 8), QUICK: (1, 2, 4), TINY: (1, 2)}


def items(device: str, scale: str) -> Sequence[Item]:
    """One subject for each number of processes."""
    dtype = torch.float32 if device == "cpu" else torch.float16
    model, size = ("lowformer_b0", 64) if scale == TINY else (MAIN_MODEL, 224)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [
        replace(
            plans.model_item(model, size, 1, dtype, device),
            key=("model", f"{model}, {count} process{'es' if count > 1 else ''}", size, 1, dtype_name(dtype)),
            point={"model": model, "processes": count, "threads": max(1, min(torch.get_num_threads(), cores // count))},
        )
        for count in PROCESSES[scale]
    ]


class Others:
    """Processor time that went to processes other than these, from Linux's statistics; nothing is seen elsewhere."""

    source = "processor time of all other processes (/proc/stat)"

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = [os.getpid(), *pids]
        self._ticks = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100

    def seconds(self) -> float:
        """Since some time in the past, over all processors."""
        try:
            busy = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
            own = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in self._pids]
        except OSError:
            return 0.0
        # user, nice, system, interrupts, soft interrupts, stolen; utime and stime
        used = sum(busy[:3]) + sum(busy[5:8])
        return (used - sum(int(p[11]) + int(p[12]) for p in own)) / self._ticks


def measure(items: Sequence[Item], session: Session, path: Path, *, small: bool, say: Callable[[str], None]) -> None:
    """For each number of processes, let the contenders take turns, each turn in all processes at once.

    A turn of one process is timed as everywhere. What it waits for is, among others, its own kind, so what disturbs is not seen by
    waiting but by processor time that went elsewhere.
    """
    writer = rows.Writer(path)
    for item in items:
        if session.time_left() <= 0:
            writer.write({"kind": "unmeasured", "key": item.key, "stage": "", "reason": "no time left"})
            continue
        found = _at_once(item, session)
        rows.fill_ratios(found)
        writer.write(*found)
        say(f"{item.key[1]}: " + "; ".join(f"{r.contender} {r.ms:.3g} ms" if r.ms else f"{r.contender}: {r.reason}" for r in found))
    writer.close()


def _at_once(item: Item, session: Session) -> list[Row]:
    assert item.point is not None
    kind, name, size, batch, dtype = item.key
    found = [Row(kind, name, size, batch, dtype, c.name, point=item.point, ours=c.ours) for c in session.contenders]
    with contextlib.ExitStack() as stack:
        workers = [Worker(ROOT, ROOT, item.point["threads"]) for _ in range(item.point["processes"])]
        for worker in workers:
            stack.callback(worker.close)
        ready = {}
        for row in found:
            task = Task(item.point["model"], size, batch, dtype, session.device, contender=row.contender)
            try:
                ready[row.contender] = (row, _repetitions(workers, task, session.effort, row))
            except RuntimeError as error:
                row.status, row.reason = rows.FAILED, str(error)[:300]
        for contender, timing in _take_turns(workers, {k: v[1] for k, v in ready.items()}, session.effort).items():
            row = ready[contender][0]
            row.ms, row.ms_low, row.ms_high = (1e3 * s for s in (timing.median, timing.low, timing.high))
            row.turns, row.dropped, row.disturbed = timing.turns, timing.dropped, timing.disturbed
            row.images_per_s = batch / timing.median
    return found


def _repetitions(workers: Sequence[Worker], task: Task, effort: Effort, row: Row) -> int:
    """Build the contender in every process; how many calls a turn of all of them takes."""
    for answer in _all(workers, task=asdict(task)):
        row.error, row.served = answer["error"], answer["served"]
    first = _all(workers, repetitions=1, contender=task.contender)
    return repetitions_for(min(answer["seconds"] for answer in first), effort.turn_s)


def _take_turns(workers: Sequence[Worker], repetitions: dict[str, int], effort: Effort) -> dict[str, Timing]:
    turns: dict[str, list[Turn]] = {name: [] for name in repetitions}
    others, cores = Others([w.pid for w in workers]), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    shuffle, order, started = random.Random(0), list(repetitions), clock.monotonic()
    while turns and any(sum(not t.disturbed for t in taken) < effort.rounds for taken in turns.values()):
        if min(map(len, turns.values())) >= 2 and clock.monotonic() - started > effort.max_s:
            break
        shuffle.shuffle(order)
        for name in order:
            before, began = others.seconds(), clock.perf_counter()
            answers = _all(workers, repetitions=repetitions[name], contender=name)
            elapsed = clock.perf_counter() - began
            lost = others.seconds() - before
            seconds = statistics.mean(answer["seconds"] for answer in answers)
            turns[name].append(Turn(seconds, lost > DISTURBED_SHARE * elapsed * cores))
    return {name: summarize(taken) for name, taken in turns.items()}


def _all(workers: Sequence[Worker], **request: Any) -> list[dict[str, Any]]:
    """One request to all of them at once, and their answers."""
    for worker in workers:
        worker.tell(**request)
    answers, failure = [], None
    for worker in workers:
        try:
            answers.append(worker.hear())
        except RuntimeError as error:
            failure = error
    if failure is not None:
        raise failure
    return answers


def by_count(results: Results) -> dict[int, list[Row]]:
    """What was measured with each number of processes."""
    return {g[0].point["processes"]: g for g in results.groups().values() if g[0].point is not None}


def table(results: Results) -> str:
    """A line for each number of processes: latency in each, and images/s of all together."""
    names = taking_part(results)
    header = ["processes", "threads each"]
    for name in names:
        header += [f"{SHORT[name]} ms", "images/s, all"]
    body = []
    for count, group in by_count(results).items():
        point = group[0].point or {}
        cells = [str(count), str(point["threads"])]
        for name in names:
            row = best(group, name)
            rate = None if row is None or row.images_per_s is None else count * row.images_per_s
            cells += ["–" if row is None else render.spread(row), render.number(rate)]
        body.append(cells)
    first = results.rows[0]
    model = "" if first.point is None else first.point["model"]
    about = f"{model}, {first.size} px, batch {first.batch} in each process, {rows.SHORT_DTYPES[first.dtype]}"
    return f"{about}:\n\n{render.table(header, body, left=0)}"


EXPERIMENT = Experiment(
    "sharing",
    "Several processes on one device",
    "What is left of the speed when several processes run the model at the same time, each on its share of the processor's cores? "
    "All processes work through the same contender's turn at once; the latency is the mean over processes.",
    "option `--jobs` of `eval_cls_model.py`, github.com/altair199797/LowFormer",
    items,
    table,
    contenders=(EAGER, TORCHSCRIPT, AUTO),
    quick=Effort(turn_s=0.5, rounds=5, max_s=15.0),
    measure=measure,
    seen_by=Others.source,
)
