"""Committed results: what has to be true of them, and how results of a new device get there.

``benchmarks/results/`` has a folder for each device, named after it, with the results files of that device and nothing else.
"""

from __future__ import annotations

import datetime
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import rows
from .rows import Row

_EVERYWHERE = (
    "command",
    "commit",
    "date",
    "device",
    "device_name",
    "threads",
    "cores",
    "system",
    "versions",
    "disturbance_seen_by",
)
_ON_A_GPU = ("cuda", "driver", "compute_capability", "multiprocessors")
_PROGRESS = ("started", "ended")
_NAME = re.compile(r"benchmark-(?P<suite>[a-z0-9_]+)-(?P<precision>[a-z0-9+]+)-(?P<rest>.+)\.jsonl")


def check(folder: Path) -> list[str]:
    """What is wrong with committed results, one sentence each.

    Args:
        folder: ``benchmarks/results`` or one like it.
    """
    found: list[str] = []
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            found += check_device(path)
        elif path.name != "README.md":
            found.append(f"{path.name}: only README.md and a folder for each device belong here")
    return found


def check_device(folder: Path) -> list[str]:
    """The same for the folder of one device."""
    paths = sorted(folder.iterdir())
    if not paths:
        return [f"{folder.name}: has no results"]
    found = []
    for path in paths:
        where = f"{folder.name}/{path.name}"
        if path.suffix != ".jsonl":
            found.append(f"{where}: only results files (.jsonl) belong here")
            continue
        problems = list(check_file(path))
        found += [f"{where}: {problem}" for problem in problems]
        if not problems and device_of(path) != folder.name:
            found.append(f"{where}: was measured on {device_of(path)}, and belongs into the folder of that name")
    return found


def device_of(path: Path) -> str:
    """The folder that a results file belongs into, from its first line."""
    with path.open() as file:
        return rows.device_slug(json.loads(file.readline()))


def check_file(path: Path) -> Iterator[str]:
    """What is wrong with one results file, wherever it lies."""
    try:
        results = rows.read(path)
    except (ValueError, TypeError) as error:
        yield str(error)
        return
    parts = [results, *results.experiments.values()]
    runs = [run for part in parts for run in part.runs]
    if not path.read_text().startswith('{"kind": "run"'):
        yield "the first line does not say where the numbers come from (kind run)"
        return
    incomplete = [problem for run in runs for problem in _provenance(run)]
    if incomplete:
        yield from incomplete
        return
    if len({rows.device_slug(run) for run in runs}) > 1:
        yield "has results of more than one device"
    found = [row for part in parts for row in part.rows]
    yield from _name(path.name, runs[0], found)
    for other in (fact for part in parts for fact in part.other):
        if other["kind"] in _PROGRESS:
            yield f"has progress notes (kind {other['kind']}) of a run that did not come to its end"
            break
    for row in found:
        yield from _row(row)


def _provenance(run: dict[str, Any]) -> Iterator[str]:
    wanted = (*_EVERYWHERE, *(_ON_A_GPU if run.get("device") == "cuda" else ()))
    missing = [name for name in wanted if run.get(name) is None]
    if missing:
        yield f"provenance lacks {', '.join(missing)}"
        return
    if run.get("dirty") is not False:
        yield f"measured files differed from commit {str(run.get('commit'))[:12]}: commit first, then measure"
    if not re.fullmatch(r"[0-9a-f]{40}", str(run.get("commit"))):
        yield f"commit is {run.get('commit')!r}; allowed is a full hash"
    try:
        datetime.datetime.strptime(str(run.get("date")), "%Y-%m-%d %H:%M UTC")
    except ValueError:
        yield f"date is {run.get('date')!r}; allowed is YYYY-MM-DD HH:MM UTC"


def _name(name: str, run: dict[str, Any], found: list[Row]) -> Iterator[str]:
    parsed = _NAME.fullmatch(name)
    if parsed is None:
        yield "its name is none that the benchmarks give"
        return
    # The precision is what was planned: not all of it may have been reached.
    long = {short: name for name, short in rows.SHORT_DTYPES.items()}
    named = [long.get(short, short) for short in parsed["precision"].split("+")]
    expected = rows.file_name(parsed["suite"], named, run)
    if name != expected:
        yield f"its name does not fit its first line, by which it is {expected}"
    other = sorted({row.dtype for row in found} - set(named))
    if other:
        yield f"has rows in {', '.join(other)}, which its name does not say"


def _row(row: Row) -> Iterator[str]:
    what = f"{row.label} on {row.subject}, {row.size} px, batch {row.batch}, {row.dtype}"
    if row.ms is None:
        if row.status == rows.OK or not row.reason:
            yield f"{what}: has no time and no reason"
        return
    if row.status != rows.OK:
        yield f"{what}: has a time although it is {row.status}"
    if row.error is None:
        yield f"{what}: was not held against float64"
    elif any(row.error[key] > row.error[f"{key}_budget"] for key in ("frobenius", "maximum")):
        yield f"{what}: is outside its error budget"


def add(measured: Path, results: Path) -> list[Path]:
    """Copy the results files of a folder to those of their device, replacing files of the same name.

    Args:
        measured: a folder that ``--out`` named.
        results: ``benchmarks/results``.

    Returns:
        The copies.

    Raises:
        ValueError: there are none, or they are not fit to be committed; says why. Nothing was copied then.
    """
    paths = sorted(measured.glob("*.jsonl"))
    if not paths:
        raise ValueError(f"no results (*.jsonl) in {measured}")
    problems = [f"{path.name}: {problem}" for path in paths for problem in check_file(path)]
    if problems:
        raise ValueError("\n".join(problems))
    copies = []
    for path in paths:
        target = results / device_of(path) / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        copies.append(target)
    return copies
