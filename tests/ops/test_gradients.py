"""Gradients: against numerical Jacobians in float64, of every tensor argument, and of the gradients themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from .cases import CASES, FIRST_CASES, NAMES, arguments, map_tensors, run, tensors, with_grad

_TINY = {"batch": 2, "height": 3, "width": 3, "dtype": torch.float64}


@pytest.mark.parametrize(("operator", "config"), CASES)
def test_gradcheck(operator: str, config: dict[str, Any]) -> None:
    args = with_grad(arguments(operator, config, **_TINY))
    torch.autograd.gradcheck(lambda *a: run(operator, a), args)


# Not lowtention: PyTorch's attention on the CPU has no second derivatives, and says so.
@pytest.mark.parametrize("operator", [name for name in NAMES if name != "lowtention"])
def test_gradients_of_gradients(operator: str) -> None:
    # gelu is smooth, so that second derivatives exist everywhere.
    args = with_grad(arguments(operator, act="gelu", **_TINY | {"batch": 1, "channels": 2, "hidden": 2}))
    torch.autograd.gradgradcheck(lambda *a: run(operator, a), args)


@pytest.mark.parametrize(("operator", "config"), FIRST_CASES)
def test_each_gradient_alone(operator: str, config: dict[str, Any]) -> None:
    """Frozen arguments do not change the gradients of the others."""
    args = arguments(operator, config, dtype=torch.float64)
    all_grads = torch.autograd.grad(run(operator, every := with_grad(args)).sum(), tensors(every))
    for position, expected in enumerate(all_grads):
        one = list(tensors(args))
        one[position] = one[position].detach().requires_grad_()
        remaining = iter(one)
        out = run(operator, map_tensors(args, lambda _, rest=remaining: next(rest)))
        (found,) = torch.autograd.grad(out.sum(), one[position])
        assert (found - expected).abs().max() <= 1e-9 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("grad_layout", ["expanded", "nchw", "strided"])
@pytest.mark.parametrize(("operator", "config"), FIRST_CASES)
def test_incoming_gradient_of_any_layout(operator: str, config: dict[str, Any], grad_layout: str) -> None:
    args = with_grad(arguments(operator, config, dtype=torch.float64))
    out = run(operator, args)
    grad = torch.randn_like(out)
    given: Tensor = {
        "expanded": lambda: torch.ones_like(grad[:1, :1, :1, :1]).expand(out.shape),
        "nchw": grad.contiguous,
        "strided": lambda: torch.stack((grad, grad), dim=-1)[..., 0],
    }[grad_layout]()
    canonical = torch.empty_like(out).copy_(given)
    for a, b in zip(
        torch.autograd.grad(out, tensors(args), given, retain_graph=True),
        torch.autograd.grad(out, tensors(args), canonical),
        strict=True,
    ):
        assert (a - b).abs().max() <= 1e-9 * max(1.0, b.abs().max().item())


@pytest.mark.parametrize(("operator", "config"), CASES)
def test_gradients_reach_expanded_and_repeated_arguments(operator: str, config: dict[str, Any]) -> None:
    """One tensor given twice, or spread out by expand(), collects the gradients of all its uses."""
    args = arguments(operator, config, dtype=torch.float64)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = run(operator, map_tensors(args, lambda t: t * scale)).square().sum()
    step = 1e-6
    with torch.no_grad():
        ends = [run(operator, map_tensors(args, lambda t, s=s: t * s)).square().sum() for s in (1 + step, 1 - step)]
    numerical = (ends[0] - ends[1]) / (2 * step)
    (analytic,) = torch.autograd.grad(loss, scale)
    assert torch.allclose(analytic, numerical, rtol=1e-5)
