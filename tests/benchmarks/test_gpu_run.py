"""The one command for a GPU: its stages, limits and files, without a GPU: processes and time are made up, or subjects tiny."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu, plans, rows
from benchmarks.cli import main
from benchmarks.gpu import STAGES, Stage, check_layers, run_stages, sweep
from benchmarks.subjects import Layer
from lowkernels import backends, dispatch
from lowkernels.choosing import tuning
from lowkernels.ops import OPERATORS

LAYER = Layer("gn_mlp", 8, 8, 4, 4, act="gelu", hidden=16, residual=True)


class Machine:
    """Launches nothing; a stage takes the seconds and has the exit statuses it is told."""

    def __init__(self, seconds: dict[str, float], statuses: dict[str, list[int]] | None = None) -> None:
        self.seconds, self.statuses = seconds, statuses or {}
        self.time = 0.0
        self.launched: list[tuple[str, float]] = []

    def now(self) -> float:
        return self.time

    def launch(self, command: Sequence[str], limit_s: float, log: Path) -> int | None:
        name = command[4]
        soft = float(command[command.index("--seconds") + 1])
        self.launched.append((name, soft))
        taken = self.seconds.get(name, soft)
        self.time += min(taken, limit_s)
        if taken > limit_s:
            return None
        status = self.statuses.get(name, [])
        return status.pop(0) if status else 0

    def run(self, out: Path) -> dict[str, str]:
        return run_stages(out, "cuda", launch=self.launch, now=self.now, say=lambda line: None)


def test_stages_are_ordered_and_fit(tmp_path: Path) -> None:
    machine = Machine({})
    assert set(machine.run(tmp_path).values()) == {"done"}
    assert [name for name, _ in machine.launched] == [s.name for s in STAGES]
    assert STAGES[0].name == "correctness"
    assert sum(s.seconds for s in STAGES) <= gpu.TOTAL_S
    assert machine.time <= gpu.TOTAL_S - gpu.RESERVED_S
    assert gpu.TOTAL_S <= 9 * 60


def test_a_stage_that_hangs_is_ended_and_the_rest_goes_on(tmp_path: Path) -> None:
    machine = Machine({"models": 1e9})
    outcome = machine.run(tmp_path)
    assert outcome["models"] == "out of time"
    assert outcome["ops"] == "done"
    assert machine.time <= gpu.TOTAL_S - gpu.RESERVED_S


def test_even_if_every_stage_hangs_the_limit_holds(tmp_path: Path) -> None:
    machine = Machine({s.name: 1e9 for s in STAGES})
    machine.run(tmp_path)
    assert machine.time <= gpu.TOTAL_S - gpu.RESERVED_S
    assert "out of time" in (tmp_path / gpu.REPORT).read_text()


def test_a_crash_is_tried_again_and_then_passed_over(tmp_path: Path) -> None:
    machine = Machine({s.name: 1.0 for s in STAGES}, {"correctness": [139, 0], "ops": [1] * 9})
    outcome = machine.run(tmp_path)
    assert outcome["correctness"] == "done"
    assert outcome["ops"] == "exit status 1"
    assert [n for n, _ in machine.launched].count("ops") == 1 + gpu.RESTARTS
    assert outcome["models-compiled"] == "done"


def test_time_that_a_stage_leaves_goes_to_the_next(tmp_path: Path) -> None:
    machine = Machine({"correctness": 10.0})
    machine.run(tmp_path)
    seconds = dict(machine.launched)
    assert seconds["models"] == pytest.approx(STAGES[1].seconds + STAGES[0].seconds - 10.0)


def test_a_process_that_takes_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    child = "import time; time.sleep(60)"
    program = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    started = time.monotonic()
    assert gpu.launch([sys.executable, "-c", program], 1.0, tmp_path / "log.txt") is None
    assert time.monotonic() - started < 20
    assert (tmp_path / "log.txt").read_text() == "begun\n"
    assert gpu.launch([sys.executable, "-c", "raise SystemExit(3)"], 30.0, tmp_path / "log.txt") == 3


def test_correctness_covers_every_backend_and_says_what_was_refused() -> None:
    facts = [f for f in check_layers([LAYER], [torch.float32], "cpu", set(), lambda: 1.0) if f["kind"] == "correctness"]
    assert [f["backend"] for f in facts] == list(backends.PRIORITY)
    outcomes = {f["backend"]: f["outcome"] for f in facts}
    assert outcomes["eager"] == "right"
    for fact in facts:
        assert fact["outcome"] == "right" or fact["reason"]
    assert not list(check_layers([LAYER], [torch.float32], "cpu", set(), lambda: -1.0))
    done = {(b, "float32", LAYER.name) for b in backends.PRIORITY}
    assert not list(check_layers([LAYER], [torch.float32], "cpu", done, lambda: 1.0))


def test_a_wrong_backend_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    # The package's attribute of the folder's name is the operator's function.
    reference = importlib.import_module("lowkernels.ops.gn_mlp.reference")
    broken = SimpleNamespace(
        unsupported_weights=reference.unsupported_weights,
        unsupported_input=reference.unsupported_input,
        pack=reference.pack,
        forward=lambda *args: reference.forward(*args) * 1.001,
    )
    module = SimpleNamespace(NAME="broken", KERNEL="broken", unavailable=lambda device: None)
    original_load, original_kernel = backends.load, dispatch.kernel
    monkeypatch.setattr(backends, "PRIORITY", ("broken", "eager"))
    monkeypatch.setattr(backends, "load", lambda name: module if name == "broken" else original_load(name))
    monkeypatch.setattr("lowkernels.dispatch.kernel", lambda op, name: broken if name == "broken" else original_kernel(op, name))
    OPERATORS["gn_mlp"]._plans.clear()
    facts = [f for f in check_layers([LAYER], [torch.float32], "cpu", set(), lambda: 1.0) if f["kind"] == "correctness"]
    OPERATORS["gn_mlp"]._plans.clear()
    assert [(f["backend"], f["outcome"]) for f in facts] == [("broken", "wrong"), ("eager", "right")]
    assert "exceeds the budget" in facts[0]["reason"]


def test_a_crash_during_a_check_is_noted_as_wrong(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"kind": "started", "key": ["triton", "float16", LAYER.name], "stage": "correctness"}) + "\n")
    assert gpu._checked(path) == {("triton", "float16", LAYER.name)}
    fact = rows.read(path).other[-1]
    assert (fact["outcome"], fact["operator"]) == ("wrong", "gn_mlp")
    assert fact["reason"] == "the process ended during the call"


def test_sweeps_of_every_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def facts_of(backend: str, operator: str, args: tuple[Any, ...], seconds: float) -> Iterator[dict[str, Any]]:
        assert (backend, operator) == ("tunable", LAYER.operator)
        assert seconds > 0
        assert args[0].shape[0] == 4
        yield {"config": {"block": 32}, "ms": 2.0}
        yield {"config": {"block": 64}, "ms": 1.0}
        raise RuntimeError("no third one")

    monkeypatch.setattr(tuning, "facts", facts_of)
    monkeypatch.setattr(backends, "PRIORITY", ("absent", "tunable"))
    missing = {"absent": "it is not here", "tunable": None}
    monkeypatch.setattr(backends, "load", lambda name: SimpleNamespace(unavailable=lambda device: missing[name]))
    facts = list(sweep([LAYER], (4,), torch.float32, "cpu", lambda: 1.0))
    assert [f.get("ms") for f in facts] == [2.0, 1.0, None]
    assert facts[0]["backend"] == "tunable"
    assert facts[0]["layer"] == LAYER.name
    assert facts[2]["reason"] == "RuntimeError: no third one"


@pytest.mark.slow
def test_plans_of_the_stages_name_whom_they_leave_out() -> None:
    for stage in ("models", "ops", "models-compiled", "more-models"):
        items = gpu.items_of(stage, "cuda", smoke=False)
        assert len({item.key for item in items}) == len(items) > 2
    first = gpu.items_of("models", "cuda", smoke=False)[0]
    assert first.key == ("model", "lowformer_b1", 224, 256, "float16")
    assert "torch.compile" in first.left_out
    assert "torch.compile" not in gpu.items_of("models-compiled", "cuda", smoke=False)[0].left_out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu", "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "there is no CUDA GPU here" in message
    assert "--device cpu --smoke" in message
    assert not (tmp_path / "out").exists()


def test_a_stage_writes_rows_and_provenance_in_this_process(tmp_path: Path) -> None:
    gpu.run_stage("tuning", tmp_path, 30.0, "cpu", smoke=True)
    (path,) = tmp_path.glob("*.jsonl")
    found = rows.read(path)
    assert path.name.startswith("benchmark-tuning-fp32-nhwc-pt")
    assert found.run["device"] == "cpu"
    assert found.run["threads"] == torch.get_num_threads()
    assert found.other


def test_reports_of_nothing_say_so(tmp_path: Path) -> None:
    path = gpu.write_report(tmp_path, {"models": "no time left"})
    assert path.read_text() == "# Benchmarks\n\nNothing was measured.\n\n## Stages\n\n- models: no time left\n"


def test_smoke_plans_have_every_operator() -> None:
    assert {layer.operator for layer in plans.smoke_layers()} == set(OPERATORS)
    assert all(isinstance(s, Stage) for s in STAGES)


@pytest.mark.gpu
def test_graphs_replay_what_was_captured() -> None:
    from benchmarks.measure import capture
    from benchmarks.timing import CudaClock

    inputs = [torch.full((4, 4), float(i), device="cuda") for i in range(3)]
    replays, output = capture(lambda x: x * 2 + 1, inputs)
    assert torch.equal(output, inputs[0] * 2 + 1)
    assert len(replays) == 3
    assert 0 < CudaClock().turn(replays, 10).seconds < 0.1
