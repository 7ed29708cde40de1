"""fastddpm's own backends beside a GPU that is not there: their Python functions run as they are,
on tensors without values, and what they would launch (a CUDA kernel through _C, a Triton kernel) is
written down in a Counter. No other op and no times."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import triton
from gpu_count import Counter
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastddpm.ops import cuda as cuda_backend
from fastddpm.ops import dispatch, library

SHARED = 227 << 10  # bytes of shared memory that a block of an H100 may take
SEGMENT = 32  # bytes of a pixel that a block takes at least: MIN_SEGMENT of group_norm_cut.h
ADAM_LIST, STEP_LIST, NORM_LIST = 40, 256, 128  # tensors of a launch: csrc/cuda/adam.cu


class _Module:
    """_C.cuda as far as the adapters ask it anything: it has every op."""

    GRAD_NORM_CHUNK = 1 << 14

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_: 1  # group_norm_workspace, in floats


def native(counter: Counter, name: str, x: Tensor, args: tuple) -> None:
    """The launches of an op of csrc/cuda, from its own host code."""
    if name.startswith("group_norm_silu"):
        backward = name.endswith("backward")
        # The slab of a block: whole groups, of at least a segment of a pixel; x, and grad behind.
        tensors = [y for y in args if isinstance(y, Tensor) and y.dim() == x.dim()]
        groups = next(a for a in args if isinstance(a, int) and not isinstance(a, bool))
        channels = max(y.shape[1] for y in tensors)
        per_group = max(channels // groups, -(-SEGMENT // x.itemsize))
        slab = per_group * x[0, 0].numel() * x.itemsize * (2 if backward else 1)
        if slab > SHARED - (8 << 10):
            statistics = torch.empty(3, x.shape[0], channels, dtype=torch.float32, device=x.device)
            counter.launch(f"{name}, statistics", x, statistics)
            if backward:
                inputs = [y for y in args if isinstance(y, Tensor) and counter.knows(y)]
                counter.launch(f"{name}, sums", *inputs, torch.empty_like(statistics))
        counter.launch(name, *args)
        if backward:
            sums = torch.empty(2, x.shape[0], channels, dtype=torch.float32, device=x.device)
            counter.launch(f"{name}, parameters", sums)
    elif name in ("adam", "grad_norm"):
        of_lists(counter, name, args)
    else:
        counter.launch(name, *args)


def of_lists(counter: Counter, name: str, args: tuple) -> None:
    """The launches of csrc/cuda/adam.cu, each over as many tensors as its argument has room for."""
    if name == "grad_norm":
        grads, out, sums, *_ = args
        for first in range(0, len(grads), NORM_LIST):
            counter.add("grad_norm, squares", "optimizer", grads[first : first + NORM_LIST], ())
        counter.add("grad_norm", "optimizer", sums, out)
        return
    params, grads, exp_avgs, exp_avg_sqs, steps, averages, copies, *_ = args
    for first in range(0, len(steps), STEP_LIST):
        own = steps[first : first + STEP_LIST]
        counter.add("adam, steps", "optimizer", own, own)
    for first in range(0, len(params), ADAM_LIST):
        here = slice(first, first + ADAM_LIST)
        kept = [tensors[here] for tensors in (params, exp_avgs, exp_avg_sqs, averages)]
        counter.add("adam", "optimizer", (kept, grads[here]), (kept, copies[here]))


def triton_kernel(counter: Counter, kernel: Any, args: tuple, options: dict) -> None:
    """A Triton launch; the operations of those that multiply, by what they are given."""
    name = kernel.fn.__name__
    tensors = [x for x in tree_leaves((args, options)) if isinstance(x, Tensor)]
    work: dict[str, Any] = {}
    tokens = next((x for x in tensors if x.dim() == 3 and x.dtype != torch.float32), None)
    weight = next((x for x in tensors if x.dim() == 2 and min(x.shape) > 1), None)
    if "attention" in name or name in ("_dq_kernel", "_dkv_kernel"):
        qkv = tensors[0]
        n, length, channels = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        products = {"_dq_kernel": 6.0, "_dkv_kernel": 8.0}.get(name, 4.0)
        work = {"operations": products * n * length * length * channels}
    elif weight is not None and tokens is not None:
        m, (n, k) = tokens.shape[0] * tokens.shape[1], weight.shape
        work = {"operations": 2.0 * m * n * k, "product": (m, n, k)}
    if work:
        work |= {"engine": "triton", "dtype": "bf16" if tensors[0].itemsize == 2 else "fp32"}
    counter.launch(name, *tensors, **work)


@contextlib.contextmanager
def written_down(counter: Counter) -> Iterator[None]:
    """A block in which our CUDA and Triton backends are there, and launch into the counter."""
    backend = cuda_backend._cuda

    def call(name: str, x: Tensor, *args: Any) -> None:
        native(counter, name, x, args)

    def run(
        kernel: Any, *args: Any, grid: Any = None, warmup: bool = False, **options: Any
    ) -> None:
        triton_kernel(counter, kernel, args, options)

    dispatch.load.cache_clear()
    try:
        with (
            mock.patch.object(backend, "module", _Module()),
            mock.patch.object(backend, "missing", None),
            mock.patch.object(cuda_backend, "_without_kernels", return_value=None),
            mock.patch.object(backend, "call", call),
            mock.patch.object(library, "check_written"),  # it compares addresses
            mock.patch.object(library.lists, "apart"),  # it, too
            mock.patch.object(triton.runtime.jit.JITFunction, "run", run),
        ):
            yield
    finally:
        dispatch.load.cache_clear()
