"""separable_conv in CUDA C++: depthwise through shared memory into the 1x1 product, one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends.cuda import launch, tiling
from ...backends.cuda import pack as packing
from ...backends.cuda.pack import ACTIVATION_NUMBERS, CHUNK, GROUP


def unsupported_weights(dw_weight: Tensor, dw_bias: Tensor | None, dw_act: str, pw_weight: Tensor, *rest: object) -> str | None:
    return packing.unsupported(dw_weight.dtype, C=dw_weight.shape[0], C_out=pw_weight.shape[0]) or launch.load()


def unsupported_input(x: Tensor, *args: object) -> str | None:
    return None


def pack(
    dw_weight: Tensor, dw_bias: Tensor | None, dw_act: str, pw_weight: Tensor, pw_bias: Tensor | None, *rest: object
) -> list[Tensor]:
    return [
        packing.depthwise(dw_weight),
        packing.vector(dw_bias, dw_weight, dw_weight.shape[0], CHUNK),
        packing.pointwise(pw_weight, rows=CHUNK),
        packing.vector(pw_bias, pw_weight, pw_weight.shape[0], GROUP),
    ]


def _shape(x: Tensor, dw_weight: Tensor, pw_weight: Tensor, stride: int, padding: int) -> tiling.Shape:
    return tiling.Shape(*launch.sizes(x), pw_weight.shape[0], dw_weight.shape[2], stride, padding, 0, False)


def candidates(
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
) -> list[dict[str, int]]:
    return tiling.candidates(_shape(x, dw_weight, pw_weight, stride, padding), tiling.device_of(x))


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
    kernel = dw_weight.shape[2]
    shape = _shape(x, dw_weight, pw_weight, stride, padding)
    tile = launch.tile_for(shape, x)
    out = launch.empty_nhwc(x, (x.shape[0], pw_weight.shape[0], *shape.output))
    acts = ACTIVATION_NUMBERS[dw_act], ACTIVATION_NUMBERS[pw_act]
    torch.ops.lowkernels_cuda.separable_conv.default(
        launch.aligned(x), *packed, out, kernel, stride, padding, *acts, residual, tile
    )
    return out
