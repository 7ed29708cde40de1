"""group_norm_silu and its gradient: statistics per sample and group, scale/shift and SiLU (App. B).

A program handles some rows: a row is one (sample, group), its slab CG channels of P pixels. A slab
that fits is read once; a longer one in tiles, once for its statistics and once more to normalise.
Statistics are float32 around a value close to the mean: (shift, mean - shift, rstd), where shift is
the float nearest to the mean of the first tile, so that neither a large mean nor its own rounding
shows. Sums run in a fixed order. The statistics serve attention_block as well.
"""

import torch
import triton
import triton.language as tl

from fastddpm.kernels.storage import INTERPRETED, load, store
from fastddpm.kernels.tiles import like, merged, power_of_two, registers

SLAB = 8192  # elements that a program holds at once
LEAST = 8192 if INTERPRETED.value else 1024  # of a program's elements: it takes more rows for that
WARPS = 16  # of a program, at most


class Rows:
    """How images (N, C, ...) are cut into programs of BR rows, in tiles of BP pixels."""

    def __init__(self, num_groups, *images, each=32):
        """images: of one shape, None for one that is not given; the first says the layout.

        each: elements of a tile that a thread handles, where there are threads enough
        """
        x = images[0]
        self.n, c = x.shape[:2]
        self.groups, self.channels = num_groups, c // num_groups
        self.sizes, self.views = pixels(images)
        count, bg = self.sizes[0] * self.sizes[1], power_of_two(self.channels)
        self.bp = min(power_of_two(count), max(SLAB // bg, 1))
        self.once = self.bp >= count
        if not self.once:
            self.bp = max(min(SLAB, 32 * WARPS * each) // bg, 1)
        self.tiles = triton.cdiv(count, self.bp)
        wide = 32 // bg if x.stride(1) < x.stride(-1) else 1  # neighbours in memory
        rows = max(min(wide, SLAB // (self.bp * bg)), LEAST // (self.bp * bg), 1)
        self.br, self.bg = power_of_two(min(rows, self.n * num_groups)), bg
        self.grid = (triton.cdiv(self.n * num_groups, self.br),)
        self.warps = min(max(self.bp * self.br * bg // (32 * each), 4), WARPS)

    def arguments(self):
        return {
            "N": self.n, "G": self.groups, "CG": self.channels, "B": self.sizes[0],
            "D": self.sizes[1], "BP": self.bp, "BR": self.br, "BG": self.bg,
            "FLAT": self.sizes[0] == 1, "num_warps": self.warps,
        }  # fmt: skip


def pixels(images):
    """((B, D), tuples): the pixels as B rows of D, and (x, strides of n, c, b, d) of each image."""
    given = [x for x in images if x is not None]
    sizes = [*given[0].shape[2:], 1, 1][: max(given[0].dim() - 2, 2)]
    strides = [[[*x.stride()[2:], 0, 0][k] for x in given] for k in range(len(sizes))]
    *outer, inner = merged(sizes, strides, False)
    row = outer[-1] if outer else (1, [0] * len(given))
    made = iter(
        [(x, x.stride(0), x.stride(1), row[1][k], inner[1][k]) for k, x in enumerate(given)]
    )
    return (row[0], inner[0]), [None if x is None else next(made) for x in images]


def of_channels(x):
    """(pointer, stride of n, stride of c) of a (C,) or (N, C) parameter; None as it is."""
    if x is None:
        return None
    return (x, 0, x.stride(0)) if x.dim() == 1 else (x, x.stride(0), x.stride(1))


@triton.jit
def slab(block, N, G, CG, BR: tl.constexpr, BG: tl.constexpr):
    """(r, n, c, inside): (1, BR, 1) twice and (1, BR, BG) twice, of this block of rows."""
    r = block * BR + tl.arange(0, BR)[None, :, None]
    j = tl.arange(0, BG)[None, None, :]
    return r, r // G, r % G * CG + j, (r < N * G) & (j < CG)


@triton.jit
def pixels_of(x, n, c, p, D, FLAT: tl.constexpr):
    """(BP, BR, BG) pointers."""
    p = p.to(tl.int64)
    pixel = p * x[4] if FLAT else p // D * x[3] + p % D * x[4]
    return (x[0] + n.to(tl.int64) * x[1] + c.to(tl.int64) * x[2]) + pixel


@triton.jit
def parameter(x, n, c, inside):
    """(1, BR, BG) values of a parameter over channels."""
    return load(x[0] + n.to(tl.int64) * x[1] + c.to(tl.int64) * x[2], inside)


@triton.jit
def over_pixels(x):
    """(1, BR, BG) sums."""
    if INTERPRETED and x.shape[0] > 16:  # it adds one by one along this axis, a GPU in a tree
        x = tl.sum(tl.reshape(x, (x.shape[0] // 16, 16, x.shape[1], x.shape[2])), 0)
    return tl.sum(x, 0, keep_dims=True)


@triton.jit
def over_slab(x):
    """(1, BR, 1) sums."""
    return tl.sum(over_pixels(x), 2, keep_dims=True)


@triton.jit
def moments(x, inside, shift, count):
    """(mean, sum of squares around it) of x - shift; x is a tile of `count` elements a row."""
    d = tl.where(inside, x - shift, 0.0)
    mean = over_slab(d) / count
    d = tl.where(inside, d - mean, 0.0)
    return mean, over_slab(d * d)


@triton.jit
def statistics(
    x, n, c, live, CG, B, D, eps,
    BP: tl.constexpr, BR: tl.constexpr, BG: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """(shift, mean - shift, rstd) of each row, (1, BR, 1): tiles by Chan's formula."""
    P = B * D
    p = tl.arange(0, BP)[:, None, None]
    inside = live & (p < P)
    first = tl.minimum(P, BP) * 1.0 * CG
    shift = over_slab(load(pixels_of(x, n, c, p, D, FLAT), inside)) / first
    count, mean, squares = first * 0.0, shift * 0.0, shift * 0.0
    for start in range(0, P, BP):
        p = start + tl.arange(0, BP)[:, None, None]
        inside = live & (p < P)
        some = tl.minimum(P - start, BP) * 1.0 * CG
        tile = load(pixels_of(x, n, c, p, D, FLAT), inside)
        tile_mean, tile_squares = moments(tile, inside, shift, some)
        delta, total = tile_mean - mean, count + some
        squares += tile_squares + delta * delta * (count * some / total)
        mean += delta * (some / total)
        count = total
    return shift, mean, 1.0 / tl.sqrt_rn(squares / count + eps)


@triton.jit
def statistics_once(x, inside, P, CG, eps):
    """The same of slabs that are one tile, already read."""
    count = 1.0 * P * CG  # not .to(): what is 1 is a constant, which has no such method
    shift = over_slab(x) / count
    mean, squares = moments(x, inside, shift, count)
    return shift, mean, 1.0 / tl.sqrt_rn(squares / count + eps)


@triton.jit
def _statistics_kernel(
    x, out, eps, N, G, CG, B, D,
    BP: tl.constexpr, BR: tl.constexpr, BG: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    r, n, c, live = slab(tl.program_id(0), N, G, CG, BR, BG)
    shift, mean, rstd = statistics(x, n, c, live, CG, B, D, eps, BP, BR, BG, FLAT)
    tl.store(out + r, shift, mask=r < N * G)
    tl.store(out + N * G + r, mean, mask=r < N * G)
    tl.store(out + 2 * N * G + r, rstd, mask=r < N * G)


def statistics_of(x, num_groups, eps):
    """(3, N, groups) float32: shift, mean - shift and rstd."""
    out = torch.empty(3, x.shape[0], num_groups, dtype=torch.float32, device=x.device)
    rows = Rows(num_groups, x, each=16)
    _statistics_kernel[rows.grid](
        *rows.views, out, eps, maxnreg=registers(rows.warps), **rows.arguments()
    )
    return out


@triton.jit
def sigmoid(v):
    return 1.0 / (1.0 + tl.exp(-v))


@triton.jit
def _gain_and_offset(weight, bias, scale, shift, n, c, live):
    """v = gain xhat + offset is what the SiLU gets, (1, BR, BG)."""
    gain = live.to(tl.float32)
    offset = gain * 0.0
    if weight is not None:
        gain = parameter(weight, n, c, live)
    if bias is not None:
        offset = parameter(bias, n, c, live)
    if scale is not None:
        factor = 1.0 + parameter(scale, n, c, live)
        gain, offset = gain * factor, offset * factor
    if shift is not None:
        offset += parameter(shift, n, c, live)
    return gain, offset


@triton.jit
def _group_norm_silu_kernel(
    x, y, weight, bias, scale, shift, eps, N, G, CG, B, D, SILU: tl.constexpr, ONCE: tl.constexpr,
    BP: tl.constexpr, BR: tl.constexpr, BG: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    _, n, c, live = slab(tl.program_id(0), N, G, CG, BR, BG)
    gain, offset = _gain_and_offset(weight, bias, scale, shift, n, c, live)
    if ONCE:
        p = tl.arange(0, BP)[:, None, None]
        inside = live & (p < B * D)
        tile = load(pixels_of(x, n, c, p, D, FLAT), inside)
        about, mean, rstd = statistics_once(tile, inside, B * D, CG, eps)
        v = (tile - about - mean) * rstd * gain + offset
        store(pixels_of(y, n, c, p, D, FLAT), v * sigmoid(v) if SILU else v, inside)
    else:
        about, mean, rstd = statistics(x, n, c, live, CG, B, D, eps, BP, BR, BG, FLAT)
        for start in range(0, B * D, BP):
            p = start + tl.arange(0, BP)[:, None, None]
            inside = live & (p < B * D)
            tile = load(pixels_of(x, n, c, p, D, FLAT), inside)
            v = (tile - about - mean) * rstd * gain + offset
            store(pixels_of(y, n, c, p, D, FLAT), v * sigmoid(v) if SILU else v, inside)


def group_norm_silu(x, num_groups, weight, bias, eps=1e-6, *, scale=None, shift=None, silu=True):
    """silu((1 + scale) (weight (x - mean) / sqrt(var + eps) + bias) + shift)."""
    y = like(x)
    if y.numel():
        rows = Rows(num_groups, x, y)
        _group_norm_silu_kernel[rows.grid](
            *rows.views, *map(of_channels, (weight, bias, scale, shift)), eps,
            SILU=silu, ONCE=rows.once, **rows.arguments(),
        )  # fmt: skip
    return y


@triton.jit
def _gradient_of_v(grad, x, about, mean, rstd, gain, offset, SILU: tl.constexpr):
    """(xhat, gradient of the SiLU's argument)."""
    xhat = (x - about - mean) * rstd
    if SILU:
        v = xhat * gain + offset
        s = sigmoid(v)
        grad = grad * (s * (1.0 + v * (1.0 - s)))
    return xhat, grad


@triton.jit
def _store_sums(sums, products, n, c, live, C, total, product):
    at = n.to(tl.int64) * C + c
    tl.store(sums + at, total, mask=live)
    tl.store(products + at, product, mask=live)


@triton.jit
def _gradient_of_x(dv, xhat, gain, rstd, total, product, count):
    """rstd (gain dv - mean(gain dv) - xhat mean(gain dv xhat))"""
    mean_d = tl.sum(gain * total, 2, keep_dims=True) / count
    mean_dx = tl.sum(gain * product, 2, keep_dims=True) / count
    return rstd * (gain * dv - mean_d - xhat * mean_dx)


@triton.jit
def _group_norm_silu_backward_kernel(
    x, grad, residual, dx, weight, bias, scale, shift, sums, products, eps, N, G, CG, B, D,
    SILU: tl.constexpr,
    BP: tl.constexpr, BR: tl.constexpr, BG: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """dx = residual + the gradient of a slab that is one tile, and over the pixels of each channel
    sums = sum dv and products = sum dv xhat, both (N, C).
    """
    _, n, c, live = slab(tl.program_id(0), N, G, CG, BR, BG)
    P = B * D
    p = tl.arange(0, BP)[:, None, None]
    inside = live & (p < P)
    tile = load(pixels_of(x, n, c, p, D, FLAT), inside)
    g = load(pixels_of(grad, n, c, p, D, FLAT), inside)
    about, mean, rstd = statistics_once(tile, inside, P, CG, eps)
    gain, offset = _gain_and_offset(weight, bias, scale, shift, n, c, live)
    xhat, dv = _gradient_of_v(g, tile, about, mean, rstd, gain, offset, SILU)
    dv = tl.where(inside, dv, 0.0)
    total = over_pixels(dv)
    product = over_pixels(tl.where(inside, dv * xhat, 0.0))
    _store_sums(sums, products, n, c, live, G * CG, total, product)
    out = _gradient_of_x(dv, xhat, gain, rstd, total, product, 1.0 * P * CG)
    if residual is not None:
        out += load(pixels_of(residual, n, c, p, D, FLAT), inside)
    store(pixels_of(dx, n, c, p, D, FLAT), out, inside)


@triton.jit
def _statistics_of_rows(statistics, r, rows):
    """What _statistics_kernel wrote of these rows."""
    about = tl.load(statistics + r, mask=r < rows, other=0.0)
    mean = tl.load(statistics + rows + r, mask=r < rows, other=0.0)
    return about, mean, tl.load(statistics + 2 * rows + r, mask=r < rows, other=0.0)


@triton.jit
def _gradient_sums_kernel(
    x, grad, weight, bias, scale, shift, statistics, sums, products, N, G, CG, B, D,
    SILU: tl.constexpr,
    BP: tl.constexpr, BR: tl.constexpr, BG: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """The sums of slabs of many tiles. This and the next kernel are two for the registers' sake:
    in one, what the second loop needs is kept, or spilled, throughout the first.
    """
    r, n, c, live = slab(tl.program_id(0), N, G, CG, BR, BG)
    about, mean, rstd = _statistics_of_rows(statistics, r, N * G)
    gain, offset = _gain_and_offset(weight, bias, scale, shift, n, c, live)
    total, product = gain * 0.0, gain * 0.0
    for start in range(0, B * D, BP):
        p = start + tl.arange(0, BP)[:, None, None]
        inside = live & (p < B * D)
        tile = load(pixels_of(x, n, c, p, D, FLAT), inside)
        g = load(pixels_of(grad, n, c, p, D, FLAT), inside)
        xhat, dv = _gradient_of_v(g, tile, about, mean, rstd, gain, offset, SILU)
        total += over_pixels(tl.where(inside, dv, 0.0))
        product += over_pixels(tl.where(inside, dv * xhat, 0.0))
    _store_sums(sums, products, n, c, live, G * CG, total, product)


@triton.jit
def _gradient_kernel(
    x, grad, residual, dx, weight, bias, scale, shift, statistics, sums, products, N, G, CG, B, D,
    SILU: tl.constexpr,
    BP: tl.constexpr, BR: tl.constexpr, BG: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """dx of one tile, by the sums of its slab."""
    tiles = tl.cdiv(B * D, BP)
    r, n, c, live = slab(tl.program_id(0) // tiles, N, G, CG, BR, BG)
    p = tl.program_id(0) % tiles * BP + tl.arange(0, BP)[:, None, None]
    inside = live & (p < B * D)
    about, mean, rstd = _statistics_of_rows(statistics, r, N * G)
    gain, offset = _gain_and_offset(weight, bias, scale, shift, n, c, live)
    at = n.to(tl.int64) * (G * CG) + c
    total = tl.load(sums + at, mask=live, other=0.0)
    product = tl.load(products + at, mask=live, other=0.0)
    tile = load(pixels_of(x, n, c, p, D, FLAT), inside)
    g = load(pixels_of(grad, n, c, p, D, FLAT), inside)
    xhat, dv = _gradient_of_v(g, tile, about, mean, rstd, gain, offset, SILU)
    out = _gradient_of_x(dv, xhat, gain, rstd, total, product, 1.0 * B * D * CG)
    if residual is not None:
        out += load(pixels_of(residual, n, c, p, D, FLAT), inside)
    store(pixels_of(dx, n, c, p, D, FLAT), out, inside)


def group_norm_silu_backward(
    grad, x, num_groups, weight, bias, eps, scale, shift, silu, *, residual=None
):
    """(dx, dweight, dbias, dscale, dshift), each in the dtype of what it is the gradient of; None
    for what was not given. residual: what to add to dx, like grad.
    """
    dx = like(x)
    sums, products = x.new_zeros(2, *x.shape[:2], dtype=torch.float32)
    if dx.numel():
        rows = Rows(num_groups, x, grad, residual, dx, each=8)
        parameters = [of_channels(p) for p in (weight, bias, scale, shift)]
        cut = {"SILU": silu, **rows.arguments()}
        if rows.once:
            _group_norm_silu_backward_kernel[rows.grid](
                *rows.views, *parameters, sums, products, eps, **cut
            )
        else:
            known = statistics_of(x, num_groups, eps), sums, products
            view_x, view_grad, *_ = rows.views
            _gradient_sums_kernel[rows.grid](view_x, view_grad, *parameters, *known, **cut)
            _gradient_kernel[(rows.grid[0] * rows.tiles,)](*rows.views, *parameters, *known, **cut)
    factor = 1 if scale is None else 1 + scale.float()
    dscale = None
    if scale is not None:
        dscale = products if weight is None else products * weight.float()
        dscale = (dscale if bias is None else dscale + sums * bias.float()).to(scale.dtype)
    return (
        dx,
        None if weight is None else (products * factor).sum(0).to(weight.dtype),
        None if bias is None else (sums * factor).sum(0).to(bias.dtype),
        dscale,
        None if shift is None else sums.to(shift.dtype),
    )
