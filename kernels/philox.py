"""The random number contract (csrc/philox.h) in Triton, and randn, which is nothing else.

Philox4x32-10 with key = seed and counter = (block of 4 elements in the sample, step, sample index
low, high); Box-Muller as in csrc/math.h. Element 4 b + j of a contiguous sample comes from word j
of block b, so a tile of consecutive elements draws each block once.
"""

import torch
import triton
import triton.language as tl

from fastddpm.kernels.storage import store
from fastddpm.kernels.tiles import Tiles, at, per_sample, tile


@triton.jit
def philox4x32(block, step, index_low, index_high, key_low, key_high):
    """The four words of each block; all arguments uint32."""
    c0, c1, c2, c3 = block, step, index_low, index_high
    k0, k1 = key_low, key_high
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def logarithm(x):
    """log(x) to 2 ulp for a normal positive x: the fast one has no digits near 1."""
    bits = x.to(tl.int32, bitcast=True)
    k = (bits - 0x3F3504F3) >> 23
    f = (bits - (k << 23)).to(tl.float32, bitcast=True) - 1.0
    f2, n = f * f, k.to(tl.float32)
    p = 7.0376836292e-2 * f - 1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f - 1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f - 1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f - 2.4999993993e-1
    p = p * f + 3.3333331174e-1
    p = p * f * f2 - 2.12194440e-4 * n - 0.5 * f2
    return 0.693359375 * n + (f + p)


@triton.jit
def cos_sin_2pi(u):
    """(cos(2 pi u), sin(2 pi u)) for u in [0, 1]. The reduction u = q/4 + r is exact."""
    shifted = u * 4.0 + 12582912.0
    q = shifted.to(tl.uint32, bitcast=True)
    r = (shifted - 12582912.0) * -0.25 + u
    r2 = r * r
    s = 42.058693944897654 * r2 - 76.70585975306136
    s = s * r2 + 81.60524927607504
    s = s * r2 - 41.341702240399755
    s = (s * r2 + 6.283185307179586) * r
    c = -26.426256783374397 * r2 + 60.24464137187666
    c = c * r2 - 85.45681720669373
    c = c * r2 + 64.93939402266829
    c = c * r2 - 19.739208802178716
    c = c * r2 + 1.0
    swap = (q & 1) != 0
    cos_sign, sin_sign = ((q + 1) & 2) << 30, (q & 2) << 30
    cos = tl.where(swap, s, c).to(tl.uint32, bitcast=True) ^ cos_sign
    sin = tl.where(swap, c, s).to(tl.uint32, bitcast=True) ^ sin_sign
    return cos.to(tl.float32, bitcast=True), sin.to(tl.float32, bitcast=True)


@triton.jit
def unit_interval(word):
    """fl32(fl32(word) 2^-32 + 2^-33) in (0, 1]."""
    return word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10


@triton.jit
def box_muller(w0, w1):
    radius = tl.sqrt(-2.0 * logarithm(unit_interval(w0)))
    cos, sin = cos_sin_2pi(unit_interval(w1))
    return radius * cos, radius * sin


@triton.jit
def stream_words(seed, step, index, n, inside):
    """(key low, key high, step, index low, index high) of the samples n, uint32.

    seed: 64 bits, or a pointer at them;  step, index: (pointer, stride)
    """
    if seed.dtype.is_ptr():
        seed = tl.load(seed)
    seed, n = seed.to(tl.int64), n.to(tl.int64)
    sample_step = tl.load(step[0] + n * step[1], mask=inside, other=0)
    sample_index = tl.load(index[0] + n * index[1], mask=inside, other=0)
    low, high = sample_index.to(tl.uint32), (sample_index >> 32).to(tl.uint32)
    return seed.to(tl.uint32), (seed >> 32).to(tl.uint32), sample_step.to(tl.uint32), low, high


@triton.jit
def normals(
    seed, step, index, n, a, p, N, A, PIXELS,
    BN: tl.constexpr, BA: tl.constexpr, BP: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """(R, BP) normals for the pixels p of the rows (n, a). step, index: (pointer, stride).

    WHOLE: no block of four reaches over the end of a row, so that a tile draws each block once;
    else each element draws its own block.
    """
    k0, k1, c1, c2, c3 = stream_words(seed, step, index, n, n < N)
    c1, c2, c3 = c1[:, None], c2[:, None], c3[:, None]
    first = a.to(tl.int64)[:, None] * PIXELS
    if WHOLE:
        start = tl.program_id(0) % tl.cdiv(PIXELS, BP) * (BP // 4)
        quad = start + tl.arange(0, BP // 4)
        block = (first // 4 + quad[None, :]).to(tl.uint32)
        w0, w1, w2, w3 = philox4x32(block, c1, c2, c3, k0, k1)
        z0, z1 = box_muller(w0, w1)
        z2, z3 = box_muller(w2, w3)
        return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (BN * BA, BP))
    element = first + p[None, :]
    block, word = (element // 4).to(tl.uint32), (element % 4).to(tl.int32)
    w0, w1, w2, w3 = philox4x32(block, c1, c2, c3, k0, k1)
    z0, z1 = box_muller(tl.where(word < 2, w0, w2), tl.where(word < 2, w1, w3))
    return tl.where(word % 2 == 0, z0, z1)


@triton.jit(do_not_specialize=["N", "seed"])
def _randn_kernel(
    out, seed, step, index, N, A, B, D,
    BN: tl.constexpr, BA: tl.constexpr, BP: tl.constexpr, FLAT: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    n, a, p, inside = tile(N, A, B, D, BN, BA, BP)
    z = normals(seed, step, index, n, a, p, N, A, B * D, BN, BA, BP, WHOLE)
    store(at(out, n, a, p, D, FLAT), z, inside)


class Stream:
    """The random numbers of a call: seed (an int or its 64 bits as (1,) int64 on the device), step
    (an int or (N,)) and sample_index (N,).
    """

    def __init__(self, seed, step, sample_index):
        if not isinstance(step, torch.Tensor):
            step = torch.full_like(sample_index[:1], step).expand_as(sample_index)
        if not isinstance(seed, torch.Tensor) and seed >= 1 << 63:
            seed -= 1 << 64  # the int64 of the same bits: a kernel's integers have few types then
        self.seed = seed
        self.step, self.index = per_sample(step), per_sample(sample_index)

    def arguments(self, tiles):
        a, b, d = tiles.shape
        return {
            "seed": self.seed, "step": self.step, "index": self.index,
            "WHOLE": a == 1 or b * d % 4 == 0,
        }  # fmt: skip


def randn(shape, *, seed, step, sample_index, dtype=torch.float32):
    """Standard normals of the RNG contract: (N, ...), contiguous."""
    out = torch.empty(shape, dtype=dtype, device=sample_index.device)
    if out.numel():
        tiles = Tiles([out.view(out.shape[0], 1, 1, -1)])
        stream = Stream(seed, step, sample_index)
        _randn_kernel[tiles.grid](*tiles.views, **stream.arguments(tiles), **tiles.arguments())
    return out
