"""Split-K: how many CTAs share the expanded channels of the same outputs, and the memory they meet in (``csrc/cuda/split.cuh``).

With few images there are fewer CTAs than multiprocessors, and each would read all weights. Sums are added up in an order that
depends on the plan alone: results are the same from run to run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .pack import rounded_up

if TYPE_CHECKING:
    from .tiling import Device

# Cycles that leaving sums, taking a ticket and waiting for memory take, and bytes of sums a cycle.
_JOINING, _RATE = 2500, 64
# Tickets for calls that are not captured: of calls under way, no two share one as long as there are fewer than thousands of them.
_TICKETS = 2**20


def joining(splits: int, elements: int) -> float:
    """Cycles that the last of so many CTAs takes longer than one that is not split; a CTA has so many elements of the output."""
    return 0.0 if splits == 1 else _JOINING + 4 * (splits + 1) * elements / _RATE


def cheapest(ctas: int, chunks: int, device: Device, cost: Callable[[int], float]) -> int:
    """How many CTAs are to share each one's ``chunks`` of expanded channels.

    Args:
        ctas: how many there are that are not split.
        chunks: of expanded channels.
        device: what the call runs on; more CTAs than it has multiprocessors are not asked for.
        cost: of so many.
    """
    shares = {-(-chunks // -(-chunks // n)) for n in range(1, min(chunks, max(1, device.processors // ctas)) + 1)}
    return min(sorted(shares), key=cost)


class _Tickets:
    """One device's tickets, all 0 but while a launch runs.

    A captured graph keeps its launches' tickets for ever, as it may be replayed at any time; other calls take them in turn.
    """

    def __init__(self, device: torch.device) -> None:
        self._turns, self._captured = (torch.zeros(_TICKETS, dtype=torch.int32, device=device) for _ in range(2))
        self._next, self._taken = 0, 0
        if device.type == "cuda":
            # Other streams do not wait for what this one writes.
            torch.cuda.current_stream(device).synchronize()

    def take(self, count: int, captured: bool) -> Tensor | None:
        count = rounded_up(count, 4)  # they start on 16 bytes
        if captured:
            first, self._taken = self._taken, self._taken + count
            return self._captured[first : self._taken] if self._taken <= _TICKETS else None
        first = self._next if self._next + count <= _TICKETS else 0
        self._next = first + count
        return self._turns[first : self._next]


_tickets: dict[torch.device, _Tickets] = {}
_lock = threading.Lock()


def memory(out: Tensor, splits: int, ctas: int) -> tuple[list[Tensor], int]:
    """What a launch needs besides its arguments: sums and tickets, and how many CTAs share the same outputs.

    That is 1, and no memory, where ``splits`` is 1 or there are no tickets: for captured calls before any other on a device, and
    where captured calls have taken all of theirs, which some thousands of graphs do.

    Args:
        out: the output.
        splits: how many CTAs are to share the same outputs.
        ctas: of a launch that is not split.
    """
    if splits == 1:
        return [], 1
    captured = out.is_cuda and torch.cuda.is_current_stream_capturing()
    with _lock:
        if out.device not in _tickets:
            if captured:  # what is zeroed in a graph's memory is not zero before its first replay
                return [], 1
            _tickets[out.device] = _Tickets(out.device)
        tickets = _tickets[out.device].take(ctas, captured)
    if tickets is None:
        return [], 1
    return [torch.empty(splits * out.numel(), dtype=torch.float32, device=out.device), tickets], splits
