# mypy: allow-untyped-defs, allow-incomplete-defs
"""The functions Triton kernels are made of.

Conventions. Images are NHWC. Rows are output pixels, flattened over images; a tile is BM consecutive ones, numbered in 64 bits.
``origin`` is the offset (64 bits, in elements) of the input pixel under a row's first tap, which may lie outside of the image:
``iy`` and ``ix``, its coordinates, decide whether a tap is read. Everything is computed in fp32 but the operands of matrix
products.
"""

import triton
import triton.language as tl

# No annotations from the future here: the interpreter and the compiler look for tl.constexpr itself.


@triton.jit
def activate(x, ACT: tl.constexpr):
    """Activation ACT of x (fp32). NaN stays NaN, as in PyTorch."""
    if ACT == "relu":
        y = tl.where(x < 0, 0.0, x)
    elif ACT == "relu6":
        y = tl.where(x < 0, 0.0, tl.where(x > 6.0, 6.0, x))
    elif ACT == "hardswish":
        # One multiply-add that saturates, and one multiply.
        y = x * tl.minimum(tl.maximum(x * 0.16666666666666666 + 0.5, 0.0), 1.0)
    elif ACT == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif ACT == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        # (1 + tanh u) / 2 is the logistic function of 2 u.
        y = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        tl.static_assert(ACT == "none")
        y = x
    return y


@triton.jit
def output_rows(first, N, HO, WO, BM: tl.constexpr):
    """Image (64 bits), y, x of the BM output pixels from ``first`` (64 bits), and which of them exist."""
    plane = HO * WO
    image = first // plane
    local = (first - image * plane).to(tl.int32) + tl.arange(0, BM)
    step = local // plane
    pixel = local - step * plane
    y = pixel // WO
    image = image + step
    return image, y, pixel - y * WO, image < N


@triton.jit
def window_bits(iy, ix, ok, H, W, KS: tl.constexpr):
    """Which of a window's rows and columns are inside of the image, one integer an output pixel: bits 0 to KS - 1 and 8 to 7 +
    KS."""
    bits = tl.zeros(iy.shape, tl.int32)
    for t in tl.static_range(KS):
        bits |= (ok & (iy + t >= 0) & (iy + t < H)).to(tl.int32) << t
        bits |= (ok & (ix + t >= 0) & (ix + t < W)).to(tl.int32) << (8 + t)
    return bits


@triton.jit
def load_window(x, origin, bits, step, W, C: tl.constexpr, KS: tl.constexpr, BK: tl.constexpr, FLAT: tl.constexpr):
    """Block ``step`` of the window matrix, [BM, BK]; zero outside of the images, which ``bits`` (:func:`window_bits`) tells.

    There are ceil(KS * KS * C / BK) blocks. They lie within one tap if BK divides C; FLAT blocks need not, at the price of a tap
    and a mask per element.
    """
    if FLAT:
        k = step * BK + tl.arange(0, BK)
        tap = k // C
        ky = tap // KS
        kx = tap % KS
        offset = (ky * W + kx) * C + k % C
        wanted = (1 << ky) | (256 << kx)
        mask = ((bits[:, None] & wanted[None, :]) == wanted[None, :]) & (k < KS * KS * C)[None, :]
        block = tl.load(x + (origin[:, None] + offset[None, :]), mask=mask, other=0.0)
    else:
        tap = step // (C // BK)
        ky = tap // KS
        kx = tap % KS
        columns = (ky * W + kx) * C + (step % (C // BK)) * BK + tl.arange(0, BK)
        wanted = (1 << ky) | (256 << kx)
        mask = (bits & wanted) == wanted
        block = tl.load(x + (origin[:, None] + columns[None, :]), mask=mask[:, None], other=0.0)
    return block


@triton.jit
def load_weight(w, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
                TMA: tl.constexpr):  # fmt: skip
    """Block [BR, BC] at (row, column) of a packed [ROWS, COLUMNS] weight matrix, which it must overlap; zero beyond the edges.

    ``w`` is a tensor descriptor with blocks of that size if TMA, a pointer otherwise.
    """
    if TMA:
        block = w.load([row, column])
    else:
        rows = row + tl.arange(0, BR)
        columns = column + tl.arange(0, BC)
        at = w + rows[:, None] * COLUMNS + columns[None, :]
        if ROWS % BR == 0 and COLUMNS % BC == 0:
            block = tl.load(at)
        else:
            block = tl.load(at, mask=(rows < ROWS)[:, None] & (columns < COLUMNS)[None, :], other=0.0)
    return block


@triton.jit
def load_vector(v, column, COLUMNS: tl.constexpr, BC: tl.constexpr):
    """BC elements of a packed vector from ``column`` on, which is not beyond its end; zero after that."""
    columns = column + tl.arange(0, BC)
    if COLUMNS % BC == 0:
        block = tl.load(v + columns)
    else:
        block = tl.load(v + columns, mask=columns < COLUMNS, other=0.0)
    return block


@triton.jit
def depthwise_tap(acc, x, w, tap, origin, iy, ix, ok, columns, live, scale, shift, H, W, PITCH, CS, EP,
                  KS: tl.constexpr, AFFINE: tl.constexpr):  # fmt: skip
    """acc + (value under one tap) * (its weight), [BM, BC]; values outside of the image are zero after the affine map."""
    ky = tap // KS
    kx = tap % KS
    y = iy + ky
    xx = ix + kx
    inside = ok & (y >= 0) & (y < H) & (xx >= 0) & (xx < W)
    offset = origin + (ky * PITCH + kx) * CS
    mask = inside[:, None] & live[None, :]
    value = tl.load(x + (offset[:, None] + columns[None, :]), mask=mask, other=0.0).to(tl.float32)
    if AFFINE:
        value = tl.where(mask, value * scale[None, :] + shift[None, :], 0.0)
    weight = tl.load(w + tap * EP + columns, mask=live, other=0.0).to(tl.float32)
    return acc + value * weight[None, :]


@triton.jit
def depthwise(x, w, origin, iy, ix, ok, columns, live, scale, shift, H, W, PITCH, CS: tl.constexpr, EP: tl.constexpr,
              KS: tl.constexpr, AFFINE: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """Depthwise KS x KS convolution, fp32 [BM, BC], of the channels ``columns`` of a buffer.

    The buffer has CS channels a pixel and PITCH pixels a row; H and W bound the coordinates that hold data. With AFFINE the input
    is ``x * scale + shift`` (per channel) inside of the image and zero outside.
    """
    acc = tl.zeros([BM, BC], tl.float32)
    if KS <= 3:
        # All loads in flight at once.
        for tap in tl.static_range(KS * KS):
            acc = depthwise_tap(acc, x, w, tap, origin, iy, ix, ok, columns, live, scale, shift,
                                H, W, PITCH, CS, EP, KS, AFFINE)  # fmt: skip
    else:
        for tap in tl.range(KS * KS, num_stages=1):
            acc = depthwise_tap(acc, x, w, tap, origin, iy, ix, ok, columns, live, scale, shift,
                                H, W, PITCH, CS, EP, KS, AFFINE)  # fmt: skip
    return acc


@triton.jit
def moments(x, length, BS: tl.constexpr):
    """Mean and sum of squared deviations of ``length`` consecutive elements, read BS at a time.

    Sums are taken around the mean of the first block, so a mean far from zero costs no accuracy.
    """
    lanes = tl.arange(0, BS)
    head = tl.load(x + lanes, mask=lanes < length, other=0.0).to(tl.float32)
    pivot = tl.sum(head) / tl.minimum(length, BS)
    total = tl.zeros([BS], tl.float32)
    squares = tl.zeros([BS], tl.float32)
    for start in tl.range(0, length, BS):
        live = lanes < length - start
        centred = tl.where(live, tl.load(x + start + lanes, mask=live, other=0.0).to(tl.float32) - pivot, 0.0)
        total += centred
        squares += centred * centred
    off = tl.sum(total) / length
    return pivot + off, tl.maximum(tl.sum(squares) - off * off * length, 0.0)


@triton.jit
def image_statistics(x, length, eps, BS: tl.constexpr):
    """Mean and 1 / sqrt(variance + eps) of the ``length`` elements of one image."""
    mean, squares = moments(x, length, BS)
    return mean, 1.0 / tl.sqrt_rn(squares / length + eps)


@triton.jit
def combine_statistics(partial, length, piece, eps, PIECES: tl.constexpr):
    """:func:`image_statistics` from the moments of its pieces (all ``piece`` long but the last), in a fixed order.

    ``partial`` holds PIECES means, then PIECES sums of squared deviations.
    """
    index = tl.arange(0, PIECES)
    count = tl.minimum(tl.maximum(length - index.to(tl.int64) * piece, 0), piece).to(tl.float32)
    means = tl.load(partial + index)
    mean = tl.sum(means * count) / length
    off = means - mean
    squares = tl.sum(tl.load(partial + PIECES + index) + count * off * off)
    return mean, 1.0 / tl.sqrt_rn(squares / length + eps)


@triton.jit(do_not_specialize=["length", "piece"])
def statistics_pieces(x, partial, length, piece, PIECES: tl.constexpr, BS: tl.constexpr):
    """Moments of one piece of one image; program ids are (image, piece). ``partial`` is [N, 2, PIECES], fp32."""
    image = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1)
    start = index.to(tl.int64) * piece
    count = tl.minimum(length - start, piece)
    mean = 0.0
    squares = 0.0
    if count > 0:
        mean, squares = moments(x + image * length + start, count, BS)
    at = partial + image * 2 * PIECES + index
    tl.store(at, mean)
    tl.store(at + PIECES, squares)


@triton.jit
def initial_rows(bias, x, offset, ok, column, CO: tl.constexpr, BIASES: tl.constexpr, RESIDUAL: tl.constexpr,
                 BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """What an accumulator [BM, BN] of the columns from ``column`` on starts from: the bias, plus the residual ``x`` (as out).

    Adding the residual first costs no registers while the accumulator is full, as adding it last would.
    """
    acc = tl.zeros([BM, BN], tl.float32) + load_vector(bias, column, BIASES, BN)[None, :]
    if RESIDUAL:
        columns = column + tl.arange(0, BN)
        mask = ok[:, None] & (columns < CO)[None, :]
        acc += tl.load(x + (offset[:, None] + columns[None, :]), mask=mask, other=0.0).to(tl.float32)
    return acc


@triton.jit
def store_rows(out, acc, offset, ok, column, CO: tl.constexpr, BN: tl.constexpr):
    """Round [BM, BN] and store it from ``column`` on."""
    columns = column + tl.arange(0, BN)
    mask = ok[:, None] & (columns < CO)[None, :]
    tl.store(out + (offset[:, None] + columns[None, :]), acc.to(out.dtype.element_ty), mask=mask)
