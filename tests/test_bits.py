"""Bits/dim: the bound's parts, and the entropy that a model of Gaussian data has to reach."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from toy import SCHEDULE, Gaussian, images, tiny_unet, wave

import fastddpm
from fastddpm import Diffusion, Schedule, ops, reference
from fastddpm.evaluation import BitsPerDim

DIFFUSION = Diffusion(SCHEDULE)
FIELDS = ("total", "prior", "terms", "mse")


def bits(model=wave, x0=None, **options) -> BitsPerDim:
    x0 = images(5, 2, 3, 4) if x0 is None else x0
    return fastddpm.bits_per_dim(
        model, x0, **{"diffusion": DIFFUSION, "progress": False, **options}
    )


def gaussian_images(n: int, mean: float, std: float) -> torch.Tensor:
    x = np.random.default_rng(0).normal(mean, std, (n, 1, 4, 4))
    return torch.from_numpy(np.clip(np.round((x + 1) * 127.5), 0, 255).astype(np.uint8))


def test_total_is_the_prior_and_all_terms():
    result = bits()
    assert result.terms.shape == result.mse.shape == (5, SCHEDULE.T)
    assert result.prior.shape == result.total.shape == (5,)
    torch.testing.assert_close(result.total, result.prior + result.terms.sum(1))
    terms, mse = DIFFUSION.vlb_terms(wave, images(5, 2, 3, 4))
    assert torch.equal(result.terms, terms)
    assert torch.equal(result.mse, mse)
    assert torch.equal(result.prior, DIFFUSION.prior_kl(images(5, 2, 3, 4)))


def test_it_is_a_function_of_model_images_and_seed():
    x0 = images(5, 2, 3, 4)
    whole = bits(seed=3)
    for field in FIELDS:
        value = getattr(whole, field)
        assert torch.equal(getattr(bits(seed=3, batch_size=2), field), value)
        parts = (bits(x0=x0[:2], seed=3), bits(x0=x0[2:], seed=3, first_index=2))
        assert torch.equal(torch.cat([getattr(part, field) for part in parts]), value)
    assert not torch.isclose(bits(seed=4).terms, whole.terms).all()
    torch.manual_seed(7)
    assert torch.equal(bits(seed=3).total, whole.total)


@pytest.mark.parametrize(("steps", "times"), [(None, list(range(12))), (4, [0, 4, 7, 11])])
def test_the_noise_of_x_t_is_the_contracts(steps, times):
    seen = {}

    def model(x, t):
        seen[int(t[0])] = x.clone()
        return wave(x, t)

    x0 = images(3, 1, 2, 2)
    bits(model, x0, seed=9, first_index=4, steps=steps)
    assert list(seen) == times
    for t, xt in seen.items():
        eps = ops.randn(x0.shape, seed=9, step=t, first_index=4)
        expected = DIFFUSION.q_sample(x0, torch.full((3,), t), eps)
        torch.testing.assert_close(xt, expected, atol=1e-6, rtol=0)


def test_steps_is_the_bound_of_the_shorter_chain():
    short = bits(steps=4)
    assert short.terms.shape == (5, 4)
    terms, _ = DIFFUSION.respace(4).vlb_terms(wave, images(5, 2, 3, 4))
    assert torch.equal(short.terms, terms)
    # Both chains end at the same x_T.
    torch.testing.assert_close(short.prior, bits().prior, atol=1e-6, rtol=0)


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
def test_gaussian_data_by_numpy(variance):
    """The expectation over x_t, in closed form, is what the draws scatter about."""
    mean, std = 0.1, 0.2
    x0 = gaussian_images(400, mean, std)
    model = Gaussian(SCHEDULE, mean, std)
    result = bits(model, x0, diffusion=Diffusion(SCHEDULE, variance=variance))
    x = x0.double().numpy() / 127.5 - 1
    beta, ab = SCHEDULE.betas, np.cumprod(1 - SCHEDULE.betas)
    for t in range(1, SCHEDULE.T):
        # x0hat - x0 is linear in x0 and eps: its second moment has no cross term.
        root, gain = np.sqrt(1 - ab[t]), model.gain[t]
        slope = (1 - root * gain) / np.sqrt(ab[t])
        offset = root * gain * model.centre[t] / np.sqrt(ab[t])
        bias = (slope * np.sqrt(ab[t]) - 1) * x + offset
        mse = (bias**2 + (slope * root) ** 2).mean()
        tilde = beta[t] * (1 - ab[t - 1]) / (1 - ab[t])
        sigma2 = beta[t] if variance == "fixed_large" else tilde
        weight = np.sqrt(ab[t - 1]) * beta[t] / (1 - ab[t])
        kl = 0.5 * (np.log(sigma2 / tilde) + tilde / sigma2 - 1) + weight**2 * mse / (2 * sigma2)
        for got, expected in ((result.mse[:, t], mse), (result.terms[:, t], kl / math.log(2))):
            error = 4 * got.double().std().item() / len(x0) ** 0.5
            assert abs(got.double().mean().item() - expected) < error
            assert error < 0.25 * expected


def test_the_true_reverse_process_of_gaussian_data_pays_its_entropy():
    """With the variance of q(x_{t-1} | x_t) too, p is the data's distribution: a tight bound."""
    mean, std, n = 0.1, 0.2, 2000
    schedule = Schedule.linear(30, 0.002, 0.35)
    model, ab = Gaussian(schedule, mean, std), schedule.alphas_cumprod
    posterior = std**2 * (1 - ab) / (ab * std**2 + 1 - ab)  # Var(x_0 | x_t)
    weight = schedule.columns()["mean_x0"]
    log_variance = torch.tensor(np.log(schedule.posterior_variance + weight**2 * posterior))

    def both(x, t):
        return torch.cat((model(x, t), log_variance.float()[t][:, None, None, None] + 0 * x), dim=1)

    x0 = gaussian_images(n, mean, std)
    result = bits(
        both, x0, batch_size=500, diffusion=Diffusion(schedule, variance="learned", loss="vlb")
    )
    levels = np.arange(256) / 127.5 - 1
    mass = norm.cdf(levels + 1 / 255, mean, std) - norm.cdf(levels - 1 / 255, mean, std)
    cost = -np.log2(mass)[x0.numpy()].mean((1, 2, 3))  # what the true distribution pays
    difference = result.total.double().numpy() - cost
    # Except that the chain starts from N(0, I), not from q(x_T).
    mean, variance = ab[-1] ** 0.5 * mean, ab[-1] * std**2 + 1 - ab[-1]
    start = 0.5 * (variance + mean**2 - 1 - math.log(variance)) / math.log(2)
    error = 4 * difference.std() / n**0.5
    assert error < 0.04
    assert abs(difference.mean() - start) < error


def test_a_module_is_evaluated_and_left_in_its_mode():
    model = tiny_unet(dropout=0.5).train()
    x0 = images(2, 1, 8, 8)
    results = [fastddpm.bits_per_dim(model, x0, steps=3, progress=False) for _ in range(2)]
    assert torch.equal(results[0].total, results[1].total), "dropout is on"
    assert model.training
    assert not results[0].total.requires_grad
    # The model's own process is the default.
    expected, _ = model.diffusion.respace(3).vlb_terms(model.eval(), x0)
    torch.testing.assert_close(results[0].terms, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x0": reference.to_unit(images(2, 1, 4, 4))}, "uint8.*float32"),
        ({"x0": images(2, 4, 4)}, r"\(N, C, H, W\) uint8.*\(2, 4, 4\)"),
        ({"x0": images(2, 1, 4, 4)[:0]}, "N >= 1"),
        ({"steps": 0}, "steps must be"),
        ({"steps": SCHEDULE.T + 1}, "steps must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"first_index": -1}, "first_index must be"),
        ({"seed": -1}, "seed must be"),
        ({"model": 3}, "model must be a callable .* got int"),
        ({"diffusion": SCHEDULE}, "diffusion must be a fastddpm.Diffusion; got Schedule"),
        ({"model": lambda x, t: x[:, :1]}, "the model must return"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        bits(**options)


def test_a_model_that_returns_nan_is_told_of():
    def model(x, t):
        return wave(x, t) * torch.where(t[0] == 5, math.nan, 1.0)

    with pytest.raises(FloatingPointError, match="not finite"):
        bits(model)
