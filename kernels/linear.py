"""Products of the tokens of images with weights, for attention_block: y = f(x) W^T + b + residual,
and the gradient of W. f is the identity or a GroupNorm whose statistics are known.

The tokens of an image (N, C, H, W) are its pixels in any layout; a buffer (N, L, C) is one as well.
Operands are rounded to the storage type of the tokens, sums are float32 and have a fixed order.
"""

import torch
import triton
import triton.language as tl

from fastddpm.kernels.group_norm_silu import pixels
from fastddpm.kernels.storage import dot, load, operand, rounded, store
from fastddpm.kernels.tiles import power_of_two, registers
from fastddpm.precision import tf32_asked

SPLITS = 128  # programs that a weight's gradient is cut into, about


class Tokens:
    """The images and buffers of a call as tuples (x, strides of n, c, b, d): B rows of D pixels."""

    def __init__(self, *images):
        self.n = images[0].shape[0]
        (self.b, self.d), self.images = pixels(images)
        self.length = self.b * self.d

    def buffer(self, x):
        """The tuple of a contiguous (N, L, C)."""
        c = x.shape[2]
        return (x, self.length * c, 1, self.d * c, c)

    def new(self, like, channels):
        """An uninitialised buffer."""
        return like.new_empty(self.n, self.length, channels)

    def arguments(self):
        return {"N": self.n, "B": self.b, "D": self.d, "FLAT": self.b == 1}

    def rows(self, most):
        """Tokens of a tile: at most so many, at least what `dot` takes."""
        return min(max(power_of_two(self.length), 16), most)


def precision():
    """How float32 operands are multiplied: as torch's own products are told to."""
    return "tf32" if tf32_asked() else "ieee"


@triton.jit
def tokens_of(x, n, p, c, D, FLAT: tl.constexpr):
    """(tokens, channels) pointers of the image n."""
    p = p.to(tl.int64)
    row = p * x[4] if FLAT else p // D * x[3] + p % D * x[4]
    return (x[0] + n.to(tl.int64) * x[1] + row)[:, None] + (c.to(tl.int64) * x[2])[None, :]


@triton.jit
def normalised(x, statistics, weight, bias, n, c, inside, N, G, C):
    """GroupNorm of a tile (tokens, channels) of the image n."""
    at = statistics + n * G + c // (C // G)
    shift = tl.load(at, mask=c < C, other=0.0)
    mean = tl.load(at + N * G, mask=c < C, other=0.0)
    gain = tl.load(at + 2 * N * G, mask=c < C, other=0.0)
    x = x - shift[None, :] - mean[None, :]
    if weight is not None:
        gain = gain * load(weight[0] + c * weight[1], c < C)
    x = x * gain[None, :]
    if bias is not None:
        x += load(bias[0] + c * bias[1], c < C)[None, :]
    return tl.where(inside, x, 0.0)


@triton.jit
def _linear_kernel(
    x, weight, bias, residual, y, statistics, norm_weight, norm_bias, G, N, B, D, I, O,
    PRECISION: tl.constexpr, FLAT: tl.constexpr,
    BM: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    program, L = tl.program_id(0), B * D
    tiles_o, tiles_m = tl.cdiv(O, BO), tl.cdiv(L, BM)
    n = program // tiles_o // tiles_m
    p = program // tiles_o % tiles_m * BM + tl.arange(0, BM)
    o = program % tiles_o * BO + tl.arange(0, BO)
    dtype: tl.constexpr = x[0].dtype.element_ty
    total = tl.zeros((BM, BO), tl.float32)
    for start in range(0, I, BI):
        i = start + tl.arange(0, BI)
        inside = (p < L)[:, None] & (i < I)[None, :]
        a = tokens_of(x, n, p, i, D, FLAT)
        if statistics is None:
            a = operand(a, inside, dtype)
        else:
            a = load(a, inside)
            a = normalised(a, statistics, norm_weight, norm_bias, n, i, inside, N, G, I)
            a = rounded(a, dtype)
        w = (
            weight[0]
            + (o.to(tl.int64) * weight[1])[None, :]
            + (i.to(tl.int64) * weight[2])[:, None]
        )
        w = operand(w, (o < O)[None, :] & (i < I)[:, None], dtype)
        total = dot(a, w, total, PRECISION)
    inside = (p < L)[:, None] & (o < O)[None, :]
    if bias is not None:
        total += load(bias[0] + o * bias[1], o < O)[None, :]
    if residual is not None:
        total += load(tokens_of(residual, n, p, o, D, FLAT), inside)
    store(tokens_of(y, n, p, o, D, FLAT), total, inside)


def linear(tokens, x, weight, bias, y, *, residual=None, norm=None, transposed=False):
    """y = f(x) weight^T + bias + residual over the tokens; tuples but for weight and bias.

    norm: None or (statistics, weight, bias) of a GroupNorm;  transposed: weight instead of weight^T
    """
    outputs, inputs = weight.shape[::-1] if transposed else weight.shape
    strides = weight.stride()[::-1] if transposed else weight.stride()
    statistics, norm_weight, norm_bias = (None, None, None) if norm is None else norm
    half = x[0].dtype != torch.float32
    bm, bo, bi = tokens.rows(64), min(max(power_of_two(outputs), 16), 64), 32 if half else 16
    grid = (tokens.n * triton.cdiv(tokens.length, bm) * triton.cdiv(outputs, bo),)
    _linear_kernel[grid](
        x, (weight, *strides), vector(bias), residual, y,
        statistics, vector(norm_weight), vector(norm_bias),
        1 if statistics is None else statistics.shape[2],
        I=inputs, O=outputs, PRECISION=precision(), BM=bm, BO=bo, BI=bi, **tokens.arguments(),
    )  # fmt: skip


def vector(x):
    """(pointer, stride) of a (C,) parameter; None as it is."""
    return None if x is None else (x, x.stride(0))


@triton.jit
def _weight_gradient_kernel(
    grad, x, statistics, norm_weight, norm_bias, dweight, dbias, G, N, B, D, O, I, STEPS,
    PRECISION: tl.constexpr, FLAT: tl.constexpr,
    BM: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """This program's share of sum grad^T f(x) and of sum grad: STEPS tiles of tokens."""
    program, L = tl.program_id(0), B * D
    tiles_o, tiles_i, tiles_m = tl.cdiv(O, BO), tl.cdiv(I, BI), tl.cdiv(L, BM)
    split = program // tiles_i // tiles_o
    i = program % tiles_i * BI + tl.arange(0, BI)
    o = program // tiles_i % tiles_o * BO + tl.arange(0, BO)
    dtype: tl.constexpr = grad[0].dtype.element_ty
    total, sums = tl.zeros((BO, BI), tl.float32), tl.zeros((BO,), tl.float32)
    for step in range(split * STEPS, tl.minimum((split + 1) * STEPS, N * tiles_m)):
        n, p = step // tiles_m, step % tiles_m * BM + tl.arange(0, BM)
        inside = (p < L)[:, None] & (i < I)[None, :]
        a = tokens_of(x, n, p, i, D, FLAT)
        if statistics is None:
            a = operand(a, inside, dtype)
        else:
            a = load(a, inside)
            a = normalised(a, statistics, norm_weight, norm_bias, n, i, inside, N, G, I)
            a = rounded(a, dtype)
        g = tokens_of(grad, n, p, o, D, FLAT)
        g = load(g, (p < L)[:, None] & (o < O)[None, :])
        sums += tl.sum(g, 0)
        total = dot(tl.trans(rounded(g, dtype)), a, total, PRECISION)
    inside = (o < O)[:, None] & (i < I)[None, :]
    at = split.to(tl.int64) * O + o
    tl.store(dweight + at[:, None] * I + i[None, :], total, mask=inside)
    if program % tiles_i == 0:
        tl.store(dbias + at, sums, mask=o < O)


def weight_gradient(tokens, grad, x, outputs, inputs, *, norm=None):
    """(sum grad^T f(x), sum grad) over all tokens: (outputs, inputs) and (outputs,), float32."""
    statistics, norm_weight, norm_bias = (None, None, None) if norm is None else norm
    half = x[0].dtype != torch.float32
    bm = tokens.rows(32 if half else 16)
    bo, bi = (min(max(power_of_two(size), 16), 64) for size in (outputs, inputs))
    tiles = triton.cdiv(outputs, bo) * triton.cdiv(inputs, bi)
    steps = tokens.n * triton.cdiv(tokens.length, bm)
    share = triton.cdiv(steps, min(steps, max(SPLITS // tiles, 1)))
    splits = triton.cdiv(steps, share)
    dweight = grad[0].new_empty(splits, outputs, inputs, dtype=torch.float32)
    dbias = grad[0].new_empty(splits, outputs, dtype=torch.float32)
    _weight_gradient_kernel[(splits * tiles,)](
        grad, x, statistics, vector(norm_weight), vector(norm_bias), dweight, dbias,
        1 if statistics is None else statistics.shape[2],
        O=outputs, I=inputs, STEPS=share, PRECISION=precision(), BM=bm, BO=bo, BI=bi,
        num_warps=8, num_stages=2, maxnreg=registers(8) if half else None, **tokens.arguments(),
    )  # fmt: skip
    return dweight.sum(0), dbias.sum(0)
