# mypy: allow-untyped-defs, allow-incomplete-defs
"""mbconv in Triton: one persistent launch; expanded channels pass through a small scratch that stays in the L2 cache.

A program owns a tile: TH x TW output pixels of one image, or NI whole small images. For each chunk of CE expanded channels it
expands the patch of input under the tile into its scratch, and takes the depthwise convolution from there to a second scratch,
which it projects in the end; its threads meet at a barrier after each step. Programs loop over tiles, so there is one scratch for
each program that runs at a time, not for each tile.

The scratch is written and read by one program with CTA barriers in between. Triton's interpreter runs a program as one thread, so
it cannot show a missing barrier here: only a GPU can. It is never read through tensor descriptors, which would need another fence.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...backends.triton import configs, launch, packing
from ...backends.triton.device import activate, depthwise, initial_rows, load_vector, load_weight, load_window, store_rows
from ...backends.triton.launch import Launch, block, ceil_div, column_groups, dividing_block

_HALF = configs.varied(
    {"BM": 64, "BP": 64, "BE": 64, "BK": 32, "BR": 32, "BD": 32, "BG": 32, "CE": 512, "LIMIT": 128, "num_warps": 8, "num_stages": 3}
    | {"maxnreg": 255},
    {"BM": 16, "BP": 16, "BR": 16, "num_warps": 4},
    {"BM": 32, "BP": 32, "num_warps": 4},
)
_TF32 = configs.varied({**_HALF[0], "CE": 256, "BE": 32, "num_stages": 2}, {"BM": 32, "BP": 32})
_SINGLE = configs.varied({**_TF32[0], "BE": 64, "BK": 16, "BG": 16, "LIMIT": 64}, {"BM": 32, "BP": 32})
# What the cost model chooses from where no table has a row, by arithmetic.
CANDIDATES = {"float16": _HALF, "bfloat16": _HALF, "tf32": _TF32, "float32": _SINGLE}


@triton.jit
def tile_rows(start, images, y0, x0, HO, WO, TH, TW, BR: tl.constexpr):
    """Rows ``start`` to ``start`` + BR of a tile: their number, image within the tile, output y and x, and which of them exist."""
    row = start + tl.arange(0, BR)
    number = row // (TH * TW)
    pixel = row % (TH * TW)
    oy = y0 + pixel // TW
    ox = x0 + pixel % TW
    return row, number, oy, ox, (number < images) & (oy < HO) & (ox < WO)


@triton.jit(do_not_specialize=["N", "H", "W", "HO", "WO", "TH", "TW", "PH", "PW", "NI", "tiles_y", "tiles_x", "tiles"])
def mbconv(
    x, w1, b1, wd, bd, w2, w2_tail, b2, expanded, filtered, out,
    N, H, W, HO, WO, TH, TW, PH, PW, NI, tiles_y, tiles_x, tiles,
    C: tl.constexpr, K: tl.constexpr, E: tl.constexpr, EXPANDED: tl.constexpr, CO: tl.constexpr, COLUMNS: tl.constexpr,
    KS: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr, FLAT: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr, WIDE: tl.constexpr, CE: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr, BE:
    tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, BG: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr,
):  # fmt: skip
    """x [N, H, W, C]; w1 [K, E], of which EXPANDED columns are no padding; b1 [E]; wd [KS * KS, E]; bd [E]; w2 [E, COLUMNS]; b2
    [COLUMNS]; out [N, HO, WO, CO].

    A tile is TH x TW outputs of each of NI images, its patch PH x PW inputs. Scratch: ``expanded`` [programs, NI * PH * PW, CE],
    ``filtered`` [programs, BM, E]. Without WIDE, offsets from a tile's first image on are kept in 32 bits, which saves registers.
    Program id: slot of the persistent grid.
    """
    slot = tl.program_id(0).to(tl.int64)
    patch = PH * PW
    h = expanded + slot * (NI * patch * CE)
    g = filtered + slot * (BM * E)
    STEPS: tl.constexpr = (C + BK - 1) // BK

    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=1):
        first = (tile // (tiles_y * tiles_x)).to(tl.int64) * NI
        images = tl.minimum(N - first, NI).to(tl.int32)
        source = x + first * H * W * C
        place = tile % (tiles_y * tiles_x)
        y0 = (place // tiles_x) * TH
        x0 = (place % tiles_x) * TW
        # The patch is moved inside of the image where the window sticks out.
        iy0 = tl.minimum(tl.maximum(y0 * STRIDE - PAD, 0), H - PH)
        ix0 = tl.minimum(tl.maximum(x0 * STRIDE - PAD, 0), W - PW)
        for chunk in tl.range(0, E, CE, num_stages=1):
            width = tl.minimum(E - chunk, CE)
            for p in tl.range(0, NI * patch, BP, num_stages=1):
                at = p + tl.arange(0, BP)
                inner = at % patch
                number = at // patch
                live = number < images
                if WIDE:
                    number = number.to(tl.int64)
                origin = ((number * H + iy0 + inner // PW) * W + ix0 + inner % PW) * C
                # A window of one pixel.
                bits = live.to(tl.int32) * 257
                for e in tl.range(0, width, BE, num_stages=1):
                    acc = tl.zeros([BP, BE], tl.float32)
                    for step in tl.range(0, STEPS):
                        a = load_window(source, origin, bits, step, W, C, 1, BK, FLAT)
                        w = load_weight(w1, step * BK, chunk + e, K, E, BK, BE, TMA)
                        acc = tl.dot(a, w, acc, input_precision=PRECISION)
                    acc = activate(acc + load_vector(b1, chunk + e, E, BE)[None, :], ACT)
                    to = h + (at[:, None] * CE + (e + tl.arange(0, BE))[None, :])
                    tl.store(to, acc.to(expanded.dtype.element_ty), mask=live[:, None])
            tl.debug_barrier()
            for r in tl.range(0, BM, BR, num_stages=1):
                row, number, oy, ox, ok = tile_rows(r, images, y0, x0, HO, WO, TH, TW, BR)
                iy = oy * STRIDE - PAD
                ix = ox * STRIDE - PAD
                origin = (number * patch + (iy - iy0) * PW + (ix - ix0)) * CE
                for e in tl.range(0, width, BD, num_stages=1):
                    columns = tl.arange(0, BD)
                    live = columns < width - e
                    if EXPANDED == E:
                        real = live
                    else:
                        # Weights of channels that only pad are zero, but zero times infinity is not: what they hold is not read.
                        real = columns < tl.minimum(width, EXPANDED - chunk) - e
                    y = depthwise(h + e, wd + chunk + e, origin, iy, ix, ok, columns, real, None, None, H, W, PW,
                                  CE, E, KS, False, BR, BD)  # fmt: skip
                    y = activate(y + load_vector(bd, chunk + e, E, BD)[None, :], ACT)
                    to = g + (row[:, None] * E + (chunk + e + columns)[None, :])
                    tl.store(to, y.to(filtered.dtype.element_ty), mask=ok[:, None] & live[None, :])
            tl.debug_barrier()

        row, number, oy, ox, ok = tile_rows(0, images, y0, x0, HO, WO, TH, TW, BM)
        if WIDE:
            number = number.to(tl.int64)
        offset = ((number * HO + oy) * WO + ox) * CO
        to = out + first * HO * WO * CO
        for column in tl.range(0, COLUMNS, N1 + N2, num_stages=1):
            y1 = initial_rows(b2, source, offset, ok, column, CO, COLUMNS, RESIDUAL, BM, N1)
            if N2 > 0:
                y2 = initial_rows(b2, source, offset, ok, column + N1, CO, COLUMNS, RESIDUAL, BM, N2)
            for e in tl.range(0, E, BG):
                columns = e + tl.arange(0, BG)
                if E % BG == 0:
                    mask = ok[:, None]
                else:
                    mask = ok[:, None] & (columns < E)[None, :]
                y = tl.load(g + (row[:, None] * E + columns[None, :]), mask=mask, other=0.0)
                w = load_weight(w2, e, column, E, COLUMNS, BG, N1, TMA)
                y1 = tl.dot(y, w, y1, input_precision=PRECISION)
                if N2 > 0:
                    if TMA:
                        w = w2_tail.load([e, column + N1])
                    else:
                        w = load_weight(w2, e, column + N1, E, COLUMNS, BG, N2, False)
                    y2 = tl.dot(y, w, y2, input_precision=PRECISION)
            store_rows(to, y1, offset, ok, column, CO, N1)
            if N2 > 0:
                store_rows(to, y2, offset, ok, column + N1, CO, N2)


class Tiling(NamedTuple):
    """How output pixels are divided: TH x TW pixels of NI images a tile, over patches of PH x PW input pixels."""

    images: int
    height: int
    width: int
    patch_height: int
    patch_width: int
    tiles_y: int
    tiles_x: int


@functools.lru_cache(4096)
def tiling(
    batch: int, size: tuple[int, int], out_size: tuple[int, int], kernel_size: int, stride: int, rows: int, patch_rows: int
) -> Tiling:
    """The tiles of at most ``rows`` outputs that make the least rows of products, counting patches in blocks of ``patch_rows``."""
    (height, width), (out_height, out_width) = size, out_size

    def patch(tile: int, image: int) -> int:
        return min((tile - 1) * stride + kernel_size, image)

    if out_height * out_width <= rows:
        images = max(1, min(batch, rows // (out_height * out_width)))
        return Tiling(images, out_height, out_width, patch(out_height, height), patch(out_width, width), 1, 1)
    best: tuple[int, Tiling] | None = None
    for widest in range(min(rows, out_width), 0, -1):
        tile_width = ceil_div(out_width, ceil_div(out_width, widest))
        tiles_y = ceil_div(out_height, min(out_height, rows // tile_width))
        tile_height = ceil_div(out_height, tiles_y)
        tiles_x = ceil_div(out_width, tile_width)
        found = Tiling(
            1, tile_height, tile_width, patch(tile_height, height), patch(tile_width, width),
            ceil_div(out_height, tile_height), tiles_x,
        )  # fmt: skip
        blocks = ceil_div(found.patch_height * found.patch_width, patch_rows)
        cost = found.tiles_y * found.tiles_x * (rows + blocks * patch_rows)
        if best is None or cost < best[0]:
            best = cost, found
    assert best is not None
    return best[1]


def unsupported_weights(
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    act: str,
    stride: int,
    padding: int,
    residual: bool,
) -> str | None:
    expanded, channels = expand_weight.shape[:2]
    return launch.unsupported_dtype(expand_weight) or launch.unsupported_channels(
        C_in=channels, E=expanded, C_out=project_weight.shape[0]
    )


def unsupported_input(x: Tensor, *_: object) -> str | None:
    return launch.unsupported_input(x)


def pack(
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    *_: object,
) -> list[Tensor]:
    expanded, out_channels = expand_weight.shape[0], project_weight.shape[0]
    return [
        packing.pointwise(expand_weight),
        packing.vector(expand_bias, expand_weight, expanded),
        packing.depthwise(dw_weight),
        packing.vector(dw_bias, dw_weight, expanded),
        packing.pointwise(project_weight),
        packing.vector(project_bias, project_weight, out_channels),
    ]


def plan(
    x: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    act: str,
    stride: int,
    padding: int,
    residual: bool,
    packed: list[Tensor],
) -> tuple[Tensor, list[Launch]]:
    """The output, still unwritten, and the launch that writes it."""
    w1, b1, wd, bd, w2, b2 = packed
    batch, channels, height, width = x.shape
    out_channels, size = project_weight.shape[0], dw_weight.shape[2]
    out_height, out_width = ((n + 2 * padding - size) // stride + 1 for n in (height, width))
    out = launch.empty_nhwc(x, (batch, out_channels, out_height, out_width))

    target = launch.target(x)
    config = configs.choose(
        "mbconv",
        target,
        configs.arithmetic(x.dtype, launch.conv_precision(x.dtype)),
        (x, expand_weight, expand_bias, dw_weight, dw_bias, project_weight, project_bias, act, stride, padding, residual),
        channels=channels,
        columns=out_channels,
        waves=ceil_div(batch * out_height * out_width, 64) // target.processors,
    )
    bm, bp = config["BM"], config["BP"]
    cut = tiling(batch, (height, width), (out_height, out_width), size, stride, bm, bp)
    tiles = ceil_div(batch, cut.images) * cut.tiles_y * cut.tiles_x
    flat = channels % 32 != 0
    bk = block(config["BK"], w1.shape[0]) if flat else dividing_block(config["BK"], channels)
    be = block(config["BE"], w1.shape[1])
    filter_columns, bg = block(config["BD"], w1.shape[1]), block(config["BG"], w1.shape[1])
    chunk = min(config["CE"], max(be, launch.power_of_two_above(w1.shape[1])))
    _, first, second = column_groups(w2.shape[1], config["LIMIT"], two=True)
    tma = bool(config.get("TMA"))
    wide = cut.images * max(height * width * channels, out_height * out_width * out_channels) >= 2**30
    programs = min(tiles, target.processors * config.get("PER_SM", 1))
    # The expanded tensor is not rounded to bfloat16 before the depthwise convolution.
    kept = torch.float16 if x.dtype == torch.float16 else torch.float32
    patch = cut.images * cut.patch_height * cut.patch_width
    expanded = torch.empty((programs, patch, chunk), dtype=kept, device=x.device)
    filtered = x.new_empty((programs, bm, w1.shape[1]))
    return out, [
        Launch(
            mbconv,
            (programs, 1, 1),
            (
                x,
                launch.descriptor(w1, bk, be, tma),
                b1,
                wd,
                bd,
                launch.descriptor(w2, bg, first, tma),
                launch.descriptor(w2, bg, second, tma) if second and tma else None,
                b2,
                expanded,
                filtered,
                out,
                *(batch, height, width, out_height, out_width, cut.height, cut.width, cut.patch_height, cut.patch_width),
                *(cut.images, cut.tiles_y, cut.tiles_x, tiles),
            ),
            {
                **{"C": channels, "K": w1.shape[0], "E": w1.shape[1], "EXPANDED": project_weight.shape[1]},
                **{"CO": out_channels, "COLUMNS": w2.shape[1], "KS": size, "STRIDE": stride, "PAD": padding},
                **{"ACT": act, "RESIDUAL": residual, "FLAT": flat},
                **{"PRECISION": launch.conv_precision(x.dtype), "TMA": tma, "WIDE": wide, "CE": chunk},
                **{"BM": bm, "BP": bp, "BE": be, "BK": bk},
                **{"BR": min(config["BR"], bm), "BD": filter_columns, "BG": bg, "N1": first, "N2": second},
            },
            config,
        )
    ]


def forward(x: Tensor, *args: Any) -> Tensor:
    return launch.forward(plan, pack, x, *args)


def candidates(x: Tensor, *args: Any) -> list[dict[str, int]]:
    return launch.candidates("mbconv", plan, pack, x, *args)
