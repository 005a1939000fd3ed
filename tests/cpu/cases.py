"""The calls the native kernels are proved on: every shape LowFormer has, and what else the contract allows."""

from __future__ import annotations

import random
from typing import Any

from lowkernels.ops.activations import ACTIVATIONS

OPERATORS = ("conv_act", "separable_conv", "mbconv", "fused_mbconv", "lowtention", "gn_mlp")


def lowformer_cases() -> list[tuple[str, dict[str, Any]]]:
    """Every kind of layer of B1, B1.5 and B3 at 224, those of B1 at 512 that differ, and MobileNet's and EfficientNet's kinds."""
    fused = [
        {"channels": 16, "hidden": 96, "out_channels": 32, "height": 112, "width": 112, "stride": 2},
        {"channels": 20, "hidden": 120, "out_channels": 40, "height": 56, "width": 56, "stride": 2},
        {"channels": 32, "hidden": 192, "out_channels": 64, "height": 56, "width": 56, "stride": 2},
        {"channels": 40, "hidden": 240, "out_channels": 80, "height": 28, "width": 28, "stride": 2},
        {"channels": 64, "hidden": 384, "out_channels": 128, "height": 28, "width": 28, "stride": 2},
        {"channels": 128, "hidden": 512, "height": 14, "width": 14, "batch": 3},
        {"channels": 128, "hidden": 512, "height": 32, "width": 32},
        {"channels": 160, "hidden": 640, "height": 14, "width": 14},
        {"channels": 128, "hidden": 768, "out_channels": 256, "height": 14, "width": 14, "stride": 2},
        {"channels": 32, "hidden": 128, "height": 112, "width": 112},
        {"channels": 64, "hidden": 256, "height": 56, "width": 56},
    ]
    attention = [
        {"channels": 128, "num_heads": 2, "head_dim": 32, "height": 14, "width": 14, "kernel_size": 5, "stride": 2},
        {"channels": 128, "num_heads": 2, "head_dim": 32, "height": 32, "width": 32, "kernel_size": 5, "stride": 2},
        {"channels": 160, "num_heads": 2, "head_dim": 40, "height": 14, "width": 14, "kernel_size": 5, "stride": 2},
        {"channels": 256, "num_heads": 4, "head_dim": 32, "height": 7, "width": 7},
        {"channels": 256, "num_heads": 4, "head_dim": 32, "height": 16, "width": 16},
        {"channels": 256, "num_heads": 4, "head_dim": 32, "height": 14, "width": 14, "kernel_size": 5, "stride": 2, "norm": False},
    ]
    mlp = [
        {"channels": 128, "height": 14, "width": 14},
        {"channels": 160, "height": 14, "width": 14},
        {"channels": 256, "height": 7, "width": 7, "batch": 5},
        {"channels": 320, "height": 7, "width": 7},
        {"channels": 128, "height": 32, "width": 32},
        {"channels": 512, "height": 7, "width": 7},
    ]
    inverted = [
        {"channels": 256, "height": 7, "width": 7, "batch": 3},
        {"channels": 320, "height": 7, "width": 7},
        {"channels": 256, "height": 14, "width": 14},
        {"channels": 24, "hidden": 144, "out_channels": 40, "height": 56, "width": 56, "stride": 2, "kernel_size": 5},
        {"channels": 16, "hidden": 96, "out_channels": 24, "height": 112, "width": 112, "stride": 2},
    ]
    separable = [
        {"channels": 32, "out_channels": 16, "height": 112, "width": 112},
        {"channels": 64, "out_channels": 128, "height": 56, "width": 56, "stride": 2},
        {"channels": 512, "height": 14, "width": 14},
    ]
    dense = [
        {"channels": 3, "out_channels": 16, "height": 224, "width": 224, "stride": 2, "act": "hardswish"},
        {"channels": 3, "out_channels": 20, "height": 225, "width": 223, "stride": 2, "act": "hardswish"},
        {"channels": 256, "out_channels": 1536, "height": 7, "width": 7, "kernel_size": 1, "act": "hardswish", "pool": True},
        {"channels": 320, "out_channels": 2304, "height": 7, "width": 7, "kernel_size": 1, "act": "hardswish", "pool": True},
        {"channels": 64, "height": 28, "width": 28, "act": "relu"},
    ]
    groups = {
        "fused_mbconv": fused,
        "lowtention": attention,
        "gn_mlp": mlp,
        "mbconv": inverted,
        "separable_conv": separable,
        "conv_act": dense,
    }
    return [(operator, {"batch": 1, **shape}) for operator, shapes in groups.items() for shape in shapes]


def random_cases(operator: str, count: int) -> list[dict[str, Any]]:
    """Small calls from all over the contract; the same on every machine."""
    pick = random.Random(operator).choice
    cases: list[dict[str, Any]] = []
    for seed in range(count):
        kernel_size = pick([1, 3, 3, 5, 7])
        height, width = pick([1, 2, 3, 5, 7, 8, 13, 15, 28, 33]), pick([1, 2, 3, 6, 7, 9, 14, 16, 29])
        padding = pick([kernel_size // 2, kernel_size // 2, 0])
        if operator == "lowtention" or min(height, width) + 2 * padding < kernel_size:
            padding = kernel_size // 2
        channels = pick([4, 8, 12, 16, 20, 32, 36, 40, 48, 64, 68, 96])
        case = {
            "batch": pick([1, 1, 2, 3, 5]),
            "channels": channels,
            "out_channels": pick([channels, channels, 4, 20, 40, 64, 100]),
            "hidden": pick([4, 20, 36, 64, 96, 144]),
            "height": height,
            "width": width,
            "kernel_size": kernel_size,
            "stride": pick([1, 1, 2]),
            "padding": padding,
            "act": pick(ACTIVATIONS),
            "bias": pick([True, False]),
            "norm": pick([True, False]),
            "num_heads": pick([1, 2, 4]),
            "head_dim": pick([4, 8, 12, 20, 32, 40]),
            "seed": seed,
        }
        if operator == "conv_act":
            case.update(channels=pick([1, 2, 3, 5, 7, 8, 20, 33, 64]), pool=pick([True, False, False]))
        cases.append(case)
    return cases
