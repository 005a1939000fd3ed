from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lowkernels import backends
from lowkernels.backends.cuda import launch
from lowkernels.ops import OPERATORS
from tests.cuda import execution


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The backend serves CPU tensors, through the shim; what torch allocates is filled with NaN."""
    reason = execution.unusable()
    if reason is not None:
        pytest.skip(reason)
    execution.machine()
    cuda = backends.load("cuda")
    monkeypatch.setattr(cuda, "unavailable", lambda device_type: None)
    monkeypatch.setattr(cuda, "DEVICES", ("cpu", "cuda"))
    # The tests themselves are the check.
    monkeypatch.setattr(cuda, "SELF_CHECK", False)
    monkeypatch.setattr(launch, "load", lambda: None)
    if "cuda" not in backends.PRIORITY:
        monkeypatch.setattr(backends, "PRIORITY", ("cuda", *backends.PRIORITY))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)
    # Plans made here are not true outside.
    for operator in OPERATORS.values():
        operator._plans.clear()


@pytest.fixture
def kernels(on_cpu: None) -> Path:
    """The kernels as they are, compiled for the shim."""
    return execution.kernels()
