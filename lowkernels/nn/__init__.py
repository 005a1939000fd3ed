"""Drop-in modules: a block of a model that runs as one operator in eval mode and trains as before."""

from __future__ import annotations

from .block import FusedBlock, freeze, repack
from .modules import ConvNormAct, FusedMBConv, GroupNormMLP, Lowtention, MBConv, SeparableConv

__all__ = [
    "ConvNormAct",
    "FusedBlock",
    "FusedMBConv",
    "GroupNormMLP",
    "Lowtention",
    "MBConv",
    "SeparableConv",
    "freeze",
    "repack",
]
