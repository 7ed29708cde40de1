"""attention_block: x + proj(softmax(q k^T / sqrt(d)) v), q, k, v = split(qkv(GroupNorm(x))), and
its gradient.

Four kernels forward: statistics; normalise and multiply by qkv; online softmax; proj and residual.
Scores exist as tiles in registers only: the gradient computes them again from q, k and each row's
log sum. A head wider than a tile is read in pieces of BD for the scores, and its outputs are shared
out to programs of BV columns. No atomics: every sum has a fixed order.
"""

import math

import torch
import triton
import triton.language as tl

from fastddpm.kernels.group_norm_silu import group_norm_silu_backward, statistics_of
from fastddpm.kernels.linear import Tokens, linear, precision, weight_gradient
from fastddpm.kernels.storage import INTERPRETED, dot, load, operand, rounded, store
from fastddpm.kernels.tiles import like, power_of_two


@triton.jit
def rows_of(x, r, stride):
    """(R, 1) pointers at the rows r of a head: x points at its first column of its image."""
    return (x + r.to(tl.int64) * stride)[:, None]


@triton.jit
def products(
    a, m, a_stride, b, n, b_stride, L,
    DIM: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(M, N) tile of a b^T over a head's DIM columns, for the rows m of a and n of b."""
    dtype: tl.constexpr = a.dtype.element_ty
    d = tl.arange(0, BD)[None, :]
    a, b = rows_of(a, m, a_stride), rows_of(b, n, b_stride)
    in_a, in_b = (m < L)[:, None], (n < L)[:, None]
    total = tl.zeros((m.shape[0], n.shape[0]), tl.float32)
    if DIM <= BD:
        x, y = operand(a + d, in_a & (d < DIM), dtype), operand(b + d, in_b & (d < DIM), dtype)
        return dot(x, tl.trans(y), total, PRECISION)
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
    for start in range(0, L, BN):
        n = start + tl.arange(0, BN)
        s = products(q, m, 3 * C, q + C, n, 3 * C, L, DIM, BD, PRECISION) * scale
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
def weights_and_gradient(
    qkv, dmixed, log_sum, delta, image, head, m, n, L, HEADS, scale,
    DIM: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(weights, gradient of the scaled scores) of the queries m and the keys n, (M, N)."""
    C = HEADS * DIM
    q = qkv + image * L * 3 * C + head * DIM
    row = (image * HEADS + head) * L + m
    s = products(q, m, 3 * C, q + C, n, 3 * C, L, DIM, BD, PRECISION) * scale
    weights = tl.exp2(s - tl.load(log_sum + row, mask=m < L, other=0.0)[:, None])
    weights = tl.where((m < L)[:, None] & (n < L)[None, :], weights, 0.0)
    grad = dmixed + image * L * C + head * DIM
    dweights = products(grad, m, C, q + 2 * C, n, 3 * C, L, DIM, BD, PRECISION)
    ds = weights * (dweights - tl.load(delta + row, mask=m < L, other=0.0)[:, None])
    return weights, ds


@triton.jit
def _dq_kernel(
    qkv, dmixed, log_sum, delta, dqkv, L, HEADS, scale, slope,
    DIM: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    image, head, m, v = place(L, HEADS, DIM, BM, BV)
    C = HEADS * DIM
    k = qkv + image * L * 3 * C + C + head * DIM
    dq = tl.zeros((BM, BV), tl.float32)
    for start in range(0, L, BN):
        n = start + tl.arange(0, BN)
        _, ds = weights_and_gradient(
            qkv, dmixed, log_sum, delta, image, head, m, n, L, HEADS, scale, DIM, BD, PRECISION
        )
        keys = columns(k, n, 3 * C, v, L, DIM)
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
    C = HEADS * DIM
    dtype: tl.constexpr = qkv.dtype.element_ty
    q, grad = qkv + image * L * 3 * C + head * DIM, dmixed + image * L * C + head * DIM
    dk, dv = tl.zeros((BN, BV), tl.float32), tl.zeros((BN, BV), tl.float32)
    for start in range(0, L, BM):
        m = start + tl.arange(0, BM)
        weights, ds = weights_and_gradient(
            qkv, dmixed, log_sum, delta, image, head, m, n, L, HEADS, scale, DIM, BD, PRECISION
        )
        grads = columns(grad, m, C, v, L, DIM)
        dv = dot(tl.trans(rounded(weights, dtype)), grads, dv, PRECISION)
        queries = columns(q, m, 3 * C, v, L, DIM)
        dk = dot(tl.trans(rounded(ds, dtype)), queries, dk, PRECISION)
    out = rows_of(dqkv + image * L * 3 * C + C + head * DIM, n, 3 * C) + v[None, :]
    inside = (n < L)[:, None] & (v < DIM)[None, :]
    store(out, dk * slope, inside)
    store(out + C, dv, inside)


def _tiles(tokens, dtype, dim, owned, looped, widest, results):
    """(tile sizes, warps): rows a program owns and loops over, columns of scores and of results."""
    half, width = dtype != torch.float32, max(power_of_two(dim), 16)
    owned, looped = tokens.rows(owned if half else 32), tokens.rows(looped if half else 32)
    bv = min(width, widest if half else 64)
    looped = min(looped, 32) if bv > 128 else looped
    bd = min(width, 128 if half else 64 // results)
    return owned, looped, bd, bv, 8 if bv * results > 64 else 4


class _Block:
    """One call: the tokens, the statistics and the buffers that both directions need."""

    def __init__(
        self, x, num_groups, norm_weight, norm_bias, qkv_weight, qkv_bias, heads, eps, *more
    ):
        self.tokens = Tokens(x, *more)
        self.channels, self.heads, self.dim = x.shape[1], heads, x.shape[1] // heads
        self.norm = (statistics_of(x, num_groups, eps), norm_weight, norm_bias)
        self.qkv = self.tokens.new(x, 3 * self.channels)
        self.mixed = self.tokens.new(x, self.channels)
        self.slope = 1 / math.sqrt(self.dim)
        self.scale = self.slope / math.log(2)
        qkv = self.tokens.buffer(self.qkv)
        linear(self.tokens, self.tokens.images[0], qkv_weight, qkv_bias, qkv, norm=self.norm)

    def attend(self, log_sum=None):
        bm, bn, bd, bv, warps = _tiles(self.tokens, self.qkv.dtype, self.dim, 64, 64, 256, 1)
        _attention_kernel[self.grid(bm, bv)](
            self.qkv, self.mixed, log_sum, self.tokens.length, self.heads, self.scale,
            DIM=self.dim, PRECISION=precision(), BM=bm, BN=bn, BD=bd, BV=bv, num_warps=warps,
            num_stages=2,
        )  # fmt: skip

    def attend_backward(self, log_sum, dmixed):
        """The gradient of qkv."""
        dqkv, delta = torch.empty_like(self.qkv), torch.empty_like(log_sum)
        rows = self.tokens.rows(64 if INTERPRETED.value else 16)
        columns = min(max(power_of_two(self.dim), 16), 128)
        _delta_kernel[self.grid(rows, self.dim)](
            self.mixed, dmixed, delta, self.tokens.length, self.heads,
            DIM=self.dim, BM=rows, BD=columns,
        )  # fmt: skip
        owned, looped, bd, bv, warps = _tiles(self.tokens, self.qkv.dtype, self.dim, 64, 32, 128, 2)
        queries = min(looped, 16) if bv > 64 else looped  # more of them spill on sm_100
        for kernel, bm, bn, piece in (
            (_dq_kernel, owned, looped, bd),
            (_dkv_kernel, queries, owned, min(bd, 64)),  # two results: less room for operands
        ):
            kernel[self.grid(owned, bv)](
                self.qkv, dmixed, log_sum, delta, dqkv, self.tokens.length, self.heads,
                self.scale, self.slope,
                DIM=self.dim, PRECISION=precision(), BM=bm, BN=bn, BD=piece, BV=bv, num_warps=warps,
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
            x, num_groups, norm_weight, norm_bias, qkv_weight, qkv_bias, num_heads, eps, y
        )
        block.attend()
        tokens, (image, out) = block.tokens, block.tokens.images
        mixed = tokens.buffer(block.mixed)
        linear(tokens, mixed, proj_weight, proj_bias, out, residual=image)
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
    tokens, channels = block.tokens, block.channels
    image, grads, out = tokens.images
    log_sum = x.new_empty(tokens.n, num_heads, tokens.length, dtype=torch.float32)
    block.attend(log_sum)

    mixed = tokens.buffer(block.mixed)
    dproj, dproj_bias = weight_gradient(tokens, grads, mixed, channels, channels)
    dmixed = torch.empty_like(block.mixed)
    linear(tokens, grads, proj_weight, None, tokens.buffer(dmixed), transposed=True)
    dqkv = tokens.buffer(block.attend_backward(log_sum, dmixed))
    dweight, dbias = weight_gradient(tokens, dqkv, image, 3 * channels, channels, norm=block.norm)
    linear(tokens, dqkv, qkv_weight, None, out, transposed=True)
    dx, dnorm_weight, dnorm_bias, _, _ = group_norm_silu_backward(
        dy, x, num_groups, norm_weight, norm_bias, eps, None, None, False, residual=grad
    )
    given = zip((dweight, dbias, dproj, dproj_bias), parameters[2:], strict=True)
    return dx, dnorm_weight, dnorm_bias, *(None if p is None else d.to(p.dtype) for d, p in given)
