"""benchmarks/gpu_static.py: what it reads out of the compilers' words, and its models."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import cuda_on_cpu
import pytest
import torch
from conftest import REQUIRED

from fastddpm import ops
from fastddpm.ops import dispatch

FILE = Path(__file__).parents[1] / "benchmarks" / "gpu_static.py"

PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN8fastddpm4tileIfLi3EEEvi' for 'sm_90'
ptxas info    : Function properties for _ZN8fastddpm4tileIfLi3EEEvi
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 16 bytes cumulative stack size
ptxas info    : Compiling entry function '_ZN8fastddpm5otherEv' for 'sm_90'
ptxas info    : Function properties for _ZN8fastddpm5otherEv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 18 registers, used 1 barriers, 4096 bytes smem
"""


@pytest.fixture(scope="module")
def gpu_static():
    spec = importlib.util.spec_from_file_location("gpu_static", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_static"] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def test_what_ptxas_says(gpu_static):
    first, second = gpu_static.parse_ptxas(PTXAS, "90")
    assert (first.registers, first.spills, first.stack, first.static_shared) == (64, 12, 16, 0)
    assert (second.registers, second.spills, second.static_shared) == (18, 0, 4096)
    if shutil.which("c++filt"):
        assert (first.name[:12], second.name) == ("tile<float, ", "other")


def test_it_compiles_as_the_build_does(gpu_static):
    text = (FILE.parents[1] / "CMakeLists.txt").read_text(encoding="utf-8")
    flags = re.findall(r"COMPILE_LANGUAGE:CUDA>:([^>]+)>", text)
    assert flags
    assert set(flags) <= set(gpu_static.FLAGS)


def test_occupancy(gpu_static):
    """Of the limits, each once the one that binds: threads, blocks, registers, shared memory."""
    gpu = gpu_static.GPUS["90"]

    def occupancy(registers, threads, shared):
        kernel = gpu_static.Kernel("90", "cuda", "k", registers, 0, 0, 0, threads, shared)
        return gpu_static.occupancy(kernel, gpu)

    assert occupancy(32, 256, 0) == 1.0
    assert occupancy(16, 32, 0) == 0.5
    assert occupancy(128, 256, 0) == 0.25
    assert occupancy(32, 256, 113 << 10) == 0.25
    assert occupancy(255, 256, 0) == 0.125


@pytest.mark.parametrize("backward", [False, True])
def test_the_models_of_group_norm_are_what_is_launched(gpu_static, backward):
    name = "group_norm_silu_backward" if backward else "group_norm_silu"
    case = next(case for case in gpu_static.cases() if case.op == name)
    try:
        emulated = cuda_on_cpu.as_cuda_backend()
        x = torch.randn(1, 128, 32, 32).to(torch.bfloat16, memory_format=torch.channels_last)
        with emulated as module, dispatch.use_backend("cuda"):
            ops.group_norm_silu(x, 32, None, None)
            if backward:
                arguments = x, x, 32, None, None, 1e-6, None, None, True
                dispatch.load("cuda").module.group_norm_silu_backward(*arguments)
            launch = module.last_launch()
    except cuda_on_cpu.Unavailable as reason:
        (pytest.fail if "cuda" in REQUIRED else pytest.skip)(str(reason))
    assert launch == (case.threads, case.shared)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_one_architecture(gpu_static, tmp_path, capsys):
    """Kernels without spills, a table and a file; posterior_step stands for all."""
    file = tmp_path / "static.json"
    assert gpu_static.main(["--arch", "90", "--json", str(file), "--source", "posterior_step"]) == 0
    result = json.loads(file.read_text())
    kernels = {kernel["name"]: kernel for kernel in result["kernels"] if kernel["source"] == "cuda"}
    assert len(kernels) == 11
    assert all(0 < kernel["registers"] <= 255 for kernel in kernels.values())
    printed = capsys.readouterr().out
    assert "Modelled, not measured" in printed
    assert all(name in printed for name in kernels)
    assert next(c.kernel for c in gpu_static.cases() if c.op == "posterior_step") in kernels
    for case in result["modelled_not_measured"]:
        assert case["least"] <= case["moved"] <= case["eager"]
        assert case["microseconds"] > 0


def test_spills_are_an_error(gpu_static, monkeypatch, capsys):
    kernels = gpu_static.parse_ptxas(PTXAS, "90")
    monkeypatch.setattr(gpu_static, "cuda_kernels", lambda *_: kernels)
    monkeypatch.setattr(gpu_static, "triton_kernels", lambda *_: [])
    monkeypatch.setattr(gpu_static.shutil, "which", lambda name: name)
    assert gpu_static.main(["--arch", "90"]) == 1
    assert "spills: " in capsys.readouterr().err


def test_the_step_is_counted_in_a_process_of_its_own(gpu_static, monkeypatch):
    ran = []
    monkeypatch.setattr(gpu_static, "cuda_kernels", lambda *_: [])
    monkeypatch.setattr(gpu_static, "triton_kernels", lambda *_: [])
    monkeypatch.setattr(gpu_static.shutil, "which", lambda name: name)
    monkeypatch.setattr(gpu_static.subprocess, "run", lambda command, **_: ran.append(command))
    assert gpu_static.main(["--arch", "90"]) == 0
    assert ran == []
    assert gpu_static.main(["--arch", "90", "--step"]) == 0
    assert ran == [[sys.executable, FILE.with_name("gpu_step.py")]]
    assert ran[0][1].is_file()
