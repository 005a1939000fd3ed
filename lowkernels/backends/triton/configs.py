"""Which tile sizes a kernel runs with: tables shipped beside this file, and :mod:`.model` where no row fits.

``tables/<operator>.json`` holds a list of rows::

    {"arch": [[90, 99]], "dtype": ["float16", "bfloat16"], "when": {"columns": [129, 256]}, "config": {"BM": 128, ...}}

A row serves a call if the compute capability lies in one of the ranges ``arch``, the dtype is listed ("tf32" is fp32 with products
in tf32) and every feature named in ``when`` lies in its range (bounds included, null for none). The first such row counts. Features
are what the operator describes a call by, in coarse terms: the batch size is only ever seen as the number of tiles it makes. No
tuning happens at run time. ``"alternatives"``, optional in a row, lists what ``lowkernels tune`` tries besides: for each, the
fields of ``config`` that it changes. What it finds reaches :func:`choose` as the call's :mod:`~lowkernels.choosing.settings`.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...choosing import settings
from . import model

if TYPE_CHECKING:
    from .launch import Target

TABLES = Path(__file__).parent / "tables"


class TableError(ValueError):
    """A table is not what this module's documentation says."""


def parse(text: str) -> list[dict[str, Any]]:
    """The rows of a table.

    Raises:
        TableError: with the reason.
    """
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise TableError(f"not JSON: {error}") from error
    if not isinstance(rows, list):
        raise TableError("not a list of rows")
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or set(row) - {"alternatives"} != {"arch", "dtype", "when", "config"}:
            raise TableError(f"row {number} has not exactly the keys arch, dtype, when, config")
        if not isinstance(row["arch"], list) or not isinstance(row["when"], dict):
            raise TableError(f"row {number}: arch is not a list, or when not an object")
        ranges = [*row["arch"], *row["when"].values()]
        for bounds in ranges:
            if not isinstance(bounds, list) or len(bounds) != 2 or not all(b is None or type(b) is int for b in bounds):
                raise TableError(f"row {number}: {bounds!r} is not a range [low, high]")
        alternatives = row.get("alternatives", [])
        if not isinstance(row["dtype"], list) or not isinstance(alternatives, list):
            raise TableError(f"row {number}: dtype or alternatives is not a list")
        for config in (row["config"], *alternatives):
            if not isinstance(config, dict):
                raise TableError(f"row {number}: {config!r} is not an object of sizes")
            for name, value in config.items():
                if type(value) is not int or value < 0:
                    raise TableError(f"row {number}: config {name} is {value!r}, not a non-negative integer")
    return rows


@functools.cache
def table(operator: str) -> list[dict[str, Any]]:
    """The shipped rows of ``operator``; none, with a warning, if its table cannot be read."""
    path = TABLES / f"{operator}.json"
    try:
        return parse(path.read_text())
    except (OSError, TableError) as error:
        warnings.warn(f"lowkernels: {path} is ignored, the cost model chooses instead: {error}", RuntimeWarning, stacklevel=2)
        return []


def _within(value: int, bounds: list[int | None]) -> bool:
    low, high = bounds
    return (low is None or value >= low) and (high is None or value <= high)


def serves(row: dict[str, Any], arch: int, dtype: str) -> bool:
    """Whether a row is for an architecture and a dtype (``"float16"``)."""
    return dtype in row["dtype"] and any(_within(arch, bounds) for bounds in row["arch"])


def find(rows: list[dict[str, Any]], arch: int, dtype: str, features: dict[str, int]) -> int | None:
    """Index of the row that serves a call, or None."""
    for index, row in enumerate(rows):
        inside = all(name in features and _within(features[name], bounds) for name, bounds in row["when"].items())
        if inside and serves(row, arch, dtype):
            return index
    return None


def arithmetic(dtype: torch.dtype, precision: str) -> str:
    """What tables call a dtype: ``"tf32"`` for fp32 with products in tf32, else its name."""
    return precision if precision == "tf32" else str(dtype).removeprefix("torch.")


def alternatives(operator: str, row: int) -> list[dict[str, int]]:
    """What the tuner tries besides the configuration of a row; nothing for the row -1."""
    return [] if row < 0 else list(table(operator)[row].get("alternatives", []))


def choose(operator: str, target: Target, dtype: str, call: Sequence[Any], **features: int) -> dict[str, int]:
    """The configuration of a call: its setting if it has one, else the table's row that serves it, else the model's pick.

    Args:
        operator: its name.
        target: what for.
        dtype: as :func:`arithmetic` gives it.
        call: the operator's arguments without the dispatch ones, all of them.
        features: what rows of the table go by.

    Returns:
        Names to integers, among them ``row``: the number of the table's row, or -1; :func:`origin` puts it in words.
    """
    setting = settings.current()
    rows = table(operator)
    index = find(rows, target.arch, dtype, features)
    if index is not None:
        return {**rows[index]["config"], **setting, "row": index, "tuned": int(bool(setting))}
    chosen = model.candidates(operator, dtype)[0] if setting else model.pick(operator, call, target, dtype)
    return {**chosen, **setting, "row": -1, "tuned": int(bool(setting))}


def varied(base: dict[str, int], *changes: dict[str, int]) -> list[dict[str, int]]:
    """``base``, and ``base`` with each of ``changes``."""
    return [base, *({**base, **changed} for changed in changes)]


def origin(config: dict[str, int]) -> str:
    """Where a configuration is from: ``"tuned"``, ``"table row 3"`` or ``"cost model"``."""
    if config["tuned"]:
        return "tuned"
    return "cost model" if config["row"] < 0 else f"table row {config['row']}"
