"""Several calls of this backend as one: ``torch.classes.lowkernels_cpu.Chain`` runs kernels one after another, without Python."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ...ops.operator import Prepared
from .pack import ACTIVATION_NUMBERS

if TYPE_CHECKING:
    from ...nn.row import Plain


def watch(
    tensors: list[Tensor], versions: list[int | None], pointers: list[int], next_read: Sequence[object]
) -> Callable[[], bool]:
    """A function that says whether these are still the tensors' versions (None: it has none) and addresses.

    Args:
        tensors, versions, pointers: of equal length.
        next_read: objects that the caller keeps alive and reads after each call of the function, which asks for their memory.
    """
    numbers = [-1 if version is None else version for version in versions]
    # Their address is what id() gives in CPython.
    known = platform.python_implementation() == "CPython"
    dicts = [id(value) for value in next_read if known and type(value) is dict]
    others = [id(value) for value in next_read if known and type(value) is not dict]
    unchanged: Callable[[], bool] = torch.classes.lowkernels_cpu.Watch(tensors, numbers, pointers, dicts, others).unchanged
    return unchanged


class _Calls(TorchDispatchMode):
    """Keeps the calls of operators made in it."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.made.append((func, args))
        return func(*args, **(kwargs or {}))


def chain(calls: Sequence[Prepared | Plain], inputs: Sequence[Tensor]) -> Callable[[Tensor], Tensor] | None:
    """One function for calls that take each other's outputs, or None where one of them does more than run a kernel of this library.

    Args:
        calls: operators served by this backend, which are given rows (N, C) as images of one pixel, and functions between them.
        inputs: an input of each; operators are run on that once more, to see what they do.
    """
    steps = torch.classes.lowkernels_cpu.Chain()
    made = [call for call in calls if isinstance(call, Prepared)]
    copied = made[0].served[1]
    if calls[0] is not made[0] or any(call.served[1] for call in made[1:]):
        return None
    for call, x in zip(calls, inputs, strict=True):
        if not isinstance(call, Prepared):
            step = _plain(call, x)
            if step is None:
                return None
            steps.add(*step)
            continue
        rows = x.dim() == 2
        x = (x[:, :, None, None] if rows else x).contiguous(memory_format=torch.channels_last)
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
        name = func._schema.name.removeprefix("lowkernels_cpu::")
        if rows and name != "conv_act":
            return None
        steps.add("linear" if rows else name, packed, list(map(int, numbers)), reals)
    run: Callable[[Tensor], Tensor] = steps.run
    if not copied:
        return run
    return lambda x: run(x.contiguous(memory_format=torch.channels_last))


def _plain(function: Plain, x: Tensor) -> tuple[str, list[Tensor], list[int], list[float]] | None:
    """What ``Chain.add`` takes for a function of ``x``, or None where it is not made for that."""
    if function.name == "activation":
        return "activation", [], [ACTIVATION_NUMBERS[function.act]], []
    if function.name == "layer_norm":
        if x.dim() != 2 or any(
            t is not None and (t.dtype != x.dtype or t.shape != x.shape[1:]) for t in (function.weight, function.bias)
        ):
            return None
        weight = torch.ones_like(x[0]) if function.weight is None else function.weight
        bias = torch.zeros_like(x[0]) if function.bias is None else function.bias
        return "layer_norm", [weight.float(), bias.float()], [], [function.eps]
    if x.dim() != 4 or (function.name == "flatten" and x.shape[2:] != (1, 1)):
        return None
    return function.name, [], [], []
