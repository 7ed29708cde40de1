"""discretized_log_likelihood: the mass of a pixel's bin, against arithmetic of 180 digits."""

from __future__ import annotations

import functools
import itertools
import math

import mpmath
import pytest
import torch
from compare import (
    DTYPES,
    LAYOUTS,
    assert_same_for_any_thread_count,
    double,
    gradients,
    in_layout,
)
from torch.library import opcheck

from fastddpm import _native, ops, reference

LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1
BINS = LEVELS[[0, 1, 2, 100, 127, 128, 200, 253, 254, 255]]
# Distances |x - mean| in sigmas, up to where the mass is 10^-20000000.
DISTANCES = (0.0, 1e-3, 0.5, 3.0, 30.0, 1e4)


def grid(log_scales):
    """Every combination: float64 x, mean and log_scale."""
    rows = []
    for x, log_scale, distance, side in itertools.product(
        BINS.tolist(), log_scales, DISTANCES, (-1, 1)
    ):
        rows.append((x, x + side * distance * math.exp(log_scale), log_scale))
    return torch.tensor(rows, dtype=torch.float64).T


def exact(x: float, mean: float, log_scale: float) -> tuple:
    """(log mass, its derivative by mean, by log_scale) with 180 digits."""
    x, mean, sigma = mpmath.mpf(x), mpmath.mpf(mean), mpmath.exp(mpmath.mpf(log_scale))
    half, root = mpmath.mpf(1) / 255, mpmath.sqrt(2)
    a = -mpmath.inf if x < -0.999 else (x - half - mean) / sigma
    b = mpmath.inf if x > 0.999 else (x + half - mean) / sigma
    if a > 0:  # the same mass on the other side, where erfc does not cancel
        mass = (mpmath.erfc(a / root) - mpmath.erfc(b / root)) / 2
    else:
        mass = (mpmath.erfc(-b / root) - mpmath.erfc(-a / root)) / 2

    def density(v):
        return mpmath.mpf(0) if mpmath.isinf(v) else mpmath.npdf(v)

    def moment(v):
        return mpmath.mpf(0) if mpmath.isinf(v) else v * mpmath.npdf(v)

    by_mean = (density(a) - density(b)) / (sigma * mass)
    return mpmath.log(mass), by_mean, (moment(a) - moment(b)) / mass


def exact_grid(points) -> list[torch.Tensor]:
    with mpmath.workdps(180):
        rows = [[float(v) for v in exact(*point)] for point in points.T.tolist()]
    return list(torch.tensor(rows, dtype=torch.float64).T)


def assert_relative(actual, expected, tolerance, points, floor=0.0):
    """|actual - expected| <= tolerance |expected| + floor, elementwise."""
    error = (actual - expected).abs() / (expected.abs() + floor / tolerance)
    worst = error.argmax()
    assert error.max() <= tolerance, (
        f"{actual[worst]} is not {expected[worst]} at x, mean, log_scale = {points[:, worst]}"
    )


SIGMAS = [math.log(s) for s in (1e-4, 1e-3, 3e-3, 0.01, 0.1, 1.0, 10.0)]


@pytest.mark.parametrize("log_scale", SIGMAS)
def test_the_reference_to_nine_digits(log_scale):
    points = grid([log_scale])
    value, by_mean, by_log_scale = exact_grid(points)
    # Below 1e-15 a log mass is that of a probability of 1 up to rounding.
    assert_relative(reference.discretized_log_likelihood(*points), value, 1e-9, points, floor=1e-15)
    ones = torch.ones(points.shape[1], dtype=torch.float64)
    dmean, dlog_scale = reference.discretized_log_likelihood_backward(ones, *points)
    # The floor is that of a mean that is rounded to float64 itself.
    floor = 1e-9 * math.exp(-log_scale) * 1e-3
    assert_relative(dmean, by_mean, 1e-7, points, floor=floor)
    assert_relative(dlog_scale, by_log_scale, 1e-7, points, floor=1e-9)


@pytest.mark.parametrize("log_scale", [-20.0, -14.0, 5.0, 10.0, 30.0, 300.0])
def test_extreme_scales(log_scale):
    """Narrower than any bin and wider than any image: finite, and nine digits where it counts."""
    points = grid([log_scale])
    value = exact_grid(points)[0]
    got = reference.discretized_log_likelihood(*points)
    assert_relative(got, value, 1e-9, points, floor=1e-15)
    ones = torch.ones(points.shape[1], dtype=torch.float64)
    for gradient in reference.discretized_log_likelihood_backward(ones, *points):
        assert gradient.isfinite().all()


def test_scales_beyond_float64():
    log_scale = torch.tensor([-1000.0, 1000.0], dtype=torch.float64)
    x = LEVELS[100].expand(2)
    inside = reference.discretized_log_likelihood(x, x, log_scale)
    wide = math.log(2 / 255) - 0.5 * math.log(2 * math.pi) - log_scale[1]
    torch.testing.assert_close(inside, torch.stack((wide * 0, wide)))
    outside = reference.discretized_log_likelihood(x, x + 1, log_scale)
    assert outside[0] < -1e200
    assert outside[1] == inside[1]


@pytest.mark.parametrize("sigma", [1e-4, 2e-3, 0.01, 0.3, 2.0, 10.0])
@pytest.mark.parametrize("mean", [-1.3, -1.0, -0.2, 1 / 255, 0.999, 2.5])
def test_the_256_masses_sum_to_one(device, mean, sigma):
    x = LEVELS.float().to(device)
    log_scale = torch.tensor(sigma).log().to(device)
    total = ops.discretized_log_likelihood(x, torch.tensor(mean).to(device), log_scale)
    assert abs(total.double().exp().sum().item() - 1) < 3e-6
    total = reference.discretized_log_likelihood(
        LEVELS, torch.tensor(mean).double(), torch.tensor(sigma).double().log()
    )
    assert abs(total.exp().sum().item() - 1) < 1e-12


@pytest.mark.matrix("forward")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backends(device, layout, dtype):
    """Float64 inside: the result is the reference's, rounded once."""
    points = grid(SIGMAS[:: 3 if dtype == torch.float32 else 2])
    points = points[:, points[1].abs() < torch.finfo(dtype).max]
    points = points[:, torch.randperm(points.shape[1])[:240]].reshape(3, 2, 3, 10, 4)
    x, mean, log_scale = (
        in_layout(p.to(device, dtype), LAYOUTS[(LAYOUTS.index(layout) + k) % 4])
        for k, p in enumerate(points)
    )
    got = ops.discretized_log_likelihood(x, mean, log_scale)
    truth = reference.discretized_log_likelihood(double(x), double(mean), double(log_scale))
    assert got.dtype == dtype
    assert got.stride() == torch.empty_like(x).stride()
    rounded = truth.to(dtype)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.cpu().double(), rounded.double(), rtol=2 * eps, atol=1e-15)


@functools.cache
def float32_points():
    """Float32 arguments over all of sigma, as float64, and their exact value and gradients."""
    points = grid([math.log(s) for s in (1e-4, 2e-3, 0.05, 1.0, 10.0)])
    points = points[:, torch.randperm(points.shape[1])[:250]].float().double()
    return points, exact_grid(points)


def test_float32_to_six_digits(device):
    """Value and gradient, for sigma from 1e-4 to 10, at -1, at 1 and between."""
    points, (value, by_mean, by_log_scale) = float32_points()
    assert {-1.0, 1.0} < set(points[0].tolist())
    got = gradients(
        ops.discretized_log_likelihood,
        [p.float().to(device) for p in points],
        torch.ones(points.shape[1]).to(device),
    )
    tiny = 1e-15  # a log mass below it is that of a probability of 1 up to rounding
    for a, b, scale in zip(
        (got[0], got[2], got[3]),
        (value, by_mean, by_log_scale),
        (1, (-points[2]).exp(), 1),
        strict=True,
    ):
        a = a.detach().cpu().double()
        assert_relative(a / scale, (b / scale).float().double(), 1e-6, points, floor=tiny)


@pytest.fixture(params=_native.isas_available())
def isa(request):
    """The C++ backend in each build that this machine runs."""
    before = _native.isa()
    _native.use_isa(request.param)
    with ops.use_backend("cpu"):
        yield request.param
    _native.use_isa(before)


@functools.cache
def scattered_points():
    """Float32 arguments, as float64, all over sigma and the bins, and their exact value.

    Half of the means lie about an edge of the bin, the others up to 400 sigmas away.
    """
    n = 240
    x = LEVELS[torch.randint(256, (n,))]
    x[: n // 6], x[n // 6 : n // 3] = -1, 1
    log_scale = torch.empty(n, dtype=torch.float64).uniform_(math.log(1e-4), math.log(10))
    sigmas = torch.empty(n, dtype=torch.float64).uniform_(-8, 6).exp()
    near = torch.empty(n, dtype=torch.float64).uniform_(-3 / 255, 3 / 255)
    far = sigmas * log_scale.exp() * (2 * torch.randint(2, (n,)) - 1)
    mean = x + torch.where(torch.rand(n) < 0.5, near, far)
    points = torch.stack((x, mean, log_scale)).float().double()
    return points, exact_grid(points)[0]


def test_every_instruction_set_rounds_once(isa):
    """What stands in float32 is the exact value, half an ulp or a little more away."""
    points, value = scattered_points()
    got = ops.discretized_log_likelihood(*points.float()).double()
    assert_relative(got, value, 0.5 * 2**-23 + 3e-9, points, floor=1e-37)


def test_bits_depend_on_the_arguments_alone(isa):
    """Not on threads, layout, or the place among the others."""
    x = LEVELS[torch.randint(256, (2, 3, 83, 67))].float()  # large enough for more threads
    log_scale = torch.empty_like(x).uniform_(math.log(1e-4), math.log(10))
    mean = x + torch.randn_like(x) * (log_scale.exp() + 0.01)
    whole = ops.discretized_log_likelihood(x, mean, log_scale)
    assert_same_for_any_thread_count(lambda: ops.discretized_log_likelihood(x, mean, log_scale))
    for layout in LAYOUTS[1:]:
        laid = [in_layout(v, layout) for v in (x, mean, log_scale)]
        assert torch.equal(ops.discretized_log_likelihood(*laid), whole)
    flat = [v.flatten() for v in (x, mean, log_scale, whole)]
    for first, count in itertools.product((0, 5, 1021), (1, 2, 3, 7, 17, 30)):
        *part, expected = (v[first : first + count] for v in flat)
        assert torch.equal(ops.discretized_log_likelihood(*part), expected)


def test_what_is_not_finite(device):
    x = LEVELS[[0, 7, 128, 255]].float()
    for k in range(3):
        arguments = [x.clone(), x * 0.9, torch.full_like(x, -3.0)]
        arguments[k][1:] = torch.nan
        got = ops.discretized_log_likelihood(*(v.to(device) for v in arguments)).cpu()
        assert got.isnan().tolist() == [False, True, True, True]
    wide, narrow = torch.full((4,), 1000.0).to(device), torch.full((4,), -1000.0).to(device)
    x = x.to(device)
    near, far = (ops.discretized_log_likelihood(x, x + shift, narrow).cpu() for shift in (0, 0.1))
    assert near.tolist() == [0, 0, 0, 0]
    assert far.tolist() == [-math.inf, -math.inf, -math.inf, 0]
    got = ops.discretized_log_likelihood(x, x * 0.9, wide).cpu().double()
    inner = math.log(2 / 255) - 0.5 * math.log(2 * math.pi) - 1000
    expected = torch.tensor([-math.log(2), inner, inner, -math.log(2)], dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def test_edges_are_the_first_and_last_level_only(device):
    """A bin next to an outer one is bounded: far off it has no mass, the outer one has it all."""
    x = LEVELS[[0, 1, 254, 255]].float().to(device)
    mean = torch.tensor([-9.0, -9.0, 9.0, 9.0]).to(device)
    value = ops.discretized_log_likelihood(x, mean, torch.zeros(4).to(device)).cpu()
    assert value[[0, 3]].abs().max() < 1e-12
    assert value[1:3].max() < -30


@pytest.mark.matrix("backward")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients(device, dtype, layout):
    points = grid(SIGMAS[2:5])
    points = points[:, torch.randperm(points.shape[1])[:120]].reshape(3, 2, 3, 5, 4)
    x, mean, log_scale = (
        in_layout(p.to(device, dtype), LAYOUTS[(LAYOUTS.index(layout) + k) % 4])
        for k, p in enumerate(points)
    )
    grad = torch.randn(()).to(device, dtype).expand(x.shape)  # as from y.sum()
    _, dmean, dlog_scale = gradients(
        lambda mean, log_scale: ops.discretized_log_likelihood(x, mean, log_scale),
        (mean, log_scale),
        grad,
    )
    true = reference.discretized_log_likelihood_backward(*map(double, (grad, x, mean, log_scale)))
    assert dmean.dtype == dlog_scale.dtype == dtype
    for got, expected in zip((dmean, dlog_scale), true, strict=True):
        assert torch.equal(got.cpu(), expected.to(dtype))


def test_gradients_of_broadcast_arguments(device):
    x = LEVELS[:60].float().reshape(3, 4, 5).to(device)
    mean, log_scale = torch.randn(4, 1).to(device), torch.randn(()).to(device)
    grad = torch.randn(3, 4, 5).to(device)

    def full(mean, log_scale):
        return ops.discretized_log_likelihood(x, mean.expand_as(x), log_scale.expand_as(x))

    for got, expected in zip(
        gradients(lambda m, s: ops.discretized_log_likelihood(x, m, s), (mean, log_scale), grad),
        gradients(full, (mean, log_scale), grad),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


def test_x_is_data(device):
    x = LEVELS[:4].float().to(device).requires_grad_()
    mean = torch.zeros(4).to(device).requires_grad_()
    ops.discretized_log_likelihood(x, mean, torch.zeros(4).to(device)).sum().backward()
    assert x.grad is None
    assert mean.grad is not None


def test_mixed_dtypes_promote(device):
    x, mean = LEVELS[:4].float().to(device), torch.zeros(4, dtype=torch.bfloat16).to(device)
    got = ops.discretized_log_likelihood(x, mean, mean)
    assert got.dtype == torch.float32
    assert torch.equal(got, ops.discretized_log_likelihood(x, mean.float(), mean.float()))


def test_the_same_tensor_everywhere(device):
    x = LEVELS.float().to(device)
    got = ops.discretized_log_likelihood(x, x, x)
    assert torch.equal(got, ops.discretized_log_likelihood(x, x.clone(), x.clone()))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (257, 1, 3, 3), (0, 3, 4, 4)], ids=str)
def test_shapes(device, shape):
    x = torch.zeros(shape).to(device)
    assert ops.discretized_log_likelihood(x, x, x).shape == shape


def test_float64_goes_to_the_reference():
    x = LEVELS
    assert torch.equal(
        ops.discretized_log_likelihood(x, x * 0.5, x),
        reference.discretized_log_likelihood(x, x * 0.5, x),
    )


X = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X.byte(), X, X), TypeError, "x must be one of float32, .*; got uint8"),
        ((X, 0.0, X), TypeError, "mean must be a tensor; got float"),
        ((X, X, X.long()), TypeError, "log_scale must be one of .*; got int64"),
        ((X, X[:, :3], X), ValueError, r"x, mean, log_scale must .* got \(3, 4\), \(3, 3\), \(3"),
        ((X, X.to("meta"), X), ValueError, "mean must be on cpu like the other tensors; got meta"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.discretized_log_likelihood(*arguments)


def test_registered_op():
    x = LEVELS[:24].float().reshape(2, 3, 4)
    mean, log_scale = (
        torch.randn(3, 1, requires_grad=True),
        torch.randn(2, 3, 4, requires_grad=True),
    )
    opcheck(torch.ops.fastddpm.discretized_log_likelihood.default, (x, mean, log_scale))


def test_compiles_without_breaks(device):
    x = LEVELS[:24].float().reshape(2, 3, 4).to(device)
    inputs = torch.randn(2, 3, 4).to(device), torch.randn(2, 3, 4).to(device)

    def function(mean, log_scale):
        return ops.discretized_log_likelihood(x, mean * 0.5, log_scale) * 2

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, expected in zip(
        gradients(compiled, inputs, x), gradients(function, inputs, x), strict=True
    ):
        torch.testing.assert_close(got, expected)
