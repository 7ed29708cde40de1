"""The optimiser's ops, public: check the lists of tensors, then one pass over all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastddpm.ops import library, lists
from fastddpm.options import check_number


@torch.no_grad()
def adam(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    averages: Sequence[Tensor] | None = None,
    copies: Sequence[Tensor | None] | None = None,
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    share: float | Tensor | None = None,
    clip: float | None = None,
    norm: Tensor | None = None,
    refused: Tensor | None = None,
    grad_scale: float = 1.0,
) -> None:
    """A step of Adam with clipping and the parameters' moving average, in place and in one pass
    over memory; as torch.optim.Adam and clip_grad_norm_ to rounding.

        g <- grads / grad_scale, times clip / (norm + 1e-6) where norm is above clip
        step <- step + 1;  m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2
        p <- p - lr / (1 - beta1^step) m / (sqrt(v / (1 - beta2^step)) + eps)
        average <- average + share (p - average);  copy <- p, rounded

    params, exp_avgs, exp_avg_sqs, averages: float32 (or float64) tensors of any shape, the i-th of
              all lists of one shape;  grads: of any float dtype, float64 exactly where params are
    steps:    () float32, one of each parameter's own
    averages: None for no average; else `share`, the weight of the present, is given as well
    copies:   like the parameters, of any float dtype, None for one without; e.g. the bfloat16
              weights that the next step multiplies by
    clip:     the largest norm, of all gradients in one;  norm: () float, that of grads / grad_scale
              where it is known (grad_norm); else it is computed
    refused:  () float on the device: unless it is 0 the step leaves everything as it is, steps too.
              So does one whose norm is not finite: with clip or norm no NaN reaches the state
    lr, share: numbers, or () float tensors, which a GPU reads when it runs: with them nothing of a
              step is the host's, and a recorded graph serves every rate

    ValueError for lists of unequal lengths or shapes, several devices, and where a tensor that is
    written shares memory with another. Kernels walk dense tensors that lie in memory alike; others,
    and float64, are the reference's. No gradients; leaves that require one are written as they are
    by torch's optimisers.
    """
    params = lists.floats("params", params)
    for i, p in enumerate(params):
        if p.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"params[{i}] must be float32 or float64; got {p.dtype}: give its float32 master, "
                "and itself among the copies"
            )
    grads = lists.like("grads", grads, params, "float64 alike")
    exp_avgs = lists.like("exp_avgs", exp_avgs, params, "the same")
    exp_avg_sqs = lists.like("exp_avg_sqs", exp_avg_sqs, params, "the same")
    if (averages is None) != (share is None):
        raise ValueError("averages and share must both be given, or neither")
    averages = [] if averages is None else lists.like("averages", averages, params, "the same")
    lists.count("steps", steps, len(params))
    copies = [None] * len(params) if copies is None else copies
    lists.count("copies", copies, len(params))
    beta1, beta2 = (
        check_number(f"betas[{i}]", beta, lambda x: 0 <= x < 1, "in [0, 1)")
        for i, beta in enumerate(betas)
    )
    eps = check_number("eps", eps, lambda x: x >= 0, "a number of at least 0")
    grad_scale = check_number("grad_scale", grad_scale, lambda x: 0 < x < math.inf, "above 0")
    limit = math.inf if clip is None else check_number("clip", clip, lambda x: x > 0, "above 0")
    if not params:
        return
    device = params[0].device
    for i, step in enumerate(steps):
        lists.number(f"steps[{i}]", step, device)
        if step.dtype != torch.float32:
            raise TypeError(f"steps[{i}] must be torch.float32; got {step.dtype}")
    double = any(p.dtype == torch.float64 for p in params)
    dtype = torch.float64 if double else torch.float32
    if norm is None and clip is not None:
        norm = grad_norm(grads) / grad_scale
    numbers: list[Tensor | None] = []
    for name, x in (("lr", lr), ("share", 0.0 if share is None else share)):
        if not isinstance(x, Tensor):
            x = check_number(name, x, math.isfinite, "a finite number, or a () tensor")
            x = torch.full((), x, dtype=dtype, device=device)
        numbers.append(lists.number(name, x, device).to(dtype))
    for name, given in (("norm", norm), ("refused", refused)):
        numbers.append(None if given is None else lists.number(name, given, device).to(dtype))
    order = sorted(range(len(params)), key=lambda i: copies[i] is None)  # with a copy: first
    kept = (params, grads, exp_avgs, exp_avg_sqs, steps, averages)
    ordered = [[tensors[i] for i in order] if tensors else [] for tensors in kept]
    rounded = [copies[i] for i in order if copies[i] is not None]
    copied = lists.like("copies", rounded, ordered[0][: len(rounded)], "any")
    library.adam(*ordered, copied, *numbers, beta1, beta2, eps, limit, grad_scale)


@torch.no_grad()
def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """The norm of all elements of all tensors in one, as clip_grad_norm_ computes it.

    grads: float tensors of any shapes, layouts and dtypes on one device, at least one
    returns () float32, float64 if one of them is; no gradient

    Squares are summed in float64, in an order of the sizes alone: the same bits for any number of
    threads, and no overflow.
    """
    grads = lists.floats("grads", grads)
    if not grads:
        raise ValueError("grads must have at least one tensor")
    return library.grad_norm(grads)
