"""What the eager references share. Steps run in place where autograd does not watch, since each owns its input."""

from __future__ import annotations

import torch
from torch import Tensor

from . import activations


def activate(x: Tensor, name: str) -> Tensor:
    return activations.activate(x, name, inplace=not torch.is_grad_enabled())


def add(out: Tensor, x: Tensor) -> Tensor:
    return out + x if torch.is_grad_enabled() else out.add_(x)


def group_norm_input(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x`` in a layout GroupNorm can train on. On the CPU, PyTorch's backward (2.13 still) crashes where a channels_last input
    needs no gradient but the weights do."""
    trainable = weight.requires_grad or (bias is not None and bias.requires_grad)
    unsafe = torch.is_grad_enabled() and trainable and not x.requires_grad
    return x.clone(memory_format=torch.contiguous_format) if unsafe else x


def group_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """GroupNorm with one group."""
    # Not torch.nn.functional's, which refuses a single value (N = C = H = W = 1).
    return torch.group_norm(group_norm_input(x, weight, bias), 1, weight, bias, eps)


def unsupported_weights(*weights: object) -> str | None:
    return None


def unsupported_input(*call: object) -> str | None:
    return None
