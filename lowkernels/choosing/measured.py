"""Measured tables: how long each backend took for a call on a machine, and the settings it was fastest with.

``lowkernels tune`` writes one for the machine at hand into the cache folder (``LOWKERNELS_CACHE_DIR``, see
:func:`lowkernels.backends.native.cache_folder`), as ``tuned/<device>-<version>.json``; those in ``lowkernels/data/measured``
ship with the package. A table is::

    {"format": 1, "lowkernels": "0.1.0", "device": "NVIDIA H200", "arch": "sm_90", "rows": [
      {"operator": "gn_mlp", "call": "fc1_weight=512x128x1x1 ...", "dtype": "float16", "shape": [256, 14, 14],
       "us": {"eager": 90.1, "triton": 41.5}, "settings": {"triton": {"BM": 64}}, "measured": "2026-11-22, torch 2.11.0"}]}

A row serves calls with the same weight shapes and options whose number of images is within a factor of :data:`IMAGES` of its own,
and whose image area is within a factor of :data:`AREA`; of several, the nearest counts, of equally near ones the smaller. The
user's table is for the very device, the very number of CPU threads and this version of the library; a shipped one is for the
architecture, the same device first. A table that cannot be read, or is another machine's, is ignored with one warning.
``LOWKERNELS_TABLES=0`` ignores them all.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import os
import platform
import re
import tempfile
import threading
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._version import __version__

FORMAT = 1
SHIPPED = Path(__file__).parents[1] / "data" / "measured"
VARIABLE = "LOWKERNELS_TABLES"
IMAGES = 4.0
AREA = 2.0


class TableError(ValueError):
    """A table is not what this module's documentation says, or not of this machine."""


class Machine(NamedTuple):
    """What a measurement holds for.

    Attributes:
        device: the GPU's or the processor's name.
        arch: ``"sm_90"``; of a CPU, the instruction set PyTorch uses and the number of threads.
    """

    device: str
    arch: str

    @property
    def slug(self) -> str:
        """For file names."""
        kind = self.device if self.arch.startswith("sm_") else f"{self.device} {self.arch}"
        return re.sub(r"[^a-z0-9]+", "_", kind.lower()).strip("_")


class Described(NamedTuple):
    """What measurements tell calls apart by."""

    operator: str
    call: str
    dtype: str
    shape: tuple[int, int, int]


@dataclass(frozen=True)
class Row:
    """One call, measured.

    Attributes:
        operator: its name.
        call: weight shapes and options, as :func:`describe` writes them.
        dtype: ``"float16"`` and so on; ``"tf32"`` is float32 with products in tf32.
        shape: images, height and width of the input.
        us: microseconds of each backend at its best.
        settings: of the backends that were fastest with other settings than they choose themselves.
        measured: when, and with which versions.
    """

    operator: str
    call: str
    dtype: str
    shape: tuple[int, int, int]
    us: dict[str, float]
    settings: dict[str, dict[str, int]] = field(default_factory=dict)
    measured: str = ""

    @property
    def described(self) -> Described:
        return Described(self.operator, self.call, self.dtype, self.shape)


class Found(NamedTuple):
    """A row that serves a call, and where it is from."""

    row: Row
    machine: Machine
    shipped: bool


@functools.cache
def cpu_name() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@functools.cache
def _gpu(index: int) -> Machine:
    major, minor = torch.cuda.get_device_capability(index)
    return Machine(torch.cuda.get_device_name(index), f"sm_{major}{minor}")


def machine(device: torch.device) -> Machine | None:
    """The machine as far as it matters for work on ``device``; None for devices that nothing is measured on, or not here."""
    if device.type == "cuda":
        # Of fake tensors.
        if not torch.cuda.is_available():
            return None
        return _gpu(torch.cuda.current_device() if device.index is None else device.index)
    if device.type == "cpu":
        return Machine(cpu_name(), f"{torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()} threads")
    return None


def describe(operator: str, call: Sequence[Any]) -> Described | None:
    """What measurements tell a call by; None for a call without data.

    Args:
        operator: its name.
        call: its arguments without the dispatch ones, all of them. Tensors are asked for shape, dtype and device only.
    """
    from ..ops import OPERATORS

    x: Tensor = call[0]
    inputs = importlib.import_module(f"..ops.{operator}.contract", __package__).INPUTS
    words = []
    for name, value in zip(OPERATORS[operator].argument_names[1:], call[1:], strict=True):
        if name in inputs:
            words += [name] if value is not None else []
        elif isinstance(value, Tensor):
            # What a bias costs cannot be measured.
            words += [] if name.endswith("bias") else [f"{name}={'x'.join(map(str, value.shape))}"]
        elif isinstance(value, int):
            words.append(f"{name}={int(value)}")
    images, _, height, width = x.shape
    if images * height * width == 0:
        return None
    return Described(operator, " ".join(words), arithmetic(x), (int(images), int(height), int(width)))


def arithmetic(x: Tensor) -> str:
    """The dtype's name, or ``"tf32"`` for float32 on a GPU whose convolutions may use it."""
    if x.dtype == torch.float32 and x.is_cuda and torch.backends.cudnn.conv.fp32_precision == "tf32":  # type: ignore[attr-defined]
        return "tf32"
    return str(x.dtype).removeprefix("torch.")


def parse(text: str) -> tuple[dict[str, Any], list[Row]]:
    """The heading and the rows of a table.

    Raises:
        TableError: with the reason.
    """
    try:
        table = json.loads(text)
    except ValueError as error:
        raise TableError(f"not JSON: {error}") from error
    if not isinstance(table, dict) or not isinstance(table.get("rows"), list):
        raise TableError("not an object with rows")
    if table.get("format") != FORMAT:
        raise TableError(f"its format is {table.get('format')!r}; this version reads {FORMAT}")
    for name in ("lowkernels", "device", "arch"):
        if not isinstance(table.get(name), str):
            raise TableError(f"{name} is {table.get(name)!r}, not a string")
    return table, [_row(number, row) for number, row in enumerate(table["rows"])]


def _row(number: int, row: Any) -> Row:
    def wrong(why: str) -> TableError:
        return TableError(f"row {number}: {why}")

    names = [f.name for f in fields(Row)]
    if not isinstance(row, dict) or set(row) != set(names):
        raise wrong(f"has not exactly the keys {', '.join(names)}")
    if not all(isinstance(row[name], str) for name in ("operator", "call", "dtype", "measured")):
        raise wrong("operator, call, dtype or measured is not a string")
    shape = row["shape"]
    if not isinstance(shape, list) or len(shape) != 3 or not all(type(n) is int and n > 0 for n in shape):
        raise wrong(f"shape is {shape!r}, not three positive integers")
    us, settings = row["us"], row["settings"]
    if not isinstance(us, dict) or not us or not all(type(t) in (int, float) and 0 < t < math.inf for t in us.values()):
        raise wrong(f"us is {us!r}, not positive numbers by backend")
    if not isinstance(settings, dict) or not set(settings) <= set(us):
        raise wrong(f"settings is {settings!r}, not an object by backend")
    for setting in settings.values():
        if not isinstance(setting, dict) or not all(type(v) is int for v in setting.values()):
            raise wrong(f"the setting {setting!r} is not integers by name")
    return Row(**{**row, "shape": tuple(shape)})


def merged(*groups: Iterable[Row]) -> list[Row]:
    """Rows of all groups, in a fixed order; of those about the same call, the last."""
    rows = {row.described: row for group in groups for row in group}
    return [rows[key] for key in sorted(rows)]


def write(path: Path, of: Machine, rows: Iterable[Row]) -> None:
    """Write a table, replacing the file at once."""
    heading = {"format": FORMAT, "lowkernels": __version__, **of._asdict()}
    lines = ",\n".join("  " + json.dumps({k: _sorted(v) for k, v in asdict(row).items()}) for row in merged(rows))
    start = json.dumps(heading)[:-1]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}-", encoding="utf-8", delete=False) as file:
        file.write(f'{start}, "rows": [\n{lines}\n]}}\n')
    try:
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)
    except OSError:
        os.unlink(file.name)
        raise


def _sorted(value: Any) -> Any:
    return {key: _sorted(value[key]) for key in sorted(value)} if isinstance(value, dict) else value


def add(path: Path, of: Machine, rows: Iterable[Row]) -> list[Row]:
    """Write ``rows`` over those about the same calls in the table at ``path``, if there is a readable one of this machine; all of
    its rows then."""
    before = _read(path, of, own=False) or []
    together = merged(before, rows)
    write(path, of, together)
    return together


def user_path(of: Machine) -> Path:
    """Where the user's own table of a machine is."""
    from ..backends.native import cache_folder

    return cache_folder() / "tuned" / f"{of.slug}-{__version__}.json"


def shipped_path(of: Machine, folder: Path = SHIPPED) -> Path:
    """Where a machine's table is among those that ship with the package."""
    return folder / f"{of.slug}.json"


_lock = threading.Lock()
_Index = dict[tuple[str, str, str], list[Found]]
_loaded: dict[tuple[Machine, Path], _Index] = {}
_generation = 0


def generation() -> int:
    """Counts the changes of tables in this process: what was decided by earlier ones is out of date."""
    return _generation


def forget() -> None:
    """Read the tables anew when they are next needed."""
    global _generation
    with _lock:
        _loaded.clear()
        _generation += 1


def find(described: Described, of: Machine) -> Found | None:
    """The row that serves a call on a machine: the user's own before those that ship with the package."""
    if os.environ.get(VARIABLE) == "0":
        return None
    index = _index(of)
    near = [(distance, found) for found in index.get(described[:3], ()) if (distance := _distance(found, described)) is not None]
    # What is the user's own, then what is of this very device, then the nearest.
    rank = min(((f.shipped, f.machine != of, d, i) for i, (d, f) in enumerate(near)), default=None)
    return None if rank is None else near[rank[-1]][1]


def known(device: torch.device) -> set[Described]:
    """The calls in the user's table of a device."""
    of = machine(device)
    return set() if of is None else {f.row.described for group in _index(of).values() for f in group if not f.shipped}


def summary(of: Machine) -> str:
    """How much is measured for a machine, and where its own table is, in words."""
    found = [f for group in _index(of).values() for f in group]
    shipped = sum(f.shipped for f in found)
    return f"{', '.join(of)}: {len(found) - shipped} calls in {user_path(of)}, {shipped} in tables that ship with the package"


def _index(of: Machine) -> _Index:
    path = user_path(of)
    with _lock:
        if (of, path) not in _loaded:
            _loaded[of, path] = _load(of, path)
        return _loaded[of, path]


def _distance(found: Found, described: Described) -> float | None:
    (images, *size), (wanted, *wanted_size) = found.row.shape, described.shape
    more_images = abs(math.log(wanted / images))
    more_area = abs(math.log(math.prod(wanted_size) / math.prod(size)))
    if more_images > math.log(IMAGES) + 1e-9 or more_area > math.log(AREA) + 1e-9:
        return None
    return round(more_images + more_area, 9)


def _load(of: Machine, path: Path) -> _Index:
    index: _Index = {}
    for row in _read(path, of, own=True) or ():
        index.setdefault(row.described[:3], []).append(Found(row, of, False))
    for shipped in sorted(SHIPPED.glob("*.json")):
        try:
            heading, rows = parse(shipped.read_text(encoding="utf-8"))
        except (OSError, TableError) as error:
            _ignore(shipped, error)
            continue
        if heading["arch"] == of.arch and (of.arch.startswith("sm_") or heading["device"] == of.device):
            where = Machine(heading["device"], heading["arch"])
            for row in rows:
                index.setdefault(row.described[:3], []).append(Found(row, where, True))
    return index


def _read(path: Path, of: Machine, own: bool) -> list[Row] | None:
    """The rows of a machine's table; None, with a warning unless there is no such file, if it cannot be used. ``own``: it must be
    of this version of the library too."""
    try:
        heading, rows = parse(path.read_text(encoding="utf-8"))
        found = Machine(heading["device"], heading["arch"])
        if found != of:
            raise TableError(f"it is of another machine: {', '.join(found)}; this is {', '.join(of)}")
        if own and heading["lowkernels"] != __version__:
            raise TableError(f"it was measured with lowkernels {heading['lowkernels']}, this is {__version__}")
    except FileNotFoundError:
        return None
    except (OSError, TableError) as error:
        _ignore(path, error)
        return None
    return rows


def _ignore(path: Path, error: Exception) -> None:
    warnings.warn(f"lowkernels: the measured table {path} is ignored: {error}", RuntimeWarning, stacklevel=2)
