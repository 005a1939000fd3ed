from __future__ import annotations

import pytest

from . import probe as probe_backend


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> probe_backend.Probe:
    """A backend of the test's own, auto's first choice, with eager behind it."""
    return probe_backend.install(monkeypatch)
