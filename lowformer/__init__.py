"""LowFormer, a fast convolutional-transformer vision backbone, with state dicts that are timm's.

The models are those of "LowFormer: Hardware Efficient Design for Convolutional Transformer Backbones"
(arXiv 2409.03460) and of its journal extension "Beyond MACs" (arXiv 2603.26551). Their blocks run as fused
operators of :mod:`lowkernels`, or as plain PyTorch with ``kernels="eager"``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal, overload

from .checkpoint import (
    CheckpointError,
    WeightsUnavailableError,
    fetch_weights,
    load_checkpoint,
    read_checkpoint,
)
from .config import VariantConfig, get_config, list_models
from .features import FeatureInfo, LowFormerFeatures
from .model import LowFormer

__all__ = [
    "CheckpointError",
    "FeatureInfo",
    "LowFormer",
    "LowFormerFeatures",
    "VariantConfig",
    "WeightsUnavailableError",
    "create_model",
    "fetch_weights",
    "get_config",
    "list_models",
    "load_checkpoint",
    "read_checkpoint",
]


@overload
def create_model(
    name: str,
    *,
    num_classes: int = ...,
    kernels: str = ...,
    pretrained: bool | str | os.PathLike[str] | None = ...,
    features_only: Literal[False] = ...,
    out_indices: int | Sequence[int] = ...,
    in_chans: int = ...,
    drop_rate: float = ...,
    drop_path_rate: float = ...,
) -> LowFormer: ...


@overload
def create_model(
    name: str,
    *,
    num_classes: int = ...,
    kernels: str = ...,
    pretrained: bool | str | os.PathLike[str] | None = ...,
    features_only: Literal[True],
    out_indices: int | Sequence[int] = ...,
    in_chans: int = ...,
    drop_rate: float = ...,
    drop_path_rate: float = ...,
) -> LowFormerFeatures: ...


@overload
def create_model(
    name: str,
    *,
    num_classes: int = ...,
    kernels: str = ...,
    pretrained: bool | str | os.PathLike[str] | None = ...,
    features_only: bool,
    out_indices: int | Sequence[int] = ...,
    in_chans: int = ...,
    drop_rate: float = ...,
    drop_path_rate: float = ...,
) -> LowFormer | LowFormerFeatures: ...


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    kernels: str = "auto",
    pretrained: bool | str | os.PathLike[str] | None = None,
    features_only: bool = False,
    out_indices: int | Sequence[int] = (0, 1, 2, 3),
    in_chans: int = 3,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
) -> LowFormer | LowFormerFeatures:
    """Build a LowFormer, in training mode as every new module is.

    Args:
        name: a name of :func:`list_models`, with or without timm's tag (``"lowformer_b1.in1k"``).
        num_classes: outputs of the classifier; 0 for none.
        kernels: ``"eager"`` for plain PyTorch blocks; ``"auto"`` or the name of a lowkernels backend for
            the drop-in modules of ``lowkernels.nn``, with the same parameters and state dict.
        pretrained: True for the ImageNet-1k weights on the Hugging Face Hub, whose 1000-class classifier
            is left out where num_classes is another number; a path for a file (see
            :func:`load_checkpoint`), whose classes must be num_classes; None or False for none. Either is
            fitted to in_chans by the rule of ``adapt_stem`` there.
        features_only: return the stage maps instead of logits (:class:`LowFormerFeatures`); num_classes
            and drop_rate have no effect then.
        out_indices: with features_only, the stages to return: 0 to 3 are strides 4 to 32; an int n for the
            last n.
        in_chans: channels of the images.
        drop_rate: dropout in front of the classifier, in [0, 1).
        drop_path_rate: stochastic depth of the last block, in [0, 1), rising linearly from 0 at the first.

    Raises:
        ValueError: an unknown name or backend, or an argument out of range.
        CheckpointError: the weights do not fit.
        WeightsUnavailableError: the published weights cannot be had.
    """
    config = get_config(name)
    full = LowFormer(config, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, drop_path_rate=drop_path_rate)
    model = LowFormerFeatures(full, out_indices) if features_only else full
    if pretrained is True:
        other_classes = not features_only and num_classes not in (0, 1000)
        load_checkpoint(model, fetch_weights(config.name), new_head=other_classes, adapt_stem=True)
    elif pretrained:
        load_checkpoint(model, pretrained, adapt_stem=True)
    if kernels != "eager":
        from .kernels import use_kernels

        use_kernels(model, backend=kernels)
    return model
