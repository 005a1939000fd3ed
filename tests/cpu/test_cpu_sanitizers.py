"""The C++ under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lowkernels.cpu import build

CODE = """
import torch
from lowkernels.testing import random_call
from lowkernels.ops import OPERATORS
from tests.cpu import cases

ran = 0
for operator in cases.OPERATORS:
    for shape in cases.random_cases(operator, 16):
        for dtype in (torch.float32, torch.bfloat16):
            call = random_call(operator, dtype=dtype, **shape)
            OPERATORS[operator].overload(*call.args, None, None, "cpu")
            ran += 1
print("ran", ran)
"""


@pytest.mark.slow
def test_sanitizers_find_nothing(native: None) -> None:
    flags = "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-sanitize=vptr"
    compiler = build.compiler()
    if compiler is None:
        pytest.skip("no compiler: g++ is not on PATH")
    runtimes = [
        subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(os.path.isabs(path) for path in runtimes):
        pytest.skip(f"{compiler} has no sanitizer runtimes")
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        build.FLAGS_VARIABLE: flags,
        "LD_PRELOAD": " ".join(runtimes),
        # What Python and torch leave behind at exit is not ours; the new-delete check trips over torch's own mixtures.
        "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "3",
    }
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, cwd=root, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["ran", "192"]
