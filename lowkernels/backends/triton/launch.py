"""From a planned launch to a running one.

An operator's Triton file turns a call into :class:`Launch` objects: a kernel, its grid, arguments and compile-time constants.
Running them needs a GPU or the interpreter; compiling them ahead of time (``aot``) needs neither, since it plans with meta tensors.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from . import MINIMUM_ARCH, configs, model

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Target:
    """What kernels are planned for.

    Attributes:
        arch: compute capability, 90 for 9.0.
        processors: number of streaming multiprocessors.
        shared: bytes of shared memory a program may have; None for what the architecture is known for.
    """

    arch: int
    processors: int
    shared: int | None = None

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory a program may have; of an unknown architecture, what the one before it has."""
        return model.nearest(self.arch, model.SHARED_LIMIT) if self.shared is None else self.shared


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: the ``triton.jit`` function.
        grid: programs along each axis.
        args: its run-time arguments, in order.
        constants: its compile-time arguments.
        config: what :func:`~lowkernels.backends.triton.configs.choose` gave.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    config: dict[str, int]

    @property
    def options(self) -> dict[str, int]:
        """The compiler's options."""
        return {key: self.config[key] for key in ("num_warps", "num_stages", "maxnreg") if key in self.config}

    @property
    def origin(self) -> str:
        """Where the configuration is from, as :func:`~lowkernels.backends.triton.configs.origin` says it."""
        return configs.origin(self.config)


# Kernels are planned for this instead of the tensors' device: ahead-of-time compilation, and tests.
_planned: ContextVar[Target | None] = ContextVar("lowkernels_triton_target", default=None)
_descriptors: WeakIdKeyDictionary = WeakIdKeyDictionary()
# What the interpreter plans for.
_INTERPRETED = Target(90, 4)


@contextlib.contextmanager
def planning_for(target: Target) -> Iterator[None]:
    """Within this context, launches are planned for ``target`` whatever the tensors' device."""
    token = _planned.set(target)
    try:
        yield
    finally:
        _planned.reset(token)


@functools.cache
def _device_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    # One KiB of a processor's shared memory belongs to the system for each program.
    shared = properties.shared_memory_per_multiprocessor - 1024
    return Target(10 * properties.major + properties.minor, properties.multi_processor_count, shared)


def target(x: Tensor) -> Target:
    """The target of kernels that work on ``x``."""
    planned = _planned.get()
    if planned is not None:
        return planned
    return _device_target(x.device.index) if x.is_cuda else _INTERPRETED


def run(launches: Sequence[Launch], x: Tensor) -> None:
    """Run launches in order on the current stream of ``x``'s device."""
    with torch.cuda.device_of(x):
        for launch in launches:
            launch.kernel[launch.grid](*launch.args, **launch.constants, **launch.options)


def forward(
    plan: Callable[..., tuple[Tensor, list[Launch]]],
    pack: Callable[..., list[Tensor]],
    x: Tensor,
    *args: Any,
    inputs: Sequence[int] = (),
) -> Tensor:
    """Run what an operator plans. The last of ``args`` is the packed weights or None: then they are packed here.

    ``inputs`` are the positions in ``args`` of data that :func:`pack` does not get.
    """
    *call, packed = args
    with torch.no_grad():
        if packed is None:
            packed = pack(*(a for i, a in enumerate(call) if i not in inputs))
        out, launches = plan(x, *call, packed)
        run(launches, x)
    return out


def candidates(
    operator: str,
    plan: Callable[..., tuple[Tensor, list[Launch]]],
    pack: Callable[..., list[Tensor]],
    x: Tensor,
    *call: Any,
    inputs: Sequence[int] = (),
) -> list[dict[str, int]]:
    """What a tuner may try besides the configuration a call has: the alternatives of its row, or all that the model
    chose from. Arguments as for :func:`forward`."""
    packed = pack(*(a for i, a in enumerate(call) if i not in inputs))
    config = plan(x, *call, packed)[1][-1].config
    own = {key: value for key, value in config.items() if key not in ("row", "tuned")}
    # Whole: calls of other sizes, which may have another row, are to run with exactly what was measured.
    tried = [{**own, **changed} for changed in configs.alternatives(operator, config["row"])]
    if config["row"] < 0:
        tried = model.candidates(operator, configs.arithmetic(x.dtype, conv_precision(x.dtype)))
    return [setting for setting in tried if setting != own]


def empty_nhwc(x: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """A channels_last tensor like ``x``."""
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def descriptor(weight: Tensor, rows: int, columns: int, tma: bool) -> Any:
    """``weight`` itself, or a tensor descriptor of it with blocks of [rows, columns]."""
    if not tma:
        return weight
    # Checking a descriptor takes longer than all the rest of planning a launch, so each is kept as long as its weight. It holds an
    # alias: a reference to the weight itself would keep that alive for ever.
    kept = _descriptors.setdefault(weight, {})
    key = (weight.data_ptr(), rows, columns)
    found = kept.get(key)
    if found is None:
        from triton.tools.tensor_descriptor import TensorDescriptor

        found = TensorDescriptor(weight.detach(), list(weight.shape), list(weight.stride()), [rows, columns])
        kept[key] = found
    return found


def conv_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of convolution products: tf32 for fp32 only where PyTorch's own convolutions may use it."""
    # This attribute also reflects torch.backends.cudnn.allow_tf32 and the settings it inherits from.
    allowed = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if dtype == torch.float32 and allowed == "tf32" else "ieee"


def matmul_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of attention products: tf32 for fp32 only where PyTorch's own matrix products may use it."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def unsupported_dtype(weight: Tensor) -> str | None:
    """Why the kernels cannot serve the weights' dtype, or None."""
    if weight.dtype not in DTYPES:
        return f"its kernels are made for float16, bfloat16 and float32, not {weight.dtype}"
    if weight.dtype == torch.bfloat16 and weight.device.type == "cpu":
        return "Triton's interpreter computes bfloat16 wrongly; float16 and float32 work on CPU tensors"
    return None


def unsupported_channels(**channels: int) -> str | None:
    """Why the kernels cannot serve these channel counts, or None."""
    for name, count in channels.items():
        if count % 4:
            return f"{name} is {count}; its kernels need multiples of 4"
    return None


def unsupported_input(x: Tensor) -> str | None:
    """Why the kernels cannot serve an input of this size on this device, or None."""
    _, channels, height, width = x.shape
    # Rows within an image are numbered in 32 bits, offsets in 64, but those within a window of up to 7 rows in 32.
    if height * width >= 2**30:
        return f"x is {height}x{width}; its kernels number at most 2**30 pixels an image"
    if width * channels >= 2**28:
        return f"a row of x has {width} pixels of {channels} channels; its kernels address at most 2**28 elements a row"
    if x.is_cuda and target(x).arch < MINIMUM_ARCH[0] * 10 + MINIMUM_ARCH[1]:
        major, minor = divmod(target(x).arch, 10)
        return f"x is on a GPU of compute capability {major}.{minor}; its kernels need {MINIMUM_ARCH[0]}.{MINIMUM_ARCH[1]} or more"
    return None


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two_below(n: int) -> int:
    """The largest power of two that is at most n."""
    return 1 << (n.bit_length() - 1)


def power_of_two_above(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def block(limit: int, size: int) -> int:
    """A block size for ``size`` elements: ``limit``, or less where ``size`` is, at least 16 (what a matrix product needs)."""
    return max(16, min(limit, power_of_two_above(size)))


def dividing_block(limit: int, size: int) -> int:
    """The largest power of two that divides ``size`` and is at most ``limit``."""
    return math.gcd(limit, size & -size)


def column_groups(columns: int, limit: int, two: bool) -> tuple[int, int, int]:
    """Split output columns into (passes, first, second): each pass accumulates ``first`` + ``second`` columns, powers of two.

    One pass if that fits in ``limit`` columns, else passes of ``limit``. With ``two``, what exceeds a power of two is a second
    group; without, the first is the next power of two, and some of it is computed for nothing.
    """
    whole = max(16, power_of_two_above(columns))
    first = max(16, power_of_two_below(columns))
    second = max(16, power_of_two_above(columns - first)) if columns > first else 0
    if two and first + second <= limit and second < first:
        return 1, first, second
    if whole <= limit:
        return 1, whole, 0
    limit = power_of_two_below(limit)
    return ceil_div(columns, limit), limit, 0
