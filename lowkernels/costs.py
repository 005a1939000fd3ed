"""What calls and whole models cost at least: the floors that measurements are held against."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from .ops import OPERATORS
from .ops.cost import Cost, Step, block, size

__all__ = ["Block", "Cost", "Step", "floor_seconds", "of_call", "of_model", "record"]

_aten = torch.ops.aten


@functools.cache
def _cost(operator: str) -> Callable[..., Cost]:
    cost: Callable[..., Cost] = importlib.import_module(f"{__package__}.ops.{operator}.cost").cost
    return cost


@dataclass(frozen=True)
class Block:
    """One call recorded from a model.

    Attributes:
        operator: the operator's name, or ``"linear"`` for a product outside the operators.
        args: the operator's arguments without the dispatch ones, tensors without data; the product's two factors for ``linear``.
        cost: its least cost.
    """

    operator: str
    args: tuple[Any, ...]
    cost: Cost


def of_call(operator: str, args: tuple[Any, ...]) -> Cost:
    """The least cost of one call.

    Args:
        operator: one of :data:`lowkernels.ops.OPERATORS`.
        args: its arguments without the dispatch ones; trailing ones that have their default may be left out. Tensors are asked
            for shape and dtype only, so meta tensors do.

    Raises:
        KeyError: no such operator.
        InputError: the arguments are outside the operator's contract.
    """
    call = _complete(operator, args)
    return _cost(operator)(*call)


def _complete(operator: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """``args`` without dispatch arguments and with the trailing defaults that a caller, or PyTorch's dispatcher, left out."""
    schema = OPERATORS[operator].overload._schema.arguments[: len(OPERATORS[operator].argument_names)]
    return (*args[: len(schema)], *(a.default_value for a in schema[len(args) :]))


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[Block] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operator = func._schema.name.removeprefix("lowkernels::")
        if operator in OPERATORS:
            call = _complete(operator, args)
            self.blocks.append(Block(operator, call, of_call(operator, call)))
        elif func in (_aten.mm.default, _aten.addmm.default):
            x, weight = args[-2:]
            self.blocks.append(_linear(x, weight, args[0] if len(args) == 3 else None))
        return func(*args, **(kwargs or {}))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Block:
    out = x.shape[0] * weight.shape[1]
    step = Step("linear", 2 * out * x.shape[1], size(x, weight, bias) + out * x.element_size())
    return Block("linear", (x, weight), block("linear", size(x), out * x.element_size(), size(weight, bias), (step,)))


def record(model: nn.Module, shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32) -> list[Block]:
    """The operator calls and linear layers of one forward pass of ``model``, in order. Nothing is computed and no data is read.

    Args:
        model: in eval mode, its blocks replaced by the modules of :mod:`lowkernels.nn`, its parameters in ``dtype``.
        shape: of the images, (N, C, H, W).
        dtype: of the images.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with FakeTensorMode(allow_non_fake_inputs=True), _Recorder() as recorder, torch.no_grad():
        model(torch.empty(shape, dtype=dtype, device=device))
    return recorder.blocks


def of_model(model: nn.Module, shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32) -> tuple[Cost, ...]:
    """The least cost of every block of ``model``, in order; arguments as for :func:`record`."""
    return tuple(b.cost for b in record(model, shape, dtype))


def floor_seconds(costs: tuple[Cost, ...], flops_per_s: float, bytes_per_s: float) -> float:
    """The least time of a sequence of blocks, each one kernel, at these rates."""
    return sum(cost.fused.seconds(flops_per_s, bytes_per_s) for cost in costs)
