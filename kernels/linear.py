"""Products of tokens with weights, for attention_block: y = x W^T + b + residual, and the gradient
of W.

The tokens of images (N, C, H, W) are their pixels in any layout, row m = n L + p of N L rows; a
buffer (N L, C) is one as well. In NHWC all rows lie one stride apart, and a tile is read in whole
vectors. Operands are rounded to the storage type of the tokens, sums are float32 and have a fixed
order.
"""

import torch
import triton
import triton.language as tl

from fastddpm.kernels.group_norm import pixels
from fastddpm.kernels.storage import dot, load, operand, rounded, store
from fastddpm.kernels.tiles import MAX_PIXELS, merged, power_of_two, registers
from fastddpm.precision import tf32_asked

SPLITS = 128  # programs that a weight's gradient is cut into, about
FEW = 128  # programs, for a GPU of about as many multiprocessors


class Tokens:
    """The images and buffers of a call as tuples (x, strides of n, c, b, d): B rows of D pixels.

    Where all tokens of all samples lie one stride apart (`flat`), d is that one.
    """

    def __init__(self, *images):
        self.n = images[0].shape[0]
        (self.b, self.d), self.images = pixels(images)
        self.length = self.b * self.d
        self.count = self.n * self.length
        if self.count > MAX_PIXELS:
            raise ValueError(f"{self.count} pixels in all samples are too many for one call")
        walked = [[x.stride(k) for x in images] for k in (0, 2, 3)]
        rows = merged([self.n, *images[0].shape[2:]], walked, False)
        self.flat = len(rows) == 1
        if self.flat:  # all of them are one row of pixels
            self.images = [(*x[:4], rows[0][1][k]) for k, x in enumerate(self.images)]

    def buffer(self, x):
        """The tuple of a contiguous (N L, C)."""
        c = x.shape[1]
        return (x, self.length * c, 1, self.d * c, c)

    def new(self, like, channels):
        """An uninitialised buffer."""
        return like.new_empty(self.count, channels)

    def arguments(self):
        return {"M": self.count, "B": self.b, "D": self.d, "FLAT": self.flat}

    def tile(self, most):
        """Rows of a tile: at most so many, at least what `dot` takes."""
        return min(max(power_of_two(self.count), 16), most)


def precision():
    """How float32 operands are multiplied: as torch's own products are told to."""
    return "tf32" if tf32_asked() else "ieee"


@triton.jit
def tokens_of(x, m, c, B, D, FLAT: tl.constexpr):
    """(tokens, channels) pointers at the rows m."""
    if FLAT:
        row = m.to(tl.int64) * x[4]
    else:
        p = m % (B * D)
        row = (m // (B * D)).to(tl.int64) * x[1]
        row += (p // D).to(tl.int64) * x[3] + (p % D).to(tl.int64) * x[4]
    return (x[0] + row)[:, None] + (c.to(tl.int64) * x[2])[None, :]


@triton.jit
def _linear_kernel(
    x, weight, bias, residual, y, M, B, D, I, O,
    PRECISION: tl.constexpr, FLAT: tl.constexpr,
    BM: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    tiles_o = tl.cdiv(O, BO)  # those of the same rows are neighbours
    m = tl.program_id(0) // tiles_o * BM + tl.arange(0, BM)
    o = tl.program_id(0) % tiles_o * BO + tl.arange(0, BO)
    dtype: tl.constexpr = x[0].dtype.element_ty
    total = tl.zeros((BM, BO), tl.float32)
    for start in range(0, I, BI):
        i = start + tl.arange(0, BI)
        a = operand(tokens_of(x, m, i, B, D, FLAT), (m < M)[:, None] & (i < I)[None, :], dtype)
        w = (
            weight[0]
            + (o.to(tl.int64) * weight[1])[None, :]
            + (i.to(tl.int64) * weight[2])[:, None]
        )
        w = operand(w, (o < O)[None, :] & (i < I)[:, None], dtype)
        total = dot(a, w, total, PRECISION)
    inside = (m < M)[:, None] & (o < O)[None, :]
    if bias is not None:
        total += load(bias[0] + o * bias[1], o < O)[None, :]
    if residual is not None:
        total += load(tokens_of(residual, m, o, B, D, FLAT), inside)
    store(tokens_of(y, m, o, B, D, FLAT), total, inside)


def _linear_tiles(tokens, outputs, half):
    """(BM, BO, BI, warps, stages): large tiles read operands less often, many keep a GPU busy."""
    width = max(power_of_two(outputs), 16)
    if not half:
        return tokens.tile(64), min(width, 64), 16, 8, 3
    many = triton.cdiv(tokens.count, 128) * triton.cdiv(outputs, 128) >= FEW
    size, warps = (128, 8) if many else (64, 4)
    return tokens.tile(size), min(width, size), 32, warps, 4


def linear(tokens, x, weight, bias, y, *, residual=None, transposed=False):
    """y = x weight^T + bias + residual over the tokens; tuples but for weight and bias.

    transposed: weight instead of weight^T
    """
    outputs, inputs = weight.shape[::-1] if transposed else weight.shape
    strides = weight.stride()[::-1] if transposed else weight.stride()
    half = x[0].dtype != torch.float32
    bm, bo, bi, warps, stages = _linear_tiles(tokens, outputs, half)
    grid = (triton.cdiv(tokens.count, bm) * triton.cdiv(outputs, bo),)
    _linear_kernel[grid](
        x, (weight, *strides), None if bias is None else (bias, bias.stride(0)), residual, y,
        I=inputs, O=outputs, PRECISION=precision(), BM=bm, BO=bo, BI=bi,
        num_warps=warps, num_stages=stages, maxnreg=None if half else registers(warps),
        **tokens.arguments(),
    )  # fmt: skip


@triton.jit
def _weight_gradient_kernel(
    grad, x, dweight, dbias, M, B, D, O, I, STEPS,
    PRECISION: tl.constexpr, FLAT: tl.constexpr,
    BM: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """This program's share of sum grad^T x and of sum grad: STEPS tiles of tokens."""
    program = tl.program_id(0)
    tiles_o, tiles_i = tl.cdiv(O, BO), tl.cdiv(I, BI)
    split = program // tiles_i // tiles_o
    i = program % tiles_i * BI + tl.arange(0, BI)
    o = program // tiles_i % tiles_o * BO + tl.arange(0, BO)
    dtype: tl.constexpr = x[0].dtype.element_ty
    total, sums = tl.zeros((BO, BI), tl.float32), tl.zeros((BO,), tl.float32)
    for step in range(split * STEPS, tl.minimum((split + 1) * STEPS, tl.cdiv(M, BM))):
        m = step * BM + tl.arange(0, BM)
        a = operand(tokens_of(x, m, i, B, D, FLAT), (m < M)[:, None] & (i < I)[None, :], dtype)
        g = load(tokens_of(grad, m, o, B, D, FLAT), (m < M)[:, None] & (o < O)[None, :])
        sums += tl.sum(g, 0)
        total = dot(tl.trans(rounded(g, dtype)), a, total, PRECISION)
    inside = (o < O)[:, None] & (i < I)[None, :]
    at = split.to(tl.int64) * O + o
    tl.store(dweight + at[:, None] * I + i[None, :], total, mask=inside)
    if program % tiles_i == 0:
        tl.store(dbias + at, sums, mask=o < O)


def weight_gradient(tokens, grad, x, outputs, inputs):
    """(sum grad^T x, sum grad) over all tokens: (outputs, inputs) and (outputs,), float32."""
    half = x[0].dtype != torch.float32
    bm = tokens.tile(32 if half else 16)
    bo, bi = (min(max(power_of_two(size), 16), 64) for size in (outputs, inputs))
    tiles = triton.cdiv(outputs, bo) * triton.cdiv(inputs, bi)
    steps = triton.cdiv(tokens.count, bm)
    share = triton.cdiv(steps, min(steps, max(SPLITS // tiles, 1)))
    splits = triton.cdiv(steps, share)
    dweight = grad[0].new_empty(splits, outputs, inputs, dtype=torch.float32)
    dbias = grad[0].new_empty(splits, outputs, dtype=torch.float32)
    _weight_gradient_kernel[(splits * tiles,)](
        grad, x, dweight, dbias,
        O=outputs, I=inputs, STEPS=share, PRECISION=precision(), BM=bm, BO=bo, BI=bi,
        num_warps=8, num_stages=2, maxnreg=registers(8) if half else None, **tokens.arguments(),
    )  # fmt: skip
    return dweight.sum(0), dbias.sum(0)
