"""Weights come back from what was packed: as they were, or a few roundings away, within the error budget of every operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lowkernels
from lowkernels import dispatch
from lowkernels.choosing import auto
from lowkernels.ops import OPERATORS
from lowkernels.ops.operator import PackedWeights, is_stand_in, stand_in
from lowkernels.testing import assert_within_budget, random_call
from lowkernels.testing.budget import to_float64, unit_roundoff
from tests.cpu import cases

pytestmark = pytest.mark.usefixtures("native")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def shapes(operator: str) -> list[dict[str, Any]]:
    """From all over the contract, and LowFormer's weights on small images."""
    small = [{**shape, "height": 7, "width": 7} for name, shape in cases.lowformer_cases() if name == operator]
    return cases.random_cases(operator, 16) + [shape for i, shape in enumerate(small) if shape not in small[:i]]


def bare(operator: str, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], PackedWeights]:
    """A call with stand-ins for its weights, and the weights packed."""
    op = OPERATORS[operator]
    weights = {id(w) for w in op.weights(args) if isinstance(w, Tensor)}
    packed = op.pack(*op.weights(args), backend="cpu")
    return tuple(stand_in(v) if id(v) in weights else v for v in args), packed


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("operator", cases.OPERATORS)
def test_weights_come_back(operator: str, dtype: torch.dtype) -> None:
    """Four values of a Winograd transform, none above 9/4 of the largest weight, make one tap: 9 roundings of it, and one more."""
    op = OPERATORS[operator]
    transformed = 0
    for shape in shapes(operator):
        args = random_call(operator, dtype=dtype, **shape).args
        without, packed = bare(operator, args)
        assert any(map(is_stand_in, without))
        plain = op.plain(without, packed.tensors, packed.backend)
        for name, found, given in zip(op.argument_names, plain, args, strict=True):
            if not isinstance(given, Tensor) or name in ("x", "residual"):
                assert found is given
                continue
            assert (found.shape, found.dtype) == (given.shape, given.dtype)
            assert found.is_contiguous(memory_format=torch.channels_last if found.dim() == 4 else torch.contiguous_format)
            assert found.untyped_storage().data_ptr() != packed.tensors[0].untyped_storage().data_ptr()
            if torch.equal(found, given):
                continue
            transformed += 1
            assert found.shape[2:] == (3, 3)
            exact = given.double()
            u, largest = unit_roundoff(dtype), exact.abs().max()
            assert (found.double() - exact).abs().max() <= ((1 + 9 * u) * (1 + u) - 1) * largest
            assert torch.equal(found[:, :, ::2, ::2], given[:, :, ::2, ::2]), "the corners stand in it as they are"
    if dtype == torch.float32:
        assert bool(transformed) == (operator in ("conv_act", "fused_mbconv", "lowtention"))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("operator", cases.OPERATORS)
def test_fallbacks_on_them_are_within_the_budget(operator: str, dtype: torch.dtype) -> None:
    op = OPERATORS[operator]
    for shape in shapes(operator):
        args = random_call(operator, dtype=dtype, **shape).args
        without, packed = bare(operator, args)
        with torch.no_grad():
            result = op.overload(*without, packed.tensors, packed.backend, "eager")
            assert dispatch.last_call()[0].backend == "eager"
            eager = op.overload(*args, None, None, "eager")
            reference = op.overload(*map(to_float64, args), None, None, "eager")
        assert_within_budget(result, eager, reference, op.accumulation_length(*args), f"{operator} {shape}")


@pytest.mark.parametrize("operator", cases.OPERATORS)
def test_stand_ins_change_nothing_where_packs_serve(operator: str) -> None:
    args = random_call(operator, channels=32).args
    op = OPERATORS[operator]
    without, packed = bare(operator, args)
    expected = op.overload(*args, packed.tensors, packed.backend, "cpu")
    assert torch.equal(op.overload(*without, packed.tensors, packed.backend), expected)
    prepared = op.prepare(without[0], without, packed, None)
    assert prepared is not None
    assert torch.equal(prepared.run(without[0]), expected)
    prepared = op.prepare(without[0], without, packed, "eager")
    assert prepared is not None
    unpacked = op.plain(without, packed.tensors, packed.backend)
    assert torch.equal(prepared.run(without[0]), op.overload(*unpacked, None, None, "eager"))


@pytest.mark.parametrize("operator", cases.OPERATORS)
def test_stand_ins_alone_are_nan(operator: str) -> None:
    without, _ = bare(operator, random_call(operator, channels=16).args)
    assert OPERATORS[operator].overload(*without, None, None, "eager").isnan().all()
    weights = [v for v in without if is_stand_in(v)]
    assert {w.untyped_storage().nbytes() for w in weights} == {4}


@pytest.mark.parametrize("operator", cases.OPERATORS)
def test_given_weights_come_before_packed_ones(operator: str) -> None:
    """Only stand-ins are looked up."""
    args = random_call(operator, channels=32).args
    op = OPERATORS[operator]
    _, packed = bare(operator, args)
    expected = op.overload(*args, None, None, "eager")
    assert torch.equal(op.overload(*args, packed.tensors, packed.backend, "eager"), expected)


@pytest.mark.parametrize("operator", cases.OPERATORS)
def test_auto_stays_with_the_packs(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table may know eager to be faster; unpacking for it on every call is not."""
    monkeypatch.setattr(auto, "rank", lambda operator, names, *rest: auto.Ranking(("eager", "cpu")))
    args = random_call(operator, channels=32, height=11).args
    op = OPERATORS[operator]
    monkeypatch.setattr(op, "_plans", {})
    without, packed = bare(operator, args)
    expected = op.overload(*args, packed.tensors, packed.backend, "cpu")
    assert torch.equal(op.overload(*without, packed.tensors, packed.backend), expected)
    choice, _ = dispatch.last_call()
    assert (choice.backend, choice.basis) == ("cpu", auto.ORDER)
    assert "no longer as eager reads them" in choice.reason
    op.overload(*args, packed.tensors, packed.backend)
    assert dispatch.last_call()[0].backend == "eager"


@pytest.mark.parametrize("operator", cases.OPERATORS)
def test_where_the_kernels_cannot_be_loaded(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a program exported elsewhere."""
    args = random_call(operator, channels=32, height=10).args
    op = OPERATORS[operator]
    without, packed = bare(operator, args)
    expected = op.overload(*op.plain(without, packed.tensors, "cpu"), None, None, "eager")
    monkeypatch.setattr(op, "_plans", {})
    monkeypatch.setattr(lowkernels.backends.load("cpu"), "unavailable", lambda device: "no compiler")
    assert torch.equal(op.overload(*without, packed.tensors, packed.backend), expected)
    choice, _ = dispatch.last_call()
    assert (choice.backend, dict(choice.rejected)["cpu"]) == ("eager", "no compiler")


@pytest.mark.parametrize("operator", cases.OPERATORS)
def test_autocast_casts_what_was_packed(operator: str) -> None:
    args = random_call(operator, channels=32).args
    op = OPERATORS[operator]
    without, packed = bare(operator, args)
    unpacked = op.plain(without, packed.tensors, packed.backend)
    with torch.autocast("cpu", torch.bfloat16):
        found = op.overload(*without, packed.tensors, packed.backend)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, op.overload(*unpacked))


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("operator", cases.OPERATORS)
def test_gradients_of_the_input(operator: str, create_graph: bool) -> None:
    x, *rest = random_call(operator, channels=32, height=6, width=5).args
    op = OPERATORS[operator]
    without, packed = bare(operator, (x, *rest))
    unpacked = op.plain(without, packed.tensors, packed.backend)
    found, expected = [], []
    for call, grads in ((without, found), (unpacked, expected)):
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        out = op.overload(leaf, *call[1:], packed.tensors, packed.backend)
        grads.append(torch.autograd.grad(out.square().sum(), leaf, create_graph=create_graph)[0])
    assert torch.equal(found[0], expected[0])
    assert found[0].abs().max() > 0


def test_opcheck() -> None:
    without, packed = bare("lowtention", random_call("lowtention", channels=32, stride=2).args)
    op = OPERATORS["lowtention"]
    weights = [v for v, name in zip(without, op.argument_names, strict=True) if name.endswith(("weight", "bias"))]
    wanted = [i for i, w in enumerate(weights) if w is not None]
    torch.library.opcheck(torch.ops.lowkernels.unpack.default, ("lowtention", "cpu", packed.tensors, weights, wanted))
