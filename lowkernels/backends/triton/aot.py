"""Compile the kernels without a GPU, as they would be launched, and report what they use.

``python -m lowkernels.backends.triton.aot --arch all --write docs/perf/triton_resources.md`` compiles every row of the shipped
tables for every supported architecture, fails on spills, on too much shared memory and on matrix kernels without the
architecture's matrix instructions, and writes the table. ``--every-layer`` compiles what every LowFormer layer launches instead.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import io
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...choosing import settings
from ...testing import Call
from . import configs, model
from .launch import Launch, Target
from .layers import Layer, layers, meta_layer, name
from .model import PROCESSORS, SHARED_LIMIT

# The kinds of arithmetic the tables know: dtypes, and fp32 with products in tf32.
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "tf32": torch.float32, "float32": torch.float32}
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


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """PyTorch's flags for products in tf32."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def launches(call: Call, target: Target) -> list[Launch]:
    """What a call would launch on ``target``."""
    return model.launches(call.operator, call.args, target)


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
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(launch.options))
    text = log.getvalue()
    registers = re.search(r"Used (\d+) registers", text)
    assert registers is not None, text
    spills = sum(int(count) for count in re.findall(r"(\d+) bytes spill", text))
    instruction = _MATRIX_INSTRUCTION.search(compiled.asm["ptx"])
    return Resources(
        int(registers[1]), spills, compiled.metadata.shared, instruction[1] if instruction else "none", "serialized" in text
    )


@dataclass(frozen=True)
class Job:
    """One layer to compile for one architecture.

    Attributes:
        layer, batch, dtype, arch: what and for what.
        setting: instead of the table's configuration, as (name, value) pairs; one of the alternatives ``lowkernels tune`` tries.
    """

    layer: Layer
    batch: int
    dtype: str
    arch: int
    setting: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Check:
    """One launch of a job, compiled.

    Attributes:
        job: what was asked for.
        kernel: the kernel's name.
        row: of the operator's table.
        tiles: the compile-time sizes that matter, as text.
        resources: what it uses, or None.
        problem: why it must not ship, or empty.
    """

    job: Job
    kernel: str
    row: int
    tiles: str
    resources: Resources | None
    problem: str


_SIZES = ("BM", "BP", "BT", "BE", "BN", "BU", "BK", "BD", "CE", "N1", "N2", "BQ", "BKV")


def _tiles(launch: Launch) -> str:
    sizes = [f"{key} {launch.constants[key]}" for key in _SIZES if launch.constants.get(key)]
    sizes += ["TMA"] if launch.constants.get("TMA") else []
    return ", ".join([*sizes, f"{launch.config['num_warps']} warps", f"{launch.config['num_stages']} stages"])


def problem(launch: Launch, resources: Resources, job: Job) -> str:
    """Why a compiled launch must not ship, or an empty string."""
    if resources.spills:
        return f"{resources.spills} bytes of spills"
    if resources.shared > SHARED_LIMIT[job.arch]:
        return f"{resources.shared} bytes of shared memory, {SHARED_LIMIT[job.arch]} are allowed"
    if resources.serialized:
        return "wgmma is serialized"
    matrix = "PRECISION" in launch.constants and job.dtype in ("float16", "bfloat16")
    wanted = {90: "wgmma.mma_async", 100: "tcgen05.mma"}.get(job.arch, "mma.sync")
    if matrix and launch.constants.get("BM", launch.constants.get("BQ", 0)) >= 64 and resources.instruction != wanted:
        return f"{resources.instruction} where {wanted} is expected"
    return ""


def check(job: Job) -> list[Check]:
    """Compile what one layer launches."""
    torch.set_num_threads(1)
    found = []
    for launch in planned(job):
        resources = None
        try:
            resources = compile_launch(launch, job.arch)
            trouble = problem(launch, resources, job)
        except Exception as error:
            trouble = f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error) else ''}"
        found.append(Check(job, launch.kernel.__name__, launch.config["row"], _tiles(launch), resources, trouble))
    return found


def planned(job: Job) -> list[Launch]:
    """What a job launches."""
    with _tf32(job.dtype == "tf32"), settings.using(dict(job.setting)):
        return launches(meta_layer(job.layer, job.batch, DTYPES[job.dtype]), Target(job.arch, PROCESSORS[job.arch]))


def every_job(arch: int, dtypes: Sequence[str]) -> list[Job]:
    """Every LowFormer layer: at 224 pixels in a large batch and alone, at 512 in a small batch."""
    sizes = [(224, 256), (224, 1), (512, 32)]
    return [Job(layer, batch, dtype, arch) for dtype in dtypes for size, batch in sizes for layer in layers(size)]


def shipped_jobs(arch: int, dtypes: Sequence[str], alternatives: bool = False) -> list[Job]:
    """The fewest jobs that launch every row of every table, and every kernel: for each, the widest layer. With ``alternatives``,
    those of each row as well."""
    chosen: dict[Any, tuple[int, Job]] = {}
    for job in every_job(arch, dtypes):
        width = max(value for key, value in job.layer[1] if key in ("channels", "hidden", "out_channels"))
        for launch in planned(job):
            key = (job.layer[0], launch.kernel.__name__, launch.config["row"], job.dtype)
            if key not in chosen or width > chosen[key][0]:
                chosen[key] = width, job
    jobs = []
    for (operator, _, row, _), (_, job) in chosen.items():
        tried = configs.alternatives(operator, row) if alternatives else []
        jobs += [job, *(dataclasses.replace(job, setting=tuple(changed.items())) for changed in tried)]
    return list(dict.fromkeys(jobs))


def source_hash() -> str:
    """Changes with the kernels, how they are launched, and their tables."""
    package = Path(__file__).parents[2]
    shared = package / "backends" / "triton"
    files = [*shared.glob("[!_]*.py"), *shared.glob("tables/*.json"), *package.glob("ops/*/triton.py")]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def run(jobs: Sequence[Job], workers: int) -> Iterator[Check]:
    """Compile jobs in parallel, in order."""
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for checks in pool.map(check, jobs):
            yield from checks


HASH_LINE = "Kernel sources: `{}`."


def report(checks: Iterable[Check], archs: Sequence[int]) -> str:
    """The table, in Markdown."""
    import triton

    lines = [
        "# What the Triton kernels use",
        "",
        "Written by `make aot`; compiled, not run. One line for each row of the shipped tables, each alternative to it that",
        "`lowkernels tune` tries (the row with a +) and each kernel, with the widest LowFormer layer that uses it. Spills are",
        "bytes, shared memory is KiB.",
        "",
        f"{HASH_LINE.format(source_hash())} Triton {triton.__version__}. Compute capabilities: {', '.join(map(str, archs))}.",
        "",
        "| kernel | row | arch | arithmetic | layer | batch | sizes | registers | spills | shared | instruction |",
        "|---|--:|--:|---|---|--:|---|--:|--:|--:|---|",
    ]
    for found in checks:
        job, used = found.job, found.resources
        row = f"{found.row}+" if job.setting else found.row
        cells = [found.kernel, row, job.arch, job.dtype, name(job.layer), job.batch, found.tiles]
        if used is None:
            cells += [found.problem, "", "", ""]
        else:
            cells += [used.registers, used.spills, f"{used.shared / 1024:.0f}", used.instruction]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lowkernels.backends.triton.aot", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--arch", nargs="+", default=["80", "90"], help="compute capabilities such as 90, or all")
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--every-layer", action="store_true", help="every LowFormer layer, not one for each row of the tables")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table there")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    archs = list(SHARED_LIMIT) if "all" in options.arch else [int(arch) for arch in options.arch]
    unknown = [arch for arch in archs if arch not in SHARED_LIMIT]
    if unknown:
        parser.error(f"--arch {unknown[0]} is not supported; allowed are {', '.join(map(str, SHARED_LIMIT))} and all")
    select = every_job if options.every_layer else functools.partial(shipped_jobs, alternatives=True)
    checks = []
    for found in run([job for arch in archs for job in select(arch, options.dtype)], options.workers):
        checks.append(found)
        if found.problem:
            job = found.job
            what = f"sm_{job.arch} {job.dtype} {name(job.layer)} x{job.batch} {found.kernel}"
            print(f"{what} ({found.tiles}): {found.problem}", flush=True)
    if options.write:
        options.write.write_text(report(checks, archs))
    failed = sum(bool(found.problem) for found in checks)
    print(f"{len(checks)} kernels compiled, {failed} with problems")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
