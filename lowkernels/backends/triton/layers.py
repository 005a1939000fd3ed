"""Every distinct call the LowFormer models make of the operators: what configurations are made for, and checked with."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

from lowformer.config import BLOCK_EXPANSION, FUSED_BELOW, VARIANTS, VariantConfig

from ...testing import Call, random_call

# Hashable: an operator's name and the options of random_call, sorted.
Layer = tuple[str, tuple[tuple[str, Any], ...]]


def _layer(operator: str, channels: int, size: int, **options: Any) -> Layer:
    return operator, tuple(sorted({"channels": channels, "height": size, "width": size, **options}.items()))


def _variant(config: VariantConfig, size: int) -> Iterator[Layer]:
    def fused(channels: int, size: int, expansion: int, out: int | None = None, stride: int = 1) -> Layer:
        options = {} if out is None else {"out_channels": out, "stride": stride}
        bias = {"hidden": expansion * channels, **options}
        return _layer("fused_mbconv", channels, size, **bias)

    widths = config.widths
    yield _layer("conv_act", 3, size, out_channels=widths[0], stride=2, act="hardswish")
    size = -(-size // 2)
    if config.depths[0]:
        yield fused(widths[0], size, BLOCK_EXPANSION)
    for stage in range(1, 5):
        yield fused(widths[stage - 1], size, config.down_expansion, widths[stage], 2)
        size = -(-size // 2)
        width = widths[stage]
        if stage <= 2:
            if config.depths[stage] > 1:
                yield fused(width, size, BLOCK_EXPANSION)
            continue
        if config.attention:
            heads = max(1, width // 60)
            attention = {"stride": 2, "kernel_size": 5} if stage == 3 else {}
            yield _layer("lowtention", width, size, num_heads=heads, head_dim=width // heads // 2, norm=config.mlp, **attention)
        if config.mlp:
            yield _layer("gn_mlp", width, size, hidden=BLOCK_EXPANSION * width)
        if width < FUSED_BELOW:
            yield fused(width, size, BLOCK_EXPANSION)
        else:
            yield _layer("mbconv", width, size, hidden=BLOCK_EXPANSION * width)
    yield _layer("conv_act", widths[4], size, out_channels=config.head_widths[0], kernel_size=1, act="hardswish", pool=True)


# The models have no separable convolution; these are MobileNet's.
_SEPARABLE = [(32, 64, 112, 1), (64, 128, 112, 2), (128, 128, 56, 1), (256, 512, 28, 2), (512, 512, 14, 1), (1024, 1024, 7, 1)]


def layers(size: int = 224, variants: list[str] | None = None) -> list[Layer]:
    """The distinct layers of the variants (default all, and MobileNet's separable convolutions) at a resolution."""
    found: dict[Layer, None] = {}
    for name in VARIANTS if variants is None else variants:
        found.update(dict.fromkeys(_variant(VARIANTS[name], size)))
    if variants is None:
        for channels, out_channels, side, stride in _SEPARABLE:
            side = max(1, side * size // 224)
            found[_layer("separable_conv", channels, side, out_channels=out_channels, stride=stride)] = None
    return list(found)


def random_layer(layer: Layer, batch: int, dtype: torch.dtype, device: str, seed: int = 0) -> Call:
    """A call of a layer with random data."""
    operator, options = layer
    return random_call(operator, **dict(options), batch=batch, dtype=dtype, device=device, seed=seed)


@functools.cache
def _meta_weights(layer: Layer) -> Call:
    return random_layer(layer, 1, torch.float32, "meta")


def meta_layer(layer: Layer, batch: int, dtype: torch.dtype) -> Call:
    """A call of a layer on meta tensors."""
    operator, args = _meta_weights(layer)
    x, *rest = (a.to(dtype) if isinstance(a, torch.Tensor) else a for a in args)
    larger = torch.empty((batch, *x.shape[1:]), dtype=dtype, device="meta", memory_format=torch.channels_last)
    return Call(operator, (larger, *rest))


def name(layer: Layer) -> str:
    """A short name: the operator and what distinguishes the layer."""
    operator, options = layer
    values = dict(options)
    channels = "-".join(str(values[key]) for key in ("channels", "hidden", "out_channels") if key in values)
    parts = [operator, channels, f"{values['height']}x{values['width']}"]
    parts += [f"k{values['kernel_size']}"] if "kernel_size" in values else []
    parts += [f"s{values['stride']}"] if "stride" in values else []
    parts += [f"h{values['num_heads']}x{values['head_dim']}"] if "num_heads" in values else []
    parts += ["no-norm"] if values.get("norm") is False else []
    return " ".join(parts)
