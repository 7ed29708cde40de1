"""convolution on a GPU out of its libraries: our norm before cuDNN's convolution, our sum after it.

Nothing here is a kernel: the norm and the sum are parameters, so that the same composition runs,
and is tested, on any device. Two sources, a dropout and what is added afterwards cost no pass of
their own; an upsampled image and a border on one side alone do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastddpm import reference
from fastddpm.reference import sides


def convolution(
    norm, residual_sum, x, weight, bias=None, *,
    x2=None, stride=1, padding=1, upsample=1,
    num_groups=None, norm_weight=None, norm_bias=None, eps=1e-6, silu=False,
    dropout=0.0, seed=None, step=None, sample_index=None,
    shift=None, residual=None, products=None,
):  # fmt: skip
    """`reference.convolution` with this `norm`, a group_norm_silu, and this residual_sum."""
    random = {"seed": seed, "step": step, "sample_index": sample_index}
    dtype = products or weight.dtype
    h = _input(norm, x, x2, num_groups, norm_weight, norm_bias, eps, silu, dropout, random)
    h, inner = _bordered(h.to(dtype), padding, upsample)
    bias = None if bias is None else bias.to(dtype)
    y = F.conv2d(h, reference.filters_of(weight).to(dtype), bias, stride, inner)
    y = reference._as(reference.with_channels(x, y.shape[1], sizes=y.shape[2:]), y)
    if residual is None and shift is None:
        return y
    return residual_sum(y, residual, shift)


def convolution_backward(
    norm, norm_backward, grad, x, weight, *,
    x2=None, stride=1, padding=1, upsample=1,
    num_groups=None, norm_weight=None, norm_bias=None, eps=1e-6, silu=False,
    dropout=0.0, seed=None, step=None, sample_index=None,
    products=None, needs=(True, True, True, True),
):  # fmt: skip
    """`reference.convolution_backward` with this norm and its gradient."""
    random = {"seed": seed, "step": step, "sample_index": sample_index}
    dtype = products or weight.dtype
    dshift = grad.sum((2, 3), dtype=torch.float32) if needs[3] else None
    dbias = None
    if needs[2]:
        dbias = grad.sum((0, 2, 3), dtype=torch.float32) if dshift is None else dshift.sum(0)
    if not (needs[0] or needs[1]):
        return None, None, None, None, None, dbias, dshift
    h = _input(norm, x, x2, num_groups, norm_weight, norm_bias, eps, silu, dropout, random)
    h, inner = _bordered(h.to(dtype), padding, upsample)
    dh, dweight, _ = torch.ops.aten.convolution_backward(
        grad.to(dtype), h, reference.filters_of(weight).to(dtype), None,
        [stride] * 2, [inner] * 2, [1, 1], False, [0, 0], 1, [needs[0], needs[1], False],
    )  # fmt: skip
    dweight = reference._as(weight, dweight.reshape(weight.shape)) if needs[1] else None
    if not needs[0]:
        return None, None, None, None, dweight, dbias, dshift
    dx, dx2, *dnorm = reference.activated_backward(
        reference.unbordered(dh, x, 0 if inner else padding, upsample),
        *(x, x2, num_groups, norm_weight, norm_bias, eps, silu, dropout, random),
        norm_backward=norm_backward,
    )
    return dx, dx2, *dnorm, dweight, dbias, dshift


def _input(norm, x, x2, num_groups, norm_weight, norm_bias, eps, silu, dropout, random) -> Tensor:
    if num_groups is None:
        return reference._activated(x, x2, None, None, None, eps, silu, dropout, random)
    return norm(
        x, num_groups, norm_weight, norm_bias, eps, silu=silu, x2=x2, dropout=dropout, **random
    )


def _bordered(h: Tensor, padding, upsample: int) -> tuple[Tensor, int]:
    """h as torch's convolution reads it, and the padding that is left to that."""
    before, after = sides(padding)
    if before == after:
        return reference._bordered(h, 0, upsample), before
    return reference._bordered(h, padding, upsample), 0
