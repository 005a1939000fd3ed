"""Blocks that follow one another, as one call: the same bits, and nothing that listens in between is passed over."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lowformer
import lowkernels
from lowkernels import backends
from lowkernels.nn import Chain, ConvNormAct, FusedBlock, FusedMBConv, GroupNormMLP, Lowtention, MBConv, SeparableConv, chain_blocks

from .blocks import randomize


class Pair(nn.Module):
    """Composes its children, with code of its own."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.between, self.second = first, nn.Identity(), second
        self.width = 8

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.between(self.first(x)))
        return y


def _net() -> nn.Sequential:
    """Every operator, in modules within modules."""
    torch.manual_seed(0)
    net = nn.Sequential(
        ConvNormAct(3, 8, stride=2),
        nn.Sequential(FusedMBConv(8, 8), nn.Identity(), SeparableConv(8, 8, residual=True)),
        Pair(Lowtention(8, num_heads=2, head_dim=4), GroupNormMLP(8)),
        MBConv(8, 16, stride=2),
        ConvNormAct(16, 16, residual=True),
        ConvNormAct(16, 12, 1, pool=True),
    )
    return randomize(net)  # type: ignore[return-value]


def _chained(net: nn.Sequential | None = None) -> nn.Sequential:
    """In eval mode and in a module of its own, so that the whole is one chain."""
    model = nn.Sequential(_net() if net is None else net).eval()
    for parent, name, chain in chain_blocks(model):
        setattr(parent, name, chain)
    assert isinstance(model[0], Chain)
    return model


def _x(batch: int = 2, size: int = 13) -> Tensor:
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=torch.channels_last)


@contextmanager
def _counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FusedBlock]]:
    """The blocks that are called one by one within."""
    called: list[FusedBlock] = []
    forward = FusedBlock.forward

    def counting(self: FusedBlock, x: Tensor) -> Tensor:
        called.append(self)
        return forward(self, x)

    with monkeypatch.context() as patch:
        patch.setattr(FusedBlock, "forward", counting)
        yield called


def _blocks(model: nn.Module) -> list[FusedBlock]:
    return [m for m in model.modules() if isinstance(m, FusedBlock)]


def _one_by_one(model: nn.Module, x: Tensor) -> Tensor:
    """What the model gives without chains."""
    for block in _blocks(model):
        x = block(x)
    return x


@pytest.fixture(autouse=True)
def native() -> None:
    reason = backends.load("cpu").unavailable("cpu")
    if reason is not None:
        pytest.skip(f"chains are of the CPU kernels: {reason}")


def test_one_call_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = _chained(), _x()
    with torch.inference_mode():
        expected = _one_by_one(model, x)
        assert torch.equal(model(x), expected)
        with _counted(monkeypatch) as called:
            assert torch.equal(model(x), expected)
            assert torch.equal(model(x.contiguous()), expected), "the first NCHW input is copied, and seen one by one"
            assert len(called) == len(_blocks(model))
            called.clear()
            assert torch.equal(model(x.contiguous()), expected)
            assert not called
    assert expected.abs().max() > 0


@pytest.mark.parametrize("size", [5, 13])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_other_shapes(batch: int, size: int) -> None:
    model, x = _chained(), _x(batch, size)
    with torch.no_grad():
        expected = _one_by_one(model, x)
        for _ in range(2):
            found = model(x)
            assert torch.equal(found, expected)
            assert found.stride() == expected.stride()


def test_whole_models_are_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lowformer.create_model("lowformer_b0").eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        first = model(x)
        with _counted(monkeypatch) as called:
            assert torch.equal(model(x), first)
        in_chains = {id(b) for m in model.modules() if isinstance(m, Chain) for b in _blocks(m)}
        assert not [b for b in called if id(b) in in_chains]
    assert len(in_chains) == len(_blocks(model)) - 3, "all but the head's convolution and two linear layers"
    assert all(row.ran_on == "cpu" for row in lowkernels.report(model) if row.replaced)


def _replace_child(model: Any) -> None:
    model[0][4] = randomize(ConvNormAct(16, 16, 5)).eval()


def _replace_inner_child(model: Any) -> None:
    model[0][2].second = randomize(GroupNormMLP(8, act="relu")).eval()


def _in_place(model: Any) -> None:
    with torch.no_grad():
        _blocks(model)[2].pw.weight.mul_(1.5)  # type: ignore[operator, union-attr]


def _load(model: Any) -> None:
    model.load_state_dict({k: v * 1.25 if v.is_floating_point() else v for k, v in model.state_dict().items()})


def _data(model: Any) -> None:
    model[0][0].conv.weight.data = model[0][0].conv.weight.data * 1.5


def _while_in_another_dtype(model: Any) -> None:
    """The blocks' weights are made for bf16, the parameters change, and they are made for bf16 again."""
    for _ in range(2):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model(_x())
        _in_place(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(_x())


@pytest.mark.parametrize("change", [_replace_child, _replace_inner_child, _in_place, _load, _data, _while_in_another_dtype])
def test_follows(change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = _chained(), _x()
    with torch.no_grad():
        before = [model(x) for _ in range(2)][1]
    change(model)
    with torch.no_grad():
        after = model(x)
        assert torch.equal(after, _one_by_one(model, x))
        assert not torch.equal(after, before)
        model(x)
        with _counted(monkeypatch) as called:
            assert torch.equal(model(x), after)
        assert not called, "what changed is part of the next call"


@pytest.mark.parametrize("place", ["block", "child of a block", "chain in the chain", "everywhere"])
def test_hooks_run(place: str) -> None:
    model, x, seen = _chained(), _x(), []
    with torch.no_grad():
        for _ in range(2):
            model(x)
        note = lambda *args: seen.append(args[0])  # noqa: E731
        if place == "everywhere":
            handle = nn.modules.module.register_module_forward_hook(note)
        else:
            chain: Any = model[0]
            module = {"block": chain[1][2], "child of a block": chain[0].conv, "chain in the chain": chain[2]}[place]
            handle = module.register_forward_hook(note)
        model(x)
        handle.remove()
        assert seen
        count = len(seen)
        model(x)
        assert len(seen) == count


def test_children_left_in_train_mode() -> None:
    model, x = _chained(), _x()
    with torch.no_grad():
        for _ in range(2):
            model(x)
        norm: Any = _blocks(model)[0].norm
        norm.train()
        model(x)
        assert norm.num_batches_tracked == 1
        norm.eval()
        assert torch.equal(model(x), _one_by_one(model, x))


def test_gradients() -> None:
    model, x = _chained(), _x()
    with torch.no_grad():
        for _ in range(2):
            model(x)
    model(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model[0][0].conv.parameters())
    x.requires_grad_()
    lowkernels.freeze(model)
    model(x).square().mean().backward()
    assert x.grad is not None


def test_requests_for_other_backends() -> None:
    model, x = _chained(), _x()
    with torch.no_grad():
        for _ in range(2):
            model(x)
        with lowkernels.use_backend("eager"):
            for _ in range(2):
                model(x)
                assert {b.last_call[0].backend for b in _blocks(model) if b.last_call} == {"eager"}
        model(x)
        assert {b.last_call[0].backend for b in _blocks(model) if b.last_call} == {"cpu"}
        for _ in range(2):
            _blocks(model)[3].backend = "eager"
            model(x)
            assert [b.last_call[0].backend for b in _blocks(model) if b.last_call].count("eager") == 1


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_modes_see_the_operators() -> None:
    model, x = _chained(), _x()
    with torch.no_grad():
        for _ in range(2):
            model(x)
        with _Seen() as seen:
            model(x)
    assert [n for n in seen.names if n.startswith("lowkernels::")] == [f"lowkernels::{b.operator_name}" for b in _blocks(model)]


def test_train_and_back() -> None:
    model, x = _chained(), _x()
    with torch.no_grad():
        expected = [model(x) for _ in range(2)][1]
        model.train()
        assert model[0].original.training
        model(x)
        model.eval()
        assert not model[0].original.training
        model.load_state_dict(_chained().state_dict())
        assert torch.equal(model(x), expected)


def _pickled(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


_COPIES = {"deepcopy": copy.deepcopy, "save": _pickled, "pickle": lambda m: pickle.loads(pickle.dumps(m))}


@pytest.mark.parametrize("copied", _COPIES.values(), ids=_COPIES)
def test_copies(copied: Callable[[nn.Module], Any]) -> None:
    model, x = _chained(), _x()
    with torch.no_grad():
        expected = [model(x) for _ in range(2)][1]
        twin = copied(model)
        _in_place(model)
        for _ in range(2):
            assert torch.equal(twin(x), expected)
    chain = twin[0]
    assert chain._modules is chain.original._modules
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}


def test_moves_to_another_dtype() -> None:
    model, x = _chained(), _x()
    with torch.no_grad():
        for _ in range(2):
            model(x)
        model.bfloat16()
        for _ in range(2):
            found = model(x.bfloat16())
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, _one_by_one(model, x.bfloat16()))


def test_compiled() -> None:
    model, x = _chained(), _x()
    with torch.no_grad():
        expected = [model(x) for _ in range(2)][1]
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), expected)
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=1)},))
        assert torch.equal(exported.module()(x), expected)


def test_looks_like_what_it_replaced() -> None:
    plain = nn.Sequential(_net()).eval()
    names, net, pair = list(plain.state_dict()), plain[0], plain[0][2]
    for parent, name, chain in chain_blocks(plain):
        setattr(parent, name, chain)
    assert list(plain.state_dict()) == names
    assert len(plain[0]) == 6
    assert plain[0][2].width == 8
    assert plain[0][2].original is pair
    with pytest.raises(AttributeError, match="depth"):
        _ = plain[0].depth
    lowkernels.restore(plain)
    assert plain[0] is net
    assert plain[0][2] is pair
    assert type(plain[0]) is nn.Sequential


class _Adds(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class _Skips(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(x)


class _Twice(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


class _Residual(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) + x


class _Backwards(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.first(self.between(self.second(x)))


class _Aside(Pair):
    def forward(self, x: Tensor) -> Tensor:
        self.first(x)
        return self.second(self.between(x))


class _BySize(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[2] > 4 else x


class _Returns(Pair):
    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        return x


class _Tuple(Pair):
    def forward(self, x: Tensor) -> Any:
        return (super().forward(x),)


class _Knows(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x=x)))


@pytest.mark.parametrize("kind", [_Adds, _Skips, _Twice, _Residual, _Backwards, _Aside, _BySize, _Returns, _Tuple, _Knows])
def test_what_does_more_than_hand_on_is_no_chain(kind: type[Pair]) -> None:
    pair = kind(FusedMBConv(8, 8), GroupNormMLP(8)).eval()
    children = dict(pair._modules)
    assert not list(chain_blocks(nn.ModuleList([pair])))
    assert dict(pair._modules) == children
    assert not pair.training


def _with_hook(pair: Pair) -> None:
    pair.register_forward_hook(lambda *args: None)


def _with_parameter(pair: Pair) -> None:
    pair.scale = nn.Parameter(torch.ones(()))


def _with_other_child(pair: Pair) -> None:
    pair.between = nn.Dropout()  # type: ignore[assignment]


def _with_shared_child(pair: Pair) -> None:
    pair.second = pair.first


@pytest.mark.parametrize("change", [_with_hook, _with_parameter, _with_other_child, _with_shared_child])
def test_what_has_more_than_blocks_is_no_chain(change: Callable[[Pair], None]) -> None:
    pair = Pair(FusedMBConv(8, 8), FusedMBConv(8, 8)).eval()
    assert [name for _, name, _ in chain_blocks(nn.ModuleList([pair]))] == ["0"]
    change(pair)
    assert not list(chain_blocks(nn.ModuleList([pair])))
