"""The errors this library raises. Each message names the operator or module, the argument, what came and what is allowed."""

from __future__ import annotations


class LowkernelsError(Exception):
    """Base class of every error raised on purpose by this library."""


class InputError(LowkernelsError, ValueError):
    """A call's arguments are outside the operator's contract; raised before any kernel starts."""


class BackendError(LowkernelsError, RuntimeError):
    """A backend asked for by name is unknown, not usable on this machine, or cannot serve this call."""


class FrozenError(LowkernelsError, RuntimeError):
    """The module's original weights were dropped by :func:`lowkernels.freeze` and the request needs them."""
