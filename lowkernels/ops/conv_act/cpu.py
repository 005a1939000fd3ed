"""conv_act by the native CPU kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...backends.cpu.pack import ACTIVATION_NUMBERS, Packer, Unpacker, unsupported

__all__ = ["forward", "pack", "unpack", "unsupported_input", "unsupported_weights"]


def unsupported_weights(weight: Tensor, bias: Tensor | None, act: str, stride: int, padding: int, pool: bool) -> str | None:
    return unsupported(weight.dtype, C_out=weight.shape[0])


def unsupported_input(x: Tensor, *args: object) -> str | None:
    return None


def pack(weight: Tensor, bias: Tensor | None, act: str, stride: int, padding: int, pool: bool) -> list[Tensor]:
    packer = Packer(weight.dtype)
    packer.number(weight.shape[1])
    # The pooled form reads the plain layout: it is for 1x1 convolutions.
    packer.conv(weight, bias, 0 if pool else stride)
    return packer.tensors()


def unpack(packed: Sequence[Tensor], weights: Sequence[Tensor | None]) -> list[Tensor | None]:
    unpacker = Unpacker(packed)
    channels = unpacker.number()
    weight, bias = unpacker.conv()
    return [weight[:, :channels], bias]


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act: str,
    stride: int,
    padding: int,
    residual: Tensor | None,
    pool: bool,
    packed: list[Tensor] | None,
) -> Tensor:
    if packed is None:
        packed = pack(weight, bias, act, stride, padding, pool)
    if residual is not None and residual is not x:
        residual = residual.expand(x.shape[0], -1, -1, -1).contiguous(memory_format=torch.channels_last)
    out: Tensor = torch.ops.lowkernels_cpu.conv_act.default(x, residual, packed, ACTIVATION_NUMBERS[act], stride, padding, pool)
    return out
