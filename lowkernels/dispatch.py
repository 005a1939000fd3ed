"""The one dispatcher: which backend serves a call, and why.

The request comes from, in this order: the call's ``backend`` argument, the innermost :func:`use_backend` context, the environment
variable ``LOWKERNELS_BACKEND``, and ``"auto"``. A backend requested by name serves the call or raises
:class:`~lowkernels.errors.BackendError`; ``"auto"`` takes the first backend that can, in the order of
:mod:`lowkernels.choosing.auto`, and keeps every reason why the ones before it could not.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch

from . import backends, selfcheck
from .choosing import auto, measured
from .choosing.settings import Setting, WithSetting, using
from .errors import BackendError

ENVIRONMENT_VARIABLE = "LOWKERNELS_BACKEND"
AUTO = "auto"

# What the sizes are called that a measured table is for.
_TUNED = {auto.MEASURED: "tuned", auto.SHIPPED: "shipped"}

_context: ContextVar[str | None] = ContextVar("lowkernels_backend", default=None)


class Kernel(Protocol):
    """What an operator's backend file (``lowkernels/ops/<operator>/<kernel>.py``) provides.

    Arguments are positional, in the order of the operator's schema. "Weights" means the schema without ``x``, without other input
    tensors, and without ``packed``, ``packed_for`` and ``backend``. Reasons are sentences that name the argument.
    """

    def unsupported_weights(self, *weights: Any) -> str | None:
        """Why these weights and this configuration can never be served, or None."""

    def unsupported_input(self, x: torch.Tensor, *args: Any) -> str | None:
        """Why this input cannot be served although the weights can be, or None."""

    def pack(self, *weights: Any) -> list[torch.Tensor]:
        """The weights in the backend's own layout."""

    def forward(self, x: torch.Tensor, *args: Any) -> torch.Tensor:
        """Run the operator; the last argument is the list :meth:`pack` made, or None. ``x`` is NHWC in memory and not empty.

        If the file has a function ``unpack(packed, weights)``, the inverse of :meth:`pack` as
        :meth:`lowkernels.ops.operator.Operator.unpacks` describes it, blocks keep packed weights alone, and no plain ones.

        If the file has a function ``remark(x, *args)``, of the same arguments without ``packed``, what it returns, a part of a
        sentence or None, is added to the reason why the backend was chosen: that a faster kernel of its own is not used, and why.

        If the file has a function ``candidates(x, *args)``, of the same arguments without ``packed``, ``lowkernels tune`` tries the
        settings it lists (dicts of names to integers), and this function heeds :func:`lowkernels.choosing.settings.current`: a
        setting, maybe one found best for a call of a similar size, or nothing. One that does not fit the call must be ignored.
        """


@dataclass(frozen=True)
class Choice:
    """The outcome of dispatching one call.

    Attributes:
        operator: name of the operator.
        backend: name of the backend that serves the call.
        reason: why that one, as a sentence.
        rejected: (backend, reason) of every backend that was preferred over it and refused, in order.
        basis: what decided: ``"request"``, ``"measured"`` (the user's table), ``"shipped"`` (a measured table that ships with the
            package), ``"estimate"`` or ``"order"`` (the fixed order of backends).
        sizes: where the sizes of tiles and the like that it runs with are from: ``"tuned"`` (the user's table), ``"shipped"``
            (a measured table), ``"table row 3"`` (the backend's own, for shapes like this), ``"cost model"`` (the backend's, for
            any shape) or ``"rule"`` (a backend that has no more than one way to find them); empty where there are none to choose.
    """

    operator: str
    backend: str
    reason: str
    rejected: tuple[tuple[str, str], ...] = ()
    basis: str = auto.ORDER
    sizes: str = ""

    @property
    def why(self) -> str:
        """:attr:`reason`, and :attr:`sizes` if there are any."""
        return self.reason + (f"; sizes: {self.sizes}" if self.sizes else "")

    def __str__(self) -> str:
        refused = "".join(f"; {name}: {reason}" for name, reason in self.rejected)
        return f"{self.operator}: {self.backend} ({self.why}){refused}"


def check_name(name: str, where: str = "") -> str:
    """``name`` if it is ``"auto"`` or a known backend; ``where`` it came from is put in front of the message.

    Raises:
        BackendError: unknown name.
    """
    if name != AUTO and name not in backends.PRIORITY:
        known = ", ".join((AUTO, *backends.PRIORITY))
        raise BackendError(f"{where}unknown backend {name!r}: allowed are {known}")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within this context (and thread), calls that name no backend themselves ask for ``name``.

    Args:
        name: a backend's name, or ``"auto"``.

    Raises:
        BackendError: unknown name. A known backend that cannot serve a call raises when that call is made.
    """
    token = _context.set(check_name(name, "lowkernels.use_backend: "))
    try:
        yield
    finally:
        _context.reset(token)


def requested(argument: str | None) -> tuple[str, str, int]:
    """The backend asked for, where the request came from, and which generation of measured tables answers it."""
    tables = measured.generation()
    if argument is not None:
        return argument, "the backend argument", tables
    context = _context.get()
    if context is not None:
        return context, "lowkernels.use_backend", tables
    variable = os.environ.get(ENVIRONMENT_VARIABLE)
    if variable:
        return variable, f"the environment variable {ENVIRONMENT_VARIABLE}", tables
    return AUTO, "auto", tables


@functools.cache
def kernel(operator: str, backend: str) -> Kernel | None:
    """The file of ``operator`` that serves ``backend``, imported on first use; None where the operator has none."""
    name = f"{__package__}.ops.{operator}.{backends.load(backend).KERNEL}"
    if importlib.util.find_spec(name) is None:
        return None
    return cast(Kernel, importlib.import_module(name))


# Outcomes of self-checks, None for passed; those under way; and who may check: others wait, but the check's own calls do not.
_checked: dict[tuple[str, str, torch.device, torch.dtype], str | None] = {}
_under_way: set[tuple[str, str, torch.device, torch.dtype]] = set()
_checking = threading.RLock()


def _self_check(operator: str, backend: str, like: torch.Tensor) -> str | None:
    if not getattr(backends.load(backend), "SELF_CHECK", False):
        return None
    key = (operator, backend, like.device, like.dtype)
    if key not in _checked:
        if like.is_cuda and torch.cuda.is_current_stream_capturing():
            # Nothing else may run in a capture; those who capture warm up first.
            return None
        with _checking:
            if key in _under_way:
                return None
            if key not in _checked:
                _under_way.add(key)
                try:
                    _checked[key] = selfcheck.failure(operator, backend, like.device, like.dtype)
                finally:  # interrupted, it has proven nothing
                    _under_way.discard(key)
    return _checked[key]


def choose(
    operator: str,
    like: torch.Tensor,
    argument: str | None,
    unsupported: Callable[[Kernel], str | None],
    call: Sequence[Any] | None = None,
    packed_for: str | None = None,
) -> tuple[Kernel, Choice]:
    """Choose the backend of one call.

    Args:
        operator: the operator's name.
        like: a tensor of the call's device and dtype.
        argument: the call's ``backend`` argument.
        unsupported: asks one kernel why it cannot serve the call.
        call: the operator's arguments without the dispatch ones, all of them; None where there is no input yet, as in packing.
        packed_for: the backend that the weights at hand are laid out for, if any.

    Raises:
        BackendError: a backend asked for by name is unknown or cannot serve the call.
    """
    name, source, _ = requested(argument)
    check_name(name, f"lowkernels.{operator}: {source}: ")

    def refusal(backend: str) -> str | None:
        missing = backends.load(backend).unavailable(like.device.type)
        if missing is not None:
            return missing
        found = kernel(operator, backend)
        if found is None:
            return f"it has no {operator} kernel"
        return unsupported(found) or _self_check(operator, backend, like)

    if name != AUTO:
        reason = refusal(name)
        if reason is not None:
            raise BackendError(f"lowkernels.{operator}: backend {name!r}, asked for by {source}, cannot serve this call: {reason}")
        setting = {} if call is None else auto.setting(operator, name, call)
        why = f"asked for by {source}" + _remark(operator, name, setting, call)
        sizes = "" if call is None else _sizes(operator, name, auto.table(operator, name, call), call)
        return _with(operator, name, setting), Choice(operator, name, why, basis=auto.REQUESTED, sizes=sizes)

    names = [candidate for candidate in backends.PRIORITY if like.device.type in backends.load(candidate).DEVICES]
    ranking = auto.rank(operator, names, call, packed_for)
    rejected: list[tuple[str, str]] = []
    for candidate in ranking.order:
        reason = refusal(candidate)
        if reason is None:
            why, basis = ranking.why(candidate, not rejected), ranking.basis_of(candidate)
            setting = ranking.settings.get(candidate, {})
            why += _remark(operator, candidate, setting, call)
            sizes = "" if call is None else _sizes(operator, candidate, basis, call)
            chosen = Choice(operator, candidate, why, tuple(rejected), basis, sizes)
            return _with(operator, candidate, setting), chosen
        rejected.append((candidate, reason))
    raise BackendError(f"lowkernels.{operator}: no backend can serve this call: {rejected}")


def _remark(operator: str, backend: str, setting: Setting, call: Sequence[Any] | None) -> str:
    """What the kernel has to say of how it will serve the call, as the end of a sentence; empty for nothing."""
    remark = getattr(kernel(operator, backend), "remark", None)
    if remark is None or call is None or call[0].numel() == 0:
        return ""
    with using(setting) if setting else contextlib.nullcontext():
        said = remark(*call)
    return f"; {said}" if said else ""


def _sizes(operator: str, backend: str, table: str, call: Sequence[Any]) -> str:
    """:attr:`Choice.sizes` of a call that the measured table ``table`` has, if it is one."""
    if call[0].numel() == 0 or not hasattr(kernel(operator, backend), "candidates"):
        return ""
    if table in _TUNED:
        return _TUNED[table]
    ask = getattr(backends.load(backend), "sizes", None)
    return "rule" if ask is None else str(ask(operator, call))


def _with(operator: str, backend: str, setting: Setting) -> Kernel:
    found = kernel(operator, backend)
    return cast(Kernel, WithSetting(found, setting) if setting else found)


class _Last(threading.local):
    call: tuple[Choice, int] | None = None


_last = _Last()


def record(choice: Choice, layout_copies: int) -> None:
    """Remember how this thread's latest operator call was served."""
    _last.call = (choice, layout_copies)


def last_call() -> tuple[Choice, int] | None:
    """How this thread's latest operator call was served: the choice, and how many inputs had to be copied to NHWC."""
    return _last.call
