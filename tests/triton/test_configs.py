"""The shipped tables: well formed, and ignored with a warning when they are not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lowkernels.backends.triton import configs
from lowkernels.ops import OPERATORS

FALLBACK = {"BM": 64, "num_warps": 4}
ROW: dict[str, Any] = {"arch": [[80, 89], [120, None]], "dtype": ["float16"], "when": {"rows": [2, 8]}, "config": {"BM": 128}}


@pytest.fixture(autouse=True)
def _fresh_tables() -> Iterator[None]:
    configs.table.cache_clear()
    yield
    configs.table.cache_clear()


@pytest.mark.parametrize("operator", list(OPERATORS))
@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "tf32", "float32"])
def test_every_call_has_a_row(operator: str, arch: int, dtype: str) -> None:
    assert any(configs.serves(row, arch, dtype) for row in configs.table(operator))


def test_first_row_that_fits_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "TABLES", tmp_path)
    later = {**ROW, "when": {}, "config": {"BM": 16}}
    (tmp_path / "op.json").write_text(json.dumps([ROW, later]))

    def chosen(arch: int, dtype: str, rows: int) -> tuple[int, int]:
        found = configs.choose("op", arch, dtype, fallback=FALLBACK, rows=rows)
        assert found["num_warps"] == 4
        return found["BM"], found["row"]

    assert chosen(80, "float16", 2) == chosen(120, "float16", 8) == (128, 0)
    assert chosen(80, "float16", 1) == chosen(80, "float16", 9) == (16, 1)
    assert chosen(90, "float16", 4) == chosen(80, "float32", 4) == (64, -1)


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
    (tmp_path / "op.json").write_text(text)
    with pytest.warns(RuntimeWarning, match=r"op\.json is ignored"):
        found = configs.choose("op", 90, "float16", fallback=FALLBACK)
    assert found == {**FALLBACK, "row": -1}


def test_missing_table_is_ignored_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "TABLES", tmp_path)
    with pytest.warns(RuntimeWarning, match=r"op\.json is ignored"):
        configs.choose("op", 90, "float16", fallback=FALLBACK)
