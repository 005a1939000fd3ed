# mypy: allow-untyped-defs, allow-incomplete-defs
"""separable_conv in Triton: the depthwise result is made in registers, as the first operand of the 1x1 product."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ...backends.triton import configs, launch, packing
from ...backends.triton.device import activate, depthwise, load_vector, load_weight, output_rows, store_rows
from ...backends.triton.launch import Launch, block, ceil_div

_HALF = configs.varied(
    {"BM": 64, "BN": 64, "BK": 32, "num_warps": 8, "num_stages": 2, "maxnreg": 255},
    {"BM": 16, "num_warps": 4},
    {"BM": 32, "num_warps": 4},
    {"BN": 128},
    {"BM": 128},
    {"BM": 128, "BN": 128},
)
_SINGLE = configs.varied(
    {"BM": 32, "BN": 64, "BK": 16, "num_warps": 8, "num_stages": 2, "maxnreg": 255}, {"BM": 16}, {"BM": 64, "BN": 32}
)
# What the cost model chooses from where no table has a row, by arithmetic.
CANDIDATES = {"float16": _HALF, "bfloat16": _HALF, "tf32": _SINGLE, "float32": _SINGLE}


@triton.jit(do_not_specialize=["N", "H", "W", "HO", "WO"])
def separable_conv(
    x, wd, bd, w, b, out, N, H, W, HO, WO,
    C: tl.constexpr, CP: tl.constexpr, CO: tl.constexpr, COLUMNS: tl.constexpr, KS: tl.constexpr, STRIDE: tl.constexpr,
    PAD: tl.constexpr, DW_ACT: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """x [N, H, W, C]; wd [KS * KS, CP]; bd [CP]; w [CP, COLUMNS]; b [COLUMNS]; out [N, HO, WO, CO].

    Program ids: (tile of pixels, tile of output channels).
    """
    first = tl.program_id(0).to(tl.int64) * BM
    column = tl.program_id(1) * BN
    image, oy, ox, ok = output_rows(first, N, HO, WO, BM)
    iy = oy * STRIDE - PAD
    ix = ox * STRIDE - PAD
    origin = ((image * H + iy) * W + ix) * C
    acc = tl.zeros([BM, BN], tl.float32)
    # One stage: software pipelining would keep every tap's block in shared memory.
    for c in tl.range(0, CP, BK, num_stages=1):
        columns = tl.arange(0, BK)
        y = depthwise(x + c, wd + c, origin, iy, ix, ok, columns, columns < C - c, None, None, H, W, W,
                      C, CP, KS, False, BM, BK)  # fmt: skip
        y = activate(y + load_vector(bd, c, CP, BK)[None, :], DW_ACT).to(x.dtype.element_ty)
        acc = tl.dot(y, load_weight(w, c, column, CP, COLUMNS, BK, BN, TMA), acc, input_precision=PRECISION)
    offset = (first + tl.arange(0, BM)) * CO
    value = activate(acc + load_vector(b, column, COLUMNS, BN)[None, :], ACT)
    if RESIDUAL:
        columns = column + tl.arange(0, BN)
        mask = ok[:, None] & (columns < CO)[None, :]
        value += tl.load(x + (offset[:, None] + columns[None, :]), mask=mask, other=0.0).to(tl.float32)
    store_rows(out, value, offset, ok, column, CO, BN)


def unsupported_weights(
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    dw_act: str,
    pw_weight: Tensor,
    pw_bias: Tensor | None,
    pw_act: str,
    stride: int,
    padding: int,
    residual: bool,
) -> str | None:
    return launch.unsupported_dtype(dw_weight) or launch.unsupported_channels(C=dw_weight.shape[0], C_out=pw_weight.shape[0])


def unsupported_input(x: Tensor, *_: object) -> str | None:
    return launch.unsupported_input(x)


def pack(
    dw_weight: Tensor, dw_bias: Tensor | None, dw_act: str, pw_weight: Tensor, pw_bias: Tensor | None, *_: object
) -> list[Tensor]:
    return [
        packing.depthwise(dw_weight),
        packing.vector(dw_bias, dw_weight, dw_weight.shape[0]),
        packing.pointwise(pw_weight),
        packing.vector(pw_bias, pw_weight, pw_weight.shape[0]),
    ]


def plan(
    x: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    dw_act: str,
    pw_weight: Tensor,
    pw_bias: Tensor | None,
    pw_act: str,
    stride: int,
    padding: int,
    residual: bool,
    packed: list[Tensor],
) -> tuple[Tensor, list[Launch]]:
    """The output, still unwritten, and the launch that writes it."""
    wd, bd, w, b = packed
    batch, channels, height, width = x.shape
    out_channels, size = pw_weight.shape[0], dw_weight.shape[2]
    out_height, out_width = ((n + 2 * padding - size) // stride + 1 for n in (height, width))
    out = launch.empty_nhwc(x, (batch, out_channels, out_height, out_width))
    rows = batch * out_height * out_width

    target = launch.target(x)
    config = configs.choose(
        "separable_conv",
        target,
        configs.arithmetic(x.dtype, launch.conv_precision(x.dtype)),
        (x, dw_weight, dw_bias, dw_act, pw_weight, pw_bias, pw_act, stride, padding, residual),
        channels=channels,
        columns=out_channels,
        waves=ceil_div(rows, 64) // target.processors,
    )
    bm = block(config["BM"], rows)
    bn = block(config["BN"], w.shape[1])
    bk = block(config["BK"], w.shape[0])
    tma = bool(config.get("TMA"))
    return out, [
        Launch(
            separable_conv,
            (ceil_div(rows, bm), ceil_div(out_channels, bn), 1),
            (x, wd, bd, launch.descriptor(w, bk, bn, tma), b, out, batch, height, width, out_height, out_width),
            {
                **{"C": channels, "CP": w.shape[0], "CO": out_channels, "COLUMNS": w.shape[1], "KS": size},
                **{"STRIDE": stride, "PAD": padding, "DW_ACT": dw_act, "ACT": pw_act, "RESIDUAL": residual},
                **{"PRECISION": launch.conv_precision(x.dtype), "TMA": tma, "BM": bm, "BN": bn, "BK": bk},
            },
            config,
        )
    ]


def forward(x: Tensor, *args: Any) -> Tensor:
    return launch.forward(plan, pack, x, *args)


def candidates(x: Tensor, *args: Any) -> list[dict[str, int]]:
    return launch.candidates("separable_conv", plan, pack, x, *args)
