"""Comparing two commits: the verdict, the rounds, and one real comparison of a commit with itself."""

from __future__ import annotations

import io
import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare
from benchmarks.cli import main
from benchmarks.compare import Task, judge, median_interval, run_rounds, serve, task_of
from benchmarks.provenance import ROOT
from benchmarks.subjects import Layer
from benchmarks.timing import Effort, Turn

LAYER = Layer("gn_mlp", 8, 8, 4, 4, act="gelu", hidden=16, residual=True)
TASK = task_of(LAYER, 4, 2, "float32", "cpu")


def rounds(count: int, *factors: float, jitter: float = 0.01, disturbed: int = 0) -> list[list[Turn]]:
    """Rounds of turns with a common drift, one factor for each process, and a little chance."""
    chance = random.Random(1)
    made = []
    for index in range(count):
        drift = 1 + 0.5 * index / count
        made.append([Turn(drift * f * (1 + jitter * chance.uniform(-1, 1)), index < disturbed) for f in factors])
    return made


def test_a_change_beyond_noise_is_seen_through_drift() -> None:
    verdict = judge(rounds(15, 1.0, 1.0, 0.9, 0.9))
    assert verdict.moved
    assert verdict.change == pytest.approx(-0.1, abs=0.01)
    assert verdict.low is not None
    assert verdict.high is not None
    assert verdict.low <= verdict.change <= verdict.high < 0


def test_no_change_is_no_change() -> None:
    assert not judge(rounds(15, 1.0, 1.0, 1.0, 1.0)).moved


def test_a_difference_between_processes_of_one_commit_is_noise() -> None:
    # The second process of A is 10 % slower than the first, by chance of its layout; B is 4 % slower than both together.
    verdict = judge(rounds(15, 1.0, 1.1, 1.09, 1.09))
    assert verdict.low is not None
    assert verdict.low > 0
    assert verdict.noise == pytest.approx(0.1, abs=0.02)
    assert not verdict.moved


def test_too_few_rounds_move_nothing() -> None:
    assert compare.rounds_needed() == 8
    for count in (7, 8):
        verdict = judge(rounds(count, 1.0, 1.0, 2.0, 2.0))
        assert (verdict.low is not None, verdict.moved) == (count == 8, count == 8)
        assert verdict.change == pytest.approx(1.0, abs=0.05)


def test_without_a_verdict_it_is_said_what_to_do() -> None:
    verdict = judge(rounds(24, 1.0, 1.0, 2.0, 2.0, disturbed=19))
    text = compare.report("A1", "B2", [(TASK, verdict)])
    # At 5 of 24, 8 undisturbed rounds are in 39, a third of which is to be asked for.
    assert "no verdict: 5 of 24 rounds were undisturbed, 8 are needed" in text
    assert "--rounds 17 |" in text
    assert "0 of 0 moved by more than the noise; 1 could not be judged." in text


def test_too_few_rounds_for_any_verdict_are_refused_before_anything_is_built(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "no-such-commit", ".", "--rounds", "7", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "7 rounds were asked for; at 99 % confidence a verdict needs at least 8\n"


def test_disturbed_rounds_do_not_count() -> None:
    assert judge(rounds(15, 1.0, 1.0, 1.0, 1.0, disturbed=4)).rounds == 11
    with pytest.raises(ValueError, match="all 3 rounds were disturbed"):
        judge(rounds(3, 1.0, 1.0, 1.0, 1.0, disturbed=3))


def test_intervals_of_the_median() -> None:
    assert median_interval(range(7)) is None
    # Of 8 values, the extremes miss the median with probability 2/256.
    assert median_interval(range(8)) == (0, 7)
    # Of 15, the third from either end: 2 (1 + 15 + 105) / 2^15 = 0.0074.
    assert median_interval([float(i) for i in range(15)]) == (2.0, 12.0)


class Scripted:
    """A worker that answers without a process."""

    def __init__(self, seconds: float, disturbed: int = 0) -> None:
        self.seconds, self.disturbed, self.requests = seconds, disturbed, 0

    def ask(self, **request: Any) -> dict[str, Any]:
        if "task" in request:
            assert Task(**request["task"]).name == LAYER.name
            return {"seconds": self.seconds}
        self.requests += 1
        return {"seconds": self.seconds, "disturbed": self.requests <= self.disturbed}


def test_rounds_end_when_enough_are_undisturbed_or_too_many_made() -> None:
    # A disturbed turn is taken again twice: of four disturbed ones in a row, three are one round's and the fourth is made good.
    for disturbed, made in ((2, 9), (4, 10)):
        workers = [Scripted(0.01, disturbed=disturbed), *(Scripted(0.01) for _ in range(3))]
        assert len(run_rounds(workers, TASK, Effort(rounds=9), random.Random(0))) == made
    hopeless = [Scripted(0.01, disturbed=99), *(Scripted(0.01) for _ in range(3))]
    assert len(run_rounds(hopeless, TASK, Effort(rounds=9), random.Random(0))) == 27


def test_a_worker_builds_checks_and_times() -> None:
    answers: list[dict[str, Any]] = []
    lines = [json.dumps({"task": vars(TASK)}), json.dumps({"repetitions": 3}), json.dumps({"task": {"name": "x"}})]
    serve(io.StringIO("\n".join(lines) + "\n"), answers.append)
    assert answers[0]["seconds"] > 0
    assert set(answers[1]) == {"seconds", "disturbed", "lost"}
    assert "TypeError" in answers[2]["failed"]


def test_report_has_what_moved_first() -> None:
    still = judge(rounds(15, 1.0, 1.0, 1.0, 1.0))
    slower = judge(rounds(15, 1.0, 1.0, 1.2, 1.2))
    tasks = [task_of(name, 224, 1, "float32", "cpu") for name in ("lowformer_b0", "lowformer_b1", "lowformer_b3")]
    text = compare.report("A1", "B2", list(zip(tasks, (still, slower, "it | failed"), strict=True)))
    body = [line for line in text.splitlines() if line.startswith("| lowformer")]
    assert body[0].startswith("| lowformer_b1 |")
    assert body[0].endswith("% slower |")
    assert "no change beyond the noise" in body[1]
    assert body[2].endswith("| it \\| failed |")
    assert "1 of 2 moved by more than the noise; 1 could not be judged." in text


def test_unknown_commits_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no commit 'no-such-commit'"):
        compare.export("no-such-commit", tmp_path / "x")


def test_the_working_tree_can_be_compared(tmp_path: Path) -> None:
    compare.export(".", tmp_path / "x")
    assert (tmp_path / "x" / "lowkernels" / "costs.py").read_bytes() == (ROOT / "lowkernels" / "costs.py").read_bytes()
    assert (tmp_path / "x" / "pyproject.toml").exists()


@pytest.mark.slow
def test_the_working_tree_against_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two real builds and four real processes, with the fewest rounds a verdict can come of."""
    if subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, check=False).returncode:
        pytest.skip("not a checkout")
    effort = Effort(turn_s=0.001, rounds=compare.rounds_needed())
    found = compare.compare(".", ".", [TASK], effort, 1, lambda line: None)
    assert [task for task, _ in found] == [TASK]
    verdict = found[0][1]
    # On a busy machine all rounds may be disturbed, or too many.
    if isinstance(verdict, str):
        assert "rounds were disturbed" in verdict
    else:
        assert verdict.rounds <= verdict.made <= 3 * effort.rounds
        assert (verdict.low is not None) == (verdict.rounds >= effort.rounds)
    assert main(["compare", "no-such-commit", ".", "--out", str(tmp_path)]) == 2
