"""Building: when it happens, and what is said when it cannot."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lowkernels.backends.cpu import build
from lowkernels.backends.native import CACHE_VARIABLE

ROOT = Path(__file__).parents[2]
CODE = """
import sys, torch, lowkernels
from lowkernels.ops import OPERATORS
from lowkernels.testing import random_call
assert not hasattr(torch.ops.lowkernels_cpu, "gn_mlp"), "loaded by the import"
call = random_call("gn_mlp", channels=8)
out = OPERATORS["gn_mlp"].overload(*call.args)
assert out.shape == call.args[0].shape
choice, _ = lowkernels.dispatch.last_call()
print(choice)
print(lowkernels.backends.load("cpu").describe())
"""


def run(tmp_path: Path, code: str = CODE, **environment: str) -> str:
    variables = {**os.environ, CACHE_VARIABLE: str(tmp_path / "cache"), **environment}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_jit_can_be_switched_off(tmp_path: Path) -> None:
    said = run(tmp_path, LOWKERNELS_JIT="0")
    assert said.startswith("gn_mlp: eager")
    assert "LOWKERNELS_JIT=0 forbids" in said


def test_no_compiler_is_a_reason(tmp_path: Path) -> None:
    said = run(tmp_path, CXX="no-such-compiler")
    assert said.startswith("gn_mlp: eager")
    assert "no-such-compiler is not on PATH" in said


def test_no_ninja_is_a_reason(tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "ninja.py").write_text("raise ImportError\n")
    (tools / "g++").symlink_to(shutil.which("true") or "true")
    said = run(tmp_path, PATH=str(tools), PYTHONPATH=os.pathsep.join((str(tools), os.environ.get("PYTHONPATH", ""))))
    assert said.startswith("gn_mlp: eager")
    assert "there is no ninja: it is neither installed (pip install ninja) nor on PATH" in said


def test_cache_that_cannot_be_written_to_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    said = run(tmp_path)
    assert "gn_mlp: eager" in said
    assert "could not be built: [Errno" in said


@pytest.mark.parametrize("script", ["exit 1", "echo '#define __GNUC__ 9'", "printf '#define __clang__ 1\\n#define __GNUC__ 4\\n'"])
def test_unusable_compiler_is_a_reason(tmp_path: Path, script: str) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    said = run(tmp_path, CXX=str(compiler))
    assert "gn_mlp: eager" in said
    assert f"the compiler {compiler} " in said


def fake_compiler(folder: Path, compiling: str, linking: str) -> str:
    """A g++ that runs `compiling` to compile and `linking` to link; in them, $out is the output."""
    path = folder / "g++"
    path.write_text(
        f"""#!/bin/sh
case "$*" in
*-dM*) echo '#define __GNUC__ 12'; exit;;
esac
for last; do out=$last; done
case "$*" in
*-shared*) while [ "$1" != -o ]; do shift; done; out=$2; {linking};;
*) {compiling};;
esac
"""
    )
    path.chmod(0o755)
    return str(path)


def test_compile_error_is_a_reason(tmp_path: Path) -> None:
    compiler = fake_compiler(tmp_path, 'case "$*" in *register*) touch $out;; *) echo "disk full" >&2; exit 1;; esac', "exit 1")
    said = run(tmp_path, CXX=compiler)
    assert "gn_mlp: eager" in said
    assert "disk full" in said


def test_library_is_found_again_and_named_after_its_sources(native: None) -> None:
    path = build.built()
    assert path is not None
    assert path.name == build.library_name()


def test_two_processes_build_once(tmp_path: Path, native: None) -> None:
    compiler = fake_compiler(tmp_path, "sleep 1; touch $out", f"cp {build.built()} $out")
    variables = {**os.environ, CACHE_VARIABLE: str(tmp_path / "cache"), "CXX": compiler}
    children = [
        subprocess.Popen([sys.executable, "-c", CODE], env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [child.communicate(timeout=200) for child in children]
    assert all(child.returncode == 0 for child in children), said
    assert all(out.startswith("gn_mlp: cpu") for out, _ in said)
    assert sum("compiling" in err for _, err in said) == 1
    files = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert files == sorted(["build", build.library_name(), Path(build.library_name()).with_suffix(".lock").name])


def test_command_line_shows_its_steps_and_keeps_objects(tmp_path: Path, native: None) -> None:
    compiler = fake_compiler(tmp_path, "touch $out", f"cp {build.built()} $out")
    output, objects = tmp_path / "output", tmp_path / "objects"
    command = [sys.executable, "-m", "lowkernels", "build", "--output", str(output), "--objects", str(objects)]
    said = [
        subprocess.run(command, env={**os.environ, "CXX": compiler}, capture_output=True, text=True, check=True, timeout=200)
        for _ in range(2)
    ]
    assert all(done.stdout.strip() == str(output / build.library_name()) for done in said)
    steps = len(build.ISA_FLAGS[platform.machine()]) + 2
    assert f"step {steps} of {steps}: library.so\n" in said[0].stderr
    assert "step" not in said[1].stderr, "there is nothing left to do"
    assert [path.name for path in output.iterdir()] == [build.library_name()]


def test_a_build_of_the_package_brings_the_library_and_no_warning(tmp_path: Path, native: None) -> None:
    compiler = fake_compiler(tmp_path, "touch $out", f"cp {build.built()} $out")
    source = tmp_path / "source"
    for folder in ("lowkernels", "lowformer", "csrc"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "setup.py", "build", "--build-lib", "lib", "--build-temp", "temp"]
    environment = {**os.environ, "CXX": compiler, "LOWKERNELS_BUILD_CPU": "1"}
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert (source / "lib/lowkernels/backends/cpu" / build.library_name()).is_file()
    assert "RuntimeWarning" not in done.stderr
