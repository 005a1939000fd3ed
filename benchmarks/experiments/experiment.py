"""What an experiment is, and the parts that several of them are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from .. import plans, render, rows, runner
from ..measure import Session
from ..plans import Item
from ..rivals import EAGER, Contender, contenders, ours_name
from ..rows import Results, Row
from ..timing import SMOKE, Effort

FULL, QUICK, TINY = "full", "quick", "smoke"
FOLDED, TORCHSCRIPT, AUTO = "eager, BatchNorm folded, channels_last", "TorchScript, optimize_for_inference", ours_name("auto")
LIGHT = (EAGER, FOLDED, TORCHSCRIPT, AUTO)
"""What takes no time to build: plain PyTorch as it comes and as a careful user has it, the papers' recipe, and this library."""
SHORT = {EAGER: "eager", FOLDED: "eager, folded", TORCHSCRIPT: "TorchScript", AUTO: "lowkernels"}


class Measure(Protocol):
    """Measures items and adds their rows to a results file."""

    def __call__(self, items: Sequence[Item], session: Session, path: Path, *, small: bool, say: Callable[[str], None]) -> None: ...


BRIEFLY = Effort(turn_s=0.02, rounds=7, max_s=5.0)


@dataclass(frozen=True)
class Experiment:
    """One experiment.

    Attributes:
        name: on the command line, in file names and in rows.
        title: as a heading.
        question: what it asks, and how it is answered.
        source: where it comes from.
        items: its subjects, for a device (``"cpu"`` or ``"cuda"``) and a scale: all (``"full"``), what a CPU does in two minutes
            (``"quick"``), or a smoke test (``"smoke"``).
        table: Markdown, from its results.
        contenders: who takes part, by name.
        quick: effort on one subject of a quick run.
        measure: how its items are measured.
        seen_by: what disturbances are seen by, where that is not the clock's own way.
    """

    name: str
    title: str
    question: str
    source: str
    items: Callable[[str, str], Sequence[Item]]
    table: Callable[[Results], str]
    contenders: tuple[str, ...] = LIGHT
    quick: Effort = BRIEFLY
    measure: Measure = runner.run_items
    seen_by: str | None = None

    def command(self, device: str, scale: str = FULL) -> str:
        """The command line that measures it."""
        quick = " --quick" if scale == QUICK else ""
        return f"python -m benchmarks experiment {self.name} --device {device}{quick} --out DIR"

    def report(self, results: Results) -> str:
        """Its table, what is not in it, and where the numbers come from."""
        parts = [self.table(results)] if any(r.ms is not None for r in results.rows) else ["No contender could be timed."]
        reasons = {f"{r.label}: {r.reason}": None for r in results.rows if r.status in (rows.WRONG, rows.FAILED)}
        parts += ["Not timed, because wrong or failed: " + "; ".join(reasons) + "."] if reasons else []
        missing = render.unmeasured(results)
        return "\n\n".join([*parts, *(["Not measured:\n\n" + missing] if missing else []), render.provenance(results)])

    def run(self, device: str, out: Path, scale: str, seconds: float | None, say: Callable[[str], None]) -> Path:
        """Measure it.

        Args:
            device: ``"cpu"`` or ``"cuda"``.
            out: folder for the results file.
            scale: of its items.
            seconds: time limit; what does not fit is named in the results.
            say: progress.

        Returns:
            The results file.
        """
        effort = {FULL: Effort(), QUICK: self.quick, TINY: SMOKE}[scale]
        items = self.items(device, scale)
        session = replace(runner.session_for(device, effort, runner.deadline(seconds)), contenders=named(self.contenders))
        suite = f"experiment_{self.name}"
        path = runner.results_file(out, suite, plans.dtypes_of(items), session, experiment=self.name, seen_by=self.seen_by)
        self.measure(items, session, path, small=scale == TINY, say=say)
        runner.finish(path)
        return path


def named(names: Iterable[str]) -> tuple[Contender, ...]:
    """Contenders by name. TorchScript, which elsewhere is a rival on CPUs only, runs everywhere, as it does in the papers."""
    wanted = list(names)
    return tuple(replace(c, absent=_float32_only) if c.name == TORCHSCRIPT else c for c in contenders() if c.name in wanted)


def _float32_only(subject: object) -> str | None:
    return None if getattr(subject, "dtype", None) == torch.float32 else "the recipe is for float32"


def best(group: Sequence[Row], contender: str) -> Row | None:
    """The faster row of a contender, called from Python or replayed from a CUDA graph; None if it has no time."""
    return min((r for r in group if r.contender == contender and r.ms is not None), key=lambda r: r.ms or 0.0, default=None)


def time(row: Row | None) -> str:
    """A cell with a time in ms."""
    return "–" if row is None else render.spread(row) + (" (graph)" if row.graph else "")


def over(slower: Row | None, faster: Row | None) -> str:
    """A cell with a ratio of two times; none to or from a disturbed one."""
    if slower is None or faster is None or slower.ms is None or faster.ms is None or slower.disturbed or faster.disturbed:
        return "–"
    return render.ratio(slower.ms / faster.ms)


def taking_part(results: Results, among: Sequence[str] = LIGHT) -> list[str]:
    """The contenders that have a time somewhere, in order."""
    timed = {r.contender for r in results.rows if r.ms is not None}
    return [name for name in among if name in timed]
