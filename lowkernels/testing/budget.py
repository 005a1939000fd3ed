"""The error budget. It is derived, never picked: twice what plain PyTorch loses in the same dtype, plus rounding once.

With u_T the unit roundoff of the dtype T, u_32 that of float32, and K the longest accumulation of the operator, a result in T may
differ from the float64 reference by at most

- in the Frobenius norm, relative to the reference's: 2 * (eager's in T) + u_T;
- in the largest element: 2 * (eager's in T) + 4 * (u_T + sqrt(K) * u_32) * max|reference|.

Both references start from the same inputs, already rounded to T. Eager runs with the same TF32 flags.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops import OPERATORS


@dataclass(frozen=True)
class Error:
    """A distance from the float64 reference, or a bound on it.

    Attributes:
        frobenius: ||difference||_F / ||reference||_F.
        maximum: max|difference|.
    """

    frobenius: float
    maximum: float

    def within(self, bound: Error) -> bool:
        """Neither measure exceeds the bound's; a NaN is never within."""
        return self.frobenius <= bound.frobenius and self.maximum <= bound.maximum


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of rounding to nearest in ``dtype``."""
    return torch.finfo(dtype).eps / 2


def measure_error(result: Tensor, reference: Tensor) -> Error:
    """The error of ``result`` (any floating dtype) against ``reference`` (float64, same shape).

    Raises:
        AssertionError: the shapes differ.
    """
    assert result.shape == reference.shape, f"shape {tuple(result.shape)}, expected {tuple(reference.shape)}"
    if reference.numel() == 0:
        return Error(0.0, 0.0)
    difference = result.detach().double().cpu() - reference.cpu()
    norm = torch.linalg.vector_norm(reference).item()
    absolute = torch.linalg.vector_norm(difference).item()
    relative = absolute / norm if norm else (0.0 if absolute == 0 else math.inf)
    return Error(relative, difference.abs().max().item())


def error_budget(eager: Error, reference: Tensor, dtype: torch.dtype, accumulation_length: int) -> Error:
    """The largest error a result in ``dtype`` may have, given eager PyTorch's error in that dtype."""
    largest = reference.abs().max().item() if reference.numel() else 0.0
    u = unit_roundoff(dtype)
    u_32 = min(unit_roundoff(torch.float32), u)
    return Error(
        2 * eager.frobenius + u,
        2 * eager.maximum + 4 * (u + math.sqrt(accumulation_length) * u_32) * largest,
    )


def assert_within_budget(result: Tensor, eager: Tensor, reference: Tensor, accumulation_length: int, what: str = "") -> None:
    """Check ``result`` against the budget.

    Args:
        result: what a backend or an accelerated model gave, in dtype T.
        eager: what plain PyTorch gave in T for the same inputs.
        reference: what plain PyTorch gave in float64 for the same inputs.
        accumulation_length: K.
        what: named in the message.

    Raises:
        AssertionError: the result is outside its budget, or has NaNs the reference has not.
    """
    assert result.dtype == eager.dtype, f"{what}: dtype {result.dtype}, expected {eager.dtype}"
    bound = error_budget(measure_error(eager, reference), reference, eager.dtype, accumulation_length)
    found = measure_error(result, reference)
    assert found.within(bound), f"{what}: {found} exceeds the budget {bound}"


def to_float64(value: Any) -> Any:
    """``value`` in float64 if it is a floating tensor, as it is otherwise."""
    return value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value


def check_call(operator: str, args: tuple[Any, ...], backend: str, packed: bool = True) -> Tensor:
    """Run one call on ``backend`` and check its result against the budget, its layout and its dtype.

    Args:
        operator: the operator's name.
        args: its arguments without the dispatch ones.
        backend: the backend to prove.
        packed: pass packed weights, as the modules do.

    Returns:
        The backend's result.

    Raises:
        AssertionError: the result is wrong.
    """
    op = OPERATORS[operator]
    weights = op.pack(*op.weights(args), backend=backend) if packed else None
    with torch.no_grad():
        result = op.overload(*args, *((weights.tensors, weights.backend) if weights else (None, None)), backend)
        eager = op.overload(*args, None, None, "eager")
        reference = op.overload(*(to_float64(a) for a in args), None, None, "eager")
    assert result.stride() == eager.stride(), f"{operator}: strides {result.stride()}, expected {eager.stride()}"
    what = f"{operator} on {backend}, x {tuple(args[0].shape)} {args[0].dtype}"
    assert_within_budget(result, eager, reference, op.accumulation_length(*args), what)
    return result
