"""Every instruction set this machine can run, not only the best one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowkernels.backends.cpu import build


@pytest.mark.slow
@pytest.mark.parametrize("isa", build.INSTRUCTION_SETS)
def test_lesser_instruction_set(isa: str, native: None) -> None:
    best = torch.ops.lowkernels_cpu.layout(True)[0]
    order = build.INSTRUCTION_SETS
    if isa == best or "neon" in (isa, best) or order.index(isa) > order.index(best):
        pytest.skip(f"this processor's best instruction set is {best}: {isa} is tested directly, or cannot run")
    files = [str(Path(__file__).with_name(name)) for name in ("test_cpu_operators.py", "test_cpu_unpacking.py")]
    chosen = ["-m", "not slow", "-k", "contract or threads or nan or 14 or 112 or come_back or budget"]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *chosen, *files]
    environment = {**os.environ, build.ISA_VARIABLE: isa}
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def test_unknown_instruction_set_is_a_reason(native: None) -> None:
    code = "import lowkernels.backends.cpu.build as build; print(build.load())"
    environment = {**os.environ, build.ISA_VARIABLE: "mmx"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert "LOWKERNELS_CPU_ISA is 'mmx'" in done.stdout
