"""Small but nasty calls of every operator: odd sizes, every window size, both strides, channels that need padding."""

from __future__ import annotations

from typing import Any

import torch

from lowkernels.testing import Call, random_call


def _case(batch: int, channels: int, height: int, width: int, **options: Any) -> dict[str, Any]:
    return {"batch": batch, "channels": channels, "height": height, "width": width, **options}


# Arguments of random_call, and ``mean``, which is added to x.
CASES: dict[str, list[dict[str, Any]]] = {
    "conv_act": [
        _case(2, 3, 15, 11, out_channels=20, stride=2, act="hardswish"),
        _case(1, 32, 5, 6, kernel_size=1, act="gelu"),
        _case(1, 5, 9, 4, out_channels=7, kernel_size=7, padding=2, act="relu"),
        _case(3, 64, 7, 7, out_channels=80, kernel_size=1, act="hardswish", pool=True),
        _case(1, 32, 13, 11, bias=False, pool=True),
        _case(2, 1, 4, 4, kernel_size=1),
    ],
    "separable_conv": [
        _case(2, 20, 7, 5, out_channels=24, stride=2),
        _case(1, 32, 5, 6, act="relu"),
        _case(1, 4, 9, 4, out_channels=8, kernel_size=7, padding=2),
        _case(2, 160, 3, 3, kernel_size=5, bias=False, act="silu"),
    ],
    "mbconv": [
        _case(2, 20, 7, 5, hidden=40, out_channels=24, stride=2),
        _case(3, 32, 7, 7),
        _case(1, 4, 9, 4, hidden=8, kernel_size=7, padding=2),
        _case(2, 32, 14, 14, hidden=64, act="silu", bias=False),
        _case(1, 16, 20, 35, hidden=32, kernel_size=5, stride=2),
        _case(1, 160, 3, 3, hidden=320),
    ],
    "fused_mbconv": [
        _case(2, 20, 7, 5, hidden=40, out_channels=24, stride=2),
        _case(1, 32, 5, 6, hidden=96),
        _case(1, 4, 9, 4, hidden=8, kernel_size=7, padding=2),
        _case(2, 32, 3, 3, hidden=48, out_channels=160, kernel_size=5, bias=False, act="silu"),
        _case(3, 160, 2, 2, hidden=64, act="relu"),
        _case(1, 4, 1, 1, hidden=4, out_channels=520, kernel_size=1),
    ],
    "lowtention": [
        _case(2, 64, 7, 7),
        _case(3, 32, 14, 14, kernel_size=5, stride=2),
        _case(1, 40, 13, 13, head_dim=20, kernel_size=5, stride=2, norm=False),
        _case(1, 80, 3, 5, head_dim=40, bias=False, mean=10.0),
        # More than 64 tokens.
        _case(1, 32, 17, 19, num_heads=1, head_dim=16, out_channels=20),
        _case(1, 32, 27, 20, head_dim=16, kernel_size=5, stride=2),
        _case(2, 4, 1, 1, num_heads=1, head_dim=4),
        _case(1, 20, 1, 3, num_heads=3, head_dim=4, kernel_size=7, stride=2),
    ],
    "gn_mlp": [
        _case(2, 20, 5, 5, hidden=40, out_channels=24),
        _case(3, 32, 7, 7, hidden=96, mean=30.0),
        _case(70, 4, 1, 1, hidden=8, act="gelu_tanh"),
        _case(1, 160, 3, 5, hidden=64, bias=False),
        # More elements than statistics are taken of in place.
        _case(2, 64, 45, 47, hidden=16, out_channels=8, mean=-20.0),
    ],
}


def call(operator: str, number: int, dtype: torch.dtype, device: str = "cpu") -> Call:
    """One case; the same every time."""
    options = dict(CASES[operator][number])
    mean = options.pop("mean", 0.0)
    made = random_call(operator, **options, dtype=dtype, device=device, seed=number)
    return Call(operator, (made.args[0] + mean, *made.args[1:]))
