"""Finds and loads the native module `fastddpm._C`, or records why there is none.

C:       the module, or None; a missing one is no error here
reason:  None, or one sentence that says what is wrong and what to do

An impossible FASTDDPM_ISA is a ValueError of what would use it, with the choices: it was asked for.
`problem` says it too, for reports; importing is no error.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # noqa: F401  first: _C then runs on torch's own thread pool

_HERE = Path(__file__).parent


def _candidates() -> list[Path]:
    """Files that may be `_C`: beside this file, then in an installed fastddpm of the same version.

    The second serves a checkout after a plain `pip install .`: there `python -m pytest` and
    `python -c "import fastddpm"` find the source folder first, and the build is the installed one.
    """
    text = (_HERE / "__init__.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "(.+)"', text, re.MULTILINE)
    installed = [
        Path(str(distribution.locate_file("fastddpm")))
        for distribution in distributions(name="fastddpm")
        if version and distribution.version == version[1]
    ]
    files = [
        folder / f"_C{suffix}" for folder in (_HERE, *installed) for suffix in EXTENSION_SUFFIXES
    ]
    return [file for file in files if file.is_file()]


def _load() -> tuple[ModuleType | None, str | None]:
    files = _candidates()
    if not files:
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        return None, (
            f"fastddpm's native module _C is not built for this Python ({python}): run "
            "`pip install .` in the checkout (it needs a C++17 compiler), or `pip install -e .` to "
            "work on the sources"
        )
    spec = importlib.util.spec_from_file_location("fastddpm._C", files[0])
    try:
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        spec.loader.exec_module(module)  # type: ignore[union-attr]
    except ImportError as error:
        return None, f"{files[0]} does not load ({error}): build it again with `pip install .`"
    sys.modules["fastddpm._C"] = module
    return module, None


def _map_kernels() -> None:
    """In a checkout, let `fastddpm.kernels` be the folder kernels/, as it is once installed."""
    init = _HERE.parent / "kernels" / "__init__.py"
    if init.is_file() and not (_HERE / "kernels").is_dir():
        spec = importlib.util.spec_from_file_location("fastddpm.kernels", init)
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        sys.modules["fastddpm.kernels"] = sys.modules["fastddpm"].kernels = module  # type: ignore[attr-defined]
        spec.loader.exec_module(module)  # type: ignore[union-attr]


_map_kernels()
C, reason = _load()


def build_info() -> dict[str, Any]:
    """Compiler, instruction sets, threading and CUDA of the native module; {} without one."""
    return {} if C is None else {**C.build_info(), "file": C.__file__}


def runs_on(architectures: str, capability: tuple[int, int]) -> str | None:
    """What of CMake's list of architectures a card of this capability runs; None for nothing.

    Machine code of x.y is for x.z, z >= y, and PTX of it, compiled at the first use, for all that
    came after; an "a" at its end binds either to that very card, an "f" to its family."""
    major, minor = capability
    best: dict[str, tuple[int, int]] = {}
    for part in architectures.replace(";", ",").split(","):
        if part.strip() in ("all", "all-major", "native"):
            return f"what CMake makes of {part.strip()!r}"
        match = re.fullmatch(r"(\d+)(\d)([af]?)(?:-(real|virtual))?", part.strip())
        if match is None:
            continue
        made, bound = (int(match[1]), int(match[2])), match[3]
        same = made[0] == major and made[1] <= minor
        if match[4] != "virtual" and (made == capability or (same and bound != "a")):
            best["sm"] = max(made, best.get("sm", made))
        if match[4] != "real" and made <= capability and not bound:
            best["ptx"] = max(made, best.get("ptx", made))
    if "sm" in best:
        return "machine code of sm_{}{}".format(*best["sm"])
    return "PTX of compute_{}{}, compiled at its first use".format(*best["ptx"]) if best else None


def isa() -> str | None:
    """The instruction set in use: the best of this machine, or what FASTDDPM_ISA names."""
    return None if C is None else C.isa()


def isas_available() -> list[str]:
    """The compiled instruction sets that this machine has, weakest first."""
    return [] if C is None else C.isas_available()


def problem() -> str | None:
    """What is wrong with FASTDDPM_ISA, if anything is: the choices, and what it names."""
    try:
        isa()
    except ValueError as error:
        return str(error)
    return None


def use_isa(name: str) -> None:
    """Use another instruction set from here on, in all threads.

    Raises ValueError, with the choices, for one that was not compiled or that this machine lacks.
    """
    if C is None:
        raise RuntimeError(reason)
    C.use_isa(name)
