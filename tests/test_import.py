"""Importing the packages is cheap and has no side effects."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from typing import Any

import pytest

import lowkernels
import lowkernels.nn
import lowkernels.ops
import lowkernels.testing

# Never imported by `import lowkernels` or `import lowformer`, if torch has not done so already.
FOREIGN = ("triton", "timm", "torchvision", "PIL", "rich", "huggingface_hub", "safetensors", "matplotlib", "onnx", "openvino")

_PROBE = """
import json, sys, time, threading
import torch
before, threads = set(sys.modules), threading.active_count()
forbidden = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "socket.getaddrinfo")
events = []
sys.addaudithook(lambda event, args: events.append(event) if event in forbidden else None)
start = time.process_time()
import {package}
seconds = time.process_time() - start
print(json.dumps({{
    "seconds": seconds,
    "new": sorted(set(sys.modules) - before),
    "cuda": torch.cuda.is_initialized(),
    "threads": threading.active_count() - threads,
    "events": events,
}}))
"""


def _import(package: str) -> dict[str, Any]:
    # Bytecode is kept from the first import on, as it is for every user.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", _PROBE.format(package=package)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stderr == ""
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.mark.parametrize("package", ["lowkernels", "lowformer"])
def test_import_is_quick_and_touches_nothing(package: str) -> None:
    """Under 0.1 s of processor time beyond PyTorch's own; no GPU, thread, process, compiler or connection."""
    reports = [_import(package) for _ in range(3)]
    assert statistics.median(r["seconds"] for r in reports) < 0.1
    for report in reports:
        assert not [name for name in report["new"] if name.split(".")[0] in FOREIGN]
        assert (report["cuda"], report["threads"], report["events"]) == (False, 0, [])


def test_public_names_are_there() -> None:
    for module in (lowkernels, lowkernels.nn, lowkernels.ops, lowkernels.testing):
        assert sorted(set(module.__all__)) == sorted(module.__all__)
        assert all(getattr(module, name, None) is not None for name in module.__all__)
