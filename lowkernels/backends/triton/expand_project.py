# mypy: allow-untyped-defs, allow-incomplete-defs
"""Window or 1x1 product, activation, 1x1 product, in one kernel: fused_mbconv, and gn_mlp with the GroupNorm folded in.

A program owns BM output pixels. For each chunk of BE expanded channels it runs the first product over the window (an implicit
GEMM), activates in registers, and accumulates the second product; the expanded tensor never exists. Expanded channels that only pad
a chunk are set to zero: their weights are zero, but zero times infinity is not.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from . import configs, launch
from .device import (
    activate,
    combine_statistics,
    image_statistics,
    initial_rows,
    load_vector,
    load_weight,
    load_window,
    output_rows,
    statistics_pieces,
    store_rows,
    window_bits,
)
from .launch import Launch, block, ceil_div, column_groups, dividing_block

# Elements an image may have for its GroupNorm statistics to be taken by every program that needs them; beyond, by a launch before.
INLINE_STATISTICS = 2**17
PIECES = 32

_HALF = configs.varied(
    {"BM": 64, "BE": 64, "BK": 32, "LIMIT": 128, "GROUPS": 1, "num_warps": 8, "num_stages": 3, "maxnreg": 255},
    {"BM": 16, "num_warps": 4},
    {"BM": 32, "num_warps": 4},
    {"BE": 128},
    {"LIMIT": 256},
    {"BE": 32, "LIMIT": 512},
    {"BM": 128, "LIMIT": 64},
    {"BM": 128, "BE": 32},
)
_SINGLE = configs.varied(
    {"BM": 64, "BE": 64, "BK": 16, "LIMIT": 128, "GROUPS": 1, "num_warps": 8, "num_stages": 2, "maxnreg": 255},
    {"BM": 16},
    {"BM": 32},
)
_TF32 = configs.varied({**_SINGLE[0], "BE": 32}, {"BM": 16}, {"BM": 32}, {"BM": 32, "LIMIT": 64})
# What the cost model chooses from where no table has a row, by arithmetic: without GroupNorm, and with it, which takes registers.
CANDIDATES = {"float16": _HALF, "bfloat16": _HALF, "tf32": _TF32, "float32": _SINGLE}
_HALF_NORM = configs.varied({**_HALF[0], "BE": 32}, {"BM": 16}, {"BM": 32}, {"LIMIT": 256})
NORM_CANDIDATES = {**CANDIDATES, "float16": _HALF_NORM, "bfloat16": _HALF_NORM}


@triton.jit(do_not_specialize=["N", "H", "W", "HO", "WO", "piece"])
def expand_project(
    x, w1, b1, fold, w2, w2_tail, b2, partial, out, N, H, W, HO, WO, piece, eps,
    C: tl.constexpr, K: tl.constexpr, E: tl.constexpr, EXPANDED: tl.constexpr, CO: tl.constexpr, COLUMNS: tl.constexpr,
    KS: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr,
    NORM: tl.constexpr, PIECES: tl.constexpr, BS: tl.constexpr, FLAT: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr,
):  # fmt: skip
    """x [N, H, W, C]; w1 [K, E], of which EXPANDED columns are no padding; b1 [E]; fold [2, E] or None; w2 [E, COLUMNS]; b2
    [COLUMNS]; out [N, HO, WO, CO].

    ``w2_tail`` is the descriptor of the second column group, if there is one and TMA. NORM: "none"; "inline": statistics of the
    images are taken here; "given": from ``partial`` [N, 2, PIECES]. Program ids: (tile, pass over output columns).
    """
    tile = tl.program_id(0).to(tl.int64) * BM
    column = tl.program_id(1) * N1
    image, oy, ox, ok = output_rows(tile, N, HO, WO, BM)
    iy = oy * STRIDE - PAD
    ix = ox * STRIDE - PAD
    origin = ((image * H + iy) * W + ix) * C
    bits = window_bits(iy, ix, ok, H, W, KS)

    mean = tl.zeros([BM], tl.float32)
    rstd = tl.zeros([BM], tl.float32)
    if NORM != "none":
        plane = HO * WO
        length = plane.to(tl.int64) * C
        first = tile // plane
        last = tl.minimum((tile + BM - 1) // plane, N - 1)
        for number in tl.range(first, last + 1, num_stages=1):
            if NORM == "inline":
                m, r = image_statistics(x + number * length, length, eps, BS)
            else:
                m, r = combine_statistics(partial + number * 2 * PIECES, length, piece, eps, PIECES)
            here = image == number
            mean = tl.where(here, m, mean)
            rstd = tl.where(here, r, rstd)

    # 16-bit input is multiplied as it is and the mean taken off the product: far below the input's own rounding. fp32 input has no
    # such margin where the mean is large against the deviation, nor has tf32, so it is normalised first.
    NORMALISE: tl.constexpr = NORM != "none" and x.dtype.element_ty == tl.float32
    STEPS: tl.constexpr = (KS * KS * C + BK - 1) // BK
    if STEPS == 1:
        resident = load_window(x, origin, bits, 0, W, C, KS, BK, FLAT)
        if NORMALISE:
            resident = (resident - mean[:, None]) * rstd[:, None]
    offset = (tile + tl.arange(0, BM)) * CO
    y1 = initial_rows(b2, x, offset, ok, column, CO, COLUMNS, RESIDUAL, BM, N1)
    if N2 > 0:
        y2 = initial_rows(b2, x, offset, ok, column + N1, CO, COLUMNS, RESIDUAL, BM, N2)
    for e in tl.range(0, E, BE):
        h = tl.zeros([BM, BE], tl.float32)
        if STEPS == 1:
            h = tl.dot(resident, load_weight(w1, 0, e, K, E, BK, BE, TMA), h, input_precision=PRECISION)
        else:
            for step in tl.range(0, STEPS):
                a = load_window(x, origin, bits, step, W, C, KS, BK, FLAT)
                if NORMALISE:
                    a = (a - mean[:, None]) * rstd[:, None]
                h = tl.dot(a, load_weight(w1, step * BK, e, K, E, BK, BE, TMA), h, input_precision=PRECISION)
        if NORM != "none":
            h = h * load_vector(fold, e, E, BE)[None, :]
            if not NORMALISE:
                h = rstd[:, None] * (h - mean[:, None] * load_vector(fold + E, e, E, BE)[None, :])
        h = activate(h + load_vector(b1, e, E, BE)[None, :], ACT)
        if EXPANDED % BE != 0:
            h = tl.where((e + tl.arange(0, BE) < EXPANDED)[None, :], h, 0.0)
        h = h.to(x.dtype.element_ty)
        y1 = tl.dot(h, load_weight(w2, e, column, E, COLUMNS, BE, N1, TMA), y1, input_precision=PRECISION)
        if N2 > 0:
            if TMA:
                tail = w2_tail.load([e, column + N1])
            else:
                tail = load_weight(w2, e, column + N1, E, COLUMNS, BE, N2, False)
            y2 = tl.dot(h, tail, y2, input_precision=PRECISION)

    store_rows(out, y1, offset, ok, column, CO, N1)
    if N2 > 0:
        store_rows(out, y2, offset, ok, column + N1, CO, N2)


def plan(
    operator: str,
    call: tuple[Any, ...],
    weights: list[torch.Tensor],
    fold: torch.Tensor | None,
    expanded: int,
    out_channels: int,
    act: str,
    kernel_size: int,
    stride: int,
    padding: int,
    residual: bool,
    eps: float,
) -> tuple[torch.Tensor, list[Launch]]:
    """The output, still unwritten, and the launches that write it: one, or two where an image's statistics need their own.

    ``call`` has the operator's arguments. ``weights`` are packed: w1, b1, w2, b2. ``fold`` is given if the first product's input
    is normalised.
    """
    x: torch.Tensor = call[0]
    w1, b1, w2, b2 = weights
    batch, channels, height, width = x.shape
    out_height, out_width = ((n + 2 * padding - kernel_size) // stride + 1 for n in (height, width))
    out = launch.empty_nhwc(x, (batch, out_channels, out_height, out_width))
    rows = batch * out_height * out_width
    target = launch.target(x)
    config = configs.choose(
        operator,
        target,
        configs.arithmetic(x.dtype, launch.conv_precision(x.dtype)),
        call,
        channels=channels,
        columns=out_channels,
        expanded=w1.shape[1],
        waves=ceil_div(rows, 64) // target.processors,
    )
    flat = channels % 32 != 0
    bk = block(config["BK"], w1.shape[0]) if flat else dividing_block(config["BK"], channels)
    be = block(config["BE"], w1.shape[1])
    passes, first, second = column_groups(w2.shape[1], config.get("LIMIT", 256), config.get("GROUPS", 2) == 2)
    tma = bool(config.get("TMA"))

    launches = []
    norm, partial, piece = "none", None, 0
    length = height * width * channels
    if fold is not None and length <= INLINE_STATISTICS:
        norm = "inline"
    elif fold is not None:
        norm = "given"
        piece = ceil_div(length, PIECES)
        partial = torch.empty((batch, 2, PIECES), dtype=torch.float32, device=x.device)
        launches.append(
            Launch(
                statistics_pieces,
                (batch, PIECES, 1),
                (x, partial, length, piece),
                {"PIECES": PIECES, "BS": 4096},
                {"num_warps": 4, "num_stages": 1, "row": -1, "tuned": 0},
            )
        )
    launches.append(
        Launch(
            expand_project,
            (ceil_div(rows, config["BM"]), passes, 1),
            (
                x,
                launch.descriptor(w1, bk, be, tma),
                b1,
                fold,
                launch.descriptor(w2, be, first, tma),
                launch.descriptor(w2, be, second, tma) if second and tma else None,
                b2,
                partial,
                out,
                *(batch, height, width, out_height, out_width, piece, eps),
            ),
            {
                **{"C": channels, "K": w1.shape[0], "E": w1.shape[1], "EXPANDED": expanded},
                **{"CO": out_channels, "COLUMNS": w2.shape[1], "KS": kernel_size, "STRIDE": stride, "PAD": padding},
                **{"ACT": act, "RESIDUAL": residual},
                **{"NORM": norm, "PIECES": PIECES, "BS": min(4096, launch.power_of_two_above(length)), "FLAT": flat},
                **{"PRECISION": launch.conv_precision(x.dtype), "TMA": tma},
                **{"BM": config["BM"], "BE": be, "BK": bk, "N1": first, "N2": second},
            },
            config,
        )
    )
    return out, launches
