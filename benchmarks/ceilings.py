"""What the device reaches in the same run: a large product and a large copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .timing import Clock, Effort, take_turns


@dataclass(frozen=True)
class Ceilings:
    """Measured rates of one device and dtype.

    Attributes:
        flops_per_s: of the fastest large product tried, two operations per multiply-accumulate.
        bytes_per_s: of a large copy, bytes read and written.
        product: which product it was.
        disturbed: every turn of that product, or of the copy, was disturbed: the device can do more, and no share of these rates
            is given.
    """

    flops_per_s: float
    bytes_per_s: float
    product: str
    disturbed: bool = False


def measure(device: str, dtype: torch.dtype, clock: Clock, effort: Effort, small: bool = False) -> Ceilings:
    """Measure both.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        dtype: of the product.
        clock, effort: as for contenders.
        small: sizes for a smoke test, which reach no ceiling.
    """
    n = 256 if small else (8192 if device == "cuda" else 2048)
    copied = 1 << (20 if small else (30 if device == "cuda" else 27))
    kind: dict[str, Any] = {"dtype": dtype, "device": device}
    a, b = torch.randn(n, n, **kind), torch.randn(n, n, **kind)
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    products: dict[str, tuple[int, Callable[[], Any]]] = {"matrix product": (2 * n**3, lambda: a @ b)}
    # Convolutions may use other code than matrix products (on a CPU oneDNN instead of MKL) or, in float32 on a GPU, TF32.
    images, c, side = (2, 32, 14) if small else ((64, 512, 56) if device == "cuda" else (4, 512, 56))
    x = torch.randn(images, c, side, side, **kind).contiguous(memory_format=torch.channels_last)
    w = torch.randn(c, c, 3, 3, **kind).contiguous(memory_format=torch.channels_last)
    products["3x3 convolution"] = (2 * x.numel() * 9 * c, lambda: F.conv2d(x, w, padding=1))
    with torch.no_grad():
        runs = {name: (run,) for name, (_, run) in products.items()}
        turns = take_turns({**runs, "copy": (lambda: target.copy_(source),)}, clock, effort)
    # A ceiling is the most that was ever reached: disturbed turns can only lower it.
    fastest = {name: min(turn.seconds for turn in taken) for name, taken in turns.items()}
    rates = {name: flops / fastest[name] for name, (flops, _) in products.items()}
    best = max(rates, key=lambda name: rates[name])
    disturbed = any(all(turn.disturbed for turn in turns[name]) for name in (best, "copy"))
    return Ceilings(rates[best], 2 * copied / fastest["copy"], best, disturbed)
