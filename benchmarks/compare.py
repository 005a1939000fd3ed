"""Two commits against each other: both are built, and their processes take turns under the same runner.

Every commit runs in two processes. What the two of one commit differ by is noise that no number of rounds takes away (where memory
happened to be laid out, which core was whose), so a difference between commits counts only if it is larger than that, and larger
than what chance makes of the rounds.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lowkernels.dispatch import AUTO

from . import render
from .provenance import ROOT, cache_bytes
from .rivals import Built, contenders, ours_name
from .subjects import Layer, Subject, layer_subject, model_subject
from .timing import Effort, Turn, repetitions_for

WORKTREE = "."
CONFIDENCE = 0.99
RETRIES = 2
"""How often a disturbed turn is taken again right away: a round counts only if all of its four turns are undisturbed."""


@dataclass(frozen=True)
class Task:
    """One subject, as it travels to the processes.

    Attributes:
        layer: fields of the layer, or None for a model.
        name, size, batch, dtype, device: as of a subject.
        contender: who computes it; a process keeps one subject for each.
    """

    name: str
    size: int
    batch: int
    dtype: str
    device: str
    layer: dict[str, Any] | None = None
    contender: str = ours_name(AUTO)

    def subject(self) -> Subject:
        dtype = getattr(torch, self.dtype)
        cache = cache_bytes(self.device)
        if self.layer is not None:
            return layer_subject(Layer(**self.layer), self.batch, dtype, self.device, cache)
        return model_subject(self.name, self.size, self.batch, dtype, self.device, cache)


def task_of(layer_or_model: Layer | str, size: int, batch: int, dtype: str, device: str) -> Task:
    if isinstance(layer_or_model, Layer):
        return Task(layer_or_model.name, size, batch, dtype, device, asdict(layer_or_model))
    return Task(layer_or_model, size, batch, dtype, device)


class Verdict(NamedTuple):
    """What the rounds say about one subject.

    Attributes:
        change: time of B over time of A, minus one; the median over rounds.
        low, high: its confidence interval; None if there were too few undisturbed rounds for one.
        noise: how far the two processes of one commit are apart, the larger of both.
        rounds: undisturbed rounds.
        made: all rounds.
        moved: the interval excludes no change and the change exceeds the noise.
    """

    change: float
    low: float | None
    high: float | None
    noise: float
    rounds: int
    made: int
    moved: bool


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """A confidence interval of the median from order statistics (the sign test); None for too few values."""
    n = len(values)
    tail, k = 0.0, 0
    while k < n // 2:
        tail += math.comb(n, k) / 2**n
        if 2 * tail > 1 - confidence:
            break
        k += 1
    if k == 0:
        return None
    ordered = sorted(values)
    return ordered[k - 1], ordered[n - k]


def rounds_needed(confidence: float = CONFIDENCE) -> int:
    """The fewest undisturbed rounds that a verdict can come of."""
    return next(n for n in itertools.count(1) if median_interval(range(n), confidence) is not None)


def judge(rounds: Sequence[Sequence[Turn]]) -> Verdict:
    """The verdict over rounds of turns (A, A again, B, B again).

    Raises:
        ValueError: no round is undisturbed.
    """
    good = [[math.log(turn.seconds) for turn in turns] for turns in rounds if not any(t.disturbed for t in turns)]
    if not good:
        raise ValueError(
            f"all {len(rounds)} rounds were disturbed by other processes, and a verdict needs {rounds_needed()}: "
            "end what else runs on the machine"
        )
    changes = [(b1 + b2 - a1 - a2) / 2 for a1, a2, b1, b2 in good]
    change = statistics.median(changes)
    noise = max(abs(statistics.median(a1 - a2 for a1, a2, _, _ in good)), abs(statistics.median(b1 - b2 for _, _, b1, b2 in good)))
    interval = median_interval(changes)
    moved = interval is not None and not interval[0] <= 0 <= interval[1] and abs(change) > noise
    low, high = (None, None) if interval is None else (math.expm1(interval[0]), math.expm1(interval[1]))
    return Verdict(math.expm1(change), low, high, math.expm1(noise), len(good), len(rounds), moved)


def export(commit: str, folder: Path) -> None:
    """Write the files of a commit, or of the working tree for ``"."``, to ``folder``.

    Raises:
        ValueError: there is no such commit.
    """
    folder.mkdir(parents=True)
    if commit == WORKTREE:
        names = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
        ).stdout.split(b"\0")
        for name in (Path(os.fsdecode(n)) for n in names if n):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        return
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=False)
    if archive.returncode:
        raise ValueError(f"no commit {commit!r}: {archive.stderr.decode().strip()}")
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)


def build(commit: str, folder: Path) -> Path:
    """Build and install a commit into ``folder``; the folder to put on Python's path.

    Raises:
        RuntimeError: the build failed, with its output.
    """
    export(commit, folder / "source")
    site = folder / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--target", str(site), str(folder / "source")], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{commit} does not build:\n{done.stdout}{done.stderr}")
    return site


class Worker:
    """A process that has one commit installed and does what it is told, one line of JSON at a time."""

    def __init__(self, site: Path, runner: Path, threads: int) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(runner)])}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.compare", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=runner,
            env=environment,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request and its answer.

        Raises:
            RuntimeError: the process has ended, or could not do it.
        """
        self.tell(**request)
        return self.hear()

    def tell(self, **request: Any) -> None:
        """One request, whose answer is to be heard.

        Raises:
            RuntimeError: the process has ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise RuntimeError(f"the process ended with status {self._process.wait()}") from None

    def hear(self) -> dict[str, Any]:
        """The answer to the request told last.

        Raises:
            RuntimeError: the process has ended, or could not do it.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise RuntimeError(answer["failed"])
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def serve(lines: Any, answer: Callable[[dict[str, Any]], None]) -> None:
    """What a worker process does."""
    from .runner import clock_for

    calls: dict[str, list[Callable[[], Any]]] = {}
    clock: Any = None
    for line in lines:
        request = json.loads(line)
        try:
            if "task" in request:
                task = Task(**request["task"])
                clock = clock_for(task.device)
                calls.pop(task.contender, None)
                calls[task.contender], about = _calls(task.subject(), task.contender)
                answer({"seconds": clock.turn(calls[task.contender], 1).seconds, **about})
            else:
                turn = clock.turn(calls[request.get("contender", ours_name(AUTO))], request["repetitions"])
                answer(turn._asdict())
        except Exception as error:
            answer({"failed": f"{type(error).__name__}: {error}"})


def _calls(subject: Subject, name: str) -> tuple[list[Callable[[], Any]], dict[str, Any]]:
    """Calls of a contender on the subject's inputs; its error, the budget of that, and what served it."""
    from .measure import Truth

    (contender,) = (c for c in contenders() if c.name == name)
    truth = Truth(subject)
    with torch.no_grad():
        built = contender.build(subject)
        inputs = [built.prepare(x) for x in subject.inputs]
        error = truth.error(built.result(built.run(inputs[0])))
    if not error.within(truth.budget):
        raise ValueError(f"wrong result: {error}, allowed {truth.budget}")
    about = {"error": {**asdict(error), **{f"{k}_budget": v for k, v in asdict(truth.budget).items()}}}
    return [_call(built, x) for x in inputs], {**about, "served": None if built.served is None else built.served()}


def _call(built: Built, x: Any) -> Callable[[], Any]:
    def once() -> Any:
        with torch.no_grad():
            return built.run(x)

    return once


def run_rounds(workers: Sequence[Any], task: Task, effort: Effort, shuffle: random.Random) -> list[list[Turn]]:
    """Build the subject in every process and let them take turns until ``effort.rounds`` rounds are undisturbed, or three
    times as many have been made."""
    # One at a time: building is work too.
    seconds = [w.ask(task=asdict(task))["seconds"] for w in workers]
    repetitions = repetitions_for(min(seconds), effort.turn_s)
    rounds: list[list[Turn]] = []
    order = list(range(len(workers)))
    while len(rounds) < 3 * effort.rounds:
        shuffle.shuffle(order)
        turns = {i: _turn(workers[i], repetitions) for i in order}
        rounds.append([turns[i] for i in range(len(workers))])
        if sum(not any(t.disturbed for t in turns) for turns in rounds) >= effort.rounds:
            break
    return rounds


def _turn(worker: Any, repetitions: int) -> Turn:
    """An undisturbed turn, if one can be had in a few tries."""
    turn = Turn(**worker.ask(repetitions=repetitions))
    for _ in range(RETRIES):
        if not turn.disturbed:
            break
        turn = Turn(**worker.ask(repetitions=repetitions))
    return turn


def compare(
    a: str, b: str, tasks: Sequence[Task], effort: Effort, threads: int, say: Callable[[str], None] = print
) -> list[tuple[Task, Verdict | str]]:
    """Compare two commits.

    Args:
        a, b: commits as git names them, or ``"."`` for the working tree.
        tasks: what to measure.
        effort: rounds and length of turns.
        threads: of PyTorch, in every process.
        say: progress.

    Returns:
        For each task the verdict, or the reason why there is none.

    Raises:
        ValueError: no such commit, or too few rounds for any verdict.
        RuntimeError: a commit does not build.
    """
    if effort.rounds < rounds_needed():
        needed = f"at {100 * CONFIDENCE:.0f} % confidence a verdict needs at least {rounds_needed()}"
        raise ValueError(f"{effort.rounds} rounds were asked for; {needed}")
    with tempfile.TemporaryDirectory(prefix="lowkernels-compare-") as temporary:
        folder = Path(temporary)
        runner = folder / "runner"
        shutil.copytree(ROOT / "benchmarks", runner / "benchmarks", ignore=shutil.ignore_patterns("__pycache__", "results"))
        sites = []
        for name, commit in (("a", a), ("b", b)):
            say(f"building {commit}")
            sites.append(build(commit, folder / name))
        workers = [Worker(site, runner, threads) for site in (sites[0], sites[0], sites[1], sites[1])]
        found: list[tuple[Task, Verdict | str]] = []
        try:
            for task in tasks:
                try:
                    verdict: Verdict | str = judge(run_rounds(workers, task, effort, random.Random(0)))
                except (RuntimeError, ValueError) as error:
                    verdict = str(error)
                found.append((task, verdict))
                say(f"{task.name}, batch {task.batch}, {task.dtype}: {_words(verdict)}")
        finally:
            for worker in workers:
                worker.close()
    return found


def _words(verdict: Verdict | str) -> str:
    if isinstance(verdict, str):
        return verdict
    if verdict.low is None:
        # At most three times as many rounds are made as are asked for.
        ask = math.ceil(rounds_needed() * verdict.made / (3 * verdict.rounds))
        return (
            f"no verdict: {verdict.rounds} of {verdict.made} rounds were undisturbed, {rounds_needed()} are needed; "
            f"end what else runs on the machine, or ask for --rounds {max(ask, rounds_needed()) + rounds_needed() // 2}"
        )
    if not verdict.moved:
        return f"no change beyond the noise ({100 * verdict.change:+.1f} %)"
    return f"{100 * abs(verdict.change):.1f} % {'slower' if verdict.change > 0 else 'faster'}"


def report(a: str, b: str, found: Sequence[tuple[Task, Verdict | str]]) -> str:
    """The comparison as a Markdown document: what moved first."""

    def cells(task: Task, verdict: Verdict | str) -> tuple[str, ...]:
        about = (task.name, str(task.size), str(task.batch), task.dtype)
        if isinstance(verdict, str):
            return (*about, "–", "–", "–", "–", verdict.splitlines()[0].replace("|", "\\|"))
        interval = "–"
        if verdict.low is not None and verdict.high is not None:
            interval = f"{100 * verdict.low:+.1f} to {100 * verdict.high:+.1f} %"
        return (
            *about,
            f"{100 * verdict.change:+.1f} %",
            interval,
            f"{100 * verdict.noise:.1f} %",
            f"{verdict.rounds} of {verdict.made}",
            _words(verdict),
        )

    header = ("subject", "size", "batch", "dtype", "time of B over A", "99 % interval", "noise", "rounds", "verdict")
    judged = [v for _, v in found if not isinstance(v, str) and v.low is not None]
    moved = sum(v.moved for v in judged)
    unjudged = f"; {len(found) - len(judged)} could not be judged" if len(judged) < len(found) else ""
    ordered = sorted(found, key=lambda f: -abs(f[1].change) if not isinstance(f[1], str) and f[1].moved else 1.0)
    return (
        f"# {a} (A) against {b} (B)\n\n{moved} of {len(judged)} moved by more than the noise{unjudged}.\n\n"
        + render.table(header, [cells(t, v) for t, v in ordered])
        + "\n"
    )


def _main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    # The answers' own way out: whatever a library prints goes to stderr.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(fact: dict[str, Any]) -> None:
        out.write(json.dumps(fact) + "\n")
        out.flush()

    serve(sys.stdin, answer)


if __name__ == "__main__":
    _main()
