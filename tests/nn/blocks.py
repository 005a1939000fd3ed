"""Blocks for the tests of the drop-in modules: built on their own, and made from modules of other people's models.

Each comes with its ordinary computation, written from its children, so that whatever happens to the block happens to both.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowformer import blocks as lowformer_blocks
from lowformer.kernels import use_kernels
from lowkernels.nn import ConvNormAct, FusedBlock, FusedMBConv, GroupNormMLP, Lowtention, MBConv, SeparableConv
from lowkernels.testing import assert_within_budget

# The project's bound on float64 results, relative to the largest value.
PARITY = 1e-9

_ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True)
class Case:
    """A kind of block.

    Attributes:
        make: a new block in train mode with random parameters and statistics.
        plain: the ordinary computation of such a block: (block, x) -> output.
        channels: of x.
    """

    make: Callable[[], FusedBlock]
    plain: Callable[[Any, Tensor], Tensor]
    channels: int

    def x(self, dtype: torch.dtype = torch.float64, batch: int = 2, height: int = 6, width: int = 5, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        value = torch.randn(batch, self.channels, height, width, generator=generator, dtype=torch.float64)
        return value.to(dtype).contiguous(memory_format=torch.channels_last)

    def block(self, dtype: torch.dtype = torch.float64) -> Any:
        """A new block in eval mode."""
        return self.make().to(dtype).eval()


def randomize(module: nn.Module) -> nn.Module:
    """Parameters and statistics as after training: nothing is zero, one, or the same for two channels."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif tensor.is_floating_point():
                scale = tensor[0].numel() ** -0.5 if tensor.dim() == 4 else 0.3
                shift = 1.0 if tensor.dim() == 1 and name.endswith("weight") else 0.0
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale + shift)
    return module


def _unit(block: nn.Module, conv: str, norm: str) -> Callable[[Tensor], Tensor]:
    convolution, batch_norm = getattr(block, conv), getattr(block, norm)
    return lambda x: convolution(x) if batch_norm is None else batch_norm(convolution(x))


def _plain_standalone(kind: type[FusedBlock], arguments: dict[str, Any]) -> Callable[[Any, Tensor], Tensor]:
    default_act = {ConvNormAct: "hardswish", MBConv: "hardswish", FusedMBConv: "hardswish", GroupNormMLP: "gelu"}
    act = _ACTS[arguments.get("act", default_act.get(kind, "none"))]

    def plain(block: Any, x: Tensor) -> Tensor:
        if kind is ConvNormAct:
            y = act(_unit(block, "conv", "norm")(x))
        elif kind is SeparableConv:
            y = _ACTS[arguments.get("dw_act", "relu6")](_unit(block, "dw", "dw_norm")(x))
            y = _ACTS[arguments.get("pw_act", "none")](_unit(block, "pw", "pw_norm")(y))
        elif kind is MBConv:
            y = act(_unit(block, "dw", "dw_norm")(act(_unit(block, "expand", "expand_norm")(x))))
            y = _unit(block, "project", "project_norm")(y)
        elif kind is FusedMBConv:
            y = _unit(block, "project", "project_norm")(act(_unit(block, "conv", "conv_norm")(x)))
        elif kind is GroupNormMLP:
            y = block.fc2(act(block.fc1(block.norm(x))))
        else:
            y = _attention(block, x, arguments.get("num_heads", 1))
        residual = arguments.get(
            "residual", kind in (GroupNormMLP, Lowtention) or (kind in (MBConv, FusedMBConv) and y.shape == x.shape)
        )
        y = y + x if residual else y
        return y.mean((2, 3)) if arguments.get("pool") else y

    return plain


def _attention(block: Any, x: Tensor, heads: int) -> Tensor:
    y = x if block.norm is None else block.norm(x)
    qkv = block.qkv(_unit(block, "dw", "dw_norm")(y))
    n, c, h, w = qkv.shape
    outputs = []
    for head in qkv.split(c // heads, dim=1):
        q, k, v = (t.flatten(2).transpose(1, 2) for t in head.chunk(3, dim=1))
        weights = torch.softmax(q @ k.transpose(1, 2) * q.shape[-1] ** -0.5, dim=-1)
        outputs.append((weights @ v).transpose(1, 2).reshape(n, -1, h, w))
    out: Tensor = block.up(torch.cat(outputs, dim=1))[:, :, : x.shape[2], : x.shape[3]]
    return out


def _standalone(kind: type[FusedBlock], *channels: int, **arguments: Any) -> Case:
    def make() -> FusedBlock:
        block = kind(*channels, **arguments)
        randomize(block)
        return block

    return Case(make, _plain_standalone(kind, arguments), channels[0])


def _adopted(original: Callable[[], nn.Module], adopt: Callable[[Any], Any], channels: int, pool: bool = False) -> Case:
    def make() -> FusedBlock:
        block: FusedBlock = adopt(randomize(original()))
        return block

    def plain(block: Any, x: Tensor) -> Tensor:
        y: Tensor = block.original(x)
        return y.mean((2, 3)) if pool else y

    return Case(make, plain, channels)


def _through_lowformer(block: nn.Module) -> nn.Module:
    return use_kernels(nn.Sequential(block))[0]


class Mobile(nn.Module):
    """An inverted residual as in MobileNetV2, with children of its own making."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = 2 * channels
        self.layers = nn.ModuleDict(
            {
                "grow": nn.Sequential(nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()),
                "mix": nn.Sequential(
                    nn.Conv2d(hidden, hidden, 5, padding=2, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()
                ),
                "shrink": nn.Sequential(nn.Conv2d(hidden, channels, 1), nn.BatchNorm2d(channels, affine=False)),
            }
        )
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.layers.values():
            y = layer(y)
        return self.dropout(y) + x


class Separable(nn.Sequential):
    """A depthwise separable convolution as in MobileNet."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, 3, 2, 1, groups=channels, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, out_channels, 1, bias=True),
            nn.BatchNorm2d(out_channels),
            nn.SiLU(),
        )


class Stem(nn.Module):
    """Convolution, BatchNorm, SiLU and a skip, held two levels down."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.ModuleList(
            [nn.ModuleDict({"c": nn.Conv2d(channels, channels, 3, padding=1), "n": nn.BatchNorm2d(channels)})]
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = self.inner[0]
        return F.silu(parts["n"](parts["c"](x))) + x


_residual = lowformer_blocks.ResidualBlock
STANDALONE = {
    "conv": _standalone(ConvNormAct, 4, 8, act="silu"),
    "conv-residual": _standalone(ConvNormAct, 4, 4, kernel_size=5, bias=True, norm=False, residual=True, act="gelu_tanh"),
    "conv-stride2": _standalone(ConvNormAct, 3, 8, kernel_size=3, stride=2),
    "conv-pool": _standalone(ConvNormAct, 4, 8, kernel_size=1, bias=True, pool=True, act="relu"),
    "separable": _standalone(SeparableConv, 4, 8, kernel_size=5, stride=2, pw_act="relu"),
    "separable-residual": _standalone(SeparableConv, 4, 4, bias=True, norm=False, residual=True),
    "mbconv": _standalone(MBConv, 4, 4, expansion=2),
    "mbconv-stride2": _standalone(MBConv, 4, 8, kernel_size=7, stride=2, bias=True, act="relu6"),
    "fused-mbconv": _standalone(FusedMBConv, 4, 4, expansion=2),
    "fused-mbconv-stride2": _standalone(FusedMBConv, 4, 8, stride=2, bias=True, norm=False, act="silu"),
    "attention": _standalone(Lowtention, 8, num_heads=2, head_dim=4),
    "attention-stride2": _standalone(Lowtention, 8, kernel_size=5, stride=2, group_norm=False, residual=False),
    "mlp": _standalone(GroupNormMLP, 8, expansion=2),
    "mlp-relu": _standalone(GroupNormMLP, 4, act="relu", bias=False, residual=False, eps=0.1),
}
ADOPTED = {
    "lowformer-stem": _adopted(
        lambda: lowformer_blocks.ConvLayer(3, 8, 3, stride=2),
        lambda m: ConvNormAct.from_module(m, conv="conv", norm="norm", act="hardswish"),
        3,
    ),
    "lowformer-head": _adopted(
        lambda: lowformer_blocks.ConvLayer(8, 12, 1),
        lambda m: ConvNormAct.from_module(m, conv="conv", norm="norm", act="hardswish", pool=True),
        8,
        pool=True,
    ),
    "lowformer-downsampling": _adopted(
        lambda: _residual(lowformer_blocks.FusedMBConv(4, 8, expansion=2, stride=2), residual=False), _through_lowformer, 4
    ),
    "lowformer-fused-mbconv": _adopted(
        lambda: _residual(lowformer_blocks.FusedMBConv(4, 4, expansion=2, bias=True), drop_path=0.5), _through_lowformer, 4
    ),
    "lowformer-mbconv": _adopted(lambda: _residual(lowformer_blocks.MBConv(4, 4, expansion=2)), _through_lowformer, 4),
    "lowformer-attention": _adopted(
        lambda: _residual(nn.Sequential(nn.GroupNorm(1, 8), lowformer_blocks.Lowtention(8, stride=2)), drop_path=0.5),
        _through_lowformer,
        8,
    ),
    "lowformer-attention-bare": _adopted(lambda: _residual(lowformer_blocks.Lowtention(8, stride=1)), _through_lowformer, 8),
    "lowformer-mlp": _adopted(lambda: _residual(lowformer_blocks.MLP(8, expansion=2)), _through_lowformer, 8),
    "mobilenet-like": _adopted(
        lambda: Mobile(4),
        lambda m: MBConv.from_module(
            m,
            expand="layers.grow.0",
            expand_norm="layers.grow.1",
            dw="layers.mix.0",
            dw_norm="layers.mix.1",
            project="layers.shrink.0",
            project_norm="layers.shrink.1",
            act="relu6",
            residual=True,
        ),
        4,
    ),
    "separable-like": _adopted(
        lambda: Separable(4, 8),
        lambda m: SeparableConv.from_module(m, dw="0", dw_norm="1", dw_act="relu", pw="3", pw_norm="4", pw_act="silu"),
        4,
    ),
    "conv-like": _adopted(
        lambda: Stem(4),
        lambda m: ConvNormAct.from_module(m, conv="inner.0.c", norm="inner.0.n", act="silu", residual=True),
        4,
    ),
}
CASES = STANDALONE | ADOPTED
# One per operator, standalone and adopted in turn, for what does not depend on the configuration.
FEW = {name: CASES[name] for name in ("conv", "separable-like", "mobilenet-like", "fused-mbconv", "lowformer-attention", "mlp")}


def each(cases: dict[str, Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in cases.items()])


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Equal as float64 results are."""
    assert found.dtype == expected.dtype == torch.float64
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= PARITY * max(1.0, expected.abs().max().item())


def assert_follows(case: Case, block: Any, x: Tensor | None = None) -> None:
    """The block's operator gives what its children give now."""
    x = case.x() if x is None else x
    with torch.no_grad():
        expected = case.plain(block, x)
        assert_same(block(x), expected)
        assert expected.abs().max() > 0


def within_budget(case: Case, block: Any, x: Tensor, found: Tensor) -> None:
    """The block's output in a lower dtype against the ordinary computation in that dtype and in float64."""
    with torch.no_grad():
        eager = case.plain(block, x)
        reference = case.plain(copy.deepcopy(block).double(), x.double())
    longest = max([x[0].numel(), *(p[0].numel() for p in block.parameters() if p.dim() == 4)])
    assert_within_budget(found, eager, reference, longest, type(block).__name__)
