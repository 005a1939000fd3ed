"""What the tests of this folder share: blocks, models with unremarkable weights, and the checks that every model must pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import lowkernels
from lowkernels.nn.block import FusedBlock
from lowkernels.report import Report, Row
from lowkernels.testing import assert_within_budget

# An end-to-end output is no operator's: the longest sum in the networks below has fewer terms than this.
LONGEST_SUM = 1 << 16


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random BatchNorm statistics and affine weights, and nothing that an initialisation left at zero or one; in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point():
                continue
            if name.endswith("running_var"):
                tensor.uniform_(0.6, 1.4, generator=generator)
            elif name.endswith("running_mean"):
                tensor.normal_(std=0.1, generator=generator)
            elif tensor.dim() <= 1:
                mean = 1.0 if name.endswith(("weight", "gamma")) else 0.0
                tensor.normal_(mean, 0.1, generator=generator)
    return model.eval()


def image(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@torch.no_grad()
def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The tensors ``model`` returns."""
    return [leaf for leaf in tree_leaves(model(x)) if isinstance(leaf, Tensor)]


def assert_same_function(model: nn.Module, change: Callable[[nn.Module], nn.Module], *inputs: Tensor) -> nn.Module:
    """``change(model)`` computes what ``model`` did, within the error budget; returns the changed model, in float32."""
    before = [run(model, x) for x in inputs]
    truth = [run(model.double(), x.double()) for x in inputs]
    model.float()
    changed = change(model)
    for x, eager, exact in zip(inputs, before, truth, strict=True):
        for got, was, reference in zip(run(changed, x), eager, exact, strict=True):
            assert_within_budget(got, was, reference, LONGEST_SUM, f"{type(model).__name__} at {tuple(x.shape)}")
    return changed


class Snapshot:
    """All of a model that restore() must bring back."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = {name: (module, type(module), module.training) for name, module in model.named_modules()}
        self.tensors = {name: _of(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        self.state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.attributes = [{k: v for k, v in vars(m).items() if k not in ("_modules", "_parameters")} for m in model.modules()]

    def assert_restored(self) -> None:
        modules = dict(self.model.named_modules())
        assert list(modules) == list(self.modules)
        for name, (module, kind, training) in self.modules.items():
            assert modules[name] is module, name
            assert type(module) is kind
            assert module.training == training, name
        now = {name: _of(tensor) for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers())}
        assert now == self.tensors
        after = [{k: v for k, v in vars(m).items() if k not in ("_modules", "_parameters")} for m in self.model.modules()]
        for was, is_ in zip(self.attributes, after, strict=True):
            assert list(was) == list(is_)
            assert all(was[k] is is_[k] for k in was)
        self.assert_state_kept()

    def assert_state_kept(self) -> None:
        """The state dict has the keys and, bit for bit, the values it had."""
        state = self.model.state_dict()
        assert list(state) == list(self.state)
        for name, value in self.state.items():
            assert torch.equal(state[name], value), name


def _of(tensor: Tensor) -> tuple[Any, ...]:
    return id(tensor), tensor.dtype, tensor.shape, tensor.stride(), tensor.requires_grad


def counts(report: Report) -> dict[str, int]:
    """How many modules were replaced, by kind."""
    found: dict[str, int] = {}
    for row in report.replaced:
        found[row.kind] = found.get(row.kind, 0) + 1
    return dict(sorted(found.items()))


def row(model: nn.Module, name: str) -> Row:
    rows = [r for r in lowkernels.report(model) if r.name == name]
    assert len(rows) == 1, f"{len(rows)} rows about {name!r}"
    return rows[0]


def fused(model: nn.Module) -> list[FusedBlock]:
    return [m for m in model.modules() if isinstance(m, FusedBlock)]


class InvertedResidual(nn.Module):
    """The plainest block an operator serves: what the look-alikes look like."""

    def __init__(self, channels: int = 8, hidden: int = 16, kernel: int = 3, act: Callable[[], nn.Module] = nn.ReLU6) -> None:
        super().__init__()
        self.expand = nn.Conv2d(channels, hidden, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(hidden)
        self.act1 = act()
        self.depthwise = nn.Conv2d(hidden, hidden, kernel, padding=kernel // 2, groups=hidden, bias=False)
        self.norm2 = nn.BatchNorm2d(hidden)
        self.act2 = act()
        self.project = nn.Conv2d(hidden, channels, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(channels)

    def branch(self, x: Tensor) -> Tensor:
        x = self.act1(self.norm1(self.expand(x)))
        x = self.act2(self.norm2(self.depthwise(x)))
        y: Tensor = self.norm3(self.project(x))
        return y

    def forward(self, x: Tensor) -> Any:
        return self.branch(x) + x


class Net(nn.Module):
    """A model that calls one block, between layers that are none."""

    def __init__(self, block: nn.Module, channels: int = 8) -> None:
        super().__init__()
        self.block = block
        self.head = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        y = y[0] if isinstance(y, tuple) else y
        out: Tensor = self.head(y.mean((2, 3)).to(self.head.weight))
        return out
