"""The emulator finds what is wrong, and the CUDA kernels pass once more under its checking builds.

That they are right is in the tests of the ops, where the backend "cuda" is the plain build.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import cuda_on_cpu
import pytest
import test_group_norm_silu as group_norm
import torch
from compare import DTYPES, LAYOUTS, assert_exact, in_layout, table, timesteps
from conftest import available

from fastddpm import ops, reference
from fastddpm.ops import dispatch

HERE = Path(__file__).parent
# Without what only repeats the same kernels on more or larger cases.
MATRIX = "cuda and not compile and not million and not sum_to_one and not every_step and not 257"

# kernel -> what finds its mistake, in which builds
WRONG = {
    "past_the_end": {"address": "heap-buffer-overflow"},
    "past_shared": {"address": "out of bounds|global-buffer-overflow"},
    "past_dynamic_shared": {"address": "heap-buffer-overflow"},
    "misaligned": {"address": "misaligned address"},
    "reverse": {"races": "a race in shared memory"},
    "exchange": {"races": "a race in shared memory"},
    "between_blocks": {"races": "a race in global memory"},
    **{
        name: dict.fromkeys(cuda_on_cpu.BUILDS, message)
        for name, message in {
            "half_a_warp": "deadlock",
            "two_masks": "mask names a lane that is not there",
            "barrier_in_a_branch": "wait at different __syncthreads",
            "shared_limit": "invalid argument",
        }.items()
    },
}
CASES = [(name, build) for name, builds in WRONG.items() for build in builds]


def sanitized(**options: str) -> dict[str, str]:
    """The environment in which a sanitizer's error ends the process; leaks are Python's affair."""
    return {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", **options}


@pytest.mark.parametrize(("name", "build"), CASES)
def test_every_mistake_is_found(name, build):
    program = available(lambda: cuda_on_cpu.wrong_kernels(build))
    runs = [
        subprocess.run(
            [program, kernel], env=sanitized(), capture_output=True, text=True, timeout=60
        )
        for kernel in (name, f"{name}_wrong")
    ]
    assert runs[0].returncode == 0, runs[0].stderr
    assert runs[1].returncode != 0
    assert re.search(WRONG[name][build], runs[1].stderr), runs[1].stderr


# torch's products, or Triton's, with kernels of ours around them.
WITHOUT_KERNELS = {
    *("attention_block", "attention_block_backward"),
    *("convolution", "convolution_backward"),
}


@pytest.mark.slow
@pytest.mark.parametrize("build", ["address", "races"])
def test_the_ops_pass_in_a_checking_build(build):
    available(lambda: cuda_on_cpu.library(build))
    options = {"FASTDDPM_CUDA_ON_CPU": build, "FASTDDPM_REQUIRE_BACKENDS": "cuda"}
    options["CUDA_VISIBLE_DEVICES"] = ""  # a card would take the tensors and run its own kernels
    if build == "address":
        options["LD_PRELOAD"] = cuda_on_cpu.sanitizer_libraries()
    files = [
        str(HERE / f"test_{op}.py")
        for op in (
            *("randn", "choices", "noise", "posterior_step"),
            *("group_norm_silu", "group_norm_silu_fused", "residual_sum"),
            *("discretized_log_likelihood", "squared_error", "vlb_term", "adam"),
        )
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", "-k", MATRIX, *files],
        env=sanitized(**options), cwd=HERE.parent, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    assert re.search(r"\d+ passed", done.stdout)
    assert "skipped" not in done.stdout.splitlines()[-1]
    called = re.findall(r"^calls of CUDA on the CPU, build (\w+): (.+)$", done.stdout, re.MULTILINE)
    assert [name for name, _ in called] == [build]
    counts = dict(part.split() for part in called[0][1].split(", "))
    assert set(dispatch.OPS) - WITHOUT_KERNELS <= counts.keys()
    assert all(int(n) > 10 for n in counts.values())


def test_what_is_forced_is_the_emulated_module(emulated):
    """And no card's, where there is one: its kernels would not be looked at."""
    before = cuda_on_cpu.CALLS["plain", "randn"]
    x = ops.randn((2, 3), seed=1, step=2)
    assert cuda_on_cpu.CALLS["plain", "randn"] == before + 1
    assert x.device.type == "cpu"
    assert dispatch.load("cuda").module.module is emulated
    assert emulated.__name__ == cuda_on_cpu.NAME


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "groups", "shared"),
    [
        ((2, 32, 40, 17), 8, 16 << 10),
        ((1, 24, 33, 20), 4, 48 << 10),  # three threads side by side
        ((2, 4, 48, 32), 4, 8 << 10),
        ((1, 6, 50, 31), 1, 16 << 10),
    ],
)
def test_slabs_that_do_not_fit_shared_memory(emulated, shape, groups, shared, dtype, layout):
    emulated.set_device(shared, 132)
    x, parameters = group_norm.inputs(shape, dtype, "cpu", layout)
    group_norm.check(x, groups, parameters, torch.randn(shape).to(dtype))
    x = in_layout((torch.randn(shape) * 0.1 + 1000).to(torch.float32), layout)
    y = ops.group_norm_silu(x, groups, None, None)
    assert_exact(y, reference.group_norm_silu(x.double(), groups, None, None), ulps=16)


WIDE = {torch.float32: 16, torch.bfloat16: 16, torch.float16: 16, torch.uint8: 8}


def assert_once(watch, *, reads, writes):
    """Of tensor k: each byte is read reads[k] times and written writes[k] times, 16 at once."""
    for counts, x, read, written in zip(watch.counts, watch.tensors, reads, writes, strict=True):
        size = x.numel() * x.element_size()
        assert (counts["read"], counts["written"]) == (read * size, written * size)
        wide = WIDE[x.dtype]
        assert (counts["reads"], counts["writes"]) == (read * size // wide, written * size // wide)


@pytest.mark.parametrize("emulated", ["races"], indirect=True)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_moves_once_in_whole_vectors(emulated, dtype, layout):
    def image(shape, dtype=dtype):
        x = torch.randint(0, 256, shape) if dtype == torch.uint8 else torch.randn(shape)
        return in_layout(x.to(dtype), layout)

    t, tab = timesteps(2), table()
    stream = {"seed": 1, "sample_index": torch.arange(2)}
    x, y = image((2, 3, 16, 16)), image((2, 3, 16, 16))
    with cuda_on_cpu.Watch(x, y) as watch:
        ops.posterior_step(x, y, t, tab, out=x, **stream)
    assert_once(watch, reads=(1, 1), writes=(1, 0))
    pixels = image(x.shape, torch.uint8)
    with cuda_on_cpu.Watch(pixels, y) as watch:
        ops.noise(pixels, t, tab, eps=y, flip=torch.tensor([False, False]))
    assert_once(watch, reads=(1, 1), writes=(0, 0))
    x, grad = image((2, 64, 8, 8)), image((2, 64, 8, 8))
    with cuda_on_cpu.Watch(x) as watch:
        ops.group_norm_silu(x, 16, None, None)
    assert_once(watch, reads=(1,), writes=(0,))
    leaf = x.clone().requires_grad_()
    y = ops.group_norm_silu(leaf, 16, None, None)
    with cuda_on_cpu.Watch(leaf, grad) as watch:
        y.backward(grad)
    assert_once(watch, reads=(1, 1), writes=(0, 0))


def fused_images(dtype, layout="nhwc"):
    """x, x2, residual or a gradient like x, and one like y; then room for three outputs like x, x2
    and y. A group of four channels spans no border, a block's slab does.
    """
    shapes = [(2, c, 8, 8) for c in (40, 24, 40, 64, 40, 24, 64)]
    return [in_layout(torch.randn(shape).to(dtype), layout) for shape in shapes]


@pytest.mark.parametrize("emulated", ["races"], indirect=True)
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_fused_is_no_walk_of_its_own(emulated, dtype, passes):
    """x, the residual and x2 are read and y and u written once. Where the slab does not fit, the
    second pass reads u and x2, and the gradient's second and third what they differentiate."""
    x, x2, more, grad, u, dx2, y = fused_images(dtype)
    before, parameter, index = torch.randn(2, 40), torch.randn(64), torch.arange(2)
    norm = 16, parameter, parameter, 1e-6, None, None, True
    drawn = 0.25, 7, index, index
    emulated.set_device(227 << 10 if passes == 1 else 3 << 10, 132)
    work = torch.empty(emulated.group_norm_workspace(2, 64, 16, True))
    forward = torch.empty(emulated.group_norm_workspace(2, 64, 16, False))
    with cuda_on_cpu.Watch(x, x2, more, y, u) as watch:
        emulated.group_norm_silu(x, y, *norm, before, more, u, x2, *drawn, None, None, forward, 0)
    again = passes - 1
    assert_once(watch, reads=(1, passes, 1, 0, again), writes=(0, 0, 0, 1, 1))
    for out in (y, u):
        assert out.isfinite().all()
    dx, dbefore = torch.empty_like(x), torch.empty(2, 40)
    with cuda_on_cpu.Watch(u, x2, grad, more, dx, dx2) as watch:
        emulated.group_norm_silu_backward(
            grad, u, *norm, before, x2, more, *drawn,
            dx, None, None, None, None, dbefore, dx2, work, 0,
        )  # fmt: skip
    reads = (1 + 2 * again, 1 + 2 * again, passes, 1, 0, 0)
    assert_once(watch, reads=reads, writes=(0, 0, 0, 0, 1, 1))
    with cuda_on_cpu.Watch(x, more, u) as watch:
        emulated.residual_sum(x, more, before, u, 0)
    assert_once(watch, reads=(1, 1, 0), writes=(0, 0, 1))


def test_a_seed_on_the_device_is_the_same_stream(emulated):
    """Read when a kernel runs, by every op that draws."""
    seed, index, step = 2**63 + 5, torch.arange(2), torch.tensor([3, 2**32 - 2])
    on_device = torch.tensor([seed - 2**64])
    x, t, tab, y = torch.randn(2, 4, 3, 5), timesteps(2), table(), torch.empty(2, 4, 3, 5)
    work = torch.empty(emulated.group_norm_workspace(2, 4, 2, False))

    def results(seed):
        emulated.randn(y, seed, step, index, 0)
        yield y.clone()
        emulated.noise(x, y, torch.empty_like(x), seed, step, index, t, None, tab, 0)
        yield y.clone()
        emulated.posterior_step(
            x, x, None, None, y, seed, step, index, t, tab, "eps", True, False, 0
        )
        yield y.clone()
        emulated.group_norm_silu(
            *(x, y, 2, None, None, 1e-6, None, None, True, None, None, None, None),
            *(0.5, seed, step, index, None, None, work, 0),
        )
        yield y.clone()

    for a, b, c in zip(results(seed), results(on_device), results(seed + 1), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
