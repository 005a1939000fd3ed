"""The table of docs/accelerate.md, from real runs: ``python -m tests.patching.table`` in the project's root writes it anew."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import torch

import lowkernels
from lowkernels.ops import OPERATORS
from lowkernels.report import Report, Row
from tests import torchvision_stub
from tests.patching.zoo import ZOO, Entry

PAGE = Path(__file__).parents[2] / "docs" / "accelerate.md"
_BEGIN, _END = "<!-- table -->\n", "<!-- end of table -->\n"
_HEADER = (
    "| family | model | run as operators | BatchNorm folded | left as they are, and why |",
    "|---|---|---|---:|---|",
)
_REASONS_SHOWN = 3


def line(entry: Entry, report: Report) -> str:
    """One model's line."""
    kinds = Counter(row.kind for row in report.replaced)
    operators = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()) if kind in OPERATORS)
    folded = sum(n for kind, n in kinds.items() if kind not in OPERATORS)
    # Names and sizes differ from block to block; the reason is the same.
    why = Counter((row.kind, re.sub(r" \([^)]*\)|: \w*(Error|Exception): .*", "", row.reason)) for row in report if _left(row))
    reasons = [f"{n} {kind}: {reason}" for (kind, reason), n in why.most_common(_REASONS_SHOWN)]
    more = sum(why.values()) - sum(n for _, n in why.most_common(_REASONS_SHOWN))
    if more:
        reasons.append(f"{more} more")
    return f"| {entry.family} | {entry.name} | {operators or 'none'} | {folded} | {'; '.join(reasons) or 'nothing'} |"


def _left(row: Row) -> bool:
    return not row.replaced and row.name != ""


def main() -> None:
    torch.set_num_threads(1)
    torchvision_stub.install()
    lines = [*_HEADER]
    for entry in ZOO:
        model = lowkernels.accelerate(entry.build().eval(), backend="eager")
        lines.append(line(entry, lowkernels.report(model)))
        print(lines[-1], flush=True)
    text = PAGE.read_text()
    start, end = text.index(_BEGIN) + len(_BEGIN), text.index(_END)
    PAGE.write_text(text[:start] + "\n".join(lines) + "\n" + text[end:])


if __name__ == "__main__":
    main()
