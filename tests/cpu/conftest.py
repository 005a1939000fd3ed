from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lowkernels.backends.cpu import build


@pytest.fixture
def native() -> Iterator[None]:
    """The native kernels, built if need be; what torch allocates meanwhile is filled with NaN."""
    reason = build.load()
    if reason is not None:
        pytest.skip(reason)
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(deterministic)
