"""gn_mlp in CUDA C++: one launch, which normalises its rows in shared memory; one more before it for the statistics of images of
more than 2**16 elements.

Weights are packed twice where warpgroup products may serve a call: see :mod:`lowkernels.backends.cuda.hopper`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends.cuda import chains, hopper, launch, split, tiling
from ...backends.cuda import pack as packing
from ...backends.cuda.pack import ACTIVATION_NUMBERS, GROUP
from ...choosing import settings


def unsupported_weights(
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    *rest: object,
) -> str | None:
    expanded, channels = fc1_weight.shape[:2]
    reason = packing.unsupported(fc1_weight.dtype, C=channels, E=expanded, C_out=fc2_weight.shape[0])
    if reason is not None:
        return reason
    needed, available = chains.least_shared(channels, 1), tiling.device_of(fc1_weight).shared
    if needed > available:
        return f"fc1_weight: C is {channels}: one pixel needs {needed} bytes of shared memory, of {available}"
    return launch.load()


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
    expanded, channels = fc1_weight.shape[:2]
    return [
        *(packing.vector(v, fc1_weight, channels, 4) for v in (norm_weight, norm_bias)),
        packing.vector(fc2_bias, fc2_weight, fc2_weight.shape[0], GROUP),
        packing.window(fc1_weight),
        packing.vector(fc1_bias, fc1_weight, expanded, 4),
        packing.chained(fc2_weight),
        *hopper.pack(fc1_weight, fc1_bias, fc2_weight),
    ]


def _shape(x: Tensor, fc1_weight: Tensor, fc2_weight: Tensor) -> chains.Shape:
    batch, channels, height, width = launch.sizes(x)
    return chains.Shape(batch, channels, height * width, 1, fc2_weight.shape[0], 1, 1, 0, fc1_weight.shape[0], True)


def remark(
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
) -> str | None:
    return hopper.remark("gn_mlp", _shape(x, fc1_weight, fc2_weight), x)


def candidates(
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
) -> list[dict[str, int]]:
    shape = _shape(x, fc1_weight, fc2_weight)
    return chains.candidates(shape, tiling.device_of(x)) + hopper.candidates("gn_mlp", shape, x)


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
    shape = _shape(x, fc1_weight, fc2_weight)
    norm, last_bias, weights, slabs = packed[:2], packed[2], packed[3:6], packed[6:]
    wide = hopper.choose("gn_mlp", shape, x) if slabs else None
    tile = wide or chains.division(shape, tiling.device_of(x), settings.current())
    pieces = chains.pieces(shape, tile)
    partial = [torch.empty(shape.batch, pieces, 2, dtype=torch.float32, device=x.device)] if pieces else []
    out = launch.empty_nhwc(x, (x.shape[0], fc2_weight.shape[0], *x.shape[2:]))
    tail = eps, ACTIVATION_NUMBERS[act], residual, tile
    if wide is not None:
        torch.ops.lowkernels_cuda.gn_mlp_sm90.default(launch.aligned(x), *norm, *slabs, last_bias, partial, out, *tail)
    else:
        memory, splits = split.memory(out, chains.splits(shape, tile, tiling.device_of(x)), chains.ctas(shape, tile))
        torch.ops.lowkernels_cuda.gn_mlp.default(launch.aligned(x), *norm, *weights, last_bias, partial, out, memory, *tail, splits)
    return out
