"""discretized_log_likelihood: log of the Gaussian's mass in the pixel's bin   (DDPM Eq. 13).

float64 inside. The bin is mirrored so that its centre lies on the left of the mean, as in
`reference`, and its mass is written with erfcx, which neither underflows nor cancels there.
"""

import torch
import triton
import triton.language as tl

from fastddpm.kernels.storage import load, store
from fastddpm.kernels.tiles import Tiles, at, like, tile


@triton.jit
def erfcx(y):
    """e^(y^2) erfc(y) for float64 y >= 0, relative error below 1e-13.

    (1 + 2 y) erfcx(y) is smooth in (y - 3.75) / (y + 3.75): its Chebyshev expansion of degree 18.
    """
    r = 1.0 / (y + 3.75)
    t = (y - 3.75) * r
    p = -1.309340852980939e-07 * t + 1.2872794002928335e-08
    p = p * t + 1.529291119075367e-06
    p = p * t - 1.0898661836870561e-06
    p = p * t - 1.1217512351895887e-05
    p = p * t + 2.2499526835714637e-05
    p = p * t + 5.150773833629474e-05
    p = p * t - 0.000290224735566095
    p = p * t + 0.0002937677736782558
    p = p * t + 0.0017556525845602463
    p = p * t - 0.009746591834540838
    p = p * t + 0.028362271401010403
    p = p * t - 0.058693397071741156
    p = p * t + 0.0923043219006513
    p = p * t - 0.10880393022743894
    p = p * t + 0.08227673844848074
    p = p * t + 0.0035854154868886555
    p = p * t - 0.14024059858485527
    p = p * t + 1.2375126308378275
    return p / (1.0 + 2.0 * y)


@triton.jit
def log_one_minus(x):
    """log(1 - x) for float64 0 <= x < 1."""
    series = -x * (1.0 + x * (0.5 + x * (1.0 / 3.0 + x * (0.25 + x * 0.2))))
    return tl.where(x < 1e-3, series, tl.log(1.0 - x))


@triton.jit
def log_bin_mass(x, mean, log_scale):
    """log of the mass that N(mean, exp(log_scale)^2) puts on [x - 1/255, x + 1/255]; float64.

    The first bin reaches to -inf and the last one to +inf.
    """
    ROOT: tl.constexpr = 0.7071067811865476
    # Smaller sigmas would give inf - inf.
    inverse = tl.exp(-tl.where(log_scale < -300.0, -300.0, log_scale))
    c, w = (x - mean) * inverse, 2.0 / 255.0 * inverse
    first, last = x < -0.999, x > 0.999
    outer = first | last
    c = tl.where(tl.where(outer, last, c > 0.0), -c, c)
    b = c + 0.5 * w
    a = tl.where(outer, b, c - 0.5 * w)

    # Narrow: the density is all but constant, and its series about c serves.
    density = -0.5 * (c * c + 1.8378770664093453) - 4.848116364598435 - log_scale
    narrow = density + (c * c - 1.0) * w * w / 24.0

    # b <= 0: mass = e^(-b^2/2) (erfcx(-b/sqrt 2) - e^((b^2-a^2)/2) erfcx(-a/sqrt 2)) / 2
    # b > 0:  mass = 1 - tail, tail = (erfc(b/sqrt 2) + erfc(-a/sqrt 2)) / 2
    straddles = b > 0.0
    at_b = erfcx(tl.abs(b) * ROOT)
    at_a = tl.where(outer, 0.0, erfcx(tl.abs(a) * ROOT))
    tail = 0.5 * (tl.exp(-0.5 * b * b) * at_b + tl.exp(-0.5 * a * a) * at_a)
    inside = tl.where(straddles, 0.5, at_b - tl.exp(w * c) * at_a)
    left = tl.log(0.5 * inside) - 0.5 * b * b
    wide = tl.where(straddles, log_one_minus(tail), left)
    return tl.where((w * (1.0 + tl.abs(c)) < 1e-3) & (outer == 0), narrow, wide)


@triton.jit(do_not_specialize=["N"])
def _discretized_log_likelihood_kernel(
    x, mean, log_scale, out, N, A, B, D,
    BN: tl.constexpr, BA: tl.constexpr, BP: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    n, a, p, inside = tile(N, A, B, D, BN, BA, BP)
    value = log_bin_mass(
        load(at(x, n, a, p, D, FLAT), inside).to(tl.float64),
        load(at(mean, n, a, p, D, FLAT), inside).to(tl.float64),
        load(at(log_scale, n, a, p, D, FLAT), inside).to(tl.float64),
    )
    store(at(out, n, a, p, D, FLAT), value.to(tl.float32), inside)


def discretized_log_likelihood(x, mean, log_scale):
    """Nats, elementwise, of tensors that are broadcast and dtypes that are promoted."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, mean.dtype), log_scale.dtype)
    x, mean, log_scale = torch.broadcast_tensors(x, mean, log_scale)
    out = like(x, dtype)
    if out.numel():
        lead = (1,) * (4 - x.dim())
        # Two elements a thread: each that it holds in float64 takes it thirty registers.
        views = [y.expand(*lead, *y.shape) for y in (x, mean, log_scale, out)]
        tiles = Tiles(views, block=256)
        _discretized_log_likelihood_kernel[tiles.grid](*tiles.views, **tiles.arguments())
    return out
