"""The kernels' own source, run on the CPU: within the error budget, without a report, every output byte written once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lowkernels import dispatch
from lowkernels.backends.cuda import chains, tiling
from lowkernels.choosing import settings
from lowkernels.ops import OPERATORS
from lowkernels.ops.conv_act import cuda as conv_act
from lowkernels.testing import Call, check_call, random_call
from tests.cuda import cases, execution

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def prove(library: Path, call: Call) -> None:
    """Both schedules: right, silent, and the same to the last bit."""
    results = []
    for schedule in execution.SCHEDULES:
        with execution.watched(library, schedule) as outcome:
            results.append(check_call(call.operator, call.args, "cuda"))
        assert not outcome.reports, "\n".join(outcome.reports)
        assert outcome.blocks
        assert outcome.shared <= tiling.SMALLEST.shared
    assert torch.equal(*results)


def run(library: Path, operator: str, args: tuple[Any, ...]) -> torch.Tensor:
    with execution.watched(library) as outcome:
        result = execution.run(operator, args)
    assert not outcome.reports, "\n".join(outcome.reports)
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("operator", "shape"), [(name, shape) for name in cases.OPERATORS for shape in cases.NAMED[name]])
def test_named_shapes(kernels: Path, operator: str, shape: dict[str, Any], dtype: str) -> None:
    prove(kernels, random_call(operator, dtype=DTYPES[dtype], **shape))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", cases.OPERATORS)
def test_contract(kernels: Path, operator: str, dtype: str) -> None:
    served = 0
    for shape in cases.random_cases(operator, 24):
        call = random_call(operator, dtype=DTYPES[dtype], **shape)
        reason = dict(OPERATORS[operator].explain(*call.args).rejected).get("cuda")
        if reason is None:
            prove(kernels, call)
            served += 1
        else:
            assert "tokens" in reason
    assert served >= 20


@pytest.mark.parametrize("operator", ["separable_conv", "mbconv"])
@pytest.mark.parametrize(
    "tile", [tiling.Tile(2, 7, 7, 3), tiling.Tile(1, 7, 14, 3), tiling.Tile(1, 4, 14, 2), tiling.Tile(1, 1, 1, 2)]
)
def test_tiles_of_larger_gpus(kernels: Path, monkeypatch: pytest.MonkeyPatch, operator: str, tile: tiling.Tile) -> None:
    monkeypatch.setattr(tiling, "choose", lambda shape, device: tile)
    size = tile.height * tile.images if tile.height > 1 else 7
    call = random_call(operator, channels=136, hidden=72, out_channels=136, height=size, width=size, batch=3, dtype=torch.bfloat16)
    for schedule in execution.SCHEDULES:
        with execution.watched(kernels, schedule) as outcome:
            check_call(operator, call.args, "cuda")
        assert not outcome.reports, "\n".join(outcome.reports)


@pytest.mark.parametrize("operator", ["separable_conv", "mbconv"])
def test_plan_asks_for_what_the_launcher_asks_for(kernels: Path, operator: str) -> None:
    for shape in cases.random_cases(operator, 12):
        call = random_call(operator, dtype=torch.bfloat16, **shape)
        x = call.args[0]
        out_channels = shape["out_channels"]
        expanded = shape["hidden"] if operator == "mbconv" else 0
        planned = tiling.Shape(
            *x.shape, out_channels, shape["kernel_size"], shape["stride"], shape["padding"], expanded, expanded > 0
        )
        tile = tiling.choose(planned, tiling.SMALLEST)
        assert tile is not None
        with execution.watched(kernels) as outcome:
            execution.run(operator, call.args)
        assert outcome.shared == tiling.shared_bytes(planned, tile)


SHAPES_OF_CONV_ACT: list[dict[str, Any]] = [
    {"channels": 3, "out_channels": 140, "height": 21, "width": 15, "stride": 2, "act": "hardswish"},
    {"channels": 40, "out_channels": 68, "height": 8, "width": 7, "act": "silu", "residual": True, "batch": 3},
    {"channels": 20, "out_channels": 34, "height": 6, "width": 5, "pool": True, "residual": True, "batch": 5},
    {"channels": 24, "out_channels": 132, "height": 15, "width": 14, "pool": True, "kernel_size": 1, "batch": 1},
]


@pytest.mark.parametrize("config", conv_act.CONFIGS, ids=lambda c: f"{c.rows}x{c.columns}")
def test_every_shape_of_conv_act(kernels: Path, monkeypatch: pytest.MonkeyPatch, config: conv_act.Config) -> None:
    monkeypatch.setattr(conv_act, "configs", lambda *args: [config])
    for shape in SHAPES_OF_CONV_ACT:
        if shape.get("pool") and not config.pools:
            continue
        call = random_call("conv_act", dtype=torch.bfloat16, **shape)
        results = []
        for schedule in execution.SCHEDULES:
            with execution.watched(kernels, schedule) as outcome:
                results.append(check_call("conv_act", call.args, "cuda"))
            assert not outcome.reports, "\n".join(outcome.reports)
        assert torch.equal(*results)


def test_conv_act_plan_asks_for_what_the_launcher_asks_for(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for config in conv_act.CONFIGS:
        monkeypatch.setattr(conv_act, "configs", lambda *args, config=config: [config])
        for pool, batch in ((False, 1), (True, 1), (True, 3)):
            if pool and not config.pools:
                continue
            call = random_call("conv_act", channels=8, height=5, width=4, batch=batch, pool=pool, dtype=torch.float16)
            with execution.watched(kernels) as outcome:
                execution.run("conv_act", call.args)
            assert outcome.shared == config.shared(batch if pool else 0)
            assert outcome.blocks == (1 if pool else -(-20 * batch // config.rows))


def test_conv_act_divides_work_by_size() -> None:
    def chosen(*shape: int, pool: bool = False) -> tuple[int, int]:
        config = conv_act.configs(*shape, pool, tiling.Device(227 * 1024, 228 * 1024, 132))[0]
        return config.rows, config.columns

    # Few rows: the warps divide the depth. Many of both: the largest tile. Few columns: tall tiles.
    assert chosen(1, 1, 1600, 1536) == (16, 16)
    assert chosen(256, 196, 512, 1152) == (128, 128)
    assert chosen(256, 112 * 112, 32, 32) == (128, 32)
    for batch in (1, 256):
        assert chosen(batch, 49, 1536, 256, pool=True)[0] in (64, 128)


def test_conv_act_offsets_beyond_2_to_31(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    monkeypatch.setattr(conv_act, "configs", lambda *args: [conv_act.CONFIGS[2]])
    size, batch = 64, 2**31 // (64 * 64 * 64) + 2
    call = random_call("conv_act", batch=1, channels=64, out_channels=4, height=size, width=size, dtype=torch.float16)
    with execution.watched(kernels):
        alone = execution.run("conv_act", call.args)
    x = torch.zeros(batch, size, size, 64, dtype=torch.float16).permute(0, 3, 1, 2)
    assert x.numel() > 2**31
    x[-1:] = call.args[0]
    with execution.watched(kernels, only_last=1) as outcome:
        out = execution.run("conv_act", (x, *call.args[1:]))
    assert not outcome.reports, "\n".join(outcome.reports)
    assert outcome.blocks == 1
    assert torch.equal(out[-1, :, -1], alone[0, :, -1])


CHAINED = ("fused_mbconv", "gn_mlp")
# Runs of pixels that begin and end anywhere, whole images, rectangles that leave the image.
TILES_OF_CHAINS = [*(tiling.Tile(0, 1, pixels, 0) for pixels in (23, 45, 90)), tiling.Tile(1, 4, 4, 0)]


@pytest.mark.parametrize("operator", CHAINED)
@pytest.mark.parametrize("config", range(len(chains.CHAINS)))
def test_every_shape_of_chain(kernels: Path, monkeypatch: pytest.MonkeyPatch, operator: str, config: int) -> None:
    if operator == "gn_mlp" and config == 0:
        pytest.skip("gn_mlp has no such shape")
    for number, tile in enumerate(TILES_OF_CHAINS if operator == "fused_mbconv" else TILES_OF_CHAINS[:3]):
        forced = tile._replace(width=min(tile.width, chains.CHAINS[config].rows), config=config)
        monkeypatch.setattr(chains, "choose", lambda *args, forced=forced: forced)
        spatial = {"kernel_size": (3, 5, 7, 3)[number], "stride": (1, 2, 1, 2)[number]}
        shape = {"channels": 12, "hidden": 140, "out_channels": 68, "height": 9, "width": 5, "batch": 3, **spatial}
        prove(kernels, random_call(operator, dtype=DTYPES["bf16" if number % 2 else "fp16"], **shape))


@pytest.mark.parametrize("operator", CHAINED)
def test_plan_of_chains_asks_for_what_the_launcher_asks_for(kernels: Path, monkeypatch: pytest.MonkeyPatch, operator: str) -> None:
    planned = []
    choose = chains.choose

    def recorded(shape: chains.Shape, device: tiling.Device) -> tiling.Tile | None:
        tile = choose(shape, device)
        planned.append(0 if tile is None else chains.shared_bytes(shape, tile))
        return tile

    monkeypatch.setattr(chains, "choose", recorded)
    for shape in cases.random_cases(operator, 12):
        call = random_call(operator, dtype=torch.float16, **{**shape, "hidden": 4})
        with execution.watched(kernels) as outcome:
            execution.run(operator, call.args)
        assert outcome.shared == planned[-1]


@pytest.mark.parametrize(("size", "launches"), [(14, 1), (16, 1), (40, 2)])
def test_launches_of_gn_mlp(kernels: Path, monkeypatch: pytest.MonkeyPatch, size: int, launches: int) -> None:
    pieces = []
    count = chains.pieces
    monkeypatch.setattr(chains, "pieces", lambda *args: pieces.append(count(*args)) or pieces[-1])
    prove(kernels, random_call("gn_mlp", channels=60, hidden=16, height=size, width=size, batch=1, dtype=torch.float16))
    assert {1 + (number > 0) for number in pieces} == {launches}


def test_statistics_of_a_large_mean(kernels: Path) -> None:
    for size in (7, 40):  # where the image is whole in a CTA; of pieces
        call = random_call("gn_mlp", channels=60, hidden=16, height=size, width=size, batch=1, dtype=torch.float16)
        x = call.args[0] + 300
        prove(kernels, Call("gn_mlp", (x.contiguous(memory_format=torch.channels_last), *call.args[1:])))


def test_chains_divide_work_by_size() -> None:
    hopper = tiling.Device(227 * 1024, 228 * 1024, 132)

    def chosen(batch: int, channels: int, size: int, kernel: int) -> tuple[int, int]:
        sides = (size, size) if kernel > 1 else (size * size, 1)
        shape = chains.Shape(batch, channels, *sides, channels, kernel, 1, kernel // 2, 4 * channels, kernel == 1)
        tile = chains.choose(shape, hopper)
        assert tile is not None
        return chains.CHAINS[tile.config].split, tile.height * tile.width

    # A single image: warps share rows. Many small images: a CTA has whole ones, and their statistics.
    assert chosen(1, 128, 14, 3)[0] == 4
    assert chosen(256, 256, 7, 1) == (1, 98)
    assert chosen(256, 128, 14, 1) == (1, 196)


@pytest.mark.parametrize(
    ("channels", "size", "kernel", "stride", "tile"),
    [(128, 14, 3, 1, (14, 7)), (20, 56, 3, 2, (28, 4)), (36, 9, 5, 1, (9, 5)), (160, 30, 7, 2, (6, 15)), (16, 23, 1, 1, (23, 3))],
)
def test_rows_of_windows_meet_no_bank_twice(channels: int, size: int, kernel: int, stride: int, tile: tuple[int, int]) -> None:
    shape = chains.Shape(1, channels, size, size, 128, kernel, stride, kernel // 2, 512, False)
    width, height = tile
    _, pitch = chains.window(shape, tiling.Tile(1, height, width, 1))
    starts = [2 * (y * stride * pitch + x * (shape.depth + 8)) for y in range(height) for x in range(width)]
    # Eight rows of 16 bytes go through shared memory at once, 128 bytes wide.
    for first in range(0, len(starts) - 7, 8):
        assert len({start // 16 % 8 for start in starts[first : first + 8]}) == 8


@pytest.mark.parametrize("operator", CHAINED)
def test_division_that_a_setting_asks_for(kernels: Path, operator: str) -> None:
    call = random_call(operator, channels=68, height=6, width=5, dtype=torch.float16)
    kernel = dispatch.kernel(operator, "cuda")
    tried = kernel.candidates(*call.args)
    assert tried
    results = []
    for setting in ({}, *tried, {"images": 1, "height": 999, "width": 999, "config": 0}):
        with settings.using(setting):
            results.append(run(kernels, operator, call.args))
    assert torch.equal(results[0], results[-1])


@pytest.mark.parametrize("operator", [name for name in cases.OPERATORS if name != "conv_act"])
def test_offsets_beyond_2_to_31(kernels: Path, monkeypatch: pytest.MonkeyPatch, operator: str) -> None:
    # Zero pages cost no memory, and neither does an output that is not touched: only the last CTAs run.
    monkeypatch.setattr(tiling, "choose", lambda shape, device: tiling.Tile(1, 8, 8, 1))
    monkeypatch.setattr(chains, "choose", lambda shape, device: tiling.Tile(*((0, 1, 64) if shape.norm else (1, 8, 8)), 1))
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    size = {"lowtention": 8, "gn_mlp": 32}.get(operator, 64)
    batch = 2**31 // (size * size * 64) + 2
    call = random_call(operator, batch=1, channels=64, hidden=64, height=size, width=size, dtype=torch.float16)
    with execution.watched(kernels):
        alone = execution.run(operator, call.args)
    x = torch.zeros(batch, size, size, 64, dtype=torch.float16).permute(0, 3, 1, 2)
    assert x.numel() > 2**31
    x[-1:] = call.args[0]
    with execution.watched(kernels, only_last=1) as outcome:
        out = execution.run(operator, (x, *call.args[1:]))
    assert not outcome.reports, "\n".join(outcome.reports)
    assert outcome.blocks == 1
    rows, columns = (2, 32) if operator == "gn_mlp" else (8, 8)
    assert torch.equal(out[-1, :, -rows:, -columns:], alone[0, :, -rows:, -columns:])


@pytest.mark.parametrize("operator", cases.OPERATORS)
def test_nan_stays_in_its_image(kernels: Path, operator: str) -> None:
    call = random_call(operator, batch=3, channels=32, dtype=torch.float16)
    poisoned = call.args[0].clone(memory_format=torch.preserve_format)
    poisoned[1] = torch.nan
    clean, out = (run(kernels, operator, (x, *call.args[1:])) for x in (call.args[0], poisoned))
    assert torch.equal(out[0], clean[0])
    assert torch.equal(out[2], clean[2])
    assert out[1].isnan().all()


@pytest.mark.parametrize("operator", cases.OPERATORS)
def test_input_that_starts_anywhere(kernels: Path, operator: str) -> None:
    call = random_call(operator, channels=12, dtype=torch.float16)
    x = call.args[0]
    storage = torch.empty(x.numel() + 1, dtype=x.dtype)
    shifted = storage[1:].view(x.shape[0], *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2)
    shifted.copy_(x)
    assert shifted.data_ptr() % 16
    assert torch.equal(run(kernels, operator, (shifted, *call.args[1:])), run(kernels, operator, call.args))


def test_tokens_that_fit_larger_gpus_only(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = random_call("lowtention", channels=128, num_heads=2, head_dim=32, height=16, width=16, batch=1, dtype=torch.float16)
    blocks = []
    for device in (tiling.SMALLEST, tiling.Device(163 * 1024, 164 * 1024, 108)):
        monkeypatch.setattr(tiling, "SMALLEST", device)
        prove(kernels, call)
        with execution.watched(kernels) as outcome:
            execution.run("lowtention", call.args)
        blocks.append(outcome.blocks)
    # Four blocks of tokens, two of queries for each of two heads, four of tokens again; or four CTAs that share the output.
    assert blocks == [4 + 4 + 4, 4]


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"height": 2, "width": 1000, "head_dim": 32}, "bytes of shared memory"),
        ({"head_dim": 68}, "heads have 68 channels"),
        ({"channels": 1024, "head_dim": 64}, "bytes of shared memory"),
    ],
)
def test_attention_that_is_not_served_says_why(on_cpu: None, shape: dict[str, Any], words: str) -> None:
    call = random_call("lowtention", **{"channels": 16, "num_heads": 1, "dtype": torch.float16, **shape})
    assert words in dict(OPERATORS["lowtention"].explain(*call.args).rejected)["cuda"]


def test_attention_plan_asks_for_what_the_launcher_asks_for(kernels: Path) -> None:
    from lowkernels.ops.lowtention import cuda

    call = random_call("lowtention", channels=36, num_heads=2, head_dim=12, height=9, width=9, dtype=torch.float16)
    with execution.watched(kernels) as outcome:
        execution.run("lowtention", call.args)
    assert outcome.shared == cuda.shared_bytes(36, 32, 81)
    for channels, head_dim, width in ((36, 12, 17), (4, 32, 90), (320, 16, 20)):
        shape = {"channels": channels, "num_heads": 2, "head_dim": head_dim, "height": 17, "width": width, "batch": 1}
        call = random_call("lowtention", dtype=torch.float16, **shape)
        with execution.watched(kernels) as outcome:
            execution.run("lowtention", call.args)
        head = -(-head_dim // 16) * 16
        assert outcome.shared == cuda.shared_bytes_of_three(channels, 2 * head, head, width)


@pytest.mark.parametrize("operator", cases.OPERATORS)
def test_what_is_not_served_says_why(on_cpu: None, operator: str) -> None:
    op = OPERATORS[operator]
    refused: list[tuple[dict[str, Any], str]] = [({"dtype": torch.float32}, "not torch.float32")]
    if operator != "conv_act":  # serves any number of channels
        refused.append(({"channels": 6, "dtype": torch.float16}, "is 6;"))
    for shape, words in refused:
        call = random_call(operator, **{"num_heads": 1, **shape})
        choice = op.explain(*call.args)
        reasons = dict(choice.rejected)
        assert choice.backend != "cuda"
        assert words in reasons["cuda"]


@pytest.mark.parametrize(
    ("operator", "shape", "words"),
    [
        ("mbconv", {"channels": 2048, "kernel_size": 7}, "one output pixel needs"),
        ("fused_mbconv", {"channels": 1024, "kernel_size": 7}, "conv_weight: C_in is 1024 and the kernel 7x7"),
        ("gn_mlp", {"channels": 40000}, "fc1_weight: C is 40000: one pixel needs"),
    ],
)
def test_too_many_channels_for_shared_memory(on_cpu: None, operator: str, shape: dict[str, int], words: str) -> None:
    call = random_call(operator, hidden=8, out_channels=8, batch=1, dtype=torch.float16, **shape)  # type: ignore[arg-type]
    reasons = dict(OPERATORS[operator].explain(*call.args).rejected)
    assert words in reasons["cuda"]
    assert "bytes of shared memory" in reasons["cuda"]
