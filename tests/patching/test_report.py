"""What report() says, before and after a forward, plain and rich."""

from __future__ import annotations

import io
import sys

import pytest
import torch
from torch import nn

import lowformer
import lowkernels
from lowkernels.report import Row
from tests.patching.helpers import InvertedResidual, Net, image, randomise, row, run
from tests.patching.test_lookalikes import SqueezeExcite


def model_of_two() -> nn.Module:
    torch.manual_seed(0)
    gate = nn.Sequential(nn.Conv2d(8, 8, 1), SqueezeExcite(8))
    return lowkernels.accelerate(randomise(nn.Sequential(InvertedResidual(), gate, InvertedResidual(kernel=5))), backend="eager")


def test_rows_before_a_forward() -> None:
    report = lowkernels.report(model_of_two())
    assert [r.name for r in report] == ["0", "1.1", "2"]
    assert [r.kind for r in report] == ["mbconv", "SqueezeExcite", "mbconv"]
    assert [r.replaced for r in report] == [True, False, True]
    assert [r.backend for r in report] == ["eager", "", "eager"]
    assert all(r.ran_on == "" and r.layout_copies is None for r in report)
    assert report.rows[0].reason.startswith("structure matches")
    assert "squeeze-and-excitation" in report.rows[1].reason
    assert len(report.replaced) == 2


def test_rows_after_a_forward() -> None:
    model = model_of_two()
    run(model, image(2, 8, 6, 6))
    first, gate, last = lowkernels.report(model)
    assert first.ran_on == last.ran_on == "eager"
    assert first.reason == "asked for by the backend argument"
    assert first.limits
    # The input comes as NCHW and is copied once; what the blocks hand on is not.
    assert first.layout_copies == 1
    assert gate.ran_on == ""
    run(model, image(2, 8, 6, 6).contiguous(memory_format=torch.channels_last))
    assert lowkernels.report(model).rows[0].layout_copies == 0
    assert lowkernels.report(model).rows[2].layout_copies == 0


def test_auto_says_why() -> None:
    model = lowkernels.accelerate(randomise(Net(InvertedResidual()).double()), backend="auto")
    run(model, image(1, 8, 5, 5, dtype=torch.float64))
    found = row(model, "block")
    assert found.backend == "auto"
    assert found.ran_on == "eager"
    # float64 is the reference's alone; what was preferred to it says so.
    assert "; not " in found.reason
    assert "float64" in found.reason


def test_models_made_with_kernels() -> None:
    model = lowformer.create_model("lowformer_b0", kernels="eager")
    assert len(lowkernels.report(model)) == 0
    model = lowformer.create_model("lowformer_b0", kernels="auto")
    report = lowkernels.report(model)
    assert len(report) == len(report.replaced) > 20
    assert {r.kind for r in report} == {"conv_act", "fused_mbconv", "gn_mlp", "lowtention", "mbconv"}


def test_rows_survive_wrapping_and_copies() -> None:
    model = model_of_two()
    outer = nn.ModuleDict({"inner": model})
    assert [r.name for r in lowkernels.report(outer)] == ["inner.0", "inner.1.1", "inner.2"]


def test_plain_text() -> None:
    model = model_of_two()
    run(model, image(1, 8, 6, 6))
    lines = str(lowkernels.report(model)).splitlines()
    assert lines[0].split() == ["module", "kind", "replaced", "backend", "ran", "on", "NHWC", "copies", "reason", "limits"]
    assert lines[1].split()[:6] == ["0", "mbconv", "yes", "eager", "eager", "1"]
    assert lines[2].split()[:3] == ["1.1", "SqueezeExcite", "no"]
    assert lines[-1] == "2 of 3 modules replaced"


def test_where_sizes_are_from() -> None:
    kinds = ["table row 3", "table row 11", "cost model", "", "table row 3"]
    rows = [Row(str(i), "mbconv", True, "auto", "", sizes=sizes) for i, sizes in enumerate(kinds)]
    assert str(lowkernels.Report(tuple(rows))).endswith("\n5 of 5 modules replaced; sizes: 3 table row, 1 cost model")
    rich = pytest.importorskip("rich.console")
    out = io.StringIO()
    rich.Console(file=out, width=200).print(lowkernels.Report(tuple(rows)))
    assert "5 of 5 modules replaced; sizes: 3 table row, 1 cost model" in out.getvalue()


def test_rich_table() -> None:
    rich = pytest.importorskip("rich.console")
    out = io.StringIO()
    rich.Console(file=out, width=200).print(lowkernels.report(model_of_two()))
    text = out.getvalue()
    assert "SqueezeExcite" in text
    assert "2 of 3 modules replaced" in text


def test_names_are_whole_on_a_small_terminal() -> None:
    rich = pytest.importorskip("rich.console")
    out = io.StringIO()
    name = "stages.3.11.main.point_conv"
    rich.Console(file=out, width=80).print(lowkernels.Report((Row(name, "mbconv", True, "auto", "a long reason " * 9),)))
    assert name in out.getvalue()


def test_a_line_each_module_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    report = lowkernels.report(model_of_two())
    report.show()
    assert capsys.readouterr().out == f"{report}\n"


@pytest.mark.parametrize("rich", [True, False])
def test_show(rich: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    lowkernels.report(model_of_two()).show()
    out = capsys.readouterr().out
    assert "mbconv" in out
    assert "2 of 3 modules replaced" in out


def test_brackets_in_reasons_are_text() -> None:
    """rich reads [word] as markup."""
    rich = pytest.importorskip("rich.console")
    out = io.StringIO()
    reason = "expected [2, 8] but got [/red] and [bold]more"
    rich.Console(file=out, width=200).print(lowkernels.Report((Row("a", "b", False, "", reason),)))
    assert reason in out.getvalue()


def test_no_rows_for_an_untouched_model() -> None:
    assert len(lowkernels.report(nn.Sequential(nn.Linear(2, 2)))) == 0
    assert str(lowkernels.report(nn.Linear(2, 2))).endswith("0 of 0 modules replaced")
