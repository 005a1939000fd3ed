"""The command ``lowkernels`` as a process among others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("arguments", [["info"], ["--help"], ["--version"]])
def test_a_reader_that_has_seen_enough(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "lowkernels", *arguments]
    # Nothing has to be compiled to say what there is. A buffer, as in any pipe, is written when the process ends.
    environment = {**os.environ, "LOWKERNELS_JIT": "0"}
    environment.pop("PYTHONUNBUFFERED", None)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120, cwd=ROOT, env=environment)
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode == 1


def test_an_output_that_was_never_open() -> None:
    command = [sys.executable, "-c", "import sys; sys.stdout = None; from lowkernels.cli import main; sys.exit(main(['info']))"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
