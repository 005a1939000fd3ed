"""What the eager references share. Steps run in place where autograd does not watch, since each owns its input."""

from __future__ import annotations

import torch
from torch import Tensor

from . import activations


def activate(x: Tensor, name: str) -> Tensor:
    return activations.activate(x, name, inplace=not torch.is_grad_enabled())


def add(out: Tensor, x: Tensor) -> Tensor:
    return out + x if torch.is_grad_enabled() else out.add_(x)


def unsupported_weights(*weights: object) -> str | None:
    return None


def unsupported_input(*call: object) -> str | None:
    return None
