"""Blocks that look like an operator and are not, one per trap: none may be taken for one. And their twins that are one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

import lowkernels
from lowkernels.nn.block import FusedBlock
from tests.patching.helpers import InvertedResidual, Net, image, randomise, row, run

SIZES = ((2, 9, 8), (1, 16, 16), (3, 7, 12))


def accelerated(block: nn.Module, channels: int = 8) -> tuple[nn.Module, nn.Module]:
    """A model of the block with random weights, and the same after accelerate()."""
    model = randomise(Net(block, channels)).double()
    return model, lowkernels.accelerate(copy.deepcopy(model), backend="eager")


def refused(block: nn.Module, reason: str, channels: int = 8) -> nn.Module:
    """Check that the block stays what it is, for this reason, and its model computes what it did; returns the model."""
    before, after = accelerated(block, channels)
    assert type(after.block) is type(block)
    found = row(after, "block")
    assert not found.replaced
    assert reason in found.reason
    for n, h, w in SIZES:
        x = image(n, channels, h, w, dtype=torch.float64)
        torch.testing.assert_close(run(after, x.clone()), run(before, x.clone()), rtol=1e-9, atol=1e-9)
    return after


def served(block: nn.Module, kind: str, channels: int = 8) -> FusedBlock:
    before, after = accelerated(block, channels)
    assert isinstance(after.block, FusedBlock), row(after, "block").reason
    assert after.block.operator_name == kind
    for n, h, w in SIZES:
        x = image(n, channels, h, w, dtype=torch.float64)
        torch.testing.assert_close(run(after, x), run(before, x), rtol=1e-9, atol=1e-9)
    return after.block


# What is served, so that the refusals below mean something.


@pytest.mark.parametrize("act", [nn.ReLU6, nn.ReLU, nn.SiLU, nn.Hardswish, nn.Identity, nn.GELU, lambda: nn.GELU("tanh")])
def test_inverted_residual_is_served(act: Callable[[], nn.Module]) -> None:
    expected = {nn.ReLU6: "relu6", nn.ReLU: "relu", nn.SiLU: "silu", nn.Hardswish: "hardswish", nn.Identity: "none"}
    expected[nn.GELU] = "gelu"
    assert served(InvertedResidual(act=act), "mbconv")._config["act"] == expected.get(act, "gelu_tanh")  # type: ignore[call-overload]


class Functional(InvertedResidual):
    """The same, written with functions, in place, and with the residual the other way round."""

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu6(self.norm1(F.conv2d(image, self.expand.weight)), inplace=True)
        x = F.hardtanh(self.norm2(self.depthwise(x)), 0.0, 6.0, inplace=True)
        x = self.norm3(self.project(x))
        x += image
        return x


def test_a_block_written_with_functions_is_served() -> None:
    served(Functional(), "mbconv")


class Separable(nn.Sequential):
    def __init__(self, channels: int = 8) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, 5, 2, 2, groups=channels),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1),
            nn.BatchNorm2d(channels),
            nn.SiLU(),
        )


def test_a_sequential_is_served_as_separable_convolution() -> None:
    config = served(Separable(), "separable_conv")._config
    assert (config["dw_act"], config["pw_act"], config["stride"], config["padding"]) == ("relu", "silu", 2, 2)


def test_dense_blocks_are_served() -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
    served(nn.Sequential(conv, nn.BatchNorm2d(8), nn.Hardswish()), "conv_act")
    served(nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.SiLU(), nn.Conv2d(16, 8, 1)), "fused_mbconv")
    served(nn.Sequential(nn.GroupNorm(1, 8), nn.Conv2d(8, 16, 1), nn.GELU(), nn.Conv2d(16, 8, 1)), "gn_mlp")


class OneNormForTwo(InvertedResidual):
    def branch(self, x: Tensor) -> Tensor:
        x = self.act1(self.norm1(self.expand(x)))
        x = self.act2(self.norm1(self.depthwise(x)))
        y: Tensor = self.norm3(self.project(x))
        return y


def test_a_norm_used_twice_is_used_twice() -> None:
    parts = served(OneNormForTwo(), "mbconv")._parts
    assert parts["expand_norm"] == parts["dw_norm"] == "norm1"


# Layers inside.


class Inside(InvertedResidual):
    """With something more between the depthwise convolution and the projection."""

    def __init__(self, extra: nn.Module, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.extra = extra

    def branch(self, x: Tensor) -> Tensor:
        x = self.act1(self.norm1(self.expand(x)))
        x = self.extra(self.act2(self.norm2(self.depthwise(x))))
        y: Tensor = self.norm3(self.project(x))
        return y


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


def test_squeeze_and_excitation() -> None:
    refused(Inside(SqueezeExcite(16)), "squeeze-and-excitation")


class LayerScale(nn.Module):
    def __init__(self, channels: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels, 1, 1), initial))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


@pytest.mark.parametrize("initial", [1.0, 0.0])
def test_layer_scale(initial: float) -> None:
    refused(Inside(LayerScale(16, initial)), "multiplies")


class BlurPool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(F.pad(x, (1, 0, 1, 0)), 2, stride=1)


class Halves(nn.Module):
    """A mixed depthwise convolution: kernel 3 for one half of the channels, 5 for the other."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.small = nn.Conv2d(half, half, 3, padding=1, groups=half)
        self.large = nn.Conv2d(half, half, 5, padding=2, groups=half)

    def forward(self, x: Tensor) -> Tensor:
        one, other = x.chunk(2, 1)
        return torch.cat([self.small(one), self.large(other)], 1)


class ActingDropPath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.empty(x.shape[0], 1, 1, 1, dtype=x.dtype).bernoulli_(1.0)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (BlurPool(), "pads explicitly"),
        (nn.AvgPool2d(3, 1, 1), "pools"),
        (nn.MaxPool2d(3, 1, 1, ceil_mode=True), "pools"),
        (Halves(16), "mixed convolutions"),
        (ActingDropPath(), "drop path"),
        (nn.InstanceNorm2d(16), ""),
        (nn.BatchNorm2d(16, track_running_stats=False), "batch statistics"),
        (nn.Dropout2d(0.5), None),
        (nn.LeakyReLU(), "leaky_relu"),
        (nn.Conv2d(16, 16, 1, groups=2), "grouped"),
    ],
)
def test_layers_that_no_operator_has(extra: nn.Module, reason: str | None) -> None:
    if reason is None:
        # Dropout does nothing in eval mode.
        served(Inside(extra), "mbconv")
    else:
        refused(Inside(extra), reason)


def test_group_norm_of_several_groups() -> None:
    refused(nn.Sequential(nn.GroupNorm(2, 8), nn.Conv2d(8, 16, 1), nn.GELU(), nn.Conv2d(16, 8, 1)), "GroupNorm with 2 groups")


# Convolutions that are not the operators'.


def with_depthwise(**arguments: Any) -> InvertedResidual:
    block = InvertedResidual()
    block.depthwise = nn.Conv2d(16, 16, bias=False, **{"kernel_size": 3, "groups": 16, "padding": 1, **arguments})
    return block


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"dilation": 2, "padding": 2}, "dilated"),
        ({"groups": 4}, "grouped"),
        ({"groups": 8}, "grouped"),
        ({"kernel_size": 9, "padding": 4}, "kernel size 9"),
        ({"kernel_size": (3, 5), "padding": (1, 2)}, "equal"),
        ({"padding_mode": "reflect"}, "reflect"),
        ({"padding_mode": "circular"}, ""),
        ({"padding": "same"}, ""),
    ],
)
def test_depthwise_convolutions_of_other_kinds(arguments: dict[str, Any], reason: str) -> None:
    refused(with_depthwise(**arguments), reason)


@pytest.mark.parametrize("kernel", [2, 4])
def test_even_kernels(kernel: int) -> None:
    block = nn.Sequential(nn.Conv2d(8, 8, kernel, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    refused(block, f"kernel size {kernel}")


def test_grouped_expansion() -> None:
    block = InvertedResidual()
    block.expand = nn.Conv2d(8, 16, 1, groups=2, bias=False)
    refused(block, "grouped")


def test_depthwise_convolution_with_a_multiplier() -> None:
    block = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1, groups=8), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1))
    refused(block, "grouped")


class SameConv(nn.Conv2d):
    """TensorFlow's 'same' padding: asymmetric for even sizes at stride 2, symmetric for odd ones."""

    def forward(self, x: Tensor) -> Tensor:
        pad = [max((-(-s // 2) - 1) * 2 + 3 - s, 0) for s in x.shape[-2:]]
        if any(pad):
            x = F.pad(x, (pad[1] // 2, pad[1] - pad[1] // 2, pad[0] // 2, pad[0] - pad[0] // 2))
        return F.conv2d(x, self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


class OddOnly(nn.Conv2d):
    """Pads by itself for even sizes only."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] % 2 == 0 or x.shape[3] % 2 == 0:
            x = F.pad(x, (0, 1, 0, 1))
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


@pytest.mark.parametrize("kind", [SameConv, OddOnly])
def test_same_padding(kind: type[nn.Conv2d]) -> None:
    refused(nn.Sequential(kind(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()), "")


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.weight.mean((1, 2, 3), keepdim=True), self.weight.var((1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (var + 1e-6).sqrt(), self.bias, self.stride, self.padding)


@pytest.mark.parametrize("wrap", [weight_norm, spectral_norm, parametrizations.weight_norm, parametrizations.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_reparametrised_convolutions(wrap: Callable[[nn.Module], nn.Module]) -> None:
    block = InvertedResidual()
    block.expand = wrap(block.expand)
    model = randomise(Net(block))
    lowkernels.accelerate(model, backend="eager")
    assert type(model.block) is InvertedResidual
    reason = row(model, "block").reason
    assert "on the fly" in reason or "hooks" in reason


def test_standardised_weights() -> None:
    refused(nn.Sequential(Standardised(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()), "on the fly")


class Scaled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.0


def test_a_convolution_with_a_forward_of_its_own() -> None:
    refused(nn.Sequential(Scaled(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()), "adds")


class BatchNormOfOne(nn.BatchNorm2d):
    """Stores its scale as a difference from one."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight + 1, self.bias, False, 0.0, self.eps)


def test_batch_norms_of_other_kinds() -> None:
    refused(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), BatchNormOfOne(8), nn.ReLU()), "")
    untracked = nn.BatchNorm2d(8, track_running_stats=False)
    refused(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), untracked, nn.ReLU()), "batch statistics")


def test_sync_batch_norm() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(randomise(Net(InvertedResidual())))
    lowkernels.accelerate(model, backend="eager")
    assert type(model.block) is InvertedResidual


class AlwaysTraining(nn.BatchNorm2d):
    def train(self, mode: bool = True) -> AlwaysTraining:
        super().train(True)
        return self


def test_a_batch_norm_that_never_leaves_train_mode() -> None:
    block = InvertedResidual()
    block.norm2 = AlwaysTraining(16)
    model = randomise(Net(block))
    statistics = block.norm2.running_mean.clone()
    lowkernels.accelerate(model, backend="eager")
    assert type(model.block) is InvertedResidual
    assert "keeps state" in row(model, "block").reason
    assert torch.equal(block.norm2.running_mean, statistics)


def test_a_batch_norm_in_train_mode_uses_batch_statistics() -> None:
    model = randomise(Net(InvertedResidual()))
    model.block.norm2.train()
    plain = copy.deepcopy(model)
    lowkernels.accelerate(model, backend="eager")
    x = image(4, 8, 6, 6)
    assert torch.equal(run(model, x)[0], run(plain, x)[0])
    assert model.block.norm2.training


# Forwards of their own.


class ScaledByAttribute(InvertedResidual):
    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) * self.scale + x


class ZeroGamma(InvertedResidual):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) * self.gamma + x


class ZeroBuffer(InvertedResidual):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.zeros(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + self.offset + x


class AddsTwice(InvertedResidual):
    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + x + x


class AddsAlpha(InvertedResidual):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.branch(x), x, alpha=2)


class Subtracts(InvertedResidual):
    def forward(self, x: Tensor) -> Tensor:
        return x - self.branch(x)


class AddsSomethingElse(InvertedResidual):
    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + F.relu(x)


class ActivationFirst(InvertedResidual):
    def branch(self, x: Tensor) -> Tensor:
        return super().branch(F.relu6(x))


class ActivationBeforeNorm(InvertedResidual):
    def branch(self, x: Tensor) -> Tensor:
        x = self.norm1(self.act1(self.expand(x)))
        x = self.act2(self.norm2(self.depthwise(x)))
        y: Tensor = self.norm3(self.project(x))
        return y


class ActivationAfterResidual(InvertedResidual):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + x)


class ActivationAtTheEnd(InvertedResidual):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x)) + x


class ReturnsTuple(InvertedResidual):
    def forward(self, x: Tensor) -> Any:
        return self.branch(x) + x, x


class ExtraArgument(InvertedResidual):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.branch(x) + x if scale == 1.0 else self.branch(x) * scale + x


class AnyArguments(InvertedResidual):
    def forward(self, *args: Tensor) -> Tensor:
        return self.branch(args[0]) + sum(args)


class DependsOnData(InvertedResidual):
    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + x if x.abs().max() < 100 else x


class DependsOnNumpy(InvertedResidual):
    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + x if abs(x.numpy()).max() < 100 else x


class DependsOnSize(InvertedResidual):
    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + x if x.shape[2] % 2 else self.branch(x)


class DependsOnLargeSize(InvertedResidual):
    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + x if x.shape[2] < 13 else x


class DependsOnBatch(InvertedResidual):
    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + x if x.shape[0] < 5 else F.relu(self.branch(x) + x)


class DependsOnHalf(InvertedResidual):
    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x) + x
        return y.clamp(-100, 100) if x.dtype == torch.float16 else y


class ComputesInFloat(InvertedResidual):
    def forward(self, x: Tensor) -> Tensor:
        return (self.branch(x) + x).float()


class KeepsItsOutput(InvertedResidual):
    last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.branch(x) + x
        return self.last


class CountsInFloat(InvertedResidual):
    """Two calls may well put the count where it was in memory."""

    calls = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0.5

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1.0
        return self.branch(x) + x


class CollectsInAList(InvertedResidual):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.shape)
        return self.branch(x) + x


class CountsInABuffer(InvertedResidual):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.branch(x) + x


class Overwrites(InvertedResidual):
    def forward(self, x: Tensor) -> Tensor:
        return x.add_(self.branch(x))


class OverwritesAfterwards(InvertedResidual):
    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x) + x
        x.data.zero_()
        return y


class OverwritesPartOfItsOutput(InvertedResidual):
    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x) + x
        y[:, :1].zero_()
        return y


class ConstantOfItsOwn(InvertedResidual):
    """A bias that is neither parameter nor buffer, zero for now."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.zeros(16, dtype=torch.float64)

    def branch(self, x: Tensor) -> Tensor:
        x = self.act1(self.norm1(F.conv2d(x, self.expand.weight, self.shift.to(x))))
        x = self.act2(self.norm2(self.depthwise(x)))
        y: Tensor = self.norm3(self.project(x))
        return y


class SwapsScales(InvertedResidual):
    """Normalises by one norm's statistics and scales by the other's weight."""

    def branch(self, x: Tensor) -> Tensor:
        one, two = self.norm1, self.norm2
        x = F.batch_norm(self.expand(x), one.running_mean, one.running_var, two.weight, two.bias, eps=one.eps)
        x = F.batch_norm(self.depthwise(self.act1(x)), two.running_mean, two.running_var, one.weight, one.bias, eps=two.eps)
        y: Tensor = self.norm3(self.project(self.act2(x)))
        return y


class SwapsMeanAndBias(InvertedResidual):
    def branch(self, x: Tensor) -> Tensor:
        one = self.norm1
        x = F.batch_norm(self.expand(x), one.running_mean, one.running_var, one.bias, one.weight, eps=one.eps)
        x = self.act2(self.norm2(self.depthwise(self.act1(x))))
        y: Tensor = self.norm3(self.project(x))
        return y


class OtherEps(InvertedResidual):
    def branch(self, x: Tensor) -> Tensor:
        one = self.norm1
        x = F.batch_norm(self.expand(x), one.running_mean, one.running_var, one.weight, one.bias, eps=2 * one.eps)
        x = self.act2(self.norm2(self.depthwise(self.act1(x))))
        y: Tensor = self.norm3(self.project(x))
        return y


class OtherStride(InvertedResidual):
    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.norm1(self.expand(x)))
        x = self.act2(self.norm2(F.conv2d(x, self.depthwise.weight, None, 2, 1, groups=16)))
        y: Tensor = self.norm3(self.project(x))
        return y


class Transposed(InvertedResidual):
    """Height and width exchanged on the way and back."""

    def branch(self, x: Tensor) -> Tensor:
        x = self.act1(self.norm1(self.expand(x))).transpose(2, 3)
        x = self.act2(self.norm2(self.depthwise(x))).transpose(2, 3)
        y: Tensor = self.norm3(self.project(x))
        return y


class LooksAtTraining(InvertedResidual):
    """Freezes its norms whenever it trains."""

    def train(self, mode: bool = True) -> LooksAtTraining:
        super().train(mode)
        self.norm1.eval()
        return self


class RenamesOldKeys(InvertedResidual):
    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}old.weight" in state:
            state[f"{prefix}expand.weight"] = state.pop(f"{prefix}old.weight")
        super()._load_from_state_dict(state, prefix, *args)


class ExtraState(InvertedResidual):
    def get_extra_state(self) -> int:
        return 7

    def set_extra_state(self, state: int) -> None:
        assert state == 7


class ScalesItsCall(InvertedResidual):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs) * 2


class OwnParameter(InvertedResidual):
    """Holds a convolution's weight itself."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(16, 8, 1, 1))

    def branch(self, x: Tensor) -> Tensor:
        x = self.act1(self.norm1(F.conv2d(x, self.kernel)))
        x = self.act2(self.norm2(self.depthwise(x)))
        y: Tensor = self.norm3(self.project(x))
        return y


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (ScaledByAttribute, "multiplies"),
        (ZeroGamma, "multiplies"),
        (ZeroBuffer, "adds"),
        (AddsTwice, "adds"),
        (AddsAlpha, "no residual"),
        (Subtracts, "sub"),
        (AddsSomethingElse, "adds something other"),
        (ActivationFirst, ""),
        (ActivationBeforeNorm, ""),
        (ActivationAfterResidual, "adds before its last layer"),
        (ActivationAtTheEnd, "after its projection"),
        (ReturnsTuple, "returns tuple"),
        (ExtraArgument, "scale"),
        (AnyArguments, "*args"),
        (DependsOnData, "applies"),
        (DependsOnNumpy, "without data"),
        (DependsOnSize, "sizes"),
        (DependsOnLargeSize, "sizes"),
        (DependsOnBatch, "sizes"),
        (DependsOnHalf, "dtypes"),
        (ComputesInFloat, "_to_copy"),
        (KeepsItsOutput, "keeps state"),
        (CountsInFloat, "keeps state"),
        (CollectsInAList, "keeps state"),
        (CountsInABuffer, "keeps state"),
        (Overwrites, "in place"),
        (OverwritesAfterwards, "in place"),
        (OverwritesPartOfItsOutput, ""),
        (ConstantOfItsOwn, "neither its input nor a parameter"),
        (SwapsScales, "other numbers"),
        (SwapsMeanAndBias, "other numbers"),
        (OtherEps, "other numbers"),
        (OtherStride, "other numbers"),
        (Transposed, "transpose"),
        (LooksAtTraining, "train"),
        (RenamesOldKeys, "_load_from_state_dict"),
        (ExtraState, "get_extra_state"),
        (ScalesItsCall, "__call__"),
        (OwnParameter, "owns it directly"),
    ],
)
def test_forwards_of_their_own(kind: type[nn.Module], reason: str) -> None:
    refused(kind(), reason)


class CastsInFloat(InvertedResidual):
    """Computes in float32 whatever it is given, and gives that dtype back."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.branch(x) + x).float().to(x.dtype)


def test_casts_are_refused() -> None:
    refused(CastsInFloat(), "_to_copy")


def test_a_forward_set_on_the_instance() -> None:
    block = InvertedResidual()
    block.forward = lambda x: block.branch(x) + x  # type: ignore[method-assign]
    model = randomise(Net(block))
    lowkernels.accelerate(model, backend="eager")
    assert model.block is block


def test_a_block_that_cannot_be_copied() -> None:
    block = InvertedResidual()
    block.kept = block.expand.weight * 2  # type: ignore[assignment]
    model = randomise(Net(block))
    lowkernels.accelerate(model, backend="eager")
    assert model.block is block
    assert "cannot be copied" in row(model, "block").reason


# Who else holds or watches it.


def hooks() -> dict[str, Callable[[nn.Module], Any]]:
    return {
        "forward": lambda m: m.register_forward_hook(lambda *a: None),
        "forward pre": lambda m: m.register_forward_pre_hook(lambda *a: None),
        "backward": lambda m: m.register_full_backward_hook(lambda *a: None),
        "backward pre": lambda m: m.register_full_backward_pre_hook(lambda *a: None),
    }


@pytest.mark.parametrize("kind", hooks())
@pytest.mark.parametrize("where", ["", "depthwise", "act2"])
def test_hooks(kind: str, where: str) -> None:
    block = InvertedResidual()
    hooks()[kind](block.get_submodule(where))
    refused(block, "hooks")


def test_state_dict_hooks() -> None:
    block = InvertedResidual()
    block.register_load_state_dict_pre_hook(lambda *a: None)
    refused(block, "state dict")


class Twice(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.one = self.two = block

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(self.one(x))
        return out


def test_a_block_in_two_places() -> None:
    model = randomise(Twice(InvertedResidual()))
    before = run(model, image(1, 8, 6, 6))
    lowkernels.accelerate(model, backend="eager")
    assert type(model.one) is InvertedResidual
    assert model.one is model.two
    assert "two places" in row(model, "one").reason
    torch.testing.assert_close(run(model, image(1, 8, 6, 6)), before)


def test_a_convolution_in_two_blocks() -> None:
    one, two = InvertedResidual(), InvertedResidual()
    two.project = one.project
    model = nn.Sequential(one, two)
    lowkernels.accelerate(randomise(model), backend="eager")
    assert model[0] is one
    assert model[1] is two


def test_parameters_shared_by_two_blocks_are_followed() -> None:
    one, two = InvertedResidual(), InvertedResidual()
    two.expand.weight = one.expand.weight
    model = randomise(nn.Sequential(one, two)).double()
    plain = copy.deepcopy(model)
    lowkernels.accelerate(model, backend="eager")
    assert all(isinstance(m, FusedBlock) for m in model)
    for m in (model, plain):
        with torch.no_grad():
            m[0].expand.weight.mul_(3)
    x = image(1, 8, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(run(model, x), run(plain, x))


def test_weights_tied_within_a_block_stay_right() -> None:
    block = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    block[3].weight = block[0].weight
    before, after = accelerated(block)
    x = image(2, 8, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(run(after, x), run(before, x))


# Callers that do more than call.


class TakesApart(nn.Module):
    """A block's caller that runs its layers one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.other = InvertedResidual()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.block:
            x = layer(x)
        out: Tensor = self.other(x)
        return out


class ReadsAttribute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.other = InvertedResidual(), InvertedResidual()
        self.block.depth = 2  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.block.depth):  # type: ignore[arg-type]
            x = self.block(x)
        out: Tensor = self.other(x)
        return out


class Flattens(nn.Module):
    """Needs its block's output in the usual layout."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.other = InvertedResidual(), InvertedResidual()

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(self.other(x).contiguous())
        return y.view(y.shape[0], -1)


class PassesByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.other = Functional(), InvertedResidual()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(image=self.other(x))
        return y


@pytest.mark.parametrize("kind", [TakesApart, ReadsAttribute, Flattens, PassesByName])
def test_callers_that_do_more_than_call(kind: type[nn.Module]) -> None:
    model = randomise(kind()).double()
    plain = copy.deepcopy(model)
    lowkernels.accelerate(model, backend="eager")
    assert not isinstance(model.block, FusedBlock)
    assert isinstance(model.other, FusedBlock)
    x = image(2, 8, 9, 6, dtype=torch.float64)
    torch.testing.assert_close(run(model, x), run(plain, x))
    assert "caller" in row(model, "block").reason


# Attention.


class Attention(nn.Module):
    """LowFormer's attention; every argument makes it something else."""

    def __init__(
        self,
        stride: int = 2,
        scale: float = 1.0,
        order: str = "qkv",
        interleaved: bool = False,
        crop: bool = True,
        bias: bool = False,
        plain: bool = False,
        heads: int = 2,
        **up: int,
    ) -> None:
        super().__init__()
        self.heads, self.dim, self.scale, self.order = heads, 8 // heads // 2 * 2, scale, order
        self.interleaved, self.crop, self.plain = interleaved, crop, plain
        inner = self.heads * self.dim
        self.dw = nn.Conv2d(8, 8, 5 if stride == 2 else 3, stride, 2 if stride == 2 else 1, groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.qkv = nn.Conv2d(8, 3 * inner, 1, bias=bias)
        self.up = nn.ConvTranspose2d(inner, 8, 4 if stride == 2 else 3, stride, **{"padding": 1, **up})

    def bias(self, tokens: int) -> Tensor | None:
        return None

    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(self.norm(self.dw(x)))
        n, _, h, w = y.shape
        if self.interleaved:
            parts = y.reshape(n, self.heads, self.dim, 3, h * w).unbind(3)
        else:
            parts = y.reshape(n, self.heads, 3, self.dim, h * w).unbind(2)
        given = {name: part.transpose(2, 3) for name, part in zip(self.order, parts, strict=True)}
        q, k, v = given["q"], given["k"], given["v"]
        scale = self.scale * self.dim**-0.5
        if self.plain:
            logits = (q @ k.transpose(2, 3)) * scale
            bias = self.bias(h * w)
            out = (logits if bias is None else logits + bias).softmax(-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, self.bias(h * w), scale=scale)
        y = self.up(out.transpose(2, 3).reshape(n, -1, h, w))
        return y[:, :, : x.shape[2], : x.shape[3]] if self.crop else y


class Residual(nn.Module):
    def __init__(self, main: nn.Module) -> None:
        super().__init__()
        self.main = main

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.main(x) + x
        return out


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("stride", [1, 2])
def test_attention_is_served(stride: int, heads: int, plain: bool) -> None:
    block = served(Residual(nn.Sequential(nn.GroupNorm(1, 8), Attention(stride, heads=heads, plain=plain))), "lowtention")
    assert block._config["num_heads"] == heads
    assert block._config["residual"]


def test_attention_of_stride_1_needs_no_crop() -> None:
    served(Attention(stride=1, crop=False), "lowtention")


class Positions(Attention):
    """A table that is zero for now, and no parameter."""

    def bias(self, tokens: int) -> Tensor | None:
        return torch.zeros(tokens, tokens, dtype=torch.float64)


class LearntPositions(Attention):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.position = nn.Parameter(torch.zeros(2, 1, 1))

    def bias(self, tokens: int) -> Tensor | None:
        return self.position.expand(2, tokens, tokens)


class PlainPositions(Attention):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.position = nn.Parameter(torch.zeros(1, 1, 1))

    def bias(self, tokens: int) -> Tensor | None:
        return self.position


class Causal(Attention):
    def bias(self, tokens: int) -> Tensor | None:
        return torch.ones(tokens, tokens, dtype=torch.bool).tril()


class ScaledByTokens(Attention):
    def forward(self, x: Tensor) -> Tensor:
        self.dim_was, self.scale = self.dim, 1.0 if x.shape[2] < 10 else 2.0
        return super().forward(x)


@pytest.mark.parametrize(
    "block",
    [
        Attention(scale=2.0),
        Attention(scale=1.001, plain=True),
        Attention(scale=8**0.5),
        Attention(order="kqv"),
        Attention(order="qvk"),
        Attention(order="vkq"),
        Attention(interleaved=True),
        Attention(bias=True),
        Attention(crop=False),
        Attention(padding=0),
        Attention(groups=2),
        Attention(output_padding=1),
        Attention(stride=1, dilation=2),
        Positions(),
        LearntPositions(),
        LearntPositions(plain=True),
        PlainPositions(plain=True),
        Causal(),
        ScaledByTokens(),
    ],
    ids=lambda b: type(b).__name__,
)
def test_attention_of_other_kinds(block: nn.Module) -> None:
    model = randomise(Net(block)).double()
    plain = copy.deepcopy(model)
    lowkernels.accelerate(model, backend="eager")
    assert type(model.block) is type(block)
    assert row(model, "block").reason
    for n, h, w in SIZES:
        x = image(n, 8, h, w, dtype=torch.float64)
        torch.testing.assert_close(run(model, x), run(plain, x), rtol=1e-9, atol=1e-9)
