"""Fixtures of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests import torchvision_stub

torchvision_stub.install()


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """The work here is small: threads waiting for each other cost more than they save, above all beside others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
