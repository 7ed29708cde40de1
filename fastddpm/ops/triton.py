"""The Triton backend: every op, on a GPU, or under Triton's interpreter on CPU tensors; convolution
by its norm and torch's convolution.

The functions of `reference` stand in kernels/, one file per op. Here is which device they run on
and what they can't do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from fastddpm import _native  # noqa: F401  lets fastddpm.kernels be a checkout's kernels/
from fastddpm.kernels import adam as _adam
from fastddpm.kernels import attention_block as _attention
from fastddpm.kernels import choices as _choices
from fastddpm.kernels import discretized_log_likelihood as _likelihood
from fastddpm.kernels import group_norm_silu as _group_norm
from fastddpm.kernels import group_norm_silu_backward as _group_norm_backward
from fastddpm.kernels import noise as _noise
from fastddpm.kernels import philox as _philox
from fastddpm.kernels import posterior_step as _posterior
from fastddpm.kernels import residual_sum as _residual
from fastddpm.kernels import squared_error as _squared_error
from fastddpm.kernels import vlb_term as _vlb_term
from fastddpm.kernels.storage import INTERPRETED
from fastddpm.kernels.tiles import MAX_PIXELS
from fastddpm.ops import composite
from fastddpm.ops.checks import is_lazy

STORAGE = (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64, torch.bool)
DEVICE = "cpu" if INTERPRETED.value else "cuda"


def _on_device(function: Callable) -> Callable:
    """`function` with the GPU of its first tensor made the current one, where Triton launches."""
    if INTERPRETED.value:
        return function

    @functools.wraps(function)
    def wrapper(*args, **options):
        given = (x[0] if type(x) is list and x else x for x in (*args, *options.values()))
        first = next(x for x in given if isinstance(x, torch.Tensor))
        with torch.cuda.device(first.device):
            return function(*args, **options)

    return wrapper


randn = _on_device(_philox.randn)
choices = _on_device(_choices.choices)
noise = _on_device(_noise.noise)
posterior_step = _on_device(_posterior.posterior_step)
group_norm_silu = _on_device(_group_norm.group_norm_silu)
group_norm_silu_backward = _on_device(_group_norm_backward.group_norm_silu_backward)
residual_sum = _on_device(_residual.residual_sum)
convolution = functools.partial(composite.convolution, group_norm_silu, residual_sum)
convolution_backward = functools.partial(
    composite.convolution_backward, group_norm_silu, group_norm_silu_backward
)
attention_block = _on_device(_attention.attention_block)
attention_block_backward = _on_device(_attention.attention_block_backward)
discretized_log_likelihood = _on_device(_likelihood.discretized_log_likelihood)
vlb_term = _on_device(_vlb_term.vlb_term)
squared_error = _on_device(_squared_error.squared_error)
squared_error_backward = _on_device(_squared_error.squared_error_backward)
adam = _on_device(_adam.adam)
grad_norm = _on_device(_adam.grad_norm)


def unsupported(op: str, *tensors: torch.Tensor | None, **options) -> str | None:
    """Why this backend can't run `op` on these tensors, or None if it can."""
    if DEVICE == "cuda" and not torch.cuda.is_available():
        return "torch finds no CUDA device, and TRITON_INTERPRET=1 is not set"
    given = [x for x in tensors if x is not None]
    for dtype in (options.get("dtype"), *(x.dtype for x in given)):
        if dtype is not None and dtype not in STORAGE:
            return f"{str(dtype).removeprefix('torch.')} is not supported"
    for x in given:
        if x.device.type != DEVICE:
            return f"a tensor is on {x.device.type}" + (
                ", where only Triton's interpreter runs (TRITON_INTERPRET=1)"
                if x.device.type == "cpu"
                else ""
            )
        if is_lazy(x):
            return "a tensor is a lazily negated view or a lazy zero"
        if "lists" in options:
            continue
        if x.dim() > 4:
            return f"{x.dim()} dimensions are more than 4"
        if x.dim() > 1 and x.shape[1:].numel() > MAX_PIXELS:
            return f"a sample of {x.shape[1:].numel()} elements is too large"
    if len({x.device for x in given}) > 1:
        return "the tensors are on different devices"
    return options.get("lists")
