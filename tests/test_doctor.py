"""The doctor's report: everything that can run, and the reason of everything that can't."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from toy import tiny_unet, wave

from fastddpm import _native, cards, cli
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


@pytest.fixture
def faked(monkeypatch):
    """A card that torch speaks of, see faked_card; returns what sets what it says."""
    path = Path(__file__).parent / "faked_card" / "sitecustomize.py"
    spec = importlib.util.spec_from_file_location("faked_card", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def says(**changes):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        for name, value in {**module.SAYS, **changes}.items():
            monkeypatch.setattr(torch.cuda, name, value)

    return says


def built_for(monkeypatch, architectures):
    """As if _C had CUDA kernels for these."""
    info = {**_native.build_info(), "cuda": "13.0", "cuda_architectures": architectures}
    monkeypatch.setattr(_native, "build_info", lambda: info)


@pytest.mark.skipif(_native.C is None, reason=str(_native.reason))
def test_a_card_what_it_has_and_what_auto_takes_on_it(faked, monkeypatch):
    faked()
    built_for(monkeypatch, "80-real,90-real,120-virtual")
    devices = section("devices")
    for line in (
        r"cuda:0 +A faked card, capability 9\.0, 60\.0 of 80\.0 GiB free",
        r"cuda:0 kernels +machine code of sm_90",
        r"cuda:0 engine 'auto' +cuda_\w+ in bf16 for a UNet, eager for others",
        r"cuda:0 attention +\w.* \(backend \w+\)",
        r"float32 on a GPU +(float32 in matrix products, attention and convolutions|TF32)",
        r"triton +(\d+\.\d+|not installed)",
    ):
        assert re.search(f"^  {line}", devices, re.MULTILINE), devices


def test_several_cards_and_one_that_can_not_be_used(faked):
    def capability(card):
        index = card if isinstance(card, int) else card.index
        if index == 1:
            raise RuntimeError("CUDA error: device is busy\nand more of it")
        return (8, 0) if index == 0 else (7, 0)

    faked(device_count=lambda: 3, get_device_capability=capability)
    devices = section("devices")
    assert re.search(
        r"^  cuda:1 +can't be used: CUDA error: device is busy$", devices, re.MULTILINE
    )
    assert re.search(r"^  cuda:2 +A faked card, capability 7\.0", devices, re.MULTILINE)
    assert devices.count(" engine 'auto'") == 2
    assert re.findall(r"in (\w+) for a UNet", devices) == ["bf16", "fp32"]


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("80-real,90-real,120-real,120-virtual", (9, 0), "machine code of sm_90"),
        ("80-real,90-real,120-real,120-virtual", (8, 9), "machine code of sm_80"),
        ("80;86", (8, 9), "machine code of sm_86"),
        ("80", (9, 0), "PTX of compute_80, compiled at its first use"),
        ("80-real,90-virtual", (12, 0), "PTX of compute_90, compiled at its first use"),
        ("80-real,120-real,120-virtual", (10, 0), None),
        ("90-real", (8, 0), None),
        ("86-real", (8, 0), None),
        ("90a-real", (9, 0), "machine code of sm_90"),
        ("90a", (10, 0), None),
        ("100f-real", (10, 3), "machine code of sm_100"),
        ("100a-real", (10, 3), None),
        ("", (9, 0), None),
        ("all-major", (9, 0), "what CMake makes of 'all-major'"),
    ],
)  # fmt: skip
def test_what_a_card_runs_of_the_kernels(monkeypatch, architectures, capability, runs):
    assert _native.runs_on(architectures, capability) == runs
    built_for(monkeypatch, architectures)
    monkeypatch.setattr(_native, "C", _native.C or object())
    said = cards.kernels(capability)
    assert said == (runs or "none for capability {}.{}: they were built for {}".format(
        *capability, architectures
    ))  # fmt: skip


def test_kernels_that_were_not_built(monkeypatch):
    monkeypatch.setattr(_native, "build_info", lambda: {"cuda": None, "cuda_architectures": ""})
    monkeypatch.setattr(_native, "C", object())
    assert cards.kernels((9, 0)).startswith("none: fastddpm._C was built without CUDA")
    monkeypatch.setattr(_native, "C", None)
    assert cards.kernels((9, 0)) == "none: fastddpm._C is missing"


@pytest.mark.parametrize("tf32", [True, False])
def test_how_float32_is_multiplied(faked, tf32):
    faked()
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    try:
        matmul.allow_tf32 = tf32
        said = "TF32, as torch is set to" if tf32 else "float32 in matrix products, attention and"
        assert said in section("devices")
    finally:
        matmul.allow_tf32 = before


@pytest.mark.parametrize("backend", ["cuda", "triton", "reference"])
def test_the_way_of_attention_is_the_one_that_is_taken(faked, monkeypatch, backend):
    """The first that can, in the order of the case."""
    faked()

    def load(name):
        return SimpleNamespace(unsupported=lambda *_: None if name == backend else "not here")

    monkeypatch.setattr(cards, "dispatch", SimpleNamespace(load=load, forced=lambda: "auto"))
    for capability, precision in (((9, 0), "bf16"), ((7, 0), "fp32")):
        faked(get_device_capability=lambda card, capability=capability: capability)
        said = cards._attention(torch.device("cuda", 0), precision)
        assert said == f"{cards.ATTENTION[backend]} (backend {backend})"


def test_versions_and_devices():
    versions = section("versions")
    assert re.search(rf"torch +{re.escape(torch.__version__.split('+')[0])}", versions)
    for name in ("python", "numpy", "safetensors", "pillow"):
        assert re.search(rf"^  {name} +\d", versions, re.MULTILINE), name
    devices = section("devices")
    assert f"{torch.get_num_threads()} threads" in devices
    assert re.search(r"^  cuda +(no device|torch was built without CUDA)$", devices, re.MULTILINE)
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
    assert re.findall(r"^  (\w+) +\S", section("engines"), re.MULTILINE) == [
        "cuda_plan", "cuda_graph", "cpu_plan", "eager",
    ]  # fmt: skip
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
