"""What calls on a GPU are expected to take where nothing was measured: a roofline, and how far from it kernels of a kind stay.

These are estimates. They count arithmetic, traffic and launches (``cost.py`` of each operator) and know nothing of a kernel's
tiles, so they are only good for telling backends apart that differ a lot; :mod:`lowkernels.choosing.auto` asks no more of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch


class Ceiling(NamedTuple):
    """What a GPU can do at most.

    Attributes:
        half, tf32, single: FLOP/s of products in 16 bit with float32 sums, in tf32, and in float32.
        bandwidth: bytes/s of its memory.
    """

    half: float
    tf32: float
    single: float
    bandwidth: float


# By compute capability, dense, from NVIDIA's data sheets: A100 80GB SXM, GeForce RTX 3090, L40S, H100 SXM, B200, GeForce RTX 5090.
# Another part of the same architecture has all four in about the same proportion, and only proportions matter here.
CEILINGS = {
    80: Ceiling(312e12, 156e12, 19.5e12, 2.04e12),
    86: Ceiling(71e12, 35.6e12, 35.6e12, 0.94e12),
    89: Ceiling(362e12, 183e12, 91.6e12, 0.86e12),
    90: Ceiling(989e12, 495e12, 67e12, 3.35e12),
    100: Ceiling(2250e12, 1125e12, 75e12, 8.0e12),
    120: Ceiling(210e12, 105e12, 105e12, 1.79e12),
}

# Parts of the ceiling that products reach. Those of fused kernels, which re-read weights from the L2 cache and do other things in
# between, are predicted times over floors of the Triton kernels, from docs/perf/triton_kernels.md. Nothing else is known of kernels
# in CUDA C++, so they are taken to be as good, and the fixed order decides between the two.
EAGER = 0.6
FUSED = {"conv_act": 0.5, "fused_mbconv": 0.65, "gn_mlp": 0.4, "lowtention": 0.35, "mbconv": 0.3, "separable_conv": 0.4}
# Triton multiplies float32 without tensor cores and without a vendor library's care.
TRITON_SINGLE = 0.25
# Parts of the bandwidth that streaming kernels reach, and PyTorch's depthwise convolutions and norms of NHWC data.
STREAMING, SCATTERED = 0.8, 0.3
LAUNCH_S = 3e-6


def seconds(backend: str, operator: str, call: Sequence[Any], arch: int, dtype: str) -> float | None:
    """The estimated time of a call, its weights packed; None for an architecture or a dtype there is no ceiling for.

    Args:
        backend: ``"eager"``, or one whose kernels run a call in one launch.
        operator: its name.
        call: its arguments without the dispatch ones, all of them; only shapes are read.
        arch: compute capability, 90 for 9.0.
        dtype: as :func:`lowkernels.choosing.measured.arithmetic` gives it.
    """
    ceiling = CEILINGS.get(arch) or CEILINGS.get(arch // 10 * 10)
    if ceiling is None or dtype == "float64":
        return None
    flops = {"tf32": ceiling.tf32, "float32": ceiling.single}.get(dtype, ceiling.half)
    cost = importlib.import_module(f"..ops.{operator}.cost", __package__).cost(*call)
    if backend != "eager":
        part = TRITON_SINGLE if (backend, dtype) == ("triton", "float32") else FUSED[operator]
        return max(cost.fused.flops / (flops * part), cost.fused.bytes / (ceiling.bandwidth * STREAMING)) + LAUNCH_S
    total = 0.0
    for step in cost.steps:
        scattered = step.name in ("dw", "norm")
        traffic = step.bytes / ceiling.bandwidth
        total += max(step.flops / (flops * EAGER), traffic / (SCATTERED if scattered else STREAMING)) + LAUNCH_S
        if step.flops:
            # Its activation or residual: one more pass over about as much.
            total += traffic / STREAMING + LAUNCH_S
    return total


def compute_capability(device: torch.device) -> int:
    """90 for 9.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
