"""Measuring backends and their settings on the machine at hand, for the tables that ``auto`` chooses by. Never done at run time.

Every contender (a backend, with the settings its kernel chooses or with one of its candidates) is first held to the error budget on
the very call that is timed, then they take turns; the least of a contender's turns counts, which is what undisturbed calls take.
On a GPU a turn is a CUDA graph of a few calls between two events, on the CPU a few calls between two readings of the clock. Weights
are packed beforehand.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from .. import backends, costs, dispatch
from ..errors import BackendError, InputError
from ..ops import OPERATORS
from ..testing.budget import assert_within_budget, to_float64
from . import measured, settings
from .measured import Described, Machine, Row
from .settings import Setting

# A call's contenders are measured for this long unless told otherwise.
CALL_S = 3.0
# What one backend may take of a sweep that has no other end.
SWEEP_S = 0.4
_TURN_S = 2e-3
_TURNS = (3, 25)
# A setting other than the kernel's own has to be faster by this much to be kept, and a contender slower than the best by this much
# after its first turns gets no others.
_WORTH, _HOPELESS = 1.02, 2.0
# Images whose output is compared with float64: as many from either end of the batch.
_CHECKED = 2

Call = tuple[str, tuple[Any, ...]]


@dataclass
class Contender:
    """A backend with a setting, on one call.

    Attributes:
        backend: its name.
        setting: empty for what the kernel chooses itself.
        problem: why it is not measured; empty if it is.
        seconds: of one call; None if it was not measured.
    """

    backend: str
    setting: Setting
    problem: str = ""
    seconds: float | None = None


def contenders(operator: str, args: tuple[Any, ...], names: Iterable[str]) -> Iterator[tuple[Contender, Callable[[], Tensor]]]:
    """Every backend of ``names`` with every setting it offers for a call, and what runs it."""
    op = OPERATORS[operator]
    for name in names:
        try:
            op.explain(*args, backend=name)
            kernel = dispatch.kernel(operator, name)
            packed = op.pack(*op.weights(args), backend=name).tensors
        except BackendError as error:
            yield Contender(name, {}, str(error)), _never
            continue
        candidates: list[dict[str, int]] = getattr(kernel, "candidates", lambda *_: [])(*args)
        for setting in ({}, *candidates):
            yield Contender(name, setting), _runner(kernel, args, packed, setting)


def _never() -> Tensor:
    raise AssertionError("a contender with a problem does not run")


def _runner(kernel: Any, args: tuple[Any, ...], packed: list[Tensor], setting: Setting) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with settings.using(setting), torch.no_grad():
            out: Tensor = kernel.forward(*args, packed)
        return out

    return run


def measure(operator: str, args: tuple[Any, ...], names: Iterable[str], seconds: float = CALL_S) -> list[Contender]:
    """Check and time every contender of a call.

    Args:
        operator: its name.
        args: its arguments without the dispatch ones, all of them, on the device to measure; x is channels_last.
        names: of backends.
        seconds: about how long the timing may take; the check and compilation are not counted.
    """
    found: list[Contender] = []
    able: list[tuple[Contender, Callable[[], Tensor]]] = []
    truth = None
    for contender, run in contenders(operator, args, names):
        found.append(contender)
        if contender.problem:
            continue
        try:
            truth = truth or _Truth(operator, args)
            truth.check(run(), f"{operator} on {contender.backend} {dict(contender.setting) or ''}")
            able.append((contender, run))
        except Exception as error:  # whatever a compiler, a driver or a wrong result may raise
            contender.problem = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    _race(able, args[0].device, seconds)
    return found


class _Truth:
    """The float64 outcome of a call's outermost images, and eager PyTorch's in the call's dtype."""

    def __init__(self, operator: str, args: tuple[Any, ...]) -> None:
        op = OPERATORS[operator]
        batch = args[0].shape[0]
        ends = sorted({*range(min(_CHECKED, batch)), *range(max(0, batch - _CHECKED), batch)})
        self._images = torch.tensor(ends, device=args[0].device)
        weights = {id(w) for w in op.weights(args)}
        call = [self._some(a) if isinstance(a, Tensor) and id(a) not in weights else a for a in args]
        with torch.no_grad():
            self._eager = op.overload(*call, None, None, "eager")
            self._reference = op.overload(*map(to_float64, call), None, None, "eager")
        self._length = op.accumulation_length(*args)

    def _some(self, data: Tensor) -> Tensor:
        rows = data.index_select(0, self._images)
        return rows.contiguous(memory_format=torch.channels_last) if rows.dim() == 4 else rows

    def check(self, result: Tensor, what: str) -> None:
        assert_within_budget(self._some(result), self._eager, self._reference, self._length, what)


def _race(able: Sequence[tuple[Contender, Callable[[], Tensor]]], device: torch.device, seconds: float) -> None:
    ends = time.perf_counter() + seconds
    running = [(contender, _clock(run, device)) for contender, run in able]
    for turn in range(_TURNS[1]):
        if turn >= _TURNS[0] and time.perf_counter() > ends:
            break
        # Every other round backwards, so that nobody always follows the same one.
        for contender, clock in running if turn % 2 else reversed(running):
            taken = clock()
            contender.seconds = min(taken, contender.seconds or taken)
        if turn + 1 == _TURNS[0]:
            best = min((c.seconds or 0.0 for c, _ in running), default=0.0)
            running = [(c, clock) for c, clock in running if (c.seconds or 0.0) <= _HOPELESS * best]


def _clock(run: Callable[[], Tensor], device: torch.device) -> Callable[[], float]:
    """What takes one turn and returns the seconds of one call."""
    if device.type == "cuda":
        return _cuda_clock(run, device)

    def once(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls

    calls = max(1, min(1000, int(_TURN_S / max(min(once(1) for _ in range(3)), 1e-7))))
    return lambda: once(calls)


def _cuda_clock(run: Callable[[], Tensor], device: torch.device) -> Callable[[], float]:
    def timed(work: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(device):
            begin.record()
            work()
            end.record()
            end.synchronize()
        return 1e-3 * float(begin.elapsed_time(end))

    timed(run)
    calls = max(1, min(100, int(_TURN_S / max(timed(run), 1e-7))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        # As the capture of a model does: nothing may be done for the first time inside one.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            for _ in range(calls):
                run()
        graph.replay()
    return lambda: timed(graph.replay) / calls


def provenance() -> str:
    """When, and with which versions."""
    words = [datetime.datetime.now(datetime.timezone.utc).date().isoformat(), f"torch {torch.__version__}"]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        words.append(f"triton {importlib.metadata.version('triton')}")
    return ", ".join(words)


def row_of(described: Described, found: Iterable[Contender], when: str) -> Row | None:
    """What a table says about a call; None if nothing could be measured."""
    best: dict[str, Contender] = {}
    for contender in found:
        if contender.seconds is None:
            continue
        before = best.get(contender.backend)
        if before is None or before.seconds is None or contender.seconds * (1.0 if before.setting else _WORTH) < before.seconds:
            best[contender.backend] = contender
    if not best:
        return None
    us = {name: float(f"{1e6 * c.seconds:.4g}") for name, c in best.items() if c.seconds is not None}
    return Row(*described, us, {name: dict(c.setting) for name, c in best.items() if c.setting}, when)


def facts(backend: str, operator: str, args: tuple[Any, ...], seconds: float) -> Iterator[dict[str, Any]]:
    """Measure one backend on one call, with every setting worth trying, for about ``seconds``.

    Yields:
        ``config`` (the setting; empty for the kernel's own choice), ``ms`` or the ``reason`` there is none, and what
        :func:`rows_of_facts` needs to make a table of them.
    """
    described = measured.describe(operator, args)
    machine = measured.machine(args[0].device)
    assert described is not None, args[0].shape
    assert machine is not None, args[0].device
    about = {**machine._asdict(), "operator": operator, "call": described.call, "arithmetic": described.dtype}
    about |= {"shape": list(described.shape), "measured": provenance()}
    for contender in measure(operator, args, [backend], min(seconds, SWEEP_S)):
        outcome = {"reason": contender.problem} if contender.seconds is None else {"ms": 1e3 * contender.seconds}
        yield {"config": dict(contender.setting), **outcome, **about}


def rows_of_facts(lines: Iterable[str]) -> dict[Machine, list[Row]]:
    """Tables of the ``tuning`` lines of results files of ``python -m benchmarks``, by machine."""
    calls: dict[tuple[Machine, Described], tuple[str, list[Contender]]] = {}
    for line in lines:
        fact = json.loads(line)
        if fact.get("kind") != "tuning" or "ms" not in fact or "call" not in fact:
            continue
        of = Machine(fact["device"], fact["arch"])
        described = Described(fact["operator"], fact["call"], fact["arithmetic"], tuple(fact["shape"]))
        _, found = calls.setdefault((of, described), (fact["measured"], []))
        found.append(Contender(fact["backend"], fact["config"], seconds=1e-3 * fact["ms"]))
    tables: dict[Machine, list[Row]] = {}
    for (of, described), (when, found) in calls.items():
        row = row_of(described, found, when)
        tables.setdefault(of, []).extend([] if row is None else [row])
    return tables


def tune(calls: Sequence[Call], device: torch.device, seconds: float, say: Callable[[str], None]) -> list[Row]:
    """Measure every backend on each call.

    Args:
        calls: as :func:`calls_of` gives them; the first are measured first, but after those that the user's table does not have.
        device: to measure on.
        seconds: for all of them; those for which no time is left are not measured.
        say: gets a line about each.
    """
    names = [name for name in backends.PRIORITY if device.type in backends.load(name).DEVICES]
    # Building kernels and checking operators, which every process does once, is not part of the measurement.
    for operator, shapes in {operator: (operator, shapes) for operator, shapes in calls}.values():
        for _ in contenders(operator, with_data(operator, shapes, device), names):
            pass
    known = measured.known(device)
    calls = sorted(calls, key=lambda call: measured.describe(*call) in known)
    ends = time.perf_counter() + seconds
    rows = []
    for number, (operator, shapes) in enumerate(calls):
        left = ends - time.perf_counter()
        if left <= 0:
            say(f"no time left for {len(calls) - number} of {len(calls)} calls")
            break
        args = with_data(operator, shapes, device)
        described = measured.describe(operator, args)
        assert described is not None, shapes
        found = measure(operator, args, names, min(CALL_S, left / (len(calls) - number)))
        row = row_of(described, found, provenance())
        rows += [] if row is None else [row]
        say(_line(described, args, found, row))
    return rows


def _line(described: Described, args: tuple[Any, ...], found: Sequence[Contender], row: Row | None) -> str:
    images, height, width = described.shape
    times = [] if row is None else sorted(row.us.items(), key=lambda item: item[1])
    words = [f"{name} {us:.4g} us{_shown(row.settings.get(name, {}) if row else {})}" for name, us in times]
    words += [f"{c.backend}{_shown(c.setting)}: {c.problem}" for c in found if c.problem]
    return f"{described.operator} {images}x{args[0].shape[1]}x{height}x{width} {described.dtype}: {', '.join(words)}"


def _shown(setting: Setting) -> str:
    return f" ({', '.join(f'{k} {v}' for k, v in setting.items())})" if setting else ""


def with_data(operator: str, args: tuple[Any, ...], device: torch.device) -> tuple[Any, ...]:
    """``args`` with random tensors on ``device`` in place of its own, values of a size around one through a block; always the same
    ones on a device."""
    generator = torch.Generator(device).manual_seed(0)
    op = OPERATORS[operator]
    weights = {id(w) for w in op.weights(args)}

    def filled(name: str, like: Any) -> Any:
        if not isinstance(like, Tensor):
            return like
        value = torch.randn(tuple(like.shape), generator=generator, device=device)
        if id(like) in weights:
            value = value / like[0].numel() ** 0.5 if like.dim() > 1 else 0.1 * value + float(name == "norm_weight")
        value = value.to(like.dtype)
        return value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value

    return tuple(filled(name, value) for name, value in zip(op.argument_names, args, strict=True))


def calls_of(
    models: Sequence[str],
    sizes: Sequence[int],
    batches: Sequence[int],
    dtypes: Sequence[torch.dtype],
    operators: Sequence[str] = (),
) -> list[Call]:
    """The distinct calls that LowFormers make, on tensors without data; those that cost most in a model first.

    Args:
        models: names as ``lowformer.list_models()`` gives them.
        sizes: height and width of the images.
        batches: numbers of images.
        dtypes: of weights and images.
        operators: only calls of these; of all if empty.

    Raises:
        InputError: none of the models makes such a call.
    """
    import lowformer

    cost: dict[Described, float] = {}
    calls: dict[Described, Call] = {}
    for model, dtype in itertools.product(models, dtypes):
        try:
            with torch.device("meta"):
                network = lowformer.create_model(model).eval().to(dtype)
        except ValueError as error:
            raise InputError(f"lowkernels.choosing.tuning: {error}") from error
        with FakeTensorMode(allow_non_fake_inputs=True):
            network.to_empty(device="cpu")
        for batch, size in itertools.product(batches, sizes):
            for block in costs.record(network, (batch, 3, size, size), dtype):
                described = measured.describe(block.operator, block.args) if block.operator in OPERATORS else None
                if described is not None and (not operators or block.operator in operators):
                    cost[described] = cost.get(described, 0.0) + block.cost.fused.flops / batch
                    calls[described] = block.operator, block.args
    if not calls:
        raise InputError(f"lowkernels.choosing.tuning: none of {', '.join(models)} calls {' or '.join(operators) or 'an operator'}")
    return [calls[described] for described in sorted(calls, key=lambda key: -cost[key])]
