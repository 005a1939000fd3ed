"""The bytes that the CUDA kernels move between global memory and CTAs, by formula, for one launch.

For each tensor that it names, a function gives what :class:`tests.cuda.execution.Traffic` counts: bytes that warps ask for, bytes
read once a CTA, and bytes written. What comes from the L2 cache lies between the first two: 16-byte copies by cp.async pass the L1
cache by, other reads find there what it has kept. Vectors, and depthwise weights of lowtention, are left out: a few KB.

The formulas are for channels that are multiples of 64, as those of the layers at the end are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from lowkernels.backends.cuda import chains, hopper, hopper_conv, tiling
from lowkernels.backends.cuda.pack import CHUNK, GROUP, rounded_up
from tests.cuda.execution import Traffic

HALF, FLOAT = 2, 4  # bytes
WARPS = 8
# csrc/cuda/window.cuh, LK_CONFIGS: warps along the rows of each config.
_ROW_WARPS = (4, 1, 1, 1)
# csrc/cuda/mbconv.cu: warps along the rows of the expansion, and 16-row tiles of each at a time.
_EXPAND_WARPS, _EXPAND_TILES = 2, 3
# csrc/cuda/lowtention.cu: kRows, and the queries of a CTA of attention_kernel.
_TOKENS, _QUERIES = 64, 128


class Moved(NamedTuple):
    """What one launch moves of its tensors, by their names."""

    tensors: dict[str, Traffic]

    @property
    def read(self) -> tuple[int, int]:
        """The least and the most bytes that come from the L2 cache: read once a CTA, and asked for."""
        return sum(t.once for t in self.tensors.values()), sum(t.asked for t in self.tensors.values())


def _span(first: int, count: int, shape: tiling.Shape | chains.Shape, size: int) -> int:
    """Of ``size`` input rows (or columns), those that ``count`` output rows from ``first`` on read."""
    begin = first * shape.stride - shape.padding
    return min(size, begin + (count - 1) * shape.stride + shape.kernel) - max(0, begin)


def _windows(shape: tiling.Shape | chains.Shape, tile: tiling.Tile) -> Iterator[tuple[int, int, int]]:
    """Of each CTA: its images, the pixels of the image under its outputs' windows, and its outputs, both of one image.

    The window is that of a whole tile, also where the tile leaves the image.
    """
    height, width = shape.output
    for first in range(0, shape.batch, tile.images):
        for y in range(0, height, tile.height):
            for x in range(0, width, tile.width):
                inputs = _span(y, tile.height, shape, shape.height) * _span(x, tile.width, shape, shape.width)
                outputs = min(tile.height, height - y) * min(tile.width, width - x)
                yield min(tile.images, shape.batch - first), inputs, outputs


def _passes(columns: int, of_cta: int) -> int:
    return -(-columns // of_cta)


def _depthwise(shape: tiling.Shape, ctas: int, channels: int) -> Traffic:
    """Every warp reads all weights of a depthwise convolution."""
    once = ctas * shape.kernel**2 * channels * FLOAT
    return Traffic(WARPS * once, once, 0)


def separable_conv(shape: tiling.Shape, tile: tiling.Tile, residual: bool) -> Moved:
    """csrc/cuda/separable_conv.cu."""
    config, channels = tiling.CONFIGS[tile.config], rounded_up(shape.channels, CHUNK)
    passes = _passes(shape.out_channels, config.columns)
    ctas = list(_windows(shape, tile))
    inputs, outputs = (sum(cta[0] * cta[i] for cta in ctas) for i in (1, 2))
    window = passes * inputs * shape.channels * HALF
    out = outputs * shape.out_channels * HALF
    weights = len(ctas) * channels * rounded_up(shape.out_channels, GROUP) * HALF
    return Moved(
        {
            "x": Traffic(window + residual * out, window, 0),
            "dw": _depthwise(shape, len(ctas) * passes, channels),
            "pw": Traffic(_ROW_WARPS[tile.config] * weights, weights, 0),
            "out": Traffic(0, 0, out),
        }
    )


def mbconv(shape: tiling.Shape, tile: tiling.Tile, residual: bool) -> Moved:
    """csrc/cuda/mbconv.cu."""
    config, expanded = tiling.CONFIGS[tile.config], rounded_up(shape.expanded, CHUNK)
    passes, depth = _passes(shape.out_channels, config.columns), rounded_up(shape.channels, GROUP)
    ctas = list(_windows(shape, tile))
    inputs, outputs = (sum(cta[0] * cta[i] for cta in ctas) for i in (1, 2))
    window = passes * inputs * shape.channels * HALF
    out = outputs * shape.out_channels * HALF
    # A warp goes through its rows a few tiles at a time, each time with all weights of its columns.
    rounds = 0
    for _, pixels, _ in ctas:
        tiles = rounded_up(tile.images * pixels, 16) // 16
        rounds += sum(-(-(tiles - warp) // (_EXPAND_WARPS * _EXPAND_TILES)) for warp in range(_EXPAND_WARPS))
    expand = expanded * depth * HALF
    project = len(ctas) * expanded * rounded_up(shape.out_channels, GROUP) * HALF
    return Moved(
        {
            "x": Traffic(window + residual * out, window, 0),
            "expand": Traffic(passes * rounds * expand, passes * len(ctas) * expand, 0),
            "dw": _depthwise(shape, len(ctas) * passes, expanded),
            "project": Traffic(_ROW_WARPS[tile.config] * project, project, 0),
            "out": Traffic(0, 0, out),
        }
    )


def _runs(shape: chains.Shape, tile: tiling.Tile) -> Iterator[tuple[int, int]]:
    """Of each CTA, the pixels of images under its outputs' windows, and its outputs, a rectangle or consecutive ones."""
    if tile.images:
        yield from ((inputs, outputs) for _, inputs, outputs in _windows(shape, tile))
        return
    height, width = shape.output
    columns = _span(0, width, shape, shape.width)
    everything = shape.batch * height * width
    for begin in range(0, everything, tile.width):
        end = min(begin + tile.width, everything)
        # A CTA's window is as many lines as its pixels meet, also where the last CTA has fewer.
        first, last = begin // width, min((begin + tile.width - 1) // width, shape.batch * height - 1)
        inputs = 0
        for image in range(first // height, last // height + 1):
            top, bottom = max(first - image * height, 0), min(last - image * height, height - 1)
            inputs += _span(top, bottom - top + 1, shape, shape.height) * columns
        yield inputs, end - begin


def _statistics(shape: chains.Shape, tile: tiling.Tile) -> tuple[int, int]:
    """Pixels that CTAs read twice for statistics, of images that are not whole in them; and those not their own."""
    plane, everything = shape.height, shape.batch * shape.height
    twice = foreign = 0
    if chains.pieces(shape, tile):  # a launch before has taken them
        return twice, foreign
    for begin in range(0, everything, tile.width):
        end = min(begin + tile.width, everything)
        for image in range(begin // plane, (end - 1) // plane + 1):
            own = min(end, (image + 1) * plane) - max(begin, image * plane)
            if own < plane:
                twice, foreign = twice + plane, foreign + plane - own
    return twice, foreign


def _chain_input(shape: chains.Shape, tile: tiling.Tile, passes: int, columns: int, residual: bool) -> tuple[Traffic, int, int]:
    """x; the CTAs, passes over columns not counted; and bytes written. ``columns`` of a CTA's residual are loaded, also where
    there are fewer."""
    ctas = list(_runs(shape, tile))
    inputs, outputs = (sum(column) for column in zip(*ctas, strict=True))
    twice, foreign = _statistics(shape, tile) if shape.norm else (0, 0)
    pixel = passes * shape.channels * HALF
    asked = (inputs + 2 * twice) * pixel + residual * outputs * passes * columns * HALF
    return Traffic(asked, (inputs + foreign) * pixel, 0), len(ctas), outputs * shape.out_channels * HALF


def chain(shape: chains.Shape, tile: tiling.Tile, residual: bool) -> Moved:
    """csrc/cuda/expand_project.cuh: fused_mbconv, and gn_mlp without the launch for the statistics of large images."""
    compiled = chains.CHAINS[tile.config]
    passes = _passes(shape.out_channels, compiled.columns)
    x, ctas, out = _chain_input(shape, tile, passes, compiled.columns, residual)
    expanded = rounded_up(shape.expanded, GROUP)
    expand = ctas * passes * shape.kernel**2 * shape.depth * expanded * HALF
    project = ctas * expanded * rounded_up(shape.out_channels, GROUP) * HALF
    return Moved({"x": x, "expand": Traffic(expand, expand, 0), "project": Traffic(project, project, 0), "out": Traffic(0, 0, out)})


def wide_chain(shape: chains.Shape, tile: tiling.Tile, residual: bool) -> Moved:
    """csrc/cuda/expand_project_sm90.cuh: the same on Hopper."""
    config = hopper.CONFIGS[tile.config]
    x, ctas, out = _chain_input(shape, tile, 1, config.columns, residual)
    expanded = rounded_up(shape.expanded, hopper.SLAB_COLUMNS)
    depth = rounded_up(shape.kernel**2 * shape.depth, hopper.SLAB_DEPTH)
    slabs = ctas * expanded * (depth + rounded_up(shape.out_channels, hopper.SLAB_COLUMNS)) * HALF
    return Moved({"x": x, "slabs": Traffic(slabs, slabs, 0), "out": Traffic(0, 0, out)})


def wide_mbconv(shape: tiling.Shape, tile: tiling.Tile, residual: bool) -> Moved:
    """csrc/cuda/mbconv_sm90.cu, for output channels that are multiples of 128."""
    passes, expanded = _passes(shape.out_channels, 2 * hopper.SLAB_COLUMNS), rounded_up(shape.expanded, CHUNK)
    ctas = list(_windows(shape, tile))
    inputs, outputs = (sum(cta[0] * cta[i] for cta in ctas) for i in (1, 2))
    window, out = passes * inputs * shape.channels * HALF, outputs * shape.out_channels * HALF
    depth = rounded_up(shape.channels, 2 * hopper.SLAB_DEPTH) + 2 * hopper.SLAB_COLUMNS
    slabs = len(ctas) * passes * expanded * depth * HALF
    return Moved(
        {
            "x": Traffic(window + residual * out, window, 0),
            "slabs": Traffic(slabs, slabs, 0),
            "dw": _depthwise(shape, len(ctas) * passes, expanded),
            "out": Traffic(0, 0, out),
        }
    )


def partial_moments(shape: chains.Shape, pieces: int) -> Moved:
    """The launch before gn_mlp for the statistics of large images, csrc/cuda/normalise.cuh."""
    x = shape.batch * shape.height * shape.channels * HALF
    return Moved({"x": Traffic(2 * x, x, 0), "partial[0]": Traffic(0, 0, shape.batch * pieces * 2 * FLOAT)})


class Attention(NamedTuple):
    """A call of lowtention. ``inner``: channels of all heads, each rounded up to 16."""

    batch: int
    channels: int
    height: int
    width: int
    kernel: int
    stride: int
    heads: int
    inner: int
    norm: bool
    residual: bool

    @property
    def grid(self) -> tuple[int, int]:
        return -(-self.height // self.stride), -(-self.width // self.stride)

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def image(self) -> int:
        """Bytes of an image."""
        return self.height * self.width * self.channels * HALF

    def taps(self) -> int:
        """Taps of all tokens of an image that lie inside of it."""

        def inside(tokens: int, size: int) -> int:
            begins = (i * self.stride - self.kernel // 2 for i in range(tokens))
            return sum(min(size, begin + self.kernel) - max(0, begin) for begin in begins)

        return inside(self.grid[0], self.height) * inside(self.grid[1], self.width)

    def weights(self) -> tuple[int, int]:
        """Bytes of the query, key and value weights, and of the transposed convolution's."""
        depth, taps = rounded_up(self.channels, GROUP), 9 if self.stride == 1 else 16
        return depth * 3 * self.inner * HALF, taps * self.inner * depth * HALF


def lowtention(call: Attention, images: int = 1, shares: int = 1) -> Moved:
    """csrc/cuda/lowtention.cu in one launch, so many images a CTA, and CTAs with the same images."""
    ctas = -(-call.batch // images)
    qkv, up = call.weights()
    # All weights come once for each block of tokens of a CTA; the last CTA may have fewer images.
    rows = _TOKENS if images == 1 or images * call.tokens <= _TOKENS else 2 * _TOKENS
    blocks = sum(-(-min(images, call.batch - first) * call.tokens // rows) for first in range(0, call.batch, images))
    asked = call.image * (2 * shares * call.norm + call.residual) + shares * call.taps() * call.channels * HALF
    return Moved(
        {
            "x": Traffic(call.batch * asked, shares * call.batch * call.image, 0),
            "qkv": Traffic(shares * blocks * qkv, shares * ctas * qkv, 0),
            "up": Traffic(blocks * up, ctas * up, 0),
            "out": Traffic(0, 0, call.batch * call.image),
        }
    )


def lowtention_in_three(call: Attention) -> list[Moved]:
    """csrc/cuda/lowtention.cu in three launches: tokens_kernel, attention_kernel, upsample_kernel."""
    qkv, up = call.weights()
    blocks, query_blocks = -(-call.tokens // _TOKENS), -(-call.tokens // _QUERIES)
    rows = call.batch * call.tokens * call.inner * HALF
    taps = call.batch * call.taps() * call.channels * HALF
    # Every CTA of the first launch takes the statistics of its image again.
    statistics = call.batch * blocks * call.image * call.norm
    once = statistics if call.norm else call.batch * _touched(call)
    keys = 2 * query_blocks * rows
    reach = call.grid[1] + 1
    tokens = sum(min(call.tokens, first + _TOKENS + reach) - max(0, first - reach) for first in range(0, call.tokens, _TOKENS))
    attended = call.batch * tokens * call.inner * HALF
    residual = call.batch * call.image * call.residual
    return [
        Moved(
            {
                "x": Traffic(2 * statistics + taps, once, 0),
                "qkv": Traffic(call.batch * blocks * qkv, call.batch * blocks * qkv, 0),
                "scratch[0]": Traffic(0, 0, 3 * rows),
            }
        ),
        Moved({"scratch[0]": Traffic(rows + keys, rows + keys, 0), "scratch[1]": Traffic(0, 0, rows)}),
        Moved(
            {
                "x": Traffic(residual, residual, 0),
                "scratch[1]": Traffic(attended, attended, 0),
                "up": Traffic(call.batch * blocks * up, call.batch * blocks * up, 0),
                "out": Traffic(0, 0, call.batch * call.image),
            }
        ),
    ]


def _touched(call: Attention) -> int:
    """Bytes of an image that the blocks of tokens of the first of three launches read, each block once."""
    total = 0
    for first in range(0, call.tokens, _TOKENS):
        pixels = set()
        for token in range(first, min(first + _TOKENS, call.tokens)):
            y, x = (n * call.stride - call.kernel // 2 for n in divmod(token, call.grid[1]))
            rows, columns = (range(max(0, at), min(size, at + call.kernel)) for at, size in ((y, call.height), (x, call.width)))
            pixels.update((row, column) for row in rows for column in columns)
        total += len(pixels) * call.channels * HALF
    return total


def conv_act(shape: chains.Shape, rows: int, columns: int, residual: bool, images: int = 0) -> Moved:
    """csrc/cuda/conv_act.cu, a CTA of so many rows and columns, and of so many images where it pools."""
    height, width = shape.output
    plane, everything = height * width, shape.batch * height * width
    passes, mine = _passes(shape.out_channels, columns), images * plane or rows
    taps = distinct = blocks = 0
    for begin in range(0, everything, mine):
        end = min(begin + mine, everything)
        blocks += -(-(end - begin) // rows)
        pixels = set()
        for index in range(begin, end):
            image, pixel = divmod(index, plane)
            y, x = (n * shape.stride - shape.padding for n in divmod(pixel, width))
            inside = [
                (image, row, column)
                for row in range(max(0, y), min(shape.height, y + shape.kernel))
                for column in range(max(0, x), min(shape.width, x + shape.kernel))
            ]
            taps += len(inside)
            pixels.update(inside)
        distinct += len(pixels)
    weights = rounded_up(shape.kernel**2 * shape.channels, 16) * rounded_up(shape.out_channels, GROUP) * HALF
    ctas = -(-everything // mine)
    skip = everything * shape.out_channels * HALF * residual
    tensors = {
        "x": Traffic(passes * taps * shape.channels * HALF, passes * distinct * shape.channels * HALF, 0),
        "weight": Traffic(blocks * weights, ctas * weights, 0),
        "out": Traffic(0, 0, (shape.batch if images else everything) * shape.out_channels * HALF),
    }
    return Moved(tensors | ({"residual[0]": Traffic(skip, skip, 0)} if residual else {}))


def wide_conv(shape: chains.Shape, tile: hopper_conv.Tile, residual: bool, pool: bool = False) -> Moved:
    """csrc/cuda/conv_act_sm90.cu, for output channels that are multiples of 128."""
    ctas = list(_runs(shape, tiling.Tile(0, 1, tile.pixels, tile.config)))
    inputs, outputs = (sum(column) for column in zip(*ctas, strict=True))
    window = inputs * shape.channels * HALF * tile.column_ctas
    depth = rounded_up(shape.kernel**2 * shape.depth, hopper.SLAB_DEPTH)
    slabs = len(ctas) * depth * shape.out_channels * HALF
    out = outputs * shape.out_channels * HALF
    height, width = shape.output
    tensors = {
        "x": Traffic(window, window, 0),
        "slabs": Traffic(slabs, slabs, 0),
        "out": Traffic(0, 0, out // (height * width) if pool else out),
    }
    return Moved(tensors | ({"residual[0]": Traffic(out, out, 0)} if residual else {}))


H200 = tiling.Device(227 * 1024, 228 * 1024, 132)

# What launches of the layers that the kernels' headers name move, with so many images.
_BATCH = 256
_HEAD = chains.Shape(_BATCH, 256, 7, 7, 1536, 1, 1, 0, 0, False)
LAYERS: dict[str, Callable[[], Moved]] = {
    "conv_act": lambda: conv_act(_HEAD, 64, 128, False, images=1),
    "conv_act_sm90": lambda: wide_conv(_HEAD, hopper_conv.divisions(hopper_conv.Conv(_HEAD, True), H200)[0], False, pool=True),
    "separable_conv": lambda: separable_conv(
        tiling.Shape(_BATCH, 512, 14, 14, 512, 3, 1, 1, 0, False), tiling.Tile(1, 7, 14, 3), True
    ),
    "mbconv": lambda: mbconv(tiling.Shape(_BATCH, 256, 7, 7, 256, 3, 1, 1, 1024, False), tiling.Tile(2, 7, 7, 3), True),
    "mbconv_sm90": lambda: wide_mbconv(tiling.Shape(_BATCH, 256, 7, 7, 256, 3, 1, 1, 1024, False), tiling.Tile(2, 7, 7, 0), True),
    "fused_mbconv": lambda: chain(chains.Shape(_BATCH, 128, 14, 14, 128, 3, 1, 1, 512, False), tiling.Tile(0, 1, 196, 1), True),
    "gn_mlp": lambda: chain(chains.Shape(_BATCH, 128, 196, 1, 128, 1, 1, 0, 512, True), tiling.Tile(0, 1, 196, 1), True),
    "fused_mbconv_sm90": lambda: wide_chain(
        chains.Shape(_BATCH, 128, 14, 14, 128, 3, 1, 1, 512, False), tiling.Tile(0, 1, 192, 1), True
    ),
    "gn_mlp_sm90": lambda: wide_chain(chains.Shape(_BATCH, 128, 196, 1, 128, 1, 1, 0, 512, True), tiling.Tile(0, 1, 192, 1), True),
    "lowtention": lambda: lowtention(Attention(_BATCH, 128, 14, 14, 5, 2, 2, 64, True, True)),
}


def kilobytes_an_image(kernel: str) -> tuple[int, int]:
    """The least and the most that come from the L2 cache for one image of the kernel's layer."""
    least, most = LAYERS[kernel]().read
    return round(least / _BATCH / 1024), round(most / _BATCH / 1024)
