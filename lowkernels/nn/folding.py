"""Folding BatchNorm into the convolution before it: w' = w g / sqrt(v + eps), b' = (b - m) g / sqrt(v + eps) + beta."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def fold(conv: nn.Conv2d | nn.ConvTranspose2d, norm: nn.BatchNorm2d | None, exact: bool) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of ``conv`` followed by ``norm`` with its running statistics.

    Args:
        conv: its weight is (C_out, ...) if there is a norm.
        norm: in eval mode, or None.
        exact: fold in float64, for weights that are kept; otherwise in float32 at least, for weights made anew in every call.

    Returns:
        Differentiable functions of the parameters, in the dtype they were folded in, or the parameters themselves without norm.
    """
    weight, bias = conv.weight, conv.bias
    if norm is None:
        return weight, bias
    assert norm.running_mean is not None
    assert norm.running_var is not None
    dtype = torch.float64 if exact else torch.promote_types(weight.dtype, torch.float32)
    scale = torch.rsqrt(norm.running_var.to(dtype) + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.to(dtype)
    shift = -norm.running_mean.to(dtype) * scale
    if bias is not None:
        shift = shift + bias.to(dtype) * scale
    if norm.bias is not None:
        shift = shift + norm.bias.to(dtype)
    return weight.to(dtype) * scale.reshape(-1, *[1] * (weight.dim() - 1)), shift
