"""Plain PyTorch: the reference behind every operator, on every device and floating dtype."""

from __future__ import annotations

import torch

NAME = "eager"
KERNEL = "reference"
DEVICES = ("cpu", "cuda")


def unavailable(device_type: str) -> str | None:
    return None


def describe() -> str:
    return f"PyTorch {torch.__version__} operators; the reference, serves every call"
