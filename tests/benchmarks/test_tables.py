"""Rows, their ratios, and the tables made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import provenance, render, rows
from benchmarks.cli import main
from benchmarks.rows import Row

RUN: dict[str, Any] = {
    "kind": "run",
    "command": "python -m benchmarks models",
    "commit": "0123456789abcdef",
    "dirty": False,
    "date": "2026-01-02 03:04 UTC",
    "device": "cpu",
    "device_name": "Some(R) Processor 9 16-Core",
    "threads": 2,
    "versions": {"python": "3.12.1", "torch": "2.13.0+cpu"},
    "disturbance_seen_by": "a gauge",
}


def row(contender: str, ms: float | None = None, **kwargs: Any) -> Row:
    given: dict[str, Any] = {"ms": ms, "ours": contender.startswith("lowkernels"), "turns": 9, **kwargs}
    if ms is not None:
        given |= {"ms_low": 0.9 * ms, "ms_high": 1.1 * ms, "images_per_s": 4e3 / ms, "share_of_floor": 1 / ms}
    return Row("model", "lowformer_b1", 224, 4, "float32", contender, **given)


def group() -> list[Row]:
    found = [
        row("eager", 20.0, launches=464),
        row("OpenVINO", 5.0),
        row("fast but wrong", status=rows.WRONG, reason="error 0.5 (relative), 1 (largest); allowed 0.1, 0.2"),
        row("TorchScript", status=rows.FAILED, reason="RuntimeError: no | luck."),
        row("torch.compile", status=rows.LEFT_OUT, reason="left out of quick runs"),
        row("ONNX Runtime", status=rows.ABSENT, reason="onnxruntime not installed"),
        row("lowkernels, auto", 4.0, served={"cpu": 36}, dropped=3),
    ]
    rows.fill_ratios(found)
    return found


def by_name(found: list[Row]) -> dict[str, Row]:
    return {r.label: r for r in found}


def test_ratios_are_to_eager_and_to_the_fastest_rival() -> None:
    found = by_name(group())
    assert found["lowkernels, auto"].to_eager == pytest.approx(5.0)
    assert found["lowkernels, auto"].to_fastest_rival == pytest.approx(1.25)
    assert found["lowkernels, auto"].fastest_rival == "OpenVINO"
    assert found["OpenVINO"].to_fastest_rival == 1.0
    assert found["eager"].to_fastest_rival == pytest.approx(0.25)
    assert found["fast but wrong"].to_eager is None


def test_a_wrong_contender_is_no_rival_even_if_it_has_a_time() -> None:
    found = [row("eager", 20.0), row("cheat", 0.1, status=rows.WRONG), row("lowkernels, auto", 10.0)]
    rows.fill_ratios(found)
    assert found[2].fastest_rival == "eager"
    assert found[2].to_fastest_rival == 2.0


def test_our_own_rows_are_no_rivals() -> None:
    found = [row("eager", 20.0), row("lowkernels, auto", 4.0), row("lowkernels, eager", 2.0)]
    rows.fill_ratios(found)
    assert found[1].fastest_rival == "eager"


def test_eager_replayed_from_a_graph_is_a_rival_but_not_the_baseline() -> None:
    found = [row("eager", 20.0), row("eager", 5.0, graph=True), row("lowkernels, auto", 4.0)]
    rows.fill_ratios(found)
    assert found[2].to_eager == 5.0
    assert (found[2].fastest_rival, found[2].to_fastest_rival) == ("eager, CUDA graph", 1.25)


def test_no_ratio_to_or_from_a_disturbed_time() -> None:
    found = [row("eager", 20.0), row("OpenVINO", 5.0, disturbed=True), row("lowkernels, auto", 4.0)]
    rows.fill_ratios(found)
    assert (found[2].to_eager, found[2].to_fastest_rival) == (5.0, None)
    assert (found[1].to_eager, found[1].fastest_rival) == (None, None)


def test_table_shows_every_contender_fastest_first_and_why_others_have_no_time() -> None:
    text = render.contender_table(group())
    lines = text.splitlines()
    names = [line.split("|")[1].strip() for line in lines[2:5]]
    assert names == ["**lowkernels, auto**", "OpenVINO", "eager"]
    cells = [c.strip() for c in lines[2].split("|")[1:-1]]
    assert cells[1:5] == ["4.00 ±10 %", "1,000", "5.00x", "1.25x"]
    assert cells[-1] == "9 (3)"
    assert "Served by: lowkernels, auto: cpu 36x." in text
    assert "**Wrong, so not timed:** fast but wrong: error 0.5 (relative), 1 (largest); allowed 0.1, 0.2." in text
    assert "Failed: TorchScript (RuntimeError: no \\| luck)." in text
    assert "Absent: ONNX Runtime (onnxruntime not installed)." in text
    assert "Left out: torch.compile (left out of quick runs)." in text


def test_every_column_has_a_cell() -> None:
    for text in (render.contender_table(group()), render.overview([group()])):
        widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
        assert len(widths) == 1


def test_overview_names_fastest_rival_and_what_went_wrong() -> None:
    text = render.overview([group()])
    cells = [c.strip() for c in text.splitlines()[2].split("|")[1:-1]]
    assert cells[0] == "lowformer_b1, 224 px, batch 4, fp32"
    assert cells[2:4] == ["OpenVINO", "5.00 ±10 %"]
    assert cells[6:8] == ["5.00x", "1.25x faster"]
    assert cells[-1] == "2 sat out; fast but wrong; TorchScript"
    assert "Against the fastest rival: 1 faster, 0 even (spreads overlap), 0 slower; geometric mean 1.25x of its speed." in text


def test_tally_counts_losses() -> None:
    text = render.tally([render.FASTER, render.SLOWER, render.SLOWER, None], [2.0, 0.25])
    counts = "1 faster, 0 even (spreads overlap), 2 slower, 1 without a verdict (~: disturbed by other processes)"
    assert text == f"Against the fastest rival: {counts}; geometric mean 0.71x of its speed."


def test_replayed_graphs_are_compared_with_replayed_graphs() -> None:
    found = [
        row("eager", 20.0),
        row("eager", 5.0, graph=True),
        row("lowkernels, auto", 9.0),
        row("lowkernels, auto", 2.0, graph=True),
    ]
    rows.fill_ratios(found)
    text = render.headline(rows.Results(runs=[RUN], rows=found))
    expected = "**2.00 ±10 %** (CUDA graph) | eager, CUDA graph 5.00 ±10 % | 20.0 ±10 % | 2.50x faster |"
    assert f"| lowformer_b1, 224 px, batch 4, fp32 | {expected}" in text


@pytest.mark.parametrize(("ms", "found"), [(8.1, "faster"), (8.3, "even"), (12.1, "even"), (12.3, "slower")])
def test_only_spreads_that_do_not_overlap_make_a_verdict(ms: float, found: str) -> None:
    """The rival's middle half is 9 to 11 ms, ours goes 10 % to either side."""
    assert render.verdict(row("lowkernels, auto", ms), row("OpenVINO", 10.0)) == found
    assert render.verdict(row("lowkernels, auto", ms, disturbed=True), row("OpenVINO", 10.0)) is None


def test_the_headline_leaves_out_what_a_strong_rival_had_no_part_in() -> None:
    def case(size: int, *found: Row) -> list[Row]:
        for r in found:
            r.size = size
        rows.fill_ratios(found)
        return list(found)

    strong = case(224, row("eager", 20.0), row("OpenVINO", 5.0), row("lowkernels, auto", 8.0), row("lowkernels, eager", 7.0))
    weak = case(512, row("eager", 20.0), row("OpenVINO", status=rows.LEFT_OUT, reason="left out"), row("lowkernels, auto", 8.0))
    broken = case(64, row("eager", 20.0), row("OpenVINO", status=rows.FAILED, reason="it raised"), row("lowkernels, auto", 8.0))
    text = render.headline(rows.Results(runs=[RUN], rows=[*strong, *weak, *broken]))
    body = [line for line in text.splitlines() if line.startswith("| lowformer")]
    assert body == [
        "| lowformer_b1, 224 px, batch 4, fp32 | **8.00 ±10 %** | OpenVINO 5.00 ±10 % | 20.0 ±10 % | 0.62x slower |",
        "| lowformer_b1, 64 px, batch 4, fp32 | **8.00 ±10 %** | eager 20.0 ±10 % | 20.0 ±10 % | 2.50x faster |",
    ]
    assert "1 faster, 0 even (spreads overlap), 1 slower. Measured on Some(R) Processor 9 16-Core, 2 threads: `" in text
    assert "` (2026-01-02, " in text


def test_disturbed_times_are_marked() -> None:
    assert render.spread(row("eager", 4.0, disturbed=True)) == "~4.00 ±10 %"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0012345, "0.00123"), (1.0, "1.00"), (99.95, "100.0"), (1234.5, "1,234"), (0.0, "0"), (None, "–"), (float("inf"), "inf")],
)
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert render.number(value) == text


def test_results_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / rows.file_name("models", ["float32", "bfloat16"], RUN)
    writer = rows.Writer(path)
    writer.write(RUN, {"kind": "ceiling", "dtype": "float32", "product": "x", "tflops": 1.0, "gb_per_s": 2.0})
    writer.write(*group())
    writer.close()
    found = rows.read(path)
    assert found.run == RUN
    assert [r.label for r in found.rows] == [r.label for r in group()]
    assert found.rows[0].ms == 20.0
    report = render.report(found)
    assert "Measured on Some(R) Processor 9 16-Core, 2 threads. Versions: python 3.12.1, torch 2.13.0+cpu." in report
    assert "`python -m benchmarks models`, 2026-01-02 03:04 UTC, commit 0123456789ab." in report


def test_unknown_lines_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"kind": "op", "surprise": 1, "status": "ok"}\n')
    with pytest.raises(ValueError, match=r"line 1: unknown fields \['surprise'\]"):
        rows.read(path)
    path.write_text('{"no": "kind"}\n')
    with pytest.raises(ValueError, match="has no kind"):
        rows.read(path)


def test_file_names_are_like_timms() -> None:
    assert rows.file_name("models", ["float32", "bfloat16"], RUN) == "benchmark-models-fp32+bf16-nhwc-pt213-cpu-some_9_2t.jsonl"
    gpu = {**RUN, "device": "cuda", "device_name": "NVIDIA H200", "cuda": "13.0"}
    assert rows.file_name("ops", ["float16"], gpu) == "benchmark-ops-fp16-nhwc-pt213-cu130-h200.jsonl"


def test_commands_are_kept_without_the_folder_they_wrote_to() -> None:
    given = ["models", "--out", "/some/where", "--quick", "--contenders", "a|b"]
    assert provenance.command(given) == "python -m benchmarks models --quick --contenders 'a|b'"
    assert provenance.command(["ceilings"]) == "python -m benchmarks ceilings"
    stage = ["stage", "more-models", "--out", "/some/where", "--seconds", "31.5", "--device", "cpu", "--smoke"]
    assert provenance.command(stage) == "python -m benchmarks gpu --device cpu --smoke"


def test_a_subject_measured_again_replaces_the_first_measurement() -> None:
    first, second = [row("eager", 20.0), row("lowkernels, auto", 5.0)], [row("eager", 21.0), row("torch.compile", 10.0)]
    results = rows.Results(rows=[*first, *second])
    (found,) = results.groups().values()
    assert [r.ms for r in found] == [21.0, 10.0]


def test_documents_are_filled_between_markers_only(tmp_path: Path) -> None:
    results = tmp_path / "results"
    writer = rows.Writer(results / "some_9_2t" / "benchmark-models.jsonl")
    writer.write(RUN, *group())
    writer.close()
    document = tmp_path / "README.md"
    document.write_text(
        "before\n<!-- benchmarks:cpu-models:start -->\nold 42 ms\n<!-- benchmarks:cpu-models:end -->\nbetween\n"
        "<!-- benchmarks:gpu-headline:start -->\n<!-- benchmarks:gpu-headline:end -->\nafter\n"
    )
    before = document.read_text()
    assert render.render([document], results, check=True) == [document]
    assert document.read_text() == before
    assert render.render([document], results) == [document]
    text = document.read_text()
    assert "old 42 ms" not in text
    assert "| lowformer_b1, 224 px, batch 4, fp32 |" in text
    assert "Not measured yet on a GPU." in text
    assert [line for line in text.splitlines() if line in ("before", "between", "after")] == ["before", "between", "after"]
    assert render.render([document, tmp_path / "missing.md"], results) == []


def test_a_place_without_a_kind_has_every_device() -> None:
    results = [rows.Results(runs=[RUN], rows=group()), rows.Results(runs=[{**RUN, "device_name": "Other"}])]
    text = "<!-- benchmarks:headline:start -->\n<!-- benchmarks:headline:end -->"
    found = render.filled(text, results)
    assert "| lowformer_b1, 224 px, batch 4, fp32 | **4.00 ±10 %** | OpenVINO 5.00 ±10 % | 20.0 ±10 % | 1.25x faster |" in found
    assert "Measured on Some(R)" in found
    assert "No model was measured with every strong rival." in found
    assert "Not measured yet." in render.filled(text, [])
    # Tables of several devices of a kind tell whose they are.
    found = render.filled(text.replace("headline", "cpu-models"), results)
    assert "On Some(R) Processor 9 16-Core, 2 threads:" in found
    assert "On Other, 2 threads:" in found


def test_unknown_places_are_refused() -> None:
    with pytest.raises(ValueError, match="cpu-surprise; allowed are provenance"):
        render.filled("<!-- benchmarks:cpu-surprise:start -->\n<!-- benchmarks:cpu-surprise:end -->", [])


def test_documents_are_up_to_date_with_the_committed_rows() -> None:
    assert render.render(check=True) == [], "run `python -m benchmarks render`"


def test_committed_rows_can_be_trusted() -> None:
    """From a commit without changes, every time that of a result within its budget, and ratios that follow from the times."""
    for results in render.committed().values():
        assert results.run["commit"]
        assert not results.run["dirty"]
        for row in results.rows:
            if row.ms is not None:
                assert row.status == rows.OK
                assert row.error is not None
                assert row.error["frobenius"] <= row.error["frobenius_budget"]
                assert row.images_per_s == pytest.approx(1e3 * row.batch / row.ms, rel=1e-3)
        for group in results.groups().values():
            expected = [Row(**vars(r)) for r in group]
            rows.fill_ratios(expected)
            for r, e in zip(group, expected, strict=True):
                assert r.to_eager == (None if e.to_eager is None else pytest.approx(e.to_eager, rel=1e-3))
                assert r.to_fastest_rival == (None if e.to_fastest_rival is None else pytest.approx(e.to_fastest_rival, rel=1e-3))


def test_render_command_prints_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["render", "--results", str(tmp_path)]) == 2
    assert "no results in" in capsys.readouterr().err
    writer = rows.Writer(tmp_path / "a.jsonl")
    unmeasured = {"kind": "unmeasured", "key": ["model", "lowformer_b3", 512, 16, "float32"], "stage": "", "reason": "no time left"}
    writer.write(RUN, *group(), unmeasured)
    writer.close()
    assert main(["render", "--results", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "**lowkernels, auto**" in out
    assert "- lowformer_b3, 512 px, batch 16, fp32: no time left" in out
