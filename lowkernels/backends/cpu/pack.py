"""Laying out weights as ``csrc/cpu`` reads them.

Products read their weights in panels of two vectors of output channels (the last panel may be one vector wide), each
panel with all its depth one after the other: ``[panel][k * k * C_in][width]``. Where the processor multiplies bf16 pairs,
two steps of depth lie together: ``[panel][depth / 2][width][2]``. Everything of one operator lies in one block of bytes,
in the order it is used: a header of integers, which the C++ side checks against the machine it runs on, then the sections,
each beginning at a multiple of 64 bytes. :class:`Unpacker` reads the weights back.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.activations import ACTIVATIONS
from . import build

DTYPES = (torch.float32, torch.bfloat16)
# The numbers of csrc/cpu/api.h, and of c10::ScalarType.
ACTIVATION_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}
_DTYPE_NUMBERS = {torch.float32: 6, torch.bfloat16: 15}
_NUMBERED_DTYPES = {number: dtype for dtype, number in _DTYPE_NUMBERS.items()}
# Below this many input channels the transforms of Winograd's algorithm cost more than its fewer multiplications save.
_WINOGRAD_CHANNELS = 32
_ALIGNMENT = 64


class Layout(NamedTuple):
    """What packing depends on.

    Attributes:
        isa: the instruction set in use.
        vector: floats in a vector.
        pairs: products read pairs of bf16; otherwise fp32.
    """

    isa: str
    vector: int
    pairs: bool


@functools.cache
def layout(dtype: torch.dtype) -> Layout:
    """The layout for calls of ``dtype``; the kernels must be loaded."""
    return Layout(*torch.ops.lowkernels_cpu.layout(dtype == torch.bfloat16))


def unsupported(dtype: torch.dtype, **channels: int) -> str | None:
    """Why weights of this dtype and these channel counts cannot be served, or None.

    Loads the kernels, and builds them if need be.
    """
    if dtype not in DTYPES:
        return f"the CPU kernels serve {' and '.join(str(d) for d in DTYPES)}, not {dtype}"
    for name, count in channels.items():
        if count % 4:
            return f"{name} is {count}; the CPU kernels serve multiples of 4"
    return build.load()


class Packer:
    """Collects the sections and the header's numbers of one operator's weights."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._layout = layout(dtype)
        self._header = [self._layout.vector, int(self._layout.pairs), _DTYPE_NUMBERS[dtype]]
        self._sections: list[Tensor] = []

    def tensors(self) -> list[Tensor]:
        """The packed list: one tensor of bytes."""
        header = torch.tensor([len(self._header) + 1, *self._header])
        sections = [section.contiguous().reshape(-1).view(torch.uint8) for section in (header, *self._sections)]
        offsets, end = [], 0
        for section in sections:
            offsets.append(-(-end // _ALIGNMENT) * _ALIGNMENT)
            end = offsets[-1] + section.numel()
        block = torch.zeros(end, dtype=torch.uint8)
        for offset, section in zip(offsets, sections, strict=True):
            block[offset : offset + section.numel()] = section
        return [block]

    def number(self, value: int) -> None:
        """Add a number to the header."""
        self._header.append(value)

    def conv(self, weight: Tensor, bias: Tensor | None, stride: int = 0) -> None:
        """Add a dense convolution (O, I, k, k); with ``stride`` 1 its 3x3 form may be Winograd's."""
        out_channels, in_channels, size, _ = weight.shape
        # Pairs need an even depth.
        padded = in_channels + (in_channels % 2 if self._layout.pairs else 0)
        transformed = stride == 1 and size == 3 and in_channels >= _WINOGRAD_CHANNELS
        self._header += [size, padded, out_channels, int(transformed)]
        weight = F.pad(weight, (0, 0, 0, 0, 0, padded - in_channels))
        depth = _winograd(weight) if transformed else weight.permute(2, 3, 1, 0).reshape(1, -1, out_channels)
        self._sections.append(self._pairs(depth.bfloat16()) if self._layout.pairs else self._panels(depth.float()))
        self._vector(bias, out_channels)

    def depthwise(self, weight: Tensor, bias: Tensor | None) -> None:
        """Add a depthwise convolution (C, 1, k, k): ``[k * k][C, padded]``."""
        channels, _, size, _ = weight.shape
        self._header += [size, channels]
        columns = weight.float().reshape(channels, -1).t()
        self._sections.append(F.pad(columns, (0, self._padding(channels))).contiguous())
        self._vector(bias, channels)

    def norm(self, weight: Tensor | None, bias: Tensor | None) -> None:
        """Add a GroupNorm's weight and bias (C,), or that there is none."""
        self._header.append(int(weight is not None))
        if weight is not None:
            self._vector(weight, weight.shape[0])
            self._vector(bias, weight.shape[0])

    def _padding(self, channels: int) -> int:
        return -channels % (2 * self._layout.vector)

    def _vector(self, values: Tensor | None, channels: int) -> None:
        given = torch.zeros(channels) if values is None else values.float()
        self._sections.append(F.pad(given, (0, self._padding(channels))))

    def _panels(self, depth: Tensor) -> Tensor:
        # (groups, depth, columns[, 2]) -> [panel][group][depth][width][2]
        vector = self._layout.vector
        columns, width = depth.shape[2], 2 * vector
        whole = columns // width
        pieces = [depth[:, :, i * width : (i + 1) * width].reshape(-1) for i in range(whole)]
        rest = depth[:, :, whole * width :]
        if rest.shape[2]:
            missing = -rest.shape[2] % vector
            pieces.append(F.pad(rest, (0,) * (2 * (depth.dim() - 3)) + (0, missing)).reshape(-1))
        return torch.cat(pieces)

    def _pairs(self, depth: Tensor) -> Tensor:
        groups, length, columns = depth.shape
        return self._panels(depth.reshape(groups, length // 2, 2, columns).transpose(2, 3))


class Unpacker:
    """Reads back what a :class:`Packer` collected, in the same order: weights in their own dtype.

    They are what was packed, but for 3x3 convolutions in Winograd's form, which come back a few roundings away. The kernels are not
    needed, so that weights packed on another machine can be read too.

    Args:
        packed: the list that :meth:`Packer.tensors` made.
    """

    def __init__(self, packed: Sequence[Tensor]) -> None:
        (self._block,) = packed
        self._end = 8 * int(self._block[:8].view(torch.int64))
        vector, pairs, dtype, *numbers = self._block[8 : self._end].view(torch.int64).tolist()
        self._vector_width, self._pairs, self._dtype = vector, bool(pairs), _NUMBERED_DTYPES[dtype]
        self._numbers = iter(numbers)

    def number(self) -> int:
        """A number of the header."""
        return int(next(self._numbers))

    def conv(self) -> tuple[Tensor, Tensor]:
        """A dense convolution: its weight (O, I, k, k), where I may be padded to an even number, and its bias (O,)."""
        size, in_channels, out_channels, transformed = (self.number() for _ in range(4))
        if transformed:
            weight = _winograd_inverse(self._depth(16, in_channels, out_channels))
        else:
            depth = self._depth(1, size * size * in_channels, out_channels)
            weight = depth.reshape(size, size, in_channels, out_channels).permute(3, 2, 0, 1)
        return weight.to(self._dtype), self._vector(out_channels)

    def depthwise(self) -> tuple[Tensor, Tensor]:
        """A depthwise convolution: its weight (C, 1, k, k) and its bias (C,)."""
        size, channels = self.number(), self.number()
        columns = self._section(size * size * self._padded(channels), torch.float32).reshape(size * size, -1)
        weight = columns[:, :channels].t().reshape(channels, 1, size, size)
        return weight.to(self._dtype), self._vector(channels)

    def norm(self, like: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """A GroupNorm's weight and bias, of the shape of ``like``, if there is one."""
        if not self.number():
            return None, None
        assert like is not None
        return self._vector(like.shape[0]), self._vector(like.shape[0])

    def _padded(self, channels: int) -> int:
        return channels + -channels % (2 * self._vector_width)

    def _section(self, elements: int, dtype: torch.dtype, alignment: int = _ALIGNMENT) -> Tensor:
        start = self._end + -self._end % alignment
        self._end = start + elements * dtype.itemsize
        return self._block[start : self._end].view(dtype)

    def _vector(self, channels: int) -> Tensor:
        return self._section(self._padded(channels), torch.float32)[:channels].to(self._dtype)

    def _depth(self, groups: int, length: int, columns: int) -> Tensor:
        """(groups, length, columns) of a section of panels."""
        vector, steps = self._vector_width, 2 if self._pairs else 1
        width = 2 * vector
        whole, rest = columns // width, columns % width
        rest += -rest % vector
        dtype = torch.bfloat16 if self._pairs else torch.float32
        pieces: list[Tensor] = []
        for panels, size in ((whole, width), (1, rest)):
            values = self._section(panels * groups * length * size, dtype, 1 if pieces else _ALIGNMENT)
            panel = values.reshape(panels, groups, length // steps, size, steps)
            pieces.append(panel.permute(1, 2, 4, 0, 3).reshape(groups, length, panels * size))
        return torch.cat(pieces, 2)[:, :, :columns]


def _winograd(weight: Tensor) -> Tensor:
    """F(2x2, 3x3)'s transform G g G^T of (O, I, 3, 3), as (16, I, O) in fp32; computed in float64."""
    g = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.0, 0.0, 1.0]], dtype=torch.float64)
    transformed = torch.einsum("ay,oiyx,bx->abio", g, weight.double(), g)
    return transformed.reshape(16, weight.shape[1], weight.shape[0]).float()


def _winograd_inverse(transformed: Tensor) -> Tensor:
    """(O, I, 3, 3) in float64 of what :func:`_winograd` made, however that was rounded: (16, I, O).

    The corners stand in it as they are. With u = (g0 + g1 + g2) / 2 and v = (g0 - g1 + g2) / 2 the middle tap is u - v.
    """
    inverse = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, -1.0, 0.0], [0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    return torch.einsum("ya,abio,xb->oiyx", inverse, transformed.double().unflatten(0, (4, 4)), inverse)
