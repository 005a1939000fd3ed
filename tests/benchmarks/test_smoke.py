"""Everything once, as a user starts it, on tiny subjects."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import rows
from benchmarks.provenance import ROOT
from lowkernels.ops import OPERATORS

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(*arguments: str, limit_s: float = 200) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )


@pytest.mark.slow
def test_all(tmp_path: Path) -> None:
    done = run("all", "--smoke", "--device", "cpu", "--threads", "1", "--out", str(tmp_path))
    log = tmp_path / "log.txt"
    assert done.returncode == 0, done.stderr + (log.read_text() if log.exists() else "")
    found = rows.read(*tmp_path.glob("*.jsonl"))
    assert {r.operator for r in found.rows if r.kind == "op"} == set(OPERATORS)
    assert {r.kind for r in found.rows} == {"op", "model"}
    assert not [f for f in found.other if f["kind"] in ("started", "ended", "unmeasured")]
    assert {r.label: r.reason for r in found.rows if r.status == rows.WRONG} == {}
    for group in found.groups().values():
        by_name = {r.label: r for r in group}
        assert by_name["eager"].ms is not None
        assert by_name["lowkernels, auto"].ms is not None
        # A model's rows name every block that was replaced.
        replaced = [name for m in by_name["lowkernels, auto"].modules or [] if m["replaced"] for name in m["names"]]
        assert len(replaced) == (sum((by_name["lowkernels, auto"].served or {}).values()) if group[0].kind == "model" else 0)
    assert found.run["threads"] == 1
    assert "## Operators" in (tmp_path / "report.md").read_text()
    assert "**lowkernels, auto**" in done.stdout


@pytest.mark.slow
def test_gpu_rehearsal(tmp_path: Path) -> None:
    done = run("gpu", "--smoke", "--device", "cpu", "--out", str(tmp_path))
    log = tmp_path / "log.txt"
    assert done.returncode == 0, done.stderr + (log.read_text() if log.exists() else "")
    assert len(list(tmp_path.iterdir())) <= 8
    found = rows.read(*tmp_path.glob("*.jsonl"))
    outcomes = {(f["backend"], f["outcome"]) for f in found.other if f["kind"] == "correctness"}
    assert ("eager", "right") in outcomes
    assert not [o for o in outcomes if o[1] == "wrong"]
    assert any(f["kind"] == "tuning" for f in found.other)
    assert found.rows
    assert "- correctness: done" in (tmp_path / "report.md").read_text()


def test_microbenchmarks(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    options = ["--layers", "smoke", "--on", "cpu", "--benchmark-disable", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", *options],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


def test_commands_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    from benchmarks.cli import main

    assert main(["ops", "--device", "cpu", "--layers", "no such layer", "--models", "lowformer_b0", "--out", str(tmp_path)]) == 2
    assert main(["models", "--device", "cpu", "--quick", "--sizes", "64", "--out", str(tmp_path)]) == 2
    assert not list(tmp_path.iterdir())
