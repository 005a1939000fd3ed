"""Where numbers come from: machine, versions, commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
_MEASURED = ("lowkernels", "lowformer", "csrc", "benchmarks", "setup.py", "pyproject.toml")
_PACKAGES = ("numpy", "triton", "timm", "onnx", "onnxruntime", "onnxscript", "openvino")


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> dict[str, Any]:
    """The commit checked out and whether anything that is measured differs from it; None where this is no checkout."""
    head = _run("git", "rev-parse", "HEAD")
    status = _run("git", "status", "--porcelain", "--", *_MEASURED, ":!benchmarks/results")
    return {"commit": head, "dirty": None if status is None else bool(status)}


def command(arguments: Sequence[str]) -> str:
    """The command line that repeats a run, without the folder of its results, which is of this machine. A stage of a longer run
    is repeated with all of it."""
    rest = list(arguments)
    if rest[:1] == ["stage"]:
        rest[:2] = ["gpu"]
        del rest[rest.index("--seconds") : rest.index("--seconds") + 2]
    while "--out" in rest:
        del rest[rest.index("--out") : rest.index("--out") + 2]
    return shlex.join(["python", "-m", "benchmarks", *rest])


def cpu_name() -> str:
    """The processor's model name."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cpu_details() -> dict[str, Any]:
    """What tells processors of the same name apart: family and model, and instruction sets that kernels choose by."""
    fields: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                key, _, value = line.partition(":")
                fields.setdefault(key.strip(), value.strip())
    except OSError:
        return {}
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx512_fp16", "amx_bf16", "asimd", "bf16", "sve")
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    return {
        "family": fields.get("cpu family"),
        "model": fields.get("model"),
        "flags": [f for f in wanted if f in flags],
    }


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else cpu_name()


def cache_bytes(device: str) -> int:
    """Size of the second-level cache, all of a CPU's cores together; 4 MiB where it cannot be found out."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
    except OSError:
        return 4 << 20
    found = re.fullmatch(r"(\d+)([KM])", text)
    if found is None:
        return 4 << 20
    return int(found[1]) * (1 << (10 if found[2] == "K" else 20)) * len(os.sched_getaffinity(0))


def free_memory(device: str) -> int:
    """Bytes that can still be had on the device; without limit where it cannot be found out."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return sys.maxsize


def describe(device: str, interference: str) -> dict[str, Any]:
    """The first line of every results file."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    row: dict[str, Any] = {
        "kind": "run",
        "command": command(sys.argv[1:]),
        **commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": device,
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": versions,
        "disturbance_seen_by": interference,
        "load_average": list(os.getloadavg()),
    }
    if device == "cpu":
        row["cpu"] = cpu_details()
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        row["cuda"] = torch.version.cuda
        row["driver"] = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
        row["clocks"] = _run("nvidia-smi", "--query-gpu=clocks.sm,clocks.max.sm,power.limit", "--format=csv,noheader", "--id=0")
        row["compute_capability"] = f"{properties.major}.{properties.minor}"
        row["multiprocessors"] = properties.multi_processor_count
        row["tf32"] = {"convolutions": torch.backends.cudnn.allow_tf32, "products": torch.backends.cuda.matmul.allow_tf32}
        row["cudnn"] = torch.backends.cudnn.version()
    return row
