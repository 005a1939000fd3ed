"""Argument checks the operators' contracts are written in. They run on real, fake and meta tensors and read no data."""

from __future__ import annotations

from typing import NoReturn

import torch

from ..errors import InputError
from .activations import ACTIVATIONS

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_KERNEL = 7


def fail(operator: str, argument: str, problem: str) -> NoReturn:
    raise InputError(f"lowkernels.{operator}: argument {argument}: {problem}")


def image(operator: str, x: torch.Tensor, argument: str = "x") -> None:
    """``x`` is (N, C, H, W), floating, with H, W, C >= 1."""
    if x.dim() != 4:
        fail(operator, argument, f"has {x.dim()} dimensions {tuple(x.shape)}; allowed is 4: (N, C, H, W)")
    if x.dtype not in DTYPES:
        fail(operator, argument, f"has dtype {x.dtype}; allowed are {', '.join(str(d) for d in DTYPES)}")
    if x.shape[1] < 1 or x.shape[2] < 1 or x.shape[3] < 1:
        fail(operator, argument, f"has shape {tuple(x.shape)}; channels, height and width must be at least 1")


def same_kind(operator: str, x: torch.Tensor, **tensors: torch.Tensor | None) -> None:
    """Every tensor has ``x``'s dtype and device."""
    dtype, device = x.dtype, x.device
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            fail(operator, name, f"has dtype {tensor.dtype}; x has {dtype}, and all tensors must share one dtype")
        if tensor.device != device:
            fail(operator, name, f"is on {tensor.device}; x is on {device}, and all tensors must share one device")


def shape(operator: str, name: str, tensor: torch.Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if tuple(tensor.shape) != expected:
        fail(operator, name, f"has shape {tuple(tensor.shape)}; allowed is {expected}, {meaning}")


def bias(operator: str, name: str, tensor: torch.Tensor | None, channels: int) -> None:
    if tensor is not None:
        shape(operator, name, tensor, (channels,), "one value per output channel")


def act(operator: str, name: str, value: str) -> None:
    if value not in ACTIVATIONS:
        fail(operator, name, f"is {value!r}; allowed are {', '.join(ACTIVATIONS)}")


def pointwise(operator: str, name: str, weight: torch.Tensor, in_channels: int) -> int:
    """``weight`` is a 1x1 convolution's over ``in_channels``; returns its output channels."""
    if weight.dim() != 4 or weight.shape[0] < 1:
        fail(operator, name, f"has shape {tuple(weight.shape)}; allowed is (C_out, {in_channels}, 1, 1)")
    shape(operator, name, weight, (weight.shape[0], in_channels, 1, 1), "(C_out, C_in, 1, 1)")
    return weight.shape[0]


def square_kernel(operator: str, name: str, weight: torch.Tensor) -> int:
    """``weight`` is (O, I, k, k) with k odd, at most :data:`MAX_KERNEL`; returns k."""
    if weight.dim() != 4 or weight.shape[2] != weight.shape[3]:
        fail(operator, name, f"has shape {tuple(weight.shape)}; allowed is (C_out, C_in / groups, k, k)")
    size = weight.shape[2]
    if size % 2 == 0 or size > MAX_KERNEL:
        fail(operator, name, f"has kernel size {size}; allowed are odd sizes up to {MAX_KERNEL}")
    return size


def dense(operator: str, name: str, weight: torch.Tensor, in_channels: int) -> int:
    """``weight`` is a dense k x k convolution's over ``in_channels`` (groups = 1); returns its output channels."""
    size = square_kernel(operator, name, weight)
    if weight.shape[0] < 1:
        fail(operator, name, "has no output channels")
    shape(operator, name, weight, (weight.shape[0], in_channels, size, size), "(C_out, C_in, k, k) with groups = 1")
    return weight.shape[0]


def depthwise(operator: str, name: str, weight: torch.Tensor, channels: int) -> None:
    """``weight`` is a depthwise k x k convolution's (groups = channels, multiplier 1)."""
    size = square_kernel(operator, name, weight)
    shape(operator, name, weight, (channels, 1, size, size), "(C, 1, k, k) with groups = C")


def window(operator: str, x: torch.Tensor, size: int, stride: int, padding: int) -> tuple[int, int]:
    """Stride and padding are allowed and leave an output; returns its height and width."""
    if stride not in (1, 2):
        fail(operator, "stride", f"is {stride}; allowed are 1 and 2")
    if not 0 <= padding <= size // 2:
        fail(operator, "padding", f"is {padding}; allowed are 0 to {size // 2} for kernel size {size}")
    height, width = x.shape[2] + 2 * padding - size, x.shape[3] + 2 * padding - size
    if height < 0 or width < 0:
        fail(operator, "x", f"is {x.shape[2]}x{x.shape[3]}, smaller than the {size}x{size} kernel with padding {padding}")
    return height // stride + 1, width // stride + 1


def residual(operator: str, wanted: bool, x: torch.Tensor, out: tuple[int, ...]) -> None:
    """If the input is to be added to the output, both have the same shape. N is never compared: it may be symbolic."""
    if wanted and tuple(x.shape[1:]) != tuple(out[1:]):
        fail(operator, "residual", f"is true, but the output {tuple(out)} has not the shape of x {tuple(x.shape)}")


def group_norm(operator: str, weight: torch.Tensor | None, bias_: torch.Tensor | None, eps: float, channels: int) -> None:
    if (weight is None) != (bias_ is None):
        fail(operator, "norm_bias", "norm_weight and norm_bias go together: pass both, or None for both")
    bias(operator, "norm_weight", weight, channels)
    bias(operator, "norm_bias", bias_, channels)
    if not eps > 0:
        fail(operator, "eps", f"is {eps}; allowed are positive numbers")
