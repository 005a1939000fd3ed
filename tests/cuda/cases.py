"""The calls the CUDA kernels are proved on."""

from __future__ import annotations

import random
from typing import Any

from lowkernels.ops.activations import ACTIVATIONS

OPERATORS = ("conv_act", "separable_conv", "mbconv", "fused_mbconv", "gn_mlp", "lowtention")

# What the kernels were made for, and what their tilings find hard: one pixel, one row, several images to a CTA, several passes
# over the columns, windows with more rows than a CTA has, channels in halves of a vector.
NAMED: dict[str, list[dict[str, Any]]] = {
    "conv_act": [
        {"channels": 1, "height": 1, "width": 1, "batch": 1},
        {"channels": 3, "out_channels": 32, "height": 33, "width": 30, "stride": 2, "act": "hardswish"},
        {"channels": 5, "out_channels": 33, "height": 9, "width": 8, "kernel_size": 7, "residual": True, "batch": 1},
        {"channels": 20, "out_channels": 132, "height": 13, "width": 11, "act": "silu", "residual": True, "batch": 1},
        {"channels": 64, "height": 10, "width": 7, "kernel_size": 5, "act": "relu", "batch": 3},
        {
            "channels": 264,
            "out_channels": 200,
            "height": 7,
            "width": 7,
            "kernel_size": 1,
            "act": "hardswish",
            "pool": True,
            "batch": 3,
        },
        {"channels": 24, "out_channels": 100, "height": 5, "width": 5, "act": "gelu", "pool": True, "residual": True, "batch": 5},
        {"channels": 12, "out_channels": 10, "height": 17, "width": 19, "pool": True, "batch": 2},
        {"channels": 600, "out_channels": 50, "height": 1, "width": 1, "kernel_size": 1, "act": "gelu_tanh", "batch": 17},
        {"channels": 776, "out_channels": 40, "height": 1, "width": 1, "kernel_size": 1, "pool": True, "batch": 2},
        {"channels": 36, "out_channels": 24, "height": 12, "width": 12, "kernel_size": 1, "stride": 2, "padding": 0},
    ],
    "separable_conv": [
        {"channels": 4, "height": 1, "width": 1, "batch": 1},
        {"channels": 128, "out_channels": 256, "height": 14, "width": 14},
        {"channels": 132, "out_channels": 300, "height": 7, "width": 7, "batch": 3},
        {"channels": 32, "out_channels": 16, "height": 30, "width": 31, "act": "relu6"},
        {"channels": 20, "out_channels": 40, "height": 9, "width": 70, "kernel_size": 7, "stride": 2},
    ],
    "mbconv": [
        {"channels": 4, "hidden": 4, "height": 1, "width": 1, "batch": 1},
        {"channels": 256, "hidden": 192, "height": 7, "width": 7, "batch": 3},
        {"channels": 256, "hidden": 128, "height": 14, "width": 14, "batch": 1},
        {"channels": 320, "hidden": 64, "height": 7, "width": 7, "batch": 2},
        {"channels": 24, "hidden": 144, "out_channels": 40, "height": 28, "width": 28, "stride": 2, "kernel_size": 5, "batch": 1},
        {"channels": 20, "hidden": 36, "out_channels": 32, "height": 9, "width": 40, "kernel_size": 7, "batch": 1},
        {"channels": 16, "hidden": 32, "out_channels": 60, "height": 1, "width": 300, "batch": 1},
    ],
    "fused_mbconv": [
        {"channels": 4, "hidden": 4, "height": 1, "width": 1, "batch": 1},
        {"channels": 128, "hidden": 64, "height": 14, "width": 14, "batch": 2},
        {"channels": 160, "hidden": 64, "height": 14, "width": 14, "batch": 1},
        {"channels": 64, "hidden": 96, "out_channels": 256, "height": 14, "width": 14, "stride": 2, "batch": 3},
        {"channels": 16, "hidden": 96, "out_channels": 32, "height": 31, "width": 30, "stride": 2, "batch": 1},
        {"channels": 20, "hidden": 36, "out_channels": 40, "height": 6, "width": 45, "stride": 2, "kernel_size": 7, "batch": 1},
        {"channels": 36, "hidden": 20, "out_channels": 300, "height": 2, "width": 3, "kernel_size": 5, "act": "gelu", "batch": 9},
        {"channels": 24, "hidden": 80, "height": 9, "width": 8, "kernel_size": 1, "stride": 2, "padding": 0, "batch": 5},
    ],
    "gn_mlp": [
        {"channels": 4, "hidden": 4, "height": 1, "width": 1, "batch": 1},
        {"channels": 8, "hidden": 20, "height": 1, "width": 1, "batch": 70},
        {"channels": 128, "hidden": 192, "height": 14, "width": 14, "batch": 2},
        {"channels": 256, "hidden": 128, "height": 7, "width": 7, "batch": 5},
        {"channels": 160, "hidden": 64, "height": 14, "width": 14, "batch": 1},
        {"channels": 36, "hidden": 100, "out_channels": 300, "height": 5, "width": 3, "act": "silu", "batch": 7},
        {"channels": 68, "hidden": 32, "out_channels": 20, "height": 33, "width": 31, "batch": 1},
    ],
    "lowtention": [
        {"channels": 4, "num_heads": 1, "head_dim": 4, "height": 1, "width": 1, "batch": 1},
        {"channels": 256, "num_heads": 4, "head_dim": 32, "height": 7, "width": 7},
        {"channels": 128, "num_heads": 2, "head_dim": 32, "height": 14, "width": 14, "kernel_size": 5, "stride": 2},
        {"channels": 160, "num_heads": 2, "head_dim": 40, "height": 14, "width": 14, "kernel_size": 5, "stride": 2, "batch": 1},
        {"channels": 64, "num_heads": 1, "head_dim": 64, "height": 13, "width": 13, "norm": False, "batch": 1},
        {"channels": 36, "num_heads": 3, "head_dim": 12, "out_channels": 20, "height": 17, "width": 15, "stride": 2, "batch": 1},
        {"channels": 64, "num_heads": 1, "head_dim": 32, "height": 5, "width": 13, "batch": 1},
        {"channels": 20, "num_heads": 2, "head_dim": 12, "out_channels": 36, "height": 17, "width": 16, "batch": 2},
        {"channels": 36, "num_heads": 1, "head_dim": 32, "height": 3, "width": 90},
        {"channels": 160, "num_heads": 3, "head_dim": 40, "height": 29, "width": 30, "kernel_size": 5, "stride": 2, "batch": 1},
    ],
}


def random_cases(operator: str, count: int) -> list[dict[str, Any]]:
    """Small calls from all over the contract; the same on every machine."""
    generator = random.Random(operator)
    pick = generator.choice
    cases: list[dict[str, Any]] = []
    for seed in range(count):
        kernel_size = pick([1, 3, 3, 5, 7])
        height, width = pick([1, 2, 3, 5, 7, 8, 13, 15, 17]), pick([1, 2, 3, 6, 7, 9, 14, 16, 23])
        padding = pick([kernel_size // 2, kernel_size // 2, 0])
        if operator == "lowtention" or min(height, width) + 2 * padding < kernel_size:
            padding = kernel_size // 2
        channels = pick([4, 8, 12, 16, 20, 32, 36, 40, 48, 64, 68, 96])
        cases.append(
            {
                "batch": pick([1, 1, 2, 3, 5]),
                "channels": channels,
                "out_channels": pick([channels, channels, 4, 20, 40, 64, 100, 132]),
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
                "pool": seed % 3 == 0,
                "seed": seed,
            }
        )
    return cases
