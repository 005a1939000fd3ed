"""mbconv in CUDA C++: one launch; the expanded tensor stays in shared memory, and is fp32 there for bf16 inputs.

Weights are packed twice where warpgroup products may serve a call: see :mod:`lowkernels.backends.cuda.hopper_mbconv`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends.cuda import hopper_mbconv, launch, split, tiling
from ...backends.cuda import pack as packing
from ...backends.cuda.pack import ACTIVATION_NUMBERS, CHUNK, GROUP


def unsupported_weights(
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    act: str,
    stride: int,
    *rest: object,
) -> str | None:
    expanded, channels = expand_weight.shape[:2]
    out_channels, kernel = project_weight.shape[0], dw_weight.shape[2]
    reason = packing.unsupported(expand_weight.dtype, C_in=channels, E=expanded, C_out=out_channels)
    if reason is not None:
        return reason
    wide = expand_weight.dtype == torch.bfloat16
    shape = tiling.Shape(1, channels, kernel, kernel, out_channels, kernel, stride, 0, expanded, wide)
    needed, available = tiling.least_shared(shape), tiling.device_of(expand_weight).shared
    if needed > available:
        window = f"C_in is {channels} and the kernel {kernel}x{kernel}"
        return f"{window}: one output pixel needs {needed} bytes of shared memory, of {available}"
    return launch.load()


def unsupported_input(x: Tensor, *args: object) -> str | None:
    return None


def pack(
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    act: str,
    stride: int,
    *rest: object,
) -> list[Tensor]:
    expanded, out_channels = expand_weight.shape[0], project_weight.shape[0]
    return [
        packing.pointwise(expand_weight, columns=CHUNK),
        packing.vector(expand_bias, expand_weight, expanded, 4),
        packing.depthwise(dw_weight),
        packing.vector(dw_bias, dw_weight, expanded, CHUNK),
        packing.pointwise(project_weight, rows=CHUNK),
        packing.vector(project_bias, project_weight, out_channels, GROUP),
        *hopper_mbconv.pack(expand_weight, dw_weight, project_weight, stride),
    ]


def _shape(x: Tensor, expand_weight: Tensor, dw_weight: Tensor, project_weight: Tensor, stride: int, padding: int) -> tiling.Shape:
    kernel, wide = dw_weight.shape[2], x.dtype == torch.bfloat16
    return tiling.Shape(*launch.sizes(x), project_weight.shape[0], kernel, stride, padding, expand_weight.shape[0], wide)


def candidates(
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
) -> list[dict[str, int]]:
    shape = _shape(x, expand_weight, dw_weight, project_weight, stride, padding)
    device, wide = tiling.device_of(x), hopper_mbconv.choose(shape, x)
    best = tiling.choose(shape, device) if wide is not None else None
    others = tiling.candidates(shape, device) + ([best._asdict()] if best else [])
    return others + hopper_mbconv.candidates(shape, x)


def remark(
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
) -> str | None:
    return hopper_mbconv.remark(_shape(x, expand_weight, dw_weight, project_weight, stride, padding), x)


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
        packed = pack(expand_weight, expand_bias, dw_weight, dw_bias, project_weight, project_bias, act, stride)
    shape = _shape(x, expand_weight, dw_weight, project_weight, stride, padding)
    out = launch.empty_nhwc(x, (x.shape[0], project_weight.shape[0], *shape.output))
    tail = shape.kernel, stride, padding, ACTIVATION_NUMBERS[act], residual
    expand, first_bias, dw, second_bias, project, last_bias, *slabs = packed
    middle = first_bias, dw, second_bias
    wide = hopper_mbconv.choose(shape, x) if slabs else None
    if wide is not None:
        torch.ops.lowkernels_cuda.mbconv_sm90.default(launch.aligned(x), *slabs, *middle, last_bias, out, *tail, wide)
    else:
        tile = launch.tile_for(shape, x)
        memory, splits = split.memory(out, tiling.splits(shape, tile, tiling.device_of(x)), tiling.ctas(shape, tile))
        weights = expand, *middle, project, last_bias
        torch.ops.lowkernels_cuda.mbconv.default(launch.aligned(x), *weights, out, memory, *tail, tile, splits)
    return out
