"""One small call of an operator, held to its error budget on this very device before the operator is used there.

Compilers and GPUs differ, and kernels written for one may be wrong on another. A backend that sets ``SELF_CHECK`` is asked to prove
itself once for each operator, device and dtype in a process; if it fails, it is not used, and the reason says so.
"""

from __future__ import annotations

import logging

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
    from .testing import check_call, random_call

    for case in _CASES[operator]:
        call = random_call(operator, batch=3, channels=64, height=13, width=14, dtype=dtype, device=device, **case)  # type: ignore[arg-type]
        try:
            with torch.autocast(device.type, enabled=False), torch.inference_mode(False):
                check_call(*call, backend=backend)
        except AssertionError as error:
            reason = f"its self-check on {_name(device)} gave wrong numbers ({error})"
        except Exception as error:  # whatever a compiler or a driver may raise
            first = (str(error).splitlines() or [""])[0]
            reason = f"its self-check on {_name(device)} failed ({type(error).__name__}: {first})"
        else:
            continue
        _log.warning("lowkernels.%s: backend %r is not used for %s: %s", operator, backend, dtype, reason)
        return reason
    return None


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
