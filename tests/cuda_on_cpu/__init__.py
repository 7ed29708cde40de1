"""The CUDA kernels of csrc/cuda on the CPU: builds them with g++ and makes them the backend "cuda".

Three builds: "plain"; "address", under AddressSanitizer and UndefinedBehaviorSanitizer, whose
module needs their libraries preloaded; "races", which finds missing barriers and counts accesses
(races.cpp). Objects are kept in the temporary folder under the hash of what they are made of.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch

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
CALLS: Counter[tuple[str, str]] = Counter()  # of the backend's, by build and name


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
        *(
            "-std=c++17",
            "-fPIC",
            "-fno-strict-aliasing",
            "-g1",
            "-ffp-contract=off",
            "-fvisibility=hidden",
        ),
        *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
        *(("-mfma",) if fma else ()),
        *("-I", str(CSRC), "-I", str(HERE), "-isystem", str(headers())),
    )


@functools.cache
def _folder() -> Path:
    """Where builds are kept, of this user alone."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"{NAME}-{user}"
    folder.mkdir(exist_ok=True, mode=0o700)
    return folder


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stderr[-4000:]}")
    return done.stdout


def _make(kind: str, content: str, *command: str | Path) -> Path:
    """What `command -o FILE` makes of this content: from an earlier run, or made now."""
    text = "\0".join([_run(compiler(), "--version"), content, *map(str, command)])
    target = _folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.{kind}"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=_folder()) as scratch:
            made = Path(scratch) / "made"
            _run(*command, "-o", made)
            made.rename(target)  # another process may do the same
    return target


def _compile(source: Path, *flags: str) -> Path:
    command = (compiler(), *_flags(), *flags, source)
    return _make("o", _run(*command, "-E"), *command, "-c")


def _link(kind: str, objects: list[Path], *flags: str) -> Path:
    return _make(kind, "", compiler(), *flags, *objects)


def _emulator(build: str) -> list[Path]:
    names = ["emulator", "races"] if build == "races" else ["emulator"]
    return [_compile(HERE / f"{name}.cpp", *EMULATOR_FLAGS[build]) for name in names]


def _kernels(source: Path, build: str) -> Path:
    flags = ("-x", "c++", "-include", str(HERE / "emulator.h"), *KERNEL_FLAGS[build])
    return _compile(source, *flags)


def wrong_kernels(build: str) -> Path:
    """A program that runs one kernel of wrong_kernels.cu."""
    objects = [_kernels(HERE / "wrong_kernels.cu", build), *_emulator(build)]
    return _link("program", objects, *LINK_FLAGS[build])


def library(build: str) -> Path:
    """The Python module of a build: compiled if it is not there, two files at a time."""
    import pybind11

    includes = (pybind11.get_include(), sysconfig.get_paths()["include"])
    bindings = (
        *("-O1", "-Wno-unused-function", "-DFASTDDPM_CUDA_ON_CPU", '-DFASTDDPM_CUDA="emulated"'),
        *('-DFASTDDPM_CUDA_ARCHITECTURES=""', '-DFASTDDPM_VERSION=""', '-DFASTDDPM_COMPILER=""'),
        *(part for include in includes for part in ("-isystem", include)),
    )
    with ThreadPoolExecutor(2) as pool:
        module = pool.submit(_compile, HERE / "module.cpp", *bindings)
        kernels = pool.map(lambda source: _kernels(source, build), cuda_sources())
        objects = [*kernels, module.result(), *_emulator(build)]
    return _link("so", objects, "-shared", *LINK_FLAGS[build])


def sanitizer_libraries() -> str:
    """LD_PRELOAD for a Python that loads the build "address"."""
    return " ".join(
        subprocess.run(
            [compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    )


def default_build() -> str:
    return os.environ.get("FASTDDPM_CUDA_ON_CPU", "plain")


@functools.cache
def module(build: str | None = None) -> ModuleType:
    """The loaded build, by default `default_build`. Raises Unavailable."""
    if importlib.util.find_spec("pybind11") is None:
        raise Unavailable("pybind11 is not installed")
    file = library(build or default_build())
    spec = importlib.util.spec_from_file_location(NAME, file)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    loaded.__file__ = str(file)
    return loaded


class Watch:
    """Counts the accesses of kernels of the build "races" to the memory of a dense tensor."""

    def __init__(self, *tensors: torch.Tensor):
        self.races, self.tensors = ctypes.CDLL(str(module("races").__file__)), tensors

    def __enter__(self) -> Watch:
        for x in self.tensors:
            size = x.numel() * x.element_size()
            self.races.emulator_watch(ctypes.c_void_p(x.data_ptr()), ctypes.c_size_t(size))
        return self

    def __exit__(self, *exception: object) -> None:
        self.counts = []
        for which in range(len(self.tensors)):
            counts = (ctypes.c_uint64 * 4)()
            self.races.emulator_counts(which, counts)
            self.counts.append(
                dict(zip(("reads", "writes", "read", "written"), counts, strict=True))
            )
        self.races.emulator_unwatch()


@contextlib.contextmanager
def as_cuda_backend(build: str | None = None) -> Iterator[ModuleType]:
    """Within it the backend "cuda" is the emulated one and takes tensors on the CPU."""
    from fastddpm.ops import cuda, dispatch

    class OnCpu(cuda._Cuda):
        def call(self, name, x, *args):
            CALLS[build or default_build(), name] += 1
            getattr(self.module, name)(*args, 0)

    native = OnCpu(module(build), "cpu", "")
    backend = dispatch.load("cuda")
    with mock.patch.multiple(
        backend, missing=None, module=native, _unsupported=native.unsupported, create=True
    ):
        yield native.module
