"""fused_mbconv in Triton: one launch of ``expand_project``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...backends.triton import expand_project, launch, packing
from ...backends.triton.launch import Launch

CANDIDATES = expand_project.CANDIDATES


def unsupported_weights(
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    act: str,
    stride: int,
    padding: int,
    residual: bool,
) -> str | None:
    expanded, channels = conv_weight.shape[:2]
    return launch.unsupported_dtype(conv_weight) or launch.unsupported_channels(
        C_in=channels, E=expanded, C_out=project_weight.shape[0]
    )


def unsupported_input(x: Tensor, *_: object) -> str | None:
    return launch.unsupported_input(x)


def pack(
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    *_: object,
) -> list[Tensor]:
    expanded, out_channels = conv_weight.shape[0], project_weight.shape[0]
    return [
        packing.window(conv_weight),
        packing.vector(conv_bias, conv_weight, expanded),
        packing.pointwise(project_weight),
        packing.vector(project_bias, project_weight, out_channels),
    ]


def plan(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    act: str,
    stride: int,
    padding: int,
    residual: bool,
    packed: list[Tensor],
) -> tuple[Tensor, list[Launch]]:
    """The output, still unwritten, and the launch that writes it."""
    (out_channels, expanded), size = project_weight.shape[:2], conv_weight.shape[2]
    call = (x, conv_weight, conv_bias, project_weight, project_bias, act, stride, padding, residual)
    return expand_project.plan(
        "fused_mbconv", call, packed, None, expanded, out_channels, act, size, stride, padding, residual, eps=0.0
    )


def forward(x: Tensor, *args: Any) -> Tensor:
    return launch.forward(plan, pack, x, *args)


def candidates(x: Tensor, *args: Any) -> list[dict[str, int]]:
    return launch.candidates("fused_mbconv", plan, pack, x, *args)
