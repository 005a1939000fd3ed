"""Turns, and what is made of them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from benchmarks import ceilings, timing
from benchmarks.provenance import ROOT
from benchmarks.timing import CpuClock, Effort, Interference, MainThreadInterference, Turn, repetitions_for, summarize, take_turns


class Scripted:
    """A clock that runs nothing and answers from a script; the first answer of a contender is for its trial turn."""

    source = "a script"

    def __init__(self, script: dict[str, list[Turn]], trial: float = 0.01) -> None:
        self.script = {name: [Turn(trial, False), *turns] for name, turns in script.items()}
        self.log: list[tuple[str, int]] = []

    def turn(self, calls: Sequence[Callable[[], Any]], repetitions: int) -> Turn:
        name = calls[0]()
        self.log.append((name, repetitions))
        return self.script[name].pop(0)


def calls(*names: str) -> dict[str, Sequence[Callable[[], Any]]]:
    return {name: (lambda name=name: name,) for name in names}


def quiet(*seconds: float) -> list[Turn]:
    return [Turn(s, False) for s in seconds]


def test_disturbed_turns_are_dropped_and_counted() -> None:
    turns = [*quiet(1.0, 2.0, 3.0, 4.0, 5.0), Turn(100.0, True), Turn(90.0, True)]
    found = summarize(turns)
    assert (found.median, found.low, found.high) == (3.0, 2.0, 4.0)
    assert (found.turns, found.dropped, found.disturbed) == (5, 2, False)


def test_too_few_undisturbed_turns_are_said_to_be_disturbed() -> None:
    turns = [*quiet(1.0, 2.0), *[Turn(10.0, True)] * 3]
    found = summarize(turns)
    assert found.disturbed
    assert (found.turns, found.dropped, found.median) == (5, 3, 10.0)


def test_few_turns_without_disturbance_are_not_disturbed() -> None:
    assert not summarize(quiet(1.0, 2.0)).disturbed


def test_no_turn_is_an_error() -> None:
    with pytest.raises(ValueError, match="no turn"):
        summarize([])


def test_quantiles_are_interpolated() -> None:
    assert timing.quantile([1.0], 0.25) == 1.0
    assert timing.quantile([0.0, 1.0, 2.0, 3.0], 0.5) == 1.5
    assert timing.quantile([0.0, 10.0], 0.75) == 7.5


def test_every_contender_has_a_turn_in_every_round_in_changing_order() -> None:
    clock = Scripted({name: quiet(*[0.01] * 8) for name in "abcd"})
    found = take_turns(calls(*"abcd"), clock, Effort(turn_s=0.02, rounds=8))
    assert {name: len(turns) for name, turns in found.items()} == dict.fromkeys("abcd", 8)
    after_trials = [name for name, _ in clock.log[4:]]
    rounds = [after_trials[i : i + 4] for i in range(0, len(after_trials), 4)]
    assert all(sorted(r) == list("abcd") for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1


def test_a_turn_is_long_enough_for_the_clock() -> None:
    clock = Scripted({"a": quiet(0.01, 0.01)}, trial=0.004)
    take_turns(calls("a"), clock, Effort(turn_s=0.02, rounds=2))
    assert [repetitions for _, repetitions in clock.log] == [1, 5, 5]
    assert repetitions_for(10.0, 0.02) == 1
    assert repetitions_for(0.0, 0.02) == 10_000


def test_rounds_go_on_for_all_until_each_has_enough_undisturbed_turns() -> None:
    noisy = [Turn(0.01, True), Turn(0.01, False), Turn(0.01, True), Turn(0.01, False)]
    clock = Scripted({"a": quiet(*[0.01] * 4), "b": noisy})
    found = take_turns(calls("a", "b"), clock, Effort(rounds=2))
    assert len(found["a"]) == len(found["b"]) == 4


def lost(*shares: float) -> list[Turn]:
    return [Turn(0.01, share > 0.03, share) for share in shares]


def test_threads_of_a_contender_that_wait_for_each_other_are_no_disturbance() -> None:
    pool, single = lost(0.05, 0.06, 0.05, 0.07, 0.30, 0.05), lost(0.0, 0.01, 0.0, 0.0, 0.25, 0.0)
    own = timing.own_waiting({"pool": pool, "single": single})
    assert own == {"pool": pytest.approx(0.05), "single": 0.0}
    found = timing.judged({"pool": pool, "single": single})
    assert [t.disturbed for t in found["pool"]] == [False, False, False, False, True, False]
    assert [t.disturbed for t in found["single"]] == [False, False, False, False, True, False]


def test_what_all_contenders_lose_is_from_outside() -> None:
    found = timing.judged({"a": lost(0.05, 0.06, 0.05, 0.07), "b": lost(0.06, 0.05, 0.06, 0.08)})
    assert all(t.disturbed for taken in found.values() for t in taken)
    # Alone, a contender cannot be told from its surroundings.
    assert all(t.disturbed for t in timing.judged({"a": lost(0.05, 0.06, 0.05, 0.07)})["a"])


def test_a_contender_that_always_waits_for_long_is_disturbed() -> None:
    found = timing.judged({"hit": lost(*[0.5] * 8), "single": lost(*[0.0] * 8)})
    assert all(t.disturbed for t in found["hit"])
    assert timing.own_waiting({"hit": lost(0.5), "single": lost(0.0)})["hit"] == timing.OWN_WAITING_LIMIT


def test_turns_taken_are_judged_together() -> None:
    script = {"pool": lost(*[0.06] * 5), "single": lost(*[0.0] * 5)}
    found = take_turns(calls("pool", "single"), Scripted(script), Effort(rounds=5))
    assert {name: sum(t.disturbed for t in taken) for name, taken in found.items()} == {"pool": 0, "single": 0}


def test_time_limit_ends_the_rounds_but_never_before_the_second() -> None:
    clock = Scripted({"a": [Turn(0.01, True)] * 50})
    ticks = iter(float(i) for i in range(100))
    found = take_turns(calls("a"), clock, Effort(rounds=50, max_s=3.0), now=lambda: next(ticks))
    assert 2 <= len(found["a"]) <= 4
    clock = Scripted({"a": quiet(0.01, 0.01)})
    assert len(take_turns(calls("a"), clock, Effort(rounds=50, max_s=-1.0), now=lambda: 0.0)["a"]) == 2


def test_cpu_clock_goes_round_the_inputs_and_measures_a_call() -> None:
    seen: list[int] = []

    def call(i: int) -> Callable[[], Any]:
        def run() -> None:
            seen.append(i)
            end = time.perf_counter() + 0.002
            while time.perf_counter() < end:
                pass

        return run

    turn = CpuClock().turn([call(0), call(1), call(2)], 6)
    assert turn.seconds >= 0.002
    assert seen[-6:] == [0, 1, 2, 0, 1, 2]


@pytest.mark.skipif(not Interference.available(), reason="no scheduler statistics on this system")
def test_waiting_for_a_processor_is_seen() -> None:
    """Two busy processes on one processor: each waits for about half of the time, and says so."""
    program = (
        "import os, sys, time\n"
        "from benchmarks.timing import CpuClock\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "def spin():\n"
        "    end = time.perf_counter() + 0.1\n"
        "    while time.perf_counter() < end: pass\n"
        "clock = CpuClock()\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "print([clock.turn([spin], 3).disturbed for _ in range(4)])\n"
    )
    pair = [
        subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for _ in range(2)
    ]
    for process in pair:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in pair:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60)[0] for process in pair]
    assert all("True" in out for out in outputs), outputs


def test_readings_of_lost_time() -> None:
    before = ({"1": 1_000, "2": 5_000}, 1.0)
    after = ({"1": 2_001_000, "3": 500_000}, 1.25)
    # Thread 1 waited 2 ms, thread 3 is new and waited 0.5 ms, thread 2 is gone, and the hypervisor took 0.25 s.
    assert Interference.between(before, after) == pytest.approx(0.002 + 0.0005 + 0.25)
    assert MainThreadInterference.between((1.0, 0.5), (2.0, 1.2)) == pytest.approx(0.3)
    assert MainThreadInterference.between((1.0, 0.5), (1.1, 0.7)) == 0.0


def test_main_thread_reading_sees_sleep() -> None:
    gauge = MainThreadInterference()
    before = gauge.read()
    time.sleep(0.05)
    assert gauge.between(before, gauge.read()) > 0.03


def test_ceilings_are_the_fastest_product_and_the_copy() -> None:
    class Rates:
        source = "fixed times"

        def turn(self, calls: Sequence[Callable[[], Any]], repetitions: int) -> Turn:
            result = calls[0]()
            return Turn({(256, 256): 2e-3, (2, 32, 14, 14): 1e-3}.get(tuple(result.shape), 4e-3), False)

    found = ceilings.measure("cpu", torch.float32, Rates(), Effort(rounds=2, max_s=1), small=True)
    rates = {"matrix product": 2 * 256**3 / 2e-3, "3x3 convolution": 2 * 2 * 32 * 196 * 9 * 32 / 1e-3}
    assert found.product == max(rates, key=lambda k: rates[k])
    assert found.flops_per_s == pytest.approx(max(rates.values()))
    assert found.bytes_per_s == pytest.approx(2 * (1 << 20) / 4e-3)
    assert not found.disturbed


def test_ceilings_of_a_busy_machine_are_said_to_be_disturbed() -> None:
    class Busy:
        source = "fixed times"

        def turn(self, calls: Sequence[Callable[[], Any]], repetitions: int) -> Turn:
            return Turn(1e-3, calls[0]().dtype == torch.uint8)

    assert ceilings.measure("cpu", torch.float32, Busy(), Effort(rounds=2, max_s=0.1), small=True).disturbed
