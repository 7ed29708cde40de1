"""Compiles every Triton kernel for a GPU that need not be there, through the functions that launch
them: `python compile_triton.py 80 bfloat16 float32` prints one JSON line for each kernel that came
out, in the first dtype one for each way to compile it.

A child process of test_triton.py: there the interpreter is on, and nothing is compiled.
"""

from __future__ import annotations

import functools
import json
import re
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
    choices,
    discretized_log_likelihood,
    group_norm_silu,
    noise,
    philox,
    posterior_step,
)

WIDE = re.compile(r"cp\.async\.c[ag]\S* \[.*\], \[.*\], 0x10|ld\.global\S*\.v4\.[bu]32")
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


def report(kernel: CompiledKernel, dtype: str) -> None:
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
        "dtype": dtype,
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
    }
    line["wide"] = len(WIDE.findall(kernel.asm["ptx"]))  # loads of 16 bytes a thread
    line |= {"registers": int(words["REG"]), "stack": int(words["STACK"])}
    print(json.dumps(line), flush=True)


def init_handles(kernel: CompiledKernel, dtype: str) -> None:
    if kernel.module is None:
        report(kernel, dtype)
        kernel.module = kernel.function = "compiled"
        # Before triton 3.5 what launches was an attribute `run`, then a property that reads `_run`.
        launch = "_run" if isinstance(getattr(type(kernel), "run", None), property) else "run"
        setattr(kernel, launch, lambda *arguments: None)


def image(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


def launch_attention(x: torch.Tensor, groups: int, heads: int) -> None:
    c = x.shape[1]
    vector, square, wide = torch.zeros(c), torch.zeros(c, c), torch.zeros(3 * c, c)
    parameters = groups, vector, vector, wide, wide[:, 0], square, vector
    attention_block.attention_block(x, *parameters, num_heads=heads)
    attention_block.attention_block_backward(x, x, *parameters, heads, 1e-6)


def launch_every_kernel(dtype: torch.dtype) -> None:
    t, table, stream = torch.tensor([0, 999]), Schedule.linear().table(), {"seed": 3}
    stream["sample_index"] = torch.arange(2)
    x = image(2, 64, 8, 8, dtype=dtype)
    c, m = torch.zeros(64), torch.zeros(2, 64)
    philox.randn(x.shape, step=5, dtype=dtype, **stream)
    choices.choices(stream["sample_index"], seed=3, step=5, levels=1000)
    noise.noise(x.byte(), t, table, dtype=dtype, flip=t > 0, **stream)
    posterior_step.posterior_step(x, x, t, table, out=x, **stream)
    discretized_log_likelihood.discretized_log_likelihood(x, x, x)
    group_norm_silu.group_norm_silu(x, 8, c, c, scale=m, shift=m)
    group_norm_silu.group_norm_silu_backward(x, x, 8, c, c, 1e-6, m, m, True)
    many_tiles = torch.zeros(2, 64, 64, 64, dtype=dtype)
    group_norm_silu.group_norm_silu_backward(many_tiles, many_tiles, 8, c, c, 1e-6, m, m, True)
    launch_attention(image(128, 256, 8, 8, dtype=dtype), 32, 1)  # programs for a whole GPU


def launch_other_ways(dtype: torch.dtype) -> None:
    t, table = torch.tensor([0, 999]), Schedule.linear().table()
    x, many_tiles = image(2, 64, 8, 8, dtype=dtype), image(2, 64, 64, 64, dtype=dtype)
    whole = image(2, 64, 32, 32, dtype=dtype)  # a slab that a program just holds
    c, m = torch.zeros(64), torch.zeros(2, 64)
    posterior_step.posterior_step(x, x, t, table, z=x, log_variance=x)
    group_norm_silu.group_norm_silu(many_tiles, 8, c, c, scale=m, shift=m)
    for slab in (many_tiles, whole):
        group_norm_silu.group_norm_silu_backward(slab, slab, 8, c, c, 1e-6, m, m, True)
    launch_attention(image(128, 256, 8, 8, dtype=dtype), 32, 2)
    for heads in (1, 2, 8):  # wider than a tile, as wide, and narrow; few programs
        launch_attention(image(1, 512, 8, 8, dtype=dtype), 32, heads)
    x = torch.zeros(1, 4, 1, 1, dtype=dtype)  # sizes of 1 are constants to the compiler
    noise.noise(x, t[:1], table, eps=x, flip=t[:1] > 0)
    posterior_step.posterior_step(x, x, t[:1], table[:1], seed=1, sample_index=t[:1])
    group_norm_silu.group_norm_silu(x, 4, c[:4], c[:4])
    group_norm_silu.group_norm_silu_backward(x, x, 4, c[:4], c[:4], 1e-6, None, None, True)
    launch_attention(torch.zeros(1, 16, 1, 1, dtype=dtype), 4, 1)


if __name__ == "__main__":
    triton.runtime.driver.set_active(Driver(int(sys.argv[1])))
    for place, name in enumerate(sys.argv[2:]):
        CompiledKernel._init_handles = functools.partialmethod(init_handles, name)
        dtype = getattr(torch, name)
        launch_every_kernel(dtype)
        if place == 0:
            launch_other_ways(dtype)
