"""LowFormer as a backbone: the maps of its stages, for detection and segmentation heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .model import LowFormer, run_blocks, stage_indices

__all__ = ["FeatureInfo", "LowFormerFeatures"]


class FeatureInfo:
    """What each returned map is, in the order of the maps.

    Args:
        info: one dict per stage of the model, with ``num_chs``, ``reduction`` and ``module``.
        out_indices: the stages whose maps are returned.
    """

    def __init__(self, info: Sequence[dict[str, Any]], out_indices: Sequence[int]) -> None:
        self.info = list(info)
        self.out_indices = tuple(out_indices)

    def channels(self) -> list[int]:
        """Channels of each map."""
        return [self.info[i]["num_chs"] for i in self.out_indices]

    def reduction(self) -> list[int]:
        """Stride of each map: for an image of size H it has ceil(H / stride) rows."""
        return [self.info[i]["reduction"] for i in self.out_indices]

    def module_name(self) -> list[str]:
        """Name of the module that gives each map."""
        return [self.info[i]["module"] for i in self.out_indices]

    def get_dicts(self) -> list[dict[str, Any]]:
        """All of the above, one dict a map."""
        return [dict(self.info[i]) for i in self.out_indices]

    def __getitem__(self, stage: int) -> dict[str, Any]:
        return self.info[stage]

    def __len__(self) -> int:
        return len(self.info)


class LowFormerFeatures(nn.Module):
    """The stem and stages of a LowFormer, returning stage maps; stages after the last one asked for are
    dropped.

    Input: images (N, in_chans, H, W). Output: a list of maps (N, channels, ceil(H / stride), ceil(W /
    stride)), in the order of ``out_indices``. Keys of the state dict are those of the full model, without
    the head.

    Args:
        model: the model to take the modules of; they are shared, not copied.
        out_indices: stages counted from 0 (stride 4) to 3 (stride 32), negative from the end; an int n for
            the last n.

    Attributes:
        feature_info: channels, strides and names of the maps.

    Raises:
        ValueError: an index out of range or given twice.
    """

    def __init__(self, model: LowFormer, out_indices: int | Sequence[int] = (0, 1, 2, 3)) -> None:
        super().__init__()
        self.out_indices = tuple(stage_indices(out_indices))
        self.config = model.config
        self.in_chans = model.in_chans
        self.grad_checkpointing = model.grad_checkpointing
        self.feature_info = FeatureInfo(model.feature_info, self.out_indices)
        self.stem = model.stem
        self.stages = nn.Sequential(*list(model.stages)[: max(self.out_indices) + 1])

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the maps of the stages ``out_indices``."""
        x = run_blocks(self.stem, x, checkpointed=self.grad_checkpointing)
        maps = []
        for stage in self.stages:
            x = run_blocks(stage, x, checkpointed=self.grad_checkpointing)
            maps.append(x)
        return [maps[i] for i in self.out_indices]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable
