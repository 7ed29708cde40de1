"""Builds fastddpm._C with CMake. Everything that is not the build is in pyproject.toml."""

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CUDA_CHOICES = ("AUTO", "ON", "OFF")


def version() -> str:
    text = (ROOT / "fastddpm" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    if match is None:
        raise SystemExit("fastddpm/__init__.py holds no line `__version__ = ...`")
    return match[1]


def cmake_options() -> list[str]:
    """-D options from the environment: FASTDDPM_CUDA, CMAKE_CUDA_ARCHITECTURES and CMAKE_ARGS."""
    cuda = os.environ.get("FASTDDPM_CUDA", "AUTO").upper()
    if cuda not in CUDA_CHOICES:
        raise SystemExit(f"FASTDDPM_CUDA must be one of {', '.join(CUDA_CHOICES)}; got {cuda!r}")
    options = [f"-DFASTDDPM_CUDA={cuda}"]
    if architectures := os.environ.get("CMAKE_CUDA_ARCHITECTURES"):
        options.append(f"-DCMAKE_CUDA_ARCHITECTURES={architectures}")
    return options + shlex.split(os.environ.get("CMAKE_ARGS", ""))


class CMakeBuild(build_ext):
    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).parent.resolve()
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
        # A fresh folder every time: a kept CMake cache names the ninja and pybind11 of a build
        # environment that is gone.
        with tempfile.TemporaryDirectory(prefix="fastddpm-build-") as build:
            configure = [
                *("cmake", "-S", str(ROOT), "-B", build, "-G", "Ninja"),
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
                *cmake_options(),
            ]
            try:
                subprocess.run(configure, check=True)
                subprocess.run(["cmake", "--build", build, "--parallel", jobs], check=True)
            except FileNotFoundError as error:
                raise SystemExit(
                    f"{error.filename} was not found: pip install cmake ninja"
                ) from error
            except subprocess.CalledProcessError as error:
                raise SystemExit(f"building fastddpm._C failed: {shlex.join(error.cmd)}") from error


setup(
    version=version(),
    packages=[*find_packages(include=["fastddpm", "fastddpm.*"]), "fastddpm.kernels"],
    ext_modules=[Extension("fastddpm._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
