"""The tier of compute capability 9.0: its kernels in the shim, its packing, its plan, and what happens if it fails its check."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import lowkernels
from lowkernels.backends import cuda
from lowkernels.backends.cuda import chains, hopper, hopper_conv, hopper_mbconv, launch, tiling
from lowkernels.choosing import settings
from lowkernels.ops import OPERATORS
from lowkernels.ops.conv_act import cuda as conv_act
from lowkernels.ops.mbconv import cuda as mbconv
from lowkernels.testing import check_call, random_call
from tests.cuda import cases, execution

OPERATORS_SERVED = ("conv_act", "fused_mbconv", "gn_mlp", "mbconv")
NAMES = tuple(f"{name}_sm90" for name in OPERATORS_SERVED)
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
    ("conv_act", 0, {"channels": 128, "out_channels": 384, "height": 14, "width": 14, "batch": 1}),
    ("conv_act", 0, {"channels": 20, "out_channels": 36, "height": 9, "width": 7, "stride": 2, "batch": 5}),
    ("conv_act", 1, {"channels": 36, "out_channels": 260, "height": 3, "width": 90, "kernel_size": 5, "batch": 1, "act": "silu"}),
    ("conv_act", 1, {"channels": 4, "out_channels": 4, "height": 1, "width": 1, "batch": 1, "act": "gelu"}),
    ("conv_act", 1, {"channels": 256, "out_channels": 256, "height": 7, "width": 7, "kernel_size": 1, "pool": True, "batch": 3}),
    ("conv_act", 0, {"channels": 72, "out_channels": 132, "height": 5, "width": 6, "pool": True, "residual": True, "batch": 7}),
    ("conv_act", 0, {"channels": 12, "out_channels": 20, "height": 13, "width": 14, "pool": True, "batch": 2, "act": "none"}),
    # Two images a CTA; parts of an image; several CTAs for the columns; segments of one to eight outputs.
    ("mbconv", 0, {"channels": 256, "hidden": 192, "height": 7, "width": 7, "batch": 3}),
    ("mbconv", 1, {"channels": 132, "hidden": 68, "out_channels": 260, "height": 9, "width": 11, "batch": 2}),
    ("mbconv", 0, {"channels": 160, "hidden": 132, "height": 14, "width": 14, "batch": 1, "act": "gelu"}),
    ("mbconv", 1, {"channels": 200, "hidden": 64, "out_channels": 36, "height": 10, "width": 18, "padding": 0, "batch": 2}),
    ("mbconv", 0, {"channels": 136, "hidden": 4, "out_channels": 4, "height": 1, "width": 1, "batch": 5, "act": "silu"}),
    ("mbconv", 1, {"channels": 260, "hidden": 20, "out_channels": 132, "height": 2, "width": 70, "batch": 1, "act": "relu6"}),
]

CHAIN, CONV, BOTTLENECK, RING = "expand_project_sm90.cuh", "conv_act_sm90.cu", "mbconv_sm90.cu", "warpgroup.cuh"
# (case of BROKEN, file, what is changed, into what, how it has to be noticed)
BREAKAGES = [
    ("fused_mbconv", RING, "        fence_proxy_async();\n", "", "unfenced"),
    ("fused_mbconv", RING, "cp_async_wait<kAhead - 1>", "cp_async_wait<kAhead>", "pending"),
    ("fused_mbconv", RING, "block_sync();  // the slab", "// the slab", "race"),
    ("fused_mbconv", RING, "C::kStages - 2", "C::kStages - 1", "race"),
    ("fused_mbconv", CHAIN, "wgmma_wait<1>();\n                load", "load", "pending"),
    ("fused_mbconv", CHAIN, "load(a[(step + 1) % 2]", "load(a[step % 2]", "pending"),
    ("fused_mbconv", CHAIN, "wgmma_fence();\n                wgmma(", "wgmma(", "unfenced"),
    ("fused_mbconv", CHAIN, "wgmma_fence();\n                        wgmma(", "wgmma(", "unfenced"),
    ("fused_mbconv", CHAIN, "wgmma_wait<0>();\n        wgmma_settle(sums)", "wgmma_settle(sums)", "pending"),
    ("fused_mbconv", CHAIN, "wgmma_wait<0>();\n#pragma unroll\n        for (int part", "for (int part", "pending"),
    ("fused_mbconv", CHAIN, "kParts > 1 ? kSlabSteps : 2", "1", "pending"),
    ("fused_mbconv", CHAIN, "kParts > 1 ? kSlabSteps : 2", "2", NUMBERS),
    (
        "fused_mbconv",
        CHAIN,
        "sums, a[step % 2], slab_operand(weights, step)",
        "sums, a[step % 2], slab_operand(weights, 0)",
        NUMBERS,
    ),
    ("fused_mbconv", CHAIN, "slab + step > 0", "true", NUMBERS),
    ("fused_mbconv", CHAIN, "chunk + group > 0", "group > 0", NUMBERS),
    ("fused_mbconv", CHAIN, "channel += kWideChunk;", "", NUMBERS),
    ("fused_mbconv", CHAIN, "step < steps ? row + taps[step] : zeros", "row + taps[step]", "bounds"),
    (
        "fused_mbconv",
        CHAIN,
        "at[half] = pixel.live ? ((pixels",
        "at[half] = true ? ((pixels",
        "bounds",
    ),
    ("fused_mbconv", RING, "if (first + group * kGroup >= columns) continue;", "", "bounds"),
    ("fused_mbconv", "fused_mbconv_sm90.cu", "thread_index() * 4) = {};", "0) = {};", "unwritten"),
    ("fused_mbconv", "fused_mbconv_sm90.cu", "        block_sync();", "", "race"),
    ("fused_mbconv", "fused_mbconv_sm90.cu", "cp_async_wait<Slabs<C>::kAhead>();", "", "pending"),
    ("fused_mbconv", "warpgroup.cuh", "step * 32, 1024, 16, kSwizzle128", "step * 32, 1024, 16, kSwizzle64", NUMBERS),
    ("gn_mlp", "gn_mlp_sm90.cu", "cp_async_wait<Slabs<C>::kAhead>();", "", "pending"),
    ("gn_mlp", "gn_mlp_sm90.cu", "        block_sync();", "", "race"),
    ("gn_mlp", "gn_mlp_sm90.cu", "2 * C::kWarps * sizeof(float)", "0", "bounds"),
    ("conv_act", CONV, "cp_async_wait<Slabs<C>::kAhead>();", "", "pending"),
    ("conv_act", CONV, "        block_sync();  // the window", "        // the window", "race"),
    ("conv_act", CONV, " && row + 8 * half < left;", ";", "bounds"),
    ("conv_act", CONV, "row + 8 * half < c.t.p.g.tile_w && ", "", "twice"),
    ("conv_act", CONV, "if (column + group * kGroup >= p.g.co) continue;", "", "bounds"),
    ("conv_act", CONV, "p.expand_bias + (at < p.g.co ? at : 0)", "p.expand_bias + at", "bounds"),
    ("conv_act", CONV, "from + (at < p.g.co ? at : 0)", "from + at", "bounds"),
    ("conv_act", CONV, "static_cast<int64_t>(first) * t.pieces * kSlabUnits", "0", NUMBERS),
    ("conv_act", CONV, "(end - first) * t.pieces", "t.pieces", NUMBERS),
    ("conv_act", CONV, "const int first = block_y() * c.blocks", "const int first = 0", "twice"),
    ("conv_act", CONV, "sums[2 * group + i / 2][2 * half + i % 2]", "sums[2 * group + i % 2][2 * half + i / 2]", NUMBERS),
    ("conv_act", CHAIN, "wgmma_wait<0>();\n        wgmma_settle(sums)", "wgmma_settle(sums)", "pending"),
    ("pool", CONV, "block_sync();  // the sums", "// the sums", "race"),
    ("pool", CONV, "C::kRing + totals);\n    if (dtype", "C::kRing);\n    if (dtype", "bounds"),
    ("pool", CONV, "const WideShared<T> shared(t, C::kRing + totals)", "const WideShared<T> shared(t, C::kRing)", NUMBERS),
    ("pool", CONV, "fold<4>(v, 8);", "", NUMBERS),
    ("pool", CONV, "upper = row >= begin && row < end", "upper = row < end", NUMBERS),
    ("pool", CONV, "lower = row + 8 >= begin && row + 8 < end", "lower = row + 8 >= begin", NUMBERS),
    ("pool", CONV, "static_cast<int64_t>(image) * pixels >= left || ", "", "bounds"),
    ("pool", CONV, "warp * 16 < (image + 1) * pixels; warp++", "warp < C::kWarps; warp++", "unwritten"),
    ("mbconv", RING, "        fence_proxy_async();\n", "", "unfenced"),
    ("mbconv", RING, "cp_async_wait<kAhead - 1>", "cp_async_wait<kAhead>", "pending"),
    ("mbconv", RING, "block_sync();  // the slab", "// the slab", "race"),
    (
        "mbconv",
        BOTTLENECK,
        "wgmma_fence();\n                        wgmma(T{}, hidden",
        "wgmma(T{}, hidden",
        "unfenced",
    ),
    (
        "mbconv",
        BOTTLENECK,
        "wgmma_commit();\n                }\n                if (conv",
        "}\n                if (conv",
        "pending",
    ),
    ("mbconv", BOTTLENECK, "wgmma_wait<1>();\n            }\n            if", "}\n            if", "race"),
    ("mbconv", BOTTLENECK, "wgmma_wait<1>();\n            }\n        }", "}\n        }", "race"),
    ("mbconv", BOTTLENECK, "wgmma_wait<0>();\n            wgmma_settle(hidden)", "wgmma_settle(hidden)", "pending"),
    ("mbconv", BOTTLENECK, "wgmma_wait<0>();\n                block_sync();", "block_sync();", "race"),
    ("mbconv", BOTTLENECK, "block_sync();  // the window", "// the window", "race"),
    ("mbconv", BOTTLENECK, "wgmma_wait<0>();\n        int block", "int block", "pending"),
    (
        "mbconv",
        BOTTLENECK,
        "(int i = thread_index(); i < quads;",
        "(int i = quads; i < quads;",
        "unwritten",
    ),
    ("mbconv", BOTTLENECK, "(int i = thread_index(); i < kRowsBytes / 8;", "(int i = kRowsBytes; i < kRowsBytes / 8;", "unwritten"),
    ("mbconv", BOTTLENECK, "image < g.n && from < g.c", "from < g.c", "bounds"),
    ("mbconv", BOTTLENECK, "image < g.n && from < g.c", "image < g.n", "bounds"),
    ("mbconv", BOTTLENECK, "chunk + 1, hidden, target", "chunk, hidden, target", "bounds"),
    ("mbconv", BOTTLENECK, "if (j < reach)", "", "bounds"),
    ("mbconv", BOTTLENECK, "count > 0 ? count + kTaps - 1 : 0", "count + kTaps - 1", "bounds"),
    ("mbconv", BOTTLENECK, "if (i < count) store4", "store4", "race"),
    ("mbconv", BOTTLENECK, "if (to >= 0) store4", "store4", "race"),
    ("mbconv", BOTTLENECK, "(unit ^ row % 8) << 4", "unit << 4", NUMBERS),
    ("mbconv", BOTTLENECK, "block_y() * C::kColumns + ", "", "twice"),
    ("mbconv", BOTTLENECK, "static_cast<int64_t>(block_y()) * count * kSlabUnits", "0", NUMBERS),
    ("mbconv", BOTTLENECK, "t.chunks * (t.slabs + C::kParts);", "t.chunks * (t.slabs + C::kParts) - 1;", NUMBERS),
    ("mbconv", BOTTLENECK, "image >= g.n || y >= g.ho", "y >= g.ho", "bounds"),
    ("mbconv", BOTTLENECK, "i + step > 0", "step > 0", NUMBERS),
    ("mbconv", BOTTLENECK, "chunk + step > 0", "step > 0", NUMBERS),
    ("mbconv", BOTTLENECK, "2 * i * kRowsBytes + rows;", "2 * i * kRowsBytes;", NUMBERS),
    ("mbconv", BOTTLENECK, "shared_address(tile) + rows", "shared_address(tile)", NUMBERS),
    ("mbconv", BOTTLENECK, "(i * kTaps + tap) * channels", "(tap * kTaps + i) * channels", NUMBERS),
    ("mbconv", BOTTLENECK, "pixel * kWindowLength;", "(pixel - place.window_w) * kWindowLength;", NUMBERS),
]
BROKEN: dict[str, dict[str, Any]] = {
    "mbconv": {"channels": 260, "hidden": 132, "out_channels": 260, "height": 7, "width": 6, "batch": 3},
    "fused_mbconv": {"channels": 20, "hidden": 260, "out_channels": 132, "height": 9, "width": 7, "batch": 3},
    "gn_mlp": {"channels": 132, "hidden": 260, "height": 9, "width": 7, "batch": 3},
    "conv_act": {"channels": 20, "out_channels": 260, "height": 14, "width": 14, "residual": True, "batch": 1},
    "pool": {"channels": 20, "out_channels": 260, "height": 9, "width": 7, "pool": True, "batch": 3},
}
# Two CTAs share the columns; the last CTA is not full. Of conv_act one CTA makes two blocks of columns.
TILES: dict[str, tuple[Any, Any]] = {
    "conv_act": (hopper_conv, hopper_conv.Tile(110, 2, 1)),
    "pool": (hopper_conv, hopper_conv.Tile(126, 2, 1)),
    "mbconv": (hopper_mbconv, tiling.Tile(2, 7, 6, 1)),
}


def operator_of(case: str) -> str:
    return "conv_act" if case == "pool" else case


def configs_of(operator: str) -> set[int]:
    """The numbers of an operator's compiled shapes."""
    configs: dict[str, tuple[Any, ...]] = {"conv_act": hopper_conv.CONFIGS, "mbconv": hopper_mbconv.CONFIGS}
    return {config.number for config in configs.get(operator, hopper.CONFIGS)}


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


class Others:
    """In the place of an operator of the other kernels."""

    @staticmethod
    def default(*args: object) -> None:
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
    monkeypatch.setattr(torch.ops.lowkernels_cuda, operator, Others())
    served = 0
    for number, shape in enumerate(cases.random_cases(operator, 12)):
        call = random_call(operator, dtype=(torch.float16, torch.bfloat16)[number % 2], **shape)
        wide = sorted(configs_of(operator))
        if operator == "mbconv":
            # The layers that the tier is for.
            shape |= {"channels": 132 + shape["channels"], "kernel_size": 3, "stride": 1, "padding": min(1, shape["padding"])}
            shape |= {"padding": 1} if min(shape["height"], shape["width"]) < 3 else {}
            call = random_call(operator, dtype=(torch.float16, torch.bfloat16)[number % 2], **shape)
        elif operator != "conv_act":
            out_channels = OPERATORS[operator].infer_shape(*call.args)[1]
            wide = [c.number for c in hopper.CONFIGS if -(-out_channels // 128) == c.parts and out_channels <= c.columns]
        with execution.watched(kernels) as outcome, hopper.forced(wide[number % len(wide)]), contextlib.suppress(NotTaken):
            check_call(operator, call.args, "cuda")
        assert not outcome.reports, "\n".join(outcome.reports)
        served += outcome.blocks > 0
    # conv_act has any channels; the tier takes multiples of four.
    assert served >= (3 if operator == "conv_act" else 10)


@pytest.mark.parametrize("operator", OPERATORS_SERVED)
def test_opcheck(kernels: Path, monkeypatch: pytest.MonkeyPatch, operator: str) -> None:
    name, calls = f"{operator}_sm90", []

    class Recorder:
        def default(self, *args: object) -> None:
            calls.append(args)

    overload = getattr(torch.ops.lowkernels_cuda, name).default
    with monkeypatch.context() as patch, hopper.forced(0):
        patch.setattr(torch.ops.lowkernels_cuda, name, Recorder())
        execution.run(operator, random_call(operator, channels=132 if operator == "mbconv" else 16, dtype=torch.float16).args)
    (args,) = calls
    with execution.watched(kernels):
        torch.library.opcheck(overload, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("case", BROKEN)
def test_each_barrier_is_needed(kernels: Path, case: str) -> None:
    operator = operator_of(case)
    config = max(configs_of(operator))
    call = random_call(operator, dtype=torch.float16, **BROKEN[case])
    with execution.watched(kernels) as intact, hopper.forced(config):
        execution.run(operator, call.args)
    assert not intact.reports
    assert {name.split(":")[0] for name in intact.barriers} >= {f"{operator}_sm90.cu", "warpgroup.cuh"}
    for barrier in intact.barriers:
        with execution.watched(kernels, skip=barrier) as mutated, hopper.forced(config):
            execution.run(operator, call.args)
        assert any(report.startswith("race") for report in mutated.reports), f"{barrier} orders nothing"


def variant(operator: str, change: tuple[str, str, str] | None) -> Path:
    """One operator's kernels for fp16 and the last of its shapes, with one change."""
    chain = [
        (CHAIN, "X(0, 3, 64) X(1, 3, 128) X(2, 2, 128) X(3, 2, 256)", "X(3, 2, 256)"),
        (f"{operator}_sm90.cu", "launch_config<WideChain<warpgroups, columns>, bf16_t>(p, stream);", "1;"),
    ]
    convolution = [
        (CONV, "X(0, 3, 5, 1) X(1, 2, 3, 2)", "X(1, 2, 3, 2)"),
        (CONV, "return launch(conv_act_sm90<bf16_t, C, POOL>, grid, C::kThreads, shared, stream, c);", "return 1;"),
    ]
    bottleneck = [
        (BOTTLENECK, "X(0, 4) X(1, 3)", "X(1, 3)"),
        (BOTTLENECK, "launch_config<WideMBConv<stages>, bf16_t>(p, stream);", "1;"),
    ]
    replacements = [*{"conv_act": convolution, "mbconv": bottleneck}.get(operator, chain), *([change] if change else [])]

    def changed(file: str, text: str) -> str:
        for _, old, new in (r for r in replacements if r[0] == file):
            assert old in text, f"{file} has no {old!r}"
            text = text.replace(old, new, 1)
        return text

    return execution.kernels({file: partial(changed, file) for file, _, _ in replacements}, (f"{operator}_sm90",))


def symptoms(case: str, library: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    operator = operator_of(case)
    call = random_call(operator, dtype=torch.float16, **BROKEN[case])
    if case in TILES:
        module, tile = TILES[case]
        monkeypatch.setattr(module, "divisions", lambda *args: [tile])
    found = set()
    with execution.watched(library) as outcome, hopper.forced(max(configs_of(operator))):
        try:
            check_call(operator, call.args, "cuda")
        except AssertionError:
            found.add(NUMBERS)
        except RuntimeError as error:
            if "the launch failed" not in str(error):
                raise
    return found | {report.split(" at ")[0] for report in outcome.reports}


@pytest.mark.parametrize("case", BROKEN)
def test_intact_kernels_have_no_symptoms(on_hopper: None, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    assert symptoms(case, variant(operator_of(case), None), monkeypatch) == set()


@pytest.mark.parametrize(("case", "file", "old", "new", "noticed"), BREAKAGES, ids=lambda text: str(text).strip()[:40])
def test_breakage_is_noticed(
    on_hopper: None, monkeypatch: pytest.MonkeyPatch, case: str, file: str, old: str, new: str, noticed: str
) -> None:
    assert noticed in symptoms(case, variant(operator_of(case), (file, old, new)), monkeypatch)


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
    planned: list[Any] = []

    def remember(inner: Callable[..., list[Any]], *args: Any) -> list[Any]:
        planned.append(args[0])
        return inner(*args)

    for module in (hopper, hopper_conv, hopper_mbconv):
        monkeypatch.setattr(module, "divisions", partial(remember, module.divisions))
    for operator, config, shape in SHAPES:
        fewer = {"batch": 1} if operator == "conv_act" else {"hidden": 8, "batch": 1}
        call = random_call(operator, dtype=torch.float16, **{**shape, **fewer})
        with execution.watched(kernels) as outcome, hopper.forced(config):
            execution.run(operator, call.args)
        plan: Any = {"conv_act": hopper_conv, "mbconv": hopper_mbconv}.get(operator, hopper)
        assert outcome.shared == plan.shared_bytes(planned[-1], plan.divisions(planned[-1], H200, config)[0])


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


def test_plan_of_convolutions(on_hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "_check", lambda operator, x: "")

    def chosen(batch: int, channels: int, size: int, out_channels: int, kernel: int = 3, pool: bool = False) -> Any:
        x = torch.empty(batch, channels, size, size, device="meta")
        plan = conv_act._plan(x, torch.empty(out_channels, channels, kernel, kernel, device="meta"), 1, kernel // 2, pool)
        return hopper_conv.choose(plan.conv, x, plan.cost)

    # The head of LowFormer-B1: whole images. Dense layers: three warpgroups where the window leaves room for them.
    assert chosen(256, 256, 7, 1536, 1, pool=True) == hopper_conv.Tile(98, 2, 1)
    assert chosen(256, 128, 14, 512) == hopper_conv.Tile(192, 1, 0)
    # One image, an image of three channels, an image of more pixels than a CTA has rows, a single row: the kernels of every GPU.
    assert chosen(1, 256, 7, 1536, 1, pool=True) is None
    assert chosen(256, 3, 224, 16) is None
    assert chosen(256, 256, 14, 1536, 1, pool=True) is None
    assert chosen(1, 1536, 1, 1600, 1) is None
    assert hopper_conv.pack(torch.empty(1600, 1536, 1, 1)) == []

    # What a tuner tries: other divisions of the tier, and all shapes of the kernels of every GPU.
    call = torch.empty(256, 128, 14, 14, device="meta"), torch.empty(512, 128, 3, 3, device="meta"), None, "none", 1, 1, None, False
    tried = conv_act.candidates(*call)
    wide = [t for t in tried if "tier" in t]
    assert wide
    assert hopper.setting_of(hopper_conv.Tile(192, 1, 0)) not in wide
    assert [t for t in tried if t not in wide] == [{"config": c.number} for c in conv_act._plan(*call[:2], 1, 1, False).configs]
    for setting in tried:
        with settings.using(setting):
            plan = conv_act._plan(*call[:2], 1, 1, False)
            tile = hopper_conv.choose(plan.conv, call[0], plan.cost)
            assert setting == ({"config": plan.config.number} if tile is None else hopper.setting_of(tile))
    monkeypatch.setenv(hopper.TIER_VARIABLE, "sm_80")
    assert chosen(256, 256, 7, 1536, 1, pool=True) is None
    monkeypatch.setenv(hopper.TIER_VARIABLE, "sm_90a")
    assert chosen(1, 256, 7, 1536, 1, pool=True) is not None
    assert chosen(256, 3, 224, 16) is None


def test_plan_of_mbconv(on_hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "_check", lambda operator, x: "")

    def chosen(batch: int, channels: int, size: int, kernel: int = 3, stride: int = 1, wide: bool = False) -> Any:
        shape = tiling.Shape(batch, channels, size, size, channels, kernel, stride, kernel // 2, 4 * channels, wide)
        return hopper_mbconv.choose(shape, torch.empty(0))

    # LowFormer's last stages: whole images or halves of them; 512 channels leave room for three slabs, in bf16 of one image.
    assert chosen(256, 256, 7) == tiling.Tile(2, 7, 7, 0)
    assert chosen(256, 256, 7, wide=True) == tiling.Tile(2, 7, 7, 0)
    assert chosen(256, 256, 14) == tiling.Tile(1, 7, 14, 0)
    assert chosen(256, 512, 7) == tiling.Tile(2, 7, 7, 1)
    assert chosen(256, 512, 7, wide=True) == tiling.Tile(1, 7, 7, 1)
    # Few channels, other kernels and strides, an image of 512 channels: the kernels of every GPU.
    assert chosen(256, 128, 14) is None
    assert chosen(256, 256, 7, kernel=5) is None
    assert chosen(256, 256, 7, stride=2) is None
    assert chosen(1, 512, 7) is None

    call = random_call("mbconv", channels=256, height=7, width=7, batch=1, dtype=torch.float16)
    x = torch.empty(256, 256, 7, 7, dtype=torch.float16, device="meta")
    tried = mbconv.candidates(x, *call.args[1:])
    assert {*map(len, tried)} == {len(tiling.Tile._fields), len(tiling.Tile._fields) + 1}
    for setting in tried:
        with settings.using(setting):
            tile = hopper_mbconv.choose(mbconv._shape(x, *call.args[1:6:2], 1, 1), x)
        assert (tile is not None) == ("tier" in setting)
        assert tile is None or setting == hopper.setting_of(tile)
    monkeypatch.setenv(hopper.TIER_VARIABLE, "sm_80")
    assert chosen(256, 256, 7) is None
    monkeypatch.setenv(hopper.TIER_VARIABLE, "sm_90a")
    assert chosen(1, 512, 7) is not None
    assert chosen(256, 128, 14) is None


def test_other_devices_pack_nothing() -> None:
    call = random_call("fused_mbconv", dtype=torch.float16)
    assert hopper.pack(*call.args[1:4]) == []
    assert hopper_conv.pack(call.args[1]) == []
    assert len(mbconv.pack(*random_call("mbconv", channels=256, dtype=torch.float16).args[1:])) == 6
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
    assert {config for config, _ in hopper._CASES[operator]} == configs_of(operator)
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
    monkeypatch.setattr(torch.ops.lowkernels_cuda, "fused_mbconv", Others())
    monkeypatch.setenv(hopper.TIER_VARIABLE, "sm_90a")
    call = random_call("fused_mbconv", channels=16, out_channels=132, hidden=32, dtype=torch.float16)
    with execution.watched(library), caplog.at_level(logging.WARNING, "lowkernels"), pytest.raises(NotTaken):
        execution.run("fused_mbconv", call.args)
    (reason,) = hopper._checked.values()
    assert "gave wrong numbers" in reason
    assert f"warpgroup products are not used for torch.float16: {reason}" in caplog.text
    assert f"without warpgroup products: fused_mbconv in torch.float16: {reason}" in hopper.describe()
    # Calls that it would have served say so, and no others.
    with lowkernels.use_backend("cuda"):
        assert OPERATORS["fused_mbconv"].explain(*call.args).reason.endswith(f"; without warpgroup products: {reason}")
        wider = random_call("fused_mbconv", channels=16, out_channels=300, hidden=32, dtype=torch.float16)
        assert "warpgroup" not in OPERATORS["fused_mbconv"].explain(*wider.args).reason
        monkeypatch.setenv(hopper.TIER_VARIABLE, "sm_80")
        assert "warpgroup" not in OPERATORS["fused_mbconv"].explain(*call.args).reason


def test_failed_check_is_in_the_report(on_hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "_check", lambda operator, x: "a reason")
    monkeypatch.setenv(hopper.TIER_VARIABLE, "sm_90a")
    model = torch.nn.Sequential(lowkernels.nn.FusedMBConv(16, 16, backend="cuda")).half().eval()
    with execution.watched(execution.kernels()) as outcome, torch.no_grad():
        model(torch.zeros(2, 16, 5, 5, dtype=torch.float16))
    assert outcome.blocks
    (row,) = lowkernels.report(model)
    assert row.ran_on == "cuda"
    assert row.reason.endswith("; without warpgroup products: a reason; sizes: rule")


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
