"""One subject from start to end: build the contenders, check each against float64, let them take turns, make rows."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowkernels import backends
from lowkernels.costs import floor_seconds
from lowkernels.dispatch import AUTO
from lowkernels.testing.budget import Error, error_budget, measure_error

from . import rows as status
from .ceilings import Ceilings
from .rivals import Built, Contender, channels_last, ours_name
from .rows import Row, fill_ratios
from .subjects import Subject, module_channels_last
from .timing import Clock, Effort, own_waiting, summarize, take_turns


@dataclass(frozen=True)
class Session:
    """What all subjects of a run share.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        clock, effort: for timing.
        ceilings: by dtype.
        contenders: all that may take part.
        time_left: seconds until no further contender should be built.
        longest: seconds the slowest build so far took, by the contender's cost.
    """

    device: str
    clock: Clock
    effort: Effort
    ceilings: dict[torch.dtype, Ceilings]
    contenders: Sequence[Contender]
    time_left: Callable[[], float]
    longest: dict[str, float] = field(default_factory=dict)


class Truth:
    """The float64 outputs of a subject, and how far from them a contender may be."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        images = subject.checked(subject.inputs[0])
        with torch.no_grad():
            self.reference = subject.plain().double()(images.double()).cpu()
            # Eager PyTorch in the two layouts it knows: where they differ, the worse of them is still right.
            eager = [
                measure_error(subject.plain()(images), self.reference),
                measure_error(module_channels_last(subject.plain())(channels_last(images)), self.reference),
            ]
        worst = Error(max(e.frobenius for e in eager), max(e.maximum for e in eager))
        self.budget = error_budget(worst, self.reference, subject.dtype, subject.accumulation_length)

    def error(self, result: Tensor) -> Error:
        """Distance of a contender's whole output from the truth, on the images that are compared.

        Raises:
            AssertionError: the output has another shape.
        """
        batch = self._subject.batch
        assert result.shape[0] == batch, f"{result.shape[0]} outputs for {batch} images"
        return measure_error(self._subject.checked(result), self.reference)


@dataclass
class Entry:
    """A contender that takes part in the timing: how to name it and the calls to go round."""

    row: Row
    calls: Sequence[Callable[[], Any]]
    built: Built


def row_of(subject: Subject, contender: Contender) -> Row:
    kind, name, size, batch, dtype = subject.key
    return Row(kind, name, size, batch, dtype, contender.name, operator=subject.operator, ours=contender.ours)


def measure(subject: Subject, session: Session, left_out: dict[str, str] | None = None) -> list[Row]:
    """Measure every contender on one subject.

    Args:
        subject: what to compute.
        session: device, clock, effort, contenders.
        left_out: contenders not to build, by name, with the reason.

    Returns:
        A row for every contender, whatever became of it, ratios filled in.
    """
    truth = Truth(subject)
    found: list[Row] = []
    entries: list[Entry] = []
    with torch.no_grad():
        for contender in session.contenders:
            row = row_of(subject, contender)
            found.append(row)
            row.reason = contender.absent(subject)
            if row.reason is not None:
                row.status = status.ABSENT
                continue
            row.reason = (left_out or {}).get(contender.name) or _no_time(contender, session)
            if row.reason is not None:
                row.status = status.LEFT_OUT
                continue
            entries += _enter(subject, contender, row, truth, found)
            session.longest[contender.cost] = max(session.longest.get(contender.cost, 0.0), row.build_s or 0.0)
        _drop_doubles(entries)
        turns = take_turns({e.row.label: e.calls for e in entries}, session.clock, session.effort)
        own = own_waiting(turns)
        for entry in entries:
            entry.row.own_waiting = own[entry.row.label]
            _fill(entry.row, summarize(turns[entry.row.label]), subject, session.ceilings[subject.dtype])
            _count(entry, session.device)
    fill_ratios(found)
    entries.clear()
    _release()
    return found


# Seconds a contender of each kind may take to build, from experience on two cores that had nothing else to do.
_PATIENCE = {"light": 0.0, "export": 15.0, "compile": 45.0}


def _no_time(contender: Contender, session: Session) -> str | None:
    if contender.cost == "light":
        return None
    needed = max(_PATIENCE[contender.cost], 1.5 * session.longest.get(contender.cost, 0.0))
    return "no time left to build it" if session.time_left() < needed else None


def _enter(subject: Subject, contender: Contender, row: Row, truth: Truth, found: list[Row]) -> list[Entry]:
    """Build and check one contender; the entries it takes part with, and on a GPU a further row for its graph."""
    started = time.perf_counter()
    try:
        built = contender.build(subject)
        prepared = [built.prepare(x) for x in subject.inputs]
        output = built.result(built.run(prepared[0]))
        row.build_s = time.perf_counter() - started
        if not _check(row, output, truth):
            return []
    except Exception as error:
        _fail(row, error)
        return []
    row.served = None if built.served is None else built.served()
    row.modules = None if built.modules is None else built.modules()
    entries = [Entry(row, [_call(built.run, x) for x in prepared], built)]
    if subject.device == "cuda" and built.graph:
        graph_row = row_of(subject, contender)
        graph_row.graph, graph_row.served = True, row.served
        found.append(graph_row)
        try:
            calls, output = capture(built.run, prepared)
            if _check(graph_row, output, truth):
                entries.append(Entry(graph_row, calls, built))
        except Exception as error:
            _fail(graph_row, error)
    return entries


def _call(run: Callable[[Any], Any], x: Any) -> Callable[[], Any]:
    return lambda: run(x)


def _fail(row: Row, error: Exception) -> None:
    lines = str(error).strip().splitlines()
    row.status, row.reason = status.FAILED, f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]


def _check(row: Row, output: Tensor, truth: Truth) -> bool:
    error = truth.error(output)
    row.error = {**asdict(error), **{f"{k}_budget": v for k, v in asdict(truth.budget).items()}}
    if error.within(truth.budget):
        return True
    row.status = status.WRONG
    row.reason = (
        f"error {error.frobenius:.2g} (relative), {error.maximum:.2g} (largest); "
        f"allowed {truth.budget.frobenius:.2g}, {truth.budget.maximum:.2g}"
    )
    return False


def capture(run: Callable[[Any], Any], inputs: Sequence[Any]) -> tuple[list[Callable[[], Any]], Tensor]:
    """Capture one CUDA graph for each input.

    Returns:
        The replays, and what the first one computed.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run(inputs[0])
    torch.cuda.current_stream().wait_stream(stream)
    graphs, outputs = [], []
    # They are replayed one after another, so they may share memory for everything but their outputs.
    pool = torch.cuda.graph_pool_handle()
    for x in inputs:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            outputs.append(run(x))
        graphs.append(graph)
    graphs[0].replay()
    torch.cuda.synchronize()
    return [graph.replay for graph in graphs], outputs[0].clone()


def _drop_doubles(entries: list[Entry]) -> None:
    """A backend asked for by name that does just what ``auto`` does is not measured twice."""
    auto = {e.row.graph: e.row for e in entries if e.row.contender == ours_name(AUTO)}
    named = [ours_name(backend) for backend in backends.PRIORITY]
    for entry in list(entries):
        row, twin = entry.row, auto.get(entry.row.graph)
        if row.contender in named and twin is not None and row.served == twin.served:
            row.status, row.reason = status.LEFT_OUT, "the same as auto"
            entries.remove(entry)


def _fill(row: Row, timing: Any, subject: Subject, ceilings: Ceilings) -> None:
    seconds = timing.median
    row.ms, row.ms_low, row.ms_high = (1e3 * s for s in (seconds, timing.low, timing.high))
    row.turns, row.dropped, row.disturbed = timing.turns, timing.dropped, timing.disturbed
    row.images_per_s = subject.batch / seconds
    row.tflops, row.gb_per_s = subject.flops / seconds / 1e12, subject.bytes / seconds / 1e9
    if ceilings.disturbed:
        return
    row.share_of_product = subject.flops / seconds / ceilings.flops_per_s
    row.share_of_copy = subject.bytes / seconds / ceilings.bytes_per_s
    floor = floor_seconds(subject.blocks, ceilings.flops_per_s, ceilings.bytes_per_s)
    row.floor_ms, row.share_of_floor = 1e3 * floor, floor / seconds


def _count(entry: Entry, device: str) -> None:
    """Memory and launches of one call, after the clock has stopped."""
    row, call = entry.row, entry.calls[0]
    if device == "cuda":
        row.launches = _kernels(call)
        if not row.graph:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            call()
            torch.cuda.synchronize()
            row.peak_memory_mb = (torch.cuda.max_memory_allocated() - before) / 1e6
    elif entry.built.pytorch:
        row.peak_memory_mb = _resident_growth_mb(call)
        if row.contender.startswith(("eager", "timm")) or row.ours:
            with _Operators() as operators:
                call()
            row.launches = operators.count


def _kernels(call: Callable[[], Any]) -> int:
    activity = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[activity]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(str(event.device_type) == "DeviceType.CUDA" for event in profile.events())


class _Operators(TorchDispatchMode):
    """Counts operators that compute: views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def _resident_growth_mb(call: Callable[[], Any]) -> float | None:
    """Growth of the resident memory during a call, at its peak; None where the system cannot say.

    Freed memory is handed back to the system first, or the call would find pages it need not ask for.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = _status_kb("VmRSS")
        call()
        return max(0, _status_kb("VmHWM") - before) * 1024 / 1e6
    except (OSError, AttributeError):
        return None


def _status_kb(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name + ":"))


def _release() -> None:
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
