"""The files that documents show: every picture of every device, for light and for dark pages."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict
from pathlib import Path

from .. import render
from ..provenance import ROOT
from ..rows import Results
from . import Picture, figures, svg

PICTURES = ROOT / "docs" / "pictures"
THEMES = ("light", "dark")
_HASH = re.compile(r"rows ([0-9a-f]{16})")


def fingerprint(results: Results) -> str:
    """A hash of the rows that a picture is drawn from."""
    text = json.dumps([results.runs, results.ceilings, [asdict(r) for r in results.rows]], sort_keys=True, default=str)
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


def markdown(picture: Picture, device: str, out: Path = PICTURES) -> str:
    """The picture of a device in a document that lies beside the folder of pictures; empty if there is none.

    Args:
        picture: one of :data:`benchmarks.plots.PLOTS`.
        device: the name of its folder of results.
        out: folder of the pictures.
    """
    light, dark = (out / f"{picture.name}-{device}-{theme}.svg" for theme in THEMES)
    if not light.exists():
        return ""
    return (
        f'<picture>\n  <source media="(prefers-color-scheme: dark)" srcset="{out.name}/{dark.name}">\n'
        f'  <img src="{out.name}/{light.name}" alt="{picture.about}">\n</picture>'
    )
