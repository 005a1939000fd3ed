"""Laying out weights as ``csrc/cuda`` reads them.

Matrices are stored in fragments of the ``mma.m16n8k16`` instruction: ``[group of 16 columns][step of 16 rows][lane][8 values]``, so
that a warp reads 512 contiguous bytes for each group and step, straight into registers. Within a group, columns are dealt to the
instruction's two halves so that a lane's results are four neighbouring columns. Depthwise weights and biases are fp32. Everything
is padded with zeros to whole chunks (:data:`CHUNK` channels of a depthwise convolution), groups or steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.activations import ACTIVATIONS

DTYPES = (torch.float16, torch.bfloat16)
# The numbers of csrc/cuda/fragments.cuh.
ACTIVATION_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}
CHUNK = 64
GROUP = 16
STEP = 16


def unsupported(dtype: torch.dtype, **channels: int) -> str | None:
    """Why weights of this dtype and these channel counts cannot be served, or None."""
    if dtype not in DTYPES:
        return f"the CUDA kernels serve {' and '.join(str(d) for d in DTYPES)}, not {dtype}: they multiply in 16 bits"
    for name, count in channels.items():
        if count % 4:
            return f"{name} is {count}; the CUDA kernels serve multiples of 4"
    return None


def rounded_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def fragments(matrix: Tensor, rows: int = STEP, columns: int = GROUP) -> Tensor:
    """``matrix`` [inputs, outputs] in fragment order, padded to multiples of ``rows`` and ``columns``; one dimension."""
    depth, width = matrix.shape
    padded = matrix.new_zeros(rounded_up(depth, rows), rounded_up(width, columns))
    padded[:depth, :width] = matrix
    # Row 8 h + 2 q + e of a step is element e of half h in lanes with lane % 4 = q. Column 4 j + 2 t + i of a group is column
    # 2 j + i of the instruction's half t, in lanes with lane / 4 = 2 j + i.
    dealt = padded.reshape(-1, 2, 4, 2, padded.shape[1] // GROUP, 4, 2, 2)
    return dealt.permute(4, 0, 5, 7, 2, 6, 1, 3).reshape(-1)


def pointwise(weight: Tensor, rows: int = STEP, columns: int = GROUP) -> Tensor:
    """A 1x1 convolution (O, I, 1, 1) as fragments of [I, O]."""
    return fragments(weight[:, :, 0, 0].t(), rows, columns)


def window(weight: Tensor) -> Tensor:
    """A dense convolution (O, I, k, k) as fragments of [(tap row, tap column, I rounded up to a step), O]."""
    width, channels, size, _ = weight.shape
    padded = weight.new_zeros(size, size, rounded_up(channels, STEP), width)
    padded[:, :, :channels] = weight.permute(2, 3, 1, 0)
    return fragments(padded.reshape(-1, width))


def chained(weight: Tensor) -> Tensor:
    """A 1x1 convolution (O, I, 1, 1) behind a product whose accumulators are its input: fragments of [I, O].

    Columns 4 q + 2 t + i of a group, as :func:`fragments` deals them, are in a lane's registers where the instruction takes row
    8 t + 2 q + i of its other operand from.
    """
    matrix = weight[:, :, 0, 0].t()
    padded = matrix.new_zeros(rounded_up(matrix.shape[0], STEP), matrix.shape[1])
    padded[: matrix.shape[0]] = matrix
    return fragments(padded.reshape(-1, 4, 2, 2, matrix.shape[1]).transpose(1, 2).reshape(padded.shape))


def vector(values: Tensor | None, like: Tensor, size: int, multiple: int) -> Tensor:
    """fp32, ``size`` rounded up to a multiple, on ``like``'s device; zeros for None."""
    out = torch.zeros(rounded_up(size, multiple), dtype=torch.float32, device=like.device)
    if values is not None:
        out[:size] = values
    return out


def depthwise(weight: Tensor, multiple: int = CHUNK) -> Tensor:
    """(C, 1, k, k) as fp32 [k * k, C rounded up to a multiple]."""
    channels = weight.shape[0]
    out = torch.zeros(weight.shape[2] * weight.shape[3], rounded_up(channels, multiple), dtype=torch.float32, device=weight.device)
    out[:, :channels] = weight.reshape(channels, -1).t()
    return out


def attention_channels(head_dim: int) -> int:
    """Channels of one head as the kernels have them."""
    return rounded_up(head_dim, STEP)


def query_key_value(weight: Tensor, heads: int) -> Tensor:
    """(3 heads d, C, 1, 1), head-major, as fragments of [C, (q | k | v, head, d rounded up)]."""
    channels = weight.shape[1]
    by_head = weight[:, :, 0, 0].reshape(heads, 3, -1, channels).transpose(0, 1)
    padded = weight.new_zeros(3, heads, attention_channels(by_head.shape[2]), channels)
    padded[:, :, : by_head.shape[2]] = by_head
    return fragments(padded.reshape(-1, channels).t())


def transposed(weight: Tensor, heads: int, stride: int) -> Tensor:
    """A transposed convolution (heads d, O, k, k), one matrix [(tap row, tap column, head, d rounded up), O] for each parity.

    Output row ``stride i + p`` takes token row ``i - 1 + p + t`` by kernel row 2 - t for stride 1, 3 - p - 2 t for stride 2.
    """
    inner, out_channels, size, _ = weight.shape
    padded = weight.new_zeros(heads, attention_channels(inner // heads), out_channels, size, size)
    padded[:, : inner // heads] = weight.reshape(heads, -1, out_channels, size, size)
    by_tap = padded.flatten(0, 1).permute(2, 3, 0, 1)
    matrices = []
    for py in range(stride):
        for px in range(stride):
            rows, columns = ([2, 1, 0] if stride == 1 else [3 - p, 1 - p] for p in (py, px))
            matrices.append(fragments(by_tap[rows][:, columns].reshape(-1, out_channels)))
    return torch.cat(matrices)
