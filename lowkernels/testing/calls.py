"""Random calls of the operators, with weights scaled so that values keep a size around one through a block."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Call(NamedTuple):
    """One call of an operator: its name and its arguments without the dispatch ones."""

    operator: str
    args: tuple[Any, ...]


def random_call(
    operator: str,
    *,
    batch: int = 2,
    channels: int = 8,
    out_channels: int | None = None,
    hidden: int | None = None,
    height: int = 7,
    width: int = 7,
    kernel_size: int = 3,
    stride: int = 1,
    padding: int | None = None,
    act: str | None = None,
    bias: bool = True,
    norm: bool = True,
    num_heads: int = 2,
    head_dim: int | None = None,
    residual: bool | None = None,
    pool: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Call:
    """A call of ``operator`` with random data; the same for the same arguments on every machine.

    Args:
        operator: one of :data:`lowkernels.ops.OPERATORS`.
        batch, channels, height, width: of x, which is channels_last.
        out_channels: defaults to ``channels``.
        hidden: expanded channels, default 4 * ``channels``.
        kernel_size, stride, padding: of the spatial convolution; padding defaults to ``kernel_size // 2``.
        act: defaults to the operator's own default.
        bias: give every convolution a bias.
        norm: lowtention only: with GroupNorm.
        num_heads, head_dim: lowtention only; head_dim defaults to ``channels // (2 * num_heads)``.
        residual: default: wherever the shapes allow it.
        pool: conv_act only.
        dtype, device: of every tensor.
        seed: of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    out_channels = channels if out_channels is None else out_channels
    hidden = 4 * channels if hidden is None else hidden
    padding = kernel_size // 2 if padding is None else padding

    def tensor(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        value = torch.randn(shape, generator=generator, dtype=torch.float64) * scale + shift
        return value.to(dtype).to(device)

    def weight(*shape: int, gain: float = 1.4) -> Tensor:
        return tensor(*shape, scale=gain / math.sqrt(math.prod(shape[1:])))

    def bias_of(size: int) -> Tensor | None:
        return tensor(size, scale=0.1) if bias else None

    x = tensor(batch, channels, height, width).contiguous(memory_format=torch.channels_last)
    out_height = (height + 2 * padding - kernel_size) // stride + 1
    out_width = (width + 2 * padding - kernel_size) // stride + 1
    keeps_shape = out_channels == channels and (out_height, out_width) == (height, width)
    if operator in ("lowtention", "gn_mlp"):
        keeps_shape = out_channels == channels
    residual = keeps_shape if residual is None else residual
    k = kernel_size

    if operator == "conv_act":
        skip = tensor(batch, out_channels, out_height, out_width) if residual else None
        skip = skip if skip is None else skip.contiguous(memory_format=torch.channels_last)
        kernel = weight(out_channels, channels, k, k)
        return Call(operator, (x, kernel, bias_of(out_channels), act or "none", stride, padding, skip, pool))
    if operator == "separable_conv":
        dw, pw = weight(channels, 1, k, k), weight(out_channels, channels, 1, 1)
        tail = ("none", stride, padding, residual)
        return Call(operator, (x, dw, bias_of(channels), act or "relu6", pw, bias_of(out_channels), *tail))
    if operator == "mbconv":
        expand, dw = weight(hidden, channels, 1, 1), weight(hidden, 1, k, k)
        project = weight(out_channels, hidden, 1, 1, gain=0.7)
        biases = bias_of(hidden), bias_of(hidden), bias_of(out_channels)
        tail = (act or "hardswish", stride, padding, residual)
        return Call(operator, (x, expand, biases[0], dw, biases[1], project, biases[2], *tail))
    if operator == "fused_mbconv":
        kernel, project = weight(hidden, channels, k, k), weight(out_channels, hidden, 1, 1, gain=0.7)
        tail = (act or "hardswish", stride, padding, residual)
        return Call(operator, (x, kernel, bias_of(hidden), project, bias_of(out_channels), *tail))
    if operator == "lowtention":
        inner = num_heads * (head_dim or channels // (2 * num_heads))
        affine = (tensor(channels, scale=0.1, shift=1.0), tensor(channels, scale=0.1)) if norm else (None, None)
        up_size = 3 if stride == 1 else 4
        up_scale = 0.7 / math.sqrt(inner * (up_size // stride) ** 2)
        up = tensor(inner, out_channels, up_size, up_size, scale=up_scale)
        dw, qkv = weight(channels, 1, k, k), weight(3 * inner, channels, 1, 1)
        weights = (dw, bias_of(channels), qkv, up, bias_of(out_channels))
        return Call(operator, (x, *affine, 1e-5, *weights, num_heads, stride, residual))
    if operator == "gn_mlp":
        affine = tensor(channels, scale=0.1, shift=1.0), tensor(channels, scale=0.1)
        fc1, fc2 = weight(hidden, channels, 1, 1), weight(out_channels, hidden, 1, 1, gain=0.7)
        fcs = (fc1, bias_of(hidden), fc2, bias_of(out_channels))
        return Call(operator, (x, *affine, 1e-5, *fcs, act or "gelu", residual))
    raise ValueError(f"unknown operator {operator!r}")
