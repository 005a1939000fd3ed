"""Pictures: drawn from rows alone, the same bytes every time, readable on light and on dark pages."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from benchmarks import plots, render, rows
from benchmarks.cli import main
from benchmarks.experiments import EXPERIMENTS, QUICK
from benchmarks.plots import PLOTS, Missing, Picture, figures, pictures, style, svg, waterline
from benchmarks.rows import Results, Writer
from benchmarks.subjects import layers_of
from lowformer import list_models
from lowkernels.costs import Step
from tests.benchmarks.made import CEILING, RUN, experiment_results, no_module, timed


def everything() -> Results:
    """Results that every picture can be drawn from."""
    found = Results(runs=[RUN], ceilings=[CEILING])
    for index, layer in enumerate(layers_of("lowformer_b1", 224)):
        key = ("op", layer.name, layer.height, 1, "float32")
        found.rows += [
            timed(key, "eager", 1.0 + index, tflops=0.1),
            timed(key, "OpenVINO", 0.6, tflops=0.2),
            timed(key, "lowkernels, auto", 0.5, tflops=0.25),
        ]
    for index, name in enumerate(list_models()):
        key = ("model", name, 224, 1, "float32")
        found.rows += [
            timed(key, "eager", 20.0 + index, tflops=0.05),
            timed(key, "ONNX Runtime", 12.0 + index, tflops=0.1),
            timed(key, "lowkernels, auto", 8.0 + index, tflops=0.2),
        ]
    found.experiments = {e.name: experiment_results(e, QUICK) for e in EXPERIMENTS.values()}
    return found


@pytest.fixture(scope="module")
def drawn() -> dict[str, str]:
    """Every picture in light form."""
    return {picture.name: svg(figure) for picture, figure in figures(everything())}


def test_all_pictures_can_be_drawn(drawn: dict[str, str]) -> None:
    assert set(drawn) == set(PLOTS)
    assert {p.experiment for p in PLOTS.values() if p.experiment} == set(EXPERIMENTS)


@pytest.mark.parametrize("name", PLOTS)
def test_a_picture_says_what_when_and_where(name: str, drawn: dict[str, str]) -> None:
    root = ElementTree.fromstring(drawn[name])
    text = " ".join("".join(e.itertext()) for e in root.iter("{http://www.w3.org/2000/svg}text"))
    for expected in ("Some(R) Processor 9 16-Core, 2 threads", "2026-01-02", "commit 0123456789ab", "fp32"):
        assert expected in text
    units = {"waterline": "TFLOP/s", "layers": "time of the rival / time of lowkernels", "fusing": "million multiply-accumulates"}
    assert units.get(name, "ms") in text
    assert not re.search(r"\b20\d\d-\d\d-\d\dT", drawn[name]), "the time of drawing is in the file"


@pytest.mark.parametrize("picture", PLOTS.values(), ids=list(PLOTS))
def test_all_words_are_inside_and_bytes_repeat(picture: Picture) -> None:
    results = picture.part(everything())
    figure = picture(results)
    words = figure.get_tightbbox()  # in inches
    width, height = figure.get_size_inches()
    assert words.x0 >= 0
    assert words.y0 >= 0
    assert words.x1 <= width
    assert words.y1 <= height
    first = svg(figure)
    assert svg(picture(results)) == first


def test_themes_differ_in_colours_only(drawn: dict[str, str]) -> None:
    figure = PLOTS["gap"](everything())
    light, dark, css = (svg(figure, theme) for theme in style.THEMES)
    for of_light, of_dark in style.DARK.items():
        assert of_dark not in light
        assert of_light not in dark
        dark = dark.replace(of_dark, of_light)
        css = css.replace(f"var({style.VARIABLES[of_light]}, {of_light})", of_light)
    assert light == dark == css == drawn["gap"]
    with pytest.raises(ValueError, match="theme is 'pink'; allowed are light, dark, css"):
        svg(figure, "pink")


def _luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _contrast(one: str, other: str) -> float:
    high, low = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("page", ["#ffffff", "#0d1117"])
def test_words_and_lines_stand_out_on_light_and_dark_pages(page: str) -> None:
    """At least 4.5 to 1, what WCAG 2.2 asks of text."""
    for light, dark in style.DARK.items():
        if light not in (style.GRID, style.PAPER, style.FILL):
            assert _contrast(light if page == "#ffffff" else dark, page) >= 4.5, light


@pytest.mark.parametrize("dark", [False, True])
def test_lines_that_are_drawn_together_can_be_told_apart_without_red_or_green(dark: bool) -> None:
    """In the two dimensions of colour that those without red or green cones see, after Viénot, Brettel and Mollon (1999)."""

    def seen(color: str) -> tuple[float, ...]:
        r, g, b = (int((style.DARK[color] if dark else color)[i : i + 2], 16) / 255 for i in (1, 3, 5))
        yellow = 0.11238 * r + 0.88762 * g
        return (yellow, b)

    together = (style.OURS, style.BLUE, style.INK, style.MUTED)
    for one, other in itertools.combinations(together, 2):
        assert sum((x - y) ** 2 for x, y in zip(seen(one), seen(other), strict=True)) ** 0.5 > 0.12, (one, other)


def test_a_waterline_is_all_operations_over_all_least_times() -> None:
    # 10 operations at a peak of 2 take 5; 6 bytes at 1 take 6: the second kernel is limited by its traffic.
    steps = [Step("a", 10, 1), Step("b", 4, 6)]
    assert waterline.waterline(steps, 2.0, 1.0) == pytest.approx(14 / 11)


def test_fusing_only_raises_the_waterline() -> None:
    model = waterline.layers("lowformer_b1", 224, 1, torch.float32)
    every = [layer for layer in model for _ in range(layer.count)]
    assert {layer.count for layer in model} == {1, 5}
    for peak in (5e11, 8e14):
        apart = waterline.waterline((s for x in every for s in x.cost.steps), peak, 4e10)
        fused = waterline.waterline((x.cost.fused for x in every), peak, 4e10)
        assert apart < fused <= peak


def test_results_without_the_rows_are_refused() -> None:
    for picture in PLOTS.values():
        with pytest.raises(Missing):
            picture(Results(runs=[RUN]))
    disturbed = everything()
    disturbed.ceilings = [{**CEILING, "disturbed": True}]
    assert not {"gap", "waterline"} & {p.name for p, _ in figures(disturbed)}


def test_without_matplotlib_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with no_module(monkeypatch, "matplotlib"):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'lowkernels\[plot\]'"):
            PLOTS["gap"](everything())
        assert main(["plot", "--out", str(tmp_path)]) == 2
        assert "lowkernels[plot]" in capsys.readouterr().err


def test_files_follow_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "PLOTS", {"pixels": PLOTS["pixels"]})
    results, out = tmp_path / "results" / "device", tmp_path / "pictures"
    found = experiment_results(EXPERIMENTS["pixels"], QUICK)
    writer = Writer(results / "a.jsonl")
    writer.write(*found.runs, *found.ceilings, *found.rows)
    assert len(pictures.write(results.parent, out, check=True)) == 2
    assert not out.exists()
    written = pictures.write(results.parent, out)
    assert [p.name for p in written] == ["pixels-device-dark.svg", "pixels-device-light.svg"]
    assert pictures.write(results.parent, out) == pictures.write(results.parent, out, check=True) == []
    # The same rows drawn by another version are up to date; other rows are not.
    written[0].write_text(written[0].read_text().replace("<svg", "<!-- another version --><svg", 1))
    assert pictures.write(results.parent, out, check=True) == []
    writer.write(timed(("model", "lowformer_b1", 32, 999, "float32"), "eager", 7.0, point={"factor": 16, "pixels": 9}))
    writer.close()
    assert len(pictures.write(results.parent, out, check=True)) == 2
    (results / "a.jsonl").unlink()
    assert len(pictures.write(results.parent, out)) == 2
    assert not list(out.iterdir())


def test_documents_show_pictures_that_exist(tmp_path: Path) -> None:
    picture, results = PLOTS["gap"], Results(runs=[RUN])
    assert pictures.markdown(picture, results, "docs/", tmp_path) == ""
    (tmp_path / f"gap-{rows.device_slug(RUN)}-light.svg").touch()
    text = pictures.markdown(picture, results, "docs/", tmp_path)
    assert f'srcset="docs/{tmp_path.name}/gap-some_9_2t-dark.svg"' in text
    assert f'src="docs/{tmp_path.name}/gap-some_9_2t-light.svg"' in text
    assert 'alt="Accuracy against latency.' in text


def test_pictures_are_up_to_date_with_the_committed_rows() -> None:
    stale = pictures.write(render.RESULTS, pictures.PICTURES, check=True)
    assert stale == [], "run `python -m benchmarks plot` and `python -m benchmarks render`"
