"""separable_conv by the native CPU kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...backends.cpu.pack import ACTIVATION_NUMBERS, Packer, Unpacker, unsupported

__all__ = ["forward", "pack", "unpack", "unsupported_input", "unsupported_weights"]


def unsupported_weights(dw_weight: Tensor, dw_bias: Tensor | None, dw_act: str, pw_weight: Tensor, *rest: object) -> str | None:
    return unsupported(dw_weight.dtype, C=dw_weight.shape[0], C_out=pw_weight.shape[0])


def unsupported_input(x: Tensor, *args: object) -> str | None:
    return None


def pack(
    dw_weight: Tensor, dw_bias: Tensor | None, dw_act: str, pw_weight: Tensor, pw_bias: Tensor | None, *rest: object
) -> list[Tensor]:
    packer = Packer(dw_weight.dtype)
    packer.depthwise(dw_weight, dw_bias)
    packer.conv(pw_weight, pw_bias)
    return packer.tensors()


def unpack(packed: Sequence[Tensor], weights: Sequence[Tensor | None]) -> list[Tensor | None]:
    unpacker = Unpacker(packed)
    return [*unpacker.depthwise(), *unpacker.conv()]


def forward(
    x: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    dw_act: str,
    pw_weight: Tensor,
    pw_bias: Tensor | None,
    pw_act: str,
    stride: int,
    padding: int,
    residual: bool,
    packed: list[Tensor] | None,
) -> Tensor:
    if packed is None:
        packed = pack(dw_weight, dw_bias, dw_act, pw_weight, pw_bias)
    out: Tensor = torch.ops.lowkernels_cpu.inverted_residual.default(
        x, packed, False, 0, ACTIVATION_NUMBERS[dw_act], ACTIVATION_NUMBERS[pw_act], stride, padding, residual
    )
    return out
