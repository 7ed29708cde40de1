"""choices: t and the mirroring of each example of a batch, one Philox block each."""

import torch
import triton
import triton.language as tl

from fastddpm.kernels.philox import philox4x32
from fastddpm.kernels.tiles import per_sample

BLOCK = 128  # examples of a program


@triton.jit(do_not_specialize=["seed", "step", "levels"])
def _choices_kernel(t, flip, seed, step, index, levels, N, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    seed = seed.to(tl.int64)
    example = tl.load(index[0] + n * index[1], mask=n < N, other=0)
    w0, w1, _, _ = philox4x32(
        tl.zeros((BLOCK,), tl.uint32),
        tl.zeros((BLOCK,), tl.uint32) + step.to(tl.uint32),
        example.to(tl.uint32),
        (example >> 32).to(tl.uint32),
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )
    tl.store(t + n, (w0.to(tl.int64) * levels.to(tl.int64)) >> 32, mask=n < N)
    tl.store(flip + n, (w1 & 1).to(tl.uint8), mask=n < N)


def choices(sample_index, *, seed, step, levels):
    """(t, flip), (N,) int64 and (N,) bool."""
    (n,) = sample_index.shape
    t = torch.empty(n, dtype=torch.int64, device=sample_index.device)
    flip = torch.empty(n, dtype=torch.bool, device=sample_index.device)
    if n:
        # As the int64 of the same bits: a kernel's integers have few types then.
        seed = seed - (1 << 64) if seed >= 1 << 63 else seed
        _choices_kernel[(triton.cdiv(n, BLOCK),)](
            t, flip.view(torch.uint8), seed, step, per_sample(sample_index), levels, n, BLOCK=BLOCK
        )
    return t, flip
