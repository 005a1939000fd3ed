"""What the operators' CUDA files share between a call's arguments and ``torch.ops.lowkernels_cuda``."""

from __future__ import annotations

import torch
from torch import Tensor

from ...choosing import settings
from . import build, tiling

load = build.load


def sizes(x: Tensor) -> tuple[int, int, int, int]:
    """N, C, H, W."""
    batch, channels, height, width = x.shape
    return batch, channels, height, width


def aligned(x: Tensor) -> Tensor:
    """``x``, or a copy of it if it does not start on the 16 bytes that vector copies need."""
    return x if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.preserve_format)


def empty_nhwc(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An output of this (N, C, H, W) shape, channels_last."""
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def tile_for(shape: tiling.Shape, x: Tensor) -> tiling.Tile:
    """The division of a call whose weights were found to be supported: what its setting says, else the cheapest."""
    device = tiling.device_of(x)
    tile = tiling.asked_for(shape, device, settings.current()) or tiling.choose(shape, device)
    assert tile is not None, shape
    return tile
