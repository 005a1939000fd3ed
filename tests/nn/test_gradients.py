"""Gradients in eval mode: they reach every parameter and equal those of the ordinary computation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .blocks import CASES, FEW, Case, assert_same, each


def _compare(case: Case, block: nn.Module, x: Tensor, wanted: list[Tensor]) -> None:
    direction = torch.randn(case.plain(block, x).shape, dtype=x.dtype)
    found = torch.autograd.grad(block(x), wanted, direction)
    for a, b in zip(found, torch.autograd.grad(case.plain(block, x), wanted, direction), strict=True):
        assert_same(a, b)
        assert b.abs().max() > 0


@each(CASES)
def test_all_gradients(case: Case) -> None:
    block = case.block()
    x = case.x().requires_grad_()
    # A bias before a normalisation over everything has the gradient 0 up to rounding; no block has one.
    _compare(case, block, x, [x, *block.parameters()])


@each(CASES)
def test_input_alone(case: Case) -> None:
    block = case.block().requires_grad_(False)
    x = case.x().requires_grad_()
    _compare(case, block, x, [x])
    with torch.no_grad():
        assert not block(x).requires_grad
    assert not block(x.detach()).requires_grad


@each(CASES)
def test_one_parameter_alone(case: Case) -> None:
    """Fine-tuning a part: the others are frozen, and so is the input."""
    for name, _ in case.block().named_parameters():
        block = case.block().requires_grad_(False)
        parameter = block.get_parameter(name).requires_grad_()
        # Contiguous for the sake of the ordinary computation: PyTorch's own GroupNorm cannot train on channels_last here.
        _compare(case, block, case.x().contiguous(), [parameter])
        block(case.x()).sum().backward()
        assert {n for n, p in block.named_parameters() if p.grad is not None} == {name}


@each(FEW)
def test_statistics_do_not_move_in_eval_mode(case: Case) -> None:
    block = case.block()
    before = copy.deepcopy(block.state_dict())
    block(case.x().requires_grad_()).sum().backward()
    assert all(torch.equal(v, before[k]) for k, v in block.state_dict().items())


@each(FEW)
def test_gradients_between_updates(case: Case) -> None:
    """Training with frozen statistics: forward, backward, step, several times, in eval mode."""
    block = case.block()
    twin = copy.deepcopy(block)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (block, twin)]
    for step in range(3):
        x = case.x(seed=step).requires_grad_()
        for optimizer, out in zip(optimizers, (block(x), case.plain(twin, x)), strict=True):
            optimizer.zero_grad()
            out.square().mean().backward()
            optimizer.step()
    for a, b in zip(block.parameters(), twin.parameters(), strict=True):
        assert_same(a.detach(), b.detach())


@each(FEW)
def test_backward_after_an_update_is_refused(case: Case) -> None:
    """As everywhere in PyTorch: a graph whose parameters were overwritten has no gradients any more."""
    block = case.block()
    out = block(case.x().requires_grad_())
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
@each(FEW)
def test_gradient_checkpointing(case: Case, reentrant: bool) -> None:
    for block in (case.block(), case.block().train()):
        x = case.x().requires_grad_()
        twin = copy.deepcopy(block)
        torch.manual_seed(5)
        checkpoint(block, x, use_reentrant=reentrant).square().sum().backward()
        found = [x.grad, *(p.grad for p in block.parameters())]
        x.grad = None
        torch.manual_seed(5)
        twin(x).square().sum().backward()
        for a, b in zip(found, [x.grad, *(p.grad for p in twin.parameters())], strict=True):
            assert_same(a, b)


@each(FEW)
def test_function_transforms(case: Case) -> None:
    """grad, jvp, vmap and jacrev over input and parameters go the ordinary way."""
    block = case.block()
    # Contiguous for the sake of PyTorch's own GroupNorm, here and below.
    x = case.x().contiguous()
    parameters = {k: v.detach() for k, v in block.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(block, parameters, (x,)).square().sum()

    of_parameters, of_x = torch.func.grad(loss, argnums=(0, 1))(parameters, x)
    given = x.clone().requires_grad_()
    expected = torch.autograd.grad(case.plain(block, given).square().sum(), [given, *block.parameters()])
    for a, b in zip([of_x, *of_parameters.values()], expected, strict=True):
        assert_same(a, b)

    # It cannot be mapped over its input at all.
    if not any(isinstance(m, nn.GroupNorm) for m in block.modules()):
        with torch.no_grad():
            batch = torch.stack([x, 2 * x, x - 1])
            assert_same(torch.vmap(block)(batch), torch.stack([case.plain(block, one) for one in batch]))
    one = x[:1]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out, tangent = torch.func.jvp(block, (one,), (torch.ones_like(one),))
    step = 1e-6
    with torch.no_grad():
        assert_same(out.detach(), case.plain(block, one))
        numerical = (case.plain(block, one + step) - case.plain(block, one - step)) / (2 * step)
    assert torch.allclose(tangent.detach(), numerical, rtol=1e-4, atol=1e-6)


@each(FEW)
def test_ensembles(case: Case) -> None:
    """vmap over stacked parameters, as torch.func.stack_module_state makes them."""
    models = [case.block() for _ in range(3)]
    with torch.no_grad():
        for i, model in enumerate(models):
            for parameter in model.parameters():
                parameter.mul_(1 + 0.1 * i)
    x = case.x()
    expected = torch.stack([case.plain(model, x) for model in models])
    parameters = {k: torch.stack([m.get_parameter(k).detach() for m in models]) for k, _ in models[0].named_parameters()}
    call = torch.vmap(lambda p: torch.func.functional_call(models[0], p, (x,)))
    assert_same(call(parameters), expected.detach())
