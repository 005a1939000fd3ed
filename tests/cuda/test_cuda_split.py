"""Split-K: several CTAs share the expanded channels of the same outputs, and whoever comes last adds up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowkernels.backends.cuda import chains, split, tiling
from lowkernels.testing import check_call, random_call
from tests.cuda import execution

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
H200 = tiling.Device(227 * 1024, 228 * 1024, 132)

# What a call is, the tile of a CTA, and how many share it: the last one with less than the others, several CTAs for the columns,
# CTAs across images and beyond the last one.
CALLS: list[tuple[str, tiling.Tile, int, dict[str, Any]]] = [
    (
        "mbconv",
        tiling.Tile(1, 1, 7, 2),
        4,
        {"channels": 64, "out_channels": 256, "hidden": 256, "height": 3, "width": 7, "batch": 1},
    ),
    (
        "mbconv",
        tiling.Tile(2, 5, 4, 2),
        2,
        {"channels": 20, "out_channels": 300, "hidden": 132, "height": 5, "width": 4, "batch": 3},
    ),
    ("mbconv", tiling.Tile(1, 2, 3, 2), 3, {"channels": 132, "hidden": 300, "height": 5, "width": 7, "stride": 2, "batch": 2}),
    ("fused_mbconv", tiling.Tile(1, 2, 7, 6), 4, {"channels": 64, "hidden": 256, "height": 5, "width": 7, "batch": 1}),
    (
        "fused_mbconv",
        tiling.Tile(0, 1, 32, 6),
        2,
        {"channels": 20, "hidden": 100, "out_channels": 300, "height": 7, "width": 6, "batch": 3},
    ),
    ("gn_mlp", tiling.Tile(0, 1, 25, 6), 3, {"channels": 72, "hidden": 260, "height": 7, "width": 7, "batch": 2}),
    ("gn_mlp", tiling.Tile(0, 1, 32, 6), 2, {"channels": 128, "hidden": 128, "height": 23, "width": 23, "batch": 1}),
]
Force = Callable[[tiling.Tile, int], None]


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Force:
    """Makes calls have this tile, and so many CTAs share it."""

    def to(tile: tiling.Tile, splits: int) -> None:
        for module in (tiling, chains):
            monkeypatch.setattr(module, "choose", lambda *args: tile)
            monkeypatch.setattr(module, "splits", lambda *args: splits)

    return to


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("operator", "tile", "splits", "shape"), CALLS)
def test_calls(
    kernels: Path, force: Force, operator: str, tile: tiling.Tile, splits: int, shape: dict[str, Any], dtype: str
) -> None:
    call = random_call(operator, dtype=DTYPES[dtype], **shape)
    results, blocks = [], []
    for schedule in execution.SCHEDULES:
        for shared in (splits, 1):
            force(tile, shared)
            with execution.watched(kernels, schedule) as outcome:
                results.append(check_call(operator, call.args, "cuda"))
            assert not outcome.reports, "\n".join(outcome.reports)
            blocks.append(outcome.blocks)
    assert torch.equal(results[0], results[2])
    assert blocks[0] > blocks[1]
    # What they met in is as it was.
    for tickets in split._tickets.values():
        assert not tickets._turns.any()


def test_each_barrier_is_needed(kernels: Path, force: Force) -> None:
    operator, tile, splits, shape = CALLS[0]
    force(tile, splits)
    call = random_call(operator, dtype=torch.float16, **shape)
    with execution.watched(kernels) as intact:
        execution.run(operator, call.args)
    barriers = [barrier for barrier in intact.barriers if barrier.startswith("split.cuh")]
    assert len(barriers) == 2
    for barrier in barriers:
        with execution.watched(kernels, skip=barrier) as mutated:
            execution.run(operator, call.args)
        assert any(report.startswith("race") for report in mutated.reports), f"{barrier} orders nothing"


BREAKAGES = [
    ("split.cuh", "load4_fresh(", "load4(", "same-launch"),
    ("split.cuh", "s.sums + block_x() % s.count * elements_of(g)", "s.sums", "twice"),
    ("split.cuh", "== s.count - 1;", "== 0;", "unwritten"),
    ("split.cuh", "share < s.count", "share + 1 < s.count", "numbers"),
    ("split.cuh", "(block % s.count + 1) * s.chunks", "(block % s.count + 2) * s.chunks", "numbers"),
    ("split.cuh", "block_x() % s.count * s.chunks", "0", "numbers"),
    ("split.cuh", "outputs_of_block(s) * columns + block_y()", "block_y()", "twice"),
    ("expand_project.cuh", "split == 0 && (!C::kSplits || first_chunk(t.p.split) == 0)", "split == 0", "numbers"),
    (
        "expand_project.cuh",
        "if (!comes_last(p.split, ceil_div(p.g.co, C::kGroups * kGroup), flag)) return false;",
        "",
        "same-launch",
    ),
]


@pytest.mark.parametrize(("file", "old", "new", "noticed"), BREAKAGES)
def test_breakage_is_noticed(on_cpu: None, force: Force, file: str, old: str, new: str, noticed: str) -> None:
    operator, tile, splits, shape = CALLS[4]
    force(tile, splits)

    def changed(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    library = execution.kernels({file: changed}, (operator,))
    call = random_call(operator, dtype=torch.float16, **shape)
    found = set()
    # CTAs come in no order.
    with execution.watched(library, execution.SCHEDULES[1]) as outcome:
        try:
            check_call(operator, call.args, "cuda")
        except AssertionError:
            found.add("numbers")
    assert noticed in found | {report.split(" at ")[0] for report in outcome.reports}


def test_launchers_refuse_what_does_not_fit(kernels: Path, force: Force, monkeypatch: pytest.MonkeyPatch) -> None:
    operator, tile, _, shape = CALLS[0]
    call = random_call(operator, dtype=torch.float16, **shape)
    for splits, room in ((3, 8), (5, 8), (4, 0)):  # a share without a chunk, twice; too few tickets
        force(tile, splits)
        tensors = [torch.empty(splits * 21 * 256), torch.zeros(room, dtype=torch.int32)]
        monkeypatch.setattr(split, "memory", lambda *args, given=(tensors, splits): given)
        with execution.watched(kernels), pytest.raises(RuntimeError, match="no such configuration"):
            execution.run(operator, call.args)


def test_plan() -> None:
    # One image: all multiprocessors. Many: none to spare. Shapes that are not compiled for it, and separable_conv: never.
    one = chains.Shape(1, 128, 14, 14, 128, 3, 1, 1, 512, False)
    tile = chains.choose(one, H200)
    assert tile is not None
    assert chains.CHAINS[tile.config].splits
    assert 1 < chains.splits(one, tile, H200) <= 8
    assert chains.splits(one, tile, H200) * chains.ctas(one, tile) <= 132
    many = one._replace(batch=256)
    tile = chains.choose(many, H200)
    assert tile is not None
    assert chains.splits(many, tile, H200) == 1
    assert chains.splits(one, tile._replace(config=1), H200) == 1
    block = tiling.Shape(1, 256, 7, 7, 256, 3, 1, 1, 1024, False)
    chosen = tiling.choose(block, H200)
    assert chosen is not None
    assert tiling.splits(block, chosen, H200) == 16
    assert tiling.splits(block, chosen._replace(config=3), H200) == 1
    separable = block._replace(expanded=0)
    assert tiling.splits(separable, chosen, H200) == 1


@pytest.mark.parametrize(("ctas", "chunks", "expected"), [(1, 8, 8), (20, 16, 6), (66, 8, 2), (67, 8, 1), (500, 8, 1), (1, 1, 1)])
def test_no_more_than_there_are_multiprocessors(ctas: int, chunks: int, expected: int) -> None:
    assert split.cheapest(ctas, chunks, H200, lambda count: -count) == expected


def test_tickets() -> None:
    tickets = split._Tickets(torch.device("cpu"))
    first, second = tickets.take(5, False), tickets.take(3, False)
    assert first is not None
    assert second is not None
    assert (first.numel(), second.data_ptr() - first.data_ptr()) == (8, 32)
    # They come in turn; a captured call's never come again.
    tickets._next = split._TICKETS - 4
    again = tickets.take(5, False)
    assert again is not None
    assert again.data_ptr() == first.data_ptr()
    captured = tickets.take(4, True)
    assert captured is not None
    assert captured.data_ptr() == tickets._captured.data_ptr()
    tickets._taken = split._TICKETS - 4
    assert tickets.take(5, True) is None


def test_calls_without_tickets_are_not_split(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        is_cuda, device = True, torch.device("cuda", 0)

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(split, "_tickets", {})
    assert split.memory(OnGpu(), 4, 10) == ([], 1)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("operator", "tile", "splits", "shape"), CALLS)
def test_gpu(force: Force, operator: str, tile: tiling.Tile, splits: int, shape: dict[str, Any], dtype: str) -> None:
    from lowkernels.backends import cuda
    from lowkernels.backends.cuda import launch

    reason = cuda.unavailable("cuda") or launch.load()
    if reason is not None:
        pytest.skip(reason)
    force(tile, splits)
    call = random_call(operator, dtype=DTYPES[dtype], device="cuda", **shape)
    first = check_call(operator, call.args, "cuda")
    for _ in range(100):
        assert torch.equal(first, execution.run(operator, call.args))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = execution.run(operator, call.args)
    for _ in range(100):
        captured.zero_()
        graph.replay()
        assert torch.equal(first, captured)
    for tickets in split._tickets.values():
        assert not tickets._turns.any()
        assert not tickets._captured.any()
