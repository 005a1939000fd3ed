"""Tests of measured tables start from an empty cache folder and leave no decision behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lowkernels.backends import native
from lowkernels.backends.cpu import build
from lowkernels.choosing import measured


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    # Built kernels stay where they are.
    library = build.built()
    monkeypatch.setattr(build, "built", lambda: library)
    monkeypatch.setenv(native.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(measured.VARIABLE)
    monkeypatch.setattr(measured, "SHIPPED", tmp_path / "shipped")
    measured.forget()
    yield tmp_path / "cache"
    measured.forget()
