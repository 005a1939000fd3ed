"""How ``auto`` chooses between the backends that may serve a call.

In this order, by the first of these that knows the call: the user's measured table, a measured table that ships with the package
(:mod:`~lowkernels.choosing.measured`), an estimate (GPUs only, :mod:`~lowkernels.choosing.estimates`), the fixed order of
:data:`lowkernels.backends.PRIORITY`. Nothing is ever timed here. The outcome is cached by the operators for each combination of
shapes, dtypes, device and configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import estimates, measured
from .measured import Found
from .settings import Setting

# Numbers overrule the fixed order only where they differ by more than this: measured ones, and estimated ones.
NOISE, MARGIN = 1.05, 1.5
_UNSURE = f"; not measured here (lowkernels tune), so only factors above {MARGIN} count"

REQUESTED, MEASURED, SHIPPED, ESTIMATED, ORDER = "request", "measured", "shipped", "estimate", "order"


@dataclass(frozen=True)
class Ranking:
    """Backends in the order they are to be asked in.

    Attributes:
        order: their names.
        basis: what decided: ``"measured"`` (the user's table), ``"shipped"``, ``"estimate"`` or ``"order"``.
        seconds: what was measured or estimated for each.
        about: what the numbers are, ahead of them: ``"measured here"``.
        tail: where they are from, behind them.
        settings: a measured table's, by backend.
    """

    order: tuple[str, ...]
    basis: str = ORDER
    seconds: dict[str, float] = field(default_factory=dict)
    about: str = ""
    tail: str = ""
    settings: dict[str, dict[str, int]] = field(default_factory=dict)

    def why(self, backend: str, first: bool) -> str:
        """Why ``backend`` was chosen, in words. ``first``: none was refused before it."""
        if backend not in self.seconds:
            return "first choice of auto" if first else "first in auto's order that can serve the call"
        others = [name for name in self.seconds if name != backend]
        against = ", ".join(f"{duration(self.seconds[name])} for {name}" for name in others)
        return f"{self.about}: {duration(self.seconds[backend])}" + (f" against {against}" if against else "") + self.tail

    def basis_of(self, backend: str) -> str:
        """What decided for ``backend``."""
        return self.basis if backend in self.seconds else ORDER


def duration(seconds: float) -> str:
    """Three digits of microseconds or milliseconds."""
    return f"{1e6 * seconds:.3g} us" if seconds < 1e-3 else f"{1e3 * seconds:.3g} ms"


def setting(operator: str, backend: str, call: Sequence[Any]) -> Setting:
    """What a measured table says ``backend`` is to run a call with; empty if nothing."""
    found = _measured(operator, call)
    return {} if found is None else found.row.settings.get(backend, {})


def table(operator: str, backend: str, call: Sequence[Any]) -> str:
    """Which measured table has ``backend`` on a call: ``"measured"``, ``"shipped"``, or none, which is empty."""
    found = _measured(operator, call)
    return "" if found is None or backend not in found.row.us else _basis(found)


def _basis(found: Found) -> str:
    return SHIPPED if found.shipped else MEASURED


def _measured(operator: str, call: Sequence[Any]) -> Found | None:
    machine = measured.machine(call[0].device)
    described = None if machine is None else measured.describe(operator, call)
    return None if machine is None or described is None else measured.find(described, machine)


def rank(operator: str, names: Sequence[str], call: Sequence[Any] | None, packed_for: str | None = None) -> Ranking:
    """Put the backends ``names``, given in their fixed order, into the order they are to be asked in.

    Args:
        operator: the operator's name.
        names: those that serve tensors of the call's device.
        call: the arguments without the dispatch ones, all of them; None where there is no input yet, as in packing.
        packed_for: the backend that the weights at hand are laid out for. It is only compared with eager, which reads them as they
            are: laying them out for another one on every call takes longer than that one saves.
    """
    # What comes after eager, which serves everything, has to be asked for by name.
    choices = list(names[: names.index("eager") + 1] if "eager" in names else names)
    if packed_for in choices and packed_for != "eager":
        choices = [name for name in choices if name in (packed_for, "eager")]
    if call is None or len(choices) < 2:
        return Ranking(_all(choices, names))
    found = _measured(operator, call)
    if found is not None and (times := {b: found.row.us[b] * 1e-6 for b in choices if b in found.row.us}):
        about = f"measured on {found.machine.device}" if found.shipped else "measured here"
        images, _, height, width = call[0].shape
        same = found.row.shape == (images, height, width)
        tail = "" if same else " at {} x {}x{}".format(*found.row.shape)
        tail += f" ({found.row.measured})" if found.row.measured else ""
        order = _all(_ordered(times, NOISE), choices, names)
        return Ranking(order, _basis(found), times, about, tail, found.row.settings)
    return _estimated(operator, choices, names, call) or Ranking(_all(choices, names))


def _estimated(operator: str, choices: list[str], names: Sequence[str], call: Sequence[Any]) -> Ranking | None:
    x: torch.Tensor = call[0]
    if not x.is_cuda or measured.machine(x.device) is None or measured.describe(operator, call) is None:
        return None
    arch, dtype = estimates.compute_capability(x.device), measured.arithmetic(x)
    times: dict[str, float] = {}
    for name in choices:
        seconds = estimates.seconds(name, operator, call, arch, dtype)
        if seconds is None:
            return None
        times[name] = seconds
    return Ranking(_all(_ordered(times, MARGIN), names), ESTIMATED, times, "estimated", _UNSURE)


def _ordered(times: dict[str, float], margin: float) -> list[str]:
    """``times`` come in the fixed order; whoever is slower than somebody by more than ``margin`` goes behind."""
    return sorted(times, key=lambda name: sum(times[name] > margin * t for t in times.values()))


def _all(*groups: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for group in groups for name in group))
