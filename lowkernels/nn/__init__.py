"""Drop-in modules: a block of a model that runs as one operator in eval mode and trains as before."""

from __future__ import annotations

from .block import FusedBlock, freeze, repack
from .chain import Chain, chain_blocks
from .linear import Linear
from .modules import ConvNormAct, FusedMBConv, GroupNormMLP, Lowtention, MBConv, SeparableConv
from .whole import make_whole, unmake_whole

__all__ = [
    "Chain",
    "ConvNormAct",
    "FusedBlock",
    "FusedMBConv",
    "GroupNormMLP",
    "Linear",
    "Lowtention",
    "MBConv",
    "SeparableConv",
    "chain_blocks",
    "freeze",
    "make_whole",
    "repack",
    "unmake_whole",
]
