"""Hopper's warpgroup products in a small pipelined kernel, ``warpgroup_gemm.cu``: right in the shim, and breaking it is noticed."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.cuda import execution

NUMBERS = "numbers"
# (what is changed, into what, and how that has to be noticed)
BREAKAGES = [
    ("fence_proxy_async();", "", "unfenced"),
    ("fence_proxy_async();\n            block_sync();", "block_sync();\n            fence_proxy_async();", "unfenced"),
    ("cp_async_wait<0>();\n            fence_proxy_async();", "fence_proxy_async();\n            cp_async_wait<0>();", "unfenced"),
    ("cp_async_wait<0>();", "cp_async_wait<1>();", "pending"),
    ("block_sync();", "", "race"),
    ("kStages = 3", "kStages = 1", "race"),
    ("                wgmma_fence();\n", "", "unfenced"),
    ("wgmma_fence();\n                wgmma", "if (step % 2) wgmma_fence();\n                wgmma", "unfenced"),
    ("wgmma_wait<1>();", "", "pending"),
    ("wgmma_wait<1>();", "wgmma_wait<2>();", "pending"),
    ("wgmma_wait<0>();", "wgmma_wait<1>();", "pending"),
    ("wgmma_commit();", "", "pending"),
    ("d, a[step % 2]", "d, a[0]", "pending"),
    ("slab_operand(at, step)", "slab_operand(at, step + 1)", NUMBERS),
    ("slab_operand(at, step)", "slab_operand(at + 1024, step)", NUMBERS),
    ("slab_operand(at, step)", "slab_operand(at + 16 * slab, step)", NUMBERS),
    ("slab_operand(at, step)", "matrix_descriptor(at + step * 32, 1024, 16, kNoSwizzle)", NUMBERS),
    ("slab_operand(at, step)", "matrix_descriptor(at + step * 32, 1024, 16, kSwizzle64)", NUMBERS),
    ("slab_operand(at, step)", "matrix_descriptor(at + step * 32, 512, 16, kSwizzle128)", "descriptor"),
    ("slab_operand(at, step)", "slab_operand(at + 128 * warp, step)", "divergent"),
    ("slab_operand(at, step)", "slab_operand(at + 3 * kSlabBytes, step)", "unwritten"),
    ("slab_operand(at, step)", "slab_operand(at + 6 * kSlabBytes, step)", "bounds"),
    ("slab + step > 0", "true", NUMBERS),
    ("from + i, true);\n            }", "from + i, i != 0);\n            }", NUMBERS),
]


def operands(depth: int, seed: int = 0) -> tuple[NDArray[np.uint16], torch.Tensor]:
    """a and b's slabs as the kernel reads them, and the product in float64."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(rows, depth, generator=generator).half() for rows in (64, 128))
    # A slab has 128 rows of eight units of 8 values; a row's units are exchanged by exclusive or with its number.
    units = b.view(torch.int16).numpy().reshape(128, depth // 64, 8, 8).transpose(1, 0, 2, 3)
    row = np.arange(128)[:, None]
    slabs = units[:, row, np.arange(8) ^ row % 8]
    words = np.concatenate([a.view(torch.int16).numpy().ravel(), np.ascontiguousarray(slabs).ravel()])
    return words.view(np.uint16), a.double() @ b.double().t()


def multiply(function: Callable[..., int], words: NDArray[np.uint16], depth: int) -> tuple[NDArray[np.float32], int]:
    out = np.full((64, 128), np.nan, dtype=np.float32)
    error = function(ctypes.c_void_p(words.ctypes.data), depth, ctypes.c_void_p(out.ctypes.data))
    return out, error


def symptoms(library: Path, depth: int, schedule: tuple[int, int] = execution.SCHEDULES[0]) -> tuple[set[str], list[str]]:
    words, expected = operands(depth)
    with execution.watched(library, schedule) as outcome:
        out, _ = multiply(ctypes.CDLL(str(library)).lowkernels_gemm, words, depth)
    found = {report.split(" at ")[0] for report in outcome.reports}
    if not execution.sums_are_right(out, expected, depth):
        found.add(NUMBERS)
    return found, outcome.reports


@pytest.fixture(autouse=True)
def _shim(on_cpu: None) -> None:
    """Skips where the shim cannot run."""


@pytest.mark.parametrize("schedule", execution.SCHEDULES)
@pytest.mark.parametrize("depth", [64, 128, 320])
def test_product(depth: int, schedule: tuple[int, int]) -> None:
    found, reports = symptoms(execution.alone("warpgroup_gemm"), depth, schedule)
    assert found == set(), "\n".join(reports)


@pytest.mark.parametrize(("old", "new", "noticed"), BREAKAGES, ids=lambda text: str(text).strip()[:30])
def test_breakage_is_noticed(old: str, new: str, noticed: str) -> None:
    found, reports = symptoms(execution.alone("warpgroup_gemm", (old, new)), 320)
    assert noticed in found, "\n".join(reports)


@pytest.mark.gpu
def test_gpu_multiplies_as_the_shim_does() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("warpgroup products are for compute capability 9.0")
    function = execution.on_gpu("warpgroup_gemm").lowkernels_gemm
    for seed in range(5):
        words, expected = operands(640, seed)
        out, error = multiply(function, words, 640)
        assert error == 0
        assert execution.sums_are_right(out, expected, 640)
