"""CUDA C++ kernels for NVIDIA GPUs of compute capability 8.0 and up.

They are compiled on first use by :mod:`.build`. :mod:`.library` has the schemas of what they register, :mod:`.pack` lays out
weights, :mod:`.tiling` divides work among CTAs and :mod:`.launch` calls them.
"""

from __future__ import annotations

import functools

import torch

from . import build, hopper

NAME = "cuda"
KERNEL = "cuda"
DEVICES = ("cuda",)
SELF_CHECK = True


@functools.cache
def _no_device() -> str | None:
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device is available"
    least = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    if least < build.MINIMUM_CAPABILITY:
        needed = ".".join(map(str, build.MINIMUM_CAPABILITY))
        return f"a GPU here has compute capability {least[0]}.{least[1]}; its kernels need {needed} or more"
    return None


def unavailable(device_type: str) -> str | None:
    if device_type != "cuda":
        return f"it serves tensors on NVIDIA GPUs; these are on {device_type}"
    return _no_device() or build.unusable()


def describe() -> str:
    reason = _no_device() or build.unusable()
    if reason is not None:
        return f"CUDA C++ kernels: {reason}"
    path = build.built()
    if path is None:
        return f"CUDA C++ kernels: to be compiled on first use by {build.compiler()}"
    return f"CUDA C++ kernels, version {build.version()}, for {build.library_architectures(path)}{hopper.describe()}"
