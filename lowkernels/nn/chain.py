"""Blocks that follow one another run in one call: at batch 1, Python around small blocks takes as long as some of their kernels.

A :class:`Chain` takes the place of a module that does nothing but hand each child's output to the next child, where every child is
a block or a chain itself. It has the same children under the same names. In eval mode, where nobody listens in between and the
backend offers it (``chain`` in the backend's module), all the blocks are one call; else the children are called one by one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..ops.operator import looks, nobody_listens
from .block import PREPARED_KEPT, FusedBlock, has_hooks
from .row import Around, Row, first


class Chain(nn.Sequential):
    """Children called one after another, in one call where that is the same. See :func:`chain_blocks`.

    (N, C, H, W) -> what the last child returns. State dict, indices and iteration are those of ``nn.Sequential``.
    """

    _rows: dict[tuple[Any, ...], Row | None]
    _structure: list[tuple[dict[str, Any], tuple[Any, ...]]]

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        # Shared, so that whatever is done to the children of one is done to those of the other.
        self._modules = original._modules  # type: ignore[assignment]
        self.training = original.training
        self._original = (original,)
        self._forget()

    @property
    def original(self) -> nn.Module:
        """The module in whose place this chain is."""
        return self._original[0]

    def forward(self, x: Tensor) -> Tensor:
        if self.training or torch.compiler.is_compiling() or not nobody_listens(x) or _has_any_global_hook():
            return self._one_by_one(x)
        key = looks(x, None)
        if key not in self._rows:
            return self._first(x, key)
        row = self._rows[key]
        if row is None:
            if any(tuple(children.values()) != before for children, before in self._structure):
                self._forget()
            return self._one_by_one(x)
        if torch.is_grad_enabled() and not row.frozen:
            return self._one_by_one(x)
        if not row.holds():
            self._forget()
            return self._one_by_one(x)
        return row(x)

    def _one_by_one(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)
        return out

    def _first(self, x: Tensor, key: tuple[Any, ...]) -> Tensor:
        containers = [self, *(m for m in self.modules() if m is not self and isinstance(m, Chain))]
        self._structure = [(m._modules, tuple(m._modules.values())) for m in containers]
        if any("forward" in m.__dict__ or has_hooks(m) for m in containers[1:]):
            return self._one_by_one(x)
        around = Around([m._modules for m in containers], containers[1:], [m.__dict__ for m in containers[1:]])
        x, row, other_without_gradients = first(list(blocks_of(self)), x, around)
        if row is None and other_without_gradients:
            return x
        if len(self._rows) >= PREPARED_KEPT:
            self._rows.clear()
        self._rows[key] = row
        return x

    def _forget(self) -> None:
        self._rows, self._structure = {}, []

    def train(self, mode: bool = True) -> Chain:
        super().train(mode)
        self.original.training = mode
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Chain:
        self._forget()
        return super()._apply(fn, recurse)

    def __getattr__(self, name: str) -> Any:
        # Whoever held the original may read what it had besides its children.
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Not there yet while it is being copied.
            original = self.__dict__.get("_original", (None,))[0]
            if original is None:
                raise
            return getattr(original, name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": {}, "_structure": []}


def blocks_of(chain: Chain) -> Iterator[FusedBlock]:
    """The blocks that ``chain`` calls, in order."""
    for child in chain._modules.values():
        if isinstance(child, FusedBlock):
            yield child
        elif isinstance(child, Chain):
            yield from blocks_of(child)


class _Token:
    """What is handed from child to child while a module is looked at: nothing can be done with it but hand it on."""


class _Stub(nn.Module):
    """In the place of a child: notes that it was called, on what, and returns a new token."""

    def __init__(self, name: str, calls: list[tuple[str, object, object]]) -> None:
        super().__init__()
        self._note = (name, calls)
        self.eval()

    def forward(self, *args: object, **kwargs: object) -> object:
        name, calls = self._note
        calls.append((name, (args, kwargs), token := _Token()))
        return token


def _is_composition(module: nn.Module) -> bool:
    """Whether ``module(x)`` in eval mode hands x to the first child, its output to the second and so on, and does nothing else.

    The module's own code is run, with stubs for children and a token for x.
    """
    children, training = module._modules, module.training
    calls: list[tuple[str, Any, object]] = []
    first = x = _Token()
    module._modules = {name: _Stub(name, calls) for name in children}
    module.training = False
    try:
        out = module.forward(first)
    except Exception:  # it does more with x than hand it on
        return False
    finally:
        module._modules, module.training = children, training
    if [name for name, _, _ in calls] != list(children):
        return False
    for _, (args, kwargs), result in calls:
        if kwargs or len(args) != 1 or args[0] is not x:
            return False
        x = result  # type: ignore[assignment]
    return out is x


def _is_chain(module: nn.Module, places: Counter[int]) -> bool:
    children = list(module._modules.values())
    own = (*module._parameters.values(), *module._buffers.values())
    return (
        not isinstance(module, FusedBlock | Chain)
        and bool(children)
        and all(isinstance(m, FusedBlock | Chain | nn.Identity) for m in children)
        and sum(not isinstance(m, nn.Identity) for m in children) > 0
        and all(v is None for v in own)
        and not any(has_hooks(m) for m in module.modules())
        and all(places[id(m)] <= 1 for m in module.modules())
        and _is_composition(module)
    )


def chain_blocks(model: nn.Module) -> Iterator[tuple[nn.Module, str, Chain]]:
    """Find the modules under ``model`` that can be chains, innermost first.

    Yields:
        (parent, name, chain to put there). What is found next may hold it, so put it there first.
    """
    places = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    for parent in reversed(list(model.modules())):
        if isinstance(parent, FusedBlock):
            continue
        for name, child in list(parent._modules.items()):
            if child is not None and _is_chain(child, places):
                yield parent, name, Chain(child)
