"""gn_mlp by the native CPU kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...backends.cpu.pack import ACTIVATION_NUMBERS, Packer, Unpacker, unsupported

__all__ = ["forward", "pack", "unpack", "unsupported_input", "unsupported_weights"]


def unsupported_weights(
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    *rest: object,
) -> str | None:
    hidden, channels = fc1_weight.shape[:2]
    return unsupported(fc1_weight.dtype, C=channels, E=hidden, C_out=fc2_weight.shape[0])


def unsupported_input(x: Tensor, *args: object) -> str | None:
    return None


def pack(
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *rest: object,
) -> list[Tensor]:
    packer = Packer(fc1_weight.dtype)
    packer.norm(norm_weight, norm_bias)
    packer.conv(fc1_weight, fc1_bias)
    packer.conv(fc2_weight, fc2_bias)
    return packer.tensors()


def unpack(packed: Sequence[Tensor], weights: Sequence[Tensor | None]) -> list[Tensor | None]:
    unpacker = Unpacker(packed)
    return [*unpacker.norm(weights[0]), *unpacker.conv(), *unpacker.conv()]


def forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    act: str,
    residual: bool,
    packed: list[Tensor] | None,
) -> Tensor:
    if packed is None:
        packed = pack(norm_weight, norm_bias, eps, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    out: Tensor = torch.ops.lowkernels_cpu.gn_mlp.default(x, packed, eps, ACTIVATION_NUMBERS[act], residual)
    return out
