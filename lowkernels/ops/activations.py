"""The activations every operator knows, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

# name -> function(x, inplace). ``gelu`` is the exact one, x * Phi(x).
_FUNCTIONS: dict[str, Callable[[torch.Tensor, bool], torch.Tensor]] = {
    "none": lambda x, inplace: x,
    "relu": lambda x, inplace: F.relu(x, inplace),
    "relu6": lambda x, inplace: F.relu6(x, inplace),
    "hardswish": lambda x, inplace: F.hardswish(x, inplace),
    "silu": lambda x, inplace: F.silu(x, inplace),
    "gelu": lambda x, inplace: F.gelu(x),
    "gelu_tanh": lambda x, inplace: F.gelu(x, approximate="tanh"),
}

ACTIVATIONS: tuple[str, ...] = tuple(_FUNCTIONS)


def activate(x: torch.Tensor, name: str, inplace: bool = False) -> torch.Tensor:
    """Apply activation ``name`` to ``x`` (any shape, floating)."""
    return _FUNCTIONS[name](x, inplace)


def activation_name(module: Any) -> str | None:
    """The name of the activation an ``nn.Module`` instance applies (exact types only), or None if it is not one of ours."""
    nn = torch.nn
    if type(module) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
    return {
        nn.Identity: "none",
        nn.ReLU: "relu",
        nn.ReLU6: "relu6",
        nn.Hardswish: "hardswish",
        nn.SiLU: "silu",
    }.get(type(module))
