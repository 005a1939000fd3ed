"""What ``lowkernels.graphed`` says where it cannot work; ``test_gpu.py`` has it at work."""

from __future__ import annotations

import pytest
import torch

import lowkernels
from lowkernels import graphs


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu() -> None:
    with pytest.raises(lowkernels.InputError, match="no CUDA device is available"):
        lowkernels.graphed(torch.nn.Identity().eval(), torch.zeros(1))


def test_training_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(lowkernels.InputError, match="training mode"):
        lowkernels.graphed(torch.nn.Identity(), torch.zeros(1))


def test_cpu_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(lowkernels.InputError, match="x: is on cpu"):
        lowkernels.graphed(torch.nn.Identity().eval(), torch.zeros(1))


def test_one_graph_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """The book-keeping, with a capture that only remembers: replaying computes into the same buffers."""

    class Replay:
        def __init__(self, source: torch.Tensor, target: torch.Tensor) -> None:
            self.source, self.target = source, target

        def replay(self) -> None:
            self.target.copy_(2 * self.source)

    captured = []

    def capture(self: graphs.Graphed, x: torch.Tensor) -> tuple[Replay, torch.Tensor, torch.Tensor]:
        captured.append(tuple(x.shape))
        source, target = torch.empty_like(x), torch.empty_like(x)
        return Replay(source, target), source, target

    monkeypatch.setattr(graphs.Graphed, "_capture", capture)
    fast = graphs.Graphed(lambda x: 2 * x)
    first = fast(torch.ones(2, 3))
    second = fast(torch.full((2, 3), 5.0))
    fast(torch.ones(4, 3))
    assert captured == fast.shapes == [(2, 3), (4, 3)]
    assert torch.equal(first, torch.full((2, 3), 2.0)), "a later call must not change an earlier result"
    assert torch.equal(second, torch.full((2, 3), 10.0))
