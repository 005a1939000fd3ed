"""BatchNorm folding around blocks that no operator serves: what is folded, and what must not be."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowkernels
from lowkernels.patching.batchnorm import FoldedNorm, FoldedNormConv
from tests.patching.helpers import Snapshot, image, randomise, row, run


class Pair(nn.Module):
    """A convolution and a BatchNorm that no operator serves, between a second pair that is always folded."""

    def __init__(self, conv: nn.Module | None = None, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.first_norm = nn.BatchNorm2d(8)
        self.conv = conv or nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.norm = norm or nn.BatchNorm2d(8)

    def pair(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x))
        return y

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(F.selu(self.first_norm(self.first(x))))


def accelerated(model: nn.Module) -> nn.Module:
    """The model after accelerate(), checked against itself before, now and with other weights."""
    plain = randomise(model).double()
    model = lowkernels.accelerate(copy.deepcopy(plain), backend="eager")
    x = image(2, 3, 9, 12, dtype=torch.float64)
    for _ in range(2):
        torch.testing.assert_close(run(model, x), run(plain, x), rtol=1e-9, atol=1e-9)
        for m in (plain, model):
            with torch.no_grad():
                for p in m.parameters():
                    p.mul_(1.25).add_(0.125)
    lowkernels.restore(model)
    torch.testing.assert_close(run(model, x), run(plain, x), rtol=0, atol=0)
    return lowkernels.accelerate(model, backend="eager")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [
        {"groups": 2, "padding": 1},
        {"groups": 8, "padding": 1},
        {"groups": 4, "padding": 2, "dilation": 2},
        {"groups": 2, "stride": 3},
        {"groups": 2, "padding": "same"},
        {"groups": 2, "kernel_size": (3, 1), "stride": (1, 2)},
    ],
)
@pytest.mark.parametrize("affine", [False, True])
def test_folded(arguments: dict[str, Any], bias: bool, affine: bool) -> None:
    conv = nn.Conv2d(8, 8, **{"kernel_size": 3, "bias": bias, **arguments})
    model = accelerated(Pair(conv, nn.BatchNorm2d(8, affine=affine)))
    assert isinstance(model.conv, FoldedNormConv)
    assert isinstance(model.norm, FoldedNorm)
    assert row(model, "norm").reason == "folded into conv in eval mode"


class NormAct(nn.BatchNorm2d):
    """A norm that brings its activation along."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.drop(super().forward(x)))
        return y


def test_a_norm_with_an_activation_is_folded() -> None:
    model = accelerated(Pair(norm=NormAct(8)))
    assert isinstance(model.norm, FoldedNorm)
    assert isinstance(model.norm.act, nn.GELU)


class ScaledNorm(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.alpha = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.alpha


class OffsetNorm(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.offset = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.offset)


class SkippedActNorm(nn.BatchNorm2d):
    """Has an activation that it does not apply."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()


class FreezingNorm(nn.BatchNorm2d):
    def train(self, mode: bool = True) -> FreezingNorm:
        super().train(False)
        return self


class LoudNorm(nn.BatchNorm2d):
    def get_extra_state(self) -> int:
        return 1

    def set_extra_state(self, state: int) -> None:
        assert state == 1


class TwiceConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.contiguous())


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda *a: None)
    return module


def with_state_dict_hook(module: nn.Module) -> nn.Module:
    module.register_state_dict_pre_hook(lambda *a: None)
    return module


def with_forward_on_the_instance(module: nn.Module) -> nn.Module:
    module.forward = lambda x: F.conv2d(x, module.weight, module.bias, 1, 1, 1, 2)  # type: ignore[method-assign, arg-type]
    return module


def conv() -> nn.Module:
    return nn.Conv2d(8, 8, 3, padding=1, groups=2)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Pair(norm=ScaledNorm(8)), "more than normalise"),
        (lambda: Pair(norm=OffsetNorm(8)), None),
        (lambda: Pair(norm=SkippedActNorm(8)), "more than normalise"),
        (lambda: Pair(norm=FreezingNorm(8)), "train"),
        (lambda: Pair(norm=LoudNorm(8)), "get_extra_state"),
        (lambda: Pair(norm=nn.BatchNorm2d(8, track_running_stats=False)), None),
        (lambda: Pair(conv=TwiceConv(8, 8, 3, padding=1)), "TwiceConv"),
        (lambda: Pair(conv=nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")), "code of its own"),
        (lambda: Pair(conv=hooked(conv())), "hooks"),
        (lambda: Pair(norm=hooked(nn.BatchNorm2d(8))), "hooks"),
        (lambda: Pair(norm=with_state_dict_hook(nn.BatchNorm2d(8))), "state dict"),
        (lambda: Pair(conv=nn.ConvTranspose2d(8, 8, 3)), "ConvTranspose2d"),
        (lambda: Pair(norm=nn.InstanceNorm2d(8, affine=True, track_running_stats=True)), None),
        (lambda: Pair(conv=nn.utils.parametrizations.weight_norm(conv())), None),
    ],
)
def test_not_folded(make: Callable[[], nn.Module], reason: str | None) -> None:
    model = accelerated(make())
    assert not isinstance(model.norm, FoldedNorm)
    assert not isinstance(model.conv, FoldedNormConv)
    assert isinstance(model.first_norm, FoldedNorm), "what can be folded is"
    if reason is not None:
        assert reason in row(model, "norm").reason


def test_a_convolution_with_a_forward_on_the_instance_is_not_folded() -> None:
    model = randomise(Pair())
    with_forward_on_the_instance(model.conv)
    lowkernels.accelerate(model, backend="eager")
    assert not isinstance(model.norm, FoldedNorm)


class ReadTwice(Pair):
    def pair(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return torch.cat([y, self.norm(y)], 1)


class ReadByAddition(Pair):
    def pair(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z: Tensor = self.norm(y) + y
        return z


class ConvTwice(Pair):
    def pair(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(self.norm(self.conv(x)))
        return y


class NormTwice(Pair):
    def pair(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(F.elu(self.norm(self.conv(x))))
        return y


class FunctionalConv(Pair):
    def pair(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(F.conv2d(x, self.conv.weight, self.conv.bias, padding=1, groups=2))
        return y


class FunctionalNorm(Pair):
    def pair(self, x: Tensor) -> Tensor:
        n = self.norm
        return F.batch_norm(self.conv(x), n.running_mean, n.running_var, n.weight, n.bias, eps=n.eps)


class MixedNorm(Pair):
    def pair(self, x: Tensor) -> Tensor:
        n = self.norm
        return n(F.batch_norm(self.conv(x), n.running_mean, n.running_var, self.first_norm.weight, n.bias, eps=n.eps))


class Between(Pair):
    def pair(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x).transpose(2, 3))
        return y


class Unregistered(Pair):
    """Calls its layers through a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [self.conv]

    def pair(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.layers[0](x))
        return y


class Aliased(Pair):
    """Holds its convolution under two names and calls it by the second."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([self.conv])

    def pair(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.layers[0](x))
        return y


@pytest.mark.parametrize(
    "kind", [ReadTwice, ReadByAddition, ConvTwice, NormTwice, FunctionalConv, FunctionalNorm, MixedNorm, Between, Aliased]
)
def test_pairs_that_are_none(kind: type[Pair]) -> None:
    model = accelerated(kind())
    assert not isinstance(model.norm, FoldedNorm)
    assert not isinstance(model.conv, FoldedNormConv)
    assert isinstance(model.first_norm, FoldedNorm)


def test_a_module_called_behind_its_name_lets_nothing_be_folded() -> None:
    """Seen only by the model's output, which then decides about all."""
    model = Unregistered()
    plain = randomise(copy.deepcopy(model))
    model.load_state_dict(plain.state_dict())
    lowkernels.accelerate(model.eval(), backend="eager")
    assert not any(isinstance(m, FoldedNorm) for m in model.modules())
    assert "output changes" in row(model, "").reason
    assert torch.equal(run(model, image(1, 3, 9, 9))[0], run(plain, image(1, 3, 9, 9))[0])


def test_a_model_whose_output_says_nothing() -> None:
    """A head that is still zero hides every mistake: the pairs have to be right by themselves."""

    class ZeroHead(ReadTwice):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(super().forward(x).mean((2, 3)))
            return y

    model = randomise(ZeroHead())
    for p in model.head.parameters():
        nn.init.zeros_(p)
    lowkernels.accelerate(model, backend="eager")
    assert isinstance(model.first_norm, FoldedNorm)
    assert not isinstance(model.norm, FoldedNorm)


def test_a_failing_model_is_left_alone() -> None:
    class Fails(Pair):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no such luck")

    model = randomise(Fails())
    snapshot = Snapshot(model)
    lowkernels.accelerate(model, backend="eager")
    assert "did not run on the example: RuntimeError: no such luck" in row(model, "").reason
    lowkernels.restore(model)
    snapshot.assert_restored()
