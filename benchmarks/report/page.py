"""The page: what stands in it, in which order."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from .. import plots, rows
from ..experiments import EXPERIMENTS
from ..plots import style
from ..render import (
    EVEN,
    FASTER,
    SLOWER,
    as_a_user_gets_it,
    best_of,
    commit_title,
    device_title,
    number,
    percent,
    ratio,
    spread,
    turns,
    unmeasured,
    verdict,
)
from ..rows import Results, Row
from .markup import Cell, Column, bullets, by, facts, inline_svg, markdown, prose, select, table

_HERE = Path(__file__).parent
_DASH = "–"
_SIGNS = {FASTER: "▲", EVEN: "●", SLOWER: "▼"}
_CONTENT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


class Case(NamedTuple):
    """What was measured together, and the three times that a reader looks for first."""

    about: Row
    group: list[Row]
    ours: Row | None
    rival: Row | None
    eager: Row | None

    @property
    def verdict(self) -> str | None:
        return verdict(self.ours, self.rival)


def cases(results: Results) -> list[Case]:
    """Every subject with this library as a user gets it, the fastest rival and eager PyTorch."""

    def eager(group: Sequence[Row]) -> Row | None:
        return next((r for r in group if r.contender == "eager" and not r.graph and r.ms is not None), None)

    groups = results.groups().values()
    return [Case(g[0], g, as_a_user_gets_it(g), best_of(g, ours=False), eager(g)) for g in groups]


def page(results: Results, title: str = "") -> str:
    """Everything that results say as one HTML document.

    Args:
        results: of one device.
        title: of the page; default: the device.
    """
    title = title or f"lowkernels on {results.run['device_name']}"
    measured = cases(results)
    # Of a subject that was measured twice, the second time counts: ratios hold only within one measurement.
    latest = [row for case in measured for row in case.group]
    parts: list[tuple[str, str, str]] = [
        ("models", "Models against the fastest rival", _overview("models", [c for c in measured if c.about.kind == "model"])),
        ("operators", "Operators against the fastest rival", _overview("operators", [c for c in measured if c.about.kind == "op"])),
        ("pictures", "Pictures", _pictures(results)),
        ("measurements", "Every measurement", _measurements("measurements", latest, _about)),
        *(
            (f"experiment-{rows.slug(name)}", _experiment_title(name), _experiment(name, part))
            for name, part in results.experiments.items()
        ),
        ("replaced", "What was replaced", _replaced(latest)),
        ("correctness", "Correctness", _correctness(results)),
        ("ceilings", "Ceilings", _ceilings(results)),
        ("turns", "Turns, counted and dropped", _turns(latest)),
        ("absent", "Not measured", _absent(results)),
        ("provenance", "Where the numbers come from", _provenance(results)),
        ("reading", "How to read this page", _reading()),
    ]
    filled = [p for p in parts if p[2]]
    contents = "".join(f'<li><a href="#{name}">{escape(heading)}</a></li>' for name, heading, _ in filled)
    body = "\n".join(f'<section id="{name}"><h2>{escape(heading)}</h2>\n{text}\n</section>' for name, heading, text in filled)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{_CONTENT_POLICY}">
<title>{escape(title)}</title>
<style>
{_colours()}
{(_HERE / "page.css").read_text()}</style>
</head>
<body>
<a class="skip" href="#main">To the results</a>
<header>
<h1>{escape(title)}</h1>
<p class="from">{escape(_from(results))}</p>
{_score(measured)}
<nav aria-label="Contents"><ol>{contents}</ol></nav>
</header>
<main id="main">
{_filters(latest)}
{body}
</main>
<script>
{(_HERE / "page.js").read_text()}</script>
</body>
</html>
"""


def _colours() -> str:
    """The variables that pictures and page share, light and dark."""
    light = "".join(f"{style.VARIABLES[colour]}:{colour};" for colour in style.DARK)
    dark = "".join(f"{style.VARIABLES[colour]}:{other};" for colour, other in style.DARK.items())
    return f":root{{{light}}}\n@media (prefers-color-scheme: dark){{:root{{{dark}}}}}"


def _from(results: Results) -> str:
    run = results.run
    return f"{device_title(run)} · PyTorch {run['versions']['torch']} · {run['date']} · {commit_title(run)}"


def _score(measured: Sequence[Case]) -> str:
    """How often faster, even and slower, in large figures."""
    lines = []
    for kind, name in (("model", "Models"), ("op", "Operators")):
        verdicts = [c.verdict for c in measured if c.about.kind == kind]
        if verdicts:
            counts = "".join(
                f'<li class="{v}"><b>{verdicts.count(v)}</b> <span aria-hidden="true">{_SIGNS[v]}</span> {v}</li>' for v in _SIGNS
            )
            lines.append(f"<div><h2>{name}</h2><ul>{counts}</ul><p>{escape(_outline(verdicts, _gains(measured, kind)))}</p></div>")
    return f'<div class="score" role="group" aria-label="Against the fastest rival">{"".join(lines)}</div>' if lines else ""


def _outline(verdicts: Sequence[str | None], gains: Sequence[float]) -> str:
    parts = [f"than the fastest rival, of {len(verdicts)}"]
    if None in verdicts:
        parts.append(f"{verdicts.count(None)} disturbed, so without a verdict")
    if gains:
        parts.append(f"geometric mean {math.exp(statistics.fmean(math.log(g) for g in gains)):.2f}x of its speed")
    return "; ".join(parts)


def _gains(measured: Sequence[Case], kind: str) -> list[float]:
    ours = [c.ours for c in measured if c.about.kind == kind]
    return [r.to_fastest_rival for r in ours if r is not None and r.to_fastest_rival is not None]


def _filters(found: Sequence[Row]) -> str:
    def values(key: str) -> list[str]:
        return list(dict.fromkeys(_about(r)[key] for r in found))

    if not found:
        return ""
    sizes = sorted(values("batch"), key=int)
    choices = [
        select("subject", "Model or operator", values("subject"), "all"),
        select("dtype", "Type", values("dtype"), "all"),
        select("batch", "Batch", sizes, "all"),
        select("size", "Pixels", sorted(values("size"), key=int), "all"),
    ]
    # Filters do nothing without the script, which shows them.
    return (
        f'<form class="filters" hidden aria-label="Filter all tables">{"".join(choices)}'
        '<button type="reset">Show all</button><output aria-live="polite"></output></form>'
    )


def _about(row: Row) -> dict[str, str]:
    """What rows are filtered by. Layers are filtered by their operator: there are too many to choose from."""
    return {
        "subject": row.operator or row.subject,
        "dtype": rows.SHORT_DTYPES.get(row.dtype, row.dtype),
        "batch": str(row.batch),
        "size": str(row.size),
    }


def _number(value: float | None, text: str | None = None, mark: str = "") -> Cell:
    return Cell(number(value) if text is None else text, value, mark)


def _text(text: str, mark: str = "", below: str = "") -> Cell:
    return Cell(text, text.lower(), mark, below=below)


def _case(row: Row, named: bool = False) -> str:
    """The subject in short, for phones, where it has no columns of its own."""
    parts = [*([row.subject] if named else []), f"{row.size} px", f"batch {row.batch}", rows.SHORT_DTYPES.get(row.dtype, row.dtype)]
    return " · ".join(parts)


def _time(row: Row | None) -> Cell:
    return Cell(_DASH) if row is None else Cell(spread(row), row.ms, "disturbed" if row.disturbed else "")


def _ratio(value: float | None) -> Cell:
    return Cell(ratio(value), value)


def _share(value: float | None) -> Cell:
    return Cell(percent(value), value)


def _octaves(value: float | None) -> float | None:
    """A ratio on the scale of the bars, whose ends are half and twice the speed."""
    return None if value is None else math.log2(value)


def _overview(name: str, measured: Sequence[Case]) -> str:
    if not measured:
        return ""
    what = "model" if name == "models" else "operator and layer"

    def against(case: Case) -> Cell:
        if case.ours is None or case.verdict is None:
            return Cell("disturbed" if case.ours is not None else _DASH)
        value = case.ours.to_fastest_rival
        return Cell(f"{ratio(value)} {_SIGNS[case.verdict]} {case.verdict}", value, case.verdict, _octaves(value))

    def missing(case: Case) -> Cell:
        count = sum(r.status in (rows.LEFT_OUT, rows.ABSENT) and not r.ours for r in case.group)
        bad = [f"{r.label} {r.status}" for r in case.group if r.status in (rows.WRONG, rows.FAILED)]
        return Cell("; ".join([*bad, *([f"{count} sat out"] if count else [])]) or _DASH, float(len(bad) + count), "wrap")

    columns: list[Column[Case]] = [
        Column(what, lambda c: _text(c.about.subject, below=_case(c.about))),
        Column("pixels", lambda c: _number(c.about.size, str(c.about.size)), numeric=True, wide=True),
        Column("batch", lambda c: _number(c.about.batch, str(c.about.batch)), numeric=True, wide=True),
        Column("type", lambda c: _text(rows.SHORT_DTYPES.get(c.about.dtype, c.about.dtype)), wide=True),
        Column("lowkernels, ms", lambda c: _time(c.ours), numeric=True, help="as backend='auto' serves it; median of the turns"),
        Column("over fastest rival", against, numeric=True, help="time of the fastest rival over ours: above 1 is faster"),
        Column("fastest rival", lambda c: _text(c.rival.label if c.rival else _DASH, "wrap")),
        Column("its ms", lambda c: _time(c.rival), numeric=True),
        Column("eager, ms", lambda c: _time(c.eager), numeric=True),
        Column("over eager", lambda c: _ratio(c.ours.to_eager if c.ours else None), numeric=True),
        Column("images/s", lambda c: _number(c.ours.images_per_s if c.ours else None), numeric=True),
        Column("of floor", lambda c: _share(c.ours.share_of_floor if c.ours else None), numeric=True),
        Column("others", missing, help="rivals that sat out, failed, or were wrong; the table of every measurement says why"),
    ]
    caption = f"This library as a user gets it, against the fastest rival on every {what}"
    note = (
        "<p>A verdict is given where the middle halves of the turns do not overlap; “even” is all others. "
        "Bars are on a logarithmic scale, from half to twice the rival’s speed.</p>"
    )
    return note + table(f"table-{name}", caption, columns, measured, lambda c: _about(c.about))


def _measurements(name: str, found: Sequence[Row], filters: Callable[[Row], Mapping[str, str]] | None = None) -> str:
    if not found:
        return ""
    columns: list[Column[Row]] = [
        Column("contender", lambda r: _text(r.label, below=_case(r, named=True))),
        Column("model or layer", lambda r: _text(r.subject), wide=True),
        *_point_columns(found),
        Column("pixels", lambda r: _number(r.size, str(r.size)), numeric=True, wide=True),
        Column("batch", lambda r: _number(r.batch, str(r.batch)), numeric=True, wide=True),
        Column("type", lambda r: _text(rows.SHORT_DTYPES.get(r.dtype, r.dtype)), wide=True),
        Column("ms per batch", _outcome, numeric=True),
        Column("images/s", lambda r: _number(r.images_per_s), numeric=True),
        Column("over eager", lambda r: _ratio(r.to_eager), numeric=True),
        Column("over fastest rival", lambda r: _ratio(r.to_fastest_rival), numeric=True),
        Column("TFLOP/s", lambda r: _number(r.tflops), numeric=True),
        Column("GB/s", lambda r: _number(r.gb_per_s), numeric=True),
        Column("of product", lambda r: _share(r.share_of_product), numeric=True),
        Column("of copy", lambda r: _share(r.share_of_copy), numeric=True),
        Column("of floor", lambda r: _share(r.share_of_floor), numeric=True),
        Column("MB", lambda r: _number(r.peak_memory_mb), numeric=True),
        Column("launches", lambda r: _number(r.launches, _DASH if r.launches is None else str(r.launches)), numeric=True),
        Column("error / budget", _error, numeric=True, help="relative distance from float64, as a share of what is allowed"),
        Column("turns", lambda r: _number(r.turns, str(r.turns)), numeric=True),
        Column("dropped", lambda r: _number(r.dropped, str(r.dropped)), numeric=True),
        Column("served by, or why there is no time", lambda r: _text(_served(r), "long")),
    ]
    return table(f"table-{name}", "Every contender on every subject", columns, found, filters, _ours)


def _ours(row: Row) -> str:
    return "ours" if row.ours else ""


def _point_columns(found: Sequence[Row]) -> Iterator[Column[Row]]:
    names = dict.fromkeys(name for r in found for name in r.point or {})
    for name in names:
        yield _point_column(name)


def _point_column(name: str) -> Column[Row]:
    def cell(row: Row) -> Cell:
        value = (row.point or {}).get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return Cell(f"{value:g}", float(value))
        return _text(_DASH if value is None else str(value))

    return Column(name.replace("_", " "), cell)


def _outcome(row: Row) -> Cell:
    return _time(row) if row.ms is not None else Cell(row.status, None, "bad" if row.status in (rows.WRONG, rows.FAILED) else "out")


def _error(row: Row) -> Cell:
    if row.error is None:
        return Cell(_DASH)
    return _share(row.error["frobenius"] / row.error["frobenius_budget"])


def _served(row: Row) -> str:
    if row.reason is not None:
        return row.reason
    return ", ".join(f"{backend} {count}x" for backend, count in sorted((row.served or {}).items())) or _DASH


def _pictures(results: Results) -> str:
    """Every picture that the rows are enough for, or what to install."""
    try:
        drawn = list(plots.figures(results))
    except ModuleNotFoundError as error:
        return f"<p>{prose(_no_pictures(error))}</p>"
    return "\n".join(
        f'<figure><div class="scroll picture" role="img" aria-label="{escape(picture.title)}" tabindex="0">'
        f"{inline_svg(plots.svg(figure, 'css'), picture.name)}</div>"
        f"<figcaption><b>{escape(picture.title)}.</b> {escape(picture.about)}</figcaption></figure>"
        for picture, figure in drawn
    )


def _no_pictures(error: ModuleNotFoundError) -> str:
    if error.name != "matplotlib":
        raise error
    return "This page has no pictures, because matplotlib is not installed where it was made: `pip install 'lowkernels[plot]'`."


def _experiment_title(name: str) -> str:
    return EXPERIMENTS[name].title if name in EXPERIMENTS else f"Experiment: {name}"


def _experiment(name: str, results: Results) -> str:
    """What it asks, its own table, and its rows."""
    slug = f"experiment-{rows.slug(name)}"
    measured = _measurements(slug, results.rows)
    experiment = EXPERIMENTS.get(name)
    if experiment is None or not any(r.ms is not None for r in results.rows):
        return measured
    asked = f"<p>{prose(experiment.question)} Source: {prose(experiment.source)}.</p>"
    return f"{asked}{markdown(slug, experiment.table(results))}<details><summary>Every measurement</summary>{measured}</details>"


def _replaced(found: Sequence[Row]) -> str:
    """What :func:`lowkernels.report` said about each model, where rows say it; models with the same outcome together."""
    told = [r for r in found if r.kind == "model" and r.ours and r.ms is not None]
    if not told:
        return ""
    recorded = [r for r in told if r.modules is not None]
    if not recorded:
        return "<p>These rows do not name modules; “Every measurement” counts the blocks that each backend served.</p>"
    parts = []
    for index, ((subject, contender, _), same) in enumerate(by(recorded, lambda r: (r.subject, r.label, str(r.modules)))):
        modules: list[dict[str, Any]] = same[0].modules or []
        count = sum(len(m["names"]) for m in modules if m["replaced"])
        total = sum(len(m["names"]) for m in modules)
        at = "; ".join(f"{r.size} px, batch {r.batch}, {rows.SHORT_DTYPES.get(r.dtype, r.dtype)}" for r in same)
        columns: list[Column[dict[str, Any]]] = [
            Column("kind", lambda m: _text(m["kind"])),
            Column("modules", lambda m: _number(len(m["names"]), str(len(m["names"]))), numeric=True),
            Column("replaced", lambda m: _text("yes" if m["replaced"] else "no")),
            Column("ran on", lambda m: _text(m["ran_on"] or _DASH)),
            Column("reason", lambda m: _text(m["reason"], "long")),
            Column("names", lambda m: _text(", ".join(m["names"]) or "the model as a whole", "long")),
        ]
        parts.append(
            f"<details><summary><b>{escape(subject)}</b> · {escape(contender)} · {count} of {total} modules replaced"
            f"<small>{escape(at)}</small></summary>"
            + table(f"table-replaced-{index}", f"{subject}, {contender}", columns, modules)
            + "</details>"
        )
    return "\n".join(parts)


def _correctness(results: Results) -> str:
    checked = [f for f in results.other if f["kind"] == "correctness"]
    if not checked:
        return ""
    outcomes = ("right", "wrong", "refused")
    counted = [
        (backend, dtype, [sum(f["outcome"] == o for f in found) for o in outcomes])
        for (backend, dtype), found in by(checked, lambda f: (f["backend"], f["dtype"]))
    ]
    columns: list[Column[tuple[str, str, list[int]]]] = [
        Column("backend", lambda r: _text(r[0])),
        Column("type", lambda r: _text(rows.SHORT_DTYPES.get(r[1], r[1]))),
        Column("right", lambda r: _number(r[2][0], str(r[2][0])), numeric=True),
        Column("wrong", lambda r: _number(r[2][1], str(r[2][1]), "bad" if r[2][1] else ""), numeric=True),
        Column("refused", lambda r: _number(r[2][2], str(r[2][2])), numeric=True),
    ]
    wrong = [f"{f['backend']}, {f['dtype']}, {f['layer']}: {f['reason']}" for f in checked if f["outcome"] == "wrong"]
    return table("table-correctness", "Layers held against float64", columns, counted) + (bullets(wrong) if wrong else "")


def _ceilings(results: Results) -> str:
    columns: list[Column[Mapping[str, Any]]] = [
        Column("type", lambda f: _text(rows.SHORT_DTYPES.get(f["dtype"], f["dtype"]))),
        Column("product", lambda f: _text(f["product"])),
        Column("TFLOP/s", lambda f: _number(f["tflops"]), numeric=True),
        Column("copy, GB/s", lambda f: _number(f["gb_per_s"]), numeric=True),
        Column("state", lambda f: _text("disturbed: no shares are given" if f.get("disturbed") else "quiet")),
    ]
    caption = "What a large product and a large copy reach, one row for each process that measured"
    return table("table-ceilings", caption, columns, results.ceilings) if results.ceilings else ""


def _turns(found: Sequence[Row]) -> str:
    timed = [r for r in found if r.ms is not None]
    if not timed:
        return ""
    kept, dropped = turns(timed)
    counted = [
        (name, *turns(same), sum(r.disturbed for r in same), [r.own_waiting for r in same if r.own_waiting is not None])
        for name, same in by(timed, lambda r: r.label)
    ]
    columns: list[Column[tuple[str, int, int, int, list[float]]]] = [
        Column("contender", lambda r: _text(r[0])),
        Column("counted", lambda r: _number(r[1], f"{r[1]:,}"), numeric=True),
        Column("dropped", lambda r: _number(r[2], f"{r[2]:,}"), numeric=True),
        Column("dropped, share", lambda r: _share(r[2] / (r[1] + r[2])), numeric=True),
        Column("results with too few left", lambda r: _number(r[3], str(r[3])), numeric=True),
        Column(
            "own waiting",
            lambda r: _share(max(r[4], default=None)),
            numeric=True,
            help="the largest share of a turn that its own threads keep each other waiting, which is no disturbance",
        ),
    ]
    note = f"<p>{kept:,} turns were counted, {dropped:,} dropped because other processes were in the way.</p>"
    return note + table("table-turns", "Turns of each contender", columns, counted)


def _absent(results: Results) -> str:
    lines = [line.removeprefix("- ") for line in unmeasured(results).splitlines()]
    if not lines:
        return ""
    return f"<details><summary>{len(lines)} subjects were planned and have no rows</summary>{bullets(lines)}</details>"


def _provenance(results: Results) -> str:
    everywhere = [*results.runs, *(run for part in results.experiments.values() for run in part.runs)]
    return "\n".join(facts(_facts(run)) for run in everywhere)


def _facts(run: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "command", f"`{run['command']}`"
    yield "device", device_title(dict(run))
    yield "system", str(run.get("system", ""))
    yield "date", str(run["date"])
    yield (
        "commit",
        f"`{run['commit']}`" + (", with uncommitted changes" if run.get("dirty") else "") if run.get("commit") else "no checkout",
    )
    yield "versions", ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    yield "disturbance seen by", str(run["disturbance_seen_by"])
    if run.get("load_average"):
        yield "load when it began", ", ".join(f"{x:.2f}" for x in run["load_average"])
    for name in ("clocks", "compute_capability", "multiprocessors", "tf32", "cudnn"):
        if run.get(name) is not None:
            yield name.replace("_", " "), str(run[name])


def _reading() -> str:
    return bullets(
        (
            "Every contender’s output was checked against float64 before it was timed; one outside its error budget has no time.",
            "Times are medians over turns that contenders take in random order; ± is half the distance between the quartiles. "
            "A time marked ~ had too few undisturbed turns, and no ratio is given to or from it.",
            "“ms per batch” is the latency of a whole batch, “images/s” the batch over it.",
            "“over” a contender is its time over this one: above 1 is faster. The fastest rival is chosen anew for every subject. "
            "Of a subject that was measured twice, the second time counts.",
            "“of product” and “of copy” are shares of the ceilings measured in the same run; “of floor” is the share of the least "
            "time that the blocks could take at those ceilings.",
            "docs/benchmarks.md has the method in full: what favours the rivals, what is dropped, and why.",
        )
    )
