"""Which configuration a call runs with where no table has a row: the one that a count of the work predicts to be the fastest.

Every candidate of the operator is planned for the call's shape, on tensors without data, and what its launches do is counted:
programs, products with their padding, bytes between the L2 cache and the processors (weights are read again by every program), and
shared memory. The count is divided by the rates of :mod:`lowkernels.choosing.estimates`. What does not fit in shared memory or in
the registers is out. The outcome is kept for each shape, the number of images rounded up to a power of two, so a call does not
depend on those before it.

The time is only good for comparing candidates with each other. No GPU has confirmed it yet.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ... import costs
from ...choosing import estimates, settings
from ...ops import OPERATORS

if TYPE_CHECKING:
    from .launch import Launch, Target

# Shared memory a program may have, in bytes, by compute capability (CUDA C++ Programming Guide, "Technical Specifications").
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
# Streaming multiprocessors of a typical part: A100, RTX 3090, L40S, H100/H200, B200, RTX 5090.
PROCESSORS = {80: 108, 86: 82, 89: 142, 90: 132, 100: 148, 120: 170}
# Of every architecture here, per streaming multiprocessor: 32-bit registers, and threads at a time on the smallest of them.
REGISTERS, THREADS = 65536, 1536
# Bytes/s between the L2 cache and one processor: 5.5 TB/s for 132 of them, the assumption of docs/perf/triton_kernels.md. Parts of
# other architectures have about as much a processor.
L2_BANDWIDTH = 41.7e9
# Before a program's first product and after its last: launching it, filling the pipeline, storing. Hidden where another one runs.
EDGE_S = 2e-6
# Products of fewer than 64 rows use none of the instructions that feed from shared memory (wgmma, tcgen05): half the rate, roughly.
SMALL_ROWS, SMALL_ROWS_RATE = 64, 0.5
# float32 sums a thread may hold. It has 255 registers; the operands, the addresses and the window's bits need the rest.
SUMS_A_THREAD = 144
# Bytes of shared memory for barriers of asynchronous copies and products; there were never more than a few dozen.
BARRIERS = 1024
# Decisions are kept for so many shapes.
KEPT = 4096


def nearest(arch: int, known: dict[int, Any]) -> Any:
    """What is known of an architecture, or of the one before it, or of the first."""
    return known[max((a for a in known if a <= arch), default=min(known))]


@dataclass(frozen=True)
class Work:
    """What one launch does.

    Attributes:
        programs: how many there are.
        products: floating-point operations of a program's matrix products, those with padding counted.
        scalar: those of its depthwise convolutions.
        traffic: bytes a program moves to and from the L2 cache.
        shared: bytes of shared memory a program needs at most.
        sums: float32 sums a program holds in registers.
        rows: of its matrix products.
    """

    programs: int
    products: float
    traffic: float
    shared: int
    sums: int
    rows: int
    scalar: float = 0.0


def _up(a: int, b: int) -> int:
    """``a`` rounded up to a multiple of ``b``."""
    return -(-a // b) * b


def _conv_act(launch: Launch, c: dict[str, Any], size: int, stages: int) -> Work:
    rows, columns, taps = c["BM"], c["BN"], c["KS"] ** 2
    inner = _up(taps * c["C"], c["BK"])
    loops = -(-launch.args[8] * launch.args[9] // rows) if c["POOL"] else 1
    residual = rows * columns if c["RESIDUAL"] else 0
    return Work(
        programs=math.prod(launch.grid),
        products=2 * loops * rows * columns * inner,
        traffic=loops * size * (rows * inner + inner * columns + rows * columns + residual),
        shared=stages * size * (rows + columns) * c["BK"] + 4 * rows * columns,
        sums=rows * columns,
        rows=rows,
    )


def _separable_conv(launch: Launch, c: dict[str, Any], size: int, stages: int) -> Work:
    rows, columns, taps = c["BM"], c["BN"], c["KS"] ** 2
    inner = _up(c["CP"], c["BK"])
    return Work(
        programs=math.prod(launch.grid),
        products=2 * rows * columns * inner,
        scalar=2 * taps * rows * inner,
        traffic=size * (taps * rows * inner + inner * columns + 2 * rows * columns),
        shared=stages * size * (rows + columns) * c["BK"] + 4 * rows * max(columns, c["BK"]),
        sums=rows * (columns + c["BK"]),
        rows=rows,
    )


def _expand_project(launch: Launch, c: dict[str, Any], size: int, stages: int) -> Work:
    x, (height, width) = launch.args[0], launch.args[12:14]
    rows, chunk, columns = c["BM"], c["BE"], c["N1"] + c["N2"]
    expanded, inner = _up(c["E"], chunk), _up(c["KS"] ** 2 * c["C"], c["BK"])
    resident = inner == c["BK"]
    windows = rows * inner * (1 if resident else expanded // chunk)
    images = min(x.shape[0], -(-(rows - 1) // (height * width)) + 1)
    statistics = images * height * width * c["C"] if c["NORM"] == "inline" else 0
    # With one step the loop over chunks is the pipelined one, and the input stays.
    step = size * chunk * (c["BK"] + columns) if resident else size * (rows + chunk) * c["BK"]
    held = size * (rows * c["BK"] if resident else chunk * columns)
    return Work(
        programs=math.prod(launch.grid),
        products=2 * rows * expanded * (inner + columns),
        traffic=size * (windows + expanded * (inner + columns) + 2 * rows * columns + statistics),
        shared=stages * step + held + size * rows * chunk,
        sums=rows * (chunk + columns),
        rows=rows,
    )


def _statistics_pieces(launch: Launch, c: dict[str, Any], size: int, stages: int) -> Work:
    piece = launch.args[3]
    return Work(math.prod(launch.grid), 0.0, size * piece, 4 * c["BS"], 2 * c["BS"], SMALL_ROWS)


def _mbconv(launch: Launch, c: dict[str, Any], size: int, stages: int) -> Work:
    expanded_scratch, tiles = launch.args[8], launch.args[-1]
    rows, columns = c["BM"], c["N1"] + c["N2"]
    patch = _up(expanded_scratch.shape[1], c["BP"])
    inner, width, passes = _up(c["C"], c["BK"]), _up(c["E"], c["BE"]), -(-c["COLUMNS"] // columns)
    kept = expanded_scratch.element_size()
    # Weights of the expansion come once for every block of the patch, the patch once for every block of expanded channels; the
    # taps of the depthwise convolution meet in the L1 cache, but for the rows of a tile that are read in other blocks.
    expansion = patch * inner * width * (1 / c["BP"] + 1 / c["BE"])
    projection = passes * _up(c["E"], c["BG"]) * (rows + columns)
    return Work(
        programs=tiles,
        products=2 * (patch * inner * width + passes * rows * _up(c["E"], c["BG"]) * columns),
        scalar=2 * c["KS"] ** 2 * rows * c["E"],
        traffic=size * (expansion + projection + rows * c["E"] + 2 * rows * columns) + kept * (patch + 3 * rows) * c["E"],
        shared=stages * size * max((c["BP"] + c["BE"]) * c["BK"], (rows + columns) * c["BG"]) + 4 * c["BP"] * c["BE"],
        sums=max(c["BP"] * c["BE"], rows * columns),
        rows=rows,
    )


def _lowtention(launch: Launch, c: dict[str, Any], size: int, stages: int) -> Work:
    height, width, grid_height, grid_width, images = launch.args[13:18]
    tokens, rows, per_image = grid_height * grid_width, c["BM"], c["STRIDE"] ** 2
    project = _project(c, 3 * c["HEADS"] * c["DP"], size, stages, rows)
    up = _upsample(c, c["HEADS"] * c["DP"], c["BU"], c["BI"], size, stages, rows)
    attention = c["HEADS"] * images
    columns = _up(c["COLUMNS"], c["BU"]) // c["BU"]
    return Work(
        programs=math.prod(launch.grid),
        products=project.products + attention * 4 * c["BT"] ** 2 * c["DP"] + per_image * columns * up.products,
        scalar=2 * c["KS"] ** 2 * c["BT"] * c["CP"] * images,
        traffic=project.traffic
        + per_image * columns * up.traffic
        + size * images * (2 * height * width * c["C"] + 5 * tokens * c["HEADS"] * c["DP"] + 2 * tokens * c["CP"]),
        shared=max(project.shared, up.shared, _attention_shared(c["BT"], c["BT"], c["DP"], size, stages)),
        sums=max(project.sums, up.sums, c["BT"] * (c["BT"] + c["DP"]), c["BT"] * c["BC"]),
        rows=rows,
    )


def _project(c: dict[str, Any], width: int, size: int, stages: int, rows: int) -> Work:
    inner, columns = _up(c["CP"], c["BK"]), _up(width, c["BN"])
    traffic = size * (inner * columns + columns // c["BN"] * rows * inner + rows * columns)
    shared = stages * size * (rows + c["BN"]) * c["BK"] + 4 * rows * c["BN"]
    return Work(1, 2 * rows * inner * columns, traffic, shared, rows * c["BN"], rows)


def _upsample(c: dict[str, Any], inner: int, columns: int, step: int, size: int, stages: int, rows: int) -> Work:
    length = c["TAPS"] * inner
    traffic = size * (length * (rows + columns) + 2 * rows * columns)
    return Work(1, 2 * rows * length * columns, traffic, stages * size * (rows + columns) * step, rows * columns, rows)


def _attention_shared(queries: int, keys: int, dim: int, size: int, stages: int) -> int:
    return size * (queries * (dim + keys) + 2 * stages * keys * dim) + 4 * queries


def _lowtention_qkv(launch: Launch, c: dict[str, Any], size: int, stages: int) -> Work:
    height, width = launch.args[9:11]
    rows = c["BM"]
    project = _project(c, c["WIDTH"], size, stages, rows)
    statistics = height * width * c["C"] if c["NORM"] else 0
    return Work(
        programs=math.prod(launch.grid),
        products=project.products,
        scalar=2 * c["KS"] ** 2 * rows * c["CP"],
        traffic=project.traffic + size * (statistics + (c["KS"] ** 2 + 1) * rows * c["CP"]),
        shared=project.shared,
        sums=max(project.sums, rows * c["BC"]),
        rows=rows,
    )


def _lowtention_attend(launch: Launch, c: dict[str, Any], size: int, stages: int) -> Work:
    queries, keys, dim = c["BQ"], c["BKV"], c["DP"]
    tokens = _up(launch.args[2], keys)
    return Work(
        programs=math.prod(launch.grid),
        products=4 * queries * tokens * dim,
        scalar=5 * queries * tokens,
        traffic=size * (2 * queries * dim + 2 * tokens * dim),
        shared=_attention_shared(queries, keys, dim, size, stages),
        sums=queries * (keys + dim),
        rows=queries,
    )


def _lowtention_up(launch: Launch, c: dict[str, Any], size: int, stages: int) -> Work:
    up = _upsample(c, c["INNER"], c["BN"], c["BK"], size, stages, c["BM"])
    return Work(math.prod(launch.grid), up.products, up.traffic, up.shared, up.sums, up.rows)


_COUNTS: dict[str, Callable[[Launch, dict[str, Any], int, int], Work]] = {
    "conv_act": _conv_act,
    "separable_conv": _separable_conv,
    "expand_project": _expand_project,
    "statistics_pieces": _statistics_pieces,
    "mbconv": _mbconv,
    "lowtention": _lowtention,
    "lowtention_qkv": _lowtention_qkv,
    "lowtention_attend": _lowtention_attend,
    "lowtention_up": _lowtention_up,
}


def work(launch: Launch) -> Work:
    """What a launch does."""
    size = launch.args[0].element_size()
    done = _COUNTS[launch.kernel.__name__](launch, launch.constants, size, launch.config["num_stages"])
    return dataclasses.replace(done, shared=done.shared + BARRIERS)


def seconds(launch: Launch, target: Target, arithmetic: str) -> float:
    """The predicted time of a launch, its traffic with the memory aside."""
    done = work(launch)
    ceiling = nearest(target.arch, estimates.CEILINGS)
    parts = nearest(target.arch, PROCESSORS)
    products = {"tf32": ceiling.tf32, "float32": ceiling.single * estimates.TRITON_SINGLE}.get(arithmetic, ceiling.half) / parts
    if done.rows < SMALL_ROWS and arithmetic != "float32" and target.arch // 10 in (9, 10):
        products *= SMALL_ROWS_RATE
    arithmetic_s = done.products / products + done.scalar / (ceiling.single * estimates.TRITON_SINGLE / parts)
    threads = 32 * launch.config["num_warps"]
    registers = threads * min(255, 80 + done.sums // threads)
    together = max(1.0, min(target.shared_memory / max(1, done.shared), REGISTERS / registers, THREADS / threads))
    # How full the last wave is depends on the exact number of images, which is not known here: beyond the first, waves count in
    # parts. Then no larger batch has smaller tiles.
    waves = max(1.0, done.programs / target.processors)
    return waves * max(arithmetic_s, done.traffic / L2_BANDWIDTH) + max(1.0, waves / together) * EDGE_S


def launches(operator: str, call: Sequence[Any], target: Target) -> list[Launch]:
    """What a call, on tensors without data, would launch on ``target``."""
    from .launch import planning_for

    module = importlib.import_module(f"lowkernels.ops.{operator}.triton")
    packed = module.pack(*OPERATORS[operator].weights(tuple(call)))
    with planning_for(target):
        return list(module.plan(*call, packed)[1])


def predicted(
    operator: str, call: Sequence[Any], target: Target, arithmetic: str, planned: Sequence[Launch]
) -> tuple[float, float]:
    """The predicted seconds of a call that launches ``planned``, and those of its launches if memory were as fast as they are."""
    ceiling = nearest(target.arch, estimates.CEILINGS)
    bandwidth = ceiling.bandwidth * estimates.STREAMING * target.processors / nearest(target.arch, PROCESSORS)
    floor = costs.of_call(operator, tuple(call)).fused.bytes / bandwidth
    inside = sum(seconds(launch, target, arithmetic) for launch in planned)
    return max(inside, floor), inside


class _Shape(NamedTuple):
    """A tensor without its data; ``images`` if its first axis counts images."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    images: bool

    def tensor(self) -> Tensor:
        layout = torch.channels_last if self.images else torch.contiguous_format
        return torch.empty(self.shape, dtype=self.dtype, device="meta", memory_format=layout)


def pick(operator: str, call: Sequence[Any], target: Target, arithmetic: str) -> dict[str, int]:
    """The candidate that a call is to run with.

    Args:
        operator: its name.
        call: its arguments without the dispatch ones, all of them; only shapes, dtypes and options are read.
        target: what for.
        arithmetic: as :func:`.configs.arithmetic` gives it.
    """
    images = 1 << (call[0].shape[0] - 1).bit_length()
    weights = {id(value) for value in OPERATORS[operator].weights(tuple(call))}

    def shape(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        data = id(value) not in weights
        return _Shape((images, *value.shape[1:]) if data else tuple(value.shape), value.dtype, data)

    return _pick(operator, tuple(map(shape, call)), target, arithmetic)


@functools.lru_cache(KEPT)
def _pick(operator: str, shapes: tuple[Any, ...], target: Target, arithmetic: str) -> dict[str, int]:
    call = tuple(value.tensor() if isinstance(value, _Shape) else value for value in shapes)

    def rank(candidate: dict[str, int]) -> tuple[float, ...]:
        with settings.using(candidate):
            planned = launches(operator, call, target)
        needed = max(work(launch).shared for launch in planned)
        if needed > target.shared_memory:
            return 2, needed
        crowding = max(work(launch).sums / (32 * launch.config["num_warps"]) for launch in planned)
        if crowding > SUMS_A_THREAD:
            return 1, crowding
        return 0, *predicted(operator, call, target, arithmetic, planned)

    return min(candidates(operator, arithmetic), key=rank)


def candidates(operator: str, arithmetic: str) -> list[dict[str, int]]:
    """What there is to choose from."""
    found: list[dict[str, int]] = importlib.import_module(f"lowkernels.ops.{operator}.triton").CANDIDATES[arithmetic]
    return found
