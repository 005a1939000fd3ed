"""The shipped tables: well formed, and ignored with a warning when they are not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="the Triton package is not installed")

from lowkernels.backends.triton import configs, model
from lowkernels.backends.triton.launch import Target
from lowkernels.choosing import settings
from lowkernels.ops import OPERATORS
from lowkernels.testing import random_call

ARGS = random_call("conv_act", device="meta").args
PICKED = {"BM": 64, "num_warps": 4}
ROW: dict[str, Any] = {"arch": [[80, 89], [120, None]], "dtype": ["float16"], "when": {"rows": [2, 8]}, "config": {"BM": 128}}


@pytest.fixture(autouse=True)
def _fresh_tables() -> Iterator[None]:
    configs.table.cache_clear()
    yield
    configs.table.cache_clear()


@pytest.fixture
def _one_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "candidates", lambda *_: [PICKED])
    monkeypatch.setattr(model, "pick", lambda *_: PICKED)


def _chosen(arch: int, dtype: str, **features: int) -> dict[str, int]:
    return configs.choose("conv_act", Target(arch, 132), dtype, ARGS, **features)


@pytest.mark.parametrize("operator", list(OPERATORS))
@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "tf32", "float32"])
def test_every_call_has_a_row(operator: str, arch: int, dtype: str) -> None:
    assert any(configs.serves(row, arch, dtype) for row in configs.table(operator))


@pytest.mark.parametrize("operator", list(OPERATORS))
def test_rows_say_all_that_a_kernel_needs(operator: str) -> None:
    needed = set(model.candidates(operator, "float16")[0]) - {"maxnreg", "LIMIT", "GROUPS"}
    assert all(needed <= set(row["config"]) for row in configs.table(operator))


@pytest.mark.usefixtures("_one_candidate")
def test_first_row_that_fits_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "TABLES", tmp_path)
    later = {**ROW, "when": {}, "config": {"BM": 16}}
    (tmp_path / "conv_act.json").write_text(json.dumps([ROW, later]))

    def chosen(arch: int, dtype: str, rows: int) -> tuple[int, str]:
        found = _chosen(arch, dtype, rows=rows)
        return found["BM"], configs.origin(found)

    assert chosen(80, "float16", 2) == chosen(120, "float16", 8) == (128, "table row 0")
    assert chosen(80, "float16", 1) == chosen(80, "float16", 9) == (16, "table row 1")
    assert chosen(90, "float16", 4) == chosen(80, "float32", 4) == (64, "cost model")
    with settings.using({"BM": 32}):
        assert chosen(80, "float16", 2) == chosen(90, "float16", 4) == (32, "tuned")


@pytest.mark.usefixtures("_one_candidate")
@pytest.mark.parametrize(
    "text",
    [
        "{",
        "{}",
        "[1]",
        json.dumps([{"arch": [[80, 90]]}]),
        json.dumps([{**ROW, "arch": [80, 90]}]),
        json.dumps([{**ROW, "arch": [["80", 90]]}]),
        json.dumps([{**ROW, "when": {"rows": 1}}]),
        json.dumps([{**ROW, "dtype": "float16"}]),
        json.dumps([{**ROW, "config": {"BM": "128"}}]),
        json.dumps([{**ROW, "config": {"BM": -1}}]),
        json.dumps([{**ROW, "config": {"BM": True}}]),
    ],
)
def test_corrupt_table_is_ignored_with_a_warning(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "TABLES", tmp_path)
    (tmp_path / "conv_act.json").write_text(text)
    with pytest.warns(RuntimeWarning, match=r"conv_act\.json is ignored"):
        found = _chosen(90, "float16")
    assert found == {**PICKED, "row": -1, "tuned": 0}


@pytest.mark.usefixtures("_one_candidate")
def test_missing_table_is_ignored_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "TABLES", tmp_path)
    with pytest.warns(RuntimeWarning, match=r"conv_act\.json is ignored"):
        _chosen(90, "float16")
