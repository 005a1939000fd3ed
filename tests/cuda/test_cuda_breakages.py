"""Deliberately broken kernels: the shim, or the comparison with float64, must notice each. A detector that is not tested rots."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from lowkernels.backends.cuda import chains, tiling
from lowkernels.choosing import settings
from lowkernels.ops.conv_act import cuda as conv_act
from lowkernels.testing import check_call, random_call
from tests.cuda import execution

CONV: dict[str, Any] = {"channels": 36, "out_channels": 68, "height": 9, "width": 7, "batch": 3, "residual": True}
SEPARABLE: dict[str, Any] = {"channels": 132, "out_channels": 132, "height": 9, "width": 7, "batch": 3, "kernel_size": 5}
MBCONV: dict[str, Any] = {"channels": 20, "hidden": 132, "out_channels": 132, "height": 9, "width": 7, "batch": 3}
ATTENTION: dict[str, Any] = {
    "channels": 36,
    "out_channels": 132,
    "num_heads": 2,
    "head_dim": 32,
    "height": 9,
    "width": 33,
    "stride": 2,
}
# 45 output pixels of three images, 23 to a CTA.
FUSED: dict[str, Any] = {"channels": 12, "hidden": 132, "out_channels": 68, "height": 9, "width": 5, "batch": 3, "stride": 2}
MLP: dict[str, Any] = {"channels": 12, "hidden": 132, "out_channels": 68, "height": 9, "width": 5, "batch": 3}
# Small images, two to a CTA where CTAs take several, and one that is not there.
PAIRS: dict[str, Any] = {"height": 5, "width": 6, "batch": 3}
# Images in pairs whose rows are more than one image's may be, and no whole tiles.
IMAGES: dict[str, Any] = {"height": 7, "width": 6, "stride": 1, "batch": 3}
# An image that takes three launches.
LARGE: dict[str, Any] = {"height": 18, "width": 15, "stride": 1, "channels": 12, "num_heads": 1, "batch": 1}
CALLS = {
    "conv_act": CONV,
    "separable_conv": SEPARABLE,
    "mbconv": MBCONV,
    "fused_mbconv": FUSED,
    "gn_mlp": MLP,
    "lowtention": ATTENTION,
}

NUMBERS = "numbers"


class Breakage(NamedTuple):
    """One change of one file, and how it has to be noticed: a kind of report, or wrong numbers."""

    operator: str
    file: str
    old: str
    new: str
    noticed: str
    pairs: bool = False
    large: bool = False


def barrier(operator: str, file: str, comment: str) -> Breakage:
    return Breakage(operator, file, f"block_sync();  // {comment}", "", "race")


CHAIN = "expand_project.cuh"

BREAKAGES = [
    # Two products back to back: windows over several images, the ring of weights, sums of warps that share rows, statistics.
    Breakage("fused_mbconv", CHAIN, "y >= 0 && y < g.h;", "y < g.h;", "bounds"),
    Breakage("fused_mbconv", CHAIN, " && channel < g.c;", ";", "bounds"),
    Breakage("fused_mbconv", CHAIN, "index < t.layout.pixels && pixel.row < rows", "index < t.layout.pixels", "bounds"),
    Breakage("fused_mbconv", CHAIN, "(g.ho - 1) * g.stride + g.kernel;", "(g.ho - 1) * g.stride + g.kernel - 2;", NUMBERS),
    Breakage("fused_mbconv", CHAIN, "x % 2 * l.odd + x / 2", "x", NUMBERS),
    Breakage("fused_mbconv", CHAIN, "hidden[m][h][i / 2][i % 2 * 2]", "hidden[m][h][i % 2][i / 2 * 2]", NUMBERS),
    Breakage("fused_mbconv", CHAIN, "s < t.steps - first_step; s++", "s < C::kSteps; s++", "unwritten"),
    Breakage("fused_mbconv", CHAIN, "l.rows = (lines - 1) * g.stride", "l.rows = lines - 1", "race"),
    barrier("fused_mbconv", CHAIN, "the piece has landed for every warp, and nobody reads the one before"),
    barrier("fused_mbconv", CHAIN, "nobody reads the scratch memory any more"),
    barrier("fused_mbconv", CHAIN, "the upper half's sums are there"),
    Breakage("fused_mbconv", CHAIN, "cp_async_wait<C::kStages - 2>();", "cp_async_wait<C::kStages - 1>();", "pending"),
    Breakage("fused_mbconv", CHAIN, "copied = copied + 1 == C::kStages ? 0 : copied + 1;", "copied = 0;", "pending"),
    Breakage("gn_mlp", "gn_mlp.cu", "cp_async_wait<C::kStages - 1>();", "", "pending"),
    Breakage("gn_mlp", "normalise.cuh", "block_sync();  // the rows have landed", "", "race", True),
    Breakage("gn_mlp", "normalise.cuh", "} else if (end - row == p.g.h) {", "} else if (true) {", NUMBERS),
    Breakage("gn_mlp", "normalise.cuh", "(squares, scratch + WARPS)", "(squares, scratch)", "race", True),
    Breakage("gn_mlp", "normalise.cuh", "p.partial[2 * block_x() + 1] = m.squares;", "", "unwritten", large=True),
    # conv_act: what a window, a chunk, a CTA's pixels and their sums end with; the order of stages. Pairs pool.
    Breakage("conv_act", "conv_act.cu", "row.y + ky >= 0 && ", "", "bounds"),
    Breakage("conv_act", "conv_act.cu", "row.x + kx < g.w;", "row.x + kx <= g.w;", "bounds"),
    Breakage("conv_act", "conv_act.cu", "row.x + kx >= 0 && ", "row.x + kx >= -1 && ", "bounds"),
    Breakage("conv_act", "conv_act.cu", "group < groups && step < steps", "group < groups", "bounds"),
    Breakage("conv_act", "conv_act.cu", "if (index >= end) continue;", "", "bounds"),
    Breakage(
        "conv_act",
        "conv_act.cu",
        "if (column >= p.g.co) continue;\n                    float v[4];\n                    values(p, m, half, i, index",
        "float v[4];\n                    values(p, m, half, i, index",
        "bounds",
    ),
    Breakage("conv_act", "conv_act.cu", "cp_async_wait<C::kStages - 2>();", "cp_async_wait<C::kStages - 1>();", "pending"),
    Breakage("conv_act", "conv_act.cu", "copy(chunk + C::kStages - 1);", "copy(chunk + C::kStages);", "pending"),
    Breakage(
        "conv_act",
        "conv_act.cu",
        "C::kStages * C::kStageBytes + C::kRows",
        "(C::kStages - 1) * C::kStageBytes + C::kRows",
        "bounds",
    ),
    Breakage("conv_act", "conv_act.cu", "if (++kx == g.kernel) kx = 0, ky++;", "if (++kx > g.kernel) kx = 0, ky++;", NUMBERS),
    Breakage("conv_act", "conv_act.cu", "if (row < begin || row >= end) continue;", "if (row >= end) continue;", NUMBERS, True),
    Breakage("conv_act", "conv_act.cu", "warp < C::kRowWarps; warp++", "warp < 1; warp++", NUMBERS, True),
    Breakage("conv_act", "conv_act.cu", "for (int lanes = 4;", "for (int lanes = 8;", NUMBERS, True),
    Breakage("conv_act", "conv_act.cu", "begin + static_cast<int64_t>(image) * pixels >= end || ", "", "bounds", True),
    barrier("conv_act", "conv_act.cu", "the rows are known, and nobody reads the block before"),
    barrier("conv_act", "conv_act.cu", "the chunk has landed, and nobody reads the one before"),
    Breakage("conv_act", "conv_act.cu", "block_sync();  // the sums of all warps are there", "", "race", True),
    # The image's edges.
    Breakage("separable_conv", "separable_conv.cu", "y >= 0 && y < p.g.h && ", "y < p.g.h && ", "bounds"),
    Breakage("separable_conv", "separable_conv.cu", "x >= 0 && x < p.g.w && ", "", "bounds"),
    Breakage("separable_conv", "separable_conv.cu", "image < p.g.n && y", "y", "bounds", True),
    Breakage("separable_conv", "separable_conv.cu", " && chunk * kChunk + channel < p.g.c", "", "bounds"),
    Breakage("separable_conv", "window.cuh", "image >= g.n || ", "", "bounds", True),
    Breakage("separable_conv", "window.cuh", "if (column < g.co) f(", "f(", "bounds"),
    Breakage("mbconv", "window.cuh", " || y >= g.ho || x >= g.wo", "", "twice"),
    Breakage("mbconv", "mbconv.cu", "image < p.g.n && channel", "channel", "bounds", True),
    Breakage(
        "mbconv",
        "mbconv.cuh",
        "number < g.images ? y * p.window_w + x : -1",
        "y * p.window_w + x",
        "race",
    ),
    Breakage("lowtention", "lowtention.cu", "y < 0 || y >= p.h || ", "", "bounds"),
    Breakage("lowtention", "lowtention.cu", "j >= 0 && j < p.grid_w", "j < p.grid_w", NUMBERS),
    # Several images a CTA: where each begins, whose statistics, keys and queries, and what the last CTA has not.
    Breakage("lowtention", "lowtention.cu", "smaller(p.images, p.n - image)", "p.images", "bounds", True),
    Breakage(
        "lowtention", "lowtention.cu", "block_x() / p.shares * p.images, images", "block_x() / p.shares, images", "twice", True
    ),
    Breakage("lowtention", "lowtention.cu", "from[n] = x + r.number * size", "from[n] = x + 0 * size", NUMBERS, True),
    Breakage("lowtention", "lowtention.cu", "statistics[r.number]", "statistics[0]", NUMBERS, True),
    Breakage("lowtention", "lowtention.cu", "load4(x + (first + n) * size", "load4(x + first * size", NUMBERS, True),
    Breakage("lowtention", "lowtention.cu", "if (first + n < images) add(", "add(", "bounds", True),
    Breakage("lowtention", "lowtention.cu", "squares = sums + images * kWarps", "squares = sums + kWarps", "race", True),
    Breakage("lowtention", "lowtention.cu", "{image + number, number, token", "{image, number, token", "twice", True),
    Breakage("lowtention", "lowtention.cu", "first + row < end ?", "true ?", "bounds", True),
    Breakage("lowtention", "lowtention.cu", "p.heads * p.tokens * length + head", "p.heads * 32 * length + head", NUMBERS, True),
    Breakage("lowtention", "lowtention.cu", "task < images * p.heads * tiles", "task < p.heads * tiles", NUMBERS, True),
    Breakage("lowtention", "lowtention.cu", "smaller(lane_index() % 16, live - 1)", "lane_index() % 16", "race", True),
    Breakage("lowtention", "lowtention.cu", "store(query, length, live);", "store(query, length, 16);", "race", True),
    Breakage("lowtention", "lowtention.cu", "(count - first) / 16;", "TILES;", "bounds", True),
    Breakage(
        "lowtention",
        "lowtention.cu",
        " || at >= p.w) continue;\n                    const int64_t",
        ") continue;\n                    const int64_t",
        "twice",
    ),
    # Barriers and waits.
    barrier("separable_conv", "separable_conv.cu", "the window has landed, and nobody reads the other window or D any more"),
    barrier("separable_conv", "separable_conv.cu", "D is whole"),
    barrier("mbconv", "mbconv.cu", "X, the targets and the border are there"),
    barrier("mbconv", "mbconv.cu", "the window is whole, and nobody reads D any more"),
    barrier("mbconv", "mbconv.cu", "D is whole, and nobody reads the window any more"),
    barrier("lowtention", "lowtention.cu", "the sums of all warps are there"),
    barrier("lowtention", "lowtention.cu", "the squares of all warps are there"),
    barrier("lowtention", "lowtention.cu", "the table and the statistics are there"),
    barrier("lowtention", "lowtention.cu", "D is whole"),
    barrier("lowtention", "lowtention.cu", "these rows of QKV are whole, and nobody reads D any more"),
    barrier("lowtention", "lowtention.cu", "every head's result stands in its queries' place"),
    Breakage("lowtention", "lowtention.cu", "warp_sync();", "", "race"),
    Breakage("separable_conv", "separable_conv.cu", "cp_async_wait<0>();", "", "pending"),
    Breakage("mbconv", "mbconv.cu", "cp_async_wait<0>();", "cp_async_wait<1>();", "pending"),
    Breakage("separable_conv", "separable_conv.cu", "windows + chunk % 2 * window_size;", "windows;", "pending"),
    Breakage(
        "lowtention",
        "lowtention.cu",
        "block_sync();  // the sums",
        "if (lane_index() < 16) block_sync();  // the sums",
        "deadlock",
    ),
    Breakage("lowtention", "lowtention.cu", "squares = sums + images * kWarps", "squares = sums", "race"),
    Breakage("lowtention", "lowtention.cu", "stages + first / kKeys % 2 * 2", "stages + first / kKeys % 2", "pending", large=True),
    Breakage(
        "lowtention",
        "lowtention.cu",
        "if (row >= live) continue;\n                float v[4];",
        "float v[4];",
        "bounds",
        large=True,
    ),
    Breakage(
        "lowtention",
        "lowtention.cu",
        "const bool inside = first + row < p.tokens;",
        "const bool inside = true;",
        "bounds",
        large=True,
    ),
    Breakage("lowtention", "lowtention.cu", "reach = p.grid_w + 1;", "reach = p.grid_w;", "unwritten", large=True),
    Breakage("lowtention", "lowtention.cu", "(p.grid_w + 1) + 1) * (p.inner", "p.grid_w + 1) * (p.inner", "bounds", large=True),
    Breakage("lowtention", "lowtention.cu", "p.tokens - first_query - row);", "16);", "bounds", large=True),
    # Memory that nothing wrote, twice wrote, or did not ask for.
    Breakage("mbconv", "mbconv.cu", "store4(window + i * 4, zeros);", ";", "unwritten"),
    Breakage("lowtention", "lowtention.cu", "store4(zeros + i, none);", ";", "unwritten"),
    Breakage(
        "lowtention",
        "lowtention.cu",
        "int i = thread_index(); i < apart * quads",
        "int i = thread_index(); i < (apart - 1) * quads",
        "unwritten",
        True,
    ),
    Breakage("separable_conv", "separable_conv.cu", "(p.g.c > kChunk ? 2 : 1)", "1", "bounds"),
    Breakage("lowtention", "lowtention.cu", "(rows + 1) * (3", "(rows - 1) * (3", "bounds"),
    Breakage("separable_conv", "window.cuh", "block_y() * C::kPass + ", "", "twice"),
    Breakage("lowtention", "lowtention.cu", "task < p.stride * p.stride * blocks * pairs", "task < blocks * pairs", "missing"),
    # Layouts.
    Breakage("separable_conv", "fragments.cuh", "return columns + 8;", "return columns + 4;", "misaligned"),
    Breakage("mbconv", "fragments.cuh", "lane / 16 * 8);\n}", "lane / 8 % 2 * 8);\n}", NUMBERS),
    Breakage("mbconv", "fragments.cuh", "* stride + step + 1) * kWarp", "* stride + step) * kWarp", NUMBERS),
    Breakage("mbconv", "fragments.cuh", "v[1] = half ? acc[0][3] : acc[0][1];", "v[1] = half ? acc[1][3] : acc[1][1];", NUMBERS),
    Breakage(
        "mbconv", "window.cuh", "const int offset = ky * p.window_w + kx;", "const int offset = kx * p.window_w + ky;", NUMBERS
    ),
    Breakage("lowtention", "lowtention.cu", "ldmatrix_x4_transposed(b,", "ldmatrix_x4(b,", NUMBERS),
    Breakage("lowtention", "lowtention.cu", "lane % 4 * 2 + i < live ?", "lane % 4 * 2 + i < kKeys ?", NUMBERS, True),
    Breakage("lowtention", "lowtention.cu", "out[j][2 * half] *= shrink;", "", NUMBERS),
]


def name(breakage: Breakage) -> str:
    return f"{breakage.operator}-{breakage.old.strip()[:40]}"


# fp16 and one shape of CTA or width of a head, so that a variant compiles in a second.
NARROWED: dict[str, list[tuple[str, str, str]]] = {
    "conv_act": [
        ("conv_act.cu", "return launch(conv_act<bf16_t, C, POOL>, grid, kThreads, shared, stream, p);", "return 1;"),
        ("conv_act.cu", "X(0, 2, 4, 1, 4, 2, 2, 4) X(1, 2, 4, 1, 2, 2, 4, 3) ", ""),
        ("conv_act.cu", " X(3, 4, 2, 1, 2, 1, 2, 3) X(4, 1, 1, 8, 1, 1, 2, 3)", ""),
    ],
    "separable_conv": [
        ("separable_conv.cu", "return launch(separable_conv<bf16_t, C>, grid, kThreads, shared, stream, p);", "return 1;")
    ],
    "mbconv": [("mbconv.cu", "launch_config<Config<tiles, warps, groups>, bf16_t>(p, stream);", "1;")],
    "lowtention": [
        ("lowtention.cu", "launch_dtype<bf16_t>(p, stream);", "1;"),
        *(("lowtention.cu", f"case {16 * n}: return launch_steps<T, {n}>(p, stream);", "") for n in (1, 3, 4)),
    ],
}
CHAINS = "X(1, 2, 4, 8, 1) X(2, 2, 4, 8, 2) X(3, 2, 2, 10, 1) X(4, 1, 4, 16, 1) X(5, 1, 4, 16, 4)"
for name_ in ("fused_mbconv", "gn_mlp"):
    NARROWED[name_] = [
        (f"{name_}.cu", "launch_config<Chain<tiles, expand, groups, split>, bf16_t>(p, stream);", "1;"),
        (CHAIN, CHAINS, "X(5, 1, 4, 16, 4)"),
        (CHAIN, "X(0, 1, 4, 4, 1) ", ""),
    ]
for name_ in ("separable_conv", "mbconv"):
    NARROWED[name_].append(("window.cuh", "X(0, 4, 2, 1) X(1, 4, 8, 1) X(2, 4, 8, 2) X(3, 7, 8, 2)", "X(2, 4, 8, 1)"))


def variant(operator: str, breakage: Breakage | None) -> Path:
    replacements = list(NARROWED[operator])
    if breakage is not None:
        replacements.append((breakage.file, breakage.old, breakage.new))

    def changed(file: str, text: str) -> str:
        for _, old, new in (r for r in replacements if r[0] == file):
            assert old in text, f"{file} has no {old!r}"
            text = text.replace(old, new, 1)
        return text

    files = {file for file, _, _ in replacements}
    return execution.kernels({file: partial(changed, file) for file in files}, (operator,))


def symptoms(operator: str, library: Path, pairs: bool, large: bool, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Kinds of reports, and ``numbers`` if the result is wrong."""
    paired = IMAGES if operator == "lowtention" else PAIRS
    call = random_call(operator, dtype=torch.float16, **{**CALLS[operator], **(paired if pairs else LARGE if large else {})})
    if operator == "conv_act":
        monkeypatch.setattr(conv_act, "configs", lambda *args: [conv_act.CONFIGS[2]])
        call = random_call(operator, dtype=torch.float16, **{**CONV, **({**PAIRS, "pool": True} if pairs else {})})
    elif operator in ("fused_mbconv", "gn_mlp"):
        # The shape whose warps share rows; whole images in pairs; statistics by a launch before.
        monkeypatch.setattr(chains, "choose", lambda shape, device: tiling.Tile(0, 1, 30 if pairs else 23, 5))
        if large:
            monkeypatch.setattr(chains, "INLINE_STATISTICS", 0)
    elif pairs:
        monkeypatch.setattr(tiling, "choose", lambda shape, device: tiling.Tile(2, 5, 6, 2))
    found = set()
    images = {"images": 2} if operator == "lowtention" and pairs else {}
    with settings.using(images), execution.watched(library) as outcome:
        try:
            check_call(operator, call.args, "cuda")
        except AssertionError:
            found.add(NUMBERS)
        except RuntimeError as error:
            # A launch is given up after a report of what would crash.
            if "the launch failed" not in str(error):
                raise
    return found | {report.split(" at ")[0] for report in outcome.reports}


@pytest.mark.parametrize(
    ("operator", "pairs", "large"),
    [
        *((name, False, False) for name in CALLS),
        ("conv_act", True, False),
        ("separable_conv", True, False),
        ("mbconv", True, False),
        ("gn_mlp", True, False),
        ("gn_mlp", False, True),
        ("lowtention", True, False),
        ("lowtention", False, True),
    ],
)
def test_intact_kernels_have_no_symptoms(
    on_cpu: None, monkeypatch: pytest.MonkeyPatch, operator: str, pairs: bool, large: bool
) -> None:
    assert symptoms(operator, variant(operator, None), pairs, large, monkeypatch) == set()


@pytest.mark.parametrize("breakage", BREAKAGES, ids=name)
def test_breakage_is_noticed(on_cpu: None, monkeypatch: pytest.MonkeyPatch, breakage: Breakage) -> None:
    library = variant(breakage.operator, breakage)
    assert breakage.noticed in symptoms(breakage.operator, library, breakage.pairs, breakage.large, monkeypatch)
