"""How many kernels a LowFormer-B1 forward launches, counted without a GPU: at batch 1 that is most of what it costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lowformer
import lowkernels
from lowformer.kernels import use_kernels
from lowkernels import dispatch
from lowkernels.backends.cuda import split, tiling
from lowkernels.ops import OPERATORS
from tests.cuda import execution

MOST = 45
H200 = tiling.Device(227 * 1024, 228 * 1024, 132)
# Operations that make room or look at it from another side: nothing runs on the device.
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view"}
LaunchesOf = Callable[[str, tuple[Any, ...]], Counter[str]]


def is_view(func: Any) -> bool:
    return all(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


class Count(TorchDispatchMode):
    """Counts launches: those of an operator as ``launches_of`` says, one for any other operation that is not a view.

    An operator's result is not computed: only its shape matters to what follows.
    """

    def __init__(self, launches_of: LaunchesOf) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self._launches_of = launches_of
        self._known: dict[Any, Counter[str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if func.namespace == "lowkernels":
            call = OPERATORS[name]._complete(args)
            key = name, *((tuple(v.shape), v.stride()) if isinstance(v, Tensor) else v for v in call[:-3])
            if key not in self._known:
                self._known[key] = self._launches_of(name, call)
            self.launches += self._known[key]
            shape = OPERATORS[name].infer_shape(*call[:-3])
            layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
            return torch.zeros(shape, dtype=call[0].dtype).contiguous(memory_format=layout)
        if func.namespace == "aten" and not is_view(func) and name not in ALLOCATIONS:
            self.launches[name] += 1
        return func(*args, **(kwargs or {}))


class Others(Count):
    """Counts what an operator runs besides its own kernels."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (
            func(*args, **(kwargs or {}))
            if func.namespace == "lowkernels_cuda"
            else super().__torch_dispatch__(func, types, args, kwargs)
        )


def layout_copies(call: tuple[Any, ...]) -> tuple[Tensor, int]:
    """x as an operator's kernel gets it, and the copies that takes."""
    x: Tensor = call[0]
    copied = not x.is_contiguous(memory_format=torch.channels_last)
    return x.contiguous(memory_format=torch.channels_last), int(copied)


def model_in_half(backend: str) -> nn.Module:
    model = lowformer.create_model("lowformer_b1", kernels="eager").half().eval()
    return use_kernels(lowkernels.restore(model), backend=backend)


def count(model: nn.Module, launches_of: LaunchesOf) -> Counter[str]:
    x = torch.zeros(1, 3, 224, 224, dtype=torch.float16)
    with torch.no_grad(), Count(launches_of) as counting:
        logits = model(x)
    assert logits.shape == (1, 1000)
    return counting.launches


def said(launches: Counter[str]) -> str:
    return f"{launches.total()} launches: " + ", ".join(f"{n} {name}" for name, n in launches.most_common())


def test_cuda(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "SMALLEST", H200)
    split.memory(torch.empty(4), 2, 1)  # the first call on a device makes its tickets

    def launches_of(name: str, call: tuple[Any, ...]) -> Counter[str]:
        kernel = dispatch.kernel(name, "cuda")
        assert kernel is not None
        x, copies = layout_copies(call)
        packed = kernel.pack(*OPERATORS[name].weights(call[:-3]))
        # One CTA of a launch is enough to see it.
        with execution.watched(kernels, only_last=1) as outcome, Others(launches_of) as others:
            kernel.forward(x, *call[1:-3], packed)
        assert not outcome.reports
        return others.launches + Counter({name: outcome.launches, "layout copy": copies})

    launches = count(model_in_half("cuda"), launches_of)
    assert launches["conv_act"] == 4, "the stem, the head and its two fully connected layers"
    print(said(launches))
    assert launches["layout copy"] == 1, "of the image"
    assert launches.total() <= MOST, said(launches)


def test_triton() -> None:
    pytest.importorskip("triton")
    from lowkernels.backends.triton import launch

    def launches_of(name: str, call: tuple[Any, ...]) -> Counter[str]:
        kernel: Any = dispatch.kernel(name, "triton")
        x, copies = layout_copies(call)
        packed = kernel.pack(*OPERATORS[name].weights(call[:-3]))
        with launch.planning_for(launch.Target(90, 132)), Others(launches_of) as others:
            planned = kernel.plan(x, *call[1:-3], packed)[1]
        return others.launches + Counter({name: len(planned), "layout copy": copies})

    launches = count(model_in_half("eager"), launches_of)
    print(said(launches))
    assert launches["layout copy"] == 1, "of the image"
    assert launches.total() <= MOST, said(launches)
