"""Build entry point. The metadata is in pyproject.toml.

The C++ sources travel in the wheel, to be compiled on the user's machine when they are first needed. With
``LOWKERNELS_BUILD_CPU=1`` the CPU kernels are compiled during the build and travel too:

    LOWKERNELS_BUILD_CPU=1 pip install --no-build-isolation .

which needs g++ and the torch they will run with, hence no isolation.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

BUILD_CPU = os.environ.get("LOWKERNELS_BUILD_CPU", "0") not in ("", "0")


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        if BUILD_CPU:
            self._compile_cpu_kernels()
        # An editable installation finds the sources where they are.
        if not self.editable_mode:
            target = Path(self.build_lib) / "lowkernels" / "csrc"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree("csrc", target)

    def _compile_cpu_kernels(self) -> None:
        check = subprocess.run([sys.executable, "-c", "import torch"], capture_output=True)
        if check.returncode:
            sys.exit(
                "LOWKERNELS_BUILD_CPU=1 compiles against the installed torch, which this build cannot import: "
                "install torch first and pass --no-build-isolation"
            )
        output = [] if self.editable_mode else ["--output", str(Path(self.build_lib).resolve() / "lowkernels" / "cpu")]
        # The package itself, not an installed one, knows how; it is run from the source tree.
        done = subprocess.run([sys.executable, "-m", "lowkernels.cpu.build", *output], env={**os.environ, "PYTHONPATH": "."})
        if done.returncode:
            sys.exit("LOWKERNELS_BUILD_CPU=1: the CPU kernels could not be compiled, see above")


class Platform(Distribution):
    def has_ext_modules(self) -> bool:
        """Compiled kernels make the wheel one for this platform."""
        return BUILD_CPU


setup(cmdclass={"build_py": BuildPy}, distclass=Platform)
