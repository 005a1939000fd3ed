"""Taking turns against the clock.

Contenders of a subject take turns in rounds, in a new random order each round, so that slow drifts of the machine (clock rates,
temperature, neighbours) reach all of them alike. A turn is a run of calls long enough for the clock. Turns in which something else
wanted the processor are dropped, and counted; if too few are left the result says that it was disturbed. Threads of one contender
that wait for each other are no disturbance: see :func:`own_waiting`.
"""

from __future__ import annotations

import glob
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

DISTURBED_SHARE = 0.03
"""A turn is dropped if the process's threads waited for a processor, or the hypervisor withheld one, for more than this share of
it, beyond the contender's own waiting."""
OWN_WAITING_LIMIT = 0.1
"""The most that is taken for a contender's own waiting. One that always waits for longer cannot be told from one that others
always keep waiting."""
MIN_UNDISTURBED = 5
SETTLE_S = 0.003
"""Between turns on a CPU: worker threads of the previous contender spin for a while before they sleep."""


class Turn(NamedTuple):
    """One turn.

    Attributes:
        seconds: a call.
        disturbed: something else was in the way.
        lost: share of the turn that threads waited for a processor; None where only ``disturbed`` is known.
    """

    seconds: float
    disturbed: bool
    lost: float | None = None


class Clock(Protocol):
    """What a device's turns are timed with."""

    @property
    def source(self) -> str:
        """What disturbances are seen by."""

    def turn(self, calls: Sequence[Callable[[], Any]], repetitions: int) -> Turn:
        """Run ``repetitions`` calls, going round ``calls``."""


class Interference:
    """How long others kept this process's threads from running, from Linux's scheduler statistics."""

    source = "scheduler wait of every thread (/proc/self/task/*/schedstat) and steal (/proc/stat)"

    def __init__(self) -> None:
        self._tick_s = 1 / os.sysconf("SC_CLK_TCK")

    @staticmethod
    def available() -> bool:
        return os.path.exists("/proc/self/schedstat") and os.path.exists("/proc/stat")

    def waited(self) -> dict[str, int]:
        """Nanoseconds each thread has waited for a processor since it started."""
        found = {}
        for path in glob.glob("/proc/self/task/*/schedstat"):
            try:
                with open(path) as file:
                    found[path] = int(file.read().split()[1])
            except (OSError, IndexError):
                continue
        return found

    def stolen(self) -> float:
        """Seconds the hypervisor has run something else, over all processors."""
        with open("/proc/stat") as file:
            fields = file.readline().split()
        return int(fields[8]) * self._tick_s

    def read(self) -> tuple[dict[str, int], float]:
        return self.waited(), self.stolen()

    @staticmethod
    def between(before: tuple[dict[str, int], float], after: tuple[dict[str, int], float]) -> float:
        """Seconds lost between two readings. Of threads born in between, all their waiting counts."""
        waited = sum(ns - before[0].get(thread, 0) for thread, ns in after[0].items())
        return waited * 1e-9 + after[1] - before[1]


class MainThreadInterference:
    """Where there are no scheduler statistics: the time the calling thread was not running."""

    source = "wall time without processor time of the calling thread"

    def read(self) -> tuple[float, float]:
        return time.perf_counter(), time.thread_time()

    @staticmethod
    def between(before: tuple[float, float], after: tuple[float, float]) -> float:
        return max(0.0, (after[0] - before[0]) - (after[1] - before[1]))


class CpuClock:
    """Wall time, with an eye on other processes."""

    def __init__(self) -> None:
        self.interference: Any = Interference() if Interference.available() else MainThreadInterference()
        self.source: str = self.interference.source

    def turn(self, calls: Sequence[Callable[[], Any]], repetitions: int) -> Turn:
        time.sleep(SETTLE_S)
        started = time.perf_counter()
        calls[-1]()
        # Wakes the contender's threads and brings its weights back; slow calls need no such help.
        if time.perf_counter() - started < 0.05:
            calls[-1]()
        count = len(calls)
        before = self.interference.read()
        started = time.perf_counter()
        for i in range(repetitions):
            calls[i % count]()
        elapsed = time.perf_counter() - started
        lost = self.interference.between(before, self.interference.read())
        return _turn(elapsed, repetitions, lost)


def _turn(elapsed: float, repetitions: int, lost: float) -> Turn:
    return Turn(elapsed / repetitions, lost > DISTURBED_SHARE * elapsed, lost / elapsed)


class CudaClock:
    """Events on the current stream. A GPU of one's own is assumed: other processes on it cannot be seen, only those that keep this
    one from launching."""

    def __init__(self) -> None:
        self.interference: Any = Interference() if Interference.available() else MainThreadInterference()
        self.source = f"{self.interference.source}; other processes on the GPU cannot be seen"

    def turn(self, calls: Sequence[Callable[[], Any]], repetitions: int) -> Turn:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        calls[-1]()
        torch.cuda.synchronize()
        count = len(calls)
        before = self.interference.read()
        start.record()
        for i in range(repetitions):
            calls[i % count]()
        end.record()
        end.synchronize()
        lost = self.interference.between(before, self.interference.read())
        elapsed = start.elapsed_time(end) * 1e-3
        return _turn(elapsed, repetitions, lost)


def own_waiting(turns: Mapping[str, Sequence[Turn]]) -> dict[str, float]:
    """How much of its turns each contender's own threads keep each other waiting: a pool with more threads than processors, or one
    that is woken for every short call, waits in every turn, whatever others do.

    That is what it loses in its quietest quarter of turns, beyond what the contender that loses least does in its own: what all of
    them lose comes from outside.
    """
    quiet = {name: _quiet([t.lost for t in taken if t.lost is not None]) for name, taken in turns.items()}
    least = min(quiet.values(), default=0.0)
    return {name: min(lost - least, OWN_WAITING_LIMIT) for name, lost in quiet.items()}


def _quiet(lost: Sequence[float]) -> float:
    return quantile(sorted(lost), 0.25) if lost else 0.0


def judged(turns: Mapping[str, Sequence[Turn]]) -> dict[str, list[Turn]]:
    """Turns of contenders that took them together, with those disturbed that lost more than is their own."""
    own = own_waiting(turns)

    def judge(turn: Turn, name: str) -> Turn:
        return turn if turn.lost is None else turn._replace(disturbed=turn.lost > DISTURBED_SHARE + own[name])

    return {name: [judge(turn, name) for turn in taken] for name, taken in turns.items()}


class Timing(NamedTuple):
    """What the turns of one contender amount to, in seconds a call.

    Attributes:
        median, low, high: median and quartiles of the turns that count.
        turns: how many count.
        dropped: how many were disturbed.
        disturbed: too few were left, so that the disturbed ones count too.
    """

    median: float
    low: float
    high: float
    turns: int
    dropped: int
    disturbed: bool


def summarize(turns: Sequence[Turn], at_least: int = MIN_UNDISTURBED) -> Timing:
    """The undisturbed turns, or all of them where fewer than ``at_least`` are left.

    Raises:
        ValueError: there is no turn.
    """
    if not turns:
        raise ValueError("no turn was taken")
    good = [t.seconds for t in turns if not t.disturbed]
    dropped = len(turns) - len(good)
    disturbed = dropped > 0 and len(good) < at_least
    counted = sorted(t.seconds for t in turns) if disturbed else sorted(good)
    return Timing(
        statistics.median(counted),
        quantile(counted, 0.25),
        quantile(counted, 0.75),
        len(counted),
        dropped,
        disturbed,
    )


def quantile(ordered: Sequence[float], q: float) -> float:
    """The q-quantile of sorted values, interpolated."""
    position = q * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


@dataclass(frozen=True)
class Effort:
    """How much to measure.

    Attributes:
        turn_s: least length of a turn.
        rounds: undisturbed turns wanted of every contender.
        max_s: time after which no further round starts.
    """

    turn_s: float = 0.05
    rounds: int = 15
    max_s: float = 60.0


QUICK = Effort(turn_s=0.02, rounds=9, max_s=12.0)
SMOKE = Effort(turn_s=0.001, rounds=2, max_s=0.5)


def repetitions_for(seconds: float, turn_s: float) -> int:
    """Calls in a turn of at least ``turn_s``."""
    return max(1, min(10_000, math.ceil(turn_s / max(seconds, 1e-7))))


def take_turns(
    contenders: dict[str, Sequence[Callable[[], Any]]],
    clock: Clock,
    effort: Effort,
    now: Callable[[], float] = time.monotonic,
) -> dict[str, list[Turn]]:
    """Let contenders take turns until each has ``effort.rounds`` undisturbed ones, or time is up; at least two rounds are made.

    Args:
        contenders: by name, calls to go round, one for each input.
        clock: of the device.
        effort: how much.
        now: seconds, for the time limit.
    """
    order = list(contenders)
    turns: dict[str, list[Turn]] = {name: [] for name in order}
    # The first turn only tells how many calls the next ones need.
    repetitions = {name: repetitions_for(clock.turn(calls, 1).seconds, effort.turn_s) for name, calls in contenders.items()}
    shuffle = random.Random(0)
    started = now()
    made = 0
    while made < 2 or now() - started < effort.max_s:
        if all(sum(not t.disturbed for t in taken) >= effort.rounds for taken in judged(turns).values()):
            break
        # All take part as long as one is wanting: the rounds stay alike for all.
        shuffle.shuffle(order)
        for name in order:
            turns[name].append(clock.turn(contenders[name], repetitions[name]))
        made += 1
    return judged(turns)
