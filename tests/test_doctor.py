"""The doctor's report: everything that can run, and the reason of everything that can't."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from toy import tiny_unet, wave

from fastddpm import _native, cli
from fastddpm.doctor import doctor, what_runs
from fastddpm.ops import dispatch
from fastddpm.pretrained import bundled_models


def section(title: str) -> str:
    """The lines of one section of the report."""
    report = doctor()
    match = re.search(rf"^{re.escape(title)}.*\n((?:  .*\n?)+)", report, re.MULTILINE)
    assert match, f"no section {title!r} in\n{report}"
    return match[1]


def rows() -> dict[str, dict[str, str]]:
    """{op: {backend: the rest of its line}}, from the table in the report."""
    table: dict[str, dict[str, str]] = {}
    op = ""
    for line in section("ops").splitlines()[2:]:
        words = line.split()
        if words[0] in dispatch.OPS:
            op, *words = words
        table.setdefault(op, {})[words[0]] = " ".join(words[1:])
    return table


def test_every_op_with_every_backend():
    table = rows()
    assert list(table) == list(dispatch.OPS)
    for op, backends in dispatch.matrix().items():
        assert list(table[op]) == list(backends)
        for backend, entry in backends.items():
            line = table[op][backend]
            assert line.startswith("yes" if entry["available"] else "no")
            assert ("cpu" in line.split()[1:2]) == entry["cpu"]
            if entry["reason"]:
                assert " ".join(entry["reason"].split()) in line


def test_a_forced_backend_is_what_every_op_uses():
    with dispatch.use_backend("reference"):
        for backends in rows().values():
            assert backends["reference"].startswith("yes cpu")
            assert not any(
                "cpu" in line.split()[1:2] for name, line in backends.items() if name != "reference"
            )


def test_versions_and_devices():
    versions = section("versions")
    assert re.search(rf"torch +{re.escape(torch.__version__.split('+')[0])}", versions)
    for name in ("python", "numpy", "safetensors", "pillow"):
        assert re.search(rf"^  {name} +\d", versions, re.MULTILINE), name
    devices = section("devices")
    assert f"{torch.get_num_threads()} threads" in devices
    assert re.search(r"^  cuda +\S", devices, re.MULTILINE)
    assert re.search(r"^  cpu precision 'auto' +(bf16|fp32)", devices, re.MULTILINE)


@pytest.mark.skipif(_native.C is None, reason=str(_native.reason))
def test_the_native_module_and_its_instruction_sets(monkeypatch):
    monkeypatch.delenv("FASTDDPM_ISA", raising=False)
    report = section("native module")
    assert re.search(rf"instruction set used +{_native.isa()}\n", report)
    for isa in _native.isas_available():
        assert isa in report
    for name in _native.build_info():
        assert name in report
    monkeypatch.setenv("FASTDDPM_ISA", _native.isa())
    assert f"{_native.isa()} (FASTDDPM_ISA={_native.isa()})" in section("native module")


def test_a_missing_native_module_is_named_with_its_reason(monkeypatch):
    monkeypatch.setattr(_native, "C", None)
    monkeypatch.setattr(_native, "reason", "_C is not built: run `pip install .`")
    assert "missing: _C is not built: run `pip install .`" in section("native module")
    assert "ops reference" in what_runs(wave, "auto", "auto")


def test_bundled_models(monkeypatch):
    module = sys.modules[doctor.__module__]
    for name in bundled_models() or ["none"]:
        assert name in section("bundled models")
    monkeypatch.setattr(module, "bundled_models", lambda: ["a-model", "b-model"])
    assert section("bundled models").split() == ["a-model", "b-model"]
    monkeypatch.setattr(module, "bundled_models", list)
    assert section("bundled models").split() == ["none"]


def test_engines():
    assert re.search(r"^  eager +\S", section("engines"), re.MULTILINE)


def test_what_runs_says_precision_and_device():
    model = tiny_unet()
    for precision in ("fp32", "bf16"):
        line = what_runs(model, "auto", precision)
        assert re.fullmatch(rf"engine \w+, {precision}, cpu with \d+ threads, .+", line)
    assert ", fp32, " in what_runs(wave, "auto", "auto")  # a callable of unknown needs
    assert f"{torch.get_num_threads()} threads" in what_runs(model, "auto", "auto")


def test_the_command_prints_it(capsys):
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out == doctor() + "\n"
