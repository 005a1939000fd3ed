"""A whole model as one call: what its forward does between the chains costs a small batch as much as some of their blocks.

:func:`make_whole` runs a model's own forward once, on a token, to see what it does. Where that is no more than handing the input
through blocks and a few plain functions (:class:`.row.Plain`), and its code can do nothing else another time, the model's calls go
to a :class:`Whole`: in eval mode, without gradients, where nobody listens in between and the blocks' backend offers it, everything
is one call. Every other call is the model's own.
"""

from __future__ import annotations

import operator
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import TorchFunctionMode

from ..ops.operator import looks, nobody_listens
from .block import PREPARED_KEPT, FusedBlock, has_hooks, hook_dicts
from .chain import Chain, blocks_of
from .reading import Reading, expect, is_trusted
from .row import Around, Plain, Row, Step, first

# Where nn.Module looks for another way to be called, and keeps what nn.Module.compile() made.
_PLACE = "_compiled_call_impl"
# Attributes of a model that this library keeps there.
_OURS = (_PLACE, "_lowkernels_notes", "_lowkernels_strides")
# How often a model is looked at: attributes that change all the time would cost more than is gained.
_LOOKS = 4


class Whole:
    """Calls of a model, as one call of a backend where that is the same.

    The model holds this. Neither the model nor its ``__dict__`` is held here, so that it is freed, with all packed weights, as soon
    as nobody else has it. Copies of this are None: they would be of the model it was made for.

    Args:
        model: the model; its own ``__call__`` serves whatever this does not.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._looks = 0
        self._look(model)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def _look(self, model: nn.Module) -> None:
        self._looks += 1
        self._rows: dict[tuple[Any, ...], Row | None] = {}
        self._state = _state(model)
        self._values = self._attributes(model)
        kinds = {type(m) for m in _containers(model)}
        self._forwards = [(kind, kind.forward) for kind in kinds if not is_trusted(kind.__module__)]
        self.steps = _look(model)

    def _attributes(self, model: nn.Module) -> list[object]:
        return [value for value in model.__dict__.values() if value is not self]

    def forget(self) -> None:
        """Drop what was put together for calls so far."""
        self._rows = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self._model()
        if model is None:
            raise ReferenceError("lowkernels: this call is of a model that does not exist any more")
        if len(args) != 1 or kwargs or torch.compiler.is_compiling() or torch.is_grad_enabled() or model.training:
            return model._call_impl(*args, **kwargs)
        x = args[0]
        if not isinstance(x, Tensor) or not nobody_listens(x) or _has_any_global_hook():
            return model._call_impl(x)
        # Another thread may drop them at any time.
        key, rows = looks(x, None), self._rows
        if key not in rows:
            return self._first(model, x, key)
        row = rows.get(key)
        if row is None:
            return model._call_impl(x)
        values = self._attributes(model)
        is_same = len(values) == len(self._values) and all(map(operator.is_, values, self._values)) and row.holds()
        if not is_same or any(kind.forward is not forward for kind, forward in self._forwards):
            self._rows = {}
            return self._first(model, x, key)
        return row(x)

    def _first(self, model: nn.Module, x: Tensor, key: tuple[Any, ...]) -> Any:
        if self._looks < _LOOKS and not _is_same(_state(model), self._state):
            self._look(model)
        containers = list(_containers(model))
        if (
            not self.steps
            or not _is_same(_state(model), self._state)
            or any(has_hooks(m) or "forward" in m.__dict__ for m in containers)
        ):
            return model._call_impl(x)
        own = [m for m in containers if not _is_ours(m)]
        places = [*(m._modules for m in containers), *(d for m in own for d in (m._parameters, m._buffers))]
        # Whoever holds the model's own attributes would keep it.
        others = [m.__dict__ for m in containers if m is not model]
        around = Around([*places, *(m.__dict__ for m in own if m is not model)], containers, others)
        out, row, _ = first(self.steps, x, around)
        if len(self._rows) >= PREPARED_KEPT:
            self._rows = {}
        self._rows[key], self._values = row, self._attributes(model)
        # Its sums may be rounded otherwise than PyTorch's: what is returned must not depend on which call it is.
        return out if row is None else row(x)


class _Token(Tensor):
    """What is handed through a model while it is looked at: a tensor to those who ask, with which a :class:`_Looking` lets be done
    only what it knows."""

    _steps: list[Step]
    _at: int

    @staticmethod
    def after(steps: list[Step]) -> _Token:
        """The token that stands for what is returned after ``steps``."""
        with torch._C.DisableTorchFunction():
            token = torch.empty(0, device="meta").as_subclass(_Token)
        token._steps, token._at = steps, len(steps)
        return token

    def then(self, step: Step) -> _Token:
        """The next token, after ``step``."""
        expect(self.is_latest(), "an earlier value is used again")
        # Blocks are going to be called without any of it.
        expect(
            not (torch._C._is_any_autocast_enabled() or torch.is_grad_enabled() or torch.is_inference_mode_enabled()),
            "a block is called in a context of its own",
        )
        self._steps.append(step)
        return _Token.after(self._steps)

    def is_latest(self) -> bool:
        """Whether nothing was made of it yet."""
        return self._at == len(self._steps)


class _Looking(TorchFunctionMode):
    """Notes plain functions of tokens. Whatever else is done with tensors is refused before it is done: the code that runs is the
    model's own, and so are the buffers that it may count in, or decide by."""

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> _Token:
        recorder = _RECORDERS.get(function)
        expect(recorder is not None and bool(args) and isinstance(args[0], _Token), f"{function} is no plain function")
        assert recorder is not None
        step = recorder(*args[1:], **(kwargs or {}))
        token: _Token = args[0]
        return token if step is None else token.then(step)


def _activation(name: str) -> Callable[..., Plain]:
    return lambda inplace=False: Plain("activation", act=name)


def _gelu(approximate: str = "none") -> Plain:
    return Plain("activation", act="gelu" if approximate == "none" else "gelu_tanh")


def _hardtanh(min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Plain:
    expect((min_val, max_val) == (0.0, 6.0))
    return Plain("activation", act="relu6")


def _dropout(p: float = 0.5, training: bool = True, inplace: bool = False) -> None:
    expect(not training or p == 0)


def _layer_norm(shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Plain:
    expect(len(shape) == 1 and all(t is None or t.is_leaf for t in (weight, bias)))
    return Plain("layer_norm", weight, bias, eps)


def _pool(output_size: Any) -> Plain:
    expect(output_size in (1, (1, 1), [1, 1]))
    return Plain("pool")


def _flatten(start_dim: int = 0, end_dim: int = -1) -> Plain:
    expect((start_dim, end_dim) in ((1, -1), (1, 3)))
    return Plain("flatten")


# The functions whose step is known, by what makes it of their arguments after the first; None for one that does nothing.
_RECORDERS: dict[Any, Callable[..., Plain | None]] = {
    F.relu: _activation("relu"),
    F.relu6: _activation("relu6"),
    F.hardswish: _activation("hardswish"),
    F.silu: _activation("silu"),
    F.gelu: _gelu,
    F.hardtanh: _hardtanh,
    F.dropout: _dropout,
    F.layer_norm: _layer_norm,
    F.adaptive_avg_pool2d: _pool,
    torch.flatten: _flatten,
    Tensor.flatten: _flatten,
}


class _Stub(nn.Module):
    """In the place of a block or chain; whatever else is read of it is the original's."""

    def __init__(self, original: FusedBlock | Chain) -> None:
        super().__init__()
        self._original = (original,)

    def forward(self, token: _Token) -> _Token:
        original = self._original[0]
        for block in blocks_of(original) if isinstance(original, Chain) else (original,):
            token = token.then(block)
        return token

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_original"][0], name)


def make_whole(model: nn.Module) -> bool:
    """Let ``model``'s calls be one call where that is the same; undone by :func:`unmake_whole`.

    Returns:
        Whether its forward is such that they can be.
    """
    unmake_whole(model)
    # The replicas of a nn.DataParallel would call the one original.
    if any(not p.is_cpu for p in model.parameters()):
        return False
    if isinstance(model, FusedBlock | Chain) or getattr(nn.Module, _PLACE, model) is not None or getattr(model, _PLACE) is not None:
        return False
    whole = Whole(model)
    if whole.steps:
        setattr(model, _PLACE, whole)
    return bool(whole.steps)


def unmake_whole(model: nn.Module) -> None:
    """Undo :func:`make_whole`, if it was done."""
    if isinstance(model.__dict__.get(_PLACE), Whole):
        delattr(model, _PLACE)


def forget(model: nn.Module) -> None:
    """Drop what the model's chains, and itself, have put together for calls so far."""
    for module in model.modules():
        if isinstance(module, Chain):
            module._forget()
        whole = module.__dict__.get(_PLACE)
        if isinstance(whole, Whole):
            whole.forget()


def _look(model: nn.Module) -> list[Step]:
    """What the model's forward does in eval mode, or nothing if that is more than steps, or only one."""
    if not any(isinstance(m, FusedBlock) for m in model.modules()) or _has_any_global_hook():
        return []
    steps: list[Step] = []
    try:
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
            _Looking(),
            Reading(_RECORDERS) as reading,
        ):
            out = _twin(model).forward(_Token.after(steps))
        reading.check(m for m in _containers(model) if not _is_ours(m))
    except Exception:  # it is anybody's code
        return []
    owned = {id(t) for m in _containers(model) for t in (*m._parameters.values(), *m._buffers.values())}
    weights = [t for step in steps if isinstance(step, Plain) for t in (step.weight, step.bias) if t is not None]
    followed = isinstance(out, _Token) and out.is_latest() and all(id(t) in owned for t in weights)
    return steps if followed and len(steps) > 1 else []


def _twin(module: nn.Module) -> nn.Module:
    """A module that runs the same code on the same attributes, in eval mode and with stubs for all blocks and chains."""
    if _is_ours(module):
        return _Stub(module)
    twin = object.__new__(type(module))
    children = {name: child and _twin(child) for name, child in module._modules.items()}
    # Nobody's hook hears of it.
    hooks: dict[str, Any] = {
        name: OrderedDict() for name, value in module.__dict__.items() if any(value is d for d in hook_dicts(module))
    }
    twin.__dict__.update({**module.__dict__, **hooks, "_modules": children, "training": False})
    return twin


def _is_ours(module: nn.Module) -> TypeGuard[FusedBlock | Chain]:
    return isinstance(module, FusedBlock | Chain)


def _containers(model: nn.Module) -> Iterator[nn.Module]:
    """``model`` and its descendants that are neither blocks nor inside of one."""
    yield model
    for child in model._modules.values():
        if child is not None and not isinstance(child, FusedBlock):
            yield from _containers(child)


def _state(model: nn.Module) -> list[tuple[int, str, object]]:
    """The attributes and children, by the module's id, that the code of the model and its own modules may depend on."""
    state: list[tuple[int, str, object]] = []
    for module in _containers(model):
        if not is_trusted(type(module).__module__):
            state.append((id(module), "forward", type(module).forward))
        attributes = {} if _is_ours(module) else module.__dict__
        state += [(id(module), name, value) for name, value in attributes.items() if name not in _OURS]
        # Among them the modules below, so that nothing else can come to have their ids.
        places = (module._modules, module._parameters, module._buffers)
        state += [(id(module), name, value) for place in places for name, value in place.items()]
    return state


def _is_same(state: list[tuple[int, str, object]], other: list[tuple[int, str, object]]) -> bool:
    return len(state) == len(other) and all(
        a == b and name == name_too and v is w for (a, name, v), (b, name_too, w) in zip(state, other, strict=True)
    )
