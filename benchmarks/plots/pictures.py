"""The files that documents show: every picture of every device, for light and for dark pages."""

from __future__ import annotations

import hashlib
import html
import json
import re
from dataclasses import asdict
from pathlib import Path

from .. import render
from ..provenance import ROOT
from ..rows import Results, device_slug
from . import PLOTS, Picture, figures, svg

PICTURES = ROOT / "docs" / "pictures"
THEMES = ("light", "dark")
_HASH = re.compile(r"rows ([0-9a-f]{16})")


def fingerprint(results: Results) -> str:
    """A hash of the rows that a picture is drawn from."""
    facts = [*results.runs, *results.ceilings, *({k: v for k, v in asdict(r).items() if v is not None} for r in results.rows)]
    text = json.dumps(facts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write(folder: Path, out: Path, check: bool = False) -> list[Path]:
    """Draw every picture that a folder of results has the rows for; those that no rows are left for are removed.

    A picture is drawn anew when its rows are others than those that it says it was drawn from, or when its file differs.

    Args:
        folder: of the results, with a folder for each device.
        out: for the pictures.
        check: change nothing. A picture then counts as up to date if it is of the same rows, because other versions of matplotlib
            place things a little differently.

    Returns:
        The files that were out of date.
    """
    wanted: dict[Path, str] = {}
    for device, results in render.committed(folder).items():
        for picture, figure in figures(results):
            rows_hash = fingerprint(picture.part(results))
            for theme in THEMES:
                wanted[out / f"{picture.name}-{device}-{theme}.svg"] = svg(figure, theme, f"{picture.title}, rows {rows_hash}")
    stale = []
    for path in sorted({*out.glob("*.svg"), *wanted}):
        new, old = wanted.get(path), path.read_text() if path.exists() else None
        if new == old or (check and _rows(new) == _rows(old)):
            continue
        stale.append(path)
        if check:
            continue
        if new is None:
            path.unlink()
        else:
            out.mkdir(parents=True, exist_ok=True)
            path.write_text(new)
    return stale


def _rows(text: str | None) -> str | None:
    found = None if text is None else _HASH.search(text)
    return None if found is None else found[1]


def markdown(picture: Picture, results: Results, path: str = "", out: Path = PICTURES, width: int | None = None) -> str:
    """The picture of a device in a document; empty if it has not been drawn.

    Args:
        picture: one of :data:`benchmarks.plots.PLOTS`.
        results: of the device, or of an experiment on it.
        path: from the document to the folder beside that of the pictures.
        out: folder of the pictures.
        width: in pixels, if not that of the picture.
    """
    if not results.run:
        return ""
    light, dark = (f"{picture.name}-{device_slug(results.run)}-{theme}.svg" for theme in THEMES)
    if not (out / light).exists():
        return ""
    size = "" if width is None else f' width="{width}"'
    return (
        f'<picture>\n  <source media="(prefers-color-scheme: dark)" srcset="{path}{out.name}/{dark}">\n'
        f'  <img src="{path}{out.name}/{light}" alt="{html.escape(picture.about, quote=False)}"{size}>\n</picture>'
    )


def gallery(results: Results) -> str:
    """Every picture of a device but those of experiments, with captions."""
    shown = [(p, markdown(p, results)) for p in PLOTS.values() if p.experiment is None]
    return "\n\n".join(f"{text}\n\n*{p.title}.* {p.about}" for p, text in shown if text) or "Not drawn yet."
