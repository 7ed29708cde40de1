"""Compiles every Triton kernel for a GPU that need not be there, through the functions that launch
them: `python compile_triton.py 80 bfloat16` prints one JSON line for each kernel that came out.

A child process of test_triton.py: there the interpreter is on, and nothing is compiled.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel

from fastddpm import Schedule, _native  # noqa: F401  lets fastddpm.kernels be found
from fastddpm.kernels import (
    attention_block,
    discretized_log_likelihood,
    group_norm_silu,
    noise,
    philox,
    posterior_step,
)

HEADS = (1, 8)  # of 512 channels: wider than a tile, and a tile
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Driver:
    """A GPU of one compute capability that launches nothing."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def map_python_to_cpp_type(self, name):
        return name

    @staticmethod
    def is_active():
        return True


def report(kernel: CompiledKernel) -> None:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [str(TOOLS / "cuobjdump"), "--dump-resource-usage", file.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    words = dict(w.split(":") for line in usage.splitlines() for w in line.split() if ":" in w[:-1])
    line = {
        "kernel": kernel.name,
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
    }
    line |= {"registers": int(words["REG"]), "stack": int(words["STACK"])}
    print(json.dumps(line), flush=True)


def init_handles(kernel: CompiledKernel) -> None:
    if kernel.module is None:
        report(kernel)
        kernel.module = kernel.function = "compiled"
        kernel._run = lambda *arguments: None


def launch_everything(dtype: torch.dtype) -> None:
    t, table, stream = torch.tensor([0, 999]), Schedule.linear().table(), {"seed": 3}
    stream["sample_index"] = torch.arange(2)
    x = torch.zeros(2, 64, 8, 8, dtype=dtype).contiguous(memory_format=torch.channels_last)
    c, m = torch.zeros(64), torch.zeros(2, 64)
    philox.randn(x.shape, step=5, dtype=dtype, **stream)
    noise.noise(x.byte(), t, table, dtype=dtype, flip=t > 0, **stream)
    posterior_step.posterior_step(x, x, t, table, out=x, **stream)
    posterior_step.posterior_step(x, x, t, table, z=x, log_variance=x)
    discretized_log_likelihood.discretized_log_likelihood(x, x, x)
    for image in (x, torch.zeros(2, 64, 64, 64, dtype=dtype)):  # in one tile, and in many
        group_norm_silu.group_norm_silu(image, 8, c, c, scale=m, shift=m)
        group_norm_silu.group_norm_silu_backward(image, image, 8, c, c, 1e-6, m, m, True)
    x = torch.zeros(1, 4, 1, 1, dtype=dtype)  # sizes of 1 are constants to the compiler
    noise.noise(x, t[:1], table, eps=x, flip=t[:1] > 0)
    posterior_step.posterior_step(x, x, t[:1], table, seed=1, sample_index=t[:1])
    group_norm_silu.group_norm_silu(x, 4, c[:4], c[:4])
    group_norm_silu.group_norm_silu_backward(x, x, 4, c[:4], c[:4], 1e-6, None, None, True)
    x = torch.zeros(1, 512, 8, 8, dtype=dtype).contiguous(memory_format=torch.channels_last)
    c, square, wide = torch.zeros(512), torch.zeros(512, 512), torch.zeros(3 * 512, 512)
    parameters = 32, c, c, wide, wide[:, 0], square, c
    for heads in HEADS:
        attention_block.attention_block(x, *parameters, num_heads=heads)
        attention_block.attention_block_backward(x, x, *parameters, heads, 1e-6)


if __name__ == "__main__":
    CompiledKernel._init_handles = init_handles
    triton.runtime.driver.set_active(Driver(int(sys.argv[1])))
    launch_everything(getattr(torch, sys.argv[2]))
