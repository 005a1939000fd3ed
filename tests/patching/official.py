"""A LowFormer with the module tree of the authors' repository, rebuilt from the names in their state dicts and the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

Shapes = Mapping[str, Sequence[int]]


class OpSequential(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.op_list = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.op_list:
            x = layer(x)
        return x


class ConvLayer(nn.Module):
    def __init__(self, shapes: Shapes, prefix: str, stride: int = 1, act: bool = True) -> None:
        super().__init__()
        out_channels, of_group, kernel, _ = shapes[f"{prefix}.conv.weight"]
        groups = out_channels if of_group == 1 else 1
        bias = f"{prefix}.conv.bias" in shapes
        self.conv = nn.Conv2d(of_group * groups, out_channels, kernel, stride, kernel // 2, groups=groups, bias=bias)
        self.norm = nn.BatchNorm2d(out_channels) if f"{prefix}.norm.weight" in shapes else None
        self.act = nn.Hardswish() if act else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.act is None else self.act(x)


class Convs(nn.Module):
    """MBConv or FusedMBConv: the layers run one after another, the last without activation."""

    def __init__(self, shapes: Shapes, prefix: str, names: tuple[str, ...], stride: int) -> None:
        super().__init__()
        self.names = names
        for name in names:
            strided = stride if name == "spatial_conv" else 1
            self.add_module(name, ConvLayer(shapes, f"{prefix}.{name}", strided, act=name != "point_conv"))

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = getattr(self, name)(x)
        return x


class Attention(nn.Module):
    def __init__(self, shapes: Shapes, prefix: str) -> None:
        super().__init__()
        channels, _, kernel, _ = shapes[f"{prefix}.conv_proj.0.weight"]
        inner, _, window, _ = shapes[f"{prefix}.upsampling.weight"]
        stride = 2 if window == 4 else 1
        self.heads = max(1, channels // 2 // 30)
        self.conv_proj = nn.Sequential(
            nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False), nn.BatchNorm2d(channels)
        )
        self.pwise = nn.Sequential(nn.Conv2d(channels, 3 * inner, 1, bias=False))
        self.upsampling = nn.ConvTranspose2d(inner, channels, window, stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pwise(self.conv_proj(x))
        n, c, h, w = y.size()
        y = y.view(n, self.heads, c // self.heads, h * w).permute(0, 1, 3, 2)
        q, k, v = y.chunk(3, -1)
        out = F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous())
        y = self.upsampling(out.permute(0, 1, 3, 2).reshape(n, c // 3, h, w))
        return y[..., : x.shape[-2], : x.shape[-1]]


class ResidualBlock(nn.Module):
    def __init__(self, main: nn.Module | None, shortcut: nn.Module | None) -> None:
        super().__init__()
        self.main = main
        self.shortcut = shortcut
        self.post_act = None
        self.pre_norm = None

    def forward(self, x: Tensor) -> Tensor:
        assert self.main is not None
        y = self.main(x)
        if self.shortcut is not None:
            y = y + self.shortcut(x)
        return y if self.post_act is None else self.post_act(y)


class LowFormerBlock(nn.Module):
    def __init__(self, total: nn.Sequential) -> None:
        super().__init__()
        self.total = total

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.total(x)
        return y


class Backbone(nn.Module):
    def __init__(self, input_stem: nn.Module, stages: list[nn.Module]) -> None:
        super().__init__()
        self.input_stem = input_stem
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        outputs = {"stage0": self.input_stem(x)}
        for i, stage in enumerate(self.stages):
            outputs[f"stage{i + 1}"] = stage(outputs[f"stage{i}"])
        return outputs


class LinearLayer(nn.Module):
    def __init__(self, shapes: Shapes, prefix: str) -> None:
        super().__init__()
        out_features, in_features = shapes[f"{prefix}.linear.weight"]
        self.linear = nn.Linear(in_features, out_features, bias=f"{prefix}.linear.bias" in shapes)
        normed = f"{prefix}.norm.weight" in shapes
        self.norm = nn.LayerNorm(out_features) if normed else None
        self.act = nn.Hardswish() if normed else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x.flatten(1))
        if self.norm is not None:
            x = self.norm(x)
        return x if self.act is None else self.act(x)


class Model(nn.Module):
    """The whole model for a list of keys and shapes."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        stem = f"{STAGES}input_stem"
        self.backbone = Backbone(
            OpSequential([_block(shapes, p, 2 if i == 0 else 1) for i, p in enumerate(_items(shapes, stem))]),
            [
                OpSequential([_block(shapes, p, 2 if j == 0 else 1) for j, p in enumerate(_items(shapes, f"{STAGES}stages.{i}"))])
                for i in range(4)
            ],
        )
        conv = ConvLayer(shapes, "head.op_list.0")
        linears: list[nn.Module] = [LinearLayer(shapes, f"head.op_list.{i}") for i in (2, 3)]
        self.head = OpSequential([conv, nn.AdaptiveAvgPool2d(1), *linears])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.backbone(x)["stage4"])
        return y


STAGES = "backbone."


def _items(shapes: Shapes, prefix: str) -> list[str]:
    found = []
    for i in count():
        item = f"{prefix}.op_list.{i}"
        if not any(key.startswith(f"{item}.") for key in shapes):
            return found
        found.append(item)
    return found


def _block(shapes: Shapes, prefix: str, stride: int) -> nn.Module:
    def has(part: str) -> bool:
        return any(key.startswith(f"{prefix}.{part}.") for key in shapes)

    if has("conv"):
        return ConvLayer(shapes, prefix, stride)
    if has("main"):
        return _residual(shapes, prefix, stride)
    if has("total.0.0"):
        first = [_residual(shapes, f"{prefix}.total.0.{i}") for i in (0, 1) if has(f"total.0.{i}")]
        return LowFormerBlock(nn.Sequential(nn.Sequential(*first), _residual(shapes, f"{prefix}.total.1")))
    parts = [_residual(shapes, f"{prefix}.total.{i}") if has(f"total.{i}") else nn.Identity() for i in (0, 1)]
    return LowFormerBlock(nn.Sequential(*parts))


def _residual(shapes: Shapes, prefix: str, stride: int = 1) -> ResidualBlock:
    main, keys = f"{prefix}.main", [key for key in shapes if key.startswith(f"{prefix}.main.")]
    shortcut: Any = nn.Identity() if stride == 1 else None
    if f"{main}.spatial_conv.conv.weight" in keys:
        return ResidualBlock(Convs(shapes, main, ("spatial_conv", "point_conv"), stride), shortcut)
    if f"{main}.inverted_conv.conv.weight" in keys:
        return ResidualBlock(Convs(shapes, main, ("inverted_conv", "depth_conv", "point_conv"), stride), shortcut)
    if f"{main}.conv_proj.0.weight" in keys:
        return ResidualBlock(Attention(shapes, main), shortcut)
    channels = shapes[f"{main}.0.weight"][0]
    norm = nn.GroupNorm(1, channels)
    if f"{main}.1.conv_proj.0.weight" in keys:
        return ResidualBlock(nn.Sequential(norm, Attention(shapes, f"{main}.1")), shortcut)
    hidden = shapes[f"{main}.1.weight"][0]
    layers = (norm, nn.Conv2d(channels, hidden, 1), nn.GELU(), nn.Conv2d(hidden, channels, 1))
    return ResidualBlock(nn.Sequential(*layers), shortcut)
