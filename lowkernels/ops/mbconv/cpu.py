"""mbconv by the native CPU kernels. Between the expansion and the depthwise convolution nothing is rounded to bf16."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...backends.cpu.pack import ACTIVATION_NUMBERS, Packer, Unpacker, unsupported

__all__ = ["forward", "pack", "unpack", "unsupported_input", "unsupported_weights"]


def unsupported_weights(
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    project_weight: Tensor,
    *rest: object,
) -> str | None:
    expanded, channels = expand_weight.shape[:2]
    return unsupported(expand_weight.dtype, C_in=channels, E=expanded, C_out=project_weight.shape[0])


def unsupported_input(x: Tensor, *args: object) -> str | None:
    return None


def pack(
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    *rest: object,
) -> list[Tensor]:
    packer = Packer(expand_weight.dtype)
    packer.conv(expand_weight, expand_bias)
    packer.depthwise(dw_weight, dw_bias)
    packer.conv(project_weight, project_bias)
    return packer.tensors()


def unpack(packed: Sequence[Tensor], weights: Sequence[Tensor | None]) -> list[Tensor | None]:
    unpacker = Unpacker(packed)
    return [*unpacker.conv(), *unpacker.depthwise(), *unpacker.conv()]


def forward(
    x: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    act: str,
    stride: int,
    padding: int,
    residual: bool,
    packed: list[Tensor] | None,
) -> Tensor:
    if packed is None:
        packed = pack(expand_weight, expand_bias, dw_weight, dw_bias, project_weight, project_bias)
    number = ACTIVATION_NUMBERS[act]
    out: Tensor = torch.ops.lowkernels_cpu.inverted_residual.default(x, packed, True, number, number, 0, stride, padding, residual)
    return out
