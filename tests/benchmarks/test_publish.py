"""What committed results must be, and how new ones get there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import provenance, publish, render, rows, runner
from benchmarks.cli import main
from benchmarks.plots import pictures

RUN: dict[str, Any] = {
    "kind": "run",
    "command": "python -m benchmarks models",
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "dirty": False,
    "date": "2026-01-02 03:04 UTC",
    "device": "cuda",
    "device_name": "NVIDIA H200",
    "threads": 8,
    "cores": 16,
    "system": "Linux 6",
    "versions": {"python": "3.12.1", "torch": "2.13.0"},
    "disturbance_seen_by": "a gauge",
    "cuda": "13.0",
    "driver": "600.1",
    "compute_capability": "9.0",
    "multiprocessors": 132,
}
ROW: dict[str, Any] = {
    "kind": "model",
    "subject": "lowformer_b1",
    "size": 224,
    "batch": 2,
    "dtype": "float16",
    "contender": "eager",
    "status": "ok",
    "error": {"frobenius": 1e-4, "maximum": 1e-3, "frobenius_budget": 2e-4, "maximum_budget": 2e-3},
    "ms": 2.0,
    "ms_low": 1.9,
    "ms_high": 2.1,
    "images_per_s": 1000.0,
    "turns": 9,
}
NAME = "benchmark-models-fp16+bf16-nhwc-pt213-cu130-h200.jsonl"


def write(folder: Path, *facts: dict[str, Any], name: str = NAME) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    return path


def test_committed_results_are_fit_to_be_published() -> None:
    assert publish.check(render.RESULTS) == []


def test_good_results_pass(tmp_path: Path) -> None:
    write(tmp_path / "h200", RUN, ROW)
    (tmp_path / "README.md").write_text("what is here")
    assert publish.check(tmp_path) == []


def changed(fact: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {k: v for k, v in {**fact, **changes}.items() if v is not None}


@pytest.mark.parametrize(
    ("facts", "problem"),
    [
        ([changed(RUN, dirty=True), ROW], "measured files differed from commit 0123456789ab: commit first, then measure"),
        ([changed(RUN, dirty=None), ROW], "measured files differed"),
        ([changed(RUN, commit="0123456"), ROW], "commit is '0123456'; allowed is a full hash"),
        ([changed(RUN, commit=None), ROW], "provenance lacks commit"),
        ([changed(RUN, driver=None, command=None), ROW], "provenance lacks command, driver"),
        ([changed(RUN, date="yesterday"), ROW], "date is 'yesterday'; allowed is YYYY-MM-DD HH:MM UTC"),
        ([RUN, changed(RUN, commit="f" * 40, dirty=True), ROW], "measured files differed from commit ffffffffffff"),
        ([RUN, changed(RUN, device_name="NVIDIA L4"), ROW], "has results of more than one device"),
        ([ROW, RUN], "the first line does not say where the numbers come from"),
        ([RUN, changed(ROW, dtype="float32")], "has rows in float32, which its name does not say"),
        ([RUN, changed(ROW, surprise=1)], "unknown fields ['surprise']"),
        ([RUN, changed(ROW, size=None)], "missing 1 required positional argument: 'size'"),
        ([RUN, changed(ROW, error=None)], "eager on lowformer_b1, 224 px, batch 2, float16: was not held against float64"),
        ([RUN, changed(ROW, error={**ROW["error"], "maximum": 1.0})], "is outside its error budget"),
        ([RUN, changed(ROW, status="wrong")], "has a time although it is wrong"),
        ([RUN, changed(ROW, ms=None)], "has no time and no reason"),
        ([RUN, ROW, {"kind": "started", "key": [], "stage": ""}], "has progress notes (kind started)"),
        (
            [changed(RUN, versions={"python": "3.12.1", "torch": "2.14.0"}), ROW],
            "by which it is benchmark-models-fp16+bf16-nhwc-pt214",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, facts: list[dict[str, Any]], problem: str) -> None:
    write(tmp_path / "h200", *facts)
    found = publish.check(tmp_path)
    assert len(found) == 1
    assert found[0].startswith(f"h200/{NAME}: ")
    assert problem in found[0]


def test_broken_lines_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "h200", RUN)
    path.write_text(path.read_text() + '{"kind": "mod')
    assert "line 2" in publish.check(tmp_path)[0]


@pytest.mark.parametrize(
    ("arrange", "problem"),
    [
        (lambda f: write(f / "h100", RUN, ROW), "was measured on h200, and belongs into the folder of that name"),
        (lambda f: write(f / "h200", RUN, ROW, name="mine.jsonl"), "its name is none that the benchmarks give"),
        (lambda f: write(f / "h200", RUN, name="log.txt"), "only results files (.jsonl) belong here"),
        (lambda f: write(f, RUN, ROW), "only README.md and a folder for each device belong here"),
        (lambda f: (f / "h200").mkdir(), "has no results"),
    ],
)
def test_files_in_the_wrong_place_are_named(tmp_path: Path, arrange: Callable[[Path], Any], problem: str) -> None:
    arrange(tmp_path)
    (found,) = publish.check(tmp_path)
    assert problem in found


def test_adding_copies_to_the_folder_of_the_device(tmp_path: Path) -> None:
    measured, results = tmp_path / "out", tmp_path / "results"
    path = write(measured, RUN, ROW)
    (measured / "log.txt").write_text("")
    (copy,) = publish.add(measured, results)
    assert copy == results / "h200" / NAME
    assert copy.read_text() == path.read_text()
    assert publish.check(results) == []


def test_nothing_is_added_of_results_that_are_not_fit(tmp_path: Path) -> None:
    measured, results = tmp_path / "out", tmp_path / "results"
    write(measured, RUN, ROW)
    write(measured, changed(RUN, dirty=True), name="benchmark-ops-fp16-nhwc-pt213-cu130-h200.jsonl")
    with pytest.raises(ValueError, match=r"^benchmark-ops-fp16-nhwc-pt213-cu130-h200.jsonl: measured files differed"):
        publish.add(measured, results)
    assert not results.exists()
    with pytest.raises(ValueError, match=r"no results \(\*.jsonl\)"):
        publish.add(tmp_path, results)


def test_the_command_adds_and_writes_the_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured, results = tmp_path / "out", tmp_path / "results"
    document = tmp_path / "README.md"
    document.write_text("<!-- benchmarks:gpu-models:start -->\n<!-- benchmarks:gpu-models:end -->\n")
    monkeypatch.setattr(render, "RESULTS", results)
    monkeypatch.setattr(render, "DOCUMENTS", (document,))
    monkeypatch.setattr(pictures, "PICTURES", tmp_path / "pictures")
    monkeypatch.setattr("benchmarks.cli.ROOT", tmp_path)
    monkeypatch.setattr("benchmarks.plots.pictures.PICTURES", tmp_path / "pictures")
    assert main(["add", str(measured)]) == 2
    write(measured, RUN, ROW)
    assert main(["add", str(measured)]) == 0
    assert capsys.readouterr().out.splitlines() == [f"results/h200/{NAME} written", "README.md written"]
    assert "| lowformer_b1, 224 px, batch 2, fp16 |" in document.read_text()
    assert main(["check"]) == 0
    document.write_text(document.read_text().replace("2.00", "1.00"))
    assert main(["check"]) == 1
    assert capsys.readouterr().err == "README.md is out of date: run `python -m benchmarks render`\n"


def test_what_adds_to_a_file_says_where_it_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = SimpleNamespace(device="cuda", clock=SimpleNamespace(source="a gauge"))
    for run in (RUN, changed(RUN, date="2026-01-03 03:04 UTC"), changed(RUN, commit="f" * 40)):
        monkeypatch.setattr(provenance, "describe", lambda device, source, run=run: run)
        path = runner.results_file(tmp_path, "models", ["float16", "bfloat16"], session)
    assert path == tmp_path / NAME
    assert [json.loads(line)["commit"][0] for line in path.read_text().splitlines()] == ["0", "f"]


def test_a_run_that_differs_leaves_its_own_provenance(tmp_path: Path) -> None:
    later = changed(RUN, date="2026-01-03 03:04 UTC", load_average=[9.0])
    other = changed(RUN, commit="f" * 40)
    found = rows.read(write(tmp_path, RUN, later, ROW, other))
    assert [run["commit"] for run in found.runs] == [RUN["commit"], "f" * 40]
    text = render.provenance(found)
    assert "commit 0123456789ab." in text
    assert "commit ffffffffffff." in text
