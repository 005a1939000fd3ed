"""In eval mode a block computes with folded copies of its parameters; whatever happens to the parameters, the copies follow."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import lowkernels

from .blocks import CASES, FEW, PARITY, Case, assert_follows, assert_same, each

Change = Callable[[Any], None]


def _conv(block: nn.Module) -> nn.Conv2d:
    """The block's first convolution."""
    return next(m for m in block.modules() if type(m) is nn.Conv2d)


def _path_of_conv(block: nn.Module) -> str:
    return next(name for name, m in block.named_modules() if m is _conv(block))


def _other_state(block: nn.Module) -> dict[str, Tensor]:
    return {k: v * 1.25 if v.is_floating_point() else v for k, v in block.state_dict().items()}


def _optimizer_step(block: Any, fused: bool = False) -> None:
    optimizer = torch.optim.SGD(block.parameters(), lr=0.5, fused=fused)
    block(torch.ones(1, _channels(block), 5, 5, dtype=torch.float64)).square().mean().backward()
    optimizer.step()


def _channels(block: Any) -> int:
    norm = next((m for m in block.modules() if isinstance(m, nn.GroupNorm)), None)
    return norm.num_channels if norm is not None else _conv(block).in_channels


def _train_step(block: Any) -> None:
    block.train()
    _optimizer_step(block)
    block.eval()


def _load_into_child(block: Any) -> None:
    _conv(block).load_state_dict({k: v * 1.25 for k, v in _conv(block).state_dict().items()})


def _new_parameter(block: Any) -> None:
    _conv(block).weight = nn.Parameter(_conv(block).weight.detach() * 1.25)


def _data(block: Any) -> None:
    _conv(block).weight.data = _conv(block).weight.data * 1.25


def _statistics(block: Any) -> None:
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.add_(0.5)
            module.running_var.mul_(2)


def _recalibrate(block: Any) -> None:
    """New BatchNorm statistics under an otherwise frozen model, a usual step after averaging or quantising weights."""
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.train()
    with torch.no_grad():
        block(3 * torch.randn(4, _channels(block), 5, 5, dtype=torch.float64) + 1)
    for norm in norms:
        norm.eval()


@torch.no_grad()
def _in_place(block: Any) -> None:
    for parameter in block.parameters():
        parameter.mul_(1.25)


def _vector(block: Any) -> None:
    vector = nn.utils.parameters_to_vector(block.parameters())
    nn.utils.vector_to_parameters(vector * 1.25, block.parameters())


CHANGES: dict[str, Change] = {
    "load_state_dict": lambda b: b.load_state_dict(_other_state(b)),
    "load_state_dict-assign": lambda b: b.load_state_dict(_other_state(b), assign=True),
    "load-into-a-child": _load_into_child,
    "in-place": _in_place,
    "optimizer-step": _optimizer_step,
    # Its kernel does not count what it writes.
    "fused-optimizer-step": lambda b: _optimizer_step(b, fused=True),
    "training-step": _train_step,
    "data-reassigned": _data,
    "new-parameter": _new_parameter,
    "vector_to_parameters": _vector,
    "channels-last": lambda b: (_in_place(b), b.to(memory_format=torch.channels_last)),
    "half-and-back": lambda b: b.half().double(),
}


@pytest.mark.parametrize("change", CHANGES)
@each(CASES)
def test_follows(case: Case, change: str) -> None:
    block = case.block()
    x = case.x()
    with torch.no_grad():
        before = block(x)
    CHANGES[change](block)
    assert_follows(case, block)
    with torch.no_grad():
        assert not torch.equal(block(x), before)


@pytest.mark.parametrize("change", CHANGES)
def test_follows_inside_a_model(change: str) -> None:
    """What is called on the model reaches its blocks."""
    cases = [CASES["conv-like"], CASES["mbconv"], CASES["lowformer-fused-mbconv"]]
    model = nn.Sequential(*(case.block() for case in cases))
    x = cases[0].x()
    model(x)
    CHANGES[change](model)
    with torch.no_grad():
        expected = x
        for case, block in zip(cases, model, strict=True):
            expected = case.plain(block, expected)
        assert_same(model(x), expected)


class Tripled(nn.Module):
    """As LoRA and the like stand in the place of a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * 3


def _stand_in(block: nn.Module) -> None:
    path = _path_of_conv(block)
    parent = block.get_submodule(path.rpartition(".")[0])
    setattr(parent, path.rpartition(".")[2], Tripled(_conv(block)))


def _own_forward(block: nn.Module) -> None:
    conv = _conv(block)
    inner = conv.forward
    conv.forward = lambda x: inner(x) * 3  # type: ignore[method-assign]


@pytest.mark.parametrize("change", [_stand_in, _own_forward])
@each(CASES)
def test_children_that_compute_something_else_are_called(case: Case, change: Change) -> None:
    block, plain = case.block(), case.make().double().eval()
    plain.load_state_dict(block.state_dict())
    x = case.x()
    block(x)
    change(block)
    change(plain)
    for _ in range(2):
        with torch.no_grad():
            assert_same(block(x), plain(x))
        assert_same(block(x), plain(x))
        block.train().eval()
    with torch.no_grad():
        assert_same(copy.deepcopy(block)(x), plain(x))
    if change is _stand_in:
        with pytest.raises(lowkernels.InputError, match="is Tripled"):
            lowkernels.repack(block)


@each(FEW)
def test_repack_takes_children_of_the_same_kind(case: Case) -> None:
    block, x = case.block(), case.x()
    path = _path_of_conv(block)
    other = copy.deepcopy(_conv(block))
    with torch.no_grad():
        other.weight *= 2
        setattr(block.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], other)
        assert_follows(case, block)
        lowkernels.repack(block)
        assert block.has_its_children()
        assert_follows(case, block)
        assert block(x).isfinite().all()


@pytest.mark.parametrize("change", [_statistics, _recalibrate], ids=["in-place", "recalibrated"])
@each({k: v for k, v in CASES.items() if any(isinstance(m, nn.BatchNorm2d) for m in v.make().modules())})
def test_follows_batch_norm_statistics(case: Case, change: Change) -> None:
    block = case.block()
    x = case.x()
    with torch.no_grad():
        before = block(x)
        change(block)
        assert_follows(case, block)
        assert not torch.equal(block(x), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each(FEW)
def test_follows_a_dtype(case: Case, dtype: torch.dtype) -> None:
    """The result is that of a block which has had this dtype from the beginning."""
    convert = {torch.float16: "half", torch.bfloat16: "bfloat16", torch.float32: "float"}[dtype]
    block = case.block()
    block(case.x())
    getattr(block, convert)()
    assert {t.dtype for t in (*block.buffers(), *block._kept_weights()) if t is not None and t.is_floating_point()} == {dtype}
    fresh = case.block(dtype)
    with torch.no_grad():
        out = block(case.x(dtype))
        assert out.dtype == dtype
        assert torch.equal(out, fresh(case.x(dtype)))
    block.double().load_state_dict(case.block().state_dict())
    assert_follows(case, block)


def _round_trip_pickle(block: Any) -> Any:
    return pickle.loads(pickle.dumps(block))


def _round_trip_torch(block: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(block, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("mode", ["train", "eval", "eval-used"])
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, _round_trip_pickle, _round_trip_torch], ids=["deepcopy", "pickle", "torch.save"]
)
@each({k: v for k, v in CASES.items() if k not in ("mobilenet-like", "separable-like", "conv-like")} | FEW)
def test_copies_are_whole_and_independent(case: Case, duplicate: Callable[[Any], Any], mode: str) -> None:
    block = case.make().double()
    if mode != "train":
        block.eval()
    if mode == "eval-used":
        block(case.x())
    twin = duplicate(block)
    assert list(twin.state_dict()) == list(block.state_dict())
    assert twin.training == block.training
    assert not {t.data_ptr() for t in twin.state_dict().values()} & {t.data_ptr() for t in block.state_dict().values()}
    block.eval()
    twin.eval()
    assert_follows(case, twin)
    _in_place(twin)
    assert_follows(case, twin)
    assert_follows(case, block)
    assert not torch.equal(twin(case.x()), block(case.x()))
    # the copy trains by its own children, not by those of the block it was copied from
    twin.train()
    before = {k: v.clone() for k, v in block.state_dict().items()}
    twin(case.x())
    assert all(torch.equal(v, before[k]) for k, v in block.state_dict().items())


def test_a_pickle_holds_the_weights_once() -> None:
    """What can be made again is not saved."""
    case = CASES["fused-mbconv"]
    unused, used = case.make().double(), case.block()
    used(case.x())
    used.train()
    size = len(pickle.dumps(unused))
    assert len(pickle.dumps(used.eval())) <= size + 200


@each(FEW)
def test_functional_call(case: Case) -> None:
    block = case.block()
    x = case.x()
    with torch.no_grad():
        before = block(x)
        other = {k: v * 1.25 if v.is_floating_point() else v for k, v in block.state_dict().items()}
        found = torch.func.functional_call(block, other, (x,))
        changed = copy.deepcopy(block)
        changed.load_state_dict(other)
        assert_same(found, case.plain(changed, x))
        assert torch.equal(block(x), before)


@each(FEW)
def test_functional_call_carries_gradients(case: Case) -> None:
    block = case.block()
    # Contiguous for the sake of the ordinary computation: PyTorch's own GroupNorm cannot train on channels_last here.
    x = case.x().contiguous()
    given = {k: (v.detach() * 1.25).requires_grad_() for k, v in block.named_parameters()}
    out = torch.func.functional_call(block, given, (x,))
    grads = torch.autograd.grad(out.square().sum(), list(given.values()))
    changed = copy.deepcopy(block)
    changed.load_state_dict({k: v.detach() for k, v in given.items()}, strict=False)
    expected = torch.autograd.grad(case.plain(changed, x).square().sum(), list(changed.parameters()))
    for a, b in zip(grads, expected, strict=True):
        assert_same(a, b)


@each(FEW)
def test_replaced_child_after_repack(case: Case) -> None:
    block = case.block()
    block(case.x())
    path = _path_of_conv(block)
    parent, _, name = path.rpartition(".")
    fresh = copy.deepcopy(_conv(block))
    with torch.no_grad():
        fresh.weight.mul_(2)
    block.get_submodule(parent)._modules[name] = fresh
    if block.original is not None and not parent:
        block.original._modules[name] = fresh
    lowkernels.repack(block)
    assert_follows(case, block)


@each(FEW)
def test_writes_that_leave_no_trace_after_repack(case: Case) -> None:
    """Through .data, .detach() and NumPy: no version counter sees them, which is documented."""
    block = case.block()
    with torch.no_grad():
        before = block(case.x())
        _conv(block).weight.data.mul_(1.25)
        _conv(block).weight.detach().numpy()[0] += 1
    assert lowkernels.repack(block) is block
    assert_follows(case, block)
    assert not torch.equal(block(case.x()), before)


@each(FEW)
def test_made_in_inference_mode(case: Case) -> None:
    with torch.inference_mode():
        block = case.block()
        first = block(case.x())
    with torch.no_grad():
        assert_same(first, case.plain(block, case.x()))
    with torch.inference_mode():
        _conv(block).weight.mul_(1.25)
        lowkernels.repack(block)
        assert_same(block(case.x()), case.plain(block, case.x()))
    with torch.no_grad():
        assert_same(block(case.x()), case.plain(block, case.x()))


@each(FEW)
def test_first_used_in_inference_mode(case: Case) -> None:
    """What is made there serves outside of it, with gradients too."""
    block = case.block()
    with torch.inference_mode():
        inside = block(case.x())
    x = case.x().requires_grad_()
    out = block(x)
    assert torch.equal(out, inside)
    grads = torch.autograd.grad(out.square().sum(), [x, *block.parameters()])
    for a, b in zip(grads, torch.autograd.grad(case.plain(block, x).square().sum(), [x, *block.parameters()]), strict=True):
        assert_same(a, b)
    with torch.inference_mode():
        _in_place(block)
        assert_same(block(case.x()), case.plain(block, case.x()))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@each(FEW)
def test_parametrized_afterwards(case: Case) -> None:
    block = case.block()
    block(case.x())
    parametrize.register_parametrization(_conv(block), "weight", Doubled())
    assert_follows(case, block)
    parametrized = next(m for m in block.modules() if parametrize.is_parametrized(m))
    with torch.no_grad():
        parametrized.parametrizations.weight.original.mul_(1.25)
    assert_follows(case, block)
    parametrize.remove_parametrizations(parametrized, "weight")
    assert_follows(case, block)


@each(FEW)
def test_pruned_afterwards(case: Case) -> None:
    block = case.block()
    block(case.x())
    prune.random_unstructured(_conv(block), "weight", 0.5)
    assert_follows(case, block)
    prune.remove(_conv(block), "weight")
    assert_follows(case, block)


def test_shared_weights_are_followed_from_both_sides() -> None:
    case = CASES["mbconv"]
    first, second = case.block(), case.block()
    second.expand.weight = first.expand.weight
    for block in (first, second):
        block(case.x())
    with torch.no_grad():
        first.expand.weight.mul_(1.5)
    assert_follows(case, first)
    assert_follows(case, second)


def test_averaged_model() -> None:
    """Exponential moving averages write into a deep copy's parameters and buffers."""
    case = CASES["mobilenet-like"]
    model = nn.Sequential(case.block())
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    for _ in range(2):
        _in_place(model)
        averaged.update_parameters(model)
    assert_follows(case, averaged.module[0])
    assert (averaged.module[0](case.x()) - model[0](case.x())).abs().max() > PARITY


def test_meta_then_empty_then_loaded() -> None:
    case = CASES["mobilenet-like"]
    state = case.block().state_dict()
    block = case.make().double().eval().to("meta")
    assert block(case.x().to("meta")).shape == case.x().shape
    block.to_empty(device="cpu")
    block.load_state_dict(state)
    assert_follows(case, block)


def test_meta_then_assigned() -> None:
    case = CASES["lowformer-attention"]
    state = case.block().state_dict()
    block = case.make().eval().to("meta")
    block.load_state_dict(state, assign=True)
    assert_follows(case, block)
