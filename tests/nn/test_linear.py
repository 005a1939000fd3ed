"""lowkernels.nn.Linear: the operator for few rows, PyTorch's own product for everything else, an nn.Linear to all who look."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowkernels
from lowkernels import FrozenError, InputError
from lowkernels.nn import Linear
from lowkernels.nn import linear as module
from lowkernels.testing import assert_within_budget


@pytest.fixture(autouse=True)
def _everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the eager reference were the faster one for up to two rows."""
    monkeypatch.setattr(module, "FASTER_UP_TO", {"eager": 2})


def original(bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(24, 10, bias=bias).eval()


def rows(count: int, *more: int) -> Tensor:
    return torch.randn(count, *more, 24, generator=torch.Generator().manual_seed(1))


def runs_operator(layer: nn.Module, x: Tensor) -> bool:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    with Seen():
        layer(x)
    return "lowkernels::conv_act" in seen


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("act", ["none", "hardswish"])
def test_within_budget(bias: bool, dtype: torch.dtype, act: str) -> None:
    plain = original(bias).to(dtype)
    layer = Linear(plain, act=act, backend="eager")
    for n in (1, 2, 3):
        x = rows(n).to(dtype)
        with torch.no_grad():
            assert runs_operator(layer, x) == (n <= 2)
            eager = plain(x) if act == "none" else F.hardswish(plain(x))
            double = copy.deepcopy(plain).double()(x.double())
            out = layer(x)
        assert out.shape == (n, 10)
        assert out.is_contiguous()
        assert_within_budget(out, eager, double if act == "none" else F.hardswish(double), 24, f"{n} rows")


def test_what_the_operator_is_not_for() -> None:
    plain = original()
    layer = Linear(plain, backend="eager")
    with torch.no_grad():
        assert runs_operator(layer, rows(1))
        for x in (rows(3), rows(1, 1), rows(1, 4), rows(0), rows(1)[0]):
            assert runs_operator(layer, x) == (x.shape == (0, 24))
            assert torch.equal(layer(x), plain(x))
    with torch.enable_grad():
        assert not runs_operator(layer, rows(1))
    layer.train()
    with torch.no_grad():
        assert not runs_operator(layer, rows(1))


def test_report_says_which() -> None:
    net = nn.Sequential(Linear(original(), backend="eager"))
    with torch.no_grad():
        net(rows(1))
        (row,) = lowkernels.report(net)
        assert (row.kind, row.ran_on, row.layout_copies) == ("conv_act", "eager", 0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "FASTER_UP_TO", {"cpu": 1})
            patch.setattr(net[0].operator, "explain", lambda *args, **kwargs: lowkernels.dispatch.Choice("conv_act", "cpu", ""))
            net(rows(5))
        (row,) = lowkernels.report(net)
        assert row.ran_on == "eager"
        assert row.reason == "PyTorch's own product is faster than cpu's, which is for at most 1 row"


def test_to_those_who_look_it_is_the_original() -> None:
    plain = original()
    layer = Linear(plain)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (24, 10)
    assert layer.weight is plain.weight
    assert layer.bias is plain.bias
    assert list(layer.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in layer.named_parameters()] == ["weight", "bias"]
    assert layer.original is plain


def test_trains_as_the_original() -> None:
    plain = original()
    layer = Linear(copy.deepcopy(plain)).train()
    plain.train()
    x = rows(2)
    for m in (plain, layer):
        F.cross_entropy(m(x), torch.tensor([1, 2])).backward()
    assert torch.equal(layer.weight.grad, plain.weight.grad)
    assert torch.equal(layer.bias.grad, plain.bias.grad)


@pytest.mark.parametrize("change", ["in place", "data and repack", "load", "replaced"])
def test_follows_its_weights(change: str) -> None:
    layer = Linear(original(), backend="eager")
    other = original(seed=5)
    with torch.no_grad():
        before = layer(rows(1))
        if change == "in place":
            layer.weight.copy_(other.weight)
            layer.bias.copy_(other.bias)
        elif change == "data and repack":
            layer.weight.data = other.weight.data
            layer.bias.data = other.bias.data
            layer.repack()
        elif change == "load":
            layer.load_state_dict(other.state_dict())
        else:
            layer.weight, layer.bias = other.weight, other.bias
        assert not torch.equal(layer(rows(1)), before)
        torch.testing.assert_close(layer(rows(1)), other(rows(1)))
        assert runs_operator(layer, rows(1))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies(copied: Callable[[nn.Module], Any]) -> None:
    layer = Linear(original(), backend="eager")
    with torch.no_grad():
        expected = layer(rows(1))
        twin = copied(layer)
        assert torch.equal(twin(rows(1)), expected)
        twin.weight.zero_()
        assert torch.equal(twin(rows(1))[0], twin.bias)
        assert torch.equal(twin.original.weight, twin.weight)
        assert torch.equal(layer(rows(1)), expected)


def test_frozen() -> None:
    layer = Linear(original(), backend="eager")
    with torch.no_grad():
        expected = [layer(rows(n)) for n in (1, 5)]
        layer.freeze()
        assert not list(layer.parameters())
        assert all(torch.equal(layer(rows(n)), e) for n, e in zip((1, 5), expected, strict=True))
    with pytest.raises(FrozenError):
        layer.train()


def test_other_dtypes_and_autocast() -> None:
    layer = Linear(original(), backend="eager")
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(rows(1)).dtype == torch.bfloat16
        assert layer(rows(1)).dtype == torch.float32
        assert layer.double()(rows(1).double()).dtype == torch.float64


def test_compiles_and_exports() -> None:
    plain = original()
    layer = Linear(plain, backend="eager")
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for n in (1, 3):
            torch.testing.assert_close(compiled(rows(n)), plain(rows(n)))
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(layer, (rows(3),), dynamic_shapes=({0: batch},))
        torch.testing.assert_close(program.module()(rows(1)), plain(rows(1)))


def test_what_is_no_plain_linear() -> None:
    class More(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.scale = nn.Parameter(torch.ones(4))

    with pytest.raises(InputError, match=r"is More with bias, scale, weight; allowed is an nn.Linear with weight and bias alone"):
        Linear(More())
    with pytest.raises(InputError, match="is Conv2d"):
        Linear(nn.Conv2d(4, 4, 1))  # type: ignore[arg-type]
    hooked = nn.Linear(4, 4)
    hooked.register_forward_hook(lambda *args: None)
    with pytest.raises(InputError, match="has hooks"):
        Linear(hooked)


def test_a_backend_asked_for_by_name_serves_any_number_of_rows() -> None:
    layer = Linear(original(), backend="eager")
    asked = lowkernels.dispatch.Choice("conv_act", "cpu", "asked for by the backend argument", basis="request")
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer.operator, "explain", lambda *args, **kwargs: asked)
        assert runs_operator(layer, rows(5))
