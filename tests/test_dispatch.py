"""Which backend runs: forced, automatic, missing; and that nothing about it is silent."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastddpm import ops, reference
from fastddpm.ops import dispatch

ROOT = Path(__file__).parent.parent
X = torch.randn(2, 4, 3, 3)
MISSPELT = "FASTDDPM_BACKEND must be one of 'auto', 'reference', 'cpu', 'cuda', 'triton'; got 'tpu'"


def norm(x=X):
    return ops.group_norm_silu(x, 2, None, None)


def backend(name: str, missing: str | None = None, unsupported: str | None = None, ops=()):
    """A stand-in for a loaded backend; its results are all -1."""
    made = dispatch.Backend.__new__(dispatch.Backend)
    functions = {op: lambda x, *a, **k: torch.full_like(x, -1) for op in ops}
    made.name, made.missing = name, missing
    made.module = None if missing else SimpleNamespace(**functions)
    made._unsupported = lambda op, *tensors, **options: unsupported
    return made


@pytest.fixture
def backends(monkeypatch):
    """Replaces what dispatch.load gives, by name; warnings start afresh."""
    load, replaced = dispatch.load, {}
    monkeypatch.setattr(dispatch, "load", lambda name: replaced.get(name) or load(name))
    monkeypatch.delenv("FASTDDPM_STRICT", raising=False)
    dispatch._report_fallback.cache_clear()
    yield replaced
    dispatch._report_fallback.cache_clear()


def test_auto_takes_the_fastest_that_can(backends):
    backends["cpu"] = backend("cpu", ops=["group_norm_silu"])
    assert torch.equal(norm(), torch.full_like(X, -1))
    backends["cpu"] = backend("cpu", unsupported="too blue", ops=["group_norm_silu"])
    assert torch.equal(norm(), reference.group_norm_silu(X, 2, None, None))
    backends["cpu"] = backend("cpu")  # has no ops at all
    assert torch.equal(norm(), reference.group_norm_silu(X, 2, None, None))


def test_use_backend_as_a_call_and_as_a_block():
    assert dispatch.forced() == "auto"
    ops.use_backend("reference")
    try:
        assert dispatch.forced() == "reference"
        with ops.use_backend("auto"):
            assert dispatch.forced() == "auto"
            with ops.use_backend("reference"):
                assert dispatch.forced() == "reference"
            assert dispatch.forced() == "auto"
        assert dispatch.forced() == "reference"
    finally:
        ops.use_backend("auto")
    with pytest.raises(ZeroDivisionError), ops.use_backend("reference"):
        raise ZeroDivisionError
    assert dispatch.forced() == "auto"


def test_all_threads_see_the_forced_backend():
    seen = []
    with ops.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.forced()))
        thread.start()
        thread.join()
    assert seen == ["reference"]


def test_unknown_names():
    choices = "'auto', 'reference', 'cpu', 'cuda', 'triton'"
    with pytest.raises(ValueError, match=f"backend must be one of {choices}; got 'tpu'"):
        ops.use_backend("tpu")
    assert dispatch.forced() == "auto"


def test_a_missing_backend_can_not_be_forced(backends):
    backends["cpu"] = backend("cpu", missing="nobody built it")
    with pytest.raises(RuntimeError, match="backend 'cpu' can't run here: nobody built it"):
        ops.use_backend("cpu")
    assert dispatch.forced() == "auto"


def test_a_forced_backend_that_goes_missing(backends, monkeypatch):
    backends["cpu"] = backend("cpu", missing="nobody built it")
    monkeypatch.setattr(dispatch, "_forced", "cpu")  # as FASTDDPM_BACKEND=cpu does
    with pytest.raises(RuntimeError, match="backend 'cpu' can't run here: nobody built it"):
        norm()


def test_a_forced_backend_that_can_not_do_the_case(backends):
    backends["cpu"] = backend("cpu", unsupported="too blue", ops=["group_norm_silu"])
    message = (
        "group_norm_silu can't run on the backend 'cpu', which was forced: too blue; "
        "backends that have group_norm_silu here: .*'reference'"
    )
    with ops.use_backend("cpu"), pytest.raises(ValueError, match=message):
        norm()


def test_a_forced_backend_without_the_op(backends):
    backends["cpu"] = backend("cpu", ops=["group_norm_silu"])
    weight = torch.zeros(12, 4), torch.zeros(4, 4)
    message = (
        "attention_block can't run on the backend 'cpu', which was forced: attention_block has "
        "no cpu version; backends that have attention_block here: 'reference'"
    )
    with ops.use_backend("cpu"), pytest.raises(ValueError, match=message):
        ops.attention_block(X, 2, None, None, weight[0], None, weight[1], None)


def test_the_native_cpu_backend_leaves_float64_to_the_reference_without_a_word(backends):
    if dispatch.load("cpu").missing:
        pytest.skip(dispatch.load("cpu").missing)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert norm(X.double()).dtype == torch.float64
    with ops.use_backend("cpu"), pytest.raises(ValueError, match="float64 is not supported"):
        norm(X.double())


def test_an_unbuilt_native_module_is_said_once(backends):
    backends["cpu"] = backend("cpu", missing="nobody built it")
    with pytest.warns(RuntimeWarning, match=r"slow reference ops on cpu \(cpu: nobody built it\)"):
        norm()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        norm()
        ops.randn((2, 3), seed=0, step=0)


def test_strict_makes_the_fallback_an_error(backends, monkeypatch):
    backends["cpu"] = backend("cpu", missing="nobody built it")
    monkeypatch.setenv("FASTDDPM_STRICT", "1")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"nobody built it.*FASTDDPM_STRICT=1"):
            norm()
    with ops.use_backend("reference"):  # asked for, so no fallback
        norm()


def test_a_broken_import_is_a_reason(monkeypatch):
    monkeypatch.setitem(dispatch.MODULES, "triton", "fastddpm.no_such_module")
    made = dispatch.Backend("triton")
    assert made.module is None
    assert "fastddpm.no_such_module does not import (No module named" in made.missing
    assert made.unsupported("noise") == made.missing


def test_matrix(backends):
    backends["cpu"] = backend("cpu", ops=["noise", "randn"])
    backends["cuda"] = backend("cuda", missing="no device")
    table = dispatch.matrix()
    assert tuple(table) == dispatch.OPS
    for op, row in table.items():
        assert tuple(row) == dispatch.BACKENDS
        has = op in ("noise", "randn")
        assert row["cpu"]["available"] == row["cpu"]["cpu"] == has
        assert row["reference"] == {
            "available": True, "cpu": not has, "cuda": row["reference"]["cuda"], "reason": None
        }  # fmt: skip
        assert row["cpu"]["reason"] == (None if has else f"{op} has no cpu version")
        assert row["cuda"]["reason"] == "no device"
        assert sum(entry["cpu"] for entry in row.values()) == 1
    with ops.use_backend("reference"):
        assert all(row["reference"]["cpu"] for row in dispatch.matrix().values())


def test_the_gradient_uses_the_forced_backend(backends):
    """A backend without a gradient of its own gets none from elsewhere unless auto chooses."""
    backends["cpu"] = backend("cpu", ops=["group_norm_silu"])
    x = X.clone().requires_grad_()
    norm(x).sum().backward()
    assert x.grad is not None
    message = "group_norm_silu_backward has no cpu version"
    with ops.use_backend("cpu"), pytest.raises(ValueError, match=message):
        norm(x).sum().backward()


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("reference", "print(dispatch.forced())", "reference"),
        ("", "print(dispatch.forced())", "auto"),
        ("tpu", "print(dispatch.forced())", f"ValueError: {MISSPELT}"),
        (
            "tpu",
            "import torch; dispatch.choose('noise', torch.zeros(1))",
            f"ValueError: {MISSPELT}",
        ),
        ("tpu", "dispatch.matrix(); exit(dispatch.problem())", MISSPELT),  # a report can be made
    ],
)
def test_environment(name, code, said):
    done = subprocess.run(
        [sys.executable, "-c", f"from fastddpm.ops import dispatch; {code}"],
        cwd=ROOT,
        env={**os.environ, "FASTDDPM_BACKEND": name},
        capture_output=True,
        text=True,
    )
    assert said in done.stdout + done.stderr
    assert (done.returncode == 0) == (name != "tpu")
