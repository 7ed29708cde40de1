"""The gradient of group_norm_silu: of the images, and by the sums over pixels that it needs anyway
of all parameters.

    dv = dropout(grad) silu'(v),  dh = rstd (gain dv - mean(gain dv) - xhat mean(gain dv xhat))

A slab that fits a tile is read once. A longer one is read three times: for its statistics, for its
sums, and for its gradient. These are kernels of their own for the registers' sake, too: in one,
what a later loop needs is kept, or spilled, throughout those before.
"""

import torch
import triton
import triton.language as tl

from fastddpm.kernels.dropout import dropout_arguments, dropout_factors
from fastddpm.kernels.group_norm import (
    Cut,
    columns,
    gain_and_offset,
    merged_statistics,
    of_channels,
    of_first,
    of_second,
    over_groups,
    over_pixels,
    parameter,
    partial_statistics,
    pixels_of,
    places,
    sigmoid,
    source,
    statistics_once,
    store_sources,
)
from fastddpm.kernels.storage import INTERPRETED, load, store
from fastddpm.kernels.tiles import like, power_of_two, registers

SAMPLES = 32  # that a program which sums over them takes at a time


@triton.jit
def _undropped(
    grad, seed, step, index, threshold, keep_scale, block, n, c, p, inside, N, D,
    G: tl.constexpr, CG: tl.constexpr, BN: tl.constexpr, GB: tl.constexpr, BG: tl.constexpr,
    FLAT: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """The gradient of what dropout was given, (BP, BC)."""
    g = load(pixels_of(grad, n, c, p, D, FLAT), inside)
    if index is not None:
        g *= dropout_factors(
            seed, step, index, threshold, keep_scale, block, p, N, G, CG, BN, GB, BG, QUADS
        )
    return g


@triton.jit
def _gradient_of_v(grad, h, inside, about, mean, rstd, gain, offset, SILU: tl.constexpr):
    """(xhat, gradient of the SiLU's argument), (BP, BC), the latter 0 outside."""
    xhat = (h - about[None, :] - mean[None, :]) * rstd[None, :]
    if SILU:
        v = xhat * gain[None, :] + offset[None, :]
        s = sigmoid(v)
        grad = grad * (s * (1.0 + v * (1.0 - s)))
    return xhat, tl.where(inside, grad, 0.0)


@triton.jit
def _gradient_of_h(dv, xhat, rstd, gain, total, product, count, BG: tl.constexpr):
    """total, product: the sums of dv and dv xhat over all pixels;  count: elements of a group."""
    mean_d = over_groups(gain * total, BG) * (rstd / count)
    mean_dx = over_groups(gain * product, BG) * (rstd / count)
    return (rstd * gain)[None, :] * dv - mean_d[None, :] - xhat * mean_dx[None, :]


@triton.jit
def _store_gradient(
    out, grad_u, dx, dx2, second, n, c, p, inside, D, C: tl.constexpr, C1: tl.constexpr,
    FLAT: tl.constexpr,
):  # fmt: skip
    """Write dh, with the gradient of u; its sum over pixels, (BC,)."""
    if grad_u is not None:
        out += load(pixels_of(grad_u, n, c, p, D, FLAT), of_first(inside, c, C, C1))
    store_sources(dx, dx2, second, out, n, c, p, inside, D, C, C1, FLAT)
    return over_pixels(tl.where(inside, out, 0.0))


@triton.jit(do_not_specialize=["N", "seed", "threshold"])
def _group_norm_silu_backward_kernel(
    x, x2, grad, grad_u, dx, dx2, before, weight, bias, scale, shift, sums, eps,
    seed, step, index, threshold, keep_scale, N, K, B, D, SILU: tl.constexpr,
    G: tl.constexpr, CG: tl.constexpr, C1: tl.constexpr, PER: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr, GB: tl.constexpr, BG: tl.constexpr,
    FLAT: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr, QUADS: tl.constexpr,
    Q: tl.constexpr,
):  # fmt: skip
    """dx, dx2 and sums, (N, 1, Q, C), of slabs that are one tile: over the pixels of each channel
    those of dv, of dv xhat, and where Q is 3 of dx.
    """
    block, P = tl.program_id(0), B * D
    n, c, live = columns(block, tl.arange(0, BN * GB * BG), N, G, CG, BN, GB, BG, WIDE)
    second = of_second(block, G, CG, C1, GB) if SPLIT else None
    added = None if before is None else parameter(before, n, c, live & (c < C1))
    p = places(0, BP, WIDE)
    inside = live[None, :] & (p < P)[:, None]
    h = source(x, None, None, added, x2, second, n, c, p, inside, D, G * CG, C1, FLAT)
    g = _undropped(
        grad, seed, step, index, threshold, keep_scale, block, n, c, p, inside, N, D,
        G, CG, BN, GB, BG, FLAT, QUADS,
    )  # fmt: skip
    count = P * 1.0 * CG
    about, mean, rstd = statistics_once(h, inside, count, eps, BG)
    gain, offset = gain_and_offset(weight, bias, scale, shift, n, c, live)
    xhat, dv = _gradient_of_v(g, h, inside, about, mean, rstd, gain, offset, SILU)
    total = over_pixels(dv)
    product = over_pixels(tl.where(inside, dv * xhat, 0.0))
    at = sums + n * (Q * G * CG) + c
    tl.store(at, total, mask=live)
    tl.store(at + G * CG, product, mask=live)
    out = _gradient_of_h(dv, xhat, rstd, gain, total, product, count, BG)
    dsum = _store_gradient(out, grad_u, dx, dx2, second, n, c, p, inside, D, G * CG, C1, FLAT)
    if Q == 3:
        tl.store(at + 2 * G * CG, dsum, mask=live)


@triton.jit(do_not_specialize=["N", "seed", "threshold"])
def _gradient_sums_kernel(
    x, x2, grad, before, weight, bias, scale, shift, partial, sums, eps,
    seed, step, index, threshold, keep_scale, N, K, B, D, SILU: tl.constexpr,
    G: tl.constexpr, CG: tl.constexpr, C1: tl.constexpr, PER: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr, GB: tl.constexpr, BG: tl.constexpr,
    FLAT: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr, BK: tl.constexpr,
    QUADS: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """The first two sums of a chunk, (N, K, Q, C)."""
    block, chunk, P = tl.program_id(0) // K, tl.program_id(0) % K, B * D
    n, c, live = columns(block, tl.arange(0, BN * GB * BG), N, G, CG, BN, GB, BG, WIDE)
    second = of_second(block, G, CG, C1, GB) if SPLIT else None
    about, mean, rstd = merged_statistics(
        partial, block, N, K, P, eps, G, CG, PER, BP, BN, GB, BG, BK
    )
    added = None if before is None else parameter(before, n, c, live & (c < C1))
    gain, offset = gain_and_offset(weight, bias, scale, shift, n, c, live)
    total, product = gain * 0.0, gain * 0.0
    first = chunk * (PER * BP)
    for start in range(first, tl.minimum(first + PER * BP, P), BP):
        p = places(start, BP, WIDE)
        inside = live[None, :] & (p < P)[:, None]
        h = source(x, None, None, added, x2, second, n, c, p, inside, D, G * CG, C1, FLAT)
        g = _undropped(
            grad, seed, step, index, threshold, keep_scale, block, n, c, p, inside, N, D,
            G, CG, BN, GB, BG, FLAT, QUADS,
        )  # fmt: skip
        xhat, dv = _gradient_of_v(g, h, inside, about, mean, rstd, gain, offset, SILU)
        total += over_pixels(dv)
        product += over_pixels(tl.where(inside, dv * xhat, 0.0))
    at = sums + (n * K + chunk) * (Q * G * CG) + c
    tl.store(at, total, mask=live)
    tl.store(at + G * CG, product, mask=live)


@triton.jit(do_not_specialize=["N", "seed", "threshold"])
def _gradient_kernel(
    x, x2, grad, grad_u, dx, dx2, before, weight, bias, scale, shift, partial, sums, eps,
    seed, step, index, threshold, keep_scale, N, K, B, D, SILU: tl.constexpr,
    G: tl.constexpr, CG: tl.constexpr, C1: tl.constexpr, PER: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr, GB: tl.constexpr, BG: tl.constexpr,
    FLAT: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr, BK: tl.constexpr,
    QUADS: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """dx and dx2 of a chunk by the sums of its slab, and its own sum where Q is 3."""
    block, chunk, P = tl.program_id(0) // K, tl.program_id(0) % K, B * D
    n, c, live = columns(block, tl.arange(0, BN * GB * BG), N, G, CG, BN, GB, BG, WIDE)
    second = of_second(block, G, CG, C1, GB) if SPLIT else None
    about, mean, rstd = merged_statistics(
        partial, block, N, K, P, eps, G, CG, PER, BP, BN, GB, BG, BK
    )
    added = None if before is None else parameter(before, n, c, live & (c < C1))
    gain, offset = gain_and_offset(weight, bias, scale, shift, n, c, live)
    at = sums + n * K * (Q * G * CG) + c
    total, product, dsum = gain * 0.0, gain * 0.0, gain * 0.0
    for other in range(K):
        total += tl.load(at + other * (Q * G * CG), mask=live, other=0.0)
        product += tl.load(at + other * (Q * G * CG) + G * CG, mask=live, other=0.0)
    first = chunk * (PER * BP)
    for start in range(first, tl.minimum(first + PER * BP, P), BP):
        p = places(start, BP, WIDE)
        inside = live[None, :] & (p < P)[:, None]
        h = source(x, None, None, added, x2, second, n, c, p, inside, D, G * CG, C1, FLAT)
        g = _undropped(
            grad, seed, step, index, threshold, keep_scale, block, n, c, p, inside, N, D,
            G, CG, BN, GB, BG, FLAT, QUADS,
        )  # fmt: skip
        xhat, dv = _gradient_of_v(g, h, inside, about, mean, rstd, gain, offset, SILU)
        out = _gradient_of_h(dv, xhat, rstd, gain, total, product, P * 1.0 * CG, BG)
        dsum += _store_gradient(out, grad_u, dx, dx2, second, n, c, p, inside, D, G * CG, C1, FLAT)
    if Q == 3:
        tl.store(at + chunk * (Q * G * CG) + 2 * G * CG, dsum, mask=live)


@triton.jit(do_not_specialize=["N"])
def _parameter_gradients_kernel(
    sums, weight, bias, scale, dweight, dbias, dscale, dshift, dbefore, N, K, C, C1,
    BEFORE_OF_SAMPLES: tl.constexpr, Q: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """With v = (1 + scale) w + shift, w = weight xhat + bias; outputs None where not given:

    dscale = sum dv w,  dshift = sum dv,  dweight = sum (1 + scale) dv xhat,
    dbias = sum (1 + scale) dv,  dbefore = sum dx
    """
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    gain, offset = tl.full((1, BC), 1.0, tl.float32), tl.zeros((1, BC), tl.float32)
    if dscale is not None:
        if weight is not None:
            gain = load(weight[0] + c.to(tl.int64) * weight[2], c < C)[None, :]
        if bias is not None:
            offset = load(bias[0] + c.to(tl.int64) * bias[2], c < C)[None, :]
    of_weight, of_bias = tl.zeros((BN, BC), tl.float32), tl.zeros((BN, BC), tl.float32)
    of_before = tl.zeros((BN, BC), tl.float32)
    for first in range(0, N, BN):
        n = (first + tl.arange(0, BN)).to(tl.int64)[:, None]
        inside = (n < N) & (c < C)[None, :]
        at = sums + n * K * Q * C + c[None, :]
        total, product = tl.zeros((BN, BC), tl.float32), tl.zeros((BN, BC), tl.float32)
        of_x = tl.zeros((BN, BC), tl.float32)
        for _ in range(K):
            total += tl.load(at, mask=inside, other=0.0)
            product += tl.load(at + C, mask=inside, other=0.0)
            if Q == 3:
                of_x += tl.load(at + 2 * C, mask=inside, other=0.0)
            at += Q * C
        if dshift is not None:
            store(dshift + n * C + c[None, :], total, inside)
        if dscale is not None:
            out = product if weight is None else product * gain
            # Said, for a compiler to fuse neither product or both in another batch.
            out = out if bias is None else tl.fma(total, offset, out)
            store(dscale + n * C + c[None, :], out, inside)
            values = scale[0] + n * scale[1] + c.to(tl.int64)[None, :] * scale[2]
            factor = 1.0 + load(values, inside)
            total, product = total * factor, product * factor
        of_weight += product
        of_bias += total
        if Q == 3:
            if BEFORE_OF_SAMPLES:
                store(dbefore + n * C1 + c[None, :], of_x, inside & (c < C1)[None, :])
            else:
                of_before += of_x
    if dweight is not None:
        store(dweight + c, over_pixels(of_weight), c < C)
    if dbias is not None:
        store(dbias + c, over_pixels(of_bias), c < C)
    if Q == 3 and not BEFORE_OF_SAMPLES:
        store(dbefore + c, over_pixels(of_before), c < C1)


def _parameter_gradients(sums, weight, bias, scale, shift, before, first):
    """(dweight, dbias, dscale, dshift, dbefore), each in its parameter's dtype; None for what was
    not given. first: channels of the first source
    """
    parameters = weight, bias, scale, shift, before
    new = [
        None if p is None else torch.empty(p.shape, dtype=p.dtype, device=p.device)
        for p in parameters
    ]
    n, chunks, quantities, channels = sums.shape
    if any(p is not None for p in parameters):
        columns = 256 if INTERPRETED.value else 32
        _parameter_gradients_kernel[(triton.cdiv(channels, columns),)](
            sums, *map(of_channels, (weight, bias, scale)), *new, n, chunks, channels, first,
            BEFORE_OF_SAMPLES=before is not None and before.dim() == 2, Q=quantities,
            BN=SAMPLES, BC=columns,
        )  # fmt: skip
    return new


def group_norm_silu_backward(
    grad, x, num_groups, weight, bias, eps, scale, shift, silu, before=None, x2=None, grad_u=None,
    dropout=0.0, seed=None, step=None, sample_index=None,
):  # fmt: skip
    """(dx, dweight, dbias, dscale, dshift, dbefore, dx2), each in the dtype of what it is the
    gradient of; None for what was not given. grad_u is added to dx.
    """
    dx, dx2 = like(x), None if x2 is None else like(x2)
    parameters = weight, bias, scale, shift, before
    if grad.numel() == 0:
        return dx, *(None if p is None else torch.zeros_like(p) for p in parameters), dx2
    cut = Cut(num_groups, [x, x2], [grad, grad_u, dx, dx2], kept=2)
    view_x, view_x2, view_grad, *_ = cut.views
    sums = cut.buffer(x, 2 if before is None else 3, grad.shape[1])
    given = [of_channels(p) for p in (before, weight, bias, scale, shift)]
    options = {
        "eps": eps, "SILU": silu, "Q": sums.shape[2],
        **dropout_arguments(cut, dropout, seed, step, sample_index), **cut.arguments(),
        "maxnreg": registers(cut.warps),
    }  # fmt: skip
    if cut.once:
        _group_norm_silu_backward_kernel[cut.grid](*cut.views, *given, sums, **options)
    else:
        options["BK"] = power_of_two(cut.chunks)
        partial = partial_statistics(cut, view_x, view_x2, before=given[0])
        _gradient_sums_kernel[cut.grid](
            view_x, view_x2, view_grad, *given, partial, sums, **options
        )
        _gradient_kernel[cut.grid](*cut.views, *given, partial, sums, **options)
    return dx, *_parameter_gradients(sums, *parameters, x.shape[1]), dx2
