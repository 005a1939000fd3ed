"""freeze(): for deployment, only what the operators read stays."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn

import lowkernels
from lowkernels import FrozenError

from .blocks import CASES, FEW, STANDALONE, Case, assert_same, each


def _bytes(module: nn.Module) -> int:
    return sum(t.untyped_storage().nbytes() for t in [*module.parameters(), *module.buffers()])


@each(CASES)
def test_same_outputs_without_parameters(case: Case) -> None:
    block = case.block()
    x = case.x()
    with torch.no_grad():
        expected = block(x)
    assert lowkernels.freeze(block) is block
    assert block.frozen
    assert torch.equal(block(x), expected)
    assert list(block.parameters()) == []
    assert list(block.children()) == []
    assert block.state_dict() == {}
    assert block.original is None
    assert "frozen" in repr(block)


@each(STANDALONE)
def test_original_weights_are_released(case: Case) -> None:
    block = case.block()
    folded = sum(w.numel() * w.element_size() for w in block._kept_weights() if w is not None)
    originals = [weakref.ref(t) for t in [*block.parameters(), *block.state_dict(keep_vars=True).values()]]
    assert _bytes(block) >= folded
    lowkernels.freeze(block)
    gc.collect()
    assert [ref() for ref in originals if ref() is not None] == []
    assert _bytes(block) == folded


@each(FEW)
def test_training_and_repacking_are_refused(case: Case) -> None:
    block = lowkernels.freeze(case.block())
    name = rf"lowkernels\.nn\.{type(block).__name__}"
    with pytest.raises(FrozenError, match=rf"{name}: was frozen, so it cannot train"):
        block.train()
    with pytest.raises(FrozenError, match=rf"{name}: was frozen, so there are no parameters to repack from"):
        lowkernels.repack(block)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict"):
        block.load_state_dict(case.block().state_dict())
    assert block.eval() is block
    assert block.load_state_dict({}) is not None
    assert lowkernels.freeze(block).frozen
    assert not block.training


@each(FEW)
def test_moves_to_a_dtype(case: Case) -> None:
    block = case.block(torch.float32)
    x = case.x()
    with torch.no_grad():
        expected = block(x.float())
        lowkernels.freeze(block).double()
        assert {b.dtype for b in block.buffers()} == {torch.float64}
        wide = block(x)
        assert wide.dtype == torch.float64
        assert (wide - expected).abs().max() <= 64 * torch.finfo(torch.float32).eps * expected.abs().max()
        block.bfloat16()
        assert block(x.bfloat16()).dtype == torch.bfloat16
        block.to("meta")
        assert block(x.bfloat16().to("meta")).shape == expected.shape


@each(FEW)
def test_copies(case: Case) -> None:
    block = lowkernels.freeze(case.block())
    x = case.x()
    expected = block(x)
    buffer = io.BytesIO()
    torch.save(block, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), torch.load(buffer, weights_only=False)):
        assert twin.frozen
        assert torch.equal(twin(x), expected)
        with pytest.raises(FrozenError):
            twin.train()


@each(FEW)
def test_gradients_of_the_input_and_autocast(case: Case) -> None:
    block = case.block()
    x = case.x().requires_grad_()
    (expected,) = torch.autograd.grad(block(x).sum(), x)
    lowkernels.freeze(block)
    (found,) = torch.autograd.grad(block(x).sum(), x)
    assert_same(found, expected)
    block.float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = block(x.float())
        assert torch.equal(low, copy.deepcopy(block).bfloat16()(x.bfloat16()))


@each(FEW)
def test_compile_and_export(case: Case) -> None:
    block = lowkernels.freeze(case.block())
    x = case.x()
    expected = block(x)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(block, backend="aot_eager", fullgraph=True)(x), expected)
    assert torch.equal(torch.export.export(block, (x,)).module()(x), expected)


def test_what_cannot_be_frozen_leaves_the_model_whole() -> None:
    case = CASES["mobilenet-like"]
    x = case.x()

    def in_train_mode(block: nn.Module) -> None:
        block.train()

    def norm_in_train_mode(block: nn.Module) -> None:
        next(m for m in block.modules() if isinstance(m, nn.BatchNorm2d)).train()

    def hooked(block: nn.Module) -> None:
        next(m for m in block.modules() if isinstance(m, nn.BatchNorm2d)).register_forward_hook(lambda *_: None)

    def without_data(block: nn.Module) -> None:
        block.to("meta")

    for spoil, message in (
        (in_train_mode, "is in train mode"),
        (norm_in_train_mode, "or a child of it is"),
        (hooked, "has hooks on its children"),
        (without_data, "parameters without data"),
    ):
        model = nn.Sequential(case.block(), case.block())
        spoil(model[1])
        with pytest.raises(FrozenError, match=rf"lowkernels\.nn\.MBConv: .*{message}"):
            lowkernels.freeze(model)
        assert not any(block.frozen for block in model)
        assert_same(model[0](x), case.plain(model[0], x))


def test_a_model_of_blocks_and_others() -> None:
    model = nn.Sequential(CASES["conv-like"].block(), nn.Conv2d(4, 4, 1).double(), CASES["mbconv"].block())
    x = CASES["mbconv"].x()
    expected: Tensor = model(x)
    lowkernels.freeze(model)
    assert torch.equal(model(x), expected)
    assert list(model.state_dict()) == ["1.weight", "1.bias"]
    with pytest.raises(FrozenError):
        model.train()
