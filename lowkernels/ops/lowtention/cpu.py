"""lowtention by the native CPU kernels. The scores and their softmax are fp32 in every dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...backends.cpu.pack import Packer, Unpacker, unsupported

__all__ = ["forward", "pack", "unpack", "unsupported_input", "unsupported_weights"]


def unsupported_weights(
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    qkv_weight: Tensor,
    up_weight: Tensor,
    *rest: object,
) -> str | None:
    inner, out_channels = up_weight.shape[:2]
    return unsupported(dw_weight.dtype, C=dw_weight.shape[0], inner_channels=inner, C_out=out_channels)


def unsupported_input(x: Tensor, *args: object) -> str | None:
    return None


def pack(
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    qkv_weight: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    num_heads: int,
    stride: int,
    *rest: object,
) -> list[Tensor]:
    packer = Packer(dw_weight.dtype)
    packer.norm(norm_weight, norm_bias)
    packer.depthwise(dw_weight, dw_bias)
    packer.conv(qkv_weight, None)
    up = up_weight.transpose(0, 1)
    if stride == 1:
        # Transposed with stride 1 is a convolution with the taps reversed.
        packer.conv(up.flip(2, 3), up_bias, stride)
    else:
        # Output row 2 i + p takes input row i - 1 + p + t by tap 3 - p - 2 t, for t = 0, 1; columns likewise.
        for row in (0, 1):
            for column in (0, 1):
                rows, columns = [3 - row, 1 - row], [3 - column, 1 - column]
                packer.conv(up[:, :, rows][:, :, :, columns], up_bias)
    return packer.tensors()


def unpack(packed: Sequence[Tensor], weights: Sequence[Tensor | None]) -> list[Tensor | None]:
    unpacker = Unpacker(packed)
    norm, depthwise = unpacker.norm(weights[0]), unpacker.depthwise()
    qkv, _ = unpacker.conv()
    like = weights[5]
    assert like is not None
    if like.shape[2] == 3:
        up, bias = unpacker.conv()
        up = up.flip(2, 3)
    else:
        up = qkv.new_empty(like.shape[1], like.shape[0], 4, 4)
        for row in (0, 1):
            for column in (0, 1):
                taps, bias = unpacker.conv()
                up[:, :, 1 - row :: 2, 1 - column :: 2] = taps.flip(2, 3)
    return [*norm, *depthwise, qkv, up.transpose(0, 1), bias]


def forward(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    qkv_weight: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    num_heads: int,
    stride: int,
    residual: bool,
    packed: list[Tensor] | None,
) -> Tensor:
    if packed is None:
        packed = pack(norm_weight, norm_bias, eps, dw_weight, dw_bias, qkv_weight, up_weight, up_bias, num_heads, stride)
    out: Tensor = torch.ops.lowkernels_cpu.lowtention.default(x, packed, eps, num_heads, stride, residual)
    return out
