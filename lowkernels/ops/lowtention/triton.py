# mypy: allow-untyped-defs, allow-incomplete-defs
"""lowtention in Triton: one launch for up to 64 tokens an image, three beyond.

The work has four phases, each a function over rows of tokens, flattened over images, and each handing its result to the next
through a buffer in global memory: GroupNorm statistics and depthwise convolution (``y``), the product to q, k and v (``qkv``),
attention (``o``), the transposed convolution (``out``). For up to 64 tokens one program runs all phases for its images, separated
by CTA barriers, and the buffers stay in the caches. Beyond, the phases are spread over many programs: (statistics, depthwise, qkv),
attention with a running softmax, and the transposed convolution.

Buffers handed over inside of a program: Triton's interpreter runs a program as one thread, so it cannot show a missing barrier.
Only a GPU can. They are never read through tensor descriptors, which would need another kind of fence.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...backends.triton import configs, launch, packing
from ...backends.triton.device import depthwise, image_statistics, initial_rows, load_vector, load_weight, output_rows, store_rows
from ...backends.triton.launch import Launch, block, ceil_div, dividing_block

# Images of at most so many tokens are served by one launch.
FUSED_TOKENS = 64

_HALF = configs.varied(
    {"BM": 64, "BC": 32, "BN": 64, "BK": 32, "BU": 64, "BKV": 64, "num_warps": 8, "num_stages": 3, "maxnreg": 255},
    {"BM": 16, "num_stages": 2},
    {"BM": 32, "num_stages": 2},
)
_TF32 = configs.varied({**_HALF[0], "BKV": 32, "num_stages": 2}, {"BM": 32})
_SINGLE = configs.varied({**_TF32[0], "BK": 16}, {"BM": 32})
# What the cost model chooses from where no table has a row, by arithmetic.
CANDIDATES = {"float16": _HALF, "bfloat16": _HALF, "tf32": _TF32, "float32": _SINGLE}


@triton.jit
def depthwise_tokens(
    x, wd, bd, gamma, beta, y, start, tokens, GW, H, W, eps,
    C: tl.constexpr, CP: tl.constexpr, KS: tl.constexpr, STRIDE: tl.constexpr, NORM: tl.constexpr, BS: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Normalise and convolve: y [BT tokens from ``start``, CP] of the image at ``x``; ``y`` points to the image's first token.

    The padding of the convolution is zeros of the normalised input.
    """
    if NORM:
        mean, rstd = image_statistics(x, H.to(tl.int64) * W * C, eps, BS)
    token = start + tl.arange(0, BT)
    ok = token < tokens
    iy = token // GW * STRIDE - KS // 2
    ix = token % GW * STRIDE - KS // 2
    origin = (iy.to(tl.int64) * W + ix) * C
    at = y + token.to(tl.int64)[:, None] * CP
    columns = tl.arange(0, BC)
    for c in tl.range(0, CP, BC, num_stages=1):
        if NORM:
            scale = rstd * load_vector(gamma, c, CP, BC)
            shift = load_vector(beta, c, CP, BC) - mean * scale
        else:
            scale = None
            shift = None
        acc = depthwise(x + c, wd + c, origin, iy, ix, ok, columns, columns < C - c, scale, shift, H, W, W,
                        C, CP, KS, NORM, BT, BC)  # fmt: skip
        acc += load_vector(bd, c, CP, BC)[None, :]
        tl.store(at + (c + columns)[None, :], acc.to(y.dtype.element_ty), mask=ok[:, None] & (columns < CP - c)[None, :])


@triton.jit
def project_tokens(
    y, wqkv, qkv, first, limit,
    CP: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """qkv[rows] = y[rows] @ wqkv for BM rows from ``first`` that are below ``limit`` (both 64 bits)."""
    row = first + tl.arange(0, BM)
    ok = row < limit
    for column in tl.range(0, WIDTH, BN, num_stages=1):
        acc = tl.zeros([BM, BN], tl.float32)
        for k in tl.range(0, CP, BK):
            inner = k + tl.arange(0, BK)
            if CP % BK == 0:
                mask = ok[:, None]
            else:
                mask = ok[:, None] & (inner < CP)[None, :]
            a = tl.load(y + row[:, None] * CP + inner[None, :], mask=mask, other=0.0)
            acc = tl.dot(a, load_weight(wqkv, k, column, CP, WIDTH, BK, BN, TMA), acc, input_precision=PRECISION)
        columns = column + tl.arange(0, BN)
        mask = ok[:, None] & (columns < WIDTH)[None, :]
        tl.store(qkv + row[:, None] * WIDTH + columns[None, :], acc.to(qkv.dtype.element_ty), mask=mask)


@triton.jit
def attend(
    qkv, o, head, start, tokens, scale,
    HEADS: tl.constexpr, DP: tl.constexpr, PRECISION: tl.constexpr, BQ: tl.constexpr, BKV: tl.constexpr,
):  # fmt: skip
    """o = softmax(scale * q k^T) v for one head of one image and BQ queries from ``start``; pointers are to the image's first
    token.

    A token's row of ``qkv`` is [q | k | v] of HEADS heads of DP channels each. Keys come BKV at a time, with a running softmax;
    ``scale`` includes log2(e).
    """
    d = tl.arange(0, DP)
    query = start + tl.arange(0, BQ)
    ok = query < tokens
    at = qkv + head * DP + d
    q = tl.load(at[None, :] + query.to(tl.int64)[:, None] * (3 * HEADS * DP), mask=ok[:, None], other=0.0)
    largest = tl.full([BQ], float("-inf"), tl.float32)
    total = tl.zeros([BQ], tl.float32)
    acc = tl.zeros([BQ, DP], tl.float32)
    for first in tl.range(0, tokens, BKV):
        key = first + tl.arange(0, BKV)
        live = key < tokens
        row = key.to(tl.int64) * (3 * HEADS * DP)
        k = tl.load(at[None, :] + HEADS * DP + row[:, None], mask=live[:, None], other=0.0)
        v = tl.load(at[None, :] + 2 * HEADS * DP + row[:, None], mask=live[:, None], other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        s = tl.where(live[None, :], s, float("-inf"))
        # The first block has a live key, so the maximum is finite from there on.
        above = tl.maximum(largest, tl.max(s, 1))
        shrink = tl.exp2(largest - above)
        p = tl.exp2(s - above[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        largest = above
    acc = acc / total[:, None]
    at = o + head * DP + d
    tl.store(at[None, :] + query.to(tl.int64)[:, None] * (HEADS * DP), acc.to(o.dtype.element_ty), mask=ok[:, None])


@triton.jit
def upsample_rows(
    o, w, b, x, out, first, limit, parity, column, N, H, W, GH, GW,
    INNER: tl.constexpr, TAPS: tl.constexpr, CO: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr,
    RESIDUAL: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Transposed convolution: the output pixels of one ``parity`` over BM tokens from ``first``, BN channels from ``column``.

    With stride 1 there is one parity with 9 taps; with stride 2 each of the 4 parities (y, x) has 4 taps. A tap is a product of the
    tokens' neighbours with its slice of w [parities * TAPS * INNER, COLUMNS].
    """
    row = first + tl.arange(0, BM)
    image, ty, tx, exists = output_rows(first, N, GH, GW, BM)
    exists = exists & (row < limit)
    py = parity // 2
    px = parity % 2
    oy = ty * STRIDE + py
    ox = tx * STRIDE + px
    offset = ((image * H + oy) * W + ox) * CO
    wanted = exists & (oy < H) & (ox < W)
    acc = initial_rows(b, x, offset, wanted, column, CO, COLUMNS, RESIDUAL, BM, BN)
    BLOCKS: tl.constexpr = INNER // BK
    for step in tl.range(0, TAPS * BLOCKS):
        tap = step // BLOCKS
        if STRIDE == 1:
            dy = 1 - tap // 3
            dx = 1 - tap % 3
        else:
            dy = (tap // 2) * (2 * py - 1)
            dx = (tap % 2) * (2 * px - 1)
        y = ty + dy
        xx = tx + dx
        ok = exists & (y >= 0) & (y < GH) & (xx >= 0) & (xx < GW)
        inner = (step % BLOCKS) * BK + tl.arange(0, BK)
        a = tl.load(o + ((row + dy * GW + dx) * INNER)[:, None] + inner[None, :], mask=ok[:, None], other=0.0)
        weight = load_weight(w, (parity * TAPS * BLOCKS + step) * BK, column, STRIDE * STRIDE * TAPS * INNER, COLUMNS, BK, BN, TMA)
        acc = tl.dot(a, weight, acc, input_precision=PRECISION)
    store_rows(out, acc, offset, wanted, column, CO, BN)


@triton.jit(do_not_specialize=["N", "H", "W", "GH", "GW", "NI"])
def lowtention(
    x, gamma, beta, wd, bd, wqkv, wup, bup, y, qkv, o, out, N, H, W, GH, GW, NI, eps, scale,
    C: tl.constexpr, CP: tl.constexpr, CO: tl.constexpr, COLUMNS: tl.constexpr, KS: tl.constexpr, STRIDE: tl.constexpr,
    NORM: tl.constexpr, RESIDUAL: tl.constexpr, HEADS: tl.constexpr, DP: tl.constexpr, TAPS: tl.constexpr,
    PRECISION: tl.constexpr, MATMUL: tl.constexpr, TMA: tl.constexpr, BS: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr,
    BC: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BU: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """All phases for NI images of at most BT tokens each, NI * tokens <= BM. Program id: group of images."""
    tokens = GH * GW
    image = tl.program_id(0).to(tl.int64) * NI
    beyond = tl.minimum(image + NI, N)
    # Factors of image numbers, in 64 bits.
    rows = tokens.to(tl.int64)
    plane = H.to(tl.int64) * W * C
    first = image * rows
    limit = beyond * rows
    for number in tl.range(image, beyond, num_stages=1):
        depthwise_tokens(x + number * plane, wd, bd, gamma, beta, y + number * rows * CP, 0, tokens, GW, H, W, eps,
                         C, CP, KS, STRIDE, NORM, BS, BT, BC)  # fmt: skip
    tl.debug_barrier()
    project_tokens(y, wqkv, qkv, first, limit, CP, 3 * HEADS * DP, PRECISION, TMA, BM, BN, BK)
    tl.debug_barrier()
    for number in tl.range(image, beyond, num_stages=1):
        for head in tl.range(0, HEADS, num_stages=1):
            attend(qkv + number * rows * (3 * HEADS * DP), o + number * rows * (HEADS * DP), head, 0, tokens, scale,
                   HEADS, DP, MATMUL, BT, BT)  # fmt: skip
    tl.debug_barrier()
    for parity in tl.range(0, STRIDE * STRIDE, num_stages=1):
        for column in tl.range(0, COLUMNS, BU, num_stages=1):
            upsample_rows(o, wup, bup, x, out, first, limit, parity, column, N, H, W, GH, GW,
                          HEADS * DP, TAPS, CO, COLUMNS, STRIDE, RESIDUAL, PRECISION, TMA, BM, BU, BI)  # fmt: skip


@triton.jit(do_not_specialize=["N", "H", "W", "GH", "GW"])
def lowtention_qkv(
    x, gamma, beta, wd, bd, wqkv, y, qkv, N, H, W, GH, GW, eps,
    C: tl.constexpr, CP: tl.constexpr, KS: tl.constexpr, STRIDE: tl.constexpr, NORM: tl.constexpr, WIDTH: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr, BS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """The first two phases for BM tokens of one image. Program ids: (image, block of tokens)."""
    tokens = GH * GW
    image = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BM
    depthwise_tokens(x + image * H * W * C, wd, bd, gamma, beta, y + image * tokens * CP, start, tokens, GW, H, W, eps,
                     C, CP, KS, STRIDE, NORM, BS, BM, BC)  # fmt: skip
    tl.debug_barrier()
    project_tokens(y, wqkv, qkv, image * tokens + start, (image + 1) * tokens, CP, WIDTH, PRECISION, TMA, BM, BN, BK)


@triton.jit(do_not_specialize=["tokens"])
def lowtention_attend(
    qkv, o, tokens, scale, HEADS: tl.constexpr, DP: tl.constexpr, PRECISION: tl.constexpr, BQ: tl.constexpr, BKV: tl.constexpr
):
    """The third phase for BQ queries of one head of one image. Program ids: (image * HEADS + head, block of queries)."""
    image = (tl.program_id(0) // HEADS).to(tl.int64)
    attend(qkv + image * tokens * (3 * HEADS * DP), o + image * tokens * (HEADS * DP), tl.program_id(0) % HEADS,
           tl.program_id(1) * BQ, tokens, scale, HEADS, DP, PRECISION, BQ, BKV)  # fmt: skip


@triton.jit(do_not_specialize=["N", "H", "W", "GH", "GW"])
def lowtention_up(
    o, w, b, x, out, N, H, W, GH, GW,
    INNER: tl.constexpr, TAPS: tl.constexpr, CO: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr,
    RESIDUAL: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The last phase. Program ids: (block of tokens, parity, block of output channels)."""
    limit = N.to(tl.int64) * GH * GW
    upsample_rows(o, w, b, x, out, tl.program_id(0).to(tl.int64) * BM, limit, tl.program_id(1), tl.program_id(2) * BN,
                  N, H, W, GH, GW, INNER, TAPS, CO, COLUMNS, STRIDE, RESIDUAL, PRECISION, TMA, BM, BN, BK)  # fmt: skip


def _padded_head(dim: int) -> int:
    return max(16, launch.power_of_two_above(dim))


def unsupported_weights(
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    qkv_weight: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    num_heads: int,
    stride: int,
    residual: bool,
) -> str | None:
    dim = qkv_weight.shape[0] // 3 // num_heads
    if dim > 128:
        return f"the head dimension is {dim}; its kernels hold at most 128"
    return launch.unsupported_dtype(dw_weight) or launch.unsupported_channels(
        C=dw_weight.shape[0], C_out=up_weight.shape[1], head_dimension=dim
    )


def unsupported_input(x: Tensor, *args: Any) -> str | None:
    stride = args[-2]
    tokens = ceil_div(x.shape[2], stride) * ceil_div(x.shape[3], stride)
    # Blocks of at least 16 tokens are counted along an axis of the grid that has 16 bits.
    if tokens >= 2**20:
        return f"x has {tokens} tokens an image; its kernels number at most 2**20"
    return launch.unsupported_input(x)


def pack(
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    qkv_weight: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    num_heads: int,
    stride: int,
    residual: bool,
) -> list[Tensor]:
    channels, out_channels = dw_weight.shape[0], up_weight.shape[1]
    dim = qkv_weight.shape[0] // 3 // num_heads
    padded = _padded_head(dim)
    # Heads are padded with channels that are zero in q, k, v and in the transposed convolution. From (head, qkv, d) to (qkv, head,
    # d).
    heads = qkv_weight.new_zeros(3, num_heads, padded, channels)
    heads[:, :, :dim] = qkv_weight.reshape(num_heads, 3, dim, channels).transpose(0, 1)
    wqkv = packing.matrix(heads.reshape(-1, channels).t())

    size = up_weight.shape[2]
    inner = up_weight.new_zeros(num_heads, padded, out_channels, size, size)
    inner[:, :dim] = up_weight.reshape(num_heads, dim, out_channels, size, size)
    inner = inner.flatten(0, 1)
    if stride == 1:
        taps = [inner[:, :, ky, kx] for ky in range(3) for kx in range(3)]
    else:
        # Output row 2 t + parity is reached from row t through the first of these, and from row t - 1 or t + 1 through the second.
        rows = ((1, 3), (2, 0))
        taps = [inner[:, :, ky, kx] for py in rows for px in rows for ky in py for kx in px]
    return [
        packing.vector(norm_weight, dw_weight, channels),
        packing.vector(norm_bias, dw_weight, channels),
        packing.depthwise(dw_weight),
        packing.vector(dw_bias, dw_weight, channels),
        wqkv,
        packing.matrix(torch.cat(taps)),
        packing.vector(up_bias, up_weight, out_channels),
    ]


def plan(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    qkv_weight: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    num_heads: int,
    stride: int,
    residual: bool,
    packed: list[Tensor],
) -> tuple[Tensor, list[Launch]]:
    """The output, still unwritten, and the launches that write it."""
    gamma, beta, wd, bd, wqkv, wup, bup = packed
    batch, channels, height, width = x.shape
    out_channels, size = up_weight.shape[1], dw_weight.shape[2]
    grid_height, grid_width = ceil_div(height, stride), ceil_div(width, stride)
    tokens = grid_height * grid_width
    dim = qkv_weight.shape[0] // 3 // num_heads
    padded = _padded_head(dim)
    inner = num_heads * padded
    out = launch.empty_nhwc(x, (batch, out_channels, height, width))
    y = x.new_empty((batch, tokens, wd.shape[1]))
    qkv = x.new_empty((batch, tokens, 3 * inner))
    o = x.new_empty((batch, tokens, inner))

    target = launch.target(x)
    fused = tokens <= FUSED_TOKENS
    config = configs.choose(
        "lowtention",
        target,
        configs.arithmetic(x.dtype, launch.conv_precision(x.dtype)),
        (x, norm_weight, norm_bias, eps, dw_weight, dw_bias, qkv_weight, up_weight, up_bias, num_heads, stride, residual),
        channels=channels,
        columns=out_channels,
        head=padded,
        tokens=tokens,
        stride=stride,
        waves=batch // target.processors,
    )
    norm = norm_weight is not None
    tma = bool(config.get("TMA"))
    bt = block(FUSED_TOKENS, tokens)
    # A program has all tokens of its images.
    bm = max(config["BM"], bt) if fused else config["BM"]
    bc = block(config["BC"], channels)
    bn, bk = block(config["BN"], 3 * inner), block(config["BK"], channels)
    bu, bi = block(config["BU"], out_channels), dividing_block(config["BK"], inner)
    statistics = min(4096, launch.power_of_two_above(height * width * channels))
    # Base 2: the kernels use exp2.
    scale = dim**-0.5 * 1.4426950408889634
    conv, matmul = launch.conv_precision(x.dtype), launch.matmul_precision(x.dtype)
    geometry = (batch, height, width, grid_height, grid_width)
    common = {"C": channels, "CP": wd.shape[1], "KS": size, "STRIDE": stride, "NORM": norm, "PRECISION": conv, "TMA": tma}
    up = {"CO": out_channels, "COLUMNS": wup.shape[1], "TAPS": 9 if stride == 1 else 4, "RESIDUAL": residual}
    heads = {"HEADS": num_heads, "DP": padded}
    project = launch.descriptor(wqkv, bk, bn, tma)
    upsample = launch.descriptor(wup, bi, bu, tma)
    if fused:
        images = max(1, bm // tokens)
        return out, [
            Launch(
                lowtention,
                (ceil_div(batch, images), 1, 1),
                (x, gamma, beta, wd, bd, project, upsample, bup, y, qkv, o, out, *geometry, images, eps, scale),
                {**common, **up, **heads, "MATMUL": matmul, "BS": statistics, "BM": bm, "BT": bt, "BC": bc, "BN": bn}
                | {"BK": bk, "BU": bu, "BI": bi},
                config,
            )
        ]
    return out, [
        Launch(
            lowtention_qkv,
            (batch, ceil_div(tokens, bm), 1),
            (x, gamma, beta, wd, bd, project, y, qkv, *geometry, eps),
            {**common, "WIDTH": 3 * inner, "BS": statistics, "BM": bm, "BC": bc, "BN": bn, "BK": bk},
            config,
        ),
        Launch(
            lowtention_attend,
            (batch * num_heads, ceil_div(tokens, bm), 1),
            (qkv, o, tokens, scale),
            {**heads, "PRECISION": matmul, "BQ": bm, "BKV": config["BKV"]},
            config,
        ),
        Launch(
            lowtention_up,
            (ceil_div(batch * tokens, bm), stride * stride, ceil_div(out_channels, bu)),
            (o, upsample, bup, x, out, *geometry),
            {**up, "INNER": inner, "STRIDE": stride, "PRECISION": conv, "TMA": tma, "BM": bm, "BN": bu, "BK": bi},
            config,
        ),
    ]


def forward(x: Tensor, *args: Any) -> Tensor:
    return launch.forward(plan, pack, x, *args)


def candidates(x: Tensor, *args: Any) -> list[dict[str, int]]:
    return launch.candidates("lowtention", plan, pack, x, *args)
