"""The LowFormer classifier."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from .blocks import ConvLayer, FusedMBConv, LowFormerBlock, ResidualBlock
from .config import BLOCK_EXPANSION, FUSED_BELOW, NUM_STAGES, VariantConfig

__all__ = ["LowFormer"]


class LowFormer(nn.Module):
    """LowFormer (arXiv 2409.03460; the E variants: arXiv 2603.26551).

    Input: images (N, in_chans, H, W), any H, W >= 1. Output: logits (N, num_classes). Parameter names are
    timm's.

    Args:
        config: the variant's sizes, from :func:`lowformer.get_config`.
        num_classes: outputs of the classifier; 0 leaves it out, and the model then returns (N,
            head_hidden_size).
        in_chans: channels of the images.
        drop_rate: dropout in front of the classifier.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0 over all blocks but
            the stride-2 blocks of stages 3 and 4, which are not counted.

    Attributes:
        num_features: channels of :meth:`forward_features`.
        head_hidden_size: width of the vector that the classifier sees.
        feature_info: for each stage its channels (``num_chs``), stride (``reduction``) and name (``module``).

    Raises:
        ValueError: a negative class count, a channel count below 1, or a rate outside [0, 1).
    """

    def __init__(
        self,
        config: VariantConfig,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        _check_arguments(num_classes, in_chans, drop_rate, drop_path_rate)
        self.config = config
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.num_features = config.widths[-1]
        self.head_hidden_size = config.head_widths[1]
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": width, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, width in enumerate(config.widths[1:])
        ]

        # in float32, as timm: training runs with the same seed then drop alike
        drop_paths = iter(torch.linspace(0.0, drop_path_rate, sum(config.depths), device="cpu").tolist())
        width = config.widths[0]
        self.stem = nn.Sequential(
            ConvLayer(in_chans, width, 3, stride=2),
            *(_conv_block(width, next(drop_paths)) for _ in range(config.depths[0])),
        )
        self.stages = nn.Sequential(*(_stage(config, i, drop_paths) for i in range(1, NUM_STAGES + 1)))
        self.in_conv = ConvLayer(self.num_features, config.head_widths[0], 1)
        self.pre_classifier = nn.Sequential(
            nn.Linear(*config.head_widths, bias=False),
            nn.LayerNorm(self.head_hidden_size),
            nn.Hardswish(),
        )
        self.classifier: nn.Module = nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()
        self.apply(_init_linear)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, num_classes) of images (N, in_chans, H, W)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last stage's map (N, num_features, ceil(H/32), ceil(W/32))."""
        parts = (self.stem, *self.stages) if self.grad_checkpointing else (self.stem, self.stages)
        for part in parts:
            x = run_blocks(part, x, checkpointed=self.grad_checkpointing)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits (N, num_classes) of a map from :meth:`forward_features`.

        Args:
            x: the map, (N, num_features, h, w).
            pre_logits: return the vector in front of the classifier, (N, head_hidden_size), instead.
        """
        x = self.in_conv(x)
        # the fused 1x1 convolution pools as it goes and says so
        if not getattr(self.in_conv, "pooled", False):
            x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        x = self.pre_classifier(x)
        x = F.dropout(x, self.drop_rate, self.training)
        if not pre_logits:
            x = self.classifier(x)
        return x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the maps of chosen stages, in the order asked for.

        Args:
            x: images (N, in_chans, H, W).
            indices: stages counted from 0, negative from the end; an int n for the last n; None for all four.
            norm: accepted for timm's signature; LowFormer has no final norm.
            stop_early: do not run stages that no index asks for.
            output_fmt: ``"NCHW"``, the only one.
            intermediates_only: return the list alone.

        Returns:
            The maps, or the pair (last map computed, maps).

        Raises:
            ValueError: an index out of range or given twice, or another output format.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is {output_fmt!r}: the only one is 'NCHW'")
        taken = stage_indices(indices)
        stages = list(self.stages)[: max(taken) + 1] if stop_early else list(self.stages)
        x = run_blocks(self.stem, x, checkpointed=self.grad_checkpointing)
        maps = []
        for stage in stages:
            x = run_blocks(stage, x, checkpointed=self.grad_checkpointing)
            maps.append(x)
        intermediates = [maps[i] for i in taken]
        return intermediates if intermediates_only else (x, intermediates)

    def get_classifier(self) -> nn.Module:
        """Return the final linear layer, or an Identity where the model has none."""
        return self.classifier

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a freshly initialised one, of the same device and dtype; 0 leaves it out.

        The weights are drawn as at construction.
        """
        _check_arguments(num_classes, self.in_chans, self.drop_rate, 0.0)
        self.num_classes = num_classes
        if num_classes:
            like = next(self.pre_classifier.parameters())
            self.classifier = nn.Linear(self.head_hidden_size, num_classes, device=like.device, dtype=like.dtype)
            _init_linear(self.classifier)
        else:
            self.classifier = nn.Identity()
        self.classifier.train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that weight decay should skip besides norms and biases: none."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the patterns by which timm's optimizers group parameters for layer-wise learning rates."""
        return {
            "stem": r"^stem\.\d+",
            "blocks": [(r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)", None)],
        }


def run_blocks(blocks: nn.Module, x: Tensor, *, checkpointed: bool) -> Tensor:
    """Run the children of ``blocks`` one after another, each under gradient checkpointing if asked."""
    if not (checkpointed and torch.is_grad_enabled()):
        y: Tensor = blocks(x)
        return y
    for block in blocks.children():
        # the compiler takes no contexts; it recomputes without writing the statistics again anyway
        if torch.compiler.is_compiling():
            x = checkpoint(block, x, use_reentrant=False)
        else:
            x = checkpoint(block, x, use_reentrant=False, context_fn=partial(_recompute_contexts, block))
    return x


def stage_indices(indices: int | Sequence[int] | None) -> list[int]:
    """Turn a choice of stages into indices from 0: None is all, an int the last n, -1 the last."""
    if indices is None:
        indices = NUM_STAGES
    if isinstance(indices, int):
        if not 1 <= indices <= NUM_STAGES:
            raise ValueError(f"the last {indices} stages were asked for: LowFormer has {NUM_STAGES}")
        return list(range(NUM_STAGES - indices, NUM_STAGES))
    taken = [i + NUM_STAGES if i < 0 else i for i in indices]
    if not taken or len(set(taken)) < len(taken) or not set(taken) <= set(range(NUM_STAGES)):
        raise ValueError(
            f"stage indices are {tuple(indices)}: give one or more, each once, from 0 to {NUM_STAGES - 1} "
            f"or from -{NUM_STAGES} to -1"
        )
    return taken


def _conv_block(width: int, drop_path: float) -> ResidualBlock:
    return ResidualBlock(FusedMBConv(width, width, expansion=BLOCK_EXPANSION), drop_path=drop_path)


def _stage(config: VariantConfig, index: int, drop_paths: Iterator[float]) -> nn.Sequential:
    """Build stage ``index`` (1 to 4), taking the rates of its blocks from ``drop_paths``."""
    width, depth = config.widths[index], config.depths[index]
    down = FusedMBConv(config.widths[index - 1], width, expansion=config.down_expansion, stride=2)
    blocks: list[nn.Module] = [ResidualBlock(down, residual=False)]
    if index < 3:
        next(drop_paths)  # timm counts this stride-2 block in the ramp, though it has nothing to drop
        blocks += [_conv_block(width, next(drop_paths)) for _ in range(depth - 1)]
    else:
        blocks += [
            LowFormerBlock(
                width,
                attention=config.attention,
                mlp=config.mlp,
                attention_stride=2 if index == 3 else 1,
                expansion=BLOCK_EXPANSION,
                fused=width < FUSED_BELOW,
                drop_path=next(drop_paths),
            )
            for _ in range(depth)
        ]
    return nn.Sequential(*blocks)


def _init_linear(module: nn.Module) -> None:
    """Initialise linear layers as timm does; convolutions and norms keep PyTorch's defaults."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _check_arguments(num_classes: int, in_chans: int, drop_rate: float, drop_path_rate: float) -> None:
    if num_classes < 0:
        raise ValueError(f"num_classes is {num_classes}: it must be 0 (no classifier) or more")
    if in_chans < 1:
        raise ValueError(f"in_chans is {in_chans}: it must be at least 1")
    for name, rate in (("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate)):
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"{name} is {rate}: it must be at least 0 and below 1")


def _recompute_contexts(
    block: nn.Module,
) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    return contextlib.nullcontext(), _running_stats_untouched(block)


@contextlib.contextmanager
def _running_stats_untouched(block: nn.Module) -> Iterator[None]:
    """Keep BatchNorm's running statistics still in a recomputation: the first pass has counted the batch."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
