"""What happened to each module of a model, and why."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from . import dispatch
from .nn.block import FusedBlock, check_is_module
from .ops import OPERATORS

if TYPE_CHECKING:
    from rich.table import Table

_HEADER = ("module", "kind", "replaced", "backend", "ran on", "NHWC copies", "reason", "limits")
# The summary counts rows of tables together.
_ROW_NUMBER = re.compile(r"(?<=table row) \d+$")
# Where accelerate() notes, on the model, what it decided about modules that are not FusedBlocks.
NOTES = "_lowkernels_notes"


@dataclass(frozen=True)
class Row:
    """One module that was looked at.

    Attributes:
        name: its dotted name in the model.
        kind: the operator it runs as; for others, its class.
        replaced: whether it runs one of this library's operators, or was otherwise changed.
        backend: the backend asked for; empty where nothing was replaced.
        reason: why it was or was not replaced, and why it ran on what it ran on.
        limits: the inputs the chosen backend serves.
        ran_on: the backend that ran its latest eager eval-mode forward; empty before one.
        layout_copies: inputs that forward had to copy to NHWC; None before one.
        sizes: where the tile sizes that forward ran with are from, as :class:`lowkernels.Choice` has it; ``"cost model"`` is what
            ``lowkernels tune`` may improve on.
    """

    name: str
    kind: str
    replaced: bool
    backend: str
    reason: str
    limits: str = ""
    ran_on: str = ""
    layout_copies: int | None = None
    sizes: str = ""

    def cells(self) -> tuple[str, ...]:
        copies = "" if self.layout_copies is None else str(self.layout_copies)
        replaced = "yes" if self.replaced else "no"
        return (self.name, self.kind, replaced, self.backend, self.ran_on, copies, self.reason, self.limits)


@dataclass(frozen=True)
class Report:
    """The rows of :func:`report`, in the model's order. ``print(report)`` gives a plain table, ``show()`` the terminal's best."""

    rows: tuple[Row, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def replaced(self) -> tuple[Row, ...]:
        """The rows of modules that were replaced."""
        return tuple(row for row in self.rows if row.replaced)

    def __str__(self) -> str:
        table = [_HEADER, *(row.cells() for row in self.rows)]
        widths = [max(len(cells[i]) for cells in table) for i in range(len(_HEADER))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip() for cells in table]
        return "\n".join([*lines, self._summary()])

    def _summary(self) -> str:
        counts = Counter(_ROW_NUMBER.sub("", row.sizes) for row in self.rows if row.sizes)
        sizes = ", ".join(f"{count} {sizes}" for sizes, count in counts.most_common())
        return f"{len(self.replaced)} of {len(self.rows)} modules replaced" + (f"; sizes: {sizes}" if sizes else "")

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(caption=self._summary())
        for title in _HEADER:
            # A name that is cut off names nothing.
            table.add_column(title, no_wrap=title == "module")
        for row in self.rows:
            # As Text: brackets in names and messages are no markup.
            table.add_row(*map(Text, row.cells()), style=None if row.replaced else "dim")
        return table

    def show(self) -> None:
        """Print the table: on a terminal with rich where it is installed; as plain text, a line each module, otherwise."""
        try:
            from rich.console import Console
        except ImportError:
            print(self)
            return
        console = Console()
        if console.is_terminal or console.is_jupyter:
            console.print(self)
        else:  # rich would take a line to have 80 characters
            print(self)


def report(model: nn.Module) -> Report:
    """Say for every module of ``model`` that was looked at what happened to it and why.

    Works on models from :func:`lowkernels.accelerate`, from ``lowformer.create_model`` and on hand-built ones that use
    ``lowkernels.nn``. After a forward in eval mode it also says which backend ran each block and how many inputs were copied to
    NHWC.

    Args:
        model: any model.

    Raises:
        InputError: ``model`` is no module.
    """
    check_is_module(model, "report")
    notes: dict[str, Row] = {}
    for prefix, module in model.named_modules():
        for name, row in module.__dict__.get(NOTES, {}).items():
            full = ".".join(part for part in (prefix, name) if part)
            notes[full] = replace(row, name=full)
    rows = []
    seen = set()
    for name, module in model.named_modules():
        if isinstance(module, FusedBlock) and module.operator_name in OPERATORS:
            rows.append(_block_row(name, module))
            seen.add(name)
        elif name in notes:
            rows.append(notes[name])
            seen.add(name)
    # Notes about the model as a whole, and about modules that are now inside a replaced one, come last.
    rows += [row for name, row in notes.items() if name not in seen]
    return Report(tuple(rows))


def _block_row(name: str, block: FusedBlock) -> Row:
    call = block.last_call
    common: dict[str, Any] = {"name": name, "kind": block.operator_name, "replaced": True, "backend": block.backend}
    if call is None:
        return Row(**common, reason="structure matches the operator; no eager forward in eval mode yet")
    choice, copies = call
    refused = "".join(f"; not {backend}: {reason}" for backend, reason in choice.rejected)
    limits = getattr(dispatch.kernel(choice.operator, choice.backend), "LIMITS", "any N, H, W")
    ran: dict[str, Any] = {"ran_on": choice.backend, "layout_copies": copies, "sizes": choice.sizes}
    return Row(**common, reason=choice.why + refused, limits=limits, **ran)
