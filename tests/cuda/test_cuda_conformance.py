"""The wrappers of ``device.cuh``: the shim does what the PTX manual says, and a GPU, where there is one, what the shim does."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lowkernels.backends.cuda import build
from tests.cuda import execution

WRAPPERS = ("ldmatrix", "ldmatrix_transposed", "mma_fp16", "mma_bf16", "cp_async", "fp16", "bf16", "shuffle", "functions")
# Movements and conversions are exact; products and functions only up to the order of sums and the last bits.
ROUNDED = {"mma_fp16": 2.0**-20, "mma_bf16": 2.0**-20, "functions": 2.0**-20}

Words = NDArray[np.uint32]


def inputs(wrapper: str, seed: int = 0) -> Words:
    """Random bits, [lane][16]. Words 8 to 13 are ordinary floats; those of a product are ordinary 16-bit floats."""
    generator = np.random.default_rng(seed)
    words = generator.integers(0, 2**32, (32, 16), dtype=np.uint32)
    words[:, 8:14] = generator.standard_normal((32, 6), dtype=np.float32).view(np.uint32)
    if wrapper.startswith("mma"):
        dtype = torch.float16 if wrapper == "mma_fp16" else torch.bfloat16
        halves = torch.from_numpy(generator.standard_normal((32, 16))).to(dtype).view(torch.int16).numpy()
        words[:, :8] = np.ascontiguousarray(halves).view(np.uint32)
    return words


def run(function: Callable[..., int], wrapper: str, words: Words) -> Words:
    out = np.zeros((32, 8), dtype=np.uint32)
    pointer = ctypes.POINTER(ctypes.c_uint32)
    error = function(WRAPPERS.index(wrapper), words.ctypes.data_as(pointer), out.ctypes.data_as(pointer))
    assert error == 0, f"{wrapper}: error {error}"
    return out


def emulated(wrapper: str, words: Words) -> Words:
    library = execution.conformance()
    with execution.watched(library) as outcome:
        out = run(ctypes.CDLL(str(library)).lowkernels_conformance, wrapper, words)
    assert not outcome.reports, "\n".join(outcome.reports)
    return out


def halves(words: Words) -> NDArray[np.uint16]:
    return np.ascontiguousarray(words).view(np.uint16)


@pytest.fixture(autouse=True)
def _shim(on_cpu: None) -> None:
    """Skips where the shim cannot run."""


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(transposed: bool) -> None:
    words = inputs("ldmatrix")
    rows = halves(words[:, :4]).reshape(32, 8)[words[:, 15] % 32]
    got = halves(emulated("ldmatrix_transposed" if transposed else "ldmatrix", words)[:, :4]).reshape(32, 4, 2)
    for lane in range(32):
        for matrix in range(4):
            eight = rows[8 * matrix : 8 * matrix + 8]
            eight = eight.T if transposed else eight
            assert (got[lane, matrix] == eight[lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mma(dtype: torch.dtype) -> None:
    wrapper = "mma_fp16" if dtype == torch.float16 else "mma_bf16"
    words = inputs(wrapper)
    given = torch.from_numpy(halves(words[:, :6]).view(np.int16).reshape(32, 6, 2)).view(dtype).double()
    added = torch.from_numpy(words[:, 8:12].copy().view(np.float32)).double()
    a, b, c = torch.zeros(16, 16).double(), torch.zeros(16, 8).double(), torch.zeros(16, 8).double()
    for lane in range(32):
        group, member = divmod(lane, 4)
        for i in range(8):
            a[group + 8 * (i // 2 % 2), 2 * member + i % 2 + 8 * (i // 4)] = given[lane, i // 2, i % 2]
        for i in range(4):
            b[2 * member + i % 2 + 8 * (i // 2), group] = given[lane, 4 + i // 2, i % 2]
            c[group + 8 * (i // 2), 2 * member + i % 2] = added[lane, i]
    expected = a @ b + c
    got = torch.from_numpy(emulated(wrapper, words)[:, :4].copy().view(np.float32))
    for lane in range(32):
        group, member = divmod(lane, 4)
        for i in range(4):
            right = expected[group + 8 * (i // 2), 2 * member + i % 2].item()
            assert got[lane, i].item() == pytest.approx(right, rel=1e-5, abs=1e-5)


def test_cp_async() -> None:
    words = inputs("cp_async")
    got = emulated("cp_async", words)
    assert (got[:, :4] == np.where(words[:, 15:] % 2, words[:, :4], 0)).all()
    assert (got[:, 4:6] == np.where(words[:, 14:15] % 2, words[:, 4:6], 0)).all()
    assert (got[:, 6:] == 0xFFFFFFFF).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conversions(dtype: torch.dtype) -> None:
    wrapper = "fp16" if dtype == torch.float16 else "bf16"
    words = inputs(wrapper)
    words[:, 0] = torch.randn(32, 2).to(dtype).view(torch.int16).numpy().copy().view(np.uint32)[:, 0]
    got = emulated(wrapper, words)
    floats = torch.from_numpy(words[:, 8:10].copy().view(np.float32))
    assert (halves(got[:, :1]) == floats.to(dtype).view(torch.int16).numpy().view(np.uint16)).all()
    back = torch.from_numpy(halves(words[:, :1]).view(np.int16)).view(dtype).float().numpy()
    assert (got[:, 1:3].copy().view(np.float32) == back).all()


def test_shuffle() -> None:
    words = inputs("shuffle")
    got = emulated("shuffle", words)
    for i in range(5):
        assert (got[:, i] == words[np.arange(32) ^ (1 << i), 8 + i]).all()


@pytest.fixture(scope="module")
def on_gpu() -> Callable[..., int]:
    """``conformance.cu`` for the GPU here."""
    nvcc = build.compiler()
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    folder = Path(tempfile.mkdtemp())
    source = Path(__file__).parent / "conformance.cu"
    command = build.kernel_command(nvcc, source, folder / "out.o", build.architectures(build._listed()))
    subprocess.run([*command, f"-I{execution.SOURCES}"], check=True, capture_output=True)
    subprocess.run([nvcc, "-shared", "-cudart=static", str(folder / "out.o"), "-o", str(folder / "out.so")], check=True)
    function: Callable[..., int] = ctypes.CDLL(str(folder / "out.so")).lowkernels_conformance
    return function


@pytest.mark.gpu
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_gpu_does_what_the_shim_does(on_gpu: Callable[..., int], wrapper: str) -> None:
    for seed in range(20):
        words = inputs(wrapper, seed)
        real, shim = run(on_gpu, wrapper, words), emulated(wrapper, words)
        if wrapper in ROUNDED:
            scale = 16.0 if wrapper.startswith("mma") else 1.0
            difference = np.abs(real.view(np.float32).astype(np.float64) - shim.view(np.float32))
            assert difference.max() <= scale * ROUNDED[wrapper] * max(1.0, float(np.abs(shim.view(np.float32)).max()))
        elif wrapper in ("fp16", "bf16"):
            # NaNs keep their place, not their payload.
            nan = np.isnan(shim[:, 1:3].view(np.float32))
            assert (real[:, 0] == shim[:, 0]).all()
            assert ((real[:, 1:3] == shim[:, 1:3]) | (nan & np.isnan(real[:, 1:3].view(np.float32)))).all()
        else:
            assert (real == shim).all()
