"""residual_sum: u = x + before + residual in one pass: what group_norm_silu adds before its norm,
where no norm comes next.
"""

import triton
import triton.language as tl

from fastddpm.kernels.storage import load, store
from fastddpm.kernels.tiles import Tiles, at, like, tile


@triton.jit(do_not_specialize=["N"])
def _residual_sum_kernel(
    x, before, residual, u, N, A, B, D,
    BN: tl.constexpr, BA: tl.constexpr, BP: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    n, a, p, inside = tile(N, A, B, D, BN, BA, BP)
    total = load(at(x, n, a, p, D, FLAT), inside)
    if before is not None:
        total += load(at(before, n, a, p, D, FLAT), inside)
    if residual is not None:
        total += load(at(residual, n, a, p, D, FLAT), inside)
    store(at(u, n, a, p, D, FLAT), total, inside)


def residual_sum(x, residual=None, before=None):
    """x + before + residual, before (C,) or (N, C) over the channels; rounded once, like x."""
    u = like(x)
    if u.numel():
        axes = (None,) * (x.dim() - 2)
        if before is not None:  # as an image with strides of 0 it is walked like the others
            before = before[(..., *axes)].expand(x.shape)
        more = (..., *(None,) * (4 - x.dim()))
        images = [None if image is None else image[more] for image in (x, before, residual, u)]
        tiles = Tiles(images)
        _residual_sum_kernel[tiles.grid](*tiles.views, **tiles.arguments())
    return u
