"""What a module computes, learned by watching it: the tensor operations of one forward, and which of its own tensors they use.

This sees through class names, custom forwards and functional calls alike. It does not see Python control flow that a different
input would send elsewhere; callers watch several inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# Operations whose result is their input, in another layout at most.
_IDENTITIES = {"clone", "contiguous", "alias", "detach", "lift_fresh"}


@dataclass(frozen=True)
class Value:
    """A tensor of the recording: the module's input, the result of a step, or a constant of unknown origin."""

    index: int


@dataclass(frozen=True)
class Own:
    """A parameter or buffer of the module, by its dotted name."""

    name: str


@dataclass(frozen=True)
class Step:
    """One operation: its ATen name without overload, its arguments by name, its (first) result and that result's shape."""

    op: str
    args: Mapping[str, Any]
    result: Value
    shape: tuple[int, ...]


@dataclass
class Recording:
    """The operations of one forward, in order.

    Attributes:
        steps: what ran, without operations that return their input unchanged.
        input: the module's input.
        output: what it returned.
        tensor: the returned tensor itself.
    """

    steps: list[Step] = field(default_factory=list)
    input: Value = Value(0)
    output: Value = Value(0)
    tensor: Tensor | None = None

    def producer(self, value: Any) -> Step | None:
        """The step that made ``value``; None for the input, constants and what is no value."""
        return next((s for s in self.steps if s.result == value), None)

    def uses(self, value: Value) -> int:
        """How many steps read ``value``; being the output counts as one."""
        return sum(_contains(list(s.args.values()), value) for s in self.steps) + (self.output == value)


def _contains(found: Any, value: Value) -> bool:
    if isinstance(found, list | tuple):
        return any(_contains(f, value) for f in found)
    return bool(found == value) if isinstance(found, Value) else False


class _Recorder(TorchDispatchMode):
    def __init__(self, module: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.recording = Recording()
        self._own = {id(t): Own(n) for n, t in (*module.named_parameters(), *module.named_buffers())}
        self._values: dict[int, Value] = {}
        # An id is only an identity while its object lives.
        self._alive: list[Tensor] = []
        self.recording.input = self._new(x)

    def _new(self, tensor: Tensor) -> Value:
        value = Value(len(self._alive))
        self._alive.append(tensor)
        self._values[id(tensor)] = value
        return value

    def value_of(self, found: Any) -> Any:
        if isinstance(found, Tensor):
            known = self._values.get(id(found)) or self._own.get(id(found))
            return known if known is not None else self._new(found)
        if isinstance(found, list | tuple):
            return [self.value_of(f) for f in found]
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        names = [a.name for a in func._schema.arguments]
        bound = {n: self.value_of(a) for n, a in zip(names, args, strict=False)}
        bound |= {n: self.value_of(a) for n, a in kwargs.items()}
        defaults = {a.name: a.default_value for a in func._schema.arguments if a.name not in bound}
        out = func(*args, **kwargs)
        first = out[0] if isinstance(out, list | tuple) and out else out
        name = func._schema.name.removeprefix("aten::")
        if not isinstance(first, Tensor):
            # For example reading an element: the forward depends on data.
            self.recording.steps.append(Step(name, {**defaults, **bound}, Value(-1), ()))
            return out
        source = bound.get(names[0]) if names else None
        if name in _IDENTITIES and isinstance(source, Value):
            self._alive.append(first)
            self._values[id(first)] = source
            return out
        # In-place operations return their own argument: from here on that tensor is a new value.
        result = self._new(first)
        self.recording.steps.append(Step(name.removesuffix("_"), {**defaults, **bound}, result, tuple(first.shape)))
        if isinstance(out, list | tuple):
            for other in out[1:]:
                if isinstance(other, Tensor):
                    self._new(other)
        return out


@torch.no_grad()
def record(module: nn.Module, x: Tensor) -> Recording:
    """Run ``module(x)`` without gradients and note what it does.

    Args:
        module: called as ``module(x)``; in the mode it is in.
        x: its input. It is not changed: the module gets a copy.

    Raises:
        TypeError: the module does not return one tensor.
        Exception: whatever the module itself raises.
    """
    x = x.clone()
    recorder = _Recorder(module, x)
    with recorder:
        out = module(x)
    if not isinstance(out, Tensor):
        raise TypeError(f"returns {type(out).__name__}, not one tensor")
    recording = recorder.recording
    recording.output, recording.tensor = recorder.value_of(out), out
    # Some operations allocate room for statistics that inference does not fill.
    recording.steps = [s for s in recording.steps if s.op != "empty" or recording.uses(s.result)]
    return recording
