"""Several blocks, and what stands between them, as one call of their backend; and all that such a call relies on."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .. import backends, dispatch
from ..ops.activations import activate
from ..ops.operator import Prepared, looks
from .block import FusedBlock, hook_dicts
from .linear import Linear

_attributes = {name: operator.attrgetter(name) for name in ("_prepared", "backend", "training")}
# After the last of what a row compares: a list that has grown must not look the same.
_END = object()


@dataclass(frozen=True)
class Plain:
    """A function between blocks, on (N, C, H, W) or on rows (N, C).

    Attributes:
        name: ``"layer_norm"`` over the channels of rows, ``"activation"``, ``"pool"``, the mean of each channel's pixels as
            (N, C, 1, 1), or ``"flatten"``, which makes rows of images of one pixel.
        weight, bias: (C,) each, of a layer_norm, or None.
        eps: of a layer_norm.
        act: an activation's name, of :data:`lowkernels.ops.ACTIVATIONS`.
    """

    name: str
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 0.0
    act: str = "none"

    def run(self, x: Tensor) -> Tensor:
        """PyTorch's own result."""
        if self.name == "layer_norm":
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        if self.name == "activation":
            return activate(x, self.act)
        return F.adaptive_avg_pool2d(x, 1) if self.name == "pool" else x.flatten(1)


Step = FusedBlock | Plain


@dataclass(frozen=True)
class Around:
    """What one call for several blocks relies on besides the blocks.

    Attributes:
        places: dicts whose values must stay the objects they are: modules' children, or all their attributes.
        passed_over: modules that are not called any more, so that they must have no hooks.
        attributes: of those of them that must not be given a forward of their own.
    """

    places: list[dict[str, Any]]
    passed_over: Sequence[nn.Module]
    attributes: list[dict[str, Any]]


class Row:
    """Steps as one call, and all that it relies on.

    That is what each block's own forward would look at, in lists of their own: going from block to block in Python takes several
    times as long, once kernels have filled the caches in between.
    """

    def __init__(
        self,
        run: Callable[[Tensor], Tensor],
        backend: ModuleType,
        steps: Sequence[Step],
        calls: Sequence[Prepared | Plain],
        around: Around,
    ) -> None:
        self.run = run
        self._blocks = blocks = [step for step in steps if isinstance(step, FusedBlock)]
        served = [call.served for call in calls if isinstance(call, Prepared)]
        self._served = [(block.__dict__, call) for block, call in zip(blocks, served, strict=True)]
        self._settled = [block._prepared for block in blocks]
        self._backends = [block.backend for block in blocks]
        self.frozen = all(block.frozen for block in blocks)
        self._modes = [m for block in blocks for m in (block, *block._mode_sensitive)]
        self._hooks = [hooks for m in (*around.passed_over, *blocks) for hooks in hook_dicts(m)]
        self._hooks += [hooks for block in blocks for hooks in block._hooks_of_children]
        self._handles: int | None = None
        # Whose own forward would be passed over.
        self._attributes = [*around.attributes, *(block.__dict__ for block in blocks)]
        self._attributes += [attributes for block in blocks for attributes in block._attributes_of_children]

        sources = [source[2:] for block in blocks for source in block._signature or ()]
        for tensor in {id(t): t for step in steps if isinstance(step, Plain) for t in (step.weight, step.bias)}.values():
            if tensor is not None:
                sources.append((tensor, None if tensor.is_inference() else tensor._version, tensor.data_ptr()))
        places = [place for block in blocks for place, *_ in block._signature or ()]
        places += [place for block in blocks for place, _ in block._places_of_children]
        places += around.places
        self._places: list[dict[str, Any]] = list({id(place): place for place in places}.values())
        self._values = list(itertools.chain.from_iterable(place.values() for place in self._places))
        tensors, versions, pointers = map(list, zip(*sources, strict=True)) if sources else ([], [], [])
        self._read = [*self._places, *self._modes, *(m.__dict__ for m in self._modes)]
        self._unchanged: Callable[[], bool] = backend.watch(tensors, versions, pointers, self._read)

    def holds(self) -> bool:
        """Whether every step would run the same kernel on the same packed weights again, without gradients."""
        values = itertools.chain.from_iterable(map(dict.values, self._places))
        return (
            self._unchanged()
            and all(map(operator.is_, itertools.chain(values, (_END,)), itertools.chain(self._values, (_END,))))
            and all(map(operator.is_, map(_attributes["_prepared"], self._blocks), self._settled))
            and list(map(_attributes["backend"], self._blocks)) == self._backends
            and not any(map(_attributes["training"], self._modes))
            and not any(map(operator.contains, self._attributes, itertools.repeat("forward")))
            and not self._is_hooked()
        )

    def _is_hooked(self) -> bool:
        # Every hook that is registered anywhere takes the next number: thousands of dicts need not be asked again.
        handles = getattr(RemovableHandle, "next_id", None)
        if handles is None or handles != self._handles:
            if any(self._hooks):
                return True
            self._handles = handles
        return False

    def __call__(self, x: Tensor) -> Tensor:
        # Before the kernels, which fill the caches with other things.
        for attributes, served in self._served:
            attributes["_last_call"] = served
        dispatch.record(*served)
        return self.run(x)


def first(steps: Sequence[Step], x: Tensor, around: Around) -> tuple[Tensor, Row | None, bool]:
    """Call the steps one by one, and put together what each block settles.

    Args:
        steps: what one call is to do.
        x: the first one's input.
        around: the modules that hold the blocks.

    Returns:
        Their output; the row, or None where there can be none; and whether that would be different without gradients.
    """
    calls: list[Prepared | Plain] = []
    inputs = []
    for step in steps:
        inputs.append(x)
        if isinstance(step, Plain):
            calls.append(step)
            x = step.run(x)
            continue
        known = looks(x[:, :, None, None] if isinstance(step, Linear) else x, step.backend_argument())
        x = step(x)
        passed_over = "forward" in step.__dict__ or step.must_run_its_children()
        if known in step._prepared and not passed_over:
            calls.append(step._prepared[known])
    if len(calls) < len(steps):
        # Settled without gradients only, as they mostly come.
        return x, None, torch.is_grad_enabled()
    serving = {call.served[0].backend for call in calls if isinstance(call, Prepared)}
    if len(serving) != 1:
        return x, None, False
    backend = backends.load(serving.pop())
    run = backend.chain(calls, inputs) if hasattr(backend, "chain") else None
    return x, run and Row(run, backend, steps, calls, around), False
