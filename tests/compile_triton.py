"""Compiles every Triton kernel for a GPU that need not be there, through the functions that launch
them: `python compile_triton.py 80 bfloat16 float32` prints one JSON line for each kernel that came
out, in the first dtype one for each way to compile it. `compile_triton.py 80 --batches bfloat16`
launches the ops of a sample for several batches.

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
    adam,
    attention_block,
    choices,
    discretized_log_likelihood,
    group_norm_silu,
    group_norm_silu_backward,
    noise,
    philox,
    posterior_step,
    residual_sum,
    squared_error,
    vlb_term,
)

WIDE = re.compile(r"cp\.async\.c[ag]\S* \[.*\], \[.*\], 0x10|ld\.global\S*\.v4\.[bu]32")
ELEMENT = re.compile(r"(?:ld|st)\.global\S*\.b16")  # of two bytes
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
    line["elements"] = len(ELEMENT.findall(kernel.asm["ptx"]))
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


def launch_norm(x: torch.Tensor, groups: int, x2: torch.Tensor | None = None) -> None:
    """group_norm_silu of cat(x, x2) and its gradient, with all that they can take in."""
    n, c = x.shape[0], x.shape[1] + (0 if x2 is None else x2.shape[1])
    vector, matrix, before = (x.new_zeros(size) for size in (c, (n, c), (n, x.shape[1])))
    stream = {"dropout": 0.1, "seed": 3, "step": torch.arange(n), "sample_index": torch.arange(n)}
    y, _ = group_norm_silu.group_norm_silu(
        x, groups, vector, vector, scale=matrix, shift=matrix,
        before=before, residual=x, x2=x2, **stream,
    )  # fmt: skip
    group_norm_silu_backward.group_norm_silu_backward(
        y, x, groups, vector, vector, 1e-6, matrix, matrix, True, before, x2, x, **stream
    )


def launch_plain_norm(x: torch.Tensor, groups: int) -> None:
    vector = x.new_zeros(x.shape[1])
    group_norm_silu.group_norm_silu(x, groups, vector, vector)
    group_norm_silu_backward.group_norm_silu_backward(
        x, x, groups, vector, vector, 1e-6, None, None, True
    )


def launch_adam(dtype: torch.dtype) -> None:
    """Of gradients of this dtype, with all that is kept and without."""
    p, g, number = torch.zeros(8192), torch.zeros(8192, dtype=dtype), torch.zeros(())
    copies = [torch.zeros(8192, dtype=dtype)]
    options = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "clip": 1.0, "grad_scale": 1.0}
    for averages, rounded in (([p], copies), ([], [])):
        adam.adam(
            [p], [g], [p], [p], [number], averages, rounded,
            lr=number, share=number, norm=number, refused=number, **options,
        )  # fmt: skip
    adam.grad_norm([g])


def launch_squared_error(x: torch.Tensor) -> None:
    squared_error.squared_error(x, x)
    squared_error.squared_error_backward(torch.zeros(len(x)), x, x)


def launch_vlb_term(x: torch.Tensor, t: torch.Tensor, table: torch.Tensor) -> None:
    ratio = table[:, 7].contiguous()
    vlb_term.vlb_term(x.byte(), x, x, t, table, ratio, log_variance=x)


def launch_batches(dtype: torch.dtype) -> None:
    """What must not know how many samples there are."""
    table = Schedule.linear().table()
    for n in (1, 2, 16, 33):
        x, t = image(n, 64, 8, 8, dtype=dtype), torch.arange(n)
        for norm_of in (x, image(n, 64, 64, 64, dtype=dtype)):
            launch_norm(norm_of, 8)
        residual_sum.residual_sum(x, x, torch.zeros(n, 64))
        philox.randn(x.shape, seed=3, step=t, sample_index=t)
        noise.noise(x, t, table, eps=x)
        posterior_step.posterior_step(x, x, t, table, seed=3, sample_index=t)
        discretized_log_likelihood.discretized_log_likelihood(x, x, x)
        launch_squared_error(x)
        launch_vlb_term(x, t, table)


def launch_every_kernel(dtype: torch.dtype) -> None:
    t, table, stream = torch.tensor([0, 999]), Schedule.linear().table(), {"seed": 3}
    stream["sample_index"] = torch.arange(2)
    x = image(2, 64, 8, 8, dtype=dtype)
    philox.randn(x.shape, step=5, dtype=dtype, **stream)
    choices.choices(stream["sample_index"], seed=3, step=5, levels=1000)
    noise.noise(x.byte(), t, table, dtype=dtype, flip=t > 0, **stream)
    posterior_step.posterior_step(x, x, t, table, out=x, **stream)
    discretized_log_likelihood.discretized_log_likelihood(x, x, x)
    residual_sum.residual_sum(x, x, torch.zeros(2, 64))
    launch_squared_error(x)
    launch_vlb_term(x, t, table)
    launch_adam(dtype)
    launch_norm(image(2, 128, 32, 32, dtype=dtype), 32)  # slabs that a program just holds
    launch_norm(image(2, 64, 64, 64, dtype=dtype), 8)  # slabs of many tiles
    launch_attention(image(128, 256, 8, 8, dtype=dtype), 32, 1)  # programs for a whole GPU


def launch_other_ways(dtype: torch.dtype) -> None:
    t, table = torch.tensor([0, 999]), Schedule.linear().table()
    x, seed = image(2, 64, 8, 8, dtype=dtype), torch.tensor([3])
    posterior_step.posterior_step(x, x, t, table, z=x, log_variance=x)
    options = {"log_variance": x, "learned_range": True, "prediction": "v"}
    posterior_step.posterior_step(x, x, t, table, z=x, **options)
    posterior_step.posterior_step(x, x, t, table, seed=seed, sample_index=t)
    ratio = table[:, 7].contiguous()
    vlb_term.vlb_term(x, None, x, t, table, ratio, seed=3, sample_index=t, prediction="mean")
    options = {"log_variance": x, "learned_range": True, "prediction": "v"}
    vlb_term.vlb_term(x, x, x, t, table, ratio, clip=False, **options)
    halves = image(2, 128, 32, 32, dtype=dtype), image(2, 256, 32, 32, dtype=dtype)
    launch_plain_norm(halves[0], 32)
    launch_norm(halves[0], 32, halves[0])  # no program has channels of both sources
    launch_norm(halves[1], 32, halves[0])  # one has; groups of 12 channels
    launch_norm(image(2, 192, 32, 32, dtype=dtype), 32)  # groups of 6
    launch_plain_norm(image(2, 64, 64, 64, dtype=dtype), 8)
    for size in (8, 64):
        launch_norm(torch.zeros(2, 64, size, size, dtype=dtype), 8)
    launch_attention(image(128, 256, 8, 8, dtype=dtype), 32, 2)
    for heads in (1, 2, 8):  # wider than a tile, as wide, and narrow; few programs
        launch_attention(image(1, 512, 8, 8, dtype=dtype), 32, heads)
    x = torch.zeros(1, 4, 1, 1, dtype=dtype)  # sizes of 1 are constants to the compiler
    noise.noise(x, t[:1], table, eps=x, flip=t[:1] > 0)
    posterior_step.posterior_step(x, x, t[:1], table[:1], seed=1, sample_index=t[:1])
    launch_plain_norm(x, 4)
    launch_norm(x, 4)
    launch_attention(torch.zeros(1, 16, 1, 1, dtype=dtype), 4, 1)


if __name__ == "__main__":
    triton.runtime.driver.set_active(Driver(int(sys.argv[1])))
    batches = sys.argv[2] == "--batches"
    for place, name in enumerate(sys.argv[3 if batches else 2 :]):
        CompiledKernel._init_handles = functools.partialmethod(init_handles, name)
        dtype = getattr(torch, name)
        if batches:
            launch_batches(dtype)
            continue
        launch_every_kernel(dtype)
        if place == 0:
            launch_other_ways(dtype)
