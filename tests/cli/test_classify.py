"""`lowformer classify` and `lowformer list`, run as a user runs them."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import pty
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import lowformer
from lowformer import cli
from lowformer.imagenet import class_names
from lowformer.transforms import eval_transform, load_image
from tests.cli.conftest import TABBY

FAST = ["--model", "lowformer_b0", "--size", "64"]


def run(*arguments: str | Path) -> int:
    return cli.main([str(argument) for argument in arguments])


def report(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def spawn(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lowformer", *map(str, arguments)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "timeout": 120, **options}
    return subprocess.run(command, **options)


@pytest.fixture
def folder(tmp_path: Path, photo: Path) -> Path:
    """Four images on three levels, and what must not be taken for one."""
    root = tmp_path / "photos"
    for name in ("b.JPG", "a.png", "sub/c.jpeg", "sub/deeper/d.webp"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.open(photo).resize((90, 60)).save(root / name)
    (root / "notes.txt").write_text("not an image")
    (root / ".hidden").mkdir()
    for name in ("._b.jpg", ".hidden/e.jpg"):
        (root / name).write_bytes(b"not an image either")
    return root


def test_top5_of_a_photo(photo: Path, tabby_weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("classify", photo, "--weights", tabby_weights, *FAST) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("lowformer_b0, ")
    assert lines[1] == str(photo)
    assert lines[2].split() == ["100.00%", "tabby"]
    assert len(lines) == 2 + 5


@pytest.mark.parametrize("kernels", ["eager", "auto"])
def test_results_are_the_models(photo: Path, tabby_weights: Path, tmp_path: Path, kernels: str) -> None:
    state = load_file(tabby_weights)
    state["classifier.bias"].zero_()
    save_file(state, tmp_path / "plain.safetensors")
    out = tmp_path / "out.json"
    arguments = ["--weights", tmp_path / "plain.safetensors", "--dtype", "float64", "--kernels", kernels]
    assert run("classify", photo, *arguments, *FAST, "--json", out) == 0

    model = lowformer.create_model("lowformer_b0", kernels="eager")
    lowformer.load_checkpoint(model, tmp_path / "plain.safetensors")
    with torch.no_grad():
        image = eval_transform(64)(load_image(photo)).double()
        expected = model.double().eval()(image[None]).softmax(-1)[0].sort(descending=True)
    predictions = report(out)["images"][0]["predictions"]
    assert [best["index"] for best in predictions] == expected.indices[:5].tolist()
    assert [best["name"] for best in predictions] == [class_names()[i] for i in expected.indices[:5].tolist()]
    # 1e-9 is the project's bound for two float64 computations of one model.
    assert [best["probability"] for best in predictions] == pytest.approx(expected.values[:5].tolist(), rel=1e-9, abs=0)


def test_folders_in_order_in_batches(
    folder: Path, photo: Path, tabby_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = []
    for batch_size in ("1", "3"):
        out = tmp_path / f"{batch_size}.json"
        arguments = [
            "--weights",
            tabby_weights,
            "--batch-size",
            batch_size,
            "--dtype",
            "float64",
            "--json",
            out,
        ]
        assert run("classify", photo, folder, *arguments, *FAST) == 0
        reports.append(report(out)["images"])
    expected = [photo, *(folder / name for name in ("a.png", "b.JPG", "sub/c.jpeg", "sub/deeper/d.webp"))]
    for images in reports:
        assert [image["file"] for image in images] == [str(path) for path in expected]
    for one, three in zip(*reports, strict=True):
        for left, right in zip(one["predictions"], three["predictions"], strict=True):
            assert left["index"] == right["index"]
            assert left["probability"] == pytest.approx(right["probability"], rel=1e-9, abs=0)
    assert capsys.readouterr().err == ""


def test_json_says_how_it_was_made(photo: Path, tabby_weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--weights", tabby_weights, "--kernels", "eager", "--device", "cpu", "--topk", "2", *FAST]
    assert run("classify", photo, *arguments, "--json", "-") == 0
    result = json.loads(capsys.readouterr().out)
    (image,) = result.pop("images")
    assert image["file"] == str(photo)
    assert len(image["predictions"]) == 2
    assert image["predictions"][0]["index"] == TABBY
    assert image["predictions"][0]["name"] == "tabby"
    assert 0.99 < image["predictions"][0]["probability"] <= 1
    assert result.pop("versions")["torch"] == torch.__version__
    assert result == {
        "model": "lowformer_b0",
        "weights": str(tabby_weights),
        "trained": True,
        "kernels": "eager",
        "dtype": "float32",
        "device": "cpu",
        "size": 64,
        "failed": [],
    }


def test_csv_has_a_row_for_each_image_and_rank(folder: Path, tabby_weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("classify", folder, "--weights", tabby_weights, "--topk", "3", *FAST, "--csv", "-") == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert len(rows) == 4 * 3
    assert [row["rank"] for row in rows] == ["1", "2", "3"] * 4
    assert {row["weights"] for row in rows} == {str(tabby_weights)}
    for row in rows:
        assert class_names()[int(row["index"])] == row["name"]
    assert [row["name"] for row in rows[::3]] == ["tabby"] * 4
    assert all(float(row["probability"]) > 0.99 for row in rows[::3])


def test_untrained_weights_are_labelled_everywhere(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for attempt in ("1", "2"):
        outputs = ["--json", tmp_path / f"{attempt}.json", "--csv", tmp_path / f"{attempt}.csv"]
        assert run("classify", photo, "--weights", "none", *FAST, *outputs) == 0
        texts.append(capsys.readouterr().out)
    header, name, *_ = texts[0].splitlines()
    assert "untrained weights" in header
    assert "untrained weights" in name
    assert report(tmp_path / "1.json")["weights"] == "untrained weights"
    assert report(tmp_path / "1.json")["trained"] is False
    with open(tmp_path / "1.csv", encoding="utf-8", newline="") as file:
        assert {row["weights"] for row in csv.DictReader(file)} == {"untrained weights"}
    # They are the same in every run.
    assert report(tmp_path / "1.json") == report(tmp_path / "2.json")


def test_unreadable_images_do_not_stop_the_others(
    folder: Path, photo: Path, tabby_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = photo.read_bytes()
    broken = {
        "0_cut.jpg": whole[: len(whole) // 2],
        "b_text.jpg": b"these are words",
        "c_empty.png": b"",
    }
    for name, content in broken.items():
        (folder / name).write_bytes(content)
    Image.new("F", (8, 8)).save(folder / "z_float.tif")
    out = tmp_path / "out.json"
    arguments = ["--weights", tabby_weights, "--batch-size", "2", "--json", out]
    assert run("classify", folder, *arguments, *FAST) == 1

    result = report(out)
    assert [Path(image["file"]).name for image in result["images"]] == ["a.png", "b.JPG", "c.jpeg", "d.webp"]
    names = [*broken, "z_float.tif"]
    assert [Path(failure["file"]).name for failure in result["failed"]] == names
    error = capsys.readouterr().err
    assert "4 of 8 images could not be classified" in error
    for name in names:
        assert str(folder / name) in error
    assert "truncated" in error
    assert "without a known white" in error


def test_only_unreadable_images(tmp_path: Path, tabby_weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"words")
    assert run("classify", bad, "--weights", tabby_weights, *FAST) == 1
    assert str(bad) in capsys.readouterr().err


def test_output_that_is_not_finite_is_no_result(
    photo: Path, tabby_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = load_file(tabby_weights)
    state["classifier.bias"][0] = torch.inf
    save_file(state, tmp_path / "infinite.safetensors")
    assert run("classify", photo, "--weights", tmp_path / "infinite.safetensors", *FAST) == 1
    assert "not finite" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_dtypes(photo: Path, tabby_weights: Path, dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("classify", photo, "--weights", tabby_weights, "--dtype", dtype, *FAST) == 0
    out = capsys.readouterr().out
    assert dtype in out
    assert out.splitlines()[2].split() == ["100.00%", "tabby"]


def test_other_classes_are_named_by_their_index(photo: Path, tmp_path: Path) -> None:
    model = lowformer.create_model("lowformer_b0", kernels="eager", num_classes=3)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "three.pth")
    out = tmp_path / "out.json"
    assert run("classify", photo, "--weights", tmp_path / "three.pth", *FAST, "--json", out) == 0
    predictions = report(out)["images"][0]["predictions"]
    assert sorted(best["name"] for best in predictions) == ["0", "1", "2"]
    assert sum(best["probability"] for best in predictions) == pytest.approx(1, rel=2**-20)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux allows file names that are not UTF-8")
def test_names_that_are_not_utf8(photo: Path, tabby_weights: Path, tmp_path: Path) -> None:
    odd = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    shutil.copyfile(photo, odd)
    outputs = ["--json", tmp_path / "out.json", "--csv", tmp_path / "out.csv"]
    assert run("classify", tmp_path, "--weights", tabby_weights, *FAST, *outputs) == 0
    assert report(tmp_path / "out.json")["images"][0]["file"] == f"{tmp_path}/caf\\xe9.jpg"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/missing.jpg"], "no such file or folder: {tmp}/missing.jpg"),
        (["{tmp}/empty"], "no image in {tmp}/empty"),
        (["{photo}", "--json", "-", "--csv", "-"], "cannot both write to stdout"),
        (["{photo}", "--json", "{tmp}/none/out.json"], "cannot write '{tmp}/none/out.json'"),
        (["{photo}", "--csv", "{tmp}"], "cannot write '{tmp}'"),
        (["{photo}", "--model", "lowformer_b9"], "unknown model 'lowformer_b9'"),
        (["{photo}", "--kernels", "abacus"], "'abacus'"),
        (["{photo}", "--device", "abacus"], "device 'abacus' cannot be used"),
        (["{photo}", "--device", "cuda:99"], "device 'cuda:99' cannot be used"),
        (["{photo}", "--weights", "{tmp}/missing.safetensors"], "{tmp}/missing.safetensors"),
        (["{photo}", "--weights", "{photo}"], "{photo}"),
    ],
)
def test_what_cannot_start(
    arguments: list[str], message: str, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"tmp": tmp_path, "photo": photo}
    arguments = [argument.format(**places) for argument in arguments]
    if "--weights" not in arguments:
        arguments += ["--weights", "none"]
    assert run("classify", *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("lowformer: error: ")
    assert message.format(**places) in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("option", ["--topk", "--batch-size", "--size"])
@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_counts_must_be_positive(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run("classify", "photo.jpg", option, value)
    assert stop.value.code == 2
    assert "must be a whole number of at least 1" in capsys.readouterr().err


def test_interrupt_leaves_no_report(
    photo: Path,
    tabby_weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_probabilities", interrupt)
    out = tmp_path / "out.json"
    assert run("classify", photo, "--weights", tabby_weights, *FAST, "--json", out) == 130
    assert not out.exists()
    assert "interrupted" in capsys.readouterr().err


def test_list_shows_every_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == lowformer.list_models()
    assert "timm/lowformer_b1.in1k" in lines[2]


def test_without_network_one_sentence_says_what_to_do(photo: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = spawn("classify", photo, env=environment)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "timm/lowformer_b1.in1k" in result.stderr
    assert "--weights FILE" in result.stderr


def test_progress_bar_keeps_out_of_a_pipe(folder: Path, tabby_weights: Path) -> None:
    ours, theirs = pty.openpty()
    drawn: list[bytes] = []

    def read() -> None:
        # Linux says by an error that the other end is closed, other systems by an empty read.
        with contextlib.suppress(OSError):
            while part := os.read(ours, 65536):
                drawn.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    try:
        result = spawn(
            *("classify", folder, "--weights", tabby_weights, "--batch-size", "1", *FAST),
            stderr=theirs,
            env=environment,
        )
    finally:
        os.close(theirs)
        reader.join()
        os.close(ours)
    assert result.returncode == 0
    assert b"4/4" in b"".join(drawn)
    assert b"tabby" not in b"".join(drawn)
    assert result.stdout.count("%  tabby\n") == 4
    assert "\x1b" not in result.stdout


def test_a_reader_that_has_seen_enough(photo: Path, tabby_weights: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    result = spawn("classify", photo, "--weights", tabby_weights, *FAST, stdout=writer)
    os.close(writer)
    assert result.returncode == 1
    assert result.stderr == ""
