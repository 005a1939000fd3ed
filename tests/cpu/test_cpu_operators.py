"""The native kernels against the error budget. `test_cpu_isa.py` runs this file again on every lesser instruction set."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowkernels.ops import OPERATORS
from lowkernels.testing import check_call, random_call
from tests.cpu import cases

pytestmark = pytest.mark.usefixtures("native")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def poison(operator: str, args: tuple[Any, ...]) -> None:
    """Leave NaNs in the kernels' scratch memory, so that a value read before it is written shows."""
    OPERATORS[operator].overload(torch.full_like(args[0], torch.nan), *args[1:], None, None, "cpu")


def prove(operator: str, shape: dict[str, Any], dtype: torch.dtype) -> None:
    call = random_call(operator, dtype=dtype, **shape)
    poison(operator, call.args)
    check_call(operator, call.args, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("operator", "shape"), cases.lowformer_cases())
def test_lowformer_shapes(operator: str, shape: dict[str, Any], dtype: str) -> None:
    prove(operator, shape, DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", cases.OPERATORS)
def test_contract(operator: str, dtype: str) -> None:
    for shape in cases.random_cases(operator, 24):
        prove(operator, shape, DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", cases.OPERATORS)
def test_result_does_not_depend_on_threads(operator: str, dtype: str) -> None:
    threads = torch.get_num_threads()
    try:
        for batch, size in ((1, 14), (3, 7), (1, 57)):
            call = random_call(operator, batch=batch, channels=64, height=size, width=size, dtype=DTYPES[dtype])
            results = []
            for count in (1, 2, 3, 7):
                torch.set_num_threads(count)
                results.append(OPERATORS[operator].overload(*call.args, None, None, "cpu"))
            assert all(torch.equal(results[0], other) for other in results[1:])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("operator", cases.OPERATORS)
def test_nan_stays_in_its_image(operator: str) -> None:
    call = random_call(operator, batch=3, channels=32)
    clean = OPERATORS[operator].overload(*call.args, None, None, "cpu")
    x = call.args[0].clone(memory_format=torch.preserve_format)
    x[1] = torch.nan
    out = OPERATORS[operator].overload(x, *call.args[1:], None, None, "cpu")
    assert torch.equal(out[0], clean[0])
    assert torch.equal(out[2], clean[2])
    assert out[1].isnan().all()


def test_residual_of_another_layout() -> None:
    x, *rest = random_call("conv_act", channels=16, height=9, width=5, residual=True).args
    expected = OPERATORS["conv_act"].overload(x, *rest, None, None, "cpu")
    rest[5] = rest[5].contiguous()
    assert torch.equal(OPERATORS["conv_act"].overload(x, *rest, None, None, "cpu"), expected)


def test_unaligned_input() -> None:
    call = random_call("fused_mbconv", channels=20, height=9, width=6)
    x = call.args[0]
    storage = torch.empty(x.numel() + 1)
    unaligned = storage[1:].view(x.shape[0], *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2)
    unaligned.copy_(x)
    assert unaligned.data_ptr() % 16
    check_call("fused_mbconv", (unaligned, *call.args[1:]), "cpu")


def test_attention_over_many_tokens() -> None:
    check_call("lowtention", random_call("lowtention", batch=1, channels=16, height=64, width=64).args, "cpu")


@pytest.mark.slow
def test_more_than_2_to_31_elements() -> None:
    # Zero pages cost no memory: only the last image holds data.
    channels, size, batch = 64, 2048, 9
    x = torch.zeros(batch, size, size, channels, dtype=torch.bfloat16).permute(0, 3, 1, 2)
    assert x.numel() > 2**31
    x[-1, :, -3:] = torch.randn(channels, 3, size, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = torch.randn(4, channels, 1, 1, generator=torch.Generator().manual_seed(1)).bfloat16() / 8
    arguments = (weight, None, "none", 1, 0, None, False)
    out = OPERATORS["conv_act"].overload(x, *arguments, None, None, "cpu")
    assert torch.equal(out[-1:, :, -3:], OPERATORS["conv_act"].overload(x[-1:, :, -3:], *arguments, None, None, "cpu"))
    assert out[-1, :, -3:].abs().max() > 1
    assert not out[:-1].any()
