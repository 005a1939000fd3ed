"""gn_mlp in Triton: one launch of ``expand_project``, and one before it for the statistics of images of more than 2**17
elements."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...backends.triton import expand_project, launch, packing
from ...backends.triton.launch import Launch

CANDIDATES = expand_project.NORM_CANDIDATES


def unsupported_weights(
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
    expanded, channels = fc1_weight.shape[:2]
    return launch.unsupported_dtype(fc1_weight) or launch.unsupported_channels(C=channels, E=expanded, C_out=fc2_weight.shape[0])


def unsupported_input(x: Tensor, *_: object) -> str | None:
    return launch.unsupported_input(x)


def pack(
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *_: object,
) -> list[Tensor]:
    w1, fold, b1 = packing.folded_norm(fc1_weight, fc1_bias, norm_weight, norm_bias)
    return [w1, b1, packing.pointwise(fc2_weight), packing.vector(fc2_bias, fc2_weight, fc2_weight.shape[0]), fold]


def plan(
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
    packed: list[Tensor],
) -> tuple[Tensor, list[Launch]]:
    """The output, still unwritten, and the launches that write it."""
    *weights, fold = packed
    call = (x, norm_weight, norm_bias, eps, fc1_weight, fc1_bias, fc2_weight, fc2_bias, act, residual)
    return expand_project.plan("gn_mlp", call, weights, fold, fc2_weight.shape[1], fc2_weight.shape[0], act, 1, 1, 0, residual, eps)


def forward(x: Tensor, *args: Any) -> Tensor:
    return launch.forward(plan, pack, x, *args)


def candidates(x: Tensor, *args: Any) -> list[dict[str, int]]:
    return launch.candidates("gn_mlp", plan, pack, x, *args)
