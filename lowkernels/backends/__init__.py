"""The backends, one file each, or one folder where its operators share more: building, packing, configurations.

``native`` is no backend: it has what those made of C++ share.

A backend module defines

- ``NAME``: what users pass as ``backend=``;
- ``KERNEL``: the file name (without ``.py``) that serves it inside each operator's folder;
- ``DEVICES``: the device types whose tensors it serves; ``auto`` does not ask it about others;
- ``SELF_CHECK``, optional: whether each operator must pass :mod:`lowkernels.selfcheck` on a device before it is used there;
- ``unavailable(device_type)``: why the backend cannot be used for tensors of that device type on this machine, or None. It must be
  cheap after its first call and must not start a GPU, a compiler or the network;
- ``chain(calls, inputs)`` and ``watch(tensors, versions, pointers, next_read)``, optional: one function for several calls that take
  each other's outputs, and one that says whether weights are as they were; see :mod:`lowkernels.nn.row`;
- ``sizes(operator, call)``, optional: where the sizes that its kernel chooses for a call by itself are from, for
  :attr:`lowkernels.Choice.sizes`; ``"rule"`` without it;
- ``describe()``: one line about its versions and state for ``lowkernels info``.

To add a backend: add its module here, its name to ``PRIORITY``, and a file named ``KERNEL`` to the operators it serves.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

# Whether Triton interprets kernels on the CPU instead of compiling them; like Triton itself, we look once.
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")

# ``auto`` takes the first backend that can serve a call. Eager serves everything, so what comes after it has to be asked for by
# name: the interpreter is for tests, exact and very slow.
PRIORITY: tuple[str, ...] = ("cuda", "cpu", "eager", "triton") if INTERPRETING else ("cuda", "triton", "cpu", "eager")


@functools.cache
def load(name: str) -> ModuleType:
    """The module of backend ``name``, which must be in :data:`PRIORITY`."""
    return importlib.import_module(f"{__name__}.{name}")
