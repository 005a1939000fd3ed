"""The model as a whole, run on one example: what it does as it is, and whether it still does it with modules exchanged.

A block that is proven to be an operator can still not be exchanged where its caller does more with it than call it: takes it apart,
reads its attributes, passes further arguments, or needs its output in one memory layout.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._pytree import tree_flatten

from ..nn.block import FusedBlock
from .recording import Recording, record

# Sides of the images a model without an example input is tried on: small first.
_EXAMPLE_SIZES = (64, 224)


class Exchanges:
    """Modules put in the places of others, to be undone in reverse."""

    def __init__(self) -> None:
        self._done: list[tuple[nn.Module, str, nn.Module]] = []

    def put(self, parent: nn.Module, name: str, module: nn.Module) -> None:
        """Make ``module`` the child ``name`` of ``parent``."""
        before = parent._modules[name]
        assert before is not None
        self._done.append((parent, name, before))
        parent._modules[name] = module

    def undo(self) -> None:
        """Put every module back."""
        while self._done:
            parent, name, before = self._done.pop()
            parent._modules[name] = before


class StandIn(nn.Module):
    """To its caller what a drop-in module is: the original's children, ``forward(x)`` and nothing else, a channels_last result."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self._modules = original._modules
        self.training = original.training
        self._original = (original,)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        out: Tensor = self._original[0].forward(x)
        return out.clone(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Trial:
    """A model's run on an example, in eval mode.

    Attributes:
        x: the example.
        recording: what the model did.
        calls: how often each module was called, by id.
        dimensions: with how many dimensions each module's first argument came, by id.
    """

    x: Tensor
    recording: Recording
    calls: Counter[int]
    dimensions: dict[int, set[int]]

    def problem(self, model: nn.Module) -> str:
        """How ``model`` now differs on the example by more than rounding, or nothing."""
        try:
            with torch.no_grad():
                now = model(self.x)
        except Exception as error:  # the model is anybody's code
            return _describe(error)
        (was_leaves, was_tree), (now_leaves, now_tree) = tree_flatten(self.recording.returned), tree_flatten(now)
        if was_tree != now_tree:
            return "it returns something else"
        for was, is_ in zip(was_leaves, now_leaves, strict=True):
            if isinstance(was, Tensor) and was.is_floating_point():
                change = _change(was, is_)
                if not change <= torch.finfo(was.dtype).eps ** 0.5:
                    return f"its output changes by {change:.1e}"
        return ""


def _change(was: Tensor, now: Tensor) -> float:
    """The relative change in the Frobenius norm, over what is finite."""
    if was.shape != now.shape or was.dtype != now.dtype:
        return float("inf")
    if was.is_meta:
        return 0.0
    finite = was.isfinite()
    if not torch.equal(finite, now.isfinite()):
        return float("inf")
    difference = torch.linalg.vector_norm((now.double() - was.double())[finite]).item()
    return difference and difference / torch.linalg.vector_norm(was[finite].double()).item()


@torch.no_grad()
def run(model: nn.Module, example_input: Tensor | None) -> Trial:
    """Run ``model``, which is in eval mode, on an example.

    Args:
        example_input: what it takes; None is a random image, of 64 x 64 or, where that does not run, 224 x 224.

    Raises:
        Exception: whatever the model raises.
    """
    if example_input is not None:
        return _run(model, example_input)
    like = next(model.parameters())
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    for size in _EXAMPLE_SIZES:
        x = torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
        try:
            return _run(model, x.to(like.device, like.dtype))
        except Exception:  # the model is anybody's code; it may want the larger image
            if size == _EXAMPLE_SIZES[-1]:
                raise
    raise AssertionError("unreachable: the last size returns or raises")


def _run(model: nn.Module, x: Tensor) -> Trial:
    calls: Counter[int] = Counter()
    dimensions: dict[int, set[int]] = {}

    def count(module: nn.Module, args: Any) -> None:
        calls[id(module)] += 1
        dimensions.setdefault(id(module), set()).add(args[0].dim() if args and isinstance(args[0], Tensor) else -1)

    counting = register_module_forward_pre_hook(count)
    try:
        return Trial(x, record(model, x), calls, dimensions)
    finally:
        counting.remove()


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module's flag says eval within. No ``train()`` or ``eval()`` of the model's own is called: these may do anything."""
    modes = [(m, m.training) for m in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
            if training and isinstance(module, FusedBlock):
                module._forget()


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Within, nothing that surrounds the caller reaches in (autocast, inference mode, a compiler); no random state leaks out."""
    devices = {p.device for p in model.parameters()}
    with contextlib.ExitStack() as stack:
        for kind in {"cpu", *(d.type for d in devices)} - {"meta"}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(torch.random.fork_rng([d.index for d in devices if d.type == "cuda"]))
        # Leaving inference mode turns gradients on, whatever they were.
        gradients = torch.is_grad_enabled()
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(gradients))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of what trains it in parallel or compiles it: running those would communicate, or compile."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif "torch._dynamo" in sys.modules and isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        else:
            return model


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
