"""HTML of tables, facts and pictures. Everything that comes from a results file is escaped here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Cell(NamedTuple):
    """What stands in a cell.

    Attributes:
        text: to read.
        value: to sort by; None comes last, whichever way it is sorted.
        mark: class of the cell.
        gauge: share from -1 to 1 that a bar below the text shows, to the left or the right of its middle.
        below: in small letters below the text, where the page is narrow.
    """

    text: str
    value: float | str | None = None
    mark: str = ""
    gauge: float | None = None
    below: str = ""


@dataclass(frozen=True)
class Column(Generic[T]):
    """A column of a table.

    Attributes:
        title: its header.
        cell: from a record to what stands in its cell.
        numeric: flush right, sorted by number.
        help: what it means, shown to who points at the header.
        wide: left out where the page is narrow.
    """

    title: str
    cell: Callable[[T], Cell]
    numeric: bool = False
    help: str = ""
    wide: bool = False

    @property
    def mark(self) -> str:
        return " ".join([*(["number"] if self.numeric else []), *(["wide"] if self.wide else [])])


def table(
    name: str,
    caption: str,
    columns: Sequence[Column[T]],
    records: Iterable[T],
    filters: Callable[[T], Mapping[str, str]] | None = None,
    mark: Callable[[T], str] = lambda record: "",
) -> str:
    """A table that scrolls by itself where it is wider than the page.

    Args:
        name: unique in the page.
        caption: above the table.
        columns: the first one is the header of its row.
        records: one a row.
        filters: from a record to its values by the name of a filter; tables without one are not filtered.
        mark: class of a record's row.
    """
    head = "".join(f'<th scope="col"{_class(c.mark)}{_attribute("title", c.help)}>{escape(c.title)}</th>' for c in columns)
    body = "\n".join(_row(columns, record, filters, mark) for record in records)
    return (
        f'<div class="scroll" role="region" aria-labelledby="{name}-caption" tabindex="0">\n'
        f'<table id="{name}" class="sortable"{" data-filtered" if filters else ""}>\n'
        f'<caption id="{name}-caption">{prose(caption)}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def _row(
    columns: Sequence[Column[T]], record: T, filters: Callable[[T], Mapping[str, str]] | None, mark: Callable[[T], str]
) -> str:
    data = "".join(_attribute(f"data-{key}", value) for key, value in (filters(record) if filters else {}).items())
    cells = "".join(_cell(column, column.cell(record), first=index == 0) for index, column in enumerate(columns))
    return f"<tr{_class(mark(record))}{data}>{cells}</tr>"


def _cell(column: Column[Any], cell: Cell, first: bool) -> str:
    tag, scope = ("th", ' scope="row"') if first else ("td", "")
    value = "" if cell.value is None else str(cell.value)
    classes = " ".join(c for c in (column.mark, cell.mark) if c)
    below = f'<small class="narrow">{escape(cell.below)}</small>' if cell.below else ""
    inside = f"{escape(cell.text)}{below}{_gauge(cell.gauge)}"
    return f'<{tag}{scope}{_class(classes)} data-value="{escape(value)}">{inside}</{tag}>'


def _gauge(share: float | None) -> str:
    if share is None:
        return ""
    share = max(-1.0, min(1.0, share))
    start, width = (50.0 if share >= 0 else 50.0 + 50.0 * share), 50.0 * abs(share)
    return f'<span class="gauge" aria-hidden="true"><i style="left:{start:.1f}%;width:{width:.1f}%"></i></span>'


def _class(names: str) -> str:
    return _attribute("class", names)


def _attribute(name: str, value: str) -> str:
    return f' {name}="{escape(value)}"' if value else ""


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """A list of names and what they are; a value between backquotes is code."""
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{prose(value)}</dd>" for name, value in pairs if value) + "</dl>"


def prose(text: str) -> str:
    """Escaped text in which what stands between backquotes is code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def bullets(items: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{prose(item)}</li>" for item in items) + "</ul>"


_FIRST_NUMBER = re.compile(r"[~*]*(-?[\d,]*\.?\d+)")


def markdown(name: str, text: str) -> str:
    """The tables and paragraphs of a Markdown text; a paragraph right before a table becomes its caption.

    Args:
        name: of the tables, with a number added to each.
        text: paragraphs of plain text and code, and tables as :func:`benchmarks.render.table` makes them.
    """
    blocks = [block for block in text.split("\n\n") if block.strip()]
    parts: list[str] = []
    for index, block in enumerate(blocks):
        if block.startswith("|"):
            captioned = index > 0 and not blocks[index - 1].startswith("|")
            caption = blocks[index - 1].rstrip(":") if captioned else "Results"
            if captioned:
                parts.pop()
            parts.append(_markdown_table(f"{name}-{index}", caption, block))
        else:
            parts.append(f"<p>{prose(block)}</p>")
    return "\n".join(parts)


def _markdown_table(name: str, caption: str, text: str) -> str:
    lines = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines()]
    header, rules, *body = lines
    columns = [_markdown_column(i, title, rule.endswith(":")) for i, (title, rule) in enumerate(zip(header, rules, strict=True))]
    return table(name, caption, columns, body)


def _markdown_column(index: int, title: str, numeric: bool) -> Column[list[str]]:
    def cell(line: list[str]) -> Cell:
        text = line[index].replace("**", "").replace("\\|", "|")
        number = _FIRST_NUMBER.match(text)
        if numeric:
            return Cell(text, float(number[1].replace(",", "")) if number else None)
        return Cell(text, text.lower())

    return Column(title, cell, numeric=numeric)


def select(name: str, label: str, values: Iterable[str], every: str) -> str:
    """A filter: the name is that of the rows' ``data-`` attribute."""
    options = "".join(f'<option value="{escape(v)}">{escape(v)}</option>' for v in values)
    return (
        f'<label for="filter-{name}">{escape(label)}<select id="filter-{name}" data-filter="{name}">'
        f'<option value="">{escape(every)}</option>{options}</select></label>'
    )


_DECLARATIONS = re.compile(r"<\?xml.*?\?>|<!DOCTYPE.*?>|<!--.*?-->|<metadata>.*?</metadata>", re.DOTALL)
_IDS = re.compile(r'\bid="([^"]+)"')


def inline_svg(svg: str, name: str) -> str:
    """An SVG document as part of the page: no declarations or metadata, and its ids made unique by ``name``."""
    text = _DECLARATIONS.sub("", svg).strip()
    for old in sorted(set(_IDS.findall(text)), key=len, reverse=True):
        new = f"{name}-{old}"
        text = text.replace(f'id="{old}"', f'id="{new}"')
        text = text.replace(f'href="#{old}"', f'href="#{new}"').replace(f"url(#{old})", f"url(#{new})")
    return text


def by(found: Iterable[T], key: Callable[[T], Any]) -> Iterator[tuple[Any, list[T]]]:
    """Records grouped by a key, in the order the keys first come."""
    groups: dict[Any, list[T]] = {}
    for record in found:
        groups.setdefault(key(record), []).append(record)
    yield from groups.items()
