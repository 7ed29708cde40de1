"""vlb_term: a term of Eq. 5 of each image in bits/dim and the mse of its x0 prediction, one pass.

A program sums a chunk of one image in float64; where an image has several, a second kernel adds
their sums in order.
"""

import torch
import triton
import triton.language as tl

from fastddpm.kernels.discretized_log_likelihood import log_bin_mass
from fastddpm.kernels.philox import Stream, box_muller, philox4x32, stream_words
from fastddpm.kernels.squared_error import pointers
from fastddpm.kernels.storage import INTERPRETED, load
from fastddpm.kernels.tiles import Tiles, per_sample, power_of_two

CHUNK = 256  # elements of a program: two a thread, each takes thirty registers in float64


@triton.jit(do_not_specialize=["CHUNKS", "seed"])
def _vlb_term_kernel(
    x0, xt, log_variance, model_output, sums, t, table, log_ratio, steps, seed, step, index,
    CHUNKS, A, B, D,
    PREDICTION: tl.constexpr, CLIP: tl.constexpr, LEARNED_RANGE: tl.constexpr,
    BLOCK: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    n, chunk = program // CHUNKS, program % CHUNKS
    element = chunk * BLOCK + tl.arange(0, BLOCK)
    a, p = element // (B * D), element % (B * D)
    inside = element < A * B * D
    row = tl.load(t[0] + n.to(tl.int64) * t[1])
    row = tl.minimum(tl.maximum(row, 0), steps - 1)
    mean_x0, mean_xt = _entry(table, row, 4), _entry(table, row, 5)

    value = load(pointers(x0, n, a, p, D, FLAT), inside)
    image = value.to(tl.float64)
    if x0[0].dtype.element_ty == tl.uint8:
        image = image / 127.5 - 1.0
    if index is None:
        x = load(pointers(xt, n, a, p, D, FLAT), inside)
    else:
        unit = value
        if x0[0].dtype.element_ty == tl.uint8:
            unit = tl.div_rn(value, 127.5) - 1.0
        z = _normals(seed, step, index, n, element)
        x = tl.load(table + row * 8) * unit + tl.load(table + row * 8 + 1) * z
    x = x.to(tl.float64)
    output = load(pointers(model_output, n, a, p, D, FLAT), inside).to(tl.float64)
    predicted = output
    if PREDICTION == "eps":
        predicted = _entry(table, row, 2) * x - _entry(table, row, 3) * output
    if PREDICTION == "v":
        predicted = _entry(table, row, 0) * x - _entry(table, row, 1) * output
    if PREDICTION == "mean":
        predicted = (output - mean_xt * x) / mean_x0
    clipped = predicted
    if CLIP:  # comparisons that keep a NaN
        clipped = tl.where(clipped > 1.0, 1.0, clipped)
        clipped = tl.where(clipped < -1.0, -1.0, clipped)
    of_mean = clipped
    if PREDICTION == "mean":
        of_mean = predicted

    ratio = tl.load(log_ratio + row).to(tl.float64)
    lower = _entry(table, row, 7) - ratio
    if log_variance is None:
        apart = image * 0.0 - ratio
    else:
        word = load(pointers(log_variance, n, a, p, D, FLAT), inside).to(tl.float64)
        if LEARNED_RANGE:
            apart = -(0.5 * word + 0.5) * ratio
        else:
            apart = lower - word
    if row == 0:
        mean = mean_x0 * of_mean + mean_xt * x
        nats = -log_bin_mass(image, mean, 0.5 * (lower - apart))
    else:
        d = mean_x0 * (image - of_mean)
        nats = 0.5 * (_expm1(apart) - apart + d * d * tl.exp(apart - lower))
    error = clipped - image
    tl.store(sums + 2 * program, tl.sum(tl.where(inside, nats, 0.0), 0))
    tl.store(sums + 2 * program + 1, tl.sum(tl.where(inside, error * error, 0.0), 0))


@triton.jit
def _entry(table, row, COLUMN: tl.constexpr):
    return tl.load(table + row * 8 + COLUMN).to(tl.float64)


@triton.jit
def _expm1(x):
    """e^x - 1 for float64."""
    series = x * (1.0 + x * (0.5 + x * (1.0 / 6.0 + x * (1.0 / 24.0 + x * (1.0 / 120.0)))))
    return tl.where(tl.abs(x) < 1e-3, series, tl.exp(x) - 1.0)


@triton.jit
def _normals(seed, step, index, n, element):
    """The normals of elements of sample n: each draws its block."""
    k0, k1, c1, c2, c3 = stream_words(seed, step, index, n, True)
    block, word = (element // 4).to(tl.uint32), element % 4
    w0, w1, w2, w3 = philox4x32(block, c1, c2, c3, k0, k1)
    z0, z1 = box_muller(tl.where(word < 2, w0, w2), tl.where(word < 2, w1, w3))
    return tl.where(word % 2 == 0, z0, z1)


@triton.jit(do_not_specialize=["CHUNKS", "elements"])
def _vlb_term_sums_kernel(sums, term, mse, CHUNKS, elements, BLOCK: tl.constexpr):
    """An image's sums, BLOCK at once, to bits/dim and a mean."""
    n = tl.program_id(0)
    nats, squares = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for first in range(0, CHUNKS, BLOCK):
        k = first + tl.arange(0, BLOCK)
        at = sums + 2 * (n.to(tl.int64) * CHUNKS + k)
        nats += tl.load(at, mask=k < CHUNKS, other=0.0)
        squares += tl.load(at + 1, mask=k < CHUNKS, other=0.0)
    count = elements.to(tl.float64)
    tl.store(term + n, (tl.sum(nats, 0) / count * 1.4426950408889634).to(tl.float32))
    tl.store(mse + n, (tl.sum(squares, 0) / count).to(tl.float32))


def vlb_term(
    x0, xt, model_output, t, table, log_ratio, *,
    seed=None, step=None, sample_index=None,
    clip=True, prediction="eps", log_variance=None, learned_range=False,
):  # fmt: skip
    """(bits/dim, mse), (N,) float32. An x_t that is not given is drawn, step t by default."""
    n, elements = x0.shape[0], x0.shape[1:].numel()
    term, mse = (torch.empty(n, dtype=torch.float32, device=x0.device) for _ in range(2))
    if elements == 0:
        return term.fill_(torch.nan), mse.fill_(torch.nan)
    if n:
        random = {"seed": 0, "step": None, "index": None}
        if xt is None:
            stream = Stream(seed, t if step is None else step, sample_index)
            random = {"seed": stream.seed, "step": stream.step, "index": stream.index}
        tiles = Tiles([x0, xt, log_variance, model_output])
        a, b, d = tiles.shape
        block = min(power_of_two(elements), (64 if INTERPRETED.value else 1) * CHUNK)
        chunks = triton.cdiv(elements, block)
        sums = torch.empty(2 * n * chunks, dtype=torch.float64, device=x0.device)
        _vlb_term_kernel[(n * chunks,)](
            *tiles.views, sums, per_sample(t), table, log_ratio, table.shape[0],
            **random, CHUNKS=chunks, A=a, B=b, D=d,
            PREDICTION=prediction, CLIP=clip, LEARNED_RANGE=learned_range,
            BLOCK=block, FLAT=b == 1,
        )  # fmt: skip
        _vlb_term_sums_kernel[(n,)](
            sums, term, mse, chunks, elements, BLOCK=min(power_of_two(chunks), 1024)
        )
    return term, mse
