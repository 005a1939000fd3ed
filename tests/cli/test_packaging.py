from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lowkernels._version

ROOT = Path(__file__).parents[2]

# What a build may look at besides the two packages.
SOURCES = ["pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built with no network and with a torch that cannot be imported."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        shutil.copy(ROOT / name, source)
    for package in ("lowkernels", "lowformer"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "csrc", source / "csrc")
    (folder / "blocked").mkdir()
    (folder / "blocked" / "torch.py").write_text("raise ImportError('the build must not need torch')\n")
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"]
    subprocess.run(
        [*command, "--wheel-dir", folder / "dist", source],
        check=True,
        env={**os.environ, "PYTHONPATH": str(folder / "blocked")},
        timeout=120,
    )
    (built,) = (folder / "dist").glob("lowkernels-*.whl")
    return zipfile.ZipFile(built)


def test_wheel_holds_all_of_both_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    sources = {
        path.relative_to(ROOT).as_posix()
        for package in ("lowkernels", "lowformer")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    # The C++ sources, compiled where they are used, lie inside the package.
    sources |= {f"lowkernels/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert names == sources
    assert {
        "lowkernels/py.typed",
        "lowformer/py.typed",
        "lowkernels/data/chelsea.jpg",
        "lowformer/data/imagenet_classes.txt",
    } <= names


def test_metadata(wheel: zipfile.ZipFile) -> None:
    (path,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(wheel.read(path))
    assert metadata["Name"] == "lowkernels"
    assert metadata["Version"] == lowkernels._version.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert sorted(line.split(">=")[0] for line in required) == ["ninja", "numpy", "torch", "triton"]
    assert all("linux" in line for line in required if line.startswith(("ninja", "triton")))


def test_commands(wheel: zipfile.ZipFile) -> None:
    (path,) = (name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
    lines = wheel.read(path).decode().splitlines()
    assert "lowkernels = lowkernels.cli:main" in lines
    assert "lowformer = lowformer.cli:main" in lines


@pytest.mark.parametrize("package", ["lowkernels", "lowformer", "lowformer.cli"])
def test_import_brings_in_no_optional_package(package: str) -> None:
    code = f"""
import sys
import torch
before = set(sys.modules)
import {package}
print(*sorted({{name.partition(".")[0] for name in set(sys.modules) - before}}))
"""
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120, cwd=ROOT)
    brought = set(result.stdout.split())
    assert package.partition(".")[0] in brought
    optional = {
        "PIL",
        "huggingface_hub",
        "matplotlib",
        "ninja",
        "onnx",
        "rich",
        "safetensors",
        "timm",
        "torchvision",
        "triton",
    }
    assert not brought & optional
