# mypy: allow-untyped-defs, allow-incomplete-defs
"""conv_act in Triton: an implicit GEMM with everything else in its epilogue; with ``pool``, a program owns an image."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...backends.triton import configs, launch, packing
from ...backends.triton.device import activate, load_vector, load_weight, load_window, output_rows, store_rows, window_bits
from ...backends.triton.launch import Launch, block, ceil_div, dividing_block

RESIDUAL_POSITION = 5

_HALF = configs.varied(
    {"BM": 64, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 3},
    {"BM": 16},
    {"BM": 32},
    {"BN": 128},
    {"BM": 128, "num_warps": 8, "maxnreg": 255},
    {"BM": 128, "BN": 128, "num_warps": 8, "maxnreg": 255},
)
_SINGLE = configs.varied({"BM": 64, "BN": 64, "BK": 16, "num_warps": 4, "num_stages": 2, "maxnreg": 255}, {"BM": 16}, {"BM": 32})
# What the cost model chooses from where no table has a row, by arithmetic.
CANDIDATES = {"float16": _HALF, "bfloat16": _HALF, "tf32": _SINGLE, "float32": _SINGLE}


@triton.jit
def window_product(
    x, w, image, oy, ox, ok, column, H, W,
    C: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, KS: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr,
    FLAT: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """fp32 [BM, BN]: the convolution at BM output pixels, for BN output channels from ``column`` on."""
    iy = oy * STRIDE - PAD
    ix = ox * STRIDE - PAD
    origin = ((image * H + iy) * W + ix) * C
    bits = window_bits(iy, ix, ok, H, W, KS)
    acc = tl.zeros([BM, BN], tl.float32)
    STEPS: tl.constexpr = (KS * KS * C + BK - 1) // BK
    for step in tl.range(0, STEPS):
        a = load_window(x, origin, bits, step, W, C, KS, BK, FLAT)
        acc = tl.dot(a, load_weight(w, step * BK, column, K, COLUMNS, BK, BN, TMA), acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["N", "H", "W", "HO", "WO"])
def conv_act(
    x, w, b, residual, out, N, H, W, HO, WO,
    C: tl.constexpr, K: tl.constexpr, CO: tl.constexpr, COLUMNS: tl.constexpr, KS: tl.constexpr, STRIDE: tl.constexpr,
    PAD: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr, POOL: tl.constexpr, FLAT: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """x [N, H, W, C]; w [K, COLUMNS]; b [COLUMNS]; residual as out before pooling, or None; out [N, HO, WO, CO], or [N, CO] if
    POOL.

    Program ids: (tile of pixels, or image if POOL; tile of output channels).
    """
    column = tl.program_id(1) * BN
    if POOL:
        number = tl.program_id(0).to(tl.int64)
        plane = HO * WO
        columns = column + tl.arange(0, BN)
        live = columns < CO
        bias = load_vector(b, column, COLUMNS, BN)
        total = tl.zeros([BN], tl.float32)
        for start in tl.range(0, plane, BM, num_stages=1):
            first = number * plane + start
            image, oy, ox, ok = output_rows(first, N, HO, WO, BM)
            ok = ok & (image == number)
            acc = window_product(x, w, image, oy, ox, ok, column, H, W,
                                 C, K, COLUMNS, KS, STRIDE, PAD, FLAT, PRECISION, TMA, BM, BN, BK)  # fmt: skip
            value = activate(acc + bias[None, :], ACT)
            if RESIDUAL:
                at = (first + tl.arange(0, BM)) * CO
                mask = ok[:, None] & live[None, :]
                value += tl.load(residual + at[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            total += tl.sum(tl.where(ok[:, None], value, 0.0), 0)
        tl.store(out + number * CO + columns, (total / plane).to(out.dtype.element_ty), mask=live)
    else:
        first = tl.program_id(0).to(tl.int64) * BM
        image, oy, ox, ok = output_rows(first, N, HO, WO, BM)
        acc = window_product(x, w, image, oy, ox, ok, column, H, W,
                             C, K, COLUMNS, KS, STRIDE, PAD, FLAT, PRECISION, TMA, BM, BN, BK)  # fmt: skip
        offset = (first + tl.arange(0, BM)) * CO
        value = activate(acc + load_vector(b, column, COLUMNS, BN)[None, :], ACT)
        if RESIDUAL:
            columns = column + tl.arange(0, BN)
            mask = ok[:, None] & (columns < CO)[None, :]
            value += tl.load(residual + (offset[:, None] + columns[None, :]), mask=mask, other=0.0).to(tl.float32)
        store_rows(out, value, offset, ok, column, CO, BN)


def unsupported_weights(weight: Tensor, bias: Tensor | None, act: str, stride: int, padding: int, pool: bool) -> str | None:
    return launch.unsupported_dtype(weight)


def unsupported_input(x: Tensor, *_: object) -> str | None:
    return launch.unsupported_input(x)


def pack(weight: Tensor, bias: Tensor | None, *_: object) -> list[Tensor]:
    return [packing.window(weight), packing.vector(bias, weight, weight.shape[0])]


def plan(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act: str,
    stride: int,
    padding: int,
    residual: Tensor | None,
    pool: bool,
    packed: list[Tensor],
) -> tuple[Tensor, list[Launch]]:
    """The output, still unwritten, and the launch that writes it."""
    w, b = packed
    batch, channels, height, width = x.shape
    out_channels, size = weight.shape[0], weight.shape[2]
    out_height, out_width = ((n + 2 * padding - size) // stride + 1 for n in (height, width))
    rows = out_height * out_width * (1 if pool else batch)
    if pool:
        out = torch.empty((batch, out_channels), dtype=x.dtype, device=x.device)
    else:
        out = launch.empty_nhwc(x, (batch, out_channels, out_height, out_width))
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)

    target = launch.target(x)
    config = configs.choose(
        "conv_act",
        target,
        configs.arithmetic(x.dtype, launch.conv_precision(x.dtype)),
        (x, weight, bias, act, stride, padding, residual, pool),
        channels=channels,
        columns=out_channels,
        waves=ceil_div(batch * out_height * out_width, 64) * ceil_div(out_channels, 64) // target.processors,
    )
    flat = channels % 32 != 0
    bm = block(config["BM"], rows)
    bn = block(config["BN"], w.shape[1])
    bk = block(config["BK"], w.shape[0]) if flat else dividing_block(config["BK"], channels)
    tma = bool(config.get("TMA"))
    return out, [
        Launch(
            conv_act,
            (batch if pool else ceil_div(rows, bm), ceil_div(out_channels, bn), 1),
            (x, launch.descriptor(w, bk, bn, tma), b, residual, out, batch, height, width, out_height, out_width),
            {
                **{"C": channels, "K": w.shape[0], "CO": out_channels, "COLUMNS": w.shape[1], "KS": size, "STRIDE": stride},
                **{"PAD": padding, "ACT": act, "RESIDUAL": residual is not None, "POOL": pool, "FLAT": flat},
                **{"PRECISION": launch.conv_precision(x.dtype), "TMA": tma, "BM": bm, "BN": bn, "BK": bk},
            },
            config,
        )
    ]


def forward(x: Tensor, *args: Any) -> Tensor:
    return launch.forward(plan, pack, x, *args, inputs=(RESIDUAL_POSITION,))


def candidates(x: Tensor, *args: Any) -> list[dict[str, int]]:
    return launch.candidates("conv_act", plan, pack, x, *args, inputs=(RESIDUAL_POSITION,))
