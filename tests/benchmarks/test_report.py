"""The HTML page of a folder of results: what stands in it, that it is valid, asks for nothing, and works in a browser."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from benchmarks import render, report, rows
from benchmarks.cli import main
from benchmarks.report.markup import Cell, Column, inline_svg, markdown, table
from benchmarks.rows import Results, Row
from tests.benchmarks import chromium

RUN: dict[str, Any] = {
    "kind": "run",
    "command": "python -m benchmarks models --contenders 'a|b <c>'",
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "dirty": False,
    "date": "2026-01-02 03:04 UTC",
    "device": "cpu",
    "device_name": "Some <b>CPU</b>",
    "threads": 2,
    "cores": 2,
    "system": "Linux",
    "versions": {"python": "3.12.1", "torch": "2.13.0+cpu"},
    "disturbance_seen_by": "a gauge",
}
MODULES = [
    {"kind": "mbconv", "replaced": True, "ran_on": "cpu", "reason": "first choice of auto", "names": ["stages.0.0", "stages.0.1"]},
    {"kind": "Block", "replaced": False, "ran_on": "", "reason": "shares <a> module", "names": ["stages.1"]},
]


def row(contender: str, ms: float | None, batch: int = 1, **given: Any) -> Row:
    made = Row("model", "lowformer_b1", 224, batch, "float32", contender, ours=contender.startswith("lowkernels"), turns=9)
    if ms is not None:
        made.ms, made.ms_low, made.ms_high, made.images_per_s = ms, 0.99 * ms, 1.01 * ms, 1e3 * batch / ms
        made.tflops, made.gb_per_s = 1.0 / ms, 10.0 / ms
        made.share_of_product, made.share_of_copy, made.share_of_floor, made.floor_ms = 2.5 / ms, 0.25 / ms, 2.5 / ms, 2.5
        made.error = {"frobenius": 1e-7, "maximum": 1e-6, "frobenius_budget": 2e-7, "maximum_budget": 2e-6}
    for name, value in given.items():
        setattr(made, name, value)
    return made


def results() -> Results:
    """A case that is won, one that is lost, one that is even, one that was disturbed; something of every status."""
    groups = [
        [row("eager", 20.0), row("OpenVINO", 9.0), row("lowkernels, auto", 3.0, modules=MODULES, dropped=4)],
        [row("eager", 90.0, 2), row("OpenVINO", 40.0, 2), row("lowkernels, auto", 100.0, 2, modules=MODULES)],
        [row("eager", 200.0, 16), row("OpenVINO", 80.0, 16), row("lowkernels, auto", 81.0, 16)],
        [row("eager", 5e3, 256), row("OpenVINO", 2e3, 256, disturbed=True), row("lowkernels, auto", 1e3, 256)],
    ]
    groups[0] += [
        row("ONNX Runtime", None, status=rows.FAILED, reason="Invalid<Graph>: no & luck"),
        row("torch.compile", None, status=rows.LEFT_OUT, reason="left out of quick runs"),
        row("cheat", None, status=rows.WRONG, reason="error 1; allowed 0.1"),
    ]
    for group in groups:
        rows.fill_ratios(group)
    other = [
        {"kind": "unmeasured", "key": ["model", "lowformer_b3", 512, 16, "float32"], "stage": "", "reason": "no time left"},
        {
            "kind": "correctness",
            "backend": "cpu",
            "dtype": "float32",
            "layer": "gn_mlp 8",
            "outcome": "wrong",
            "reason": "is <off>",
        },
        {"kind": "correctness", "backend": "cpu", "dtype": "float32", "layer": "gn_mlp 9", "outcome": "right"},
    ]
    ceiling = {"kind": "ceiling", "dtype": "float32", "product": "matrix product", "tflops": 0.4, "gb_per_s": 40.0}
    point = row("lowkernels, auto", 3.0, point={"factor": 2, "way": "both"})
    experiments = {"of my own": Results(runs=[RUN], rows=[point])}
    return Results([RUN], [ceiling], [r for g in groups for r in g], other, experiments)


VOID = {"meta", "link", "br", "hr", "img", "input", "col", "source", "wbr"}


class Document(HTMLParser):
    """What has to hold of every page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.problems: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.elsewhere: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        self.problems += [f"<{tag}> is not closed" for tag in self.open]

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]], closed: bool = False) -> None:
        given = dict(attributes)
        if len(given) != len(attributes):
            self.problems.append(f"<{tag}> has an attribute twice: {attributes}")
        self.ids += [given["id"] or ""] if "id" in given else []
        for name in ("aria-labelledby", "for"):
            self.references += (given.get(name) or "").split()
        for name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
            target = given.get(name)
            if target is not None and target.startswith("#"):
                self.references.append(target[1:])
            elif target is not None:
                self.elsewhere.append(target)
        self.references += re.findall(r"url\(#([^)]+)\)", " ".join(v or "" for v in given.values()))
        if tag not in VOID and not closed:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes, closed=True)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open[-1] != tag:
            self.problems.append(f"</{tag}> closes {self.open[-1:] or 'nothing'}")
        else:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data.strip()))

    def of(self, tag: str) -> list[str]:
        return [text for where, text in self.texts if where == tag]


@functools.cache
def page_of(name: str) -> str:
    """The page of a committed device, or of what is made up here."""
    return report.page(render.committed()[name] if name else results())


@pytest.mark.parametrize("name", ["", *render.committed()])
def test_pages_are_valid_and_ask_for_nothing(name: str) -> None:
    page = page_of(name)
    document = Document(page)
    assert document.problems == []
    assert len(set(document.ids)) == len(document.ids)
    assert set(document.references) <= set(document.ids)
    assert document.elsewhere == []
    style_and_script = "".join(document.of("style") + document.of("script"))
    assert not re.search(r"@import|url\(|https?:|fetch\(|XMLHttpRequest|import\(", style_and_script)
    assert page.startswith("<!DOCTYPE html>")
    assert len(document.of("h1")) == 1


def test_what_came_from_a_file_is_text() -> None:
    document = Document(page_of(""))
    assert document.of("h1") == ["lowkernels on Some <b>CPU</b>"]
    assert "Invalid<Graph>: no & luck" in document.of("td")
    assert "python -m benchmarks models --contenders 'a|b <c>'" in document.of("code")


def test_wins_and_losses_are_said_in_words() -> None:
    document = Document(page_of(""))
    cells = document.of("td")
    assert "3.00x ▲ faster" in cells
    assert "0.40x ▼ slower" in cells
    assert "0.99x ● even" in cells
    assert "disturbed" in cells
    assert document.of("b")[:3] == ["1", "1", "1"]
    assert "than the fastest rival, of 4; 1 disturbed, so without a verdict; geometric mean 1.06x of its speed" in document.of("p")


def test_everything_in_the_rows_has_its_place() -> None:
    document = Document(page_of(""))
    text = [t for _, t in document.texts]
    for expected in (
        "left out of quick runs",
        "error 1; allowed 0.1",
        "lowformer_b3, 512 px, batch 16, fp32: no time left",
        "cpu, float32, gn_mlp 8: is <off>",
        "matrix product",
        "shares <a> module",
        "stages.0.0, stages.0.1",
        "0123456789abcdef0123456789abcdef01234567",
        "2026-01-02 03:04 UTC",
        "Experiment: of my own",
        "factor",
    ):
        assert expected in text, expected
    # Two cases with the same report are told once.
    assert [t for t in text if "modules replaced" in t] == ["· lowkernels, auto · 2 of 3 modules replaced"]
    assert "224 px, batch 1, fp32; 224 px, batch 2, fp32" in text
    # 4 of the turns of all 15 - 3 timed rows were dropped.
    assert "108 turns were counted, 4 dropped because other processes were in the way." in text


def test_a_subject_measured_twice_stands_there_once() -> None:
    found = results()
    again = [row("eager", 21.0), row("lowkernels, auto", 7.0)]
    rows.fill_ratios(again)
    found.rows += again
    cells = Document(report.page(found)).of("td")
    assert "7.00 ±1 %" in cells
    assert "20.0 ±1 %" not in cells


def test_without_matplotlib_the_page_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    document = Document(report.page(results()))
    assert "pip install 'lowkernels[plot]'" in document.of("code")
    assert document.problems == []
    assert "0.40x ▼ slower" in document.of("td")


def test_pictures_stand_in_the_page() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib draws the pictures")
    for name in render.committed():
        page = page_of(name)
        assert page.count("<svg") == page.count("<figcaption>") > 0
        assert "<metadata>" not in page
        return
    pytest.fail("there are no committed results")


def test_ids_of_pictures_are_made_unique() -> None:
    svg = (
        '<?xml version="1.0"?>\n<!DOCTYPE svg PUBLIC "x" "http://x">\n<svg><metadata>x</metadata><g id="p1"/><g id="p10"/>'
        '<use xlink:href="#p1"/><path clip-path="url(#p10)"/></svg>'
    )
    assert inline_svg(svg, "a") == (
        '<svg><g id="a-p1"/><g id="a-p10"/><use xlink:href="#a-p1"/><path clip-path="url(#a-p10)"/></svg>'
    )


def test_tables_are_escaped_and_sorted_by_value() -> None:
    columns = [Column[float]("a<b", lambda v: Cell(f"<{v}>", v), numeric=True)]
    text = table("t", "x & y", columns, [1.5], lambda v: {"kind": '"'})
    assert '<caption id="t-caption">x &amp; y</caption>' in text
    assert '<th scope="col" class="number">a&lt;b</th>' in text
    assert '<tr data-kind="&quot;"><th scope="row" class="number" data-value="1.5">&lt;1.5&gt;</th></tr>' in text


def test_markdown_tables_sort_by_their_first_number() -> None:
    text = "model_x, `fp32`:\n\n| px | eager ms |\n| --- | ---: |\n| 64 | ~1,046.5 ±1 % |\n| a \\| b | – |\n\nThat <was> it."
    found = markdown("t", text)
    assert Document(found).problems == []
    assert '<caption id="t-1-caption">model_x, <code>fp32</code></caption>' in found
    assert '<td class="number" data-value="1046.5">~1,046.5 ±1 %</td>' in found
    assert '<th scope="row" data-value="a | b">a | b</th><td class="number" data-value="">–</td>' in found
    assert found.endswith("<p>That &lt;was&gt; it.</p>")


def test_report_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "no results (*.jsonl) in" in capsys.readouterr().err
    folder = tmp_path / "some_cpu"
    writer = rows.Writer(folder / "benchmark-models.jsonl")
    writer.write(RUN, *results().rows)
    writer.close()
    assert main(["report", str(tmp_path)]) == 2
    assert f"there are some in {folder}" in capsys.readouterr().err
    assert main(["report", str(folder)]) == 0
    assert Document((folder / "report.html").read_text()).problems == []
    assert main(["report", str(folder), "--out", str(tmp_path / "new" / "page.html")]) == 0
    assert (tmp_path / "new" / "page.html").read_text() == (folder / "report.html").read_text()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Chromium]:
    program = chromium.found()
    if program is None:
        pytest.skip(f"no Chromium found: looked for {', '.join(chromium.NAMES)}")
    folder = tmp_path_factory.mktemp("browser")
    (folder / "page.html").write_text(page_of(""), encoding="utf-8")
    with chromium.Chromium(program, folder / "profile") as running:
        running.open(folder / "page.html")
        yield running


COLUMN = """
(title) => {
  const table = document.querySelector("#table-models");
  const index = [...table.tHead.rows[0].cells].findIndex((cell) => cell.textContent === title);
  return { header: table.tHead.rows[0].cells[index], index, rows: [...table.tBodies[0].rows] };
}
"""


def column(browser: chromium.Chromium, title: str) -> list[str]:
    script = f"(() => {{ const c = ({COLUMN})('{title}'); return c.rows.map((row) => row.cells[c.index].textContent); }})()"
    found: list[str] = browser.value(script)
    return found


def click(browser: chromium.Chromium, title: str) -> str:
    script = f"(() => {{ const c = ({COLUMN})('{title}'); c.header.querySelector('button').click(); return c.header.ariaSort; }})()"
    found: str = browser.value(script)
    return found


def test_headers_sort_by_number_and_say_so(browser: chromium.Chromium) -> None:
    title = "lowkernels, ms"
    assert click(browser, title) == "ascending"
    assert column(browser, title) == ["3.00 ±1 %", "81.0 ±1 %", "100 ±1 %", "1,000 ±1 %"]
    assert column(browser, "batch") == ["1", "16", "2", "256"]
    assert click(browser, title) == "descending"
    assert column(browser, title) == ["1,000 ±1 %", "100 ±1 %", "81.0 ±1 %", "3.00 ±1 %"]
    # What has no value is last both ways, and only one header says that it is sorted by.
    for _ in range(2):
        click(browser, "over fastest rival")
        assert column(browser, "over fastest rival")[-1] == "disturbed"
    sorted_by = "[...document.querySelectorAll('#table-models th[aria-sort]')].filter((h) => h.ariaSort !== 'none').length"
    assert browser.value(sorted_by) == 1


def test_filters_hide_rows_of_every_table(browser: chromium.Chromium) -> None:
    choose = "{{ const s = document.querySelector('#filter-batch'); s.value = '{}'; s.form.dispatchEvent(new Event('change')); }}"
    shown = "[...document.querySelectorAll('#{} tbody tr')].filter((row) => row.checkVisibility()).length"
    count = "document.querySelector('.filters output').value"
    everything = len(results().rows) + 4
    assert browser.value(count) == f"{everything} rows"
    browser.value(choose.format(2))
    assert (browser.value(shown.format("table-models")), browser.value(shown.format("table-measurements"))) == (1, 3)
    assert browser.value(count) == f"4 of {everything} rows"
    browser.value("document.querySelector('.filters button[type=reset]').click()")
    assert browser.value(f"new Promise((done) => setTimeout(() => done({count})))") == f"{everything} rows"
    assert browser.value(shown.format("table-models")) == 4


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_pages_fit_every_width_and_can_be_read(browser: chromium.Chromium, width: int, dark: bool) -> None:
    browser.resize(width, 800, dark)
    # Tables scroll within themselves; the page does not, sideways.
    assert browser.value("document.documentElement.scrollWidth") <= width
    colours = browser.value(
        "['body', '.from', '.score .faster', '.score .slower', '.score .even', 'nav a']"
        ".map((s) => getComputedStyle(document.querySelector(s)).color)"
    )
    paper = luminance(browser.value("getComputedStyle(document.body).backgroundColor"))
    assert (paper < 0.05) == dark
    for colour in colours:
        lighter, darker = sorted((luminance(colour), paper), reverse=True)
        # What the Web Content Accessibility Guidelines ask of text, level AA.
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (colour, dark)


def luminance(colour: str) -> float:
    """Relative luminance of ``rgb(r, g, b)`` as the guidelines define it."""
    parts = [int(v) / 255 for v in re.findall(r"\d+", colour)[:3]]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_a_browser_has_no_complaint_and_asks_for_the_page_alone(browser: chromium.Chromium) -> None:
    assert browser.complaints() == []
    assert [url.rsplit("/", 1)[-1] for url in browser.requests()] == ["page.html"]
