"""The error budget lets through what is right and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lowkernels import dispatch
from lowkernels.ops import OPERATORS
from lowkernels.testing import Call, Error, assert_within_budget, check_call, error_budget, measure_error, random_call

from .cases import FIRST_CASES, HALF, NAMES, named, run
from .independent import exact
from .probe import NAME, Probe

DTYPES = (torch.float32, *HALF)


def _round_mantissa(t: Tensor, bits: int) -> Tensor:
    """Round a float32 tensor to fewer mantissa bits, as TF32 (10) does."""
    step = 1 << (23 - bits)
    raw = t.contiguous().view(torch.int32)
    rounded = (raw + step // 2) & ~(step - 1)
    return rounded.view(torch.float32).reshape(t.shape)


def _budgeted(call: Call, result: Tensor) -> None:
    reference = exact(call.operator, named(*call))
    length = OPERATORS[call.operator].accumulation_length(*call.args)
    assert_within_budget(result, run(*call), reference, length, call.operator)


def _large(operator: str, dtype: torch.dtype = torch.float32) -> Call:
    return random_call(operator, channels=16, height=14, width=14, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", NAMES)
def test_correctly_rounded_result_passes(operator: str, dtype: torch.dtype) -> None:
    call = _large(operator, dtype)
    _budgeted(call, exact(operator, named(*call)).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", [name for name in NAMES if name != "gn_mlp"])
def test_one_dropped_tap_fails(operator: str, dtype: torch.dtype) -> None:
    """One of the nine positions of a 3x3 kernel, in one input channel of one output channel."""
    call = _large(operator, dtype)
    wrong = named(*call)
    spatial = next(name for name in ("weight", "dw_weight", "conv_weight") if name in wrong)
    weight = wrong[spatial].clone()
    strongest = weight[0, 0].abs().argmax()
    weight[0, 0].view(-1)[strongest] = 0
    wrong[spatial] = weight
    with pytest.raises(AssertionError, match="exceeds the budget"):
        _budgeted(call, exact(operator, wrong).to(dtype))


@pytest.mark.parametrize("operator", NAMES)
def test_tf32_rounding_of_float32_fails(operator: str) -> None:
    call = _large(operator)
    rounded = {k: _round_mantissa(v, 10) if isinstance(v, Tensor) and v.dim() == 4 else v for k, v in named(*call).items()}
    if "residual" in rounded and isinstance(rounded["residual"], Tensor):
        rounded["residual"] = named(*call)["residual"]
    with pytest.raises(AssertionError, match="exceeds the budget"):
        _budgeted(call, exact(operator, rounded).float())


@pytest.mark.parametrize("operator", NAMES)
def test_bfloat16_weights_for_float16_fail(operator: str) -> None:
    call = _large(operator, torch.float16)
    coarse = {k: v.bfloat16() if isinstance(v, Tensor) and v.dim() == 4 else v for k, v in named(*call).items()}
    with pytest.raises(AssertionError, match="exceeds the budget"):
        _budgeted(call, exact(operator, coarse).half())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("operator", NAMES)
def test_one_element_that_is_no_number_fails(operator: str, value: float, dtype: torch.dtype) -> None:
    call = _large(operator, dtype)
    result = exact(operator, named(*call)).to(dtype)
    result[1, 3, 2, 2] = value
    with pytest.raises(AssertionError, match="exceeds the budget"):
        _budgeted(call, result)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", NAMES)
def test_one_wrong_element_among_thousands_fails(operator: str, dtype: torch.dtype) -> None:
    call = _large(operator, dtype)
    reference = exact(operator, named(*call))
    length = OPERATORS[operator].accumulation_length(*call.args)
    bound = error_budget(measure_error(run(*call), reference), reference, dtype, length)
    result = reference.clone()
    result[1, 3, 2, 2] += 1.01 * bound.maximum
    assert not measure_error(result, reference).within(bound)


def test_wrong_shape_and_dtype_fail() -> None:
    call = _large("mbconv")
    result = run(*call)
    with pytest.raises(AssertionError, match="shape"):
        _budgeted(call, result[:1])
    with pytest.raises(AssertionError, match="shape"):
        _budgeted(call, result.transpose(2, 3).reshape(2, 16, 7, 28))
    with pytest.raises(AssertionError, match=r"dtype torch.float64, expected torch.float32"):
        _budgeted(call, result.double())


def test_the_bound_is_the_one_that_is_written_down() -> None:
    reference = torch.tensor([3.0, -4.0], dtype=torch.float64)
    eager = Error(1e-3, 2e-2)
    bound = error_budget(eager, reference, torch.bfloat16, accumulation_length=100)
    assert bound.frobenius == pytest.approx(2 * 1e-3 + 2**-8, rel=1e-12)
    assert bound.maximum == pytest.approx(2 * 2e-2 + 4 * (2**-8 + 10 * 2**-24) * 4, rel=1e-12)
    error = measure_error(torch.tensor([3.0, -3.0]), reference)
    assert (error.frobenius, error.maximum) == (pytest.approx(0.2), 1.0)
    assert Error(0.2, 1.0).within(Error(0.2, 1.0))
    assert not Error(0.3, 1.0).within(Error(0.2, 1.0))
    assert not Error(0.2, 1.1).within(Error(0.2, 1.0))
    assert not Error(math.nan, math.nan).within(Error(math.inf, math.inf))


def test_a_reference_of_zeros() -> None:
    zeros = torch.zeros(2, dtype=torch.float64)
    assert measure_error(torch.zeros(2), zeros) == Error(0.0, 0.0)
    assert measure_error(torch.tensor([0.0, 1e-9]), zeros).frobenius == math.inf
    assert measure_error(torch.zeros(0), zeros[:0]) == Error(0.0, 0.0)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("operator", NAMES)
def test_check_call_on_eager(operator: str, dtype: torch.dtype) -> None:
    args = random_call(operator, dtype=dtype).args
    assert torch.equal(check_call(operator, args, "eager"), run(operator, args))
    assert torch.equal(check_call(operator, args, "eager", packed=False), run(operator, args))


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "value": lambda out: out * 1.01,
    "shift": lambda out: out.roll(1, 3),
    "nan": lambda out: out.index_fill(1, torch.tensor(1), math.nan),
    "zero": torch.zeros_like,
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("operator", NAMES)
def test_check_call_finds_a_wrong_backend(probe: Probe, monkeypatch: pytest.MonkeyPatch, operator: str, wrong: str) -> None:
    args = random_call(operator).args
    check_call(operator, args, NAME)
    assert probe.forwards[-1][1] is not None
    check_call(operator, args, NAME, packed=False)
    assert probe.forwards[-1][1] is None
    kernel = dispatch.kernel(operator, NAME)
    assert kernel is not None
    forward = kernel.forward
    monkeypatch.setattr(kernel, "forward", lambda *a: WRONG[wrong](forward(*a)))
    with pytest.raises(AssertionError, match=f"{operator} on probe"):
        check_call(operator, args, NAME)


@pytest.mark.parametrize(("operator", "config"), FIRST_CASES)
def test_random_calls_are_the_same_every_time(operator: str, config: dict[str, object]) -> None:
    first, second, other = (random_call(operator, **config, seed=seed) for seed in (3, 3, 4))
    for a, b, c in zip(first.args, second.args, other.args, strict=True):
        assert (a == b).all() if isinstance(a, Tensor) else a == b
        assert not (isinstance(a, Tensor) and torch.equal(a, c))
    low, high = (random_call(operator, dtype=dtype, **config).args for dtype in (torch.bfloat16, torch.float64))
    for a, b in zip(low, high, strict=True):
        assert torch.equal(a, b.bfloat16()) if isinstance(a, Tensor) else a == b


def test_unknown_operator() -> None:
    with pytest.raises(ValueError, match="unknown operator 'conv'"):
        random_call("conv")
