"""Measured tables: what they hold, which row serves a call, and what becomes of those that are wrong."""

from __future__ import annotations

import json
import threading
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lowkernels._version import __version__
from lowkernels.choosing import measured
from lowkernels.choosing.measured import Described, Machine, Row, TableError
from lowkernels.ops import OPERATORS
from lowkernels.testing import random_call

GPU = Machine("NVIDIA Test", "sm_90")
ROW = Row("gn_mlp", "fc1_weight=8x4x1x1", "float16", (16, 14, 14), {"eager": 2.0, "triton": 1.0}, {"triton": {"BM": 64}}, "today")
HERE = Described("gn_mlp", "fc1_weight=8x4x1x1", "float16", (16, 14, 14))


def table(**changes: Any) -> dict[str, Any]:
    row = json.loads(json.dumps(asdict(ROW)))
    heading = {"format": measured.FORMAT, "lowkernels": __version__, "device": GPU.device, "arch": GPU.arch}
    return {**heading, "rows": [row], **changes}


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_written_tables_are_read_back_and_always_the_same(tmp_path: Path) -> None:
    rows = [
        ROW,
        replace(ROW, shape=(1, 14, 14)),
        replace(ROW, operator="conv_act", settings={}),
        replace(ROW, us={"eager": 3.5}, settings={}),
    ]
    paths = tmp_path / "a" / "x.json", tmp_path / "b.json"
    measured.write(paths[0], GPU, rows)
    # The last row is about the same call as the first.
    measured.write(paths[1], GPU, [rows[3], rows[2], rows[1], replace(ROW, us={"eager": 3.5}, settings={})])
    assert paths[0].read_bytes() == paths[1].read_bytes()
    heading, found = measured.parse(paths[0].read_text())
    assert Machine(heading["device"], heading["arch"]) == GPU
    assert found == [rows[2], rows[1], rows[3]]
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["b.json", "x.json"]


def test_adding_keeps_what_is_about_other_calls(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    measured.add(path, GPU, [ROW, replace(ROW, dtype="bfloat16")])
    together = measured.add(path, GPU, [replace(ROW, us={"eager": 9.0}, settings={})])
    assert [(row.dtype, row.us["eager"]) for row in together] == [("bfloat16", 2.0), ("float16", 9.0)]
    assert measured.parse(path.read_text())[1] == together


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        json.dumps(table(format=2)),
        json.dumps(table(device=None)),
        json.dumps(table(rows=[1])),
        *(
            json.dumps(table(rows=[{**table()["rows"][0], **wrong}]))
            for wrong in (
                {"more": 1},
                {"operator": 1},
                {"shape": [1, 2]},
                {"shape": [1, 2, 0]},
                {"us": {}},
                {"us": {"eager": -1}},
                {"us": {"eager": "fast"}},
                {"us": {"eager": float("inf")}},
                {"settings": {"cuda": {"BM": 1}}},
                {"settings": {"triton": {"BM": "64"}}},
            )
        ),
    ],
)
def test_corrupt_tables_are_ignored_with_one_warning(text: str) -> None:
    with pytest.raises(TableError):
        measured.parse(text)
    put(measured.user_path(GPU), text)
    put(measured.SHIPPED / "good.json", json.dumps(table()))
    with pytest.warns(RuntimeWarning, match="is ignored") as caught:
        found = [measured.find(HERE, GPU) for _ in range(3)]
    assert len(caught) == 1
    assert found[0] is not None
    assert found[0].shipped
    with pytest.warns(RuntimeWarning, match="is ignored"):
        measured.add(measured.user_path(GPU), GPU, [ROW])
    assert measured.parse(measured.user_path(GPU).read_text())[1] == [ROW]


@pytest.mark.parametrize(("change", "why"), [({"device": "NVIDIA Other"}, "another machine"), ({"lowkernels": "0.0.1"}, "0.0.1")])
def test_foreign_tables_are_ignored_with_one_warning(change: dict[str, str], why: str) -> None:
    put(measured.user_path(GPU), json.dumps(table(**change)))
    with pytest.warns(RuntimeWarning, match=why) as caught:
        assert [measured.find(HERE, GPU) for _ in range(3)] == [None] * 3
    assert len(caught) == 1


def test_a_corrupt_shipped_table_is_ignored_with_a_warning() -> None:
    put(measured.SHIPPED / "bad.json", "{")
    put(measured.SHIPPED / "good.json", json.dumps(table()))
    with pytest.warns(RuntimeWarning, match=r"bad\.json is ignored"):
        assert measured.find(HERE, GPU) is not None


def test_no_table_is_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert measured.find(HERE, GPU) is None


def test_the_users_table_then_the_same_device_then_the_same_architecture() -> None:
    def times(us: float, **heading: str) -> str:
        return json.dumps(table(rows=[{**table()["rows"][0], "us": {"eager": us}, "settings": {}}], **heading))

    def found() -> float | None:
        measured.forget()
        row = measured.find(HERE, GPU)
        return None if row is None else row.row.us["eager"]

    put(measured.SHIPPED / "another.json", times(1, arch="sm_80"))
    assert found() is None
    put(measured.SHIPPED / "a_relative.json", times(2, device="NVIDIA Relative"))
    assert found() == 2
    # What was measured with another version still tells what to expect where nothing newer does.
    put(measured.SHIPPED / "the_same.json", times(3, lowkernels="0.0.1"))
    assert found() == 3
    put(measured.user_path(GPU), times(4))
    assert found() == 4


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    put(measured.user_path(GPU), json.dumps(table()))
    monkeypatch.setenv(measured.VARIABLE, "0")
    assert measured.find(HERE, GPU) is None


@pytest.mark.parametrize(
    ("shape", "row"),
    [
        ((16, 14, 14), (16, 14, 14)),
        ((4, 14, 14), (1, 14, 14)),
        ((3, 14, 14), (1, 14, 14)),
        ((64, 14, 14), (16, 14, 14)),
        ((65, 14, 14), (256, 14, 14)),
        ((33, 14, 14), (16, 14, 14)),
        ((1024, 14, 14), (256, 14, 14)),
        ((1025, 14, 14), None),
        ((16, 16, 16), (16, 14, 14)),
        ((16, 20, 20), None),
        ((16, 9, 11), (16, 14, 14)),
        ((16, 9, 10), None),
    ],
)
def test_the_nearest_row_serves_what_is_not_far(shape: tuple[int, int, int], row: tuple[int, int, int] | None) -> None:
    measured.write(measured.user_path(GPU), GPU, [replace(ROW, shape=(images, 14, 14)) for images in (1, 16, 256)])
    found = measured.find(HERE._replace(shape=shape), GPU)
    assert (found and found.row.shape) == row


def test_other_calls_are_not_served() -> None:
    measured.write(measured.user_path(GPU), GPU, [ROW])
    for change in ({"operator": "mbconv"}, {"call": "fc1_weight=16x4x1x1"}, {"dtype": "bfloat16"}):
        assert measured.find(HERE._replace(**change), GPU) is None


def test_what_calls_are_told_apart_by() -> None:
    def described(**options: Any) -> Described:
        call = random_call("conv_act", **{"channels": 4, "height": 5, "width": 6, **options})
        found = measured.describe(*call)
        assert found is not None
        return found

    plain = described()
    assert plain == Described("conv_act", "weight=4x4x3x3 stride=1 padding=1 residual pool=0", "float32", (2, 5, 6))
    assert described(act="relu", bias=False, seed=1) == plain
    assert described(batch=3).shape == (3, 5, 6)
    different = [described(**o) for o in ({"pool": True}, {"residual": False}, {"stride": 2}, {"out_channels": 8})]
    assert len({plain.call, *(d.call for d in different)}) == 5
    assert described(dtype=torch.float16).dtype == "float16"
    assert measured.describe(*random_call("gn_mlp", batch=0)) is None
    calls = {random_call("lowtention", norm=norm) for norm in (True, False)}
    assert len({measured.describe(*call) for call in calls}) == 2
    for operator in OPERATORS:
        assert measured.describe(*random_call(operator, dtype=torch.float16)) is not None


def test_many_threads_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    put(measured.user_path(GPU), json.dumps(table()))
    parse, reads = measured.parse, []
    monkeypatch.setattr(measured, "parse", lambda text: reads.append(text) or parse(text))
    found: list[object] = []
    barrier = threading.Barrier(8)

    def work() -> None:
        barrier.wait()
        found.extend(measured.find(HERE, GPU) for _ in range(50))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reads) == 1
    assert len(found) == 400
    assert None not in found


def test_this_machine() -> None:
    of = measured.machine(torch.device("cpu"))
    assert of is not None
    assert of.arch.endswith(f" {torch.get_num_threads()} threads")
    assert measured.user_path(of).name == f"{of.slug}-{__version__}.json"
    assert measured.machine(torch.device("meta")) is None


def test_what_ships_can_be_read() -> None:
    for path in (Path(measured.__file__).parent / "data" / "measured").glob("*.json"):
        heading, rows = measured.parse(path.read_text())
        assert rows
        assert path.name == f"{Machine(heading['device'], heading['arch']).slug}.json"
        assert all(row.measured and row.operator in OPERATORS for row in rows)
