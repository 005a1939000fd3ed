"""Results files: JSON lines, one fact a line.

The first line of a file has ``kind`` ``"run"`` and says where the numbers below it come from, until the next such line: a run
that differs from the one before it in command, commit, versions or machine adds its own. ``"ceiling"`` lines are the device's
measured rates; ``"op"`` and ``"model"`` lines one contender on one subject each (:class:`Row`). A ``"run"`` line with an
``experiment`` begins rows of that experiment, which are kept apart from all others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

OK, WRONG, FAILED, ABSENT, LEFT_OUT = "ok", "wrong", "failed", "absent", "left out"
STATUSES = (OK, WRONG, FAILED, ABSENT, LEFT_OUT)
SHORT_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}


@dataclass
class Row:
    """One contender on one subject.

    Attributes:
        kind, subject, size, batch, dtype: of the subject; rows that agree in these were measured together.
        operator: of an operator subject.
        point: where in an experiment the subject stands.
        contender: its name; ``graph`` tells whether it was replayed from a CUDA graph.
        ours: it is this library.
        status: ``"ok"``; ``"wrong"``: outside its error budget, so that it has no times; ``"failed"``: it raised; ``"absent"``: it
            cannot run here; ``"left out"``: it could, but was not measured.
        reason: for all but ``"ok"``, in words.
        error: distance from float64: ``frobenius`` (relative), ``maximum`` (absolute), and the two budgets.
        ms: median time of a batch in milliseconds; ``ms_low`` and ``ms_high`` are the quartiles.
        images_per_s: images in a second at that median.
        to_eager: time of eager PyTorch divided by this one.
        to_fastest_rival: time of the fastest contender that is not ours, named in ``fastest_rival``, divided by this one.
        tflops, gb_per_s: least operations and least bytes of the block-fused computation, over the time.
        share_of_product, share_of_copy: of the ceilings measured in the same run.
        share_of_floor: the block-fused floor at those ceilings, ``floor_ms``, divided by the time.
        peak_memory_mb: most memory a call took beyond what was there before it, in 1e6 bytes.
        launches: kernels launched by one call (CUDA), or operators dispatched (CPU).
        served: how often each backend of this library served in one forward pass.
        modules: of a model of ours, what :func:`lowkernels.report` says after that forward pass: a dict for every different
            outcome, with the ``names`` of its modules, their ``kind``, whether they were ``replaced``, the backend they ``ran_on``,
            the ``reason``.
        turns, dropped, disturbed: turns that count, turns dropped as disturbed, and whether too few were left, so that the
            disturbed ones count too.
        own_waiting: share of a turn that the contender's own threads keep each other waiting, which is no disturbance.
        build_s: seconds to build the contender, compilation and export included.
    """

    kind: str
    subject: str
    size: int
    batch: int
    dtype: str
    contender: str
    operator: str | None = None
    point: dict[str, Any] | None = None
    ours: bool = False
    graph: bool = False
    status: str = OK
    reason: str | None = None
    error: dict[str, float] | None = None
    ms: float | None = None
    ms_low: float | None = None
    ms_high: float | None = None
    images_per_s: float | None = None
    to_eager: float | None = None
    to_fastest_rival: float | None = None
    fastest_rival: str | None = None
    tflops: float | None = None
    gb_per_s: float | None = None
    share_of_product: float | None = None
    share_of_copy: float | None = None
    share_of_floor: float | None = None
    floor_ms: float | None = None
    peak_memory_mb: float | None = None
    launches: int | None = None
    served: dict[str, int] | None = None
    modules: list[dict[str, Any]] | None = None
    turns: int = 0
    dropped: int = 0
    disturbed: bool = False
    own_waiting: float | None = None
    build_s: float | None = None

    @property
    def group(self) -> tuple[str, str, int, int, str]:
        """What rows measured together share."""
        return (self.kind, self.subject, self.size, self.batch, self.dtype)

    @property
    def label(self) -> str:
        """The contender as tables name it."""
        return self.contender + (", CUDA graph" if self.graph else "")


def fill_ratios(rows: Sequence[Row]) -> None:
    """Set the ratios of rows measured together: to eager PyTorch and to the fastest rival, from medians.

    The fastest rival is the fastest row that is right and not ours, captured graphs included. There is no ratio to or from a
    time that was disturbed.
    """
    timed = [r for r in rows if r.status == OK and r.ms is not None]
    eager = next((r for r in timed if r.contender == "eager" and not r.graph), None)
    fastest = min((r for r in timed if not r.ours), key=lambda r: r.ms or 0.0, default=None)
    for row in timed:
        row.to_eager, row.to_fastest_rival = _ratio(eager, row), _ratio(fastest, row)
        row.fastest_rival = None if row.to_fastest_rival is None or fastest is None else fastest.label


def _ratio(other: Row | None, row: Row) -> float | None:
    if other is None or other.ms is None or row.ms is None or other.disturbed or row.disturbed:
        return None
    return other.ms / row.ms


@dataclass
class Results:
    """Results files of one device in memory.

    Attributes:
        runs: where the numbers come from: one fact for every command, commit, set of versions and machine.
        ceilings: measured rates of the device.
        rows: one contender on one subject each.
        other: facts of all other kinds.
        experiments: the same of each experiment, by its name.
    """

    runs: list[dict[str, Any]] = field(default_factory=list)
    ceilings: list[dict[str, Any]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    other: list[dict[str, Any]] = field(default_factory=list)
    experiments: dict[str, Results] = field(default_factory=dict)

    @property
    def run(self) -> dict[str, Any]:
        """Where the first numbers come from; empty if the files do not say."""
        return self.runs[0] if self.runs else {}

    @property
    def device(self) -> str:
        """``"gpu"`` or ``"cpu"``."""
        return "gpu" if self.run.get("device") == "cuda" else "cpu"

    def groups(self) -> dict[tuple[str, str, int, int, str], list[Row]]:
        """Rows by what was measured together, in the order of the file.

        A subject measured again, with more contenders for instance, replaces what was measured before: ratios hold only within
        one measurement.
        """
        found: dict[tuple[str, str, int, int, str], list[Row]] = {}
        for row in self.rows:
            rows = found.setdefault(row.group, [])
            if any(r.label == row.label for r in rows):
                rows.clear()
            rows.append(row)
        return found


def slug(text: str) -> str:
    """``text`` as part of a file name."""
    text = re.sub(r"\((r|tm)\)|processor|nvidia|geforce|\b\d+-core\b", " ", text.lower())
    return re.sub(r"[^a-z0-9]+", "_", text).strip("_")


def device_slug(run: dict[str, Any]) -> str:
    """The device as folders and files are named after it; a CPU with the number of threads."""
    return slug(run["device_name"]) + (f"_{run['threads']}t" if run["device"] == "cpu" else "")


def file_name(suite: str, dtypes: Iterable[str], run: dict[str, Any]) -> str:
    """The name of a results file: suite, precision, layout, versions and device, as timm's results files have them."""
    precision = "+".join(SHORT_DTYPES.get(d, d) for d in dtypes)
    torch_version = "pt" + "".join(run["versions"]["torch"].split("+")[0].split(".")[:2])
    platform = f"cu{str(run['cuda']).replace('.', '')}" if run.get("cuda") else "cpu"
    return "-".join(["benchmark", suite, precision, "nhwc", torch_version, platform, device_slug(run)]) + ".jsonl"


def same_origin(run: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two runs differ in nothing but when they were and what else the machine did then."""
    changing = ("date", "load_average")
    return {k: v for k, v in run.items() if k not in changing} == {k: v for k, v in other.items() if k not in changing}


class Writer:
    """Appends to one results file; what has been written is on disk."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("a")

    def write(self, *facts: dict[str, Any] | Row) -> None:
        for fact in facts:
            self._file.write(json.dumps(_plain(fact), ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _plain(fact: dict[str, Any] | Row) -> dict[str, Any]:
    if isinstance(fact, Row):
        found = {k: v for k, v in asdict(fact).items() if v is not None}
        return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in found.items()}
    return fact


def read(*paths: Path) -> Results:
    """Read results files of one device into one.

    Raises:
        ValueError: a line is no fact of a results file.
    """
    results = Results()
    known = {f.name for f in fields(Row)}
    for path in paths:
        into = results
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                fact = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
            kind = fact.get("kind") if isinstance(fact, dict) else None
            if kind == "run":
                name = fact.get("experiment")
                into = results if name is None else results.experiments.setdefault(name, Results())
                if not any(same_origin(fact, run) for run in into.runs):
                    into.runs.append(fact)
            elif kind == "ceiling":
                into.ceilings.append(fact)
            elif kind in ("op", "model"):
                unknown = set(fact) - known
                if unknown or fact.get("status") not in STATUSES:
                    raise ValueError(f"{path}, line {number}: unknown fields {sorted(unknown)} or status {fact.get('status')!r}")
                into.rows.append(Row(**fact))
            elif isinstance(kind, str):
                into.other.append(fact)
            else:
                raise ValueError(f"{path}, line {number}: has no kind")
    return results
