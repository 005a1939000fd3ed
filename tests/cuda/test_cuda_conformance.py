"""The wrappers of ``device.cuh``: the shim does what the PTX manual says, and a GPU, where there is one, what the shim does."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.cuda import execution

WRAPPERS = ("ldmatrix", "ldmatrix_transposed", "mma_fp16", "mma_bf16", "cp_async", "fp16", "bf16", "shuffle", "functions")
# Number, dtype, columns, bytes of the swizzle (16: none); from SHARED on the first operand lies in shared memory too.
SHARED = 16
PRODUCTS = {
    9: (torch.float16, 64, 128),
    10: (torch.bfloat16, 64, 128),
    11: (torch.float16, 128, 128),
    12: (torch.bfloat16, 128, 128),
    13: (torch.float16, 64, 64),
    14: (torch.float16, 64, 32),
    15: (torch.float16, 64, 16),
    16: (torch.float16, 64, 128),
    17: (torch.bfloat16, 64, 128),
    18: (torch.float16, 128, 128),
    19: (torch.bfloat16, 128, 128),
    20: (torch.float16, 64, 64),
}
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


def run(function: Callable[..., int], wrapper: str | int, words: Words, shape: tuple[int, int] = (32, 8)) -> Words:
    out = np.zeros(shape, dtype=np.uint32)
    number = wrapper if isinstance(wrapper, int) else WRAPPERS.index(wrapper)
    size = ctypes.c_size_t
    error = function(
        number, ctypes.c_void_p(words.ctypes.data), size(words.nbytes), ctypes.c_void_p(out.ctypes.data), size(out.nbytes)
    )
    assert error == 0, f"{wrapper}: error {error}"
    return out


def emulated(wrapper: str | int, words: Words, shape: tuple[int, int] = (32, 8)) -> Words:
    library = execution.alone("conformance")
    with execution.watched(library) as outcome:
        out = run(ctypes.CDLL(str(library)).lowkernels_conformance, wrapper, words, shape)
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


def product_inputs(number: int, seed: int = 0) -> tuple[Words, torch.Tensor]:
    """A warpgroup product's words as ``conformance.cu`` reads them, and its result in float64, [64, columns]."""
    dtype, columns, swizzle = PRODUCTS[number]
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(rows, 64, generator=generator).to(dtype) for rows in (64, columns))
    c = torch.randn(64, columns, generator=generator)
    thread = np.arange(128)
    row, column = (thread // 32 * 16 + thread % 32 // 4)[:, None], (thread % 4 * 2)[:, None]
    step, register, half = (i.reshape(1, -1) for i in np.indices((4, 4, 2)))
    registers = a.view(torch.int16).numpy()[row + register % 2 * 8, step * 16 + column + register // 2 * 8 + half]
    rows, columns_of = accumulator_places(columns)
    first = stored(a, swizzle) if number >= SHARED else registers
    words = [
        np.ascontiguousarray(part).view(np.uint32).ravel() for part in (stored(b, swizzle), first, c.numpy()[rows, columns_of])
    ]
    return np.concatenate(words), c.double() + a.double() @ b.double().t()


def stored(matrix: torch.Tensor, swizzle: int) -> NDArray[np.int16]:
    """An operand [rows, 64] as it lies in shared memory: matrices as deep as a row is long, 16 at least, of eight rows after eight
    rows."""
    count = matrix.shape[0]
    n, k = np.meshgrid(np.arange(count), np.arange(64), indexing="ij")
    depth = max(16, swizzle // 2)
    unit, eight = k % depth // 8, 8 * depth * 2
    if swizzle == 16:
        within = unit * 128 + n % 8 * 16
    else:
        within = n % 8 * swizzle + (unit ^ n % 8 * swizzle // 128) * 16
    at = k // depth * (count // 8 * eight) + n // 8 * eight + within + k % 8 * 2
    out = np.zeros(count * 64, dtype=np.int16)
    out[at // 2] = matrix.view(torch.int16).numpy()
    return out


def accumulator_places(columns: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and column of each thread's accumulators."""
    thread, i = np.arange(128)[:, None], np.arange(columns // 2)[None]
    return thread // 32 * 16 + thread % 32 // 4 + i // 2 % 2 * 8, i // 4 * 8 + thread % 4 * 2 + i % 2


@pytest.mark.parametrize("number", PRODUCTS)
def test_warpgroup_product(number: int) -> None:
    words, expected = product_inputs(number)
    columns = PRODUCTS[number][1]
    got = emulated(number, words, (128, columns // 2)).view(np.float32)
    assert execution.sums_are_right(got, expected[accumulator_places(columns)], terms=64)


@pytest.fixture(scope="module")
def on_gpu() -> Callable[..., int]:
    """``conformance.cu`` for the GPU here."""
    function: Callable[..., int] = execution.on_gpu("conformance").lowkernels_conformance
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


@pytest.mark.gpu
@pytest.mark.parametrize("number", PRODUCTS)
def test_gpu_multiplies_as_the_shim_does(on_gpu: Callable[..., int], number: int) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("warpgroup products are for compute capability 9.0")
    columns = PRODUCTS[number][1]
    for seed in range(5):
        words, _ = product_inputs(number, seed)
        real, shim = (
            f(number, words, (128, columns // 2)).view(np.float32).astype(np.float64) for f in (partial(run, on_gpu), emulated)
        )
        # 64 products and a sum, in whatever order.
        assert np.abs(real - shim).max() <= 64 * 2.0**-20 * np.abs(shim).max()
