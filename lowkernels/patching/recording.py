"""What a module computes, learned by watching it: the tensor operations of one forward, and which of its own tensors they use.

This sees through class names, custom forwards and functional calls alike. It does not see Python control flow that a different
input would send elsewhere; callers watch several inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations whose result is their input, in another layout at most.
_IDENTITIES = {"clone", "contiguous", "alias", "detach", "lift_fresh"}
# Operations of one tensor, or of two of the same shape, whose result has that shape too.
_ELEMENTWISE = {"_safe_softmax", "_softmax", "add", "gelu", "hardswish", "hardtanh", "mul", "relu", "silu"}
_IN_PLACE = {f"{name}_" for name in _ELEMENTWISE}
_NORMS = {"native_batch_norm", "_native_batch_norm_legit_no_training", "native_group_norm"}


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

    def values(self) -> Iterator[Value | Own]:
        """Every tensor it reads, those in lists included."""
        return _tensors(list(self.args.values()))


@dataclass
class Recording:
    """The operations of one forward, in order.

    Attributes:
        steps: what ran, without operations that return their input unchanged.
        input: the module's input.
        outputs: the tensors in what it returned.
        returned: what it returned.
        strangers: tensors that are neither input nor own nor made from these: attributes, constants, tensors of other modules.
        input_changed: whether it wrote into its input.
    """

    steps: list[Step] = field(default_factory=list)
    input: Value = Value(0)
    outputs: list[Value | Own] = field(default_factory=list)
    returned: Any = None
    strangers: list[Value] = field(default_factory=list)
    input_changed: bool = False

    @property
    def output(self) -> Value | Own:
        """What a module that returns one tensor returned."""
        return self.outputs[0]

    @property
    def tensor(self) -> Tensor:
        """The tensor returned by a module that returns one."""
        assert isinstance(self.returned, Tensor)
        return self.returned

    def producer(self, value: Any) -> Step | None:
        """The step that made ``value``; None for the input, constants and what is no value."""
        return next((s for s in self.steps if s.result == value), None)

    def uses(self, value: Value | Own) -> int:
        """How many steps read ``value``; being an output counts as one."""
        return sum(value in s.values() for s in self.steps) + (value in self.outputs)


def _tensors(found: Any) -> Iterator[Value | Own]:
    if isinstance(found, Value | Own):
        yield found
    elif isinstance(found, list | tuple):
        for inner in found:
            yield from _tensors(inner)


class _Recorder(TorchDispatchMode):
    def __init__(self, module: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.recording = Recording()
        self._own = {id(t): Own(n) for n, t in (*module.named_parameters(), *module.named_buffers())}
        self._values: dict[int, Value] = {}
        # An id is only an identity while its object lives.
        self._alive: list[Tensor] = []
        self.recording.input = self._new(x)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nobody compiles a recording, and saying so would import the whole compiler.
        return False

    def _new(self, tensor: Tensor) -> Value:
        value = Value(len(self._alive))
        self._alive.append(tensor)
        self._values[id(tensor)] = value
        return value

    def value_of(self, found: Any) -> Any:
        if isinstance(found, Tensor):
            known = self._values.get(id(found)) or self._own.get(id(found))
            if known is None:
                known = self._new(found)
                self.recording.strangers.append(known)
            return known
        if isinstance(found, list | tuple):
            return [self.value_of(f) for f in found]
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        names = [a.name for a in func._schema.arguments]
        bound = {n: self.value_of(a) for n, a in zip(names, args, strict=False)}
        bound |= {n: self.value_of(a) for n, a in kwargs.items()}
        defaults = {a.name: a.default_value for a in func._schema.arguments if a.name not in bound}
        name = func._schema.name.removeprefix("aten::")
        out = _without_data(name, args) if args and isinstance(args[0], Tensor) and args[0].is_meta else None
        if out is None:
            out = func(*args, **kwargs)
        first = out[0] if isinstance(out, list | tuple) and out else out
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


def _without_data(name: str, args: Any) -> Any:
    """What the commonest operations give for tensors without data; None for others.

    PyTorch would say the same, but by Python code that imports its compiler, which takes longer than all other work here.
    """
    x = args[0]
    others = [a for a in args[1:] if isinstance(a, Tensor)]
    if name in _ELEMENTWISE and all(o.shape == x.shape and o.dtype == x.dtype for o in others):
        return x.new_empty(x.shape)
    if name in _IN_PLACE and all(o.shape == x.shape for o in others):
        return x
    if name in _NORMS:
        return x.new_empty(x.shape), x.new_empty(0), x.new_empty(0)
    if name == "bmm":
        return x.new_empty(x.shape[0], x.shape[1], others[0].shape[2])
    if name == "convolution":
        _, weight, _, stride, padding, dilation, transposed, extra, groups = args
        windows = [1 + d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        sides = zip(x.shape[2:], windows, stride, padding, extra, strict=True)
        if transposed:
            return x.new_empty(x.shape[0], weight.shape[1] * groups, *((n - 1) * s - 2 * p + w + e for n, w, s, p, e in sides))
        return x.new_empty(x.shape[0], weight.shape[0], *((n + 2 * p - w) // s + 1 for n, w, s, p, _ in sides))
    return None


@torch.no_grad()
def record(module: nn.Module, x: Tensor) -> Recording:
    """Run ``module(x)`` without gradients and note what it does.

    Args:
        module: called as ``module(x)``; in the mode it is in.
        x: its input. It is not changed: the module gets a copy.

    Raises:
        Exception: whatever the module itself raises.
    """
    given, x = x, x.clone()
    version = x._version
    recorder = _Recorder(module, x)
    with recorder:
        out = module(x)
    recording = recorder.recording
    # A write through .data leaves the version as it was.
    recording.input_changed = x._version != version or not (x.is_meta or torch.equal(x, given))
    recording.returned = out
    recording.outputs = [recorder.value_of(leaf) for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
    # Some operations allocate room for statistics that inference does not fill.
    recording.steps = [s for s in recording.steps if s.op != "empty" or recording.uses(s.result)]
    return recording
