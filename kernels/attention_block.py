"""attention_block: x + proj(softmax(q k^T / sqrt(d)) v), q, k, v = split(qkv(GroupNorm(x))), and
its gradient.

Four kernels forward: norm; product with qkv; online softmax; product with proj, plus residual.
Scores exist as tiles in registers only: the gradient computes them again from q, k and each row's
log sum. A program reads its own rows once, and all others a tile after the other; of a head wider
than a tile both are read in pieces of BD for the scores, and its outputs are shared out to programs
of BV columns. No atomics: every sum has a fixed order.
"""

import math

import torch
import triton
import triton.language as tl

from fastddpm.kernels.group_norm_silu import group_norm_silu
from fastddpm.kernels.group_norm_silu_backward import group_norm_silu_backward
from fastddpm.kernels.linear import FEW, Tokens, linear, precision, weight_gradient
from fastddpm.kernels.storage import INTERPRETED, dot, load, operand, rounded, store
from fastddpm.kernels.tiles import like, power_of_two, registers

WIDEST = 256  # channels of a head's outputs in one program


@triton.jit
def rows_of(x, r, stride):
    """(R, 1) pointers at the rows r of a head: x points at its first column of its image."""
    return (x + r.to(tl.int64) * stride)[:, None]


@triton.jit
def own_rows(a, m, stride, L, DIM: tl.constexpr, BD: tl.constexpr):
    """(M, BD) tile of the rows m of a head, for `products`; the pointer of one wider than that."""
    if DIM <= BD:
        d = tl.arange(0, BD)[None, :]
        mine = operand(rows_of(a, m, stride) + d, (m < L)[:, None] & (d < DIM), a.dtype.element_ty)
    else:
        mine = a
    return mine


@triton.jit
def products(
    a, m, a_stride, b, n, b_stride, L,
    DIM: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(M, N) tile of a b^T over a head's DIM columns: rows m of a, from `own_rows`, and n of b."""
    dtype: tl.constexpr = b.dtype.element_ty
    d, in_b = tl.arange(0, BD)[None, :], (n < L)[:, None]
    b = rows_of(b, n, b_stride)
    total = tl.zeros((m.shape[0], n.shape[0]), tl.float32)
    if DIM <= BD:
        total = dot(a, tl.trans(operand(b + d, in_b & (d < DIM), dtype)), total, PRECISION)
    else:
        a, in_a = rows_of(a, m, a_stride), (m < L)[:, None]
        for start in range(0, DIM, BD):
            k = start + d
            x, y = operand(a + k, in_a & (k < DIM), dtype), operand(b + k, in_b & (k < DIM), dtype)
            total = dot(x, tl.trans(y), total, PRECISION)
    return total


@triton.jit
def columns(x, r, stride, v, L, DIM: tl.constexpr):
    """(R, BV) operand: the columns v of the rows r of a head."""
    inside = (r < L)[:, None] & (v < DIM)[None, :]
    return operand(rows_of(x, r, stride) + v[None, :], inside, x.dtype.element_ty)


@triton.jit
def place(L, HEADS, DIM: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr):
    """(image, head, rows, columns) of this program: a tile of rows and columns of a head."""
    program, tiles_v = tl.program_id(0), tl.cdiv(DIM, BV)
    v = program % tiles_v * BV + tl.arange(0, BV)
    r = program // tiles_v % tl.cdiv(L, BR) * BR + tl.arange(0, BR)
    head = program // tiles_v // tl.cdiv(L, BR)
    return (head // HEADS).to(tl.int64), head % HEADS, r, v


@triton.jit
def _attention_kernel(
    qkv, mixed, log_sum, L, HEADS, scale, DIM: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """mixed = softmax(q k^T / sqrt(d)) v, and the log2 of each row's sum of 2^(scale q k)."""
    image, head, m, v = place(L, HEADS, DIM, BM, BV)
    C = HEADS * DIM
    q = qkv + image * L * 3 * C + head * DIM
    highest, total = tl.full((BM,), -float("inf"), tl.float32), tl.zeros((BM,), tl.float32)
    result = tl.zeros((BM, BV), tl.float32)
    mine = own_rows(q, m, 3 * C, L, DIM, BD)
    for start in range(0, L, BN):
        n = start + tl.arange(0, BN)
        s = products(mine, m, 3 * C, q + C, n, 3 * C, L, DIM, BD, PRECISION) * scale
        s = tl.where((n < L)[None, :], s, -float("inf"))
        higher = tl.maximum(highest, tl.max(s, 1))
        weights, fade = tl.exp2(s - higher[:, None]), tl.exp2(highest - higher)
        total = total * fade + tl.sum(weights, 1)
        values = columns(q + 2 * C, n, 3 * C, v, L, DIM)
        weights = rounded(weights, qkv.dtype.element_ty)
        result = dot(weights, values, result * fade[:, None], PRECISION)
        highest = higher
    out = rows_of(mixed + image * L * C + head * DIM, m, C) + v[None, :]
    store(out, result / total[:, None], (m < L)[:, None] & (v < DIM)[None, :])
    if log_sum is not None:  # noqa: SIM102  this one is decided by the compiler
        if tl.program_id(0) % tl.cdiv(DIM, BV) == 0:
            at = log_sum + (image * HEADS + head) * L + m
            tl.store(at, highest + tl.log2(total), mask=m < L)


@triton.jit
def _delta_kernel(
    mixed, dmixed, delta, L, HEADS, DIM: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr
):
    """delta = sum over a head's columns of mixed dmixed: what softmax's gradient takes off."""
    image, head, m, d = place(L, HEADS, BD, BM, BD)
    start = image * L * HEADS * DIM + head * DIM
    total = tl.zeros((BM,), tl.float32)
    for k in range(0, DIM, BD):
        at = start + rows_of(0, m, HEADS * DIM) + (k + d)[None, :]
        inside = (m < L)[:, None] & (k + d < DIM)[None, :]
        total += tl.sum(load(mixed + at, inside) * load(dmixed + at, inside), 1)
    tl.store(delta + (image * HEADS + head) * L + m, total, mask=m < L)


@triton.jit
def weights_and_gradient(s, dweights, log_sum, delta, inside, scale):
    """(weights, gradient of the scaled scores) of queries and keys, of which either may be rows."""
    weights = tl.where(inside, tl.exp2(s * scale - log_sum), 0.0)
    return weights, weights * (dweights - delta)


@triton.jit
def _dq_kernel(
    qkv, dmixed, log_sum, delta, dqkv, L, HEADS, scale, slope,
    DIM: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    image, head, m, v = place(L, HEADS, DIM, BM, BV)
    C, row = HEADS * DIM, (image * HEADS + head) * L
    q, grad = qkv + image * L * 3 * C + head * DIM, dmixed + image * L * C + head * DIM
    queries, grads = own_rows(q, m, 3 * C, L, DIM, BD), own_rows(grad, m, C, L, DIM, BD)
    sums = tl.load(log_sum + row + m, mask=m < L, other=0.0)[:, None]
    deltas = tl.load(delta + row + m, mask=m < L, other=0.0)[:, None]
    dq = tl.zeros((BM, BV), tl.float32)
    for start in range(0, L, BN):
        n = start + tl.arange(0, BN)
        s = products(queries, m, 3 * C, q + C, n, 3 * C, L, DIM, BD, PRECISION)
        dweights = products(grads, m, C, q + 2 * C, n, 3 * C, L, DIM, BD, PRECISION)
        inside = (m < L)[:, None] & (n < L)[None, :]
        _, ds = weights_and_gradient(s, dweights, sums, deltas, inside, scale)
        keys = columns(q + C, n, 3 * C, v, L, DIM)
        dq = dot(rounded(ds, qkv.dtype.element_ty), keys, dq, PRECISION)
    out = rows_of(dqkv + image * L * 3 * C + head * DIM, m, 3 * C) + v[None, :]
    store(out, dq * slope, (m < L)[:, None] & (v < DIM)[None, :])


@triton.jit
def _dkv_kernel(
    qkv, dmixed, log_sum, delta, dqkv, L, HEADS, scale, slope,
    DIM: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    image, head, n, v = place(L, HEADS, DIM, BN, BV)
    C, row = HEADS * DIM, (image * HEADS + head) * L
    dtype: tl.constexpr = qkv.dtype.element_ty
    q, grad = qkv + image * L * 3 * C + head * DIM, dmixed + image * L * C + head * DIM
    keys = own_rows(q + C, n, 3 * C, L, DIM, BD)
    values = own_rows(q + 2 * C, n, 3 * C, L, DIM, BD)
    dk, dv = tl.zeros((BN, BV), tl.float32), tl.zeros((BN, BV), tl.float32)
    for start in range(0, L, BM):
        m = start + tl.arange(0, BM)
        s = products(keys, n, 3 * C, q, m, 3 * C, L, DIM, BD, PRECISION)
        dweights = products(values, n, 3 * C, grad, m, C, L, DIM, BD, PRECISION)
        sums = tl.load(log_sum + row + m, mask=m < L, other=0.0)[None, :]
        deltas = tl.load(delta + row + m, mask=m < L, other=0.0)[None, :]
        inside = (n < L)[:, None] & (m < L)[None, :]
        weights, ds = weights_and_gradient(s, dweights, sums, deltas, inside, scale)
        dv = dot(rounded(weights, dtype), columns(grad, m, C, v, L, DIM), dv, PRECISION)
        dk = dot(rounded(ds, dtype), columns(q, m, 3 * C, v, L, DIM), dk, PRECISION)
    out = rows_of(dqkv + image * L * 3 * C + C + head * DIM, n, 3 * C) + v[None, :]
    inside = (n < L)[:, None] & (v < DIM)[None, :]
    store(out, dk * slope, inside)
    store(out + C, dv, inside)


def _forward_tiles(tokens, dtype, heads, dim):
    """(BM, BN, BD, BV, warps) of the attention itself: a head that is a tile is read once."""
    width = max(power_of_two(dim), 16)
    if dtype == torch.float32:
        return _rows(tokens, 32), _rows(tokens, 32), min(width, 64), min(width, 64), 4
    programs = tokens.n * heads * triton.cdiv(tokens.length, 64)
    owned, looped = 64 if programs >= FEW else 32, 64 if width <= 128 else 32
    whole, warps = width <= WIDEST, 8 if width > 128 else 4
    return (
        _rows(tokens, owned),
        _rows(tokens, looped),
        width if whole else 128,
        min(width, WIDEST),
        warps,
    )


def _backward_tiles(tokens, dtype, dim):
    """((BM, BN, BD) of dq, of dk and dv; BV, warps)"""
    width = max(power_of_two(dim), 16)
    if dtype == torch.float32:
        tile = (_rows(tokens, 32), _rows(tokens, 32), min(width, 32))
        return tile, tile, min(width, 64), 4 if width <= 32 else 8
    owned, looped, bv = _rows(tokens, 64), _rows(tokens, 32), min(width, 128)
    queries = min(looped, 16) if bv > 64 else looped  # more of them spill on sm_100
    return (
        (owned, looped, bv),
        (queries, owned, min(width, 64)),  # two results: less room for operands
        bv,
        8 if bv > 32 else 4,
    )


def _rows(tokens, most):
    """Tokens of an image in a tile: at most so many, at least what `dot` takes."""
    return min(max(power_of_two(tokens.length), 16), most)


class _Block:
    """One call: the tokens, the normalised ones and the buffers that both directions need."""

    def __init__(
        self, x, num_groups, norm_weight, norm_bias, qkv_weight, qkv_bias, heads, eps, *more
    ):
        normalised = group_norm_silu(x, num_groups, norm_weight, norm_bias, eps, silu=False)
        self.tokens = Tokens(normalised, *more)
        self.normalised, *self.images = self.tokens.images
        self.channels, self.heads, self.dim = x.shape[1], heads, x.shape[1] // heads
        self.qkv = self.tokens.new(x, 3 * self.channels)
        self.mixed = self.tokens.new(x, self.channels)
        self.slope = 1 / math.sqrt(self.dim)
        self.scale = self.slope / math.log(2)
        linear(self.tokens, self.normalised, qkv_weight, qkv_bias, self.tokens.buffer(self.qkv))

    def attend(self, log_sum=None):
        bm, bn, bd, bv, warps = _forward_tiles(self.tokens, self.qkv.dtype, self.heads, self.dim)
        _attention_kernel[self.grid(bm, bv)](
            self.qkv, self.mixed, log_sum, self.tokens.length, self.heads, self.scale,
            DIM=self.dim, PRECISION=precision(), BM=bm, BN=bn, BD=bd, BV=bv, num_warps=warps,
            num_stages=2, maxnreg=registers(warps),
        )  # fmt: skip

    def attend_backward(self, log_sum, dmixed):
        """The gradient of qkv."""
        dqkv, delta = torch.empty_like(self.qkv), torch.empty_like(log_sum)
        rows = _rows(self.tokens, 64 if INTERPRETED.value else 16)
        columns = min(max(power_of_two(self.dim), 16), 128)
        _delta_kernel[self.grid(rows, self.dim)](
            self.mixed, dmixed, delta, self.tokens.length, self.heads,
            DIM=self.dim, BM=rows, BD=columns,
        )  # fmt: skip
        *tiles, bv, warps = _backward_tiles(self.tokens, self.qkv.dtype, self.dim)
        for kernel, (bm, bn, bd), owned in zip(
            (_dq_kernel, _dkv_kernel), tiles, (0, 1), strict=True
        ):
            kernel[self.grid((bm, bn)[owned], bv)](
                self.qkv, dmixed, log_sum, delta, dqkv, self.tokens.length, self.heads,
                self.scale, self.slope,
                DIM=self.dim, PRECISION=precision(), BM=bm, BN=bn, BD=bd, BV=bv, num_warps=warps,
                num_stages=2,
            )  # fmt: skip
        return dqkv

    def grid(self, rows, columns):
        row_tiles = triton.cdiv(self.tokens.length, rows)
        return (self.tokens.n * self.heads * row_tiles * triton.cdiv(self.dim, columns),)


def attention_block(
    x, num_groups, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, *,
    num_heads=1, eps=1e-6,
):  # fmt: skip
    """x + proj(softmax(q k^T / sqrt(d)) v) with q, k, v = split(qkv(GroupNorm(x)))."""
    y = like(x)
    if y.numel():
        block = _Block(
            x, num_groups, norm_weight, norm_bias, qkv_weight, qkv_bias, num_heads, eps, x, y
        )
        block.attend()
        tokens, (image, out) = block.tokens, block.images
        linear(tokens, tokens.buffer(block.mixed), proj_weight, proj_bias, out, residual=image)
    return y


def attention_block_backward(
    grad, x, num_groups, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias,
    num_heads, eps,
):  # fmt: skip
    """(dx, dnorm_weight, dnorm_bias, dqkv_weight, dqkv_bias, dproj_weight, dproj_bias), each in the
    dtype of what it is the gradient of; None for what was not given.
    """
    parameters = norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias
    if x.numel() == 0:
        return like(x), *(None if p is None else torch.zeros_like(p) for p in parameters)
    grad, dy = grad.to(x.dtype), like(x)
    block = _Block(
        x, num_groups, norm_weight, norm_bias, qkv_weight, qkv_bias, num_heads, eps, grad, dy
    )
    tokens, channels, (grads, out) = block.tokens, block.channels, block.images
    log_sum = x.new_empty(tokens.n, num_heads, tokens.length, dtype=torch.float32)
    block.attend(log_sum)

    mixed = tokens.buffer(block.mixed)
    dproj, dproj_bias = weight_gradient(tokens, grads, mixed, channels, channels)
    dmixed = torch.empty_like(block.mixed)
    linear(tokens, grads, proj_weight, None, tokens.buffer(dmixed), transposed=True)
    dqkv = tokens.buffer(block.attend_backward(log_sum, dmixed))
    dweight, dbias = weight_gradient(tokens, dqkv, block.normalised, 3 * channels, channels)
    linear(tokens, dqkv, qkv_weight, None, out, transposed=True)
    dx, dnorm_weight, dnorm_bias, *_ = group_norm_silu_backward(
        dy, x, num_groups, norm_weight, norm_bias, eps, None, None, False, grad_u=grad
    )
    given = zip((dweight, dbias, dproj, dproj_bias), parameters[2:], strict=True)
    return dx, dnorm_weight, dnorm_bias, *(None if p is None else d.to(p.dtype) for d, p in given)
