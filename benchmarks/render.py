"""Tables from results files, and their places in the documents.

A document marks a place with ``<!-- benchmarks:NAME:start -->`` and ``<!-- benchmarks:NAME:end -->``; :data:`PLACES` lists the
names. What stands between the two is written by ``python -m benchmarks render`` and by nobody else.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from . import rows
from .provenance import ROOT
from .rows import Results, Row

RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "experiments.md")
HEADLINE_CONTENDER = "lowkernels, auto"

EXPERIMENTS_PLACE = "experiments"
_MARKERS = re.compile(r"(<!-- benchmarks:([a-z0-9-]+):start -->\n)(.*?)(<!-- benchmarks:\2:end -->)", re.DOTALL)
_DASH = "–"


def number(value: float | None, digits: int = 3) -> str:
    """``value`` with this many significant digits and no exponent; a dash for None."""
    if value is None:
        return _DASH
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def ratio(value: float | None) -> str:
    return _DASH if value is None else f"{value:.2f}x"


def percent(value: float | None) -> str:
    return _DASH if value is None else (f"{100 * value:.1f} %" if value < 0.0995 else f"{100 * value:.0f} %")


def table(header: Sequence[str], body: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; the first ``left`` columns are flush left, the others flush right."""
    lines = ["| " + " | ".join(header) + " |"]
    lines.append("| " + " | ".join("---" if i < left else "---:" for i in range(len(header))) + " |")
    lines += ["| " + " | ".join(cells) + " |" for cells in body]
    return "\n".join(lines)


def spread(row: Row) -> str:
    """The median in milliseconds, with half the distance between the quartiles in percent of it."""
    if row.ms is None or row.ms_low is None or row.ms_high is None:
        return _DASH
    half = 50 * (row.ms_high - row.ms_low) / row.ms
    return f"{'~' if row.disturbed else ''}{number(row.ms)} ±{half:.0f} %"


def title(row: Row) -> str:
    """What the rows of one measurement are about."""
    dtype = rows.SHORT_DTYPES.get(row.dtype, row.dtype)
    size = f"{row.size} px, " if row.kind == "model" else ""
    return f"{row.subject}, {size}batch {row.batch}, {dtype}"


def contender_table(group: Sequence[Row]) -> str:
    """Every contender on one subject, fastest first; those without a time below, with the reason."""
    timed = sorted((r for r in group if r.ms is not None), key=lambda r: r.ms or 0.0)
    header = (
        "contender",
        "ms per batch",
        "images/s",
        "over eager",
        "over fastest rival",
        "TFLOP/s",
        "GB/s",
        "of product",
        "of copy",
        "of floor",
        "MB",
        "launches",
        "turns (dropped)",
    )
    body = [
        (
            f"**{r.label}**" if r.ours else r.label,
            spread(r),
            number(r.images_per_s),
            ratio(r.to_eager),
            ratio(r.to_fastest_rival),
            number(r.tflops),
            number(r.gb_per_s),
            percent(r.share_of_product),
            percent(r.share_of_copy),
            percent(r.share_of_floor),
            number(r.peak_memory_mb),
            _DASH if r.launches is None else str(r.launches),
            f"{r.turns} ({r.dropped})",
        )
        for r in timed
    ]
    parts = [table(header, body)] if body else ["No contender could be timed."]
    served = [f"{r.label}: {_served(r.served)}" for r in timed if r.served]
    if served:
        parts.append("Served by: " + "; ".join(served) + ".")
    parts += notes(group)
    return "\n\n".join(parts)


def _served(counts: dict[str, int]) -> str:
    return ", ".join(f"{backend} {count}x" for backend, count in sorted(counts.items()))


def notes(group: Sequence[Row]) -> list[str]:
    """What has no time, and why: wrong results first."""
    wrong = [f"**Wrong, so not timed:** {r.label}: {r.reason}." for r in group if r.status == rows.WRONG]
    parts = []
    for status, heading in ((rows.FAILED, "Failed"), (rows.ABSENT, "Absent"), (rows.LEFT_OUT, "Left out")):
        found = [f"{r.label} ({_escape(r.reason)})" for r in group if r.status == status]
        if found:
            parts.append(f"{heading}: " + "; ".join(found) + ".")
    return [*wrong, *([" ".join(parts)] if parts else [])]


def _escape(reason: str | None) -> str:
    return (reason or "no reason given").replace("|", "\\|").rstrip(".")


def best_of(group: Sequence[Row], ours: bool) -> Row | None:
    """The fastest row that is right, of ours or of the rivals."""
    return min((r for r in group if r.ours == ours and r.ms is not None), key=lambda r: r.ms or 0.0, default=None)


def as_a_user_gets_it(group: Sequence[Row]) -> Row | None:
    """This library's backend ``"auto"``; on a GPU the faster one of called and replayed from a CUDA graph, as for rivals."""
    return best_of([r for r in group if r.contender == HEADLINE_CONTENDER], ours=True)


def overview(groups: Iterable[Sequence[Row]]) -> str:
    """One line a subject: the fastest of ours against the fastest rival, and what was wrong."""
    header = (
        "subject",
        "eager ms",
        "fastest rival",
        "its ms",
        "lowkernels ms",
        "images/s",
        "over eager",
        "over fastest rival",
        "of floor",
        "sat out or wrong",
    )
    body, gains, verdicts = [], [], []
    for group in groups:
        rival, our = best_of(group, False), best_of(group, True)
        eager = next((r for r in group if r.contender == "eager" and not r.graph), None)
        missing = sum(r.status in (rows.LEFT_OUT, rows.ABSENT) and not r.ours for r in group)
        bad = [r.label for r in group if r.status in (rows.WRONG, rows.FAILED)]
        body.append(
            (
                title(group[0]),
                _DASH if eager is None else spread(eager),
                _DASH if rival is None else rival.label,
                _DASH if rival is None else spread(rival),
                _DASH if our is None else spread(our),
                _DASH if our is None else number(our.images_per_s),
                _DASH if our is None else ratio(our.to_eager),
                against(our, rival),
                _DASH if our is None else percent(our.share_of_floor),
                "; ".join(([f"{missing} sat out"] if missing else []) + bad) or _DASH,
            )
        )
        verdicts.append(verdict(our, rival))
        if our is not None and our.to_fastest_rival is not None:
            gains.append(our.to_fastest_rival)
    return table(header, body) + "\n\n" + tally(verdicts, gains)


def tally(verdicts: Sequence[str | None], gains: Sequence[float] = ()) -> str:
    """How often ours was faster and slower than the fastest rival, and by how much over all."""
    parts = [
        f"{verdicts.count(FASTER)} faster",
        f"{verdicts.count(EVEN)} even (spreads overlap)",
        f"{verdicts.count(SLOWER)} slower",
    ]
    if None in verdicts:
        parts.append(f"{verdicts.count(None)} without a verdict (~: disturbed by other processes)")
    mean = f"; geometric mean {math.exp(statistics.fmean(math.log(g) for g in gains)):.2f}x of its speed" if gains else ""
    return f"Against the fastest rival: {', '.join(parts)}{mean}."


FASTER, SLOWER, EVEN = "faster", "slower", "even"


def verdict(our: Row | None, rival: Row | None) -> str | None:
    """Ours against a rival: ``"faster"`` or ``"slower"`` if the middle halves of their turns do not overlap, else ``"even"``; None
    where a time is missing or was disturbed."""
    if our is None or rival is None or our.disturbed or rival.disturbed:
        return None
    if our.ms_high is None or our.ms_low is None or rival.ms_low is None or rival.ms_high is None:
        return None
    return FASTER if our.ms_high < rival.ms_low else SLOWER if our.ms_low > rival.ms_high else EVEN


def against(our: Row | None, rival: Row | None) -> str:
    """Ours against the fastest rival in a cell: the ratio of the speeds, and the verdict in a word."""
    found = verdict(our, rival)
    return _DASH if our is None or found is None else f"{ratio(our.to_fastest_rival)} {found}"


def device_title(run: dict[str, Any]) -> str:
    """The device and what belongs to its name."""
    if run["device"] != "cpu":
        return f"{run['device_name']}, CUDA {run['cuda']}, driver {run['driver']}"
    flags = (run.get("cpu") or {}).get("flags")
    return f"{run['device_name']}, {run['threads']} threads{' (' + ' '.join(flags) + ')' if flags else ''}"


def commit_title(run: dict[str, Any]) -> str:
    if run.get("commit") is None:
        return "no checkout"
    return f"commit {run['commit'][:12]}" + (" with uncommitted changes" if run.get("dirty") else "")


def provenance(results: Results) -> str:
    """Where the numbers come from, in a paragraph, and the ceilings."""
    run = results.run
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    ceilings = "; ".join(_ceilings(results.ceilings))
    kept, dropped = turns(results.rows)
    lines = [
        f"Measured on {device_title(run)}. Versions: {versions}.",
        *(f"`{r['command']}`, {r['date']}, {commit_title(r)}." for r in results.runs),
        f"Ceilings measured in the same run: {ceilings}." if ceilings else "",
        f"Turns: {kept} counted, {dropped} dropped as disturbed, seen by {run['disturbance_seen_by']}.",
    ]
    return "  \n".join(line for line in lines if line)


def turns(found: Iterable[Row]) -> tuple[int, int]:
    """Turns that were counted, and turns dropped as disturbed."""
    timed = [r for r in found if r.ms is not None]
    return sum(r.turns for r in timed), sum(r.dropped for r in timed)


def _ceilings(facts: Sequence[dict[str, Any]]) -> Iterator[str]:
    """One phrase a dtype; a range where several processes measured."""
    for dtype in dict.fromkeys(f["dtype"] for f in facts):
        found = [f for f in facts if f["dtype"] == dtype]
        product, copy = ([f[key] for f in found] for key in ("tflops", "gb_per_s"))
        kinds = " or ".join(dict.fromkeys(f["product"] for f in found))
        disturbed = " (disturbed, so no shares of it are given)" if any(f.get("disturbed") for f in found) else ""
        name = rows.SHORT_DTYPES.get(dtype, dtype)
        yield f"{name}: {_range(product)} TFLOP/s ({kinds}), copy {_range(copy)} GB/s{disturbed}"


def _range(values: Sequence[float]) -> str:
    ends = dict.fromkeys((number(min(values)), number(max(values))))
    return " to ".join(ends)


def models_overview(results: Results) -> str:
    return overview(g for g in results.groups().values() if g[0].kind == "model")


def ops_overview(results: Results) -> str:
    return overview(g for g in results.groups().values() if g[0].kind == "op")


def comparable(results: Results) -> list[list[Row]]:
    """Measurements of models in which no strong rival was left out: one that is the fastest rival in any of them."""
    groups = [g for g in results.groups().values() if g[0].kind == "model"]
    strong = {rival.contender for rival in (best_of(g, ours=False) for g in groups) if rival is not None}
    return [g for g in groups if not any(r.status == rows.LEFT_OUT and r.contender in strong for r in g)]


def headline(results: Results) -> str:
    """One line a model, batch and dtype: the library as a user gets it against the fastest rival."""
    body = []
    verdicts = []
    for group in comparable(results):
        our = as_a_user_gets_it(group)
        rival = best_of(group, ours=False)
        eager = next((r for r in group if r.contender == "eager" and not r.graph), None)
        if our is None or rival is None:
            continue
        verdicts.append(verdict(our, rival))
        replayed = " (CUDA graph)" if our.graph else ""
        times = (f"**{spread(our)}**{replayed}", f"{rival.label} {spread(rival)}", _DASH if eager is None else spread(eager))
        body.append((title(group[0]), *times, against(our, rival)))
    if not body:
        return "No model was measured with every strong rival."
    header = ("ms per batch", "lowkernels", "fastest rival", "eager", "over fastest rival")
    measured = [r for r in results.runs if " models" in r["command"]] or results.runs
    runs = "; ".join(f"`{r['command']}` ({r['date'][:10]}, {commit_title(r)})" for r in measured)
    return "\n\n".join(
        [table(header, body), f"{tally(verdicts)} Measured on {device_title({**results.run, 'cpu': None})}: {runs}."]
    )


def details(results: Results) -> str:
    """Every measured model in full."""
    groups = [g for g in results.groups().values() if g[0].kind == "model"]
    return "\n\n".join(f"#### {title(g[0])}\n\n{contender_table(g)}" for g in groups) or "No model was measured."


def unmeasured(results: Results) -> str:
    """Subjects that were planned and have no rows."""
    found = [f for f in results.other if f["kind"] == "unmeasured"]
    return "\n".join(f"- {_key_title(*f['key'])}: {f['reason']}" for f in found)


def _key_title(kind: str, subject: str, size: int, batch: int, dtype: str) -> str:
    return title(Row(kind, subject, size, batch, dtype, contender=""))


def report(results: Results) -> str:
    """Everything in a results folder as one Markdown document."""
    parts = ["# Benchmarks", provenance(results)]
    if any(r.kind == "model" for r in results.rows):
        parts += ["## Models", models_overview(results)]
    if any(r.kind == "op" for r in results.rows):
        parts += ["## Operators", ops_overview(results)]
    correctness = [f for f in results.other if f["kind"] == "correctness"]
    if correctness:
        parts += ["## Correctness", _correctness(correctness)]
    tuning = [f for f in results.other if f["kind"] == "tuning"]
    if tuning:
        parts += ["## Tuning", f"{len(tuning)} lines in the results file of that name."]
    parts += ["## Models in full", details(results)]
    missing = unmeasured(results)
    if missing:
        parts += ["## Not measured", missing]
    return "\n\n".join(parts) + "\n"


def _correctness(facts: Sequence[dict[str, object]]) -> str:
    counts: dict[tuple[str, str], list[int]] = {}
    bad = []
    for fact in facts:
        cell = counts.setdefault((str(fact["backend"]), str(fact["dtype"])), [0, 0, 0])
        cell[("right", "wrong", "refused").index(str(fact["outcome"]))] += 1
        if fact["outcome"] == "wrong":
            bad.append(f"- {fact['backend']}, {fact['dtype']}, {fact['layer']}: {fact['reason']}")
    body = [(b, d, *(str(c) for c in cells)) for (b, d), cells in counts.items()]
    return table(("backend", "dtype", "right", "wrong", "refused"), body, left=2) + ("\n\n" + "\n".join(bad) if bad else "")


def drawn(results: Results) -> str:
    """The pictures of models and operators, with captions, for a document beside their folder."""
    # They are drawn from what is made here.
    from .plots import pictures

    return pictures.gallery(results)


def headline_picture(results: Results) -> str:
    """The picture of the headline, for README.md."""
    from .plots import PLOTS, pictures

    return pictures.markdown(PLOTS["gap"], results, "docs/", width=640)


PLACES: dict[str, Callable[[Results], str]] = {
    "provenance": provenance,
    "headline": headline,
    "models": models_overview,
    "ops": ops_overview,
    "details": details,
    "pictures": drawn,
    "headline-picture": headline_picture,
}
"""What can stand in a document, under the name ``<kind>-<place>``, the kind of device being ``cpu`` or ``gpu``; a place without a
kind is filled for every device there are results of."""
NAMED = ("provenance", "headline", "headline-picture")
"""Places that tell by themselves whose they are."""
DEVICES = ("cpu", "gpu")


def committed(folder: Path | None = None) -> dict[str, Results]:
    """The results of every device, by the name of its folder."""
    devices = (path for path in sorted((folder or RESULTS).iterdir()) if path.is_dir())
    found = {path.name: sorted(path.glob("*.jsonl")) for path in devices}
    return {name: rows.read(*paths) for name, paths in found.items() if paths}


def filled(text: str, results: Iterable[Results]) -> str:
    """A document with every marked place written anew.

    Raises:
        ValueError: a place has an unknown name.
    """
    measured = list(results)

    def fill(match: re.Match[str]) -> str:
        if match[2] == EXPERIMENTS_PLACE:
            from . import experiments

            return "\n\n".join((match[1].rstrip("\n"), experiments.document(measured), match[4]))
        first, _, rest = match[2].partition("-")
        kind, place = (first, rest) if first in DEVICES else (None, match[2])
        if place not in PLACES:
            allowed = ", ".join((*PLACES, EXPERIMENTS_PLACE, *(f"{d}-{p}" for d in DEVICES for p in PLACES)))
            raise ValueError(f"unknown place benchmarks:{match[2]}; allowed are {allowed}")
        wanted = [r for r in measured if kind in (None, r.device)]
        found = [(r, part) for r in wanted if (part := PLACES[place](r))]
        named = len(found) > 1 and place not in NAMED
        parts = [(f"On {device_title(r.run)}:\n\n" if named else "") + part for r, part in found]
        if not wanted:
            parts = ["Not measured yet" + (f" on a {kind.upper()}." if kind else ".")]
        return "\n\n".join((match[1].rstrip("\n"), *parts, match[4]))

    return _MARKERS.sub(fill, text)


def render(documents: Iterable[Path] | None = None, folder: Path | None = None, check: bool = False) -> list[Path]:
    """Write the marked places of the documents.

    Args:
        documents: Markdown files, default :data:`DOCUMENTS`; missing ones are passed over.
        folder: of the results, with a folder for each device; default :data:`RESULTS`.
        check: change nothing.

    Returns:
        The documents that were out of date.
    """
    results = committed(folder).values()
    stale = []
    for path in documents or DOCUMENTS:
        if path.exists():
            text = path.read_text()
            new = filled(text, results)
            if new != text:
                stale.append(path)
                if not check:
                    path.write_text(new)
    return stale
