"""One small call of an operator, held to its error budget on this very device before the operator is used there.

Compilers and GPUs differ, and kernels written for one may be wrong on another. A backend that sets ``SELF_CHECK`` is asked to prove
itself once for each operator, device and dtype in a process; if it fails, it is not used, and the reason says so.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

_log = logging.getLogger("lowkernels")

# Sizes with an odd side, more rows than one tile has, and strides where the operator has them.
_CASES: dict[str, tuple[dict[str, int], ...]] = {
    "conv_act": ({"stride": 1}, {"stride": 2}),
    "separable_conv": ({"stride": 1}, {"stride": 2, "kernel_size": 5}),
    "mbconv": ({"stride": 1}, {"stride": 2, "kernel_size": 5}),
    "fused_mbconv": ({"stride": 1}, {"stride": 2}),
    "lowtention": ({"stride": 1}, {"stride": 2, "kernel_size": 5}),
    "gn_mlp": ({},),
}


def failure(operator: str, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why ``backend`` does not pass on ``device``, or None. Runs it."""
    reasons = (failure_of(operator, backend, device, dtype, case) for case in _CASES[operator])
    reason = next((reason for reason in reasons if reason is not None), None)
    if reason is not None:
        _log.warning("lowkernels.%s: backend %r is not used for %s: %s", operator, backend, dtype, reason)
    return reason


def failure_of(operator: str, backend: str, device: torch.device, dtype: torch.dtype, case: dict[str, int]) -> str | None:
    """Why ``backend`` does not pass one random call on ``device``, or None. Runs it. ``case`` changes the call's sizes."""
    from .testing import check_call, random_call

    sizes: dict[str, Any] = {"batch": 3, "channels": 64, "height": 13, "width": 14, **case}
    call = random_call(operator, dtype=dtype, device=device, **sizes)
    try:
        with torch.autocast(device.type, enabled=False), torch.inference_mode(False):
            check_call(*call, backend=backend)
    except AssertionError as error:
        return f"its self-check on {_name(device)} gave wrong numbers ({error})"
    except Exception as error:  # whatever a compiler or a driver may raise
        first = (str(error).splitlines() or [""])[0]
        return f"its self-check on {_name(device)} failed ({type(error).__name__}: {first})"
    return None


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
