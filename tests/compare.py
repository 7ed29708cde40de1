"""How exact is exact enough, and the layouts that find bugs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from fastddpm import Schedule
from fastddpm.ops import dispatch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("nchw", "nhwc", "slice", "nhwc_slice")


def assert_exact(actual: Tensor, truth: Tensor, eager: Tensor | None = None, *, ulps=4, what=""):
    """|actual - truth| is at most twice eager torch's largest error plus a few ulp.

    truth: float64, of the same rounded inputs;  eager: torch's own result in the dtype of actual
    An ulp is that of the largest value. Infinities and NaN have to be the same.
    """
    assert actual.shape == truth.shape, f"{what}: shape {actual.shape}, not {truth.shape}"
    actual, dtype = actual.detach().cpu().double(), actual.dtype
    truth = truth.detach().double()
    finite = truth.isfinite()
    assert torch.equal(actual[~finite].nan_to_num(7), truth[~finite].nan_to_num(7)), what
    if not finite.any():
        return
    actual, truth = actual[finite], truth[finite]
    allowed = ulps * torch.finfo(dtype).eps * truth.abs().max().item()
    if eager is not None:
        allowed += 2 * (eager.detach().cpu().double()[finite] - truth).abs().max().item()
    error = (actual - truth).abs().max().item()
    assert error <= allowed, f"{what}: off by {error:.3g}, allowed {allowed:.3g}"


def double(x):
    """float64 on the CPU, exactly; anything but a float tensor as it is."""
    if not isinstance(x, Tensor):
        return x
    return x.detach().cpu().double() if x.is_floating_point() else x.detach().cpu()


def in_layout(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout; slices lie in a wider tensor full of NaN."""
    if layout == "nchw":
        return x.contiguous()
    if layout == "nhwc":
        return x.contiguous(memory_format=torch.channels_last)
    n, c, h, w = x.shape
    if layout == "slice":
        wide = x.new_full((n, c + 3, h + 1, w + 5), 255 if x.dtype == torch.uint8 else torch.nan)
        view = wide[:, 1 : c + 1, 1:, 2 : w + 2]
    else:
        wide = x.new_full((n, h, w, c + 3), 255 if x.dtype == torch.uint8 else torch.nan)
        view = wide[..., 2 : c + 2].permute(0, 3, 1, 2)
    return view.copy_(x)


def gradients(function: Callable[..., Tensor], inputs: Sequence, grad: Tensor) -> list:
    """The result of function(*inputs), then its gradient for every float tensor among them."""
    leaves = [
        x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in inputs
    ]
    y = function(*leaves)
    wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    return [y, *torch.autograd.grad(y, wanted, grad, allow_unused=True, materialize_grads=True)]


def timesteps(n: int, T: int = 1000) -> Tensor:
    """(n,) int64, mixed, with 0 and T - 1 among them as soon as there is room."""
    t = torch.randint(0, T, (n,))
    t[0] = 0
    if n > 1:
        t[-1] = T - 1
    return t


def table(**options) -> Tensor:
    return Schedule.linear().table(**options)


def require(op: str, backend: str, **options) -> None:
    """Skip the test with the reason if `backend` says that it can't run `op` so, or fail it if
    FASTDDPM_REQUIRE_BACKENDS names the backend.
    """
    from conftest import REQUIRED

    reason = dispatch.load(backend).unsupported(op, **options)
    if reason is not None:
        (pytest.fail if backend in REQUIRED else pytest.skip)(f"{backend}: {reason}")


def assert_same_for_any_thread_count(function: Callable[[], Tensor]) -> None:
    """function() gives the same bits with 1, 2, 3 and 5 threads."""
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(function())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)
