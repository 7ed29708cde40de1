"""posterior_step: x_{t-1} = mean + sigma_t z through the x0 prediction (Eq. 15, clip, Eq. 7;
Algorithm 2), in one pass and in place if asked.
"""

import triton
import triton.language as tl

from fastddpm.kernels.philox import Stream, normals
from fastddpm.kernels.storage import load, store
from fastddpm.kernels.tiles import Tiles, at, coefficient, like, per_sample, tile, timestep


@triton.jit(do_not_specialize=["N", "seed"])
def _posterior_step_kernel(
    xt, model_output, z, log_variance, out, t, table, steps, seed, step, index, N, A, B, D,
    PREDICTION: tl.constexpr, CLIP: tl.constexpr, LEARNED_RANGE: tl.constexpr,
    BN: tl.constexpr, BA: tl.constexpr, BP: tl.constexpr, FLAT: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    n, a, p, inside = tile(N, A, B, D, BN, BA, BP)
    row = timestep(t, n, N, steps)
    mean = load(at(model_output, n, a, p, D, FLAT), inside)
    if PREDICTION != "mean":
        x = load(at(xt, n, a, p, D, FLAT), inside)
        x0 = mean
        if PREDICTION == "eps":
            x0 = coefficient(table, row, 2) * x - coefficient(table, row, 3) * x0
        if PREDICTION == "v":
            x0 = coefficient(table, row, 0) * x - coefficient(table, row, 1) * x0
        if CLIP:  # comparisons that keep a NaN
            x0 = tl.where(x0 > 1.0, 1.0, x0)
            x0 = tl.where(x0 < -1.0, -1.0, x0)
        mean = coefficient(table, row, 4) * x0 + coefficient(table, row, 5) * x
    sigma = coefficient(table, row, 6)
    noisy = sigma > 0.0
    drawn = inside & noisy
    if log_variance is not None:
        word = load(at(log_variance, n, a, p, D, FLAT), drawn)
        if LEARNED_RANGE:  # from log beta-tilde, which sigma has, to log beta
            half_way = 0.5 * coefficient(table, row, 7) - tl.log(tl.where(noisy, sigma, 1.0))
            sigma = sigma * tl.exp((0.5 * word + 0.5) * half_way)
        else:
            sigma = tl.exp(0.5 * word)
    if index is None:
        noise = load(at(z, n, a, p, D, FLAT), drawn)
    else:
        noise = normals(seed, step, index, n, a, p, N, A, B * D, BN, BA, BP, WHOLE)
    store(at(out, n, a, p, D, FLAT), tl.where(noisy, mean + sigma * noise, mean), inside)


def posterior_step(
    xt, model_output, t, table, *,
    z=None, seed=None, step=None, sample_index=None,
    clip=True, prediction="eps", log_variance=None, learned_range=False, out=None,
):  # fmt: skip
    """x_{t-1}. A z that is not given is drawn in float32, step t by default; its seed may be (1,)
    int64 on the device, read when the kernel runs. out may be xt.
    """
    stream = None if z is not None else Stream(seed, t if step is None else step, sample_index)
    out = like(xt) if out is None else out
    if out.numel():
        tiles = Tiles([xt, model_output, z, log_variance, out])
        random = {"seed": 0, "step": None, "index": None, "WHOLE": True}
        _posterior_step_kernel[tiles.grid](
            *tiles.views, per_sample(t), table, table.shape[0],
            **(random if stream is None else stream.arguments(tiles)),
            PREDICTION=prediction, CLIP=clip, LEARNED_RANGE=learned_range, **tiles.arguments(),
        )  # fmt: skip
    return out
