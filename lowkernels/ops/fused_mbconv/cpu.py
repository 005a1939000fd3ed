"""fused_mbconv by the native CPU kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...backends.cpu.pack import ACTIVATION_NUMBERS, Packer, Unpacker, unsupported

__all__ = ["forward", "pack", "unpack", "unsupported_input", "unsupported_weights"]


def unsupported_weights(conv_weight: Tensor, conv_bias: Tensor | None, project_weight: Tensor, *rest: object) -> str | None:
    expanded, channels = conv_weight.shape[:2]
    return unsupported(conv_weight.dtype, C_in=channels, E=expanded, C_out=project_weight.shape[0])


def unsupported_input(x: Tensor, *args: object) -> str | None:
    return None


def pack(
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    act: str,
    stride: int,
    *rest: object,
) -> list[Tensor]:
    packer = Packer(conv_weight.dtype)
    packer.conv(conv_weight, conv_bias, stride)
    packer.conv(project_weight, project_bias)
    return packer.tensors()


def unpack(packed: Sequence[Tensor], weights: Sequence[Tensor | None]) -> list[Tensor | None]:
    unpacker = Unpacker(packed)
    return [*unpacker.conv(), *unpacker.conv()]


def forward(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    act: str,
    stride: int,
    padding: int,
    residual: bool,
    packed: list[Tensor] | None,
) -> Tensor:
    if packed is None:
        packed = pack(conv_weight, conv_bias, project_weight, project_bias, act, stride)
    out: Tensor = torch.ops.lowkernels_cpu.fused_mbconv.default(x, packed, ACTIVATION_NUMBERS[act], stride, padding, residual)
    return out
