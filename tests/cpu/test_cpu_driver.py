"""The kernels without torch: under the address and undefined-behaviour sanitizers, and for ARM's NEON under qemu."""

from __future__ import annotations

import platform
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowkernels.backends.cpu import build, pack
from lowkernels.dispatch import kernel
from lowkernels.ops import OPERATORS
from lowkernels.testing import assert_within_budget, random_call
from lowkernels.testing.budget import to_float64
from tests.cpu import cases

DTYPES = (torch.float32, torch.bfloat16)


def encode(operator: str, args: tuple[Any, ...], threads: int) -> bytes:
    """One call as driver.cpp reads it."""
    named = dict(zip(OPERATORS[operator].argument_names, args, strict=True))
    x: Tensor = args[0]
    residual = named.get("residual")
    elements = torch.Size(OPERATORS[operator].infer_shape(*args)).numel()
    number = pack.ACTIVATION_NUMBERS.get
    act = named.get("act", "none")
    acts = {
        "separable_conv": (0, number(named.get("dw_act")), number(named.get("pw_act"))),
        "mbconv": (number(act), number(act), 0),
    }.get(operator, (number(act), 0, 0))
    (block,) = kernel(operator, "cpu").pack(*OPERATORS[operator].weights(args))
    datas = [block, x.permute(0, 2, 3, 1).contiguous()]
    skip = isinstance(residual, Tensor)
    datas.append(residual.permute(0, 2, 3, 1).contiguous() if skip else torch.empty(0, dtype=x.dtype))
    sizes = [t.numel() * t.element_size() for t in datas]
    half = x.dtype == torch.bfloat16
    header = struct.pack(
        "16qd4q",
        cases.OPERATORS.index(operator),
        half,
        15 if half else 6,
        threads,
        *x.shape,
        named.get("stride", 1),
        named.get("padding", 0),
        bool(residual) if not skip else True,
        named.get("pool", False),
        named.get("num_heads", 1),
        *acts,
        named.get("eps", 1e-5),
        *sizes,
        elements * x.element_size(),
    )
    return header + b"".join(t.reshape(-1).view(torch.uint8).numpy().tobytes() for t in datas)


def prove(
    folder: Path, compiler: str, isa: str, flags: list[str], layouts: dict[Any, pack.Layout], runner: list[str], count: int
) -> None:
    """Build the driver, run random calls through it, and check what comes out."""
    sources, driver = build.sources(), folder / "driver"
    files = [str(sources / "kernels.cpp"), str(Path(__file__).with_name("driver.cpp"))]
    command = [compiler, *build.KERNEL_FLAGS, *flags, f"-DLOWKERNELS_ISA={isa}", f"-I{sources}", *files, "-o", str(driver)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    calls = [
        random_call(operator, dtype=dtype, **shape)
        for operator in cases.OPERATORS
        for shape in cases.random_cases(operator, count)
        for dtype in DTYPES
        if layouts.get(dtype)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack, "layout", layouts.__getitem__)
        (folder / "calls").write_bytes(b"".join(encode(*call, threads=1 + i % 3) for i, call in enumerate(calls)))
    ran = subprocess.run(
        [*runner, str(driver), str(folder / "calls"), str(folder / "out")], capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    data, at = (folder / "out").read_bytes(), 0
    for operator, args in calls:
        op = OPERATORS[operator]
        eager = op.overload(*args, None, None, "eager")
        reference = op.overload(*(to_float64(a) for a in args), None, None, "eager")
        size = eager.numel() * eager.element_size()
        result = torch.frombuffer(bytearray(data[at : at + size]), dtype=eager.dtype)
        at += size
        n, c, *rest = eager.shape
        result = result.view(n, *rest, c).permute(0, 3, 1, 2) if rest else result.view(n, c)
        assert_within_budget(result, eager, reference, op.accumulation_length(*args), f"{operator} {isa} {tuple(args[0].shape)}")
    assert at == len(data)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_sanitizers_find_nothing(dtype: torch.dtype, tmp_path: Path, native: None) -> None:
    isa, vector, pairs = torch.ops.lowkernels_cpu.layout(dtype == torch.bfloat16)
    if not pairs:
        isa = isa.removesuffix("_bf16")
    sanitizers = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    flags = [*build.ISA_FLAGS[platform.machine()][isa], *sanitizers]
    prove(tmp_path, build.compiler() or "g++", isa, flags, {dtype: pack.Layout(isa, vector, pairs)}, [], 24)


@pytest.mark.slow
def test_neon(tmp_path: Path) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("no aarch64-linux-gnu-g++ or no qemu-aarch64")
    layout = pack.Layout("neon", 4, False)
    prove(tmp_path, compiler, "neon", ["-static"], dict.fromkeys(DTYPES, layout), [emulator], 8)
