"""fused_mbconv in CUDA C++: one launch of two products back to back; the expanded tensor exists in registers only.

Weights are packed twice where warpgroup products may serve a call: see :mod:`lowkernels.backends.cuda.hopper`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends.cuda import chains, hopper, launch, split, tiling
from ...backends.cuda import pack as packing
from ...backends.cuda.pack import ACTIVATION_NUMBERS, GROUP
from ...choosing import settings


def unsupported_weights(conv_weight: Tensor, conv_bias: Tensor | None, project_weight: Tensor, *rest: object) -> str | None:
    expanded, channels = conv_weight.shape[:2]
    reason = packing.unsupported(conv_weight.dtype, C_in=channels, E=expanded, C_out=project_weight.shape[0])
    if reason is not None:
        return reason
    kernel = conv_weight.shape[2]
    needed, available = chains.least_shared(channels, kernel), tiling.device_of(conv_weight).shared
    if needed > available:
        window = f"conv_weight: C_in is {channels} and the kernel {kernel}x{kernel}"
        return f"{window}: the window of one output pixel needs {needed} bytes of shared memory, of {available}"
    return launch.load()


def unsupported_input(x: Tensor, *args: object) -> str | None:
    return None


def pack(
    conv_weight: Tensor, conv_bias: Tensor | None, project_weight: Tensor, project_bias: Tensor | None, *rest: object
) -> list[Tensor]:
    return [
        packing.vector(project_bias, project_weight, project_weight.shape[0], GROUP),
        packing.window(conv_weight),
        packing.vector(conv_bias, conv_weight, conv_weight.shape[0], 4),
        packing.chained(project_weight),
        *hopper.pack(conv_weight, conv_bias, project_weight),
    ]


def _shape(x: Tensor, conv_weight: Tensor, project_weight: Tensor, stride: int, padding: int) -> chains.Shape:
    expanded, _, kernel, _ = conv_weight.shape
    return chains.Shape(*launch.sizes(x), project_weight.shape[0], kernel, stride, padding, expanded, False)


def remark(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    act: str,
    stride: int,
    padding: int,
    residual: bool,
) -> str | None:
    return hopper.remark("fused_mbconv", _shape(x, conv_weight, project_weight, stride, padding), x)


def candidates(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    act: str,
    stride: int,
    padding: int,
    residual: bool,
) -> list[dict[str, int]]:
    shape = _shape(x, conv_weight, project_weight, stride, padding)
    return chains.candidates(shape, tiling.device_of(x)) + hopper.candidates("fused_mbconv", shape, x)


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
        packed = pack(conv_weight, conv_bias, project_weight, project_bias)
    shape = _shape(x, conv_weight, project_weight, stride, padding)
    out = launch.empty_nhwc(x, (x.shape[0], project_weight.shape[0], *shape.output))
    last_bias, weights, slabs = packed[0], packed[1:4], packed[4:]
    tail = shape.kernel, stride, padding, ACTIVATION_NUMBERS[act], residual
    wide = hopper.choose("fused_mbconv", shape, x) if slabs else None
    if wide is not None:
        torch.ops.lowkernels_cuda.fused_mbconv_sm90.default(launch.aligned(x), *slabs, last_bias, out, *tail, wide)
    else:
        device = tiling.device_of(x)
        tile = chains.division(shape, device, settings.current())
        memory, splits = split.memory(out, chains.splits(shape, tile, device), chains.ctas(shape, tile))
        torch.ops.lowkernels_cuda.fused_mbconv.default(launch.aligned(x), *weights, last_bias, out, memory, *tail, tile, splits)
    return out
