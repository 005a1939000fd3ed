"""The papers' experiments: what they measure, what their tables say, and one of each kind run for real on tiny subjects."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import compare, experiments, plans, render, rows
from benchmarks.cli import main
from benchmarks.experiments import EXPERIMENTS, FULL, QUICK, TINY, fusing, resolution, sharing
from benchmarks.experiments.experiment import AUTO, FOLDED, LIGHT, TORCHSCRIPT, named
from benchmarks.rivals import EAGER
from benchmarks.rows import Results
from benchmarks.subjects import blocks_of, layer_of, plain_network
from lowformer.blocks import Lowtention
from tests.benchmarks.made import RUN, experiment_results, timed


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_scale_has_subjects_of_its_own(name: str, device: str) -> None:
    counts = {scale: len(EXPERIMENTS[name].items(device, scale)) for scale in (TINY, QUICK, FULL)}
    assert 2 <= counts[TINY] <= counts[QUICK] <= counts[FULL]
    for scale in counts:
        keys = [item.key for item in EXPERIMENTS[name].items(device, scale)]
        assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("name", [n for n in EXPERIMENTS if n != "sharing"])
def test_an_item_makes_the_subject_that_its_key_says(name: str) -> None:
    item = EXPERIMENTS[name].items("cpu", TINY)[-1]
    assert item.make(1 << 20).key == item.key


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_tables_have_a_line_for_every_place(name: str) -> None:
    experiment = EXPERIMENTS[name]
    text = experiment.report(experiment_results(experiment, QUICK))
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({line.count(" | ") for line in lines}) == 1
    places = len(experiment.items("cpu", QUICK)) // (2 if name in ("fusing", "resolution") else 1)
    assert len(lines) == 2 + places
    assert "Some(R) Processor 9 16-Core" in text
    assert "0123456789ab" in text


def test_what_failed_and_what_is_missing_is_said() -> None:
    experiment = EXPERIMENTS["pixels"]
    results = experiment_results(experiment, TINY)
    failed = rows.Row(
        *results.rows[0].group, EAGER, status=rows.FAILED, reason="RuntimeError: no luck", point=results.rows[0].point
    )
    results.rows[0] = failed
    results.other.append({"kind": "unmeasured", "key": ["model", "lowformer_b1", 32, 4, "float32"], "reason": "no time left"})
    text = experiment.report(results)
    assert "eager: RuntimeError: no luck" in text
    assert "no time left" in text


def test_torchscript_runs_on_gpus_too_here() -> None:
    (script,) = named([TORCHSCRIPT])
    subject = type("Subject", (), {"device": "cuda", "dtype": torch.float32})()
    assert script.absent(subject) is None
    subject.dtype = torch.float16
    assert script.absent(subject) == "the recipe is for float32"
    assert [c.name for c in named(LIGHT)] == list(LIGHT)


def test_without_its_stride_lowtention_attends_to_four_times_as_many_positions() -> None:
    network = plain_network("lowformer_b0", resolution.FULL_RESOLUTION)
    strides = {m.stride for m in network.modules() if isinstance(m, Lowtention)}
    assert strides == {1}
    assert network.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)

    def cores(variation: object) -> list[int]:
        blocks = blocks_of("lowformer_b0", 224, 1, torch.float32, variation)  # type: ignore[arg-type]
        return [step.flops for b in blocks if b.operator == "lowtention" for step in b.cost.steps if step.name == "attention"]

    plain, full = cores(None), cores(resolution.FULL_RESOLUTION)
    assert len(plain) == len(full)
    assert full[0] == 16 * plain[0]  # stage 3: four times the positions, squared
    assert full[-1] == plain[-1]  # stage 4 has no stride


@pytest.mark.parametrize("block", fusing.BLOCKS)
def test_multiply_accumulates_are_those_of_the_floors(block: str) -> None:
    (item,) = [i for i in fusing.items("cpu", TINY) if i.key[1].startswith(f"{block} 16-")]
    subject = item.make(1 << 20)
    assert item.point is not None
    assert 2 * item.point["macs"] == subject.flops


def _pair(channels: int, separable: float, dense: float, disturbed: bool = False) -> list[rows.Row]:
    point = {"channels": channels, "side": 7, "macs": 1}
    return [
        timed(("op", f"{block} {channels}", 7, 1, "float32"), FOLDED, ms, point=point, operator=block, disturbed=disturbed)
        for block, ms in (("mbconv", separable), ("fused_mbconv", dense))
    ]


def test_the_rule_is_judged_by_times() -> None:
    found = Results(
        runs=[RUN], rows=[*_pair(128, 2.0, 1.0), *_pair(256, 2.0, 1.0), *_pair(512, 1.0, 2.0), *_pair(64, 9.0, 1.0, True)]
    )
    measured = fusing.pairs(found, FOLDED)
    assert [(p.channels, p.ratio) for p in measured] == [(128, 2.0), (256, 2.0), (512, 0.5)]
    assert "in 2 of 3 places" in fusing.verdict(measured)


def test_what_the_downsampling_gains_is_time_over_time() -> None:
    key = ("model", "m", 224, 1, "float32")
    found = Results(
        runs=[RUN],
        rows=[
            timed(key, AUTO, 2.0, point={"model": "m", "downsampled": True}),
            timed(("model", "m, slow", 224, 1, "float32"), AUTO, 5.0, point={"model": "m", "downsampled": False}),
        ],
    )
    assert "| 224 | 49, 196 | 2.00 ±2 % | 5.00 ±2 % | 2.50x |" in resolution.table(found)


def test_all_processes_together_do_what_each_of_them_does() -> None:
    text = sharing.table(experiment_results(sharing.EXPERIMENT, QUICK))
    # 4 processes are the third place: the last contender takes 3 * 8 / 4 ms for an image.
    assert text.splitlines()[-1].endswith("| 6.00 ±2 % | 667 |")


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="reads Linux's statistics")
def test_processor_time_of_others_is_seen() -> None:
    code = "import time; input(); end = time.process_time() + 0.3\nwhile time.process_time() < end: pass\nprint(); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as busy:
        assert busy.stdin is not None
        assert busy.stdout is not None
        everyone, all_but_it = sharing.Others([]), sharing.Others([busy.pid])
        before = everyone.seconds() - all_but_it.seconds()
        print(file=busy.stdin, flush=True)
        busy.stdout.readline()
        seen = everyone.seconds() - all_but_it.seconds() - before
        print(file=busy.stdin, flush=True)
    assert seen > 0.2


def test_a_process_keeps_a_subject_for_each_contender() -> None:
    layer = next(layer for layer in plans.smoke_layers() if layer.operator == "mbconv")
    tasks = [compare.Task(layer.name, layer.height, 1, "float32", "cpu", {**vars(layer)}, contender=name) for name in (EAGER, AUTO)]
    lines = [json.dumps({"task": vars(task)}) for task in tasks]
    lines += [json.dumps({"repetitions": 2, "contender": name}) for name in (AUTO, EAGER, "nobody")]
    answers: list[dict[str, object]] = []
    compare.serve(lines, answers.append)
    assert [set(a) for a in answers[:2]] == [{"seconds", "error", "served"}] * 2
    assert answers[1]["served"] is not None
    assert all({"seconds", "disturbed"} <= set(a) for a in answers[2:4])
    assert "failed" in answers[4]


def test_the_document_has_every_experiment_and_the_command_where_it_was_not_run() -> None:
    measured = Results(runs=[RUN], experiments={"pixels": experiment_results(EXPERIMENTS["pixels"], TINY)})
    text = experiments.document([measured])
    for experiment in EXPERIMENTS.values():
        assert f"## {experiment.title}" in text
        assert f"Not measured yet on a GPU: `{experiment.command('cuda')}`" in text
        assert (f"`{experiment.command('cpu')}`" in text) == (experiment.name != "pixels")
    assert "### Some(R) Processor 9 16-Core, 2 threads" in text
    place = f"<!-- benchmarks:{render.EXPERIMENTS_PLACE}:start -->\n<!-- benchmarks:{render.EXPERIMENTS_PLACE}:end -->"
    assert text in render.filled(place, [measured])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fusing", "sharing"])
def test_an_experiment_runs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment", name, "--smoke", "--device", "cpu", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    found = rows.read(path)
    assert not found.rows
    assert not found.runs
    results = found.experiments[name]
    assert {r.contender for r in results.rows} == set(EXPERIMENTS[name].contenders)
    assert {r.label: r.reason for r in results.rows if r.ms is None} == {}
    assert all(r.point is not None and r.error is not None for r in results.rows)
    assert [f for f in results.other if f["kind"] in ("started", "ended")] == []
    out = capsys.readouterr().out
    assert EXPERIMENTS[name].title in out
    assert str(path) in out


def test_a_recorded_call_is_its_layer() -> None:
    found = {b.operator: layer_of(b.operator, b.args) for b in blocks_of("lowformer_b0", 64, 1, torch.float32)}
    assert found["mbconv"] is not None
    assert found["mbconv"].operator == "mbconv"
    assert layer_of("linear", ()) is None
