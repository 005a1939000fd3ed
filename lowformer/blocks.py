"""LowFormer's building blocks in plain PyTorch.

Each block is a map from (N, C, H, W) to (N, C', H', W') and takes any H, W >= 1; a stride-2 convolution
gives ceil(H/2) by ceil(W/2). Child names are timm's, which fixes the keys of the state dict.
:mod:`lowformer.kernels` replaces whole blocks by drop-in modules with the same children, so a block is
only ever called, never looked into, by its parent.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "MLP",
    "ConvLayer",
    "DropPath",
    "FusedMBConv",
    "LowFormerBlock",
    "Lowtention",
    "MBConv",
    "ResidualBlock",
]


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training, zero a whole sample with probability ``drop_prob``.

    Samples that stay are scaled by ``1 / (1 - drop_prob)``, so the expectation is kept. Identity in eval
    mode.
    """

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = 1.0 - self.drop_prob
        return x * (x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(keep) / keep)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3g}"


class ResidualBlock(nn.Module):
    """``drop_path(main(x)) + x``, or ``main(x)`` alone where main changes the shape."""

    def __init__(self, main: nn.Module, *, residual: bool = True, drop_path: float = 0.0) -> None:
        super().__init__()
        self.main = main
        self.shortcut = nn.Identity() if residual else None
        self.drop_path: nn.Module = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.main(x)
        return y if self.shortcut is None else self.drop_path(y) + self.shortcut(x)


class ConvLayer(nn.Module):
    """Convolution with "same" padding, then optionally BatchNorm, then optionally Hardswish."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
        norm: bool = True,
        act: bool = True,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=bias)
        self.norm: nn.Module = nn.BatchNorm2d(out_channels) if norm else nn.Identity()
        self.act: nn.Module = nn.Hardswish() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.norm(self.conv(x)))
        return y


class FusedMBConv(nn.Module):
    """Dense 3x3 convolution to the expanded width, then a linear 1x1 projection (arXiv 2104.00298)."""

    def __init__(self, in_channels: int, out_channels: int, *, expansion: int, stride: int = 1, bias: bool = False) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.spatial_conv = ConvLayer(in_channels, hidden, 3, stride=stride, bias=bias)
        self.point_conv = ConvLayer(hidden, out_channels, 1, act=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.point_conv(self.spatial_conv(x))
        return y


class MBConv(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection (arXiv 1801.04381); only the last is normalised."""

    def __init__(self, in_channels: int, out_channels: int, *, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.inverted_conv = ConvLayer(in_channels, hidden, 1, bias=True, norm=False)
        self.depth_conv = ConvLayer(hidden, hidden, 3, groups=hidden, bias=True, norm=False)
        self.point_conv = ConvLayer(hidden, out_channels, 1, act=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.point_conv(self.depth_conv(self.inverted_conv(x)))
        return y


class Lowtention(nn.Module):
    """LowFormer's attention: at half the channels and, with stride 2, at half the resolution (arXiv
    2409.03460).

    Depthwise convolution (5x5 at stride 2, 3x3 at stride 1) -> 1x1 convolution to q, k, v -> softmax
    attention over all positions -> transposed convolution, which is output projection and upsampling in
    one -> crop to the input's H x W.

    The channels of q, k, v are head-major: head i owns ``[q_i, k_i, v_i]``, each of ``head_dim`` channels.
    """

    def __init__(self, channels: int, *, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.num_heads = max(1, channels // 2 // 30)
        self.head_dim = channels // self.num_heads // 2
        inner = self.num_heads * self.head_dim
        self.conv_proj = ConvLayer(channels, channels, 5 if stride == 2 else 3, stride=stride, groups=channels, act=False)
        self.pwise = nn.Conv2d(channels, 3 * inner, 1, bias=False)
        # 4x4 at stride 2 gives exactly twice the size and 3x3 at stride 1 the same; an odd input is one
        # shorter: cropped
        self.upsampling = nn.ConvTranspose2d(inner, channels, 4 if stride == 2 else 3, stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        qkv: Tensor = self.pwise(self.conv_proj(x))
        n, _, h, w = qkv.shape
        q, k, v = qkv.reshape(n, self.num_heads, 3 * self.head_dim, h * w).transpose(2, 3).chunk(3, dim=3)
        values = F.scaled_dot_product_attention(q, k, v)
        values = values.transpose(2, 3).reshape(n, self.num_heads * self.head_dim, h, w)
        y: Tensor = self.upsampling(values)
        return y[:, :, : x.shape[2], : x.shape[3]]


class MLP(nn.Sequential):
    """GroupNorm over (C, H, W) of each image -> 1x1 convolution -> exact GELU -> 1x1 convolution."""

    def __init__(self, channels: int, *, expansion: int) -> None:
        hidden = channels * expansion
        super().__init__(
            nn.GroupNorm(1, channels),
            nn.Conv2d(channels, hidden, 1),
            nn.GELU(),
            nn.Conv2d(hidden, channels, 1),
        )


class LowFormerBlock(nn.Module):
    """Lowtention, MLP and local convolution block, each a residual; the first two may be left out."""

    def __init__(
        self,
        channels: int,
        *,
        attention: bool,
        mlp: bool,
        attention_stride: int,
        expansion: int,
        fused: bool,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.attn: nn.Module = nn.Identity()
        self.mlp: nn.Module = nn.Identity()
        if attention:
            attn: nn.Module = Lowtention(channels, stride=attention_stride)
            if mlp:
                attn = nn.Sequential(nn.GroupNorm(1, channels), attn)
            self.attn = ResidualBlock(attn, drop_path=drop_path)
        if mlp:
            self.mlp = ResidualBlock(MLP(channels, expansion=expansion), drop_path=drop_path)
        local = (
            FusedMBConv(channels, channels, expansion=expansion, bias=True)
            if fused
            else MBConv(channels, channels, expansion=expansion)
        )
        self.local = ResidualBlock(local, drop_path=drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.local(self.mlp(self.attn(x)))
        return y
