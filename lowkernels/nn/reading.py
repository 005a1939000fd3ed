"""Whether a model's code would do the same again: it is read while it runs once.

What runs as one call is not run by the model's own code any more, which must therefore have no effect but its result, and depend on
nothing that could change unnoticed. Where that cannot be seen, the answer is no.
"""

from __future__ import annotations

import dis
import inspect
import re
import sys
from collections.abc import Container, Iterable
from types import BuiltinFunctionType, FrameType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn


def expect(condition: bool, problem: str = "another form of the function") -> None:
    """
    Raises:
        TypeError: ``condition`` does not hold.
    """
    if not condition:
        raise TypeError(problem)


# What code may ask Python itself, which has no effect and depends on what it is given alone.
_ASKING = (callable, getattr, hasattr, isinstance, issubclass, iter, len, next)
_READS_OF_DICT = ("get", "items", "keys", "values")
_WRITES = re.compile("(STORE|DELETE)_(ATTR|GLOBAL|SUBSCR|DEREF|NAME|SLICE)|IMPORT_.*")
# Values that cannot change while they are the same object, or are followed otherwise.
_FIXED = (
    bool,
    int,
    float,
    str,
    type(None),
    type,
    torch.dtype,
    torch.device,
    ModuleType,
    FunctionType,
    BuiltinFunctionType,
    nn.Module,
    Tensor,
)


def _is_fixed(value: object) -> bool:
    return all(map(_is_fixed, value)) if isinstance(value, tuple) else isinstance(value, _FIXED)


class Reading:
    """Reads the code that runs within, but PyTorch's and this library's: whether it would do the same again.

    It writes nothing but its own variables, and reads no more than its arguments, and attributes that cannot change unnoticed. What
    does not is refused before it runs, by a TypeError.

    Args:
        plain: functions in C that may be called as well.
    """

    def __init__(self, plain: Container[Any] = ()) -> None:
        self._plain = plain
        self._names: set[str] = set()
        self._problem = ""

    def __enter__(self) -> Reading:
        expect(sys.getprofile() is None, "somebody is profiling")
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, argument: Any) -> None:
        if event not in ("call", "c_call") or self._problem or is_trusted(frame.f_globals.get("__name__", "")):
            return
        self._problem = self._problem_of_call(argument) if event == "c_call" else _problem_of_code(frame)
        self._names.update(frame.f_code.co_names)
        # Before it runs: it may write to what the model shares with others.
        expect(not self._problem, self._problem)

    def _problem_of_call(self, function: Any) -> str:
        if function in _ASKING or function in self._plain or is_trusted(getattr(function, "__module__", None) or ""):
            return ""
        reads_dict = isinstance(getattr(function, "__self__", None), dict) and function.__name__ in _READS_OF_DICT
        return "" if reads_dict else f"calls {function}"

    def check(self, modules: Iterable[nn.Module]) -> None:
        """Look at what the code has read of ``modules``, all those whose code may have run.

        Raises:
            TypeError: it might do something else another time.
        """
        expect(not self._problem, self._problem)
        for module in modules:
            for name in self._names & set(dir(type(module))) - set(module.__dict__) - set(dir(nn.Module)):
                value = inspect.getattr_static(type(module), name)
                descriptor = hasattr(type(value), "__get__")
                expect(descriptor or is_trusted(type(module).__module__), f"reads {name}, an attribute of a class")
            for name in self._names & set(module.__dict__) - set(nn.Module().__dict__):
                expect(_is_fixed(module.__dict__[name]), f"reads {name}, which may change without notice")


def _problem_of_code(frame: FrameType) -> str:
    for instruction in dis.get_instructions(frame.f_code):
        name = instruction.argval
        if _WRITES.fullmatch(instruction.opname):
            return f"writes {name}"
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME") and name in frame.f_globals:
            value = frame.f_globals[name]
            if not callable(value) and not isinstance(value, ModuleType):
                return f"reads the global {name}"
    return ""


def is_trusted(module: str) -> bool:
    """Whether code of that module is known not to change, and to have no effects that matter."""
    return module.partition(".")[0] in ("torch", "lowkernels", "contextlib")
