"""What tests and benchmarks of this library, and of backends built for it, are written with: the error budget and random calls."""

from __future__ import annotations

from .budget import Error, assert_within_budget, check_call, error_budget, measure_error
from .calls import Call, random_call

__all__ = ["Call", "Error", "assert_within_budget", "check_call", "error_budget", "measure_error", "random_call"]
