"""Plain PyTorch: the reference behind every operator, on every device and floating dtype."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

NAME = "eager"
KERNEL = "reference"
DEVICES = ("cpu", "cuda")


def unavailable(device_type: str) -> str | None:
    return None


def describe() -> str:
    return f"PyTorch {torch.__version__} operators; the reference, serves every call"


def tune(operator: str, args: tuple[Any, ...], seconds: float) -> Iterator[dict[str, Any]]:
    """A dict for each setting tried on a call, see :func:`lowkernels.tuning.facts`."""
    from ..tuning import facts

    return facts(NAME, operator, args, seconds)
