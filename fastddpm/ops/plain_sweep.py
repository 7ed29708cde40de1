"""adam and grad_norm of plain float32 tensors on the CPU by one native call, which reads every
tensor once: a network of many small ones spends less time on them than on being asked what they
are. Whatever that does not take is sweep.py's, to compute or to refuse."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from fastddpm import _native
from fastddpm.ops import dispatch


def adam(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    averages: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    share: float,
    clip: float,
    norm: Tensor,
    refused: Tensor,
    grad_scale: float,
) -> bool:
    """Whether sweep.adam's step was taken; if not, nothing was done.

    It is of float32 tensors on the CPU of torch's own types, where those of a parameter are dense
    and of the same strides, and all that is written lies apart from everything else."""
    native = _native_ops()
    numbers = (lr, share, *betas, eps, clip, grad_scale)
    if native is None or not all(type(x) in (float, int) for x in numbers):
        return False
    if not native.adam_if_plain(
        params, grads, exp_avgs, exp_avg_sqs, steps, averages, lr, share, norm, refused, *betas,
        eps, clip, grad_scale, torch.get_num_threads(),
    ):  # fmt: skip
        return False
    torch.autograd.graph.increment_version((*params, *exp_avgs, *exp_avg_sqs, *averages))
    return True


def grad_norm(grads: Sequence[Tensor]) -> Tensor | None:
    """sweep.grad_norm of dense tensors on the CPU of torch's own types, or None."""
    native = _native_ops()
    if native is None or not grads or not native.are_plain(grads):
        return None
    out = torch.empty((), dtype=torch.float32, device="cpu")
    try:
        native.grad_norm(grads, out, None, torch.get_num_threads())
    except ValueError:
        return None
    return out


def _native_ops() -> ModuleType | None:
    """The C++ ops, if they are what a call here runs: no other backend was asked for, and nothing
    traces, transforms or watches torch's operations."""
    if (
        dispatch.forced() not in ("auto", "cpu")
        or dispatch.load("cpu").missing is not None
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state()
        or torch._C._are_functorch_transforms_active()
        or torch.is_inference_mode_enabled()
    ):
        return None
    return _native.C.cpu  # type: ignore[union-attr]
