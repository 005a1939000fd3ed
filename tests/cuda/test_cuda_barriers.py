"""Every barrier is needed: one that stops threads but orders nothing is reported as a race."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lowkernels.testing import random_call
from tests.cuda import execution

CALLS: dict[str, dict[str, Any]] = {
    "separable_conv": {"channels": 196, "out_channels": 100, "height": 9, "width": 6},
    "mbconv": {"channels": 20, "hidden": 132, "out_channels": 40, "height": 9, "width": 7},
    "lowtention": {"channels": 36, "num_heads": 2, "head_dim": 16, "height": 9, "width": 9},
}


@pytest.mark.parametrize("operator", CALLS)
def test_each_barrier_is_needed(kernels: Path, operator: str) -> None:
    call = random_call(operator, dtype=torch.float16, **CALLS[operator])
    with execution.watched(kernels) as intact:
        execution.run(operator, call.args)
    assert not intact.reports
    written = sum(
        text.read_text().count(f"{name}();")
        for text in execution.SOURCES.glob(f"{operator}.cu")
        for name in ("block_sync", "warp_sync")
    )
    assert len(intact.barriers) == written, "the call meets every barrier of the file"
    for barrier in intact.barriers:
        with execution.watched(kernels, skip=barrier) as mutated:
            execution.run(operator, call.args)
        assert any(report.startswith("race") for report in mutated.reports), f"{barrier} orders nothing"
