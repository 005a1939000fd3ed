"""The tier of compute capability 9.0: its kernels in the shim, its packing, its plan, and what happens if it fails its check."""

from __future__ import annotations

import contextlib
import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lowkernels.backends import cuda
from lowkernels.backends.cuda import chains, hopper, launch, tiling
from lowkernels.choosing import settings
from lowkernels.ops import OPERATORS
from lowkernels.testing import check_call, random_call
from tests.cuda import cases, execution

NAMES = ("fused_mbconv_sm90", "gn_mlp_sm90")
OPERATORS_SERVED = ("fused_mbconv", "gn_mlp")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
H200 = tiling.Device(227 * 1024, 228 * 1024, 132)
NUMBERS = "numbers"

# (operator, config, sizes): what the tier is for, and what it finds hard: the last slab and the last CTA not full, CTAs across
# images, lines longer than a CTA, one pixel.
SHAPES: list[tuple[str, int, dict[str, Any]]] = [
    ("fused_mbconv", 1, {"channels": 128, "hidden": 256, "height": 14, "width": 14, "batch": 2}),
    ("fused_mbconv", 0, {"channels": 20, "hidden": 100, "out_channels": 36, "height": 9, "width": 7, "batch": 5}),
    ("fused_mbconv", 0, {"channels": 16, "hidden": 132, "out_channels": 64, "height": 30, "width": 31, "stride": 2, "batch": 1}),
    (
        "fused_mbconv",
        2,
        {"channels": 36, "hidden": 68, "out_channels": 100, "height": 3, "width": 90, "kernel_size": 5, "batch": 1},
    ),
    ("fused_mbconv", 2, {"channels": 4, "hidden": 4, "out_channels": 4, "height": 1, "width": 1, "batch": 1, "act": "gelu"}),
    ("fused_mbconv", 3, {"channels": 68, "hidden": 260, "out_channels": 256, "height": 13, "width": 14, "stride": 2, "batch": 3}),
    ("fused_mbconv", 3, {"channels": 64, "hidden": 128, "out_channels": 132, "height": 7, "width": 7, "padding": 0, "batch": 4}),
    ("gn_mlp", 1, {"channels": 128, "hidden": 512, "height": 14, "width": 14, "batch": 2}),
    ("gn_mlp", 0, {"channels": 20, "hidden": 100, "height": 9, "width": 7, "batch": 5}),
    ("gn_mlp", 2, {"channels": 100, "hidden": 260, "height": 7, "width": 7, "batch": 3}),
    ("gn_mlp", 3, {"channels": 256, "hidden": 256, "height": 7, "width": 7, "batch": 3}),
    ("gn_mlp", 1, {"channels": 72, "hidden": 132, "height": 31, "width": 31, "batch": 1}),
]

CHAIN = "expand_project_sm90.cuh"
# (operator, file, what is changed, into what, how it has to be noticed)
BREAKAGES = [
    ("fused_mbconv", CHAIN, "        fence_proxy_async();\n", "", "unfenced"),
    ("fused_mbconv", CHAIN, "cp_async_wait<kSlabsAhead - 1>", "cp_async_wait<kSlabsAhead>", "pending"),
    ("fused_mbconv", CHAIN, "block_sync();  // the slab", "// the slab", "race"),
    ("fused_mbconv", CHAIN, "kSlabStages - 2", "kSlabStages - 1", "race"),
    ("fused_mbconv", CHAIN, "wgmma_wait<1>();\n                    load", "load", "pending"),
    ("fused_mbconv", CHAIN, "load(a[(step + 1) % 2]", "load(a[step % 2]", "pending"),
    ("fused_mbconv", CHAIN, "wgmma_fence();\n                    wgmma(", "wgmma(", "unfenced"),
    ("fused_mbconv", CHAIN, "wgmma_fence();\n                        wgmma(", "wgmma(", "unfenced"),
    ("fused_mbconv", CHAIN, "wgmma_wait<0>();\n            wgmma_settle(hidden)", "wgmma_settle(hidden)", "pending"),
    ("fused_mbconv", CHAIN, "wgmma_wait<0>();\n#pragma unroll\n        for (int part", "for (int part", "pending"),
    ("fused_mbconv", CHAIN, "kParts > 1 ? kSlabSteps : 2", "1", "pending"),
    ("fused_mbconv", CHAIN, "kParts > 1 ? kSlabSteps : 2", "2", NUMBERS),
    (
        "fused_mbconv",
        CHAIN,
        "hidden, a[step % 2], slab_operand(weights, step)",
        "hidden, a[step % 2], slab_operand(weights, 0)",
        NUMBERS,
    ),
    ("fused_mbconv", CHAIN, "slab + step > 0", "true", NUMBERS),
    ("fused_mbconv", CHAIN, "chunk + group > 0", "group > 0", NUMBERS),
    ("fused_mbconv", CHAIN, "channel += kWideChunk;", "", NUMBERS),
    ("fused_mbconv", CHAIN, "step < t.steps ? row + taps[step] : zeros", "row + taps[step]", "bounds"),
    ("fused_mbconv", CHAIN, "if (!pixel.live) continue;", "", "bounds"),
    ("fused_mbconv", CHAIN, "if (first + group * kGroup >= p.g.co) continue;", "", "bounds"),
    ("fused_mbconv", "fused_mbconv_sm90.cu", "thread_index() * 4) = {};", "0) = {};", "unwritten"),
    ("fused_mbconv", "fused_mbconv_sm90.cu", "        block_sync();", "", "race"),
    ("fused_mbconv", "fused_mbconv_sm90.cu", "cp_async_wait<kSlabsAhead>();", "", "pending"),
    ("fused_mbconv", "warpgroup.cuh", "step * 32, 1024, 16, kSwizzle128", "step * 32, 1024, 16, kSwizzle64", NUMBERS),
    ("gn_mlp", "gn_mlp_sm90.cu", "cp_async_wait<kSlabsAhead>();", "", "pending"),
    ("gn_mlp", "gn_mlp_sm90.cu", "        block_sync();", "", "race"),
    ("gn_mlp", "gn_mlp_sm90.cu", "2 * C::kWarps * sizeof(float)", "0", "bounds"),
]
BROKEN: dict[str, dict[str, Any]] = {
    "fused_mbconv": {"channels": 20, "hidden": 260, "out_channels": 132, "height": 9, "width": 7, "batch": 3},
    "gn_mlp": {"channels": 132, "hidden": 260, "height": 9, "width": 7, "batch": 3},
}


@pytest.fixture
def on_hopper(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls on CPU tensors are planned as on an H200."""
    monkeypatch.setattr(hopper, "unusable", lambda device: None)
    monkeypatch.setattr(hopper, "_checked", {})
    monkeypatch.setattr(tiling, "SMALLEST", H200)


@pytest.fixture
def kernels(on_hopper: None) -> Path:
    """The tier's kernels, compiled for the shim: others would not be found."""
    return execution.kernels(names=NAMES)


class NotTaken(Exception):
    """The tier leaves a call to the other kernels."""


def not_taken(*args: object) -> None:
    raise NotTaken


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("operator", "config", "shape"), SHAPES)
def test_shapes(kernels: Path, operator: str, config: int, shape: dict[str, Any], dtype: str) -> None:
    call = random_call(operator, dtype=DTYPES[dtype], **shape)
    results = []
    for schedule in execution.SCHEDULES:
        with execution.watched(kernels, schedule) as outcome, hopper.forced(config):
            results.append(check_call(operator, call.args, "cuda"))
        assert not outcome.reports, "\n".join(outcome.reports)
        assert outcome.shared <= H200.shared
    assert torch.equal(*results)


@pytest.mark.parametrize("operator", OPERATORS_SERVED)
def test_contract(kernels: Path, monkeypatch: pytest.MonkeyPatch, operator: str) -> None:
    monkeypatch.setattr(chains, "choose", not_taken)
    served = 0
    for number, shape in enumerate(cases.random_cases(operator, 12)):
        call = random_call(operator, dtype=(torch.float16, torch.bfloat16)[number % 2], **shape)
        out_channels = OPERATORS[operator].infer_shape(*call.args)[1]
        wide = [c.number for c in hopper.CONFIGS if -(-out_channels // 128) == c.parts and out_channels <= c.columns]
        with execution.watched(kernels) as outcome, hopper.forced(wide[number % len(wide)]), contextlib.suppress(NotTaken):
            check_call(operator, call.args, "cuda")
        assert not outcome.reports, "\n".join(outcome.reports)
        served += outcome.blocks > 0
    assert served >= 10


@pytest.mark.parametrize("operator", OPERATORS_SERVED)
def test_opcheck(kernels: Path, monkeypatch: pytest.MonkeyPatch, operator: str) -> None:
    name, calls = f"{operator}_sm90", []

    class Recorder:
        def default(self, *args: object) -> None:
            calls.append(args)

    overload = getattr(torch.ops.lowkernels_cuda, name).default
    with monkeypatch.context() as patch, hopper.forced(2):
        patch.setattr(torch.ops.lowkernels_cuda, name, Recorder())
        execution.run(operator, random_call(operator, channels=16, dtype=torch.float16).args)
    (args,) = calls
    with execution.watched(kernels):
        torch.library.opcheck(overload, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("operator", OPERATORS_SERVED)
def test_each_barrier_is_needed(kernels: Path, operator: str) -> None:
    call = random_call(operator, dtype=torch.float16, **BROKEN[operator])
    with execution.watched(kernels) as intact, hopper.forced(3):
        execution.run(operator, call.args)
    assert not intact.reports
    assert {name.split(":")[0] for name in intact.barriers} >= {f"{operator}_sm90.cu", "expand_project_sm90.cuh"}
    for barrier in intact.barriers:
        with execution.watched(kernels, skip=barrier) as mutated, hopper.forced(3):
            execution.run(operator, call.args)
        assert any(report.startswith("race") for report in mutated.reports), f"{barrier} orders nothing"


def variant(operator: str, change: tuple[str, str, str] | None) -> Path:
    """One operator's kernels for fp16 and 256 columns, with one change."""
    replacements = [
        ("expand_project_sm90.cuh", "X(0, 3, 64) X(1, 3, 128) X(2, 2, 128) X(3, 2, 256)", "X(3, 2, 256)"),
        (f"{operator}_sm90.cu", "launch_config<WideChain<warpgroups, columns>, bf16_t>(p, stream);", "1;"),
        *([change] if change else []),
    ]

    def changed(file: str, text: str) -> str:
        for _, old, new in (r for r in replacements if r[0] == file):
            assert old in text, f"{file} has no {old!r}"
            text = text.replace(old, new, 1)
        return text

    return execution.kernels({file: partial(changed, file) for file, _, _ in replacements}, (f"{operator}_sm90",))


def symptoms(operator: str, library: Path) -> set[str]:
    call = random_call(operator, dtype=torch.float16, **BROKEN[operator])
    found = set()
    with execution.watched(library) as outcome, hopper.forced(3):
        try:
            check_call(operator, call.args, "cuda")
        except AssertionError:
            found.add(NUMBERS)
        except RuntimeError as error:
            if "the launch failed" not in str(error):
                raise
    return found | {report.split(" at ")[0] for report in outcome.reports}


@pytest.mark.parametrize("operator", OPERATORS_SERVED)
def test_intact_kernels_have_no_symptoms(on_hopper: None, operator: str) -> None:
    assert symptoms(operator, variant(operator, None)) == set()


@pytest.mark.parametrize(("operator", "file", "old", "new", "noticed"), BREAKAGES, ids=lambda text: str(text).strip()[:40])
def test_breakage_is_noticed(on_hopper: None, operator: str, file: str, old: str, new: str, noticed: str) -> None:
    assert noticed in symptoms(operator, variant(operator, (file, old, new)))


def test_offsets_beyond_2_to_31(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    batch = 2**31 // (64 * 64 * 64) + 2
    call = random_call("fused_mbconv", batch=1, channels=64, hidden=64, height=64, width=64, dtype=torch.float16)
    with execution.watched(kernels), hopper.forced(2):
        alone = execution.run("fused_mbconv", call.args)
    x = torch.zeros(batch, 64, 64, 64, dtype=torch.float16).permute(0, 3, 1, 2)
    assert x.numel() > 2**31
    x[-1:] = call.args[0]
    with execution.watched(kernels, only_last=1) as outcome, hopper.forced(2):
        out = execution.run("fused_mbconv", (x, *call.args[1:]))
    assert outcome.blocks == 1
    assert not outcome.reports, "\n".join(outcome.reports)
    # A CTA makes 128 pixels: two lines.
    assert torch.equal(out[-1, :, -2:], alone[0, :, -2:])


def shape_of(batch: int, channels: int, size: int, out_channels: int, stride: int = 1, norm: bool = False) -> chains.Shape:
    if norm:
        return chains.Shape(batch, channels, size * size, 1, out_channels, 1, 1, 0, 4 * channels, True)
    return chains.Shape(batch, channels, size, size, out_channels, 3, stride, 1, 4 * channels, False)


def test_plan_asks_for_what_the_launcher_asks_for(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[chains.Shape] = []

    def divisions(shape: chains.Shape, device: tiling.Device, config: int | None = None) -> list[tiling.Tile]:
        planned.append(shape)
        return inner(shape, device, config)

    inner = hopper.divisions
    monkeypatch.setattr(hopper, "divisions", divisions)
    for operator, config, shape in SHAPES:
        call = random_call(operator, dtype=torch.float16, **{**shape, "hidden": 8, "batch": 1})
        with execution.watched(kernels) as outcome, hopper.forced(config):
            execution.run(operator, call.args)
        assert outcome.shared == hopper.shared_bytes(planned[-1], inner(planned[-1], H200, config)[0])


def test_plan(on_hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "_check", lambda operator, x: "")

    def chosen(*args: Any, **options: Any) -> hopper.Config | None:
        tile = hopper.choose("fused_mbconv", shape_of(*args, **options), torch.empty(0))
        return hopper.CONFIGS[tile.config] if tile else None

    # The most images: three warpgroups. One image: the kernels that divide it among more CTAs.
    assert chosen(256, 128, 14, 128) == hopper.CONFIGS[1]
    assert chosen(256, 64, 14, 64) == hopper.CONFIGS[0]
    assert chosen(256, 128, 14, 256, stride=2) == hopper.CONFIGS[3]
    assert chosen(256, 128, 14, 128, norm=True) == hopper.CONFIGS[1]
    assert chosen(1, 16, 112, 32, stride=2) is None
    assert chosen(256, 512, 7, 512, norm=True) is None
    # A setting says it all: one of the others' leaves the call to them.
    shape, x = shape_of(256, 128, 14, 128), torch.empty(0)
    tried = hopper.candidates("fused_mbconv", shape, x)
    assert len(tried) > 2
    for setting in tried:
        with settings.using(setting):
            tile = hopper.choose("fused_mbconv", shape, x)
        assert (tile is not None) == ("tier" in setting)
        assert tile is None or setting == {**tile._asdict(), "tier": 90}
    monkeypatch.setenv(hopper.TIER_VARIABLE, "sm_80")
    assert chosen(256, 128, 14, 128) is None
    monkeypatch.setenv(hopper.TIER_VARIABLE, "sm_90a")
    assert chosen(1, 16, 112, 32, stride=2) is not None
    monkeypatch.setenv(hopper.TIER_VARIABLE, "hopper")
    with pytest.raises(ValueError, match="LOWKERNELS_CUDA_TIER is 'hopper'; allowed are auto, sm_80 and sm_90a"):
        chosen(256, 128, 14, 128)


def test_other_devices_pack_nothing() -> None:
    call = random_call("fused_mbconv", dtype=torch.float16)
    assert hopper.pack(*call.args[1:4]) == []
    assert hopper.unusable(torch.device("cpu")) == "it is for NVIDIA GPUs, not for cpu"


@pytest.mark.parametrize(
    ("capability", "compiled", "words"),
    [
        ((9, 0), "8.0;9.0a", None),
        ((9, 0), "9.0", "not compiled for 9.0a"),
        ((8, 0), "8.0;9.0a", "has 8.0"),
        ((10, 0), "9.0a", "has 10.0"),
    ],
)
def test_where_the_tier_runs(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], compiled: str, words: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(hopper.build, "built", lambda: Path("library"))
    monkeypatch.setattr(hopper.build, "library_architectures", lambda path: compiled)
    for cached in (hopper._missing, hopper.build.compiled_for):
        cached.cache_clear()
    try:
        reason = hopper.unusable(torch.device("cuda", 0))
    finally:
        for cached in (hopper._missing, hopper.build.compiled_for):
            cached.cache_clear()
    assert reason is None if words is None else words in (reason or "")


@pytest.mark.parametrize("operator", OPERATORS_SERVED)
def test_check_meets_every_compiled_shape(kernels: Path, monkeypatch: pytest.MonkeyPatch, operator: str) -> None:
    assert {config for config, _ in hopper._CASES[operator]} == {config.number for config in hopper.CONFIGS}
    x = torch.empty(0, dtype=torch.float16)
    with execution.watched(kernels) as outcome:
        assert hopper.refusal(operator, x) == ""
    assert not outcome.reports, "\n".join(outcome.reports)
    assert outcome.blocks > 2 * len(hopper._CASES[operator])


def test_tier_that_fails_its_check_is_not_used(
    on_hopper: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A descriptor that is wrong for the hardware: the check sees wrong numbers, and the other kernels are to serve."""
    change = ("warpgroup.cuh", "step * 32, 1024, 16, kSwizzle128", "step * 32, 1024, 16, kSwizzle64")
    library = variant("fused_mbconv", change)
    monkeypatch.setattr(hopper, "_CASES", {"fused_mbconv": ((3, BROKEN["fused_mbconv"]),)})
    monkeypatch.setattr(chains, "choose", not_taken)
    monkeypatch.setenv(hopper.TIER_VARIABLE, "sm_90a")
    call = random_call("fused_mbconv", channels=16, out_channels=132, hidden=32, dtype=torch.float16)
    with execution.watched(library), caplog.at_level(logging.WARNING, "lowkernels"), pytest.raises(NotTaken):
        execution.run("fused_mbconv", call.args)
    (reason,) = hopper._checked.values()
    assert "gave wrong numbers" in reason
    assert f"warpgroup products are not used for torch.float16: {reason}" in caplog.text
    assert f"without warpgroup products: fused_mbconv in torch.float16: {reason}" in hopper.describe()


def test_nothing_is_checked_while_a_graph_is_captured(on_hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        device, dtype, is_cuda = torch.device("cuda", 0), torch.float16, True

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "captured" in hopper.refusal("fused_mbconv", OnGpu())  # type: ignore[arg-type]
    assert not hopper._checked


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("operator", "config", "shape"), SHAPES)
def test_gpu(operator: str, config: int, shape: dict[str, Any], dtype: str) -> None:
    reason = cuda.unavailable("cuda") or launch.load() or hopper.unusable(torch.device("cuda", 0))
    if reason is not None:
        pytest.skip(reason)
    for batch in (shape["batch"], 100):
        call = random_call(operator, dtype=DTYPES[dtype], device="cuda", **{**shape, "batch": batch})
        with hopper.forced(config):
            first = check_call(operator, call.args, "cuda")
            assert torch.equal(first, check_call(operator, call.args, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("operator", OPERATORS_SERVED)
def test_gpu_passes_the_check(operator: str) -> None:
    reason = cuda.unavailable("cuda") or launch.load() or hopper.unusable(torch.device("cuda", 0))
    if reason is not None:
        pytest.skip(reason)
    for dtype in DTYPES.values():
        assert hopper.refusal(operator, torch.empty(0, dtype=dtype, device="cuda")) == ""
