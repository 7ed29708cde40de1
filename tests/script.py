"""The scripts of benchmarks/ as modules."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from pathlib import Path

import pytest

from fastddpm.ops import dispatch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@contextlib.contextmanager
def script(name: str):
    """The module benchmarks/NAME.py."""
    if dispatch.load("cpu").missing:
        pytest.skip(dispatch.load("cpu").missing)
    path = list(sys.path)
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]
    sys.path[:] = path
