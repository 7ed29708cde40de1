"""The wheel: what is in it, what it links, and what is said when something is missing."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")
FOLDERS = ("csrc", "fastddpm", "kernels")

needs_build_tools = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("setuptools", "cmake", "pybind11")),
    reason="the build tools of the test extra are not installed",
)


def run(*command: object, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    """The finished process, stdout and stderr together, with `env` over a clean environment."""
    inherited = {
        k: v for k, v in os.environ.items() if not k.startswith(("FASTDDPM_", "PYTHONPATH"))
    }
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, **env},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def copy_checkout(target: Path) -> Path:
    unwanted = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in SOURCES:
        shutil.copy(ROOT / name, target / name)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, target / name, ignore=unwanted)
    return target


def build_wheel(checkout: Path, **env: str) -> subprocess.CompletedProcess:
    return run(
        *(sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation"),
        *("--disable-pip-version-check", "-w", "wheels"),
        cwd=checkout,
        **env,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """A CPU-only wheel: the second of one checkout, so that leftovers of the first show. The first
    is not optimised, which takes a third of the time."""
    checkout = copy_checkout(tmp_path_factory.mktemp("checkout"))
    hasty = checkout / "hasty-c++"
    hasty.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n')
    hasty.chmod(0o755)
    for options in ({"CXX": str(hasty)}, {}):
        built = build_wheel(checkout, FASTDDPM_CUDA="OFF", **options)
        assert built.returncode == 0, built.stdout
    (path,) = (checkout / "wheels").glob("*.whl")
    with zipfile.ZipFile(path) as file:
        yield file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder that holds the wheel's contents, as site-packages would."""
    folder = tmp_path_factory.mktemp("site")
    wheel.extractall(folder)
    return folder


def native_module(installed: Path) -> Path:
    (path,) = (installed / "fastddpm").glob("_C*")
    return path


@pytest.mark.slow
@needs_build_tools
def test_wheel_contents(wheel):
    names = wheel.namelist()
    top = {name.split("/")[0] for name in names}
    assert top == {"fastddpm", next(name for name in top if name.endswith(".dist-info"))}
    assert sum(name.startswith("fastddpm/_C.") for name in names) == 1
    python = {
        f"fastddpm/{path.relative_to(ROOT / 'fastddpm')}" for path in ROOT.glob("fastddpm/**/*.py")
    }
    kernels = {f"fastddpm/{path.relative_to(ROOT)}" for path in ROOT.glob("kernels/**/*.py")}
    checkpoints = {
        str(path.relative_to(ROOT))
        for path in ROOT.glob("fastddpm/checkpoints/**/*")
        if path.is_file()
    }
    assert {name for name in names if name.endswith(".py")} == python | kernels
    assert {name for name in names if name.startswith("fastddpm/checkpoints/")} == checkpoints


@pytest.mark.slow
@needs_build_tools
def test_native_module_links_no_torch(installed):
    symbols = run("nm", "-D", "-C", native_module(installed), cwd=installed)
    assert symbols.returncode == 0, symbols.stdout
    assert "PyInit__C" in symbols.stdout
    assert not any(name in symbols.stdout for name in ("at::", "c10::", "torch"))


@pytest.mark.slow
@needs_build_tools
def test_native_module_imports_without_torch(installed):
    code = (
        "import importlib.util as u, sys\n"
        f"spec = u.spec_from_file_location('_C', {str(native_module(installed))!r})\n"
        "module = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert 'torch' not in sys.modules\n"
        "print(module.build_info(), module.isa())"
    )
    imported = run(sys.executable, "-c", code, cwd=installed)
    assert imported.returncode == 0, imported.stdout
    assert "'cuda': None" in imported.stdout


@pytest.mark.slow
@needs_build_tools
def test_checkout_finds_the_installed_module(installed, tmp_path):
    """After a plain install the checkout's own folder, which has no _C, comes first on sys.path."""
    copy_checkout(tmp_path)
    code = (
        "from fastddpm import _native\n"
        "import fastddpm.kernels\n"
        "print(fastddpm.__file__, fastddpm.kernels.__file__, _native.C and _native.C.__file__)"
    )
    imported = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed))
    assert imported.returncode == 0, imported.stdout
    package, kernels, native = imported.stdout.split()[-3:]
    assert Path(package).parent == tmp_path / "fastddpm"
    assert Path(kernels).parent == tmp_path / "kernels"
    assert Path(native) == native_module(installed)


def test_missing_native_module_says_what_to_do(tmp_path):
    copy_checkout(tmp_path)
    code = (
        "import importlib.metadata as m\n"
        "m.distributions = lambda **kw: []\n"  # as if fastddpm were not installed
        "import fastddpm\n"
        "from fastddpm import _native\n"
        "from fastddpm.ops import cpu\n"
        "assert _native.C is None and _native.build_info() == {} and _native.isa() is None\n"
        "print(cpu.unsupported('randn'))"
    )
    imported = run(sys.executable, "-c", code, cwd=tmp_path)
    assert imported.returncode == 0, imported.stdout
    assert "requires _C" in imported.stdout
    assert "pip install ." in imported.stdout


def test_broken_native_module_says_what_to_do(tmp_path):
    copy_checkout(tmp_path)
    (tmp_path / "fastddpm" / "_C.abi3.so").write_bytes(b"not a shared library")
    code = "import fastddpm; from fastddpm import _native; print(_native.C, _native.reason)"
    imported = run(sys.executable, "-c", code, cwd=tmp_path)
    assert imported.returncode == 0, imported.stdout
    assert "does not load" in imported.stdout
    assert "pip install ." in imported.stdout


def test_unknown_isa_is_an_error(tmp_path):
    pytest.importorskip("fastddpm._native")
    from fastddpm import _native

    if _native.C is None:
        pytest.skip(_native.reason)
    code = (
        "import torch; from fastddpm import _native, ops\n"
        "print('problem:', _native.problem())\n"
        "ops.use_backend('cpu')\n"
        "ops.discretized_log_likelihood(*[torch.zeros(1)] * 3)"
    )
    done = run(sys.executable, "-c", code, cwd=ROOT, FASTDDPM_ISA="mmx")
    assert done.returncode != 0
    assert "problem: FASTDDPM_ISA must be one of 'plain'" in done.stdout
    assert "ValueError: FASTDDPM_ISA must be one of 'plain'" in done.stdout


@needs_build_tools
@pytest.mark.parametrize(
    ("known", "said"),
    [
        ("sm_75", "no CUDA kernels: .*nvcc knows none of the architectures 80, 90, 100 and 120"),
        ("sm_(75|80|90)", r"does not know the architectures 100, 120.* for 80-real,90-real,90-vir"),
    ],
)
def test_an_nvcc_that_lacks_architectures(tmp_path, known, said):
    """As one of CUDA 12.6: it refuses what it does not list."""
    nvcc = shutil.which("nvcc") or "false"
    if known != "sm_75" and nvcc == "false":
        pytest.skip("there is no nvcc to compile with")
    old = tmp_path / "nvcc"
    old.write_text(
        '#!/bin/sh\ncase "$*" in\n'
        f"  *--list-gpu-code*) printf 'sm_75\\nsm_80\\nsm_90\\n' | grep -E '{known}$'; exit 0;;\n"
        "  *_100*|*_120*) echo \"Unsupported gpu architecture 'compute_100'\" >&2; exit 1;;\n"
        f'esac\nexec {nvcc} "$@"\n'
    )
    old.chmod(0o755)
    configured = run(
        *("cmake", "-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja"),
        f"-DPython_EXECUTABLE={sys.executable}",
        cwd=tmp_path,
        CUDACXX=str(old),
    )
    assert configured.returncode == 0, configured.stdout
    assert re.search(said, configured.stdout, re.DOTALL), configured.stdout


@needs_build_tools
def test_unknown_cuda_option_is_an_error(tmp_path):
    copy_checkout(tmp_path)
    built = run(sys.executable, "setup.py", "build_ext", cwd=tmp_path, FASTDDPM_CUDA="maybe")
    assert built.returncode != 0
    assert "FASTDDPM_CUDA must be one of AUTO, ON, OFF; got 'MAYBE'" in built.stdout
