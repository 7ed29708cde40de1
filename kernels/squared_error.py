"""squared_error: a sample's mean of (prediction - target)^2, and its gradient, one pass each.

A program sums a chunk of one sample; where a sample has several, a second kernel adds their sums
in order.
"""

import torch
import triton
import triton.language as tl

from fastddpm.kernels.storage import INTERPRETED, load, store
from fastddpm.kernels.tiles import Tiles, at, like, power_of_two, tile

CHUNK = 4096  # elements of a program


@triton.jit(do_not_specialize=["CHUNKS"])
def _squared_error_kernel(
    prediction, target, out, CHUNKS, A, B, D,
    BLOCK: tl.constexpr, ROW: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    n, chunk = program // CHUNKS, program % CHUNKS
    element = chunk * BLOCK + tl.arange(0, BLOCK)
    if ROW:
        a, p = element * 0, element
    else:
        a, p = element // (B * D), element % (B * D)
    inside = element < A * B * D
    p_at = pointers(prediction, n, a, p, D, FLAT)
    t_at = pointers(target, n, a, p, D, FLAT)
    d = (load(p_at, inside) - load(t_at, inside)).to(tl.float64)
    tl.store(out + program, tl.sum(d * d, 0))


@triton.jit
def pointers(x, n, a, p, D, FLAT: tl.constexpr):
    """(BLOCK,) pointers at the pixels p of the rows a of sample n."""
    row = x[0] + n.to(tl.int64) * x[1] + a.to(tl.int64) * x[2]
    p = p.to(tl.int64)
    return row + (p * x[4] if FLAT else p // D * x[3] + p % D * x[4])


@triton.jit(do_not_specialize=["CHUNKS", "elements"])
def _squared_error_mean_kernel(sums, out, CHUNKS, elements, BLOCK: tl.constexpr):
    """A sample's sums, BLOCK at once, to its mean."""
    n = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, CHUNKS, BLOCK):
        k = first + tl.arange(0, BLOCK)
        total += tl.load(sums + n.to(tl.int64) * CHUNKS + k, mask=k < CHUNKS, other=0.0)
    mean = tl.sum(total, 0) / elements.to(tl.float64)
    tl.store(out + n, mean.to(tl.float32))


@triton.jit(do_not_specialize=["N"])
def _squared_error_backward_kernel(
    grad, scale, prediction, target, dprediction, N, A, B, D,
    BN: tl.constexpr, BA: tl.constexpr, BP: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    n, a, p, inside = tile(N, A, B, D, BN, BA, BP)
    slope = load(grad[0] + n.to(tl.int64) * grad[1], n < N)[:, None] * scale
    d = load(at(prediction, n, a, p, D, FLAT), inside) - load(at(target, n, a, p, D, FLAT), inside)
    store(at(dprediction, n, a, p, D, FLAT), slope * d, inside)


def _images(*tensors):
    """As (N, C, H, W)."""
    return [x[(..., *(None,) * (4 - x.dim()))] for x in tensors]


def squared_error(prediction, target):
    """(N,) float32."""
    n, elements = prediction.shape[0], prediction.shape[1:].numel()
    out = torch.empty(n, dtype=torch.float32, device=prediction.device)
    if elements == 0:
        return out.fill_(torch.nan)
    if n:
        images = _images(prediction, target)
        if prediction.dim() == 4 and prediction.stride(1) == 1:  # a sum knows no order
            images = [x.permute(0, 2, 3, 1) for x in images]
        tiles = Tiles(images)
        a, b, d = tiles.shape
        block = min(power_of_two(elements), (8 if INTERPRETED.value else 1) * CHUNK)
        chunks = triton.cdiv(elements, block)
        sums = torch.empty(n * chunks, dtype=torch.float64, device=prediction.device)
        _squared_error_kernel[(n * chunks,)](
            *tiles.views, sums, chunks, a, b, d, BLOCK=block, ROW=a * b == 1, FLAT=b == 1
        )
        _squared_error_mean_kernel[(n,)](
            sums, out, chunks, elements, BLOCK=min(power_of_two(chunks), 1024)
        )
    return out


def squared_error_backward(grad, prediction, target):
    """The gradient of prediction: 2 grad[n] (prediction - target) / elements, like it."""
    dprediction = like(prediction)
    if dprediction.numel():
        tiles = Tiles(_images(prediction, target, dprediction))
        elements = prediction.shape[1:].numel()
        _squared_error_backward_kernel[tiles.grid](
            (grad, grad.stride(0)), 2.0 / elements, *tiles.views, **tiles.arguments()
        )
    return dprediction
