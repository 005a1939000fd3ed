"""A model's call as one call: what it returns, what it follows, and which models are left alone."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lowformer
import lowkernels
from lowkernels import backends
from lowkernels.backends.cpu import build
from lowkernels.nn import ConvNormAct, FusedBlock, FusedMBConv, GroupNormMLP, Linear, chain_blocks, make_whole, unmake_whole
from lowkernels.ops.activations import ACTIVATIONS, activate
from lowkernels.testing import assert_within_budget, error_budget, measure_error

from .blocks import randomize


class Net(nn.Module):
    """A classifier in the usual shape, with most of what may stand between blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(ConvNormAct(3, 8, stride=2), GroupNormMLP(8))
        self.last = FusedMBConv(8, 24)
        self.pool, self.norm, self.act = nn.AdaptiveAvgPool2d(1), nn.LayerNorm(24), nn.GELU()
        self.hidden, self.drop, self.head = nn.Linear(24, 20, bias=False), nn.Dropout(0.5), nn.Linear(20, 8)
        self.rate = 0.1

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(torch.flatten(self.pool(self.last(self.body(x))), 1)))
        x = F.hardswish(self.hidden(self.drop(x)))
        y: Tensor = self.head(F.dropout(x, self.rate, self.training))
        return y


def _net(dtype: torch.dtype = torch.float32, kind: Callable[[], nn.Module] = Net) -> Any:
    torch.manual_seed(0)
    model: Any = randomize(kind()).eval()
    with torch.no_grad():
        model.norm.weight.uniform_(0.5, 1.5)
        model.norm.bias.uniform_(-0.5, 0.5)
    model.hidden, model.head = Linear(model.hidden), Linear(model.head)
    for parent, name, chain in chain_blocks(model):
        setattr(parent, name, chain)
    return model.to(dtype)


def _whole(dtype: torch.dtype = torch.float32) -> Any:
    model = _net(dtype)
    assert make_whole(model)
    return model


def _x(batch: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(batch, 3, 13, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.to(dtype, memory_format=torch.channels_last)


# The longest sum of a Net is FusedMBConv's, over 3 x 3 x 8.
_LONGEST = 72
# One image has eight numbers for an output, and eager PyTorch is sometimes lucky with all of them.
_IMAGES = 8


def _each(run: Callable[[Tensor], Tensor], x: Tensor, batch: int = 1) -> Tensor:
    """The outputs of calls with a few images each."""
    return torch.cat([run(images) for images in x.split(batch)])


def _expected(x: Tensor, net: Callable[[], Any] = _net) -> tuple[Tensor, Tensor]:
    """What eager PyTorch gives in the dtype of ``x``, and in float64."""
    with torch.no_grad(), lowkernels.use_backend("eager"):
        return net().to(x.dtype)(x), net().to(x.dtype).double()(x.double())


class _Calls:
    """Counts the modules and blocks called within."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for kind in (FusedBlock, nn.LayerNorm):
            monkeypatch.setattr(kind, "forward", self._counting(kind.forward))

    def _counting(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counting(*args: Any) -> Tensor:
            self.count += 1
            return forward(*args)

        return counting


@pytest.fixture(autouse=True)
def native() -> None:
    reason = backends.load("cpu").unavailable("cpu") or build.load()
    if reason is not None:
        pytest.skip(f"calls of whole models are of the CPU kernels: {reason}")


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_call_gives_what_the_modules_give(dtype: torch.dtype, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = _whole(dtype), _x(batch, dtype)
    with torch.inference_mode():
        first = model(x)
        modules = model._call_impl(x)
        calls = _Calls(monkeypatch)
        for _ in range(2):
            assert torch.equal(model(x), first)
    assert calls.count == 0
    assert (first.shape, first.stride(), first.dtype) == (modules.shape, modules.stride(), dtype)
    x = _x(_IMAGES, dtype)
    with torch.inference_mode():
        assert_within_budget(_each(model, x, batch), *_expected(x), _LONGEST)


def test_larger_batches_are_the_models_own() -> None:
    model, x = _whole(), _x(5)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(x), model._call_impl(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 7, 16, 33, 1600, 9001])
def test_functions_between_blocks(channels: int, dtype: torch.dtype) -> None:
    """Each against float64, within the error budget."""
    generator = torch.Generator().manual_seed(channels)
    rows = (torch.randn(3, channels, generator=generator, dtype=torch.float64) * 2 + 0.5).to(dtype)
    image = torch.randn(2, channels, 5, 3, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = (torch.randn(channels, generator=generator).to(dtype) for _ in range(2))
    terms = {"layer_norm": channels, "pool": 15}

    def check(name: str, x: Tensor, tensors: list[Tensor], numbers: list[int], reals: list[float], theirs: Any) -> None:
        chain = torch.classes.lowkernels_cpu.Chain()
        chain.add(name, [t.float() for t in tensors], numbers, reals)
        out, expected, truth = chain.run(x), theirs(x, *tensors), theirs(x.double(), *(t.double() for t in tensors))
        assert (out.shape, out.dtype) == (expected.shape, dtype)
        assert_within_budget(out, expected, truth, terms.get(name, 1), name)

    check("layer_norm", rows, [weight, bias], [], [1e-5], lambda x, w, b: F.layer_norm(x, (channels,), w, b, 1e-5))
    check("pool", image, [], [], [], lambda x: F.adaptive_avg_pool2d(x, 1))
    check("flatten", F.adaptive_avg_pool2d(image, 1), [], [], [], lambda x: x.flatten(1))
    for number, act in enumerate(ACTIVATIONS):
        check("activation", rows, [], [number], [], lambda x, act=act: activate(x, act))
        check("activation", image, [], [number], [], lambda x, act=act: activate(x, act))


@pytest.mark.parametrize("size", [7, 56, 112])
@pytest.mark.parametrize("value", [0.1, 0.7])
def test_many_equal_pixels(value: float, size: int) -> None:
    """Rounding errors of a long sum of equal terms all have one sign."""
    chain = torch.classes.lowkernels_cpu.Chain()
    chain.add("pool", [], [], [])
    x = torch.full((1, 20, size, size), value).contiguous(memory_format=torch.channels_last)
    assert_within_budget(chain.run(x), F.adaptive_avg_pool2d(x, 1), x.double().mean((2, 3), keepdim=True), size * size)


def test_functions_refuse_what_they_are_not_made_for() -> None:
    chain: Any = torch.classes.lowkernels_cpu.Chain()
    with pytest.raises(RuntimeError, match="layer_norm"):
        chain.add("layer_norm", [torch.ones(3)], [], [1e-5])
    with pytest.raises(RuntimeError, match="Chain"):
        chain.add("pool", [], [1], [])
    chain.add("layer_norm", [torch.ones(3), torch.ones(3)], [], [1e-5])
    with pytest.raises(RuntimeError, match="norm_act"):
        chain.run(torch.ones(2, 4))
    pool: Any = torch.classes.lowkernels_cpu.Chain()
    pool.add("pool", [], [], [])
    with pytest.raises(RuntimeError, match="NHWC"):
        pool.run(torch.ones(2, 4, 3, 3))


def _norm_weight(model: Any) -> None:
    with torch.no_grad():
        model.norm.weight.mul_(1.5)


def _norm_eps(model: Any) -> None:
    model.norm.eps = 0.5


def _new_norm(model: Any) -> None:
    model.norm = nn.LayerNorm(24, elementwise_affine=False).eval()


def _new_parameter(model: Any) -> None:
    model.norm.bias = nn.Parameter(torch.ones(24))


def _data(model: Any) -> None:
    model.norm.bias.data = torch.ones(24)


def _new_head(model: Any) -> None:
    model.head = nn.Linear(20, 8).eval()


def _no_drop(model: Any) -> None:
    model.act = nn.ReLU().eval()


def _block(model: Any) -> None:
    with torch.no_grad():
        model.last.conv.weight.mul_(1.5)


def _in_chain(model: Any) -> None:
    model.body[1] = randomize(GroupNormMLP(8)).eval()


def _forward(model: Any) -> None:
    model.forward = lambda x: Net.forward(model, x) * 2


def _forward_of(path: str) -> Callable[[Any], None]:
    """A forward of its own for a module that a call of the whole model passes over."""

    def change(model: Any) -> None:
        module = model.get_submodule(path)
        inner = module.forward
        module.forward = lambda x: inner(x) * 2

    return change


def _load(model: Any) -> None:
    model.load_state_dict({k: v * 1.25 if v.is_floating_point() else v for k, v in model.state_dict().items()})


_CHANGES = [_norm_weight, _norm_eps, _new_norm, _new_parameter, _data, _new_head, _no_drop, _block, _in_chain, _forward, _load]
_CHANGES += [_forward_of(path) for path in ("norm", "body", "body.1", "last", "last.conv")]


@pytest.mark.parametrize("change", _CHANGES)
def test_follows(change: Callable[[Any], None]) -> None:
    model, x = _whole(), _x(_IMAGES)

    def changed() -> Any:
        net = _net()
        change(net)
        return net

    with torch.no_grad():
        before = [_each(model, x) for _ in range(2)][1]
        change(model)
        found = [_each(model, x) for _ in range(3)]
    assert all(torch.equal(f, found[0]) for f in found)
    eager, truth = _expected(x, changed)
    assert_within_budget(found[0], eager, truth, _LONGEST)
    budget = error_budget(measure_error(eager, truth), truth, x.dtype, accumulation_length=_LONGEST)
    assert not measure_error(before, truth).within(budget), "the change makes no difference"


@pytest.mark.parametrize("place", ["", "norm", "body", "body.1", "last.conv", "act"])
def test_hooks_run(place: str) -> None:
    model, x, seen = _whole(), _x(), []
    with torch.no_grad():
        for _ in range(2):
            model(x)
        handle = model.get_submodule(place).register_forward_hook(lambda *args: seen.append(args[0]))
        for _ in range(2):
            model(x)
        assert len(seen) == 2
        handle.remove()
        model(x)
        assert len(seen) == 2


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_who_listens_hears_the_modules() -> None:
    model, x = _whole(), _x()
    with torch.no_grad():
        for _ in range(2):
            model(x)
        with _Seen() as seen:
            model(x)
        assert "aten::native_layer_norm" in seen.names
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(x), model._call_impl(x))
    model(x).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.train()
    assert not torch.equal(model(x.expand(4, -1, -1, -1)), model(x.expand(4, -1, -1, -1))), "dropout acts"


def test_keyword_arguments_and_more_of_them() -> None:
    model, x = _whole(), _x()
    with torch.no_grad():
        for _ in range(2):
            model(x)
        assert torch.equal(model(x=x), model._call_impl(x))
        with pytest.raises(TypeError):
            model(x, x)
        with pytest.raises(lowkernels.InputError):
            model(x[0])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_on_their_own(copied: Callable[[nn.Module], Any]) -> None:
    model, x = _whole(), _x()
    with torch.no_grad():
        expected = [model(x) for _ in range(2)][1]
        modules = model._call_impl(x)
        twin = copied(model)
        _norm_weight(model)
        assert torch.equal(twin(x), modules)
        assert make_whole(twin)
        for _ in range(2):
            assert torch.equal(twin(x), expected)


class _CopiesItself(Net):
    def __deepcopy__(self, memo: dict[int, Any]) -> _CopiesItself:
        twin = object.__new__(_CopiesItself)
        memo[id(self)] = twin
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin


def test_copies_of_all_attributes_are_on_their_own() -> None:
    model, x = _net(kind=_CopiesItself), _x()
    assert make_whole(model)
    with torch.no_grad():
        expected = [model(x) for _ in range(2)][1]
        modules = model._call_impl(x)
        twin = copy.deepcopy(model)
        _norm_weight(model)
        assert torch.equal(twin(x), modules)
        assert make_whole(twin)
        for _ in range(2):
            assert torch.equal(twin(x), expected)


def test_freed_with_its_last_reference() -> None:
    """And not when the collector comes by: packed weights are large."""
    model, x = _whole(), _x()
    with torch.no_grad():
        for _ in range(2):
            model(x)
    watched = [weakref.ref(value) for value in (*model.modules(), *model.buffers())]
    call = model._compiled_call_impl
    gc.collect()
    gc.disable()
    try:
        del model
        assert watched[0]() is None
        with pytest.raises(ReferenceError, match="a model that does not exist any more"):
            call(x)
        del call
        assert not any(reference() is not None for reference in watched)
    finally:
        gc.enable()


def test_compiled() -> None:
    model, x = _whole(), _x(_IMAGES)
    with torch.no_grad():
        for _ in range(2):
            model(x[:1])
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for run in (compiled, torch.export.export(model, (x[:1],)).module()):
            assert_within_budget(_each(run, x), *_expected(x), _LONGEST)


def test_frozen() -> None:
    model, x = _whole(), _x()
    with torch.no_grad():
        expected = [model(x) for _ in range(2)][1]
        lowkernels.freeze(model)
        for _ in range(2):
            assert torch.equal(model(x), expected)
    model(x).square().mean().backward()
    assert model.norm.weight.grad is not None


def test_undone() -> None:
    model, x = _whole(), _x()
    with torch.no_grad():
        model(x)
        unmake_whole(model)
        assert model._compiled_call_impl is None
        assert torch.equal(model(x), model._call_impl(x))
    accelerated = lowkernels.accelerate(nn.Sequential(model.body.original[0], nn.Flatten()).eval())
    lowkernels.restore(accelerated)
    assert accelerated._compiled_call_impl is None


class _Residual(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.body(x))
        return x + self.act(x)  # type: ignore[no-any-return]


class _Shape(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[0] < 4 else self.last(self.body(x))


class _Unknown(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sigmoid()


class _Two(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.last(y), y  # type: ignore[return-value]


class _Earlier(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        self.last(y)
        return y  # type: ignore[no-any-return]


class _Computed(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.flatten(self.pool(self.last(self.body(x))), 1)
        return F.layer_norm(y, (24,), self.norm.weight * 2, self.norm.bias)


class _Softplus(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.hardtanh(self.last(self.body(x)))


class _Isinstance(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2 if isinstance(x, Tensor) else x)


class _Autocast(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


class _Attribute(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.rate += 0.001
        return super().forward(x)


class _CountingBuffer(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    count: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return super().forward(x)


class _AskingBuffer(_CountingBuffer):
    def forward(self, x: Tensor) -> Tensor:
        return Net.forward(self, x) if self.count > 1e6 else Net.forward(self, x).relu()


_SEEN: list[object] = []
_IS_POSITIVE = False


class _List(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        _SEEN.append(x)
        return x


class _OwnList(Net):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = _SEEN  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        self.seen.append(x)
        return x


class _Global(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return F.relu(x) if _IS_POSITIVE else x


class _Settings(Net):
    def __init__(self) -> None:
        super().__init__()
        self.settings = {"positive": False}

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return F.relu(x) if self.settings["positive"] else x


class _ListOfModules(Net):
    def __init__(self) -> None:
        super().__init__()
        self.more = [nn.Identity()]

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        for module in self.more:
            x = module(x)
        return x


class _ClassAttribute(Net):
    positive = False

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return F.relu(x) if self.positive else x


class _Random(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return F.relu(x) if random.random() < 0.5 else x


_UNSETTLED = [
    _Isinstance,
    _Autocast,
    _Attribute,
    _CountingBuffer,
    _AskingBuffer,
    _List,
    _OwnList,
    _Global,
    _Settings,
    _ListOfModules,
]


@pytest.mark.parametrize("kind", [*_UNSETTLED, _ClassAttribute, _Random])
def test_models_that_might_do_something_else_another_time(kind: Callable[[], nn.Module]) -> None:
    model, x = _net(kind=kind), _x()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert not make_whole(model)
    assert not _SEEN, "looking had an effect"
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items()), "looking had an effect"
    with torch.no_grad():
        model(x)
    _SEEN.clear()


def test_follows_the_code_of_the_class() -> None:
    class Own(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    model, x = _net(kind=Own), _x()
    assert make_whole(model)
    with torch.no_grad():
        for _ in range(2):
            model(x)
        Own.forward = lambda self, x: Net.forward(self, x) * 2  # type: ignore[method-assign]
        for _ in range(2):
            assert torch.equal(model(x), Net.forward(model, x) * 2)


def test_nobody_hears_of_the_look() -> None:
    model, seen = _net(), []
    handles = [m.register_forward_hook(lambda *args: seen.append(args)) for m in (model, model.norm, model.act)]
    assert make_whole(model)
    assert not seen
    with torch.no_grad():
        for _ in range(2):
            model(_x())
        assert len(seen) == 6
        for handle in handles:
            handle.remove()
        assert torch.equal(model(_x()), _whole()(_x()))


def test_only_on_a_cpu() -> None:
    assert not make_whole(_net().to("meta"))


@pytest.mark.parametrize("kind", [_Residual, _Shape, _Unknown, _Two, _Earlier, _Computed, _Softplus])
def test_models_that_do_more_are_left_alone(kind: Callable[[], nn.Module]) -> None:
    model, x = _net(kind=kind), _x()
    assert not make_whole(model)
    assert model._compiled_call_impl is None
    with torch.no_grad():
        model(x)


@pytest.mark.parametrize("name", ["lowformer_b0", "lowformer_e1"])
def test_lowformer_is_one_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lowformer.create_model(name).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        first = model(x)
        calls = _Calls(monkeypatch)
        assert torch.equal(model(x), first)
    assert calls.count == 0
    assert all(row.ran_on == "cpu" for row in lowkernels.report(model) if row.replaced)


def test_a_model_whose_attributes_change_all_the_time() -> None:
    model, x = _whole(), _x(_IMAGES)
    expected = _expected(x)
    with torch.no_grad():
        for i in range(8):
            model.seen = i + 1000
            assert_within_budget(_each(model, x), *expected, _LONGEST)
