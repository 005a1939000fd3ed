"""Weight layouts of the Triton kernels.

Matrices are stored as the kernels multiply by them, [inputs, outputs], with both sides zero-padded to a multiple of 16, so that
rows start on 16 or more bytes as tensor descriptors want it. Vectors (biases) are fp32 and padded alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

PAD = 16


def padded(size: int) -> int:
    """``size`` rounded up to a multiple of 16."""
    return -(-size // PAD) * PAD


def matrix(weight: Tensor) -> Tensor:
    """[inputs, outputs] padded on both sides."""
    rows, columns = weight.shape
    out = weight.new_zeros(padded(rows), padded(columns))
    out[:rows, :columns] = weight
    return out


def vector(values: Tensor | None, like: Tensor, size: int) -> Tensor:
    """fp32 [padded(size)] on ``like``'s device; zeros for None."""
    out = torch.zeros(padded(size), dtype=torch.float32, device=like.device)
    if values is not None:
        out[: values.numel()] = values
    return out


def pointwise(weight: Tensor) -> Tensor:
    """(O, I, 1, 1) as a matrix."""
    return matrix(weight[:, :, 0, 0].t())


def window(weight: Tensor) -> Tensor:
    """(O, I, k, k) as a matrix over the window: rows are (ky, kx, input channel)."""
    return matrix(weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0]))


def depthwise(weight: Tensor) -> Tensor:
    """(C, 1, k, k) as [k * k, padded(C)]."""
    channels = weight.shape[0]
    out = weight.new_zeros(weight.shape[2] * weight.shape[3], padded(channels))
    out[:, :channels] = weight.reshape(channels, -1).t()
    return out


def folded_norm(weight: Tensor, bias: Tensor | None, norm_weight: Tensor, norm_bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Fold the affine part of a GroupNorm into the 1x1 convolution (O, I, 1, 1) after it.

    With z = W diag(g) x, the convolution of the normalised input is ``rstd * (z - mean * W g) + (W b + bias)``. Each output's row
    of W diag(g) is scaled by a power of two before it is rounded, so that small or large g cannot leave fp16's range.

    Returns:
        The scaled matrix; fp32 [2, padded(O)], the scale of each output and the sum of its *rounded* row (times the scale: then
        a constant input cancels exactly); fp32 [padded(O)], the constant term.
    """
    dense = weight[:, :, 0, 0].float()
    folded = dense * norm_weight.float()
    largest = folded.abs().amax(1)
    exponent = torch.where(largest > 0, torch.frexp(largest).exponent, 0)
    scale = torch.ldexp(torch.ones_like(largest), exponent)
    rounded = (folded / scale[:, None]).to(weight.dtype)
    rows = torch.stack([vector(scale, weight, scale.numel()), vector(rounded.float().sum(1) * scale, weight, scale.numel())])
    constant = dense @ norm_bias.float()
    if bias is not None:
        constant = constant + bias.float()
    return matrix(rounded.t()), rows, vector(constant, weight, constant.numel())
