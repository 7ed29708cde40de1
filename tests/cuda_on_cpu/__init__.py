"""The CUDA kernels of csrc/cuda on the CPU: builds them with g++ and makes them the backend "cuda".

Three builds: "plain"; "address", under AddressSanitizer and UndefinedBehaviorSanitizer, whose
module needs their libraries preloaded; "races", which finds missing barriers and counts accesses
(races.cpp). A build is kept in the temporary folder under the hash of what it is made of.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from unittest import mock

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
ROOT = HERE.parents[1]
NAME = "fastddpm_cuda_on_cpu"

SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
KERNEL_FLAGS = {
    "plain": ("-O2",),
    "address": ("-O1", *SANITIZE),
    "races": ("-O1", "-fsanitize=thread"),
}
EMULATOR_FLAGS = {"plain": ("-O2",), "address": ("-O1", *SANITIZE), "races": ("-O2",)}
LINK_FLAGS = {"plain": (), "address": SANITIZE, "races": ()}
BUILDS = tuple(KERNEL_FLAGS)


class Unavailable(Exception):
    """This machine can't build or run the emulator; the message says why."""


def headers() -> Path:
    """The folder of cuda_runtime.h: of the toolkit, or of a Python package that brings it."""
    nvcc = shutil.which("nvcc")
    folders = [
        *(
            Path(os.environ[name]) / "include"
            for name in ("CUDA_HOME", "CUDA_PATH")
            if os.environ.get(name)
        ),
        *([Path(nvcc).resolve().parents[1] / "include"] if nvcc else []),
        Path("/usr/local/cuda/include"),
    ]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends/nvidia/include")
    for folder in folders:
        if (folder / "cuda_runtime.h").is_file() and (folder / "crt/host_defines.h").is_file():
            return folder
    raise Unavailable("CUDA's headers were not found (cuda_runtime.h; set CUDA_HOME)")


@functools.cache
def compiler() -> str:
    """g++ (clang knows CUDA itself and would not take the kernels as C++)."""
    if platform.machine() not in ("x86_64", "AMD64"):
        raise Unavailable("the emulator's fibers are written for x86-64")
    path = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("g++")
    if path is None:
        raise Unavailable("there is no g++")
    return path


def cuda_sources() -> list[Path]:
    """Those of CMakeLists.txt."""
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    listed = re.search(r"set\(CUDA_SOURCES([^)]*)\)", text)
    assert listed is not None
    return [ROOT / name for name in listed[1].split()]


def _flags() -> tuple[str, ...]:
    # A device fuses where madd says so; so does a processor that can.
    fma = "fma" in Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    return (
        *("-std=c++17", "-fPIC", "-fno-strict-aliasing", "-g1", "-ffp-contract=off", "-fvisibility=hidden"),
        *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
        *(("-mfma",) if fma else ()),
        *("-I", str(CSRC), "-I", str(HERE), "-isystem", str(headers())),
    )


def _folder() -> Path:
    digest = hashlib.sha256()
    for file in sorted([*CSRC.glob("*.*"), *CSRC.glob("cuda/*"), *HERE.glob("*.*")]):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    version = subprocess.run([compiler(), "--version"], capture_output=True, check=True).stdout
    digest.update(version + repr(_flags()).encode() + sys.version.encode())
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"{NAME}-{user}" / digest.hexdigest()[:20]
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def _run(*command: str | Path) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stderr[-4000:]}")


def _compile(source: Path, object_file: Path, *flags: str) -> Path:
    if not object_file.exists():
        with tempfile.TemporaryDirectory(dir=object_file.parent) as scratch:
            made = Path(scratch) / "made.o"
            _run(compiler(), *_flags(), *flags, "-c", source, "-o", made)
            made.rename(object_file)  # another process may do the same
    return object_file


def _link(target: Path, objects: list[Path], *flags: str) -> Path:
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            made = Path(scratch) / "made"
            _run(compiler(), *flags, *objects, "-o", made)
            made.rename(target)
    return target


def _emulator(folder: Path, build: str) -> list[Path]:
    names = ["emulator", "races"] if build == "races" else ["emulator"]
    return [
        _compile(HERE / f"{name}.cpp", folder / f"{name}-{build}.o", *EMULATOR_FLAGS[build])
        for name in names
    ]


def _kernels(source: Path, folder: Path, build: str) -> Path:
    flags = ("-x", "c++", "-include", str(HERE / "emulator.h"), *KERNEL_FLAGS[build])
    return _compile(source, folder / f"{source.stem}-{build}.o", *flags)


def wrong_kernels(build: str) -> Path:
    """A program that runs one kernel of wrong_kernels.cu."""
    folder = _folder()
    objects = [_kernels(HERE / "wrong_kernels.cu", folder, build), *_emulator(folder, build)]
    return _link(folder / f"wrong-{build}", objects, *LINK_FLAGS[build])


def library(build: str) -> Path:
    """The Python module of a build: compiled if it is not there, two files at a time."""
    import pybind11

    folder, sources = _folder(), cuda_sources()
    includes = (pybind11.get_include(), sysconfig.get_paths()["include"])
    bindings = (
        *("-O1", "-Wno-unused-function", "-DFASTDDPM_CUDA_ON_CPU", '-DFASTDDPM_CUDA="emulated"'),
        *('-DFASTDDPM_CUDA_ARCHITECTURES=""', '-DFASTDDPM_VERSION=""', '-DFASTDDPM_COMPILER=""'),
        *(part for include in includes for part in ("-isystem", include)),
    )
    with ThreadPoolExecutor(2) as pool:
        module = pool.submit(_compile, HERE / "module.cpp", folder / "module.o", *bindings)
        kernels = pool.map(lambda source: _kernels(source, folder, build), sources)
        objects = [*kernels, module.result(), *_emulator(folder, build)]
    return _link(folder / f"{NAME}-{build}.so", objects, "-shared", *LINK_FLAGS[build])


def sanitizer_libraries() -> str:
    """LD_PRELOAD for a Python that loads the build "address"."""
    return " ".join(
        subprocess.run(
            [compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    )


@functools.cache
def module(build: str | None = None) -> ModuleType:
    """The loaded build, by default FASTDDPM_CUDA_ON_CPU or "plain". Raises Unavailable."""
    if importlib.util.find_spec("pybind11") is None:
        raise Unavailable("pybind11 is not installed")
    file = library(build or os.environ.get("FASTDDPM_CUDA_ON_CPU", "plain"))
    spec = importlib.util.spec_from_file_location(NAME, file)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    loaded.__file__ = str(file)
    return loaded


@contextlib.contextmanager
def as_cuda_backend() -> Iterator[None]:
    """Within it the backend "cuda" is the emulated one and takes tensors on the CPU."""
    from fastddpm.ops import cuda, dispatch

    class OnCpu(cuda._Cuda):
        def call(self, name, x, *args):
            getattr(self.module, name)(*args, 0)

    native = OnCpu(module(), "cpu", "")
    backend = dispatch.load("cuda")
    with mock.patch.multiple(
        backend, missing=None, module=native, _unsupported=native.unsupported, create=True
    ):
        yield
