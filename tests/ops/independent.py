"""The operators once more, written from their description and sharing no code with the library.

:func:`exact` is float64 arithmetic spelled out: convolutions as sums over patches, the transposed convolution by inserting zeros,
statistics, softmax and activations by their formulas. :func:`plain` is what a PyTorch user would write, in the dtype of the
arguments: the "eager" of the error budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Maybe = Tensor | None


class Primitives(NamedTuple):
    """The arithmetic an operator is made of."""

    conv: Callable[[Tensor, Tensor, Maybe, int, int, int], Tensor]
    conv_transpose: Callable[[Tensor, Tensor, Maybe, int, int], Tensor]
    group_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    attention: Callable[[Tensor, Tensor, Tensor], Tensor]
    act: dict[str, Callable[[Tensor], Tensor]]


def _conv(x: Tensor, weight: Tensor, bias: Maybe, stride: int, padding: int, groups: int) -> Tensor:
    n, _, h, w = x.shape
    out, per_group, k, _ = weight.shape
    height, width = (h + 2 * padding - k) // stride + 1, (w + 2 * padding - k) // stride + 1
    patches = F.unfold(x, k, padding=padding, stride=stride).reshape(n, groups, per_group * k * k, -1)
    y = torch.einsum("ngil,goi->ngol", patches, weight.reshape(groups, out // groups, -1)).reshape(n, out, height, width)
    return y if bias is None else y + bias[:, None, None]


def _conv_transpose(x: Tensor, weight: Tensor, bias: Maybe, stride: int, padding: int) -> Tensor:
    n, c, h, w = x.shape
    spread = x.new_zeros(n, c, (h - 1) * stride + 1, (w - 1) * stride + 1)
    spread[:, :, ::stride, ::stride] = x
    return _conv(spread, weight.flip(2, 3).transpose(0, 1), bias, 1, weight.shape[2] - 1 - padding, 1)


def _group_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    mean = x.mean((1, 2, 3), keepdim=True)
    variance = (x - mean).square().mean((1, 2, 3), keepdim=True)
    return (x - mean) / (variance + eps).sqrt() * weight[:, None, None] + bias[:, None, None]


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("nhtd,nhsd->nhts", q, k) / math.sqrt(q.shape[-1])
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return torch.einsum("nhts,nhsd->nhtd", weights / weights.sum(-1, keepdim=True), v)


_EXACT = Primitives(
    _conv,
    _conv_transpose,
    _group_norm,
    _attention,
    {
        "none": lambda x: x,
        "relu": lambda x: x.clamp(min=0),
        "relu6": lambda x: x.clamp(0, 6),
        "hardswish": lambda x: x * (x + 3).clamp(0, 6) / 6,
        "silu": lambda x: x / (1 + (-x).exp()),
        "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
        "gelu_tanh": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    },
)
_PLAIN = Primitives(
    lambda x, w, b, stride, padding, groups: F.conv2d(x, w, b, stride, padding, 1, groups),
    lambda x, w, b, stride, padding: F.conv_transpose2d(x, w, b, stride, padding),
    # Not F.group_norm, which refuses a single value (N = C = H = W = 1).
    lambda x, w, b, eps: torch.group_norm(x, 1, w, b, eps),
    F.scaled_dot_product_attention,
    {
        "none": lambda x: x,
        "relu": F.relu,
        "relu6": F.relu6,
        "hardswish": F.hardswish,
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    },
)


def _compose(p: Primitives, operator: str, a: dict[str, Any]) -> Tensor:
    x: Tensor = a["x"]
    if operator == "conv_act":
        y = p.act[a["act"]](p.conv(x, a["weight"], a["bias"], a["stride"], a["padding"], 1))
        y = y if a["residual"] is None else y + a["residual"]
        return y.mean((2, 3)) if a["pool"] else y
    if operator == "separable_conv":
        y = p.conv(x, a["dw_weight"], a["dw_bias"], a["stride"], a["padding"], x.shape[1])
        y = p.conv(p.act[a["dw_act"]](y), a["pw_weight"], a["pw_bias"], 1, 0, 1)
        y = p.act[a["pw_act"]](y)
    elif operator == "mbconv":
        act = p.act[a["act"]]
        y = act(p.conv(x, a["expand_weight"], a["expand_bias"], 1, 0, 1))
        y = act(p.conv(y, a["dw_weight"], a["dw_bias"], a["stride"], a["padding"], y.shape[1]))
        y = p.conv(y, a["project_weight"], a["project_bias"], 1, 0, 1)
    elif operator == "fused_mbconv":
        y = p.act[a["act"]](p.conv(x, a["conv_weight"], a["conv_bias"], a["stride"], a["padding"], 1))
        y = p.conv(y, a["project_weight"], a["project_bias"], 1, 0, 1)
    elif operator == "lowtention":
        y = x if a["norm_weight"] is None else p.group_norm(x, a["norm_weight"], a["norm_bias"], a["eps"])
        y = p.conv(y, a["dw_weight"], a["dw_bias"], a["stride"], a["dw_weight"].shape[2] // 2, x.shape[1])
        qkv = p.conv(y, a["qkv_weight"], None, 1, 0, 1)
        n, c, h, w = qkv.shape
        # Head i owns the channels [3 d i, 3 d (i + 1)): q, then k, then v.
        per_head = qkv.reshape(n, a["num_heads"], 3, c // (3 * a["num_heads"]), h * w).transpose(3, 4)
        attended = p.attention(per_head[:, :, 0], per_head[:, :, 1], per_head[:, :, 2])
        y = attended.transpose(2, 3).reshape(n, c // 3, h, w)
        y = p.conv_transpose(y, a["up_weight"], a["up_bias"], a["stride"], 1)[:, :, : x.shape[2], : x.shape[3]]
    else:
        y = p.group_norm(x, a["norm_weight"], a["norm_bias"], a["eps"])
        y = p.act[a["act"]](p.conv(y, a["fc1_weight"], a["fc1_bias"], 1, 0, 1))
        y = p.conv(y, a["fc2_weight"], a["fc2_bias"], 1, 0, 1)
    return y + x if a["residual"] else y


def exact(operator: str, args: dict[str, Any]) -> Tensor:
    """The operator by formula, in float64, on the CPU. ``args`` are its arguments by name."""
    return _compose(_EXACT, operator, {k: v.double().cpu() if isinstance(v, Tensor) else v for k, v in args.items()})


def plain(operator: str, args: dict[str, Any]) -> Tensor:
    """The operator as a chain of PyTorch's own functions, in the dtype and on the device of its arguments."""
    return _compose(_PLAIN, operator, args)
