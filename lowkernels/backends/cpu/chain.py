"""Several calls of this backend as one: ``torch.classes.lowkernels_cpu.Chain`` runs kernels one after another, without Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from ...ops.operator import Prepared


def watch(tensors: list[Tensor], versions: list[int | None], pointers: list[int]) -> Callable[[], bool]:
    """A function that says whether these are still the tensors' versions (None: it has none) and addresses."""
    numbers = [-1 if version is None else version for version in versions]
    unchanged: Callable[[], bool] = torch.classes.lowkernels_cpu.Watch(tensors, numbers, pointers).unchanged
    return unchanged


class _Calls(TorchDispatchMode):
    """Keeps the calls of operators made in it."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.made.append((func, args))
        return func(*args, **(kwargs or {}))


def chain(calls: Sequence[Prepared], inputs: Sequence[Tensor]) -> Callable[[Tensor], Tensor] | None:
    """One function for calls that take each other's outputs, or None where one of them does more than run a kernel of this library.

    Args:
        calls: all served by this backend.
        inputs: an input of each; it is run on that once more, to see what it does.
    """
    steps = torch.classes.lowkernels_cpu.Chain()
    copied = calls[0].served[1]
    if any(call.served[1] for call in calls[1:]):
        return None
    for call, x in zip(calls, inputs, strict=True):
        x = x.contiguous(memory_format=torch.channels_last)
        with _Calls() as seen:
            out = call.run(x)
        if len(seen.made) != 1 or seen.made[0][0].namespace != "lowkernels_cpu" or out.stride() != call.stride:
            return None
        func, (first, *rest) = seen.made[0]
        assert first is x
        packed = next(v for v in rest if isinstance(v, list))
        numbers = [int(v is not None) if v is None or v is x else v for v in rest if not isinstance(v, list | float)]
        if any(isinstance(v, Tensor) for v in numbers):
            return None
        reals = [v for v in rest if isinstance(v, float)]
        steps.add(func._schema.name.removeprefix("lowkernels_cpu::"), packed, list(map(int, numbers)), reals)
    run: Callable[[Tensor], Tensor] = steps.run
    if not copied:
        return run
    return lambda x: run(x.contiguous(memory_format=torch.channels_last))
