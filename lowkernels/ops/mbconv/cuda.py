"""mbconv in CUDA C++: one launch; the expanded tensor stays in shared memory, and is fp32 there for bf16 inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends.cuda import launch, tiling
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
    return tiling.candidates(_shape(x, expand_weight, dw_weight, project_weight, stride, padding), tiling.device_of(x))


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
    kernel = dw_weight.shape[2]
    shape = _shape(x, expand_weight, dw_weight, project_weight, stride, padding)
    tile = launch.tile_for(shape, x)
    out = launch.empty_nhwc(x, (x.shape[0], project_weight.shape[0], *shape.output))
    torch.ops.lowkernels_cuda.mbconv.default(
        launch.aligned(x), *packed, out, kernel, stride, padding, ACTIVATION_NUMBERS[act], residual, tile
    )
    return out
