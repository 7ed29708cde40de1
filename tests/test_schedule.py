"""The tables, against the paper's identities and arithmetic of 50 digits."""

from __future__ import annotations

import contextlib
import itertools
import json
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastddpm import Schedule
from fastddpm.schedule import COLUMNS, KINDS, K

SCHEDULES = {
    "linear": Schedule.linear(),
    "quadratic": Schedule.quadratic(),
    "constant": Schedule.constant(),
    "cosine": Schedule.cosine(),
    "sigmoid": Schedule.sigmoid(),
    "respaced": Schedule.linear().respace(37),
    "two steps": Schedule.linear().respace(2),
    "one step": Schedule(np.array([0.3])),
}
VARIANCES = ("fixed_large", "fixed_small", "learned", "learned_range")

some_betas = st.lists(st.floats(1e-6, 0.3), min_size=1, max_size=40).map(np.array)


@pytest.fixture(params=SCHEDULES, ids=str)
def schedule(request) -> Schedule:
    return SCHEDULES[request.param]


def close(actual, expected, rtol=1e-12):
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=0)


# ---- the forward process -------------------------------------------------------------------------


def test_the_papers_schedule():
    linear = Schedule.linear()
    assert linear.T == 1000
    assert linear.betas[0] == 1e-4
    assert linear.betas[-1] == 0.02
    close(np.diff(linear.betas), (0.02 - 1e-4) / 999, rtol=1e-9)
    quadratic = Schedule.quadratic()
    close(np.diff(np.sqrt(quadratic.betas)), (0.02**0.5 - 0.01) / 999, rtol=1e-9)
    constant = Schedule.constant()
    assert np.ptp(constant.betas) == 0
    close(constant.alphas_cumprod[-1], linear.alphas_cumprod[-1], rtol=0.08)


def test_cosine_is_its_formula():
    cosine = Schedule.cosine(100)
    f = np.cos((np.arange(101) / 100 + 0.008) / 1.008 * np.pi / 2) ** 2
    close(cosine.alphas_cumprod[:-1], f[1:-1] / f[0], rtol=1e-9)
    assert cosine.betas[-1] == 0.999


@pytest.mark.parametrize(("start", "end", "tau"), [(-3, 3, 1), (0, 3, 0.7), (-3, 3, 0.3)])
def test_sigmoid_is_its_formula(start, end, tau):
    """lucidrains' sigmoid_beta_schedule, all of it in float64."""
    v = 1 / (1 + np.exp(-(np.arange(101) / 100 * (end - start) + start) / tau))
    ab = (v[-1] - v) / (v[-1] - v[0])
    sigmoid = Schedule.sigmoid(100, start, end, tau)
    close(sigmoid.betas, np.clip(1 - ab[1:] / ab[:-1], 0, 0.999), rtol=1e-7)
    close(sigmoid.alphas_cumprod[:-1], ab[1:-1], rtol=1e-7)
    assert sigmoid.betas[-1] == 0.999


@pytest.mark.parametrize(("start", "end", "tau"), [("-3", "3", "0.1"), ("-3.2", "2", "0.1")])
def test_the_least_betas_of_a_steep_sigmoid_are_exact(start, end, tau):
    """In float64, 1 - abar_t / abar_{t-1} has two digits of a beta of 1e-14."""
    with mpmath.workdps(50):
        a, b, width = map(mpmath.mpf, (start, end, tau))
        s = [1 / (1 + mpmath.exp(-(a + (b - a) * i / 50) / width)) for i in range(51)]
        betas = [(s[i + 1] - s[i]) / (s[-1] - s[i]) for i in range(50)]
    assert betas[0] < 1e-12
    expected = np.minimum(np.array(list(map(float, betas))), 0.999)
    sigmoid = Schedule.sigmoid(50, float(start), float(end), float(tau))
    close(sigmoid.betas, expected, rtol=1e-12)


def test_sigmoid_betas_are_diffusers():
    betas = torch.sigmoid(torch.linspace(-6, 6, 50, dtype=torch.float64)) * (0.1 - 1e-3) + 1e-3
    close(Schedule.sigmoid_betas(50, 1e-3, 0.1).betas, betas.numpy(), rtol=1e-12)


def test_composing_eq_2_gives_eq_4(schedule):
    """x_t = sqrt(1 - beta) x_{t-1} + sqrt(beta) noise, from x_0: mean factor and variance."""
    factor, variance = 1.0, 0.0
    for t, beta in enumerate(schedule.betas):
        factor, variance = factor * np.sqrt(1 - beta), variance * (1 - beta) + beta
        close(factor, np.sqrt(schedule.alphas_cumprod[t]))
        close(variance, 1 - schedule.alphas_cumprod[t], rtol=1e-10)


@pytest.mark.parametrize("name", ["linear", "quadratic", "constant"])
def test_nothing_of_the_image_is_left_at_the_end(name):
    """L_T of an image with all pixels at +-1, in bits/dim (DDPM Eq. 5); 0.00002 for linear."""
    ab = SCHEDULES[name].alphas_cumprod[-1]
    prior = 0.5 * (ab - ab - np.log1p(-ab)) / np.log(2)
    assert 0 <= prior < {"linear": 5e-5, "constant": 5e-5, "quadratic": 2e-3}[name]


# ---- the posterior -------------------------------------------------------------------------------


def test_eq_7_is_bayes_rule(schedule):
    """q(x_{t-1} | x_t, x_0) from the product of the two Gaussians that it is proportional to."""
    ab_prev, beta, alpha = schedule.alphas_cumprod_prev[1:], schedule.betas[1:], schedule.alphas[1:]
    precision = alpha / beta + 1 / (1 - ab_prev)
    columns = schedule.columns("fixed_small")
    close(schedule.posterior_variance[1:], 1 / precision, rtol=1e-9)
    close(columns["mean_xt"][1:], np.sqrt(alpha) / beta / precision, rtol=1e-9)
    close(columns["mean_x0"][1:], np.sqrt(ab_prev) / (1 - ab_prev) / precision, rtol=1e-9)


def test_the_last_step_returns_the_prediction(schedule):
    columns = schedule.columns()
    assert schedule.posterior_variance[0] == 0
    assert columns["mean_x0"][0] == pytest.approx(1, abs=1e-12)
    assert columns["mean_xt"][0] == 0
    assert columns["sigma"][0] == 0


def test_eq_11_is_eq_15_then_eq_7(schedule):
    """mu(x_t, eps) = (x_t - beta / sqrt(1 - abar) eps) / sqrt(alpha), for any x_t and eps."""
    c = schedule.columns()
    of_xt = c["mean_x0"] * c["inv_sqrt_ab"] + c["mean_xt"]
    of_eps = -c["mean_x0"] * c["sqrt_inv_ab_m1"]
    close(of_xt, 1 / np.sqrt(schedule.alphas), rtol=1e-11)
    expected = -schedule.betas / np.sqrt(1 - schedule.alphas_cumprod) / np.sqrt(schedule.alphas)
    close(of_eps, expected, rtol=1e-10)


def test_variances(schedule):
    large, small, learned, top = (schedule.log_variance(v) for v in VARIANCES)
    close(np.exp(large[1:]), schedule.betas[1:])
    close(np.exp(small[1:]), schedule.posterior_variance[1:])
    assert np.array_equal(small, learned)
    assert np.array_equal(top, np.log(schedule.betas))
    assert large[0] == small[0]
    if schedule.T > 1:
        assert small[0] == small[1]
    assert np.all(large >= small - 1e-12)


@pytest.mark.parametrize("variance", VARIANCES)
def test_the_table_is_finite(schedule, variance):
    table = schedule.table(variance)
    assert table.shape == (schedule.T, K) == (schedule.T, len(COLUMNS))
    assert table.dtype == torch.float32
    assert table.is_contiguous()
    assert table.isfinite().all()
    assert np.isfinite(schedule.log_variance(variance)).all()


@pytest.mark.parametrize("name", ["linear", "cosine", "respaced"])
def test_the_table_to_fifty_digits(name):
    """Each column from the betas, independently; the float32 table is that, rounded once."""
    schedule = SCHEDULES[name]
    with mpmath.workdps(50):
        rows, ab_prev = [], mpmath.mpf(1)
        for t, beta in enumerate(map(mpmath.mpf, schedule.betas.tolist())):
            ab = ab_prev * (1 - beta)
            variance = (
                beta
                if t
                else mpmath.mpf(schedule.betas[1])
                * beta
                / (1 - (1 - beta) * (1 - mpmath.mpf(schedule.betas[1])))
            )
            rows.append(
                (
                    mpmath.sqrt(ab),
                    mpmath.sqrt(1 - ab),
                    1 / mpmath.sqrt(ab),
                    mpmath.sqrt(1 / ab - 1),
                    mpmath.sqrt(ab_prev) * beta / (1 - ab),
                    mpmath.sqrt(1 - beta) * (1 - ab_prev) / (1 - ab),
                    mpmath.sqrt(beta) if t else mpmath.mpf(0),
                    mpmath.log(variance),
                )
            )
            ab_prev = ab
        expected = np.array([[float(value) for value in row] for row in rows])
    actual = np.stack(list(schedule.columns("fixed_large").values()), axis=1)
    # abar of the cosine falls to 1e-9 by factors 1 - beta that lose digits where beta is near 1.
    np.testing.assert_allclose(actual, expected, rtol=2e-11, atol=1e-15)
    assert np.array_equal(schedule.table("fixed_large").numpy(), actual.astype(np.float32))
    double = schedule.table("fixed_large", dtype=torch.float64)
    assert np.array_equal(double.numpy(), actual)


# ---- DDIM ----------------------------------------------------------------------------------------


def test_ddim_with_eta_1_is_ddpm_fixed_small(schedule):
    ddim = schedule.columns("fixed_small", sampler="ddim", eta=1.0)
    ddpm = schedule.columns("fixed_small")
    for name in ("mean_x0", "mean_xt", "sigma"):
        np.testing.assert_allclose(ddim[name][1:], ddpm[name][1:], rtol=1e-9, atol=1e-12)
    assert ddim["sigma"][0] == 0


def test_ddim_with_eta_0_is_deterministic(schedule):
    """x_{t-1} = sqrt(abar_{t-1}) x0 + sqrt(1 - abar_{t-1}) eps, x_0 at the last step."""
    c = schedule.columns(sampler="ddim", eta=0.0)
    assert np.all(c["sigma"] == 0)
    ab, ab_prev = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    x0, eps = 0.3, -1.7
    xt = np.sqrt(ab) * x0 + np.sqrt(1 - ab) * eps
    np.testing.assert_allclose(
        c["mean_x0"] * x0 + c["mean_xt"] * xt,
        np.sqrt(ab_prev) * x0 + np.sqrt(1 - ab_prev) * eps,
        rtol=1e-10,
        atol=1e-10,
    )
    assert c["mean_x0"][0] == 1


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_keeps_the_marginals(schedule, eta):
    """If x_t is distributed as q(x_t | x_0), then x_{t-1} is as q(x_{t-1} | x_0)."""
    c = schedule.columns(sampler="ddim", eta=eta)
    ab, ab_prev = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    mean = c["mean_x0"] + c["mean_xt"] * np.sqrt(ab)
    variance = c["mean_xt"] ** 2 * (1 - ab) + c["sigma"] ** 2
    np.testing.assert_allclose(mean, np.sqrt(ab_prev), rtol=1e-10)
    np.testing.assert_allclose(variance[1:], 1 - ab_prev[1:], rtol=1e-9, atol=1e-15)


# ---- respacing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50, 333, 999])
def test_respacing_keeps_what_it_visits(steps):
    full = Schedule.linear()
    short = full.respace(steps)
    assert short.T == len(short.timesteps) == steps
    assert short.full_steps == 1000
    assert short.timesteps[-1] == 999
    assert np.all(np.diff(short.timesteps) > 0)
    if steps > 1:
        assert short.timesteps[0] == 0
    close(short.alphas_cumprod, full.alphas_cumprod[short.timesteps], rtol=1e-11)


def test_respacing_to_all_steps_is_the_schedule_itself():
    full = Schedule.linear()
    assert full.respace(1000) is full
    assert np.array_equal(full.timesteps, np.arange(1000))


def test_respacing_twice_goes_back_to_the_first_model():
    full = Schedule.linear()
    twice = full.respace(100).respace(10)
    assert twice.full_steps == 1000
    close(twice.alphas_cumprod, full.alphas_cumprod[twice.timesteps], rtol=1e-10)


@given(some_betas, st.data())
def test_any_schedule(betas, data):
    schedule = Schedule(betas)
    assert np.all(np.diff(np.append(1.0, schedule.alphas_cumprod)) < 0)
    steps = data.draw(st.integers(1, schedule.T))
    short = schedule.respace(steps)
    np.testing.assert_allclose(
        short.alphas_cumprod, schedule.alphas_cumprod[short.timesteps], rtol=1e-9
    )
    for chain in (schedule, short):
        for variance in VARIANCES:
            columns = chain.columns(variance)
            assert all(np.isfinite(column).all() for column in columns.values())
            assert columns["sigma"][0] == 0
        of_xt = columns["mean_x0"] * columns["inv_sqrt_ab"] + columns["mean_xt"]
        np.testing.assert_allclose(of_xt, 1 / np.sqrt(chain.alphas), rtol=1e-6)
        assert np.all(chain.posterior_variance <= chain.betas * (1 + 1e-9))
        eta = data.draw(st.floats(0, 1))
        assert chain.table(sampler="ddim", eta=eta).isfinite().all()


# ---- files and bad input -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule.linear(),
        Schedule.linear(50, 1e-3, 0.1),
        Schedule.linear(50, scaled=True),
        Schedule.quadratic(10),
        Schedule.constant(7, 0.2),
        Schedule.cosine(20, s=0.01),
        Schedule.sigmoid(20, 0, 2, 0.9, beta_max=0.99),
        Schedule.sigmoid_betas(9, 1e-3, 0.2),
        Schedule(np.array([0.1, 0.25])),
    ],
    ids=lambda schedule: str(schedule.to_config()["kind"]),
)
def test_config_round_trip(schedule):
    config = json.loads(json.dumps(schedule.to_config()))
    again = Schedule.from_config(config)
    assert np.array_equal(again.betas, schedule.betas)
    assert again.to_config() == config


@pytest.mark.parametrize(
    ("make", "same"),
    [
        (lambda: Schedule.linear(np.int64(500)), Schedule.linear(500)),
        (lambda: Schedule.linear(np.uint8(50), np.float64(1e-3)), Schedule.linear(50, 1e-3)),
        (lambda: Schedule.quadratic(beta_end=np.float16(0.25)), Schedule.quadratic(beta_end=0.25)),
        (lambda: Schedule.constant(np.int32(9), np.float32(0.5)), Schedule.constant(9, 0.5)),
        (lambda: Schedule.constant(9, Fraction(1, 4)), Schedule.constant(9, 0.25)),
        (lambda: Schedule.cosine(np.int16(8), np.float32(0.5), np.float64(0.9)),
         Schedule.cosine(8, 0.5, 0.9)),
        (lambda: Schedule.linear(50, scaled=np.True_), Schedule.linear(50, scaled=True)),
        (lambda: Schedule(torch.tensor([0.25, 0.5])), Schedule([0.25, 0.5])),
        (lambda: Schedule([0.25, 0.5], np.array([3, 7], np.uint8), np.int64(9)),
         Schedule([0.25, 0.5], [3, 7], 9)),
    ],
)  # fmt: skip
def test_numbers_of_numpy_are_numbers(make, same):
    schedule = make()
    assert np.array_equal(schedule.betas, same.betas)
    assert np.array_equal(schedule.timesteps, same.timesteps)
    assert type(schedule.full_steps) is int
    assert schedule.recipe == same.recipe
    if schedule.is_full:
        config = json.loads(json.dumps(schedule.to_config()))
        assert np.array_equal(Schedule.from_config(config).betas, same.betas)


def test_scaled_is_improved_diffusions():
    """betas times 1000 / T (its get_named_beta_schedule), so that any T ends as 1000 do."""
    for T in (21, 100, 250, 4000):
        expected = np.linspace(1000 / T * 0.0001, 1000 / T * 0.02, T)
        assert np.array_equal(Schedule.linear(T, scaled=True).betas, expected)
    assert np.array_equal(Schedule.linear(scaled=True).betas, Schedule.linear().betas)
    assert Schedule.linear(100).alphas_cumprod[-1] > 0.36
    assert Schedule.linear(100, scaled=True).alphas_cumprod[-1] < 1e-4
    assert "scaled" not in Schedule.linear(100).to_config()


NO_NUMBER = (None, True, "0.1", "x", [0.1], {}, np.nan, np.inf, -1e-3, 10**400, 1j, 2)


@pytest.mark.parametrize("value", NO_NUMBER, ids=repr)
@pytest.mark.parametrize(
    ("kind", "option"),
    [("linear", "beta_start"), ("linear", "beta_end"), ("quadratic", "beta_start"),
     ("quadratic", "beta_end"), ("constant", "beta"), ("cosine", "s"), ("cosine", "beta_max"),
     ("sigmoid", "beta_max"), ("sigmoid_betas", "beta_end")],
)  # fmt: skip
def test_what_is_no_beta_is_named(kind, option, value):
    with pytest.raises(ValueError, match=f"{option} must be a number in"):
        getattr(Schedule, kind)(**{option: value})
    with pytest.raises(ValueError, match=f"{option} must be a number in"):
        Schedule.from_config({"kind": kind, option: value})


@pytest.mark.parametrize(
    "value", [None, True, "9", [9], {}, 9.0, np.nan, 0, -1, 1j, 10**12, 10**30]
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_length_is_named(kind, value):
    with pytest.raises(ValueError, match="T must be"):
        Schedule.from_config({"kind": kind, "T": value})


BETAS = [0.1, 0.2, 0.3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"full_steps": 1.5}, "full_steps must be an integer in 1 .. 4294967295; got 1.5"),
        ({"full_steps": 0}, "full_steps must be an integer"),
        ({"full_steps": True}, "full_steps must be an integer"),
        ({"full_steps": "9"}, "full_steps must be an integer"),
        ({"full_steps": 10**30}, "full_steps must be an integer"),
        ({"full_steps": 9}, "timesteps must be given where full_steps is not .* 3; got full_steps"),
        ({"timesteps": [0, 1]}, r"timesteps must have shape \(3,\).*; got \(2,\)"),
        ({"timesteps": [[0, 1, 2]]}, r"got \(1, 3\)"),
        ({"timesteps": []}, r"got \(0,\)"),
        ({"timesteps": 3}, r"got \(\)"),
        ({"timesteps": [0, 1, 3]}, "timesteps must increase within 0 .. 2"),
        ({"timesteps": [0, 1, 9], "full_steps": 9}, "timesteps must increase within 0 .. 8"),
        ({"timesteps": [-1, 1, 2], "full_steps": 9}, "timesteps must increase within"),
        ({"timesteps": [0, 2, 1], "full_steps": 9}, "timesteps must increase within"),
        ({"timesteps": [0, 1, 1], "full_steps": 9}, "timesteps must increase within"),
        ({"timesteps": [0, 1, 2**63], "full_steps": 9}, "timesteps must"),
        ({"timesteps": [0, 1, 10**30], "full_steps": 9}, "array of integers; got object"),
        ({"timesteps": [0.0, 1.0, 2.0]}, "timesteps must be a 1-D array of integers; got float64"),
        ({"timesteps": ["0", "1", "2"]}, "timesteps must be a 1-D array of integers"),
        ({"timesteps": [False, True, True]}, "timesteps must be a 1-D array of integers; got bool"),
        ({"timesteps": [0, [1], 2]}, "timesteps must be a 1-D array of integers"),
        ({"timesteps": {}}, "timesteps must be a 1-D array of integers"),
        ({"betas": ["0.1", "0.2"]}, "betas must be a 1-D array of numbers"),
        ({"betas": [0.1, 10**400]}, "betas must be a 1-D array of numbers; got object"),
        ({"betas": [0.1, None]}, "betas must be a 1-D array of numbers; got object"),
        ({"betas": [0.1, [0.2]]}, "betas must be a 1-D array of numbers"),
        ({"betas": {}}, "betas must be a 1-D array of numbers"),
        ({"betas": "0.1"}, "betas must be a 1-D array of numbers"),
        ({"betas": 0.1}, r"got shape \(\)"),
        ({"betas": [1e-17, 0.1]}, r"betas\[0\] = 1e-17 is too small"),
        ({"betas": [0.9] * 80}, "abar_T, .* is 1e-80; it must be at least 1e-76"),
        ({"recipe": {"kind": "linear"}}, "recipe"),
        ({"full": None}, "full"),
        ({"steps": 3}, "steps"),
    ],
    ids=str,
)
def test_a_custom_schedule_of_a_file_is_checked(change, message):
    config = {"kind": "custom", "betas": BETAS, **change}
    with pytest.raises(ValueError, match=message):
        Schedule.from_config(config)
    if not {"recipe", "full", "steps"} & change.keys():
        with pytest.raises(ValueError, match=message):
            Schedule(**{"betas": BETAS, **change})


def test_any_json_is_a_schedule_or_a_value_error():
    junk = (None, True, "x", [], {}, -1, 0, 1, 2.5, 1e300, 10**30, float("nan"), [1, 2], [[0.1]])
    options = ("T", "beta_start", "beta_end", "beta", "s", "beta_max", "betas", "timesteps",
               "full_steps", "scaled", "kind")  # fmt: skip
    for kind in ("linear", "quadratic", "constant", "cosine", "custom"):
        whole = {"kind": kind, **({"betas": BETAS} if kind == "custom" else {"T": 50})}
        for option, value in itertools.product(options, junk):
            with contextlib.suppress(ValueError):
                schedule = Schedule.from_config({**whole, option: value})
                assert schedule.table().isfinite().all(), (kind, option, value)
                json.dumps(schedule.to_config())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Schedule(np.array([])), r"betas must be a 1-D array .*; got shape \(0,\)"),
        (lambda: Schedule(np.full((2, 2), 0.1)), r"got shape \(2, 2\)"),
        (lambda: Schedule(np.array([0.1, 0.0])), r"every beta must lie inside \(0, 1\); got 0.0"),
        (lambda: Schedule(np.array([0.1, 1.0])), r"every beta must lie inside"),
        (lambda: Schedule(np.array([0.1, np.nan])), r"every beta must lie inside"),
        (lambda: Schedule.linear(0), "T must be an integer of at least 1; got 0"),
        (lambda: Schedule.cosine(True), "T must be an integer of at least 1; got True"),
        (lambda: Schedule.linear().respace(0), r"steps must be an integer in 1 .. 1000; got 0"),
        (lambda: Schedule.linear().respace(1001), "steps must be an integer in 1 .. 1000; got"),
        (lambda: Schedule.linear().respace(2.5), "steps must be an integer in 1 .. 1000; got 2.5"),
        (lambda: Schedule.sigmoid(start=3), "end must be above start; got 3"),
        (lambda: Schedule.sigmoid(start=np.nan), "start must be a finite number; got nan"),
        (lambda: Schedule.sigmoid(end=np.inf), "end must be above start; got inf"),
        (lambda: Schedule.sigmoid(tau=0), "tau must be above 0; got 0"),
        (lambda: Schedule.sigmoid(tau="1"), "tau must be above 0; got '1'"),
        (lambda: Schedule.sigmoid(tau=1e-3), "start / tau, end / tau .* must lie within -700"),
        (lambda: Schedule.sigmoid(50, -800, 800), "start / tau, end / tau .* must lie within"),
        (lambda: Schedule.sigmoid(50, -90, 90), r"betas\[0\] = .* is too small: 1 - beta is 1"),
        (lambda: Schedule.linear().table("large"), "variance must be one of 'fixed_large'"),
        (lambda: Schedule.linear().table(sampler="x"), "sampler must be one of 'ddpm', 'ddim'"),
        (lambda: Schedule.linear().table(sampler="ddim", eta=-1), "eta must be at least 0; got -1"),
        (lambda: Schedule.linear().table(sampler="ddim", eta=9), "eta = 9 asks for more noise"),
        (lambda: Schedule.from_config({"kind": "exponential"}), "schedule kind must be one of"),
        (lambda: Schedule.from_config({"kind": "linear", "beta": 1}), "schedule 'linear': .*beta"),
        (lambda: Schedule.linear().respace(10).to_config(), "a respaced schedule is not saved"),
        (
            lambda: Schedule.linear().table(sampler="ddim", eta="x"),
            "eta must be at least 0; got 'x'",
        ),
        (lambda: Schedule.linear().table(sampler="ddim", eta=np.inf), "eta must be at least 0"),
        (
            lambda: Schedule.linear(20, scaled=True),
            "1000 / T times 0.02 is 1 for T = 20; take more",
        ),
        (lambda: Schedule.linear(50, scaled=1), "scaled must be True or False; got 1"),
        (lambda: Schedule.linear(20_000), r"abar_T, .* is \S+e-8\d; it must be at least 1e-76"),
        (lambda: Schedule.cosine(s=1.5), "s must be a number in 0 .. 1; got 1.5"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_schedule_does_not_change():
    betas = np.array([0.1, 0.2])
    schedule = Schedule(betas)
    betas[0] = 0.9
    assert schedule.betas[0] == 0.1
    with pytest.raises(ValueError, match="read-only"):
        schedule.betas[0] = 0.5
