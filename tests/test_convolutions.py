"""benchmarks/convolutions.py: a row a shape of the plan's layers, checked before they are timed."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

import fastddpm
from fastddpm import _native

if _native.C is None:
    pytest.skip(_native.reason, allow_module_level=True)

FILE = Path(__file__).parents[1] / "benchmarks" / "convolutions.py"
QUICK = ("--quick", "--repeats=2", "--batch=2", "--threads=1")


@pytest.fixture
def convolutions(monkeypatch):
    spec = importlib.util.spec_from_file_location("benchmark_convolutions", FILE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    monkeypatch.setattr(sys, "path", list(sys.path))
    threads = torch.get_num_threads()
    spec.loader.exec_module(module)
    yield module
    torch.set_num_threads(threads)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_layer_is_in_one_row(convolutions, tmp_path, capsys, precision):
    file = tmp_path / "x.json"
    assert convolutions.main([*QUICK, f"--json={file}", f"--precision={precision}"]) == 0
    report = json.loads(file.read_text(encoding="utf-8"))
    rows, printed = report["rows"], capsys.readouterr().out
    model = convolutions.make_model("cifar10", quick=True)
    plan = convolutions.build_plan(model, *model.image_size, precision=precision)
    assert sum(row["layers"] for row in rows) == len(plan.layers())
    assert sum(row["share"] for row in rows) == pytest.approx(1.0)
    assert [row["ms"] for row in rows] == sorted((row["ms"] for row in rows), reverse=True)
    work = 2 * sum(layer[-1] for layer in plan.layers())  # of two images
    total = sum(row["GFLOP/s"] * 1e9 * row["ms"] / 1e3 for row in rows)
    assert total == pytest.approx(work)
    if precision == "bf16":
        assert {row["algorithm"] for row in rows} >= {"bf16", "attention"}
    kinds = {(row["kernel"], row["stride"], row["repeat"]) for row in rows}
    assert kinds == {(3, 1, 1), (3, 2, 1), (3, 1, 2), (1, 1, 1), (0, 1, 1)}
    for row in rows:
        if report["ceiling GFLOP/s"] is None:
            assert precision == "bf16"
            assert "of ceiling" not in row
        else:
            assert row["of ceiling"] == pytest.approx(row["GFLOP/s"] / report["ceiling GFLOP/s"])
        assert f"{row['height']}x{row['width']}" in printed
        if row["kernel"]:
            assert row["x torch"] == pytest.approx(row["torch ms"] / row["ms"])
            assert row["alone x torch"] > 0
            own = "bf16" if row["algorithm"] == "bf16" else "fp32"
            for error, kind in ((row["torch error"], precision), (row["error"], own)):
                assert {"fp32": 0, "bf16": 1e-3}[kind] < error < convolutions.ALLOWED[kind]
        else:
            assert "torch ms" not in row


@pytest.mark.parametrize("padding", [0, 1])
def test_conv2d_computes_what_the_network_does(convolutions, padding):
    """Of each kind of layer on the plan's input: with its stride, border and upsampling."""
    model = fastddpm.UNet(
        channels=32, channel_mult=(1, 2), num_res_blocks=1, image_size=8,
        downsample_padding=padding,
    )  # fmt: skip
    model = convolutions.make_model("cifar10", quick=True) if padding == 0 else model
    for layers in convolutions.layers_of(model, convolutions.build_plan(model, 8, 8)):
        if not layers.shape.kernel:
            continue
        x, shape = layers.input(1), layers.shape
        name = next(
            name for name, part in model.named_modules()
            if getattr(part, "weight", None) is not None
            and part.weight.data_ptr() == layers.weight.data_ptr()
        )  # fmt: skip
        owner = model.get_submodule(name.rpartition(".")[0])
        resampling = "Upsample" if shape.repeat == 2 else "Downsample"
        with torch.no_grad():
            if shape.repeat == 2 or shape.stride == 2:
                assert type(owner).__name__ == resampling
                wanted = owner(x)
            elif shape.kernel == 3:
                wanted = model.get_submodule(name)(x)
            else:
                wanted = torch.einsum("nchw,oc->nohw", x, layers.weight[:, :, 0, 0])
                wanted += layers.bias[:, None, None]
            padded, border = layers.padded(x)
            got = torch.nn.functional.conv2d(
                padded, layers.weight, layers.bias, shape.stride, border
            )
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("who", ["cpu_plan", "conv2d"])
def test_nothing_is_timed_that_computes_something_else(convolutions, monkeypatch, capsys, who):
    conv2d, plan = torch.nn.functional.conv2d, _native.C.cpu.Plan

    def wrong(x, *arguments):
        y = conv2d(x, *arguments)
        return y if x.dtype == torch.float64 else y * 1.01

    class Wrong:
        def __init__(self, *arguments, **options):
            self.plan = plan(*arguments, **options)

        def __getattr__(self, name):
            return getattr(self.plan, name)

        def forward(self, x, time, out, threads):
            self.plan.forward(x, time, out, threads)
            out *= 1.01

    if who == "conv2d":
        monkeypatch.setattr(convolutions.F, "conv2d", wrong)
    else:
        monkeypatch.setattr(_native.C.cpu, "Plan", Wrong)
    assert convolutions.main(list(QUICK)) == 1
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert f"{who} is off by 0.01 in 3x3, stride 2" in lines
    assert all(line.startswith(who) for line in lines)
    assert "x torch" not in captured.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch=0",), "must be at least 1"),
        (("--model=nowhere",), "model 'nowhere'"),
        (("--algorithm=fft",), "algorithm must be"),
    ],
)
def test_mistakes_are_one_line(convolutions, capsys, arguments, message):
    with pytest.raises(SystemExit):
        convolutions.main([*QUICK, *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_shape_has_both_gradients(convolutions, tmp_path, capsys, precision):
    file = tmp_path / "x.json"
    arguments = [*QUICK, "--backward", f"--json={file}", f"--precision={precision}"]
    assert convolutions.main(arguments) == 0
    report = json.loads(file.read_text(encoding="utf-8"))
    rows, printed = report["rows"], capsys.readouterr().out
    model = convolutions.make_model("cifar10", quick=True)
    plan = convolutions.build_plan(model, *model.image_size, precision=precision)
    work = 2 * sum(layer[-1] for layer in plan.layers() if layer[-2])  # of two images
    for kind in ("data", "weight"):
        of_kind = [row for row in rows if row["kind"] == kind]
        assert sum(row["GFLOP/s"] * row["ms"] * 1e6 for row in of_kind) == pytest.approx(work)
        assert {(row["kernel"], row["stride"], row["repeat"]) for row in of_kind} == {
            (3, 1, 1), (3, 2, 1), (3, 1, 2), (1, 1, 1),
        }  # fmt: skip
    for row in rows:
        assert row["x torch"] == pytest.approx(row["torch ms"] / row["ms"])
        assert f"{row['height']}x{row['width']}" in printed


def test_a_wrong_gradient_is_not_shown(convolutions, monkeypatch, capsys):
    gradients = convolutions.convolution_gradients
    ours = gradients.Gradients.ours
    monkeypatch.setattr(gradients.Gradients, "ours", lambda self, kind: ours(self, kind) * 1.01)
    assert convolutions.main([*QUICK, "--backward"]) == 1
    assert "ops.convolution is off by 0.01" in capsys.readouterr().err
