"""Shorter chains of models that speak of one step of the full one: a mean, a learned variance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import norm
from toy import SCHEDULE, Optimal, Oracle, generator, images, tiny_unet

import fastddpm
from fastddpm import Diffusion, Schedule, _native
from fastddpm.engine import make_engine
from fastddpm.engine.eager import Eager

CPU = torch.device("cpu")
LINEAR = Schedule.linear()
KINDS = [
    ("mean", "fixed_small"), ("mean", "learned"), ("eps", "learned"), ("x0", "learned"),
    ("v", "learned_range"), ("mean", "learned_range"),
]  # fmt: skip


def process(prediction, variance, schedule=LINEAR) -> Diffusion:
    return Diffusion(schedule, prediction, variance, "vlb" if "learned" in variance else "simple")


def std_of_samples(diffusion: Diffusion, std: float, error: float = 0.0, **options) -> float:
    model = Optimal(diffusion, std, error)
    options = {"shape": (1, 32, 32), "clip": False, "progress": False, **options}
    return fastddpm.sample(model, 16, diffusion=diffusion, **options).double().std().item()


# ---- samples -------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("steps", [None, 250, 50])
def test_a_predicted_mean_draws_what_eps_draws(steps, sampler, clip):
    """Gaussian data: 0.295, 0.286 and 0.251 with DDPM; as if of the short chain 1.13 and 2.45."""
    eps, mean = (
        std_of_samples(process(p, "fixed_small"), 0.3, steps=steps, sampler=sampler, clip=clip)
        for p in ("eps", "mean")
    )
    assert mean == pytest.approx(eps, rel=2e-3)
    assert eps == pytest.approx(0.3, rel=0.03 if steps is None else 0.2)


@pytest.mark.parametrize(
    ("prediction", "variance"),
    [("eps", "learned"), ("x0", "learned"), ("mean", "learned"), ("v", "learned_range")],
)
@pytest.mark.parametrize("steps", [None, 250, 100, 50])
def test_the_right_learned_variance_draws_the_data_in_any_number_of_steps(
    steps, prediction, variance
):
    """0.5; with the long chain's variance in the short one's steps 0.25, 0.17 and 0.12."""
    assert std_of_samples(process(prediction, variance), 0.5, steps=steps) == pytest.approx(
        0.5, rel=0.025
    )


@pytest.mark.parametrize(("prediction", "variance"), KINDS)
def test_ddim_has_no_learned_variance(prediction, variance):
    short = std_of_samples(process(prediction, variance), 0.4, steps=50, sampler="ddim")
    fixed = std_of_samples(process("eps", "fixed_small"), 0.4, steps=50, sampler="ddim")
    assert short == pytest.approx(fixed, rel=1e-3)
    assert short == pytest.approx(0.4, rel=0.1)


@pytest.mark.parametrize("error", [-0.02, 0.02])
@pytest.mark.parametrize("schedule", [LINEAR, Schedule.cosine()], ids=["linear", "cosine"])
@pytest.mark.parametrize("steps", [250, 50, 10])
def test_a_networks_error_in_the_variance_is_not_multiplied(steps, schedule, error):
    """Late log beta and log beta-tilde differ by 1e-6: an error of 0.02 must not be 10^4 ways."""
    small, large = (
        std_of_samples(process("eps", variance, schedule), 0.5, steps=steps)
        for variance in ("fixed_small", "fixed_large")
    )
    got = std_of_samples(process("eps", "learned", schedule), 0.5, error, steps=steps)
    assert 0.98 * small < got < 1.02 * large


def test_the_bound_of_a_mean_is_that_of_eps():
    x = np.random.default_rng(0).normal(0, 0.3, (8, 1, 8, 8))
    x0 = torch.from_numpy(np.clip(np.round((x + 1) * 127.5), 0, 255).astype(np.uint8))
    for steps in (None, 50):
        eps, mean = (
            fastddpm.bits_per_dim(Optimal(d, 0.3), x0, diffusion=d, steps=steps, progress=False)
            for d in (process("eps", "fixed_small"), process("mean", "fixed_small"))
        )
        torch.testing.assert_close(mean.total, eps.total, rtol=2e-3, atol=0)
        torch.testing.assert_close(mean.terms.mean(0), eps.terms.mean(0), rtol=1e-2, atol=1e-3)


def test_the_bound_of_a_learned_variance_is_the_datas_in_any_number_of_steps():
    """The true reverse process of Gaussian data: its bound is the entropy, at 1000 steps and 50."""
    x = np.random.default_rng(0).normal(0, 0.4, (64, 1, 8, 8))
    x0 = torch.from_numpy(np.clip(np.round((x + 1) * 127.5), 0, 255).astype(np.uint8))
    levels = np.arange(256) / 127.5 - 1
    mass = norm.cdf(levels + 1 / 255, 0, 0.4) - norm.cdf(levels - 1 / 255, 0, 0.4)
    cost = -np.log2(mass)[x0.numpy()].mean()
    diffusion = process("eps", "learned")
    model = Optimal(diffusion, 0.4)
    bits = {
        steps: fastddpm.bits_per_dim(model, x0, diffusion=diffusion, steps=steps, progress=False)
        for steps in (200, 50)
    }
    for result in bits.values():
        assert result.total.mean().item() == pytest.approx(cost, abs=0.1)
    # The decoder is the same step in all chains, and so are its terms.
    full = fastddpm.bits_per_dim(
        model, x0[:4], diffusion=diffusion, steps=999, progress=False
    ).terms[:, 0]
    torch.testing.assert_close(bits[50].terms[:4, 0], full, atol=1e-5, rtol=0)


# ---- one step, by numpy --------------------------------------------------------------------------


def column(values: np.ndarray) -> np.ndarray:
    return values[:, None, None, None]


def step_by_numpy(full, kept, prediction, xt, output, clip, variance):
    """(x0, mean, log sigma^2 or None) of every step of the chain over `kept`, from the full betas;
    log sigma^2 for t > 0."""
    beta, ab = full.betas, np.cumprod(1 - full.betas)
    before = np.append(1, ab[:-1])
    beta_kept, ab_kept = beta[kept], ab[kept]
    ab_before = np.append(1, ab_kept[:-1])
    beta_short = 1 - ab_kept / ab_before

    def posterior(ab, before, beta):
        return (
            column(np.sqrt(before) * beta / (1 - ab)),
            column(np.sqrt(1 - beta) * (1 - before) / (1 - ab)),
        )

    out, *rest = np.split(output, output.shape[1] // xt.shape[1], axis=1)
    if prediction == "eps":
        x0 = (xt - column(np.sqrt(1 - ab_kept)) * out) / column(np.sqrt(ab_kept))
    elif prediction == "x0":
        x0 = out
    elif prediction == "v":
        x0 = column(np.sqrt(ab_kept)) * xt - column(np.sqrt(1 - ab_kept)) * out
    else:
        of_x0, of_xt = posterior(ab_kept, before[kept], beta_kept)
        x0 = (out - of_xt * xt) / of_x0
    x0 = x0.clip(-1, 1) if clip else x0
    of_x0, of_xt = posterior(ab_kept, ab_before, beta_short)
    log_variance = None
    if variance == "learned_range":  # improved-diffusion's, over the chain's own betas
        low = beta_short * (1 - ab_before) / (1 - ab_kept)
        low[0], fraction = low[1], (rest[0] + 1) / 2
        log_variance = column(np.log(beta_short)) * fraction + column(np.log(low)) * (1 - fraction)
    elif rest:
        with np.errstate(divide="ignore", invalid="ignore"):
            low = column(np.log(beta_kept * (1 - before[kept]) / (1 - ab_kept)))
            short_low = column(np.log(beta_short * (1 - ab_before) / (1 - ab_kept)))
            between = rest[0].clip(low, column(np.log(beta_kept)))
            fraction = (between - low) / (column(np.log(beta_kept)) - low)
            log_variance = short_low + fraction * (column(np.log(beta_short)) - short_low)
            log_variance += rest[0] - between
        log_variance[0] = rest[0][0]  # t = 0: the same step as the full chain's
    return x0, of_x0 * x0 + of_xt * xt, log_variance


def at_every_step(schedule: Schedule, prediction: str, variance: str):
    """(x_t, output) at each step of a short chain; fractions from -0.8 to 1.8."""
    kept, n = schedule.timesteps, schedule.T
    full, random = schedule.trained, generator(3)
    xt = torch.randn((n, 2, 3, 4), generator=random)
    if prediction == "mean":
        x0 = 1.5 * torch.randn(xt.shape, generator=random)
        output = Diffusion(full).q_posterior(x0, xt, torch.tensor(kept))[0]
    else:
        output = torch.randn(xt.shape, generator=random)
    if variance == "learned_range":
        output = torch.cat((output, torch.rand(xt.shape, generator=random) * 4 - 2), dim=1)
    if variance == "learned":
        low, way = (torch.tensor(column(v[kept])) for v in full.log_variance_bounds())
        fraction = torch.rand(xt.shape, generator=random) * 2.6 - 0.8
        output = torch.cat((output, (low + fraction * way).float()), dim=1)
    return xt, output


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(("prediction", "variance"), KINDS)
def test_p_of_a_shorter_chain_by_numpy(prediction, variance, clip, backend, device):
    short = process(prediction, variance, Schedule.linear(100, 1e-3, 0.2).respace(12))
    xt, output = at_every_step(short.schedule, prediction, variance)
    x0, mean, log_variance = step_by_numpy(
        short.schedule.trained, short.schedule.timesteps, prediction,
        xt.double().numpy(), output.double().numpy(), clip, variance,
    )  # fmt: skip
    t, z = torch.arange(12), torch.randn(xt.shape, generator=generator(4))
    sigma = column(np.sqrt(short.schedule.posterior_variance))
    if log_variance is not None:
        sigma = np.exp(0.5 * log_variance)
        sigma[0] = 0
    xt, output, t, z = (x.to(device) for x in (xt, output, t, z))
    got = short.p_step(xt, output, t, z=z, clip=clip).cpu().numpy()
    np.testing.assert_allclose(got, mean + sigma * z.cpu().numpy(), atol=3e-4, rtol=1e-4)
    got_mean, got_log_variance = short.p_mean_variance(xt, output, t, clip=clip)
    np.testing.assert_allclose(got_mean.cpu().numpy(), mean, atol=3e-4, rtol=1e-4)
    got = short.predict_x0(xt, output, t, clip=clip).cpu().numpy()
    np.testing.assert_allclose(got, x0, atol=2e-3, rtol=1e-3)
    if log_variance is not None:
        np.testing.assert_allclose(got_log_variance.cpu().numpy(), log_variance, atol=2e-4)


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
def test_a_model_that_learned_a_fixed_variance_has_the_shorter_chains(variance):
    full = process("eps", "learned", Schedule.cosine(400))
    fixed = torch.tensor(full.schedule.log_variance(variance), dtype=torch.float32)
    for steps in (399, 100, 7, 2):
        short, t = full.respace(steps), torch.arange(1, steps)
        kept = torch.tensor(short.schedule.timesteps)[1:]
        xt = torch.randn(steps - 1, 1, 2, 2, generator=generator())
        output = torch.cat((xt, fixed[kept][:, None, None, None].expand_as(xt)), dim=1)
        got = short.p_mean_variance(xt, output, t)[1][:, 0, 0, 0]
        expected = torch.tensor(short.schedule.log_variance(variance)[1:], dtype=torch.float32)
        torch.testing.assert_close(got, expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("schedule", [LINEAR, Schedule.linear(4000), Schedule.cosine()])
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_a_variance_that_can_not_be_told_is_the_lower_bound(schedule, steps):
    """Where the full bounds are one float32, rounding would be a fraction of any size."""
    short = process("eps", "learned", schedule).respace(steps)
    low = torch.tensor(schedule.log_variance("fixed_small"), dtype=torch.float32)
    xt = torch.zeros(steps, 1, 1, 1)
    word = low[torch.tensor(short.schedule.timesteps)][:, None, None, None]
    for nudge in (-1e-6, 0.0, 1e-6):
        output = torch.cat((xt, word + nudge), dim=1)
        log_variance = short.p_mean_variance(xt, output, torch.arange(steps))[1].flatten()
        assert log_variance.isfinite().all()
        lower, way = map(torch.tensor, short.schedule.log_variance_bounds())
        assert (log_variance[1:] > lower[1:] - 1e-4).all()
        assert (log_variance[1:] < lower[1:] + 1.1 * way[1:] + 1e-4).all()
        if steps < 4 and schedule.recipe["kind"] == "linear":
            torch.testing.assert_close(log_variance[-1].double(), lower[-1], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("prediction", "variance"), KINDS)
def test_the_full_chain_is_left_to_the_op(prediction, variance):
    diffusion = process(prediction, variance, SCHEDULE)
    assert diffusion.takes_output("ddpm")
    assert diffusion.takes_output("ddim") == (prediction != "mean")
    t = torch.arange(SCHEDULE.T)
    xt, output = at_every_step(SCHEDULE, prediction, variance)
    mean, log_variance = diffusion.p_mean_variance(xt, output, t)
    if prediction == "mean":  # the model's words themselves, in the last bit
        assert torch.equal(mean, output[:, :2])
    if variance == "learned":
        assert torch.equal(log_variance, output[:, 2:])


# ---- however the shorter chain was made ----------------------------------------------------------


@pytest.mark.parametrize(("prediction", "variance"), KINDS)
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_schedule_that_was_respaced_before_is_steps(prediction, variance, sampler):
    full = process(prediction, variance)
    model = Optimal(full, 0.5)
    options = {"shape": (1, 4, 4), "sampler": sampler, "progress": False}
    expected = fastddpm.sample(model, 3, diffusion=full, steps=25, **options)
    for schedule in (LINEAR.respace(25), LINEAR.respace(997).respace(25)):
        handed_in = process(prediction, variance, schedule)
        got = fastddpm.sample(model, 3, diffusion=handed_in, **options)
        if np.array_equal(schedule.timesteps, LINEAR.respace(25).timesteps):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
        assert schedule.trained is LINEAR
        assert got.std() == pytest.approx(expected.std().item(), rel=0.1)


@pytest.mark.parametrize(
    ("prediction", "variance"), [*KINDS, ("eps", "fixed_large"), ("x0", "fixed_small")]
)
def test_a_chain_of_unknown_full_betas_is_for_those_who_need_none(prediction, variance):
    betas = LINEAR.respace(3).betas
    schedule = Schedule(betas, [0, 500, 999], 1000)
    if "mean" in (prediction,) or variance == "learned":
        with pytest.raises(ValueError, match=r"3 of 1000 steps.*make it with Schedule\.respace"):
            process(prediction, variance, schedule)
        return
    short = process(prediction, variance, schedule)
    x, t = torch.randn(3, 1, 2, 2, generator=generator()), torch.arange(3)
    assert torch.equal(short.model_t(t), torch.tensor([0, 500, 999]))
    assert short.p_step(x, x, t, z=x).isfinite().all()


def test_training_on_a_shorter_chain_has_the_full_chains_mean_for_a_target():
    full = process("mean", "fixed_small", SCHEDULE)
    short, x0 = full.respace(5), images(5, 1, 3, 3)
    t = torch.arange(5)
    loss = short.loss(Oracle(full, x0), x0, t=t, seed=0, sample_index=t)
    assert loss.max() < 1e-9


@pytest.mark.parametrize("kind", ["linear(4000)", "cosine(4000)"])
@pytest.mark.parametrize("prediction", ["eps", "x0", "mean"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_an_abar_below_float64s_resolution_of_one_is_respaced(kind, prediction, steps):
    full = {"linear(4000)": Schedule.linear(4000), "cosine(4000)": Schedule.cosine(4000)}[kind]
    short = full.respace(steps)
    assert steps == short.T
    np.testing.assert_allclose(
        short.alphas_cumprod, full.alphas_cumprod[short.timesteps], rtol=1e-9, atol=2e-16
    )
    assert short.table().isfinite().all()
    assert short.table(sampler="ddim").isfinite().all()
    diffusion = Diffusion(full, prediction)
    x = fastddpm.sample(
        Optimal(diffusion, 0.3), 2, diffusion=diffusion, steps=steps, shape=(1, 4, 4),
        progress=False,
    )  # fmt: skip
    assert x.isfinite().all()
    assert x.abs().max() <= 1


# ---- engines -------------------------------------------------------------------------------------


@pytest.mark.skipif(_native.C is None, reason="plans need the native module")
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize(("prediction", "variance"), KINDS)
def test_a_plan_takes_the_steps_of_a_shorter_chain(prediction, variance, sampler):
    """The plan's x_{t-1} is the formula's of the plan's own output, for noise of the contract."""
    full = process(prediction, variance, SCHEDULE)
    model, short = tiny_unet(diffusion=full), full.respace(5)
    options = {"device": CPU, "precision": "fp32", "sampler": sampler, "clip": False}
    engine = make_engine("cpu_plan", model, short, **options)
    eager = Eager(model, short, **options)
    xt = torch.randn((5, 1, 8, 8), generator=generator(1))
    index = torch.arange(5)
    outputs, steps = [], []
    for i in range(5):
        t = torch.full((5,), i)
        x, output = engine.step(xt, i, t, 7, index)
        torch.testing.assert_close(output, eager.output(xt, i, t), atol=1e-4, rtol=1e-4)
        outputs.append(output[i])
        steps.append(x[i])
    if sampler == "ddim":
        x0, _, _ = step_by_numpy(
            SCHEDULE, short.schedule.timesteps, prediction,
            xt.double().numpy(), torch.stack(outputs).double().numpy(), False,
        )  # fmt: skip
        ab = SCHEDULE.alphas_cumprod[short.schedule.timesteps]
        before = np.append(1, ab[:-1])
        eps = (xt.double().numpy() - column(np.sqrt(ab)) * x0) / column(np.sqrt(1 - ab))
        expected = column(np.sqrt(before)) * x0 + column(np.sqrt(1 - before)) * eps
    else:
        _, mean, log_variance = step_by_numpy(
            SCHEDULE, short.schedule.timesteps, prediction,
            xt.double().numpy(), torch.stack(outputs).double().numpy(), False,
        )  # fmt: skip
        z = fastddpm.ops.randn(
            xt.shape, seed=7, step=torch.tensor(short.schedule.timesteps), sample_index=index
        )
        if log_variance is None:
            sigma = column(np.sqrt(short.schedule.posterior_variance))
        else:
            sigma = np.exp(0.5 * log_variance)
            sigma[0] = 0
        expected = mean + sigma * z.double().numpy()
    np.testing.assert_allclose(torch.stack(steps).numpy(), expected, rtol=1e-3, atol=2e-4)
