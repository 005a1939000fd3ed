"""Build entry point. The metadata is in pyproject.toml.

The C++ and CUDA sources travel in the wheel, to be compiled on the user's machine when they are first needed. With
``LOWKERNELS_BUILD_CPU=1`` or ``LOWKERNELS_BUILD_CUDA=1`` those kernels are compiled during the build and travel too:

    LOWKERNELS_BUILD_CPU=1 pip install --no-build-isolation .

which needs g++ (and nvcc), and torch and ninja installed, hence no isolation. The CPU kernels then serve that release of torch
only, the CUDA ones every later one too. ``TORCH_CUDA_ARCH_LIST`` chooses GPU architectures.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

BACKENDS = [name for name in ("cpu", "cuda") if os.environ.get(f"LOWKERNELS_BUILD_{name.upper()}", "0") not in ("", "0")]


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        for backend in BACKENDS:
            self._compile_kernels(backend)
        # An editable installation finds the sources where they are.
        if not self.editable_mode:
            target = Path(self.build_lib) / "lowkernels" / "csrc"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree("csrc", target)

    def _compile_kernels(self, backend: str) -> None:
        variable = f"LOWKERNELS_BUILD_{backend.upper()}=1"
        check = subprocess.run([sys.executable, "-c", "import torch"], capture_output=True)
        if check.returncode:
            sys.exit(
                f"{variable} compiles against the installed torch, which this build cannot import: "
                "install torch first and pass --no-build-isolation"
            )
        folder = Path(self.build_lib).resolve() / "lowkernels" / "backends" / backend
        command = [sys.executable, "-m", "lowkernels", "build", *(["--cuda"] if backend == "cuda" else [])]
        if not self.editable_mode:
            # Libraries of an earlier build would travel too.
            for stale in folder.glob("*.so"):
                stale.unlink()
            # Object files stay in the source tree, outside of the wheel: the next build compiles what has changed.
            objects = Path(self.get_finalized_command("build").build_temp).resolve()
            command += ["--output", str(folder), "--objects", str(objects)]
        # The package itself, not an installed one, knows how; it is run from the source tree.
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": "."})
        if done.returncode:
            sys.exit(f"{variable}: the kernels could not be compiled, see above")


class Platform(Distribution):
    def has_ext_modules(self) -> bool:
        """Compiled kernels make the wheel one for this platform."""
        return bool(BACKENDS)


setup(cmdclass={"build_py": BuildPy}, distclass=Platform)
