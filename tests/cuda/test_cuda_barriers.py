"""Every barrier is needed: one that stops threads but orders nothing is reported as a race."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lowkernels.backends.cuda import chains, tiling
from lowkernels.testing import random_call
from tests.cuda import execution

# Calls that meet all barriers of the operator's file between them.
CALLS: dict[str, list[dict[str, Any]]] = {
    "conv_act": [
        {"channels": 8, "out_channels": 40, "height": 12, "width": 13, "pool": True, "batch": 1},
        {"channels": 600, "out_channels": 20, "height": 1, "width": 1, "kernel_size": 1},
    ],
    "separable_conv": [{"channels": 196, "out_channels": 100, "height": 9, "width": 6}],
    "mbconv": [{"channels": 20, "hidden": 132, "out_channels": 40, "height": 9, "width": 7}],
    "fused_mbconv": [{"channels": 20, "hidden": 132, "out_channels": 132, "height": 5, "width": 7}],
    "gn_mlp": [{"channels": 20, "hidden": 132, "out_channels": 132, "height": 5, "width": 6}],
    "lowtention": [
        {"channels": 36, "num_heads": 2, "head_dim": 16, "height": 9, "width": 9},
        {"channels": 36, "num_heads": 1, "head_dim": 16, "height": 17, "width": 16, "batch": 1},
    ],
}


def text_of(name: str) -> str:
    """A file and the headers it includes."""
    text = (execution.SOURCES / name).read_text()
    # Those of calls that are divided among CTAs are in test_cuda_split.py.
    headers = sorted(set(re.findall(r'#include "(\w+\.cuh)"', text)) - {"device.cuh", "split.cuh"})
    return "".join([text, *map(text_of, headers)])


@pytest.mark.parametrize("operator", CALLS)
def test_each_barrier_is_needed(kernels: Path, monkeypatch: pytest.MonkeyPatch, operator: str) -> None:
    # Of two products back to back, the shape whose warps share rows.
    monkeypatch.setattr(tiling, "splits", lambda *args: 1)
    monkeypatch.setattr(chains, "choose", lambda shape, device: tiling.Tile(0, 1, 32, 5))
    needed, met = set(), set()
    for shape in CALLS[operator]:
        call = random_call(operator, dtype=torch.float16, **shape)
        with execution.watched(kernels) as intact:
            execution.run(operator, call.args)
        assert not intact.reports
        met |= set(intact.barriers)
        for barrier in intact.barriers:
            with execution.watched(kernels, skip=barrier) as mutated:
                execution.run(operator, call.args)
            if any(report.startswith("race") for report in mutated.reports):
                needed.add(barrier)
    text = text_of(f"{operator}.cu")
    assert len(met) == sum(text.count(f"{name}();") for name in ("block_sync", "warp_sync")), "the calls meet every barrier"
    assert needed == met, f"these order nothing: {met - needed}"
