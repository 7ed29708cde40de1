"""How the CUDA kernels of group_norm_silu cut a batch, of any size; launches that fail."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import test_group_norm_silu as group_norm
import torch
from compare import assert_exact, in_layout

from fastddpm import ops, reference
from fastddpm.ops import dispatch

H100 = 227 << 10  # shared memory of a block


def check(shape, groups, dtype=torch.float32, layout="nhwc"):
    x, parameters = group_norm.inputs(shape, dtype, "cpu", layout)
    group_norm.check(x, groups, parameters, torch.randn(shape).to(dtype))


# ---- every size ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "size", "dtype"),
    [
        (120, 8, torch.float32),  # 30 threads side by side, of 256
        (112, 4, torch.float32),  # 28 of 128
        (240, 8, torch.bfloat16),
        (88, 3, torch.bfloat16),  # 11 of 128
        (84, 1, torch.float32),  # 21 of 64
    ],
)
def test_columns_beside_each_other_that_no_warp_is_a_multiple_of(emulated, channels, size, dtype):
    check((2, channels, size, size), 1, dtype)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("shape", "groups", "shared"),
    [
        ((1, 16384, 1, 1), 1, H100),
        ((1, 16384, 2, 2), 1, H100),  # a slab of 256 KB
        ((2, 4098, 1, 2), 2, 48 << 10),
        ((1, 2048, 1, 3), 1, 16 << 10),  # more sums than this device has room for
        ((1, 520, 2, 2), 2, 1 << 10),
        ((1, 64, 5, 5), 8, 512),
    ],
)
def test_a_group_of_any_size(emulated, shape, groups, shared, layout):
    emulated.set_device(shared, 132)
    check(shape, groups, layout=layout)


@pytest.mark.parametrize("shared", [H100, 1 << 10])
def test_two_sources_in_two_passes(emulated, shared):
    """A group spans their border, a vector does or does not; everything at once."""
    emulated.set_device(shared, 132)
    for c1, dtype in ((40, torch.bfloat16), (39, torch.bfloat16), (20, torch.float32)):
        c2, groups = 60 - c1, 4
        x, more, x2 = (in_layout(torch.randn(2, c, 6, 5).to(dtype), "nhwc") for c in (c1, c1, c2))
        before = torch.randn(2, c1)
        options = {
            "residual": more, "before": before, "x2": x2, "dropout": 0.4, "seed": 3,
            "step": 5, "sample_index": torch.arange(2),
        }  # fmt: skip
        y, u = ops.group_norm_silu(x, groups, None, None, **options)
        exact = {k: v.double() if v is not None and torch.is_tensor(v) and v.is_floating_point()
                 else v for k, v in options.items() if k not in ("residual", "before")}  # fmt: skip
        assert_exact(u, reference.residual_sum(x.double(), more.double(), before), ulps=1)
        true = reference.group_norm_silu(u.double(), groups, None, None, **exact)
        assert_exact(y, true, ulps=16 if dtype == torch.float32 else 1)


# ---- few and many vectors ------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [64, 256, 512])
def test_small_images_keep_the_threads_busy(emulated, channels):
    check((2, channels, 4, 4), 32, torch.bfloat16)
    x = torch.randn(1, channels, 4, 4).to(torch.bfloat16, memory_format=torch.channels_last)
    ops.group_norm_silu(x, 32, None, None)
    threads, shared = emulated.last_launch()
    vectors = min(channels * 16 // 8, 256)  # of a block
    assert threads <= vectors
    assert 16 * vectors <= shared <= 48 << 10


def test_a_block_that_has_its_multiprocessor_alone_has_more_threads(emulated):
    """128 channels in 32 groups of 64 x 64 pixels: 128 KB a block."""
    x = torch.randn(1, 16, 64, 64).to(torch.bfloat16, memory_format=torch.channels_last)
    y = ops.group_norm_silu(x, 4, None, None)
    threads, shared = emulated.last_launch()
    assert (threads, shared > H100 // 2) == (512, True)
    assert_exact(y, reference.group_norm_silu(x.double(), 4, None, None), ulps=2)
    ops.group_norm_silu(in_layout(x[..., :32], "nhwc"), 4, None, None)
    assert emulated.last_launch()[0] == 256


@pytest.mark.parametrize("shape", [(5, 64, 4, 4), (3, 16, 9, 8), (3, 96, 1, 1)], ids=str)
@pytest.mark.parametrize("shared", [H100, 2 << 10])
def test_a_sample_is_cut_alike_in_every_batch(emulated, shape, shared):
    emulated.set_device(shared, 132)
    x = torch.randn(shape).to(memory_format=torch.channels_last)
    before, grad = torch.randn(shape[:2]), torch.randn(shape)

    def results(rows):
        leaf = x[rows].clone(memory_format=torch.preserve_format).requires_grad_()
        y = ops.group_norm_silu(leaf, 8, None, None, before=before[rows])
        return y, *torch.autograd.grad(y, leaf, grad[rows])

    whole = results(slice(None))
    for n in range(shape[0]):
        for a, b in zip(results(slice(n, n + 1)), whole, strict=True):
            assert torch.equal(a[0], b[n])


# ---- launches ------------------------------------------------------------------------------------


def test_a_launch_that_fails_leaves_nothing_behind(emulated):
    x = torch.randn(2, 16, 9, 9)
    expected = ops.group_norm_silu(x, 4, None, None)
    for call in (lambda: ops.group_norm_silu(x, 4, None, None), lambda: ops.residual_sum(x)):
        emulated.refuse_launches(1)
        with pytest.raises(RuntimeError, match=r"(norm_silu|residual_sum)_.*: too many resources"):
            call()
        assert emulated.last_error() == 0
    assert torch.equal(ops.group_norm_silu(x, 4, None, None), expected)


def test_an_error_of_somebody_else_is_not_taken_for_ours(emulated):
    x = torch.randn(2, 16, 9, 9)
    expected = ops.group_norm_silu(x, 4, None, None)
    emulated.leave_error()
    try:
        assert torch.equal(ops.group_norm_silu(x, 4, None, None), expected)
        assert emulated.last_error() != 0  # and not taken away
    finally:
        emulated.refuse_launches(1)
        with pytest.raises(RuntimeError):
            ops.group_norm_silu(x, 4, None, None)
    assert emulated.last_error() == 0


def test_shared_memory_is_asked_for_once(emulated):
    """By each kernel on each device, and for all that there is: threads that each asked for what
    their own launch needs would take it from each other."""
    emulated.set_device(H100 - 1, 132)  # one that no test before has asked
    widths = [32 * k for k in (2, 6, 3, 7, 4, 5)]  # of slabs of 64 to 224 KB
    images = [torch.randn(1, 8, 32, w).to(memory_format=torch.channels_last) for w in widths]
    expected = [reference.group_norm_silu(x, 1, None, None) for x in images]
    before = emulated.shared_memory_calls()

    def run(x):
        with dispatch.use_backend("cuda"):
            return ops.group_norm_silu(x, 1, None, None)

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(run, images))
    assert emulated.shared_memory_calls() == before + 1
    for y, true in zip(results, expected, strict=True):
        torch.testing.assert_close(y, true, rtol=1e-4, atol=1e-4)
