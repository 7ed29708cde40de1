"""Dropout by the random number contract, on the tiles of group_norm.py: an element is kept where
its word is at least floor(p 2^32). Elements count channels last, so that in NHWC four neighbours
share a block of words.
"""

import triton
import triton.language as tl

from fastddpm.kernels.group_norm import columns
from fastddpm.kernels.philox import Stream, philox4x32, stream_words


def dropout_arguments(cut, p, seed, step, sample_index):
    """What `dropout_factors` takes, by name. p in [0, 1); none with p = 0."""
    if not p:
        return {
            "seed": 0, "step": None, "index": None,
            "threshold": 0, "keep_scale": 1.0, "QUADS": False,
        }  # fmt: skip
    stream = Stream(seed, step, sample_index)
    return {
        "seed": stream.seed, "step": stream.step, "index": stream.index,
        "threshold": int(p * 2**32), "keep_scale": 1 / (1 - p), "QUADS": cut.quads,
    }  # fmt: skip


@triton.jit
def dropout_factors(
    seed, step, index, threshold, keep_scale, block, p, N, G: tl.constexpr, CG: tl.constexpr,
    BN: tl.constexpr, GB: tl.constexpr, BG: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """(BP, BC): keep_scale where an element of the pixels p is kept, 0 where not. QUADS: a block of
    four words is that of four neighbouring columns, and drawn once.
    """
    WIDTH: tl.constexpr = 4 if QUADS else 1
    BC: tl.constexpr = BN * GB * BG
    n, c, _ = columns(block, tl.arange(0, BC // WIDTH) * WIDTH, N, G, CG, BN, GB, BG)
    k0, k1, c1, c2, c3 = stream_words(seed, step, index, n, n < N)
    if BN > 1:
        c1, c2, c3 = c1[None, :], c2[None, :], c3[None, :]
    element = p.to(tl.int32)[:, None] * (G * CG) + c[None, :]
    kept = threshold.to(tl.uint32)
    w0, w1, w2, w3 = philox4x32((element // 4).to(tl.uint32), c1, c2, c3, k0, k1)
    if QUADS:
        f0 = tl.where(w0 >= kept, keep_scale, 0.0)
        f1 = tl.where(w1 >= kept, keep_scale, 0.0)
        f2 = tl.where(w2 >= kept, keep_scale, 0.0)
        f3 = tl.where(w3 >= kept, keep_scale, 0.0)
        factors = tl.join(tl.join(f0, f2), tl.join(f1, f3))
        factors = tl.reshape(factors, (p.shape[0], BC))
    else:
        j = element % 4
        word = tl.where(j < 2, tl.where(j == 0, w0, w1), tl.where(j == 2, w2, w3))
        factors = tl.where(word >= kept, keep_scale, 0.0)
    return factors
