"""noise: x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps   (DDPM Eq. 4), eps read or drawn, in one
pass over bytes or floats.
"""

import torch
import triton
import triton.language as tl

from fastddpm.kernels.philox import Stream, normals
from fastddpm.kernels.storage import load, rounded, widened
from fastddpm.kernels.tiles import (
    Tiles,
    at,
    coefficient,
    like,
    per_sample,
    rows_of,
    tile,
    timestep,
)


@triton.jit(do_not_specialize=["N", "seed"])
def _noise_kernel(
    x0, eps, xt, t, table, steps, flip, seed, step, index, N, A, B, D,
    BN: tl.constexpr, BA: tl.constexpr, BP: tl.constexpr, FLAT: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    n, a, p, inside = tile(N, A, B, D, BN, BA, BP)
    row = timestep(t, n, N, steps)
    if index is None:
        e = load(at(eps, n, a, p, D, FLAT), inside)
    else:
        # x_t is made of eps as it is stored: a target of the training loss has to match it.
        z = normals(seed, step, index, n, a, p, N, A, B * D, BN, BA, BP, WHOLE)
        z = rounded(z, xt[0].dtype.element_ty)
        if eps is not None:
            tl.store(at(eps, n, a, p, D, FLAT), z, mask=inside)
        e = widened(z)
    if flip is None:
        source = at(x0, n, a, p, D, FLAT)
    else:
        mirrored = tl.load(flip + n, mask=n < N, other=0)[:, None] != 0
        d = (p % D).to(tl.int64)[None, :]
        d = tl.where(mirrored, D - 1 - d, d)
        source = rows_of(x0, n, a) + (p // D).to(tl.int64)[None, :] * x0[3] + d * x0[4]
    x = load(source, inside)
    if x0[0].dtype.element_ty == tl.uint8:
        x = tl.div_rn(x, 127.5) - 1.0
    x = coefficient(table, row, 0) * x + coefficient(table, row, 1) * e
    tl.store(at(xt, n, a, p, D, FLAT), rounded(x, xt[0].dtype.element_ty), mask=inside)


def noise(
    x0, t, table, *,
    eps=None, seed=None, step=None, sample_index=None, flip=None, dtype=None, keep_eps=True,
):  # fmt: skip
    """(x_t, eps). An eps that is not given is drawn, rounded to the dtype of x_t, then used; None
    for one that is not kept.
    """
    if dtype is None:
        floating = eps if x0.dtype == torch.uint8 else x0
        dtype = torch.float32 if floating is None else floating.dtype
    stream = None if eps is not None else Stream(seed, t if step is None else step, sample_index)
    eps = like(x0, dtype) if eps is None and keep_eps else eps
    xt = like(x0, dtype)
    if xt.numel():
        tiles = Tiles([x0, eps, xt], whole_rows=flip is not None)
        random = {"seed": 0, "step": None, "index": None, "WHOLE": True}
        _noise_kernel[tiles.grid](
            *tiles.views, per_sample(t), table, table.shape[0],
            None if flip is None else flip.view(torch.uint8),
            **(random if stream is None else stream.arguments(tiles)), **tiles.arguments(),
        )  # fmt: skip
    return xt, eps
