"""Native C++ kernels for x86 (AVX2, AVX-512, avx512_bf16) and ARM (NEON).

They are compiled on first use by :mod:`.build`; :mod:`.pack` lays out their weights.
"""

from __future__ import annotations

import torch

from . import build
from .chain import chain as chain
from .chain import watch as watch

NAME = "cpu"
KERNEL = "cpu"
DEVICES = ("cpu",)


def unavailable(device_type: str) -> str | None:
    if device_type != "cpu":
        return f"it serves tensors on the CPU; these are on {device_type}"
    return build.unusable()


def describe() -> str:
    reason = build.unusable()
    if reason is not None:
        return f"native C++ kernels: {reason}"
    if build.built() is None:
        return f"native C++ kernels: to be compiled on first use by {build.compiler()}"
    reason = build.load()
    if reason is not None:
        return f"native C++ kernels: {reason}"
    half, _, pairs = torch.ops.lowkernels_cpu.layout(True)
    products = "bf16 products" if pairs else "bf16 multiplied in fp32"
    return f"native C++ kernels: {half}, {products}, {torch.get_num_threads()} threads"
