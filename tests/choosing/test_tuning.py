"""lowkernels tune: what it measures, checks, writes and says. Times mean nothing here; what is done with them does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lowformer
import lowkernels
from benchmarks import gpu
from benchmarks.subjects import Layer
from lowkernels import cli, dispatch
from lowkernels.choosing import auto, measured, settings, tuning
from lowkernels.choosing.measured import Described, Machine
from lowkernels.ops import OPERATORS
from lowkernels.testing import random_call
from tests.ops.probe import NAME, Probe, install

SMALL = ["--models", "lowformer_b0", "--sizes", "32", "--batches", "1", "--operators", "gn_mlp"]
CPU = torch.device("cpu")


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Probe:
    """A backend that heeds a setting: wrong with ``wrong``, refused by its compiler with ``broken``."""
    probe = install(monkeypatch)
    kernel: Any = dispatch.kernel("gn_mlp", NAME)
    forward = kernel.forward

    def heeding(x: Tensor, *args: Any) -> Tensor:
        if settings.current().get("broken"):
            raise RuntimeError("no such tile\nand more")
        return forward(x, *args) + settings.current().get("wrong", 0)

    monkeypatch.setattr(kernel, "forward", heeding)
    candidates = [{"tile": 1}, {"wrong": 1}, {"broken": 1}]
    monkeypatch.setattr(type(kernel), "candidates", lambda self, x, *args: candidates if x.shape[0] > 1 else [], raising=False)
    return probe


def here() -> Machine:
    of = measured.machine(CPU)
    assert of is not None
    return of


def test_contenders_are_checked_before_they_are_timed(probe: Probe) -> None:
    found = tuning.measure(*random_call("gn_mlp"), [NAME, "eager"], 0.01)
    assert [(c.backend, dict(c.setting), c.seconds is None) for c in found] == [
        (NAME, {}, False),
        (NAME, {"tile": 1}, False),
        (NAME, {"wrong": 1}, True),
        (NAME, {"broken": 1}, True),
        ("eager", {}, False),
    ]
    assert "exceeds the budget" in found[2].problem
    assert found[3].problem == "RuntimeError: no such tile"


def test_a_wrong_image_anywhere_at_the_ends_is_found(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel: Any = dispatch.kernel("gn_mlp", NAME)
    for image in (0, 1, 7, 8):

        def forward(x: Tensor, *args: Any, image: int = image) -> Tensor:
            out = dispatch.kernel("gn_mlp", "eager").forward(x, *args[:-1], None)  # type: ignore[union-attr]
            out[image] += 1
            return out

        monkeypatch.setattr(kernel, "forward", forward)
        found = tuning.measure(*random_call("gn_mlp", batch=9), [NAME], 0.01)
        assert all("exceeds the budget" in c.problem for c in found)


def test_refusals_are_told(probe: Probe) -> None:
    probe.bad_weights = "too heavy"
    refused, eager = tuning.measure(*random_call("gn_mlp"), [NAME, "eager"], 0.01)
    assert "too heavy" in refused.problem
    assert eager.seconds is not None


def test_a_setting_has_to_be_worth_it() -> None:
    def row(*found: tuple[str, dict[str, int], float]) -> measured.Row | None:
        contenders = [tuning.Contender(name, setting, seconds=1e-6 * us) for name, setting, us in found]
        return tuning.row_of(Described("gn_mlp", "", "float16", (1, 2, 3)), contenders, "today")

    assert row() is None
    better = row(("triton", {}, 10.0), ("triton", {"BM": 64}, 9.0), ("triton", {"BM": 32}, 9.5), ("eager", {}, 12.0))
    assert better is not None
    assert (better.us, better.settings) == ({"triton": 9.0, "eager": 12.0}, {"triton": {"BM": 64}})
    same = row(("triton", {}, 10.0), ("triton", {"BM": 64}, 9.9))
    assert same is not None
    assert (same.us, same.settings) == ({"triton": 10.0}, {})


def test_the_command_measures_and_auto_follows(capsys: pytest.CaptureFixture[str]) -> None:
    model = lowformer.create_model("lowformer_b0").eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        model(x)
        before = {row.name: row.reason for row in lowkernels.report(model) if row.kind == "gn_mlp"}
        assert cli.main(["tune", *SMALL, "--seconds", "2", "--device", "cpu"]) == 0
        out = capsys.readouterr().out
        path = measured.user_path(here())
        assert out.endswith(f"2 calls measured, 2 in {path}\n")
        assert "gn_mlp 1x128x2x2 float32: " in out
        model(x)
    _, rows = measured.parse(path.read_text())
    assert {row.shape for row in rows} == {(1, 2, 2), (1, 1, 1)}
    for row in rows:
        assert row.call.endswith("residual=1")
        assert f"torch {torch.__version__}" in row.measured
        assert "eager" in row.us
    after = {row.name: row.reason for row in lowkernels.report(model) if row.kind == "gn_mlp"}
    assert before.keys() == after.keys() != set()
    assert all(reason.startswith("measured here: ") for reason in after.values())
    assert not any("measured" in reason for reason in before.values())
    assert cli.main(["info"]) == 0
    assert f"2 calls in {path}, 0 in tables that ship" in capsys.readouterr().out


def test_tuning_again_keeps_what_is_about_other_calls(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for size in ("32", "96"):
        assert cli.main(["tune", *SMALL[:2], "--sizes", size, *SMALL[4:], "--seconds", "1", "--device", "cpu"]) == 0
    assert "2 calls measured, 4 in" in capsys.readouterr().out
    # The same table elsewhere, under the name it would ship with.
    assert cli.main(["tune", *SMALL, "--seconds", "1", "--device", "cpu", "--export", str(tmp_path / "tables")]) == 0
    (exported,) = (tmp_path / "tables").iterdir()
    assert exported.name == f"{here().slug}.json"
    assert len(measured.parse(exported.read_text())[1]) == 2


def test_no_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    calls = tuning.calls_of(["lowformer_b0"], [32], [1], [torch.float32], ["gn_mlp", "conv_act"])
    assert tuning.tune(calls, CPU, -1.0, said.append) == []
    assert said == [f"no time left for {len(calls)} of {len(calls)} calls"]


def test_calls_that_cost_most_come_first() -> None:
    calls = tuning.calls_of(["lowformer_b1"], [64], [1, 2], [torch.float32])
    assert calls[0][0] == "fused_mbconv"
    described = [measured.describe(*call) for call in calls]
    assert len(set(described)) == len(described)
    assert {d.shape[0] for d in described if d is not None} == {1, 2}
    operator, args = calls[-1]
    data = tuning.with_data(operator, args, CPU)
    assert measured.describe(operator, data) == described[-1]
    again = tuning.with_data(operator, args, CPU)
    for one, other in zip(data, again, strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--operators", "separable_conv"], "none of lowformer_b0 calls separable_conv"),
        (["--models", "lowformer_x"], "lowformer_x"),
        (["--device", "meta"], "--device meta: nothing is measured there; allowed: cpu"),
        (["--device", "fpga"], "--device fpga: nothing is measured there; allowed: cpu"),
        (["--from", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_what_cannot_be_measured(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", *SMALL, "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--seconds", "0"], ["--batches", "none"], ["--operators", "convolve"], ["--dtypes", "int8"]]
)
def test_arguments_outside_what_is_allowed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["tune", *arguments])
    assert arguments[0] in capsys.readouterr().err


def test_a_benchmark_run_becomes_a_table_that_ships(
    probe: Probe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layer = Layer("gn_mlp", 8, 8, 5, 5, hidden=16, act="gelu", residual=True)
    facts = list(gpu.sweep([layer], (2,), torch.float32, "cpu", lambda: 0.01))
    assert [(f["backend"], f["config"], "ms" in f) for f in facts] == [
        (NAME, {}, True),
        (NAME, {"tile": 1}, True),
        (NAME, {"wrong": 1}, False),
        (NAME, {"broken": 1}, False),
        ("eager", {}, True),
    ]
    assert facts[3]["reason"] == "RuntimeError: no such tile"
    facts[0]["ms"], facts[1]["ms"], facts[4]["ms"] = 3.0, 1.0, 2.0
    path = tmp_path / "tuning.jsonl"
    path.write_text("".join(json.dumps(fact) + "\n" for fact in ({"kind": "run"}, *facts)))
    assert cli.main(["tune", "--from", str(path), "--export", str(measured.SHIPPED)]) == 0
    assert "1 calls measured, 1 in" in capsys.readouterr().out
    found = lowkernels.explain("gn_mlp", *layer.call(2, torch.float32, "cpu"))
    assert (found.backend, found.basis) == (NAME, "shipped")
    assert " 1 ms against 2 ms for eager" in found.reason
    assert auto.setting("gn_mlp", NAME, layer.call(2, torch.float32, "cpu")) == {"tile": 1}
    path.write_text(json.dumps({"kind": "run"}) + "\n")
    assert cli.main(["tune", "--from", str(path)]) == 1


def test_facts_of_one_backend() -> None:
    (fact,) = tuning.facts("eager", *random_call("gn_mlp"), 0.01)
    assert fact["ms"] > 0
    refused = list(tuning.facts("cuda", *random_call("gn_mlp"), 0.01))
    assert [f for f in refused if "ms" in f] == []


def test_nothing_is_tuned_at_run_time(tmp_path: Path) -> None:
    code = (
        "import sys, torch, lowformer, lowkernels\n"
        "model = lowformer.create_model('lowformer_b0').eval()\n"
        "with torch.no_grad(): model(torch.zeros(1, 3, 32, 32))\n"
        "print(lowkernels.report(model))\n"
        "assert 'lowkernels.choosing.tuning' not in sys.modules\n"
    )
    environment = {**os.environ, "LOWKERNELS_JIT": "0", "LOWKERNELS_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


INTERPRETED = """
import torch
from lowkernels.choosing import settings, tuning
from lowkernels.testing import random_call

# Its row has alternatives: each runs, is right, and is something else than the row.
call = random_call("conv_act", batch=1, channels=8, out_channels=16, height=5, width=5, dtype=torch.float16)
tuning._TURNS = (1, 1)
found = tuning.measure(*call, ["triton", "eager"], 0.01)
tried = [c for c in found if c.backend == "triton"]
assert len(tried) >= 3, found
assert not any(c.problem for c in found), found
assert len({tuple(c.setting.items()) for c in tried}) == len(tried)

from lowkernels.ops.conv_act import triton as kernel
packed = kernel.pack(call.args[1], call.args[2])
for c in tried[1:]:
    with settings.using(c.setting):
        (launch,) = kernel.plan(*call.args, packed)[1]
    assert all(launch.config[key] == value for key, value in c.setting.items())

(row,) = tuning.tune([call], torch.device("cpu"), 1.0, print)
assert {"triton", "eager"} <= set(row.us), row
print("tuned")
"""


@pytest.mark.slow
def test_tuning_triton_in_its_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="the Triton package is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "LOWKERNELS_CACHE_DIR": str(tmp_path), "LOWKERNELS_JIT": "0"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("tuned\n")


@pytest.mark.gpu
@pytest.mark.parametrize("operator", list(OPERATORS))
def test_measuring_on_a_gpu(operator: str) -> None:
    call = random_call(operator, batch=8, channels=64, height=14, width=14, dtype=torch.float16, device="cuda")
    found = tuning.measure(*call, ["cuda", "triton", "eager"], 0.2)
    assert [c.backend for c in found if c.backend == "triton" and c.setting]
    # The CUDA kernels may not be built here; what runs has to be right.
    assert not [c.problem for c in found if c.problem and (c.backend != "cuda" or "exceeds the budget" in c.problem)]
    described, of = measured.describe(*call), measured.machine(call.args[0].device)
    assert described is not None
    assert of is not None
    row = tuning.row_of(described, found, "now")
    assert row is not None
    assert {"triton", "eager"} <= set(row.us)
    measured.add(measured.user_path(of), of, [row])
    measured.forget()
    chosen = lowkernels.explain(*call[:1], *call.args)
    assert chosen.basis == "measured"
    # The least of the times, unless the fixed order has it that what is within noise of it comes first.
    assert row.us[chosen.backend] <= auto.NOISE * min(row.us.values())


def test_every_operator_of_the_gpu_backends_says_what_to_try() -> None:
    """Whole settings, all of them different from each other and from what runs without one."""
    for operator in OPERATORS:
        # Of lowtention as many tokens as LowFormer has: several images a CTA are what there is to try.
        stride = 2 if operator == "lowtention" else 1
        call = random_call(operator, dtype=torch.float16, channels=64, height=14, width=14, batch=8, stride=stride)
        for backend in ("cuda", "triton"):
            if backend == "triton":
                pytest.importorskip("triton", reason="the Triton package is not installed")
            kernel: Any = dispatch.kernel(operator, backend)
            tried = kernel.candidates(*call.args)
            assert tried, (operator, backend)
            assert len({tuple(sorted(t.items())) for t in tried}) == len(tried)
            assert all(type(v) is int for t in tried for v in t.values())


def test_conv_act_in_cuda_runs_with_the_setting_it_is_given() -> None:
    kernel: Any = dispatch.kernel("conv_act", "cuda")
    call = random_call("conv_act", dtype=torch.float16, channels=64, height=14, width=14, batch=8)
    x, weight, *_ = call.args
    chosen = kernel._plan(x, weight, 1, 1, False).config
    for setting in kernel.candidates(*call.args):
        with settings.using(setting):
            config = kernel._plan(x, weight, 1, 1, False).config
        assert {"config": config.number} == setting
        assert config != chosen
    with settings.using({"config": 99}):
        assert kernel._plan(x, weight, 1, 1, False).config == chosen, "one that does not fit is ignored"
