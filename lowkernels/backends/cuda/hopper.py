"""The tier of compute capability 9.0: fused_mbconv and gn_mlp by warpgroup products (``csrc/cuda/expand_project_sm90.cuh``), and
what conv_act's and mbconv's parts of it (:mod:`.hopper_conv`, :mod:`.hopper_mbconv`) share with them.

It stands beside the kernels every GPU runs: weights are packed for both, and each call takes the one that is estimated to be
faster. Before its first use for an operator, device and dtype the tier has to pass calls of its own that meet each compiled shape;
if it fails, the others serve, and the ``lowkernels`` logger, the backend's description and the reports of calls that the tier would
have served say why.

``LOWKERNELS_CUDA_TIER=sm_80`` turns the tier off; ``sm_90a`` takes it wherever a call fits.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ...choosing import settings
from . import build, chains, tiling
from .pack import STEP, rounded_up, vector
from .tiling import Device, Tile

TIER_VARIABLE = "LOWKERNELS_CUDA_TIER"
ARCHITECTURE = "9.0a"
# A slab of weights, as csrc/cuda/warpgroup.cuh has it: 64 of depth times 128 columns.
SLAB_DEPTH = 64
SLAB_COLUMNS = 128
SLAB_BYTES = 2 * SLAB_DEPTH * SLAB_COLUMNS
# A warpgroup's products on a slab take so many cycles of the tensor cores, and some tenth more of waiting for each other.
SLAB_CYCLES, WAITING = 256, 1.1
# csrc/cuda/expand_project_sm90.cuh: kStages of WideChain.
_STAGES = 5

_log = logging.getLogger("lowkernels")


class Config(NamedTuple):
    """A compiled shape of a CTA: so many warpgroups of 64 rows each, and output channels up to ``columns``."""

    number: int
    warpgroups: int
    columns: int

    @property
    def rows(self) -> int:
        return 64 * self.warpgroups

    @property
    def parts(self) -> int:
        """Slabs beside each other for the output channels."""
        return -(-self.columns // SLAB_COLUMNS)


# csrc/cuda/expand_project_sm90.cuh: LK_WIDE_CHAINS.
CONFIGS = (Config(0, 3, 64), Config(1, 3, 128), Config(2, 2, 128), Config(3, 2, 256))
MOST_COLUMNS = max(config.columns for config in CONFIGS)

# A config that calls run with, whatever it costs.
_forced: ContextVar[int | None] = ContextVar("lowkernels_hopper_config", default=None)
# Why an operator does not use the tier on a device in a dtype; "" if it does.
_checked: dict[tuple[str, torch.device, torch.dtype], str] = {}

# Calls that meet every compiled shape between them: several CTAs, the last of them not full, with rows of several images, slabs
# that are not full, and both strides.
_CASES: dict[str, tuple[tuple[int, dict[str, int]], ...]] = {
    "conv_act": (
        (0, {"out_channels": 200, "residual": True}),
        (0, {"channels": 132, "out_channels": 260, "kernel_size": 1, "height": 7, "width": 7, "pool": True}),
        (1, {"channels": 20, "out_channels": 136, "stride": 2}),
        (1, {"channels": 72, "height": 7, "width": 6, "pool": True, "residual": True}),
    ),
    "fused_mbconv": (
        (0, {"channels": 20, "out_channels": 40, "hidden": 140}),
        (0, {"channels": 64, "out_channels": 64, "stride": 2}),
        (1, {"channels": 128, "hidden": 256}),
        (2, {"channels": 36, "out_channels": 100, "hidden": 260}),
        (3, {"channels": 64, "out_channels": 256}),
    ),
    "gn_mlp": (
        (0, {"channels": 20, "hidden": 140}),
        (1, {"channels": 128, "hidden": 512}),
        (2, {"channels": 100, "hidden": 260}),
        (3, {"channels": 256, "hidden": 512}),
    ),
    "mbconv": (
        (0, {"channels": 256, "hidden": 260, "height": 7, "width": 7}),
        (0, {"channels": 132, "hidden": 68, "out_channels": 260}),
        (1, {"channels": 196, "hidden": 128, "out_channels": 200, "height": 9, "width": 11, "padding": 0}),
    ),
}


@contextmanager
def forced(config: int) -> Iterator[None]:
    """Within this context (and thread), calls that fit run with this config; the tier's check is skipped."""
    token = _forced.set(config)
    try:
        yield
    finally:
        _forced.reset(token)


def _asked() -> str:
    asked = os.environ.get(TIER_VARIABLE, "auto")
    if asked not in ("auto", "sm_80", "sm_90a"):
        raise ValueError(f"{TIER_VARIABLE} is {asked!r}; allowed are auto, sm_80 and sm_90a")
    return asked


@functools.cache
def _missing(index: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) != (9, 0):
        return f"it is for compute capability 9.0; this device has {major}.{minor}"
    # Code for plain 9.0 has no warpgroup products.
    if not build.compiled_for(ARCHITECTURE):
        return f"the CUDA kernels are not compiled for {ARCHITECTURE}"
    return None


def unusable(device: torch.device) -> str | None:
    """Why the tier cannot run on ``device``, or None. The CUDA kernels have been loaded."""
    if device.type != "cuda":
        return f"it is for NVIDIA GPUs, not for {device.type}"
    if _asked() == "sm_80":
        return f"{TIER_VARIABLE} is sm_80"
    return _missing(torch.cuda.current_device() if device.index is None else device.index)


def shared_bytes(shape: chains.Shape, tile: Tile) -> int:
    """Shared memory of one CTA, as the launchers ask for it."""
    rows, pitch = chains.window(shape, tile)
    steps = shape.kernel**2 * shape.depth // STEP
    return _STAGES * SLAB_BYTES + 2 * (16 + rows * pitch) + 4 * steps + 8 * 4 * CONFIGS[tile.config].warpgroups * shape.norm


def l2_rate(ctas: int, device: Device) -> float:
    """Bytes a cycle that each of so many CTAs gets from the L2 cache: a few have it to themselves."""
    return chains.L2_BYTES * min(2.0, max(1.0, device.processors / ctas))


def _cost(shape: chains.Shape, tile: Tile, device: Device) -> float:
    """Cycles of the busiest multiprocessor, like those of :mod:`.chains`."""
    config = CONFIGS[tile.config]
    height, width = shape.output
    ctas = -(-shape.batch * height * width // tile.width)
    chunks = -(-shape.expanded // SLAB_COLUMNS)
    slabs = chunks * (-(-(shape.kernel**2 * shape.depth) // SLAB_DEPTH) + SLAB_COLUMNS // SLAB_DEPTH * config.parts)
    products = slabs * max(WAITING * SLAB_CYCLES * config.warpgroups, SLAB_BYTES / l2_rate(ctas, device))
    return -(-ctas // device.processors) * (products + chains.around(shape, tile))


@functools.lru_cache(maxsize=4096)
def divisions(shape: chains.Shape, device: Device, config: int | None = None) -> list[Tile]:
    """Every division that fits the device, the cheapest first; of one config if it is named."""
    # Slabs are packed for as many parts as the output channels need.
    parts = -(-shape.out_channels // SLAB_COLUMNS)
    configs = [c for c in CONFIGS if c.parts == parts and shape.out_channels <= c.columns and config in (None, c.number)]
    tiles = (Tile(0, 1, count, c.number) for c in configs for count in chains.counts(shape, c.rows))
    fitting = [tile for tile in tiles if shared_bytes(shape, tile) <= device.shared]
    return sorted(fitting, key=lambda tile: _cost(shape, tile, device))


@functools.lru_cache(maxsize=4096)
def _faster(shape: chains.Shape, device: Device) -> Tile | None:
    """The cheapest division if it is cheaper than the other kernels'."""
    tile = next(iter(divisions(shape, device)), None)
    return tile if tile is not None and _cost(shape, tile, device) < chains.cost(shape, device) else None


def choose(operator: str, shape: chains.Shape, x: Tensor) -> Tile | None:
    """The division by warpgroups of a call with weights packed for them; None where the other kernels are to serve it."""
    return accepted(operator, x, _wanted(shape, x))


def _wanted(shape: chains.Shape, x: Tensor) -> Tile | None:
    device = tiling.device_of(x)
    return wanted(lambda config: divisions(shape, device, config), lambda: _faster(shape, device))


def remark(operator: str, shape: chains.Shape, x: Tensor) -> str | None:
    """What :func:`said` says of a call."""
    return said(operator, x, lambda: _wanted(shape, x))


AnyTile = TypeVar("AnyTile", bound=NamedTuple)


def wanted(divisions: Callable[[int | None], Sequence[AnyTile]], faster: Callable[[], AnyTile | None]) -> AnyTile | None:
    """The division by warpgroups that a call is to have if the tier passes its check: what is forced, the call's setting or
    :data:`TIER_VARIABLE` says, else ``faster``'s; None for the other kernels.

    Args:
        divisions: every division that fits, the cheapest first; of one config, if it is named.
        faster: the cheapest one, or None where the other kernels are estimated to be faster.
    """
    config, setting, asked = _forced.get(), settings.current(), _asked()
    if config is not None:
        return next(iter(divisions(config)), None)
    if asked == "sm_80":
        return None
    if setting:
        return next((tile for tile in divisions(None) if setting == setting_of(tile)), None)
    return next(iter(divisions(None)), None) if asked == "sm_90a" else faster()


def accepted(operator: str, x: Tensor, tile: AnyTile | None) -> AnyTile | None:
    """``tile`` if the tier passes its check for calls like ``x``, or is forced."""
    return None if tile is None or (_forced.get() is None and refusal(operator, x)) else tile


def said(operator: str, x: Tensor, want: Callable[[], NamedTuple | None]) -> str | None:
    """Why a call that ``want`` has a division by warpgroups for is served without: the check failed; None where there is nothing to
    say."""
    if unusable(x.device) is not None or _forced.get() is not None or want() is None or not refusal(operator, x):
        return None
    # A refusal that will not last is none of a plan's business.
    reason = _checked.get((operator, x.device, x.dtype))
    return f"without warpgroup products: {reason}" if reason else None


def setting_of(tile: NamedTuple) -> dict[str, int]:
    """What a tuner calls a division of this tier; those of the others have no ``tier``."""
    return {**tile._asdict(), "tier": 90}


def candidates(operator: str, shape: chains.Shape, x: Tensor) -> list[dict[str, int]]:
    """Settings for a tuner to try besides what :func:`choose` says, and besides the others' candidates."""
    if unusable(x.device) is not None:
        return []
    device, chosen = tiling.device_of(x), choose(operator, shape, x)
    found = [setting_of(tile) for tile in divisions(shape, device) if tile != chosen]
    best = chains.choose(shape, device) if chosen is not None else None
    return found[: tiling.CANDIDATES] + ([best._asdict()] if best else [])


def refusal(operator: str, x: Tensor) -> str:
    """Why calls like ``x`` do not use the tier: what its check on this very device said; empty if they do."""
    key = (operator, x.device, x.dtype)
    if key not in _checked:
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return "its check cannot run while a graph is captured"
        _checked[key] = _check(operator, x)
    return _checked[key]


def _check(operator: str, x: Tensor) -> str:
    from ...selfcheck import failure_of

    for config, case in _CASES[operator]:
        with forced(config):
            reason = failure_of(operator, "cuda", x.device, x.dtype, case)
        if reason is not None:
            _log.warning("lowkernels.%s: warpgroup products are not used for %s: %s", operator, x.dtype, reason)
            return reason
    return ""


def describe() -> str:
    """What is known of the tier, for the backend's description; empty where there is nothing to say."""
    failed = sorted({f"{operator} in {dtype}: {reason}" for (operator, _, dtype), reason in _checked.items() if reason})
    return f"; without warpgroup products: {'; '.join(failed)}" if failed else ""


def _dealt(matrix: Tensor) -> Tensor:
    """Columns 4 j + 2 t + i of each 16 in place 8 t + 2 j + i: a lane's accumulators are four neighbours."""
    return matrix.reshape(matrix.shape[0], -1, 4, 2, 2).transpose(2, 3).reshape(matrix.shape)


def _padded(matrix: Tensor, depth: int, columns: int) -> Tensor:
    out = matrix.new_zeros(rounded_up(matrix.shape[0], depth), rounded_up(matrix.shape[1], columns))
    out[: matrix.shape[0], : matrix.shape[1]] = matrix
    return out


def _slabs(matrix: Tensor, columns_of_slab: int = SLAB_COLUMNS) -> Tensor:
    """[depth, columns], whole slabs, as [slab row, slab column, values of a slab].

    Values lie as shared memory takes them: for each column 64 of depth, 128 bytes, their eight 16-byte units exchanged by exclusive
    or with the column's number. The hardware undoes that with its 128-byte swizzle.
    """
    depth, columns = (n // size for n, size in zip(matrix.shape, (SLAB_DEPTH, columns_of_slab), strict=True))
    units = matrix.reshape(depth, 8, 8, columns, columns_of_slab).permute(0, 3, 4, 1, 2)
    column = torch.arange(columns_of_slab, device=matrix.device)[:, None]
    exchanged = torch.arange(8, device=matrix.device)[None] ^ column % 8
    return units[:, :, column, exchanged].reshape(depth, columns, -1)


def dealt_slabs(matrix: Tensor, depth: int, columns: int, columns_of_slab: int) -> Tensor:
    """A matrix [inputs, outputs], padded to multiples of ``depth`` and ``columns``, as [slab row, slab column, values of a slab];
    its columns are dealt so that a lane's results are four neighbours."""
    return _slabs(_dealt(_padded(matrix, depth, columns)), columns_of_slab)


def convolution(weight: Tensor) -> Tensor:
    """A dense convolution (O, C, k, k) in slabs: for each 128 output channels, depth (tap row, tap column, C rounded up to 16)."""
    width, channels, size, _ = weight.shape
    taps = weight.new_zeros(size, size, rounded_up(channels, STEP), width)
    taps[:, :, :channels] = weight.permute(2, 3, 1, 0)
    return dealt_slabs(taps.reshape(-1, width), SLAB_DEPTH, SLAB_COLUMNS, SLAB_COLUMNS).transpose(0, 1).reshape(-1)


def chain(expand: Tensor, project: Tensor) -> Tensor:
    """The weights of two products back to back, in slabs in the order of their use: for each 128 expanded channels the first
    product's, then the second's.

    Args:
        expand: a dense convolution (E, C, k, k).
        project: a 1x1 convolution (O, E, 1, 1).

    Returns:
        One dimension; depth (tap row, tap column, C rounded up to 16) of the first product, E of the second.
    """
    # Expanded channels are dealt as columns of the first product, so as rows of the second as well.
    behind = _dealt(_padded(project[:, :, 0, 0], SLAB_COLUMNS, SLAB_COLUMNS)).t()
    second = _slabs(_dealt(behind))
    chunks = rounded_up(expand.shape[0], SLAB_COLUMNS) // SLAB_COLUMNS
    return torch.cat([convolution(expand).reshape(chunks, -1), second.reshape(chunks, -1)], 1).reshape(-1)


def pack(expand: Tensor, expand_bias: Tensor | None, project: Tensor) -> list[Tensor]:
    """What the tier needs of two products' weights besides the last bias: :func:`chain` and the first bias. Empty where no call of
    theirs can take the tier."""
    if project.shape[0] > MOST_COLUMNS or unusable(expand.device) is not None:
        return []
    return [chain(expand, project), vector(expand_bias, expand, expand.shape[0], 4)]
