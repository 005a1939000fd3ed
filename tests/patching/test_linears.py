"""Which fully connected layers accelerate() exchanges: those with one row an image, that are nothing but a product."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowkernels
from lowkernels.nn import Linear
from lowkernels.patching import linears
from tests.patching.helpers import InvertedResidual, Snapshot, assert_same_function, image, randomise, row


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) * 2


class Cast(nn.Linear):
    """The same in float64, but not in half precision."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.dtype if x.dtype == torch.float64 else torch.float32
        return F.linear(x.to(wide), self.weight.to(wide)).to(x.dtype)


class Same(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Net(nn.Module):
    def __init__(self, head: nn.Module, tokens: bool = False) -> None:
        super().__init__()
        self.block = InvertedResidual()
        self.head = head
        self.tokens = tokens

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        out: Tensor = self.head(y.flatten(2).transpose(1, 2)) if self.tokens else self.head(y.mean((2, 3)))
        return out


@pytest.mark.parametrize("head", [nn.Linear(8, 5), nn.Linear(8, 5, bias=False), Same(8, 5)], ids=["plain", "no bias", "subclass"])
def test_classifiers_are_exchanged(head: nn.Module) -> None:
    net = randomise(Net(head))
    snapshot = Snapshot(net)
    x = image(1, 8, 9, 7)
    with torch.no_grad():
        eager = net(x)
    lowkernels.accelerate(net, backend="eager")
    assert isinstance(net.head, Linear)
    assert row(net, "head").kind == "conv_act"
    snapshot.assert_state_kept()
    with torch.no_grad():
        torch.testing.assert_close(net(x), eager)
    lowkernels.restore(net)
    assert net.head is head
    snapshot.assert_restored()


def test_rows_of_tokens_are_left() -> None:
    net = lowkernels.accelerate(randomise(Net(nn.Linear(8, 5), tokens=True)), backend="eager")
    assert type(net.head) is nn.Linear
    assert "head" not in [r.name for r in lowkernels.report(net)]


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (Doubled(8, 5), "computes more, or something else"),
        (Cast(8, 5, bias=False), "computes more, or something else"),
        (nn.Linear(8, 5).requires_grad_(False), "too many to keep packed"),
    ],
    ids=["more", "other in half", "large"],
)
def test_others_are_left_and_the_report_says_why(monkeypatch: pytest.MonkeyPatch, head: nn.Module, words: str) -> None:
    if "too many" in words:
        monkeypatch.setattr(linears, "_MOST_WEIGHTS", 39)
    net = Net(head)
    assert_same_function(randomise(net), lambda m: lowkernels.accelerate(m, backend="eager"), image(2, 8, 9, 7))
    assert net.head is head
    assert words in row(net, "head").reason


def test_hooks_and_shared_layers_are_left() -> None:
    net = randomise(Net(nn.Linear(8, 5)))
    net.head.register_forward_hook(lambda *args: None)
    assert "hooks" in row(lowkernels.accelerate(net, backend="eager"), "head").reason
    net = randomise(Net(nn.Linear(8, 8)))
    net.other = net.head
    assert "two places" in row(lowkernels.accelerate(net, backend="eager"), "head").reason


def test_a_model_of_nothing_else_is_left_alone() -> None:
    net = lowkernels.accelerate(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), backend="eager")
    assert type(net[0]) is type(net[2]) is nn.Linear
