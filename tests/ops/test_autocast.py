"""Autocast: everything floating is cast like for PyTorch's convolutions; packed weights stay where they are right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lowkernels.ops import OPERATORS

from .cases import CASES, FIRST_CASES, NAMES, arguments, map_tensors, run, tensors, with_grad
from .probe import NAME, Probe


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("operator", "config"), CASES)
def test_result_and_gradients(operator: str, config: dict[str, Any], dtype: torch.dtype) -> None:
    args = with_grad(arguments(operator, config))
    with torch.autocast("cpu", dtype):
        out = run(operator, args)
    cast = with_grad(map_tensors(args, lambda t: t.detach().to(dtype)))
    expected = run(operator, cast)
    assert out.dtype == dtype
    assert torch.equal(out, expected)
    found = torch.autograd.grad(out.float().sum(), tensors(args))
    wanted = torch.autograd.grad(expected.float().sum(), tensors(cast))
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b.float())


@pytest.mark.parametrize(("operator", "config"), FIRST_CASES)
def test_backward_outside_of_autocast_and_inside(operator: str, config: dict[str, Any]) -> None:
    args = with_grad(arguments(operator, config))
    with torch.autocast("cpu", torch.bfloat16):
        out = run(operator, args)
        inside = torch.autograd.grad(out.float().sum(), tensors(args), retain_graph=True)
    outside = torch.autograd.grad(out.float().sum(), tensors(args))
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


@pytest.mark.parametrize("operator", NAMES)
def test_float64_is_left_alone(operator: str) -> None:
    args = arguments(operator, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        out = run(operator, args)
    assert out.dtype == torch.float64
    assert torch.equal(out, run(operator, args))


@pytest.mark.parametrize("operator", NAMES)
def test_disabled_autocast_changes_nothing(operator: str) -> None:
    args = arguments(operator)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        out = run(operator, args)
    assert torch.equal(out, run(operator, args))


@pytest.mark.parametrize("operator", NAMES)
def test_input_of_another_dtype_than_the_weights(operator: str) -> None:
    """As inside a model under autocast: an activation in bf16 meets weights in fp32, and the other way round."""
    args = arguments(operator)
    low = map_tensors(args, torch.Tensor.bfloat16)
    for x, weights in ((low[0], args[1:]), (args[0], low[1:])):
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(run(operator, (x, *weights)), run(operator, low))


@pytest.mark.parametrize("operator", NAMES)
def test_packed_weights_are_kept_where_nothing_is_cast(probe: Probe, operator: str) -> None:
    """Weights cast on the way in are others than those that were packed; an input that is cast changes nothing."""
    op = OPERATORS[operator]

    def received(args: tuple[Any, ...]) -> list[Tensor] | None:
        packed = op.pack(*op.weights(args))
        with torch.autocast("cpu", torch.bfloat16):
            op.overload(*args, packed.tensors, packed.backend, NAME)
        return probe.forwards[-1][1]

    single = arguments(operator)
    low = map_tensors(single, torch.Tensor.bfloat16)
    inputs = [name in ("x", "residual") for name in op.argument_names]
    mixed = tuple(a if is_input else b for a, b, is_input in zip(single, low, inputs, strict=True))
    assert received(single) is None
    assert received(low) is not None
    assert received(mixed) is not None
    assert received(arguments(operator, dtype=torch.float64)) is not None
