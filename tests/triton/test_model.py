"""The cost model: what it picks where no table has a row, and that its picks compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="the Triton package is not installed")

from lowkernels import backends
from lowkernels.backends.triton import aot, model
from lowkernels.backends.triton.launch import Target, planning_for
from lowkernels.backends.triton.layers import layers, meta_layer, name
from lowkernels.choosing import settings
from lowkernels.ops import OPERATORS
from lowkernels.testing import Call, random_call

# No table has a row for these: Jetson AGX Orin, B300 and GB10.
UNKNOWN = [Target(87, 16, 163 << 10), Target(103, 148), Target(121, 48)]
# The largest predicted time of a pick, relative to that of the table's row. Rows of sm_90 read weights through tensor descriptors,
# with tiles that are out of reach without them, so they are not compared.
RATIO = 1.5
LAYERS = layers(224, ["lowformer_b1", "lowformer_b15"])
# Channel counts and windows that no LowFormer has.
ODD: dict[str, list[dict[str, Any]]] = {
    "conv_act": [
        {"channels": 3, "out_channels": 16, "height": 64, "width": 64, "stride": 2, "act": "hardswish"},
        {"channels": 96, "out_channels": 200, "height": 14, "width": 14, "kernel_size": 5, "act": "gelu"},
    ],
    "separable_conv": [{"channels": 72, "out_channels": 200, "height": 28, "width": 28, "kernel_size": 5}],
    "mbconv": [
        {"channels": 20, "hidden": 40, "out_channels": 24, "height": 15, "width": 13, "stride": 2},
        {"channels": 96, "hidden": 576, "height": 14, "width": 14},
    ],
    "fused_mbconv": [
        {"channels": 20, "hidden": 40, "out_channels": 24, "height": 15, "width": 13, "stride": 2},
        {"channels": 96, "hidden": 384, "height": 28, "width": 28},
    ],
    "gn_mlp": [{"channels": 200, "hidden": 600, "height": 28, "width": 28}],
    "lowtention": [
        {"channels": 96, "num_heads": 3, "height": 14, "width": 14, "kernel_size": 5, "stride": 2},
        {"channels": 200, "num_heads": 4, "head_dim": 24, "height": 16, "width": 16},
    ],
}


def _picked(call: Call, target: Target, arithmetic: str = "float16") -> dict[str, int]:
    return model.pick(call.operator, call.args, target, arithmetic)


def _launched(call: Call, target: Target, config: dict[str, int]) -> list[Any]:
    with settings.using(config):
        return aot.launches(call, target)


@pytest.mark.parametrize("target", UNKNOWN, ids=lambda target: str(target.arch))
@pytest.mark.parametrize("layer", LAYERS, ids=name)
def test_bigger_batch_has_no_fewer_rows(layer: Any, target: Target) -> None:
    calls = [meta_layer(layer, batch, torch.float16) for batch in (1, 8, 64, 512)]
    rows = [_launched(call, target, _picked(call, target))[-1].constants["BM"] for call in calls]
    assert rows == sorted(rows), rows


def test_few_rows_are_spread_over_many_processors() -> None:
    """Not only the safest candidate everywhere."""
    layer = next(layer for layer in LAYERS if name(layer) == "gn_mlp 256-1024 7x7")
    alone, many = (_picked(meta_layer(layer, batch, torch.float16), UNKNOWN[1])["BM"] for batch in (1, 512))
    assert alone < many


@pytest.mark.parametrize("operator", list(ODD))
@pytest.mark.parametrize("arithmetic", list(aot.DTYPES))
def test_picks_fit_in_shared_memory(operator: str, arithmetic: str) -> None:
    """The less there is, the less they need."""
    for options in ODD[operator]:
        call = random_call(operator, **options, batch=256, dtype=aot.DTYPES[arithmetic], device="meta")
        needed = []
        for kilobytes in (227, 99, 64, 48, 32):
            target = Target(103, 148, kilobytes << 10)
            planned = _launched(call, target, _picked(call, target, arithmetic))
            least = min(
                max(model.work(launch).shared for launch in _launched(call, target, candidate))
                for candidate in model.candidates(operator, arithmetic)
            )
            needed.append(max(model.work(launch).shared for launch in planned))
            assert needed[-1] <= max(target.shared_memory, least)
        assert needed[0] >= needed[-1]


def test_little_shared_memory_makes_smaller_tiles() -> None:
    sizes = {"batch": 256, "channels": 64, "hidden": 256, "out_channels": 128, "height": 28, "width": 28}
    call = random_call("fused_mbconv", **sizes, dtype=torch.float16, device="meta")
    much, little = (_picked(call, Target(103, 148, limit << 10)) for limit in (227, 36))
    assert much["BM"] * much["BE"] > little["BM"] * little["BE"]


@pytest.mark.parametrize("arch", [80, 86, 89, 100, 120])
@pytest.mark.parametrize("arithmetic", ["float16", "tf32", "float32"])
def test_picks_are_close_to_the_rows_of_tables(arch: int, arithmetic: str) -> None:
    target = Target(arch, aot.PROCESSORS[arch])
    for layer in LAYERS:
        for batch in (1, 256):
            call = meta_layer(layer, batch, aot.DTYPES[arithmetic])
            job = aot.Job(layer, batch, arithmetic, arch)
            mine = _launched(call, target, _picked(call, target, arithmetic))
            ours, rows = (
                model.predicted(call.operator, call.args, target, arithmetic, planned)[0] for planned in (mine, aot.planned(job))
            )
            assert ours <= RATIO * rows, (name(layer), batch)


def test_a_pick_is_made_once_and_for_all_batches_of_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target(130, 99)
    first = _picked(random_call("mbconv", batch=5, device="meta"), target, "float32")
    monkeypatch.setattr(model, "launches", lambda *_: pytest.fail("counted again"))
    for batch in (5, 6, 8):
        assert _picked(random_call("mbconv", batch=batch, device="meta"), target, "float32") == first


@pytest.mark.parametrize("arch", [87, 130])
def test_calls_without_a_row_are_planned_with_the_pick(arch: int) -> None:
    layer = next(layer for layer in LAYERS if layer[0] == "gn_mlp")
    target = Target(arch, 16)
    call = meta_layer(layer, 4, torch.float16)
    launch = aot.launches(call, target)[-1]
    assert launch.origin == "cost model"
    assert {**_picked(call, target), "row": -1, "tuned": 0} == launch.config
    with settings.using({"BM": 64}):
        assert aot.launches(call, target)[-1].origin == "tuned"
    assert aot.launches(call, Target(80, 108))[-1].origin.startswith("table row")


@pytest.mark.parametrize("operator", list(OPERATORS))
def test_reports_say_where_sizes_are_from(operator: str) -> None:
    call = random_call(operator, batch=2, channels=64, dtype=torch.float16)
    for target, origin in ((Target(130, 16), "cost model"), (Target(90, 132), "table row")):
        with planning_for(target):
            assert backends.load("triton").sizes(*call).startswith(origin)
            with FakeTensorMode(allow_non_fake_inputs=True):
                assert backends.load("triton").sizes(*call).startswith(origin)


@pytest.mark.slow
@pytest.mark.parametrize("operator", list(ODD))
@pytest.mark.parametrize("target", UNKNOWN, ids=lambda target: str(target.arch))
def test_picks_compile_without_spills(operator: str, target: Target) -> None:
    """And within the shared memory that the model counts."""
    for number, options in enumerate(ODD[operator]):
        call = random_call(operator, **options, batch=(1, 256)[number % 2], dtype=torch.float16, device="meta")
        for launch in aot.launches(call, target):
            used = aot.compile_launch(launch, target.arch)
            assert not used.spills, (options, launch.config)
            assert used.shared <= model.work(launch).shared, (options, launch.config)


@pytest.mark.slow
def test_counted_shared_memory_is_enough_for_every_shipped_row() -> None:
    """Of one kernel of each kind; the model relies on its count being no less than what the compiler takes."""
    seen = set()
    for job in aot.shipped_jobs(80, ["float16"]):
        for launch in aot.planned(job):
            if launch.kernel.__name__ not in seen:
                seen.add(launch.kernel.__name__)
                assert aot.compile_launch(launch, 80).shared <= model.work(launch).shared, launch.config
    assert len(seen) == 9
