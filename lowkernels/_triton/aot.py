"""Compile the kernels without a GPU, as they would be launched, and report what they use.

``python -m lowkernels._triton.aot --arch 80 90 --write docs/perf`` compiles every LowFormer layer in every dtype with the
configuration it would run with, fails on spills, on too much shared memory and on matrix kernels without tensor core instructions,
and writes the table. ``--arch all`` is every supported architecture.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ops import OPERATORS
from ..testing import Call
from .launch import Launch, Target, planning_for
from .layers import Layer, layers, meta_layer, name

# Shared memory a block may have, in bytes, by compute capability (CUDA C++ Programming Guide, "Technical Specifications").
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
# Streaming multiprocessors of a typical part: A100, RTX 3090, L40S, H100/H200, B200, RTX 5090.
PROCESSORS = {80: 108, 86: 82, 89: 142, 90: 132, 100: 148, 120: 170}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_TYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_MATRIX_INSTRUCTION = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)")


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses.

    Attributes:
        registers: a thread.
        spills: bytes spilled to local memory, stores and loads.
        shared: bytes of shared memory a block.
        instruction: the matrix instruction in its PTX, or "none".
        serialized: the assembler reported wgmma instructions it had to serialize.
    """

    registers: int
    spills: int
    shared: int
    instruction: str
    serialized: bool


def launches(call: Call, target: Target) -> list[Launch]:
    """What a call would launch on ``target``."""
    operator = OPERATORS[call.operator]
    module = importlib.import_module(f"lowkernels.ops.{call.operator}.triton")
    packed = module.pack(*operator.weights(call.args))
    with planning_for(target):
        return list(module.plan(*call.args, packed)[1])


def _type(value: Any) -> str:
    from triton.tools.tensor_descriptor import TensorDescriptor

    if isinstance(value, Tensor):
        return f"*{_TYPE_NAMES[value.dtype]}"
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_TYPE_NAMES[value.base.dtype]}[{', '.join(map(str, value.block_shape))}]>"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    assert value is None, value
    return "constexpr"


def compile_launch(launch: Launch, arch: int) -> Resources:
    """Compile a launch for an architecture.

    Raises:
        Exception: whatever the compiler raises.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    arguments = dict(zip(names, launch.args, strict=False))
    signature = {key: _type(value) for key, value in arguments.items()}
    constants = {key: None for key, kind in signature.items() if kind == "constexpr"} | launch.constants
    signature |= dict.fromkeys(launch.constants, "constexpr")
    aligned = {(names.index(key),): [["tt.divisibility", 16]] for key, value in arguments.items() if isinstance(value, Tensor)}
    source = ASTSource(launch.kernel, signature, constants, aligned)
    log = io.StringIO()
    with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope(), triton.knobs.nvidia.scope():
        triton.knobs.cache.dir = cache
        triton.knobs.nvidia.dump_ptxas_log = True
        with contextlib.redirect_stdout(log):
            options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    text = log.getvalue()
    registers = re.search(r"Used (\d+) registers", text)
    assert registers is not None, text
    spills = sum(int(count) for count in re.findall(r"(\d+) bytes spill", text))
    instruction = _MATRIX_INSTRUCTION.search(compiled.asm["ptx"])
    return Resources(
        int(registers[1]), spills, compiled.metadata.shared, instruction[1] if instruction else "none", "serialized" in text
    )


@dataclass(frozen=True)
class Check:
    """One launch of one layer, compiled.

    Attributes:
        kernel, layer, dtype, arch: what.
        tiles: the compile-time sizes that matter, as text.
        resources: what it uses, or None.
        problem: why it must not ship, or empty.
    """

    kernel: str
    layer: str
    dtype: str
    arch: int
    tiles: str
    resources: Resources | None
    problem: str


def _tiles(launch: Launch) -> str:
    sizes = {k: v for k, v in launch.constants.items() if k in ("BM", "BE", "BN", "BK", "BD", "BP", "CE", "BU", "N1", "N2", "TMA")}
    return " ".join(f"{k}{int(v)}" for k, v in sizes.items()) + f" w{launch.num_warps} s{launch.num_stages}"


def problem(launch: Launch, resources: Resources, arch: int, dtype: str) -> str:
    """Why a compiled launch must not ship, or an empty string."""
    if resources.spills:
        return f"{resources.spills} bytes of spills"
    if resources.shared > SHARED_LIMIT[arch]:
        return f"{resources.shared} bytes of shared memory, {SHARED_LIMIT[arch]} are allowed"
    if resources.serialized:
        return "wgmma is serialized"
    matrix = "PRECISION" in launch.constants and dtype != "float32"
    wanted = {90: "wgmma.mma_async", 100: "tcgen05.mma"}.get(arch, "mma.sync")
    if matrix and launch.constants.get("BM", launch.constants.get("BQ", 0)) >= 64 and resources.instruction != wanted:
        return f"{resources.instruction} where {wanted} is expected"
    return ""


def check(layer: Layer, batch: int, dtype: str, arch: int) -> list[Check]:
    """Compile what one layer launches."""
    torch.set_num_threads(1)
    found = []
    for launch in launches(meta_layer(layer, batch, DTYPES[dtype]), Target(arch, PROCESSORS[arch])):
        resources = None
        try:
            resources = compile_launch(launch, arch)
            trouble = problem(launch, resources, arch, dtype)
        except Exception as error:
            trouble = f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error) else ''}"
        found.append(Check(launch.kernel.__name__, f"{name(layer)} x{batch}", dtype, arch, _tiles(launch), resources, trouble))
    return found
