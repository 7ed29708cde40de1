"""The benchmarks run, check before they time, and write what they print."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from fastddpm import reference
from fastddpm.ops import dispatch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmark():
    if dispatch.load("cpu").missing:
        pytest.skip(dispatch.load("cpu").missing)
    spec = importlib.util.spec_from_file_location("benchmark_ops", BENCHMARKS / "ops.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


QUICK = ("--quick", "--peers", "eager", "--repeats", "2")


def test_ops(benchmark, tmp_path, capsys):
    assert benchmark.main([*QUICK, "--json", str(tmp_path / "ops.json")]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "ops.json").read_text(encoding="utf-8"))
    assert report["environment"]["torch"] == torch.__version__
    assert report["environment"]["isa"] in printed
    rows = report["rows"]
    for op in ("noise", "posterior_step", "group_norm_silu", "attention_block"):
        assert {row["dtype"] for row in rows if row["op"] == op} == {"float32", "bfloat16"}
    for row in rows:
        assert float(row["GB/s"]) > 0 or row["GB/s"] == "0.00"
        assert float(row["x eager"]) > 0
        assert row["ms"] in printed


@pytest.mark.parametrize("who", ["fastddpm", "eager"])
def test_nothing_is_timed_that_computes_something_else(benchmark, monkeypatch, capsys, who):
    def wrong(x, *_, **__):
        return reference.group_norm_silu(x, 4, None, None)

    if who == "fastddpm":
        monkeypatch.setattr(benchmark.ops, "group_norm_silu", wrong)
    else:
        monkeypatch.setattr(benchmark.F, "group_norm", wrong)
    assert benchmark.main([*QUICK, "--only", "group_norm_silu"]) == 1
    captured = capsys.readouterr()
    assert f"{who} is off by" in captured.err
    assert "ms" not in captured.out


def test_unknown_peers(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--peers", "jax"])
    assert "must be of eager, compile; got jax" in capsys.readouterr().err
