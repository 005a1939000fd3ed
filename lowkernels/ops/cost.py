"""What a block costs at least, as pure functions of shapes: the words every operator's ``cost.py`` is written in.

A block runs either as one kernel, which reads its inputs and weights once and writes its output once, or as a sequence of
kernels, one per convolution, norm, attention core and pooling, in which every intermediate is written once and read once.
Activations and bias are taken to be free in both, so the sequence is the most favourable one.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Step:
    """One kernel.

    Attributes:
        name: of the convolution, or what else it computes.
        flops: floating-point operations of its products and convolutions, two per multiply-accumulate; taps that fall on
            padding count, norms and activations do not.
        bytes: of every tensor it reads or writes, each once.
    """

    name: str
    flops: int
    bytes: int

    def seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        """The least time at these rates: the larger of arithmetic and traffic."""
        return max(self.flops / flops_per_s, self.bytes / bytes_per_s)


@dataclass(frozen=True)
class Cost:
    """What one call of an operator costs at least.

    Attributes:
        fused: the call as one kernel.
        steps: the call as a sequence of kernels.
    """

    fused: Step
    steps: tuple[Step, ...]

    @property
    def step_bytes(self) -> int:
        """Traffic of the whole sequence."""
        return sum(step.bytes for step in self.steps)


def size(*tensors: Tensor | None) -> int:
    """Bytes of the tensors together, every element counted once whatever the strides; None has none."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def block(name: str, inputs: int, output: int, weights: int, steps: tuple[Step, ...]) -> Cost:
    """The cost of a block from its steps, whose arithmetic it shares, and the bytes of what enters and leaves it."""
    return Cost(Step(name, sum(step.flops for step in steps), inputs + output + weights), steps)
