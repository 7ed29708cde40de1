"""group_norm_silu: what stands before the norm, the norm of its groups, scale/shift, SiLU and
dropout in one pass over the images (App. B).

A slab that fits a tile is read once. A longer one is read twice: for its statistics, where a sum
with a residual is written too, then to be normalised.
"""

import triton
import triton.language as tl

from fastddpm.kernels.dropout import dropout_arguments, dropout_factors
from fastddpm.kernels.group_norm import (
    Cut,
    columns,
    gain_and_offset,
    merged_statistics,
    of_channels,
    of_second,
    parameter,
    partial_statistics,
    pixels_of,
    places,
    sigmoid,
    source,
    statistics_once,
)
from fastddpm.kernels.storage import store
from fastddpm.kernels.tiles import like, power_of_two, registers
from fastddpm.reference import with_channels


@triton.jit
def _activation(h, about, mean, rstd, gain, offset, SILU: tl.constexpr):
    v = (h - about[None, :] - mean[None, :]) * (rstd * gain)[None, :] + offset[None, :]
    return v * sigmoid(v) if SILU else v


@triton.jit(do_not_specialize=["N", "seed", "threshold"])
def _group_norm_silu_kernel(
    x, residual, u, x2, y, before, weight, bias, scale, shift, partial, eps,
    seed, step, index, threshold, keep_scale, N, K, B, D, SILU: tl.constexpr,
    G: tl.constexpr, CG: tl.constexpr, C1: tl.constexpr, PER: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr, GB: tl.constexpr, BG: tl.constexpr,
    FLAT: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr, BK: tl.constexpr,
    QUADS: tl.constexpr,
):  # fmt: skip
    """partial: None for slabs that are one tile, else what the chunks of a longer one found."""
    block, chunk, P = tl.program_id(0) // K, tl.program_id(0) % K, B * D
    n, c, live = columns(block, tl.arange(0, BN * GB * BG), N, G, CG, BN, GB, BG, WIDE)
    second = of_second(block, G, CG, C1, GB) if SPLIT else None
    added = None if before is None else parameter(before, n, c, live & (c < C1))
    gain, offset = gain_and_offset(weight, bias, scale, shift, n, c, live)
    if partial is None:
        p = places(0, BP, WIDE)
        inside = live[None, :] & (p < P)[:, None]
        h = source(x, residual, u, added, x2, second, n, c, p, inside, D, G * CG, C1, FLAT)
        about, mean, rstd = statistics_once(h, inside, P * 1.0 * CG, eps, BG)
        out = _activation(h, about, mean, rstd, gain, offset, SILU)
        if index is not None:
            out *= dropout_factors(
                seed, step, index, threshold, keep_scale, block, p, N, G, CG, BN, GB, BG, QUADS
            )
        store(pixels_of(y, n, c, p, D, FLAT), out, inside)
    else:
        about, mean, rstd = merged_statistics(
            partial, block, N, K, P, eps, G, CG, PER, BP, BN, GB, BG, BK
        )
        first = chunk * (PER * BP)
        for start in range(first, tl.minimum(first + PER * BP, P), BP):
            p = places(start, BP, WIDE)
            inside = live[None, :] & (p < P)[:, None]
            h = source(x, residual, u, added, x2, second, n, c, p, inside, D, G * CG, C1, FLAT)
            out = _activation(h, about, mean, rstd, gain, offset, SILU)
            if index is not None:
                out *= dropout_factors(
                    seed, step, index, threshold, keep_scale, block, p, N, G, CG, BN, GB, BG, QUADS
                )
            store(pixels_of(y, n, c, p, D, FLAT), out, inside)


def _is_lean(cut, x, weight, bias, scale, shift, dropout):
    """Whether 64 registers do for a thread, so that two programs share a multiprocessor: ptxas aims
    at that by itself, and where they don't it would spill a few.
    """
    alike = all(p is None or p.dtype == x.dtype for p in (weight, bias))
    more = scale is not None or shift is not None or dropout > 0
    return x.element_size() == 2 and alike and not more and not cut.mixed


def group_norm_silu(
    x, num_groups, weight, bias, eps=1e-6, *,
    scale=None, shift=None, silu=True, before=None, residual=None, x2=None,
    dropout=0.0, seed=None, step=None, sample_index=None,
):  # fmt: skip
    """dropout(silu((1 + scale) (weight (h - mean) / sqrt(var + eps) + bias) + shift)) of
    h = cat(u, x2), u = x + before + residual; with a residual (that, u).
    """
    channels = x.shape[1] + (0 if x2 is None else x2.shape[1])
    y = like(x) if x2 is None else with_channels(x, channels)
    u = None if residual is None else like(x)
    if y.numel():
        cut = Cut(num_groups, [x, x2], [residual, u, y])
        view, view_x2, view_residual, view_u, view_y = cut.views
        added, partial = of_channels(before), None
        if not cut.once:
            partial = partial_statistics(
                cut, view, view_x2, residual=view_residual, u=view_u, before=added
            )
            if u is not None:  # it is written: x, residual and before are in it
                view, view_residual, view_u, added = view_u, None, None, None
        lean = _is_lean(cut, x, weight, bias, scale, shift, dropout)
        _group_norm_silu_kernel[cut.grid](
            view, view_residual, view_u, view_x2, view_y, added,
            *map(of_channels, (weight, bias, scale, shift)), partial, eps,
            SILU=silu, BK=power_of_two(cut.chunks),
            maxnreg=None if lean else registers(cut.warps),
            **dropout_arguments(cut, dropout, seed, step, sample_index), **cut.arguments(),
        )  # fmt: skip
    return y if residual is None else (y, u)
