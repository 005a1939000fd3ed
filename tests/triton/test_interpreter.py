"""Runs ``interpreted/`` in processes of their own: Triton decides once a process whether kernels are compiled or interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.triton.cases import CASES

pytest.importorskip("triton", reason="the Triton package is not installed")
FOLDER = Path(__file__).parent / "interpreted"
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "LOWKERNELS_BACKEND"}
ENVIRONMENT |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def _interpreter() -> None:
    """Skips where Triton's interpreter does not run beside this NumPy: Triton 3.6's needs one before 2.5."""
    done = subprocess.run([sys.executable, str(FOLDER.parent / "loop.py")], env=ENVIRONMENT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"Triton's interpreter cannot run a loop here: {done.stderr.strip().splitlines()[-1]}")


@pytest.mark.slow
@pytest.mark.usefixtures("_interpreter")
@pytest.mark.parametrize("selection", [*CASES, f"not ({' or '.join(CASES)})"], ids=[*CASES, "rest"])
def test_interpreted(selection: str) -> None:
    """One process an operator, so that they can run at the same time."""
    # -p no:xdist: the process may itself be the worker of a parallel run.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider", str(FOLDER), "-k", selection]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, cwd=FOLDER.parents[2])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    assert " passed" in done.stdout, done.stdout
