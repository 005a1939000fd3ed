"""A backend that only exists in tests: it computes as eager does, notes what it is asked, and refuses what it is told to."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from lowkernels import backends, dispatch
from lowkernels.ops import OPERATORS

NAME = "probe"


class Probe:
    """The backend's module and its kernel for every operator, in one.

    Attributes:
        missing: why the backend is not usable at all, or None.
        bad_weights, bad_input: why it refuses, or None.
        wrong_by: what it adds to every result.
        forwards: (operator, packed) of every call that reached it.
    """

    KERNEL = "probe"
    DEVICES = ("cpu",)
    SELF_CHECK = False

    def __init__(self) -> None:
        self.missing: str | None = None
        self.bad_weights: str | None = None
        self.bad_input: str | None = None
        self.wrong_by = 0.0
        self.forwards: list[tuple[str, list[Tensor] | None]] = []
        self.asked_about_devices: list[str] = []

    def unavailable(self, device_type: str) -> str | None:
        self.asked_about_devices.append(device_type)
        return self.missing

    def kernel(self, operator: str) -> Any:
        eager = dispatch.kernel(operator, "eager")
        assert eager is not None
        probe = self

        class Kernel:
            def unsupported_weights(self, *weights: Any) -> str | None:
                return probe.bad_weights

            def unsupported_input(self, x: Tensor, *args: Any) -> str | None:
                return probe.bad_input

            def pack(self, *weights: Any) -> list[Tensor]:
                return [torch.full((1,), float(len(weights)))]

            def forward(self, x: Tensor, *args: Any) -> Tensor:
                probe.forwards.append((operator, args[-1]))
                return eager.forward(x, *args[:-1], None) + probe.wrong_by

        return Kernel()


def install(monkeypatch: pytest.MonkeyPatch) -> Probe:
    """Make the probe auto's first choice, before eager, for the length of a test. Nothing else is there."""
    probe = Probe()
    load, kernel = backends.load, dispatch.kernel
    kernels = {operator: probe.kernel(operator) for operator in OPERATORS}

    def load_either(name: str) -> ModuleType | Probe:
        return probe if name == NAME else load(name)

    monkeypatch.setattr(backends, "PRIORITY", (NAME, "eager"))
    monkeypatch.setattr(backends, "load", load_either)
    monkeypatch.setattr(dispatch, "kernel", lambda op, name: kernels[op] if name == NAME else kernel(op, name))
    monkeypatch.setattr(dispatch, "_checked", {})
    for operator in OPERATORS.values():
        monkeypatch.setattr(operator, "_plans", {})
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    return probe
