"""Which subjects a run measures, in order of importance, and which contenders sit out where time is short.

What is not here is measured by asking for it: ``--models``, ``--layers``, ``--sizes``, ``--batches``, ``--dtypes``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

import lowformer

from .rivals import EAGER, RIVALS, contenders
from .subjects import (
    SIZES,
    Layer,
    Subject,
    dtype_name,
    layer_subject,
    layers_of,
    lowformer_layers,
    mobile_layers,
    model_subject,
)

MAIN_MODEL = "lowformer_b1"
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float16, torch.bfloat16, torch.float32)}
MODEL_BATCHES = {"cpu": (1, 16), "cuda": (1, 16, 256)}
LAYER_BATCHES = (1, 16, 256)


@dataclass(frozen=True)
class Item:
    """One subject of a plan.

    Attributes:
        key: that of the subject it makes, known before.
        make: makes it, from the size of the device's second-level cache.
        left_out: contenders that sit out, by name, with the reason.
        point: where in an experiment it stands; goes into its rows.
    """

    key: tuple[str, str, int, int, str]
    make: Callable[[int], Subject]
    left_out: dict[str, str] = field(default_factory=dict)
    point: dict[str, Any] | None = None


def without(reason: str, *costs: str, besides: Sequence[str] = ()) -> dict[str, str]:
    """Leave out the rivals of these building costs, but for those named."""
    return {c.name: reason for c in RIVALS if c.cost in costs and c.name not in besides}


def layer_item(layer: Layer, batch: int, dtype: torch.dtype, device: str, left_out: dict[str, str] | None = None) -> Item:
    return Item(
        ("op", layer.name, layer.height, batch, dtype_name(dtype)),
        lambda cache: layer_subject(layer, batch, dtype, device, cache),
        left_out or {},
    )


def model_item(model: str, size: int, batch: int, dtype: torch.dtype, device: str, left_out: dict[str, str] | None = None) -> Item:
    return Item(
        ("model", model, size, batch, dtype_name(dtype)),
        lambda cache: model_subject(model, size, batch, dtype, device, cache),
        left_out or {},
    )


@dataclass(frozen=True)
class Choice:
    """What the command line narrows a full plan down to; None means all there is."""

    models: Sequence[str] | None = None
    layers: str | None = None
    sizes: Sequence[int] | None = None
    batches: Sequence[int] | None = None
    dtypes: Sequence[torch.dtype] | None = None


def full_models(device: str, choice: Choice) -> Iterator[Item]:
    """Every variant, size, batch and dtype; the smaller image first, because it is what the models are known by."""
    for size in choice.sizes or SIZES:
        for dtype in choice.dtypes or DTYPES[device]:
            for model in choice.models or lowformer.list_models():
                for batch in choice.batches or MODEL_BATCHES[device]:
                    yield model_item(model, size, batch, dtype, device)


def full_ops(device: str, choice: Choice) -> Iterator[Item]:
    """Every distinct layer, batch and dtype."""
    sizes = choice.sizes or SIZES
    if choice.models:
        layers = list(dict.fromkeys(x for size in sizes for m in choice.models for x in layers_of(m, size)))
    else:
        layers = lowformer_layers(sizes) + mobile_layers(sizes)
    for dtype in choice.dtypes or DTYPES[device]:
        for layer in layers:
            if choice.layers is None or re.search(choice.layers, layer.name):
                for batch in choice.batches or LAYER_BATCHES:
                    yield layer_item(layer, batch, dtype, device)


_QUICK = "left out of quick runs"
_FAST_COMPILE = "torch.compile, max-autotune, freezing"


def quick_models(device: str) -> Iterator[Item]:
    """The main model against everybody, the others against all that need no compiler."""
    half, one, many = DTYPES[device][0], 1, MODEL_BATCHES[device][-1]
    no_compile, light = without(_QUICK, "compile"), without(_QUICK, "compile", "export")
    best_compile = without(_QUICK, "compile", besides=(_FAST_COMPILE,))
    # Without compilers first, so that there is something if they take all the time; measured with them it is measured anew.
    yield model_item(MAIN_MODEL, 224, one, half, device, no_compile)
    yield model_item(MAIN_MODEL, 224, many, half, device, no_compile)
    yield model_item(MAIN_MODEL, 224, one, half, device)
    yield model_item(MAIN_MODEL, 224, many, half, device, best_compile)
    yield model_item(MAIN_MODEL, 224, one, DTYPES[device][1], device, best_compile)
    for model in ("lowformer_b0", "lowformer_b3", "lowformer_e1"):
        yield model_item(model, 224, one, half, device, no_compile)
    yield model_item(MAIN_MODEL, 512, one, half, device, no_compile)
    for model in lowformer.list_models():
        if model not in (MAIN_MODEL, "lowformer_b0", "lowformer_b3", "lowformer_e1"):
            yield model_item(model, 224, one, half, device, light)


def quick_ops(device: str) -> Iterator[Item]:
    """The layers of the main model, at the smallest and the largest batch a quick run has time for."""
    dtype, many = DTYPES[device][0], MODEL_BATCHES[device][-1]
    best_compile = without(_QUICK, "compile", besides=(_FAST_COMPILE,))
    for layer in layers_of(MAIN_MODEL, 224):
        yield layer_item(layer, 1, dtype, device, best_compile)
    for layer in layers_of(MAIN_MODEL, 224):
        yield layer_item(layer, many, dtype, device, without(_QUICK, "compile"))
    for layer in mobile_layers((224,)):
        yield layer_item(layer, 1, dtype, device, without(_QUICK, "compile", "export"))


def smoke_layers() -> list[Layer]:
    """One small layer of every operator."""
    layers = [*layers_of("lowformer_b0", 32), *mobile_layers((32,))]
    return list({layer.operator: layer for layer in layers}.values())


def smoke_models(device: str) -> Iterator[Item]:
    """The smallest model on a small image, with everything that needs no compiler."""
    yield model_item("lowformer_b0", 64, 2, torch.float32, device, without("left out of smoke tests", "compile"))


def smoke_ops(device: str) -> Iterator[Item]:
    """One small layer of every operator; the first one with everything, compilers included."""
    reason = "left out of smoke tests"
    for index, layer in enumerate(smoke_layers()):
        left_out = without(reason, "compile", "export", besides=("torch.compile",) if index == 0 else ())
        yield layer_item(layer, 2, torch.float32, device, left_out)


def only(items: Iterable[Item], pattern: str | None) -> list[Item]:
    """The items with only those contenders whose name the pattern finds; the others are named in the tables as not asked for.

    Eager always takes part, because ratios need it.
    """
    if pattern is None:
        return list(items)
    unasked = {c.name: "not asked for" for c in contenders() if c.name != EAGER and not re.search(pattern, c.name)}
    return [replace(item, left_out={**item.left_out, **unasked}) for item in items]


def dtypes_of(items: Iterable[Item]) -> list[str]:
    """The dtypes of a plan, in order."""
    return list(dict.fromkeys(item.key[-1] for item in items))
