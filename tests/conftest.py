"""What every test starts from: one thread beside other workers, a fixed seed, and a GPU where it says it needs one."""

from __future__ import annotations

import os
import random

import pytest
import torch


def pytest_configure() -> None:
    # What somebody measured on this machine has no say in what is tested.
    os.environ["LOWKERNELS_TABLES"] = "0"
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if wanting and not torch.cuda.is_available():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    torch.manual_seed(0)
