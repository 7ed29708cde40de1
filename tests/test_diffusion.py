"""Diffusion: predictions, variances and losses of Table 2, against numpy and models that know."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import norm
from toy import PREDICTIONS, SCHEDULE, Oracle, generator, images, tiny_unet, wave

import fastddpm
from fastddpm import Diffusion, Schedule, ops

VARIANCES = ("fixed_large", "fixed_small", "learned", "learned_range")
FIXED = VARIANCES[:2]
T = SCHEDULE.T


def every_step(*shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x0, eps, t): T samples, one at each step."""
    x0 = torch.rand((T, *shape), generator=generator(1)) * 2 - 1
    return x0, torch.randn(x0.shape, generator=generator(2)), torch.arange(T)


def column(values: np.ndarray) -> np.ndarray:
    return np.asarray(values)[:, None, None, None]


def with_variance(diffusion: Diffusion, model):
    """`model`, and fixed_small's log-variance beside it if `diffusion` learns one."""
    if not diffusion.learns_variance:
        return model
    log_variance = torch.from_numpy(diffusion.schedule.posterior_log_variance).float()
    if diffusion.learned_range:
        log_variance = torch.full_like(log_variance, -1)

    def learned(x, t):
        return torch.cat((model(x, t), log_variance[t][:, None, None, None].expand_as(x)), dim=1)

    return learned


def process(prediction="eps", variance="fixed_large", loss=None, schedule=SCHEDULE) -> Diffusion:
    if loss is None:
        loss = "vlb" if "learned" in variance else "simple"
    return Diffusion(schedule, prediction, variance, loss)


# ---- Table 2 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["simple", "vlb"])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_row_of_table_2_trains(prediction, variance, loss):
    if "learned" in variance and loss == "simple":
        with pytest.raises(ValueError, match=f"{variance!r} needs loss='vlb' or 'hybrid'"):
            Diffusion(SCHEDULE, prediction, variance, loss)
        return
    diffusion = Diffusion(SCHEDULE, prediction, variance, loss)
    weight = torch.full((2 if "learned" in variance else 1,), 0.1, requires_grad=True)
    x0, eps, t = every_step(1, 2, 3)

    def model(x, t):
        return weight[None, :, None, None] * (x + 1)

    result = diffusion.loss(model, x0, t=t, eps=eps)
    assert result.shape == (T,)
    assert result.dtype == torch.float32
    assert result.isfinite().all()
    gradients = torch.stack([torch.autograd.grad(r, weight, retain_graph=True)[0] for r in result])
    # The log-variance (the second column) gets a gradient at every step, like the prediction.
    assert (gradients != 0).all()


@pytest.mark.parametrize(
    ("option", "choices"),
    [
        ({"prediction": "z"}, "'eps', 'x0', 'mean', 'v'; got 'z'"),
        ({"prediction": np.array(["eps"])}, "'eps', 'x0', 'mean'; got array"),
        ({"variance": "large"}, "'learned', 'learned_range'; got 'large'"),
        ({"loss": "l1"}, "'simple', 'vlb'; got 'l1'"),
    ],
)
def test_an_unknown_option_names_the_choices(option, choices):
    (name,) = option
    with pytest.raises(ValueError, match=f"{name} must be one of {choices}"):
        Diffusion(SCHEDULE, **option)


# ---- a model that knows x0 -----------------------------------------------------------------------


@pytest.mark.parametrize("data", ["uint8", "float"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_oracle_has_no_simple_loss_with_mirrored_images_too(prediction, data):
    diffusion = process(prediction)
    x0 = images(T, 3, 4, 5) if data == "uint8" else every_step(3, 4, 5)[0]
    flip = torch.arange(T) % 2 == 0
    mirrored = torch.where(flip[:, None, None, None], x0.flip(-1), x0)
    noise = {"t": torch.arange(T), "seed": 3, "sample_index": torch.arange(T)}
    oracle = Oracle(diffusion, mirrored)
    assert diffusion.loss(oracle, x0, flip=flip, **noise).max() < 1e-9
    assert diffusion.loss(oracle, x0, **noise)[flip].min() > 1e-6


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_oracle_has_no_kl_with_the_posterior_variance(prediction, clip):
    diffusion = process(prediction, "fixed_small")
    x0, eps, t = every_step(3, 4, 5)
    xt = diffusion.q_sample(x0, t, eps)
    terms = diffusion.vlb_term(x0, xt, Oracle(diffusion, x0)(xt, t), t, clip=clip)
    assert terms[1:].abs().max() < 1e-6
    assert terms[0] > 0.01  # the decoder is no KL


def test_fixed_large_costs_the_kl_of_two_variances():
    diffusion = process(variance="fixed_large")
    x0, eps, t = every_step(1, 3, 3)
    xt = diffusion.q_sample(x0, t, eps)
    terms = diffusion.vlb_term(x0, xt, Oracle(diffusion, x0)(xt, t), t)
    ratio = SCHEDULE.betas[1:] / SCHEDULE.posterior_variance[1:]
    expected = 0.5 * (np.log(ratio) + 1 / ratio - 1) / math.log(2)
    np.testing.assert_allclose(terms[1:].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("schedule", [SCHEDULE, Schedule.linear(), Schedule.cosine(200)])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_predict_x0_inverts_q_sample(prediction, schedule):
    diffusion = process(prediction, schedule=schedule)
    t = torch.linspace(0, schedule.T - 1, 24).round().long()
    x0 = torch.rand((24, 2, 3, 5), generator=generator()) * 2 - 1
    xt = diffusion.q_sample(x0, t, torch.randn(x0.shape, generator=generator(1)))
    got = diffusion.predict_x0(xt, Oracle(diffusion, x0)(xt, t), t, clip=False)
    # What one rounding of x_t or of the output becomes.
    ab, mean_x0 = schedule.alphas_cumprod, schedule.columns()["mean_x0"]
    allowed = 1e-5 + 3e-6 * (1 / mean_x0 if prediction == "mean" else 1 / np.sqrt(ab))
    assert ((got - x0).abs().amax((1, 2, 3)).numpy() <= allowed[t]).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_oracles_p_is_the_posterior(prediction):
    diffusion = process(prediction, "fixed_small")
    x0, eps, t = every_step(2, 3, 4)
    xt = diffusion.q_sample(x0, t, eps)
    mean, log_variance = diffusion.p_mean_variance(xt, Oracle(diffusion, x0)(xt, t), t)
    true_mean, true_log_variance = diffusion.q_posterior(x0, xt, t)
    torch.testing.assert_close(mean, true_mean, atol=3e-6, rtol=0)
    torch.testing.assert_close(log_variance, true_log_variance, atol=1e-6, rtol=0)
    # Eq. 7 in float64; log beta-tilde_0 = -inf takes the value of the step after it.
    ab, ab_prev = SCHEDULE.alphas_cumprod, np.append(1, SCHEDULE.alphas_cumprod[:-1])
    tilde = SCHEDULE.betas * (1 - ab_prev) / (1 - ab)
    expected = (
        column(np.sqrt(ab_prev) * SCHEDULE.betas / (1 - ab)) * x0.double().numpy()
        + column(np.sqrt(1 - SCHEDULE.betas) * (1 - ab_prev) / (1 - ab)) * xt.double().numpy()
    )
    np.testing.assert_allclose(true_mean.numpy(), expected, atol=1e-6)
    expected = np.log(np.append(tilde[1], tilde[1:]))
    np.testing.assert_allclose(true_log_variance[:, 0, 0, 0].numpy(), expected, atol=1e-6)


def test_eq_11_is_eq_15_then_eq_7():
    diffusion = process()
    _, eps, t = every_step(2, 3, 4)
    xt = torch.randn(eps.shape, generator=generator(3))
    mean, _ = diffusion.p_mean_variance(xt, eps, t, clip=False)
    beta, ab = column(SCHEDULE.betas), column(SCHEDULE.alphas_cumprod)
    eq_11 = (xt.double().numpy() - beta / np.sqrt(1 - ab) * eps.double().numpy()) / np.sqrt(
        1 - beta
    )
    np.testing.assert_allclose(mean.numpy(), eq_11, atol=3e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_right_learned_variance_is_fixed_small(prediction):
    learned, fixed = process(prediction, "learned"), process(prediction, "fixed_small")
    x0, eps, t = every_step(2, 3, 4)
    xt = fixed.q_sample(x0, t, eps)
    output = wave(xt, t)
    both = with_variance(learned, wave)(xt, t)
    for a, b in zip(
        learned.p_mean_variance(xt, both, t), fixed.p_mean_variance(xt, output, t), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    for sampler in ("ddpm", "ddim"):
        steps = [
            d.p_step(xt, o, t, z=eps, sampler=sampler, eta=0.5 * (sampler == "ddim"))
            for d, o in ((learned, both), (fixed, output))
        ]
        torch.testing.assert_close(*steps, atol=2e-6, rtol=0)
    terms = [
        d.vlb_terms(m, x0, seed=1)[0]
        for d, m in ((learned, with_variance(learned, wave)), (fixed, wave))
    ]
    torch.testing.assert_close(*terms, atol=1e-5, rtol=1e-5)


# ---- the bound -----------------------------------------------------------------------------------


def vlb_by_numpy(diffusion: Diffusion, model, x0: np.ndarray, seed: int):
    """(terms in bits/dim, mse) in float64, from the paper's formulas and scipy's normal CDF."""
    beta = diffusion.schedule.betas
    ab = np.cumprod(1 - beta)
    terms, mse = [], []
    for t in range(len(beta)):
        eps = ops.randn(x0.shape, seed=seed, step=t).double().numpy()
        xt = np.sqrt(ab[t]) * x0 + np.sqrt(1 - ab[t]) * eps
        step = torch.full((len(x0),), t)
        output = model(torch.from_numpy(xt).float(), step).double().numpy()
        before = ab[t - 1] if t else 1.0
        weight_x0 = np.sqrt(before) * beta[t] / (1 - ab[t])
        weight_xt = np.sqrt(1 - beta[t]) * (1 - before) / (1 - ab[t])
        if diffusion.prediction == "eps":
            predicted = (xt - np.sqrt(1 - ab[t]) * output) / np.sqrt(ab[t])
        elif diffusion.prediction == "x0":
            predicted = output
        else:
            predicted = (output - weight_xt * xt) / weight_x0
        predicted = predicted.clip(-1, 1)
        mean = weight_x0 * predicted + weight_xt * xt
        if diffusion.prediction == "mean":
            mean = output
        k = max(t, 1)
        tilde = beta[k] * (1 - ab[k - 1]) / (1 - ab[k])
        variance = beta[t] if t and diffusion.variance == "fixed_large" else tilde
        if t == 0:
            sigma = np.sqrt(variance)
            upper = np.where(x0 > 0.999, np.inf, x0 + 1 / 255)
            lower = np.where(x0 < -0.999, -np.inf, x0 - 1 / 255)
            mass = norm.cdf(upper, mean, sigma) - norm.cdf(lower, mean, sigma)
            term = -np.log(mass)
        else:
            true_mean = weight_x0 * x0 + weight_xt * xt
            term = 0.5 * np.log(variance / tilde) - 0.5
            term = term + (tilde + (true_mean - mean) ** 2) / (2 * variance)
        terms.append(term.mean((1, 2, 3)) / np.log(2))
        mse.append(((predicted - x0) ** 2).mean((1, 2, 3)))
    return np.stack(terms, 1), np.stack(mse, 1)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_vlb_terms_by_numpy_and_scipy(prediction, variance):
    diffusion = process(prediction, variance)
    x0 = images(3, 2, 4, 3)
    unit = x0.double().numpy() / 127.5 - 1
    oracle = Oracle(diffusion, x0)

    def model(x, t):  # wrong by so much that the decoder's masses do not vanish in float64
        scale = torch.where(t == 0, 0.01, 0.5) if prediction != "eps" else torch.full((3,), 0.5)
        return oracle(x, t) + scale[:, None, None, None] * wave(x, t)

    terms, mse = diffusion.vlb_terms(with_variance(diffusion, model), x0, seed=5)
    expected_terms, expected_mse = vlb_by_numpy(diffusion, model, unit, seed=5)
    assert np.isfinite(expected_terms).all()
    np.testing.assert_allclose(terms.numpy(), expected_terms, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(mse.numpy(), expected_mse, rtol=2e-4, atol=1e-6)


def test_vlb_terms_take_a_sample_for_what_its_index_says():
    diffusion, x0 = process(), images(4, 1, 3, 3)
    together = diffusion.vlb_terms(wave, x0, seed=2)
    apart = diffusion.vlb_terms(wave, x0[2:], seed=2, sample_index=torch.tensor([2, 3]))
    for a, b in zip(together, apart, strict=True):
        assert torch.equal(a[2:], b)


def test_the_vlb_loss_is_a_term_of_the_bound_without_clipping():
    diffusion = process("x0", "fixed_small", "vlb")
    x0, eps, t = every_step(1, 3, 3)
    xt = diffusion.q_sample(x0, t, eps)

    def model(x, t):
        return 2 * wave(x, t)  # beyond [-1, 1]

    loss = diffusion.loss(model, x0, t=t, eps=eps)
    output = model(xt, t)
    assert torch.equal(loss, diffusion.vlb_term(x0, xt, output, t, clip=False))
    assert (loss > diffusion.vlb_term(x0, xt, output, t, clip=True) + 1e-3).any()


def test_prior_kl_in_closed_form():
    for schedule in (SCHEDULE, Schedule.linear()):
        x0 = images(3, 1, 4, 4)
        ab = np.prod(1 - schedule.betas)
        mean, variance = np.sqrt(ab) * (x0.double().numpy() / 127.5 - 1), 1 - ab
        kl = 0.5 * (variance + mean**2 - 1 - np.log(variance))
        expected = kl.mean((1, 2, 3)) / np.log(2)
        np.testing.assert_allclose(process(schedule=schedule).prior_kl(x0), expected, rtol=1e-5)


@pytest.mark.parametrize("mean", [-1.4, -0.7, 0.003, 0.9999])
@pytest.mark.parametrize("sigma", [1e-4, 0.005, 0.3, 10])
def test_the_256_bins_hold_all_of_the_mass(mean, sigma):
    x = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    logs = ops.discretized_log_likelihood(
        x, torch.full_like(x, mean), torch.full_like(x, math.log(sigma))
    )
    assert logs.exp().sum().item() == pytest.approx(1, abs=1e-12)


# ---- clipping ------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_clip_only_when_asked(prediction):
    diffusion = process(prediction, "fixed_small")
    x0, eps, t = every_step(1, 3, 4)
    x0 = 3 * x0  # the oracle's predictions lie outside of [-1, 1]
    xt = diffusion.q_sample(x0, t, eps)
    output = Oracle(diffusion, x0)(xt, t)
    free = diffusion.predict_x0(xt, output, t, clip=False)
    assert free.abs().max() > 2
    torch.testing.assert_close(
        diffusion.predict_x0(xt, output, t), free.clamp(-1, 1), atol=1e-4, rtol=0
    )
    z = torch.zeros_like(xt)
    for clip in (True, False):
        x = x0.clamp(-1, 1) if clip and prediction != "mean" else x0
        expected = diffusion.q_posterior(x, xt, t)[0]
        for mean in (
            diffusion.p_mean_variance(xt, output, t, clip=clip)[0],
            diffusion.p_step(xt, output, t, z=z, clip=clip),
        ):
            torch.testing.assert_close(mean, expected, atol=2e-5, rtol=0)


def test_a_predicted_mean_is_the_mean():
    diffusion = process("mean")
    _, eps, t = every_step(1, 3, 4)
    output = 5 * eps
    assert torch.equal(diffusion.p_mean_variance(eps, output, t, clip=True)[0], output)


# ---- steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_step_is_eq_12_of_ddim(prediction, eta):
    diffusion = process(prediction)
    x0, eps, t = every_step(1, 3, 4)
    xt = diffusion.q_sample(x0, t, eps)
    z = torch.randn(eps.shape, generator=generator(5))
    got = diffusion.p_step(
        xt, Oracle(diffusion, x0)(xt, t), t, z=z, sampler="ddim", eta=eta, clip=False
    )
    ab, ab_prev = column(SCHEDULE.alphas_cumprod), column(SCHEDULE.alphas_cumprod_prev)
    sigma = eta * np.sqrt((1 - ab_prev) / (1 - ab) * (1 - ab / ab_prev))
    expected = (
        np.sqrt(ab_prev) * x0.double().numpy()
        + np.sqrt(1 - ab_prev - sigma**2) * eps.double().numpy()
        + sigma * z.double().numpy()
    )
    np.testing.assert_allclose(got.numpy(), expected, atol=5e-6)


def test_p_step_draws_the_noise_of_the_models_step():
    full = process()
    short = full.respace(5)
    x = torch.randn(5, 1, 3, 3, generator=generator())
    t, index = torch.arange(5), torch.arange(7, 12)
    drawn = short.p_step(x, wave(x, t), t, seed=4, sample_index=index)
    z = ops.randn(x.shape, seed=4, step=torch.tensor([0, 3, 6, 8, 11]), sample_index=index)
    torch.testing.assert_close(
        drawn, short.p_step(x, wave(x, t), t, z=z), atol=1e-6, rtol=0, msg="another noise"
    )


def test_a_respaced_process_shows_the_model_its_own_steps():
    short = process().respace(5)
    assert short.schedule.timesteps.tolist() == [0, 3, 6, 8, 11]
    seen = []

    def model(x, t):
        seen.extend(t.tolist())
        return wave(x, t)

    x0, t = images(5, 1, 3, 3), torch.arange(5)
    short.loss(model, x0, t=t, seed=0, sample_index=t)
    assert seen == [0, 3, 6, 8, 11]
    seen.clear()
    short.vlb_terms(model, x0[:1])
    assert seen == [0, 3, 6, 8, 11]
    # The marginals at the kept steps are those of the full chain.
    eps = torch.ones(5, 1, 3, 3)
    kept = process().q_sample(x0, torch.tensor([0, 3, 6, 8, 11]), eps)
    torch.testing.assert_close(short.q_sample(x0, t, eps), kept, atol=1e-6, rtol=0)


def test_options_survive_respacing():
    short = process("x0", "learned", "vlb").respace(3)
    assert (short.prediction, short.variance, short.objective) == ("x0", "learned", "vlb")
    assert short.T == 3


# ---- where a chain ends --------------------------------------------------------------------------


def told(call) -> list[str]:
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in record if "abar_T" in str(w.message)]


def name_of(value) -> str:
    return f"{value.T} steps" if isinstance(value, Schedule) else str(value)


def as_process_of(schedule: Schedule, *, steps: int | None = None) -> dict[str, list[str]]:
    """What sampling (twice) and training say of a process."""

    def draw() -> None:
        options = {"diffusion": diffusion, "steps": steps, "progress": False}
        for _ in range(2):
            fastddpm.sample(wave, 1, shape=(1, 2, 2), **options)

    diffusion = Diffusion(schedule)
    spoken = {"sampling": told(draw)}
    spoken["training"] = told(lambda: fastddpm.Trainer(tiny_unet(diffusion=Diffusion(schedule))))
    return spoken


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule.linear(100),
        Schedule.linear(300),
        Schedule.linear(300).respace(30),
        Schedule.constant(100),
        Schedule.linear(12, 0.01, 0.3),
    ],
    ids=name_of,
)
def test_an_image_that_is_left_in_x_t_is_told_of_once(schedule):
    for texts in as_process_of(schedule, steps=5).values():
        (text,) = texts
        assert text.startswith(f"abar_T is {schedule.alphas_cumprod[-1]:.2g}: ")
        assert "Schedule.linear(T, scaled=True)" in text
    # A process that is looked at, or whose bound with its L_T is taken, is not.
    diffusion = Diffusion(schedule)
    assert not told(lambda: fastddpm.bits_per_dim(
        wave, images(1, 1, 2, 2), diffusion=diffusion, steps=3, progress=False
    ))  # fmt: skip


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        (Schedule.linear(), None),
        (Schedule.linear(), 10),
        (Schedule.linear().respace(10), None),  # betas up to 0.9, and few of them
        (Schedule.linear(100, scaled=True), None),
        (Schedule.quadratic(), 7),
        (Schedule.constant(), 7),
        (Schedule.cosine(12), None),
        (SCHEDULE, None),
        (SCHEDULE, 3),
        (Schedule(np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2), 4),  # a foreign scheduler's
    ],
    ids=name_of,
)
def test_a_chain_that_ends_in_noise_is_not_told_of(schedule, steps):
    assert as_process_of(schedule, steps=steps) == {"sampling": [], "training": []}


# ---- what a model may return ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variance", "channels", "expected"),
    [("fixed_large", 1, 3), ("fixed_large", 6, 3), ("learned", 3, 6), ("learned", 2, 6)],
)
def test_a_wrong_number_of_channels_is_no_broadcast(variance, channels, expected):
    diffusion, x0 = process(variance=variance), images(2, 3, 4, 4)

    def model(x, t):
        return x[:, :1].repeat(1, channels, 1, 1)

    t = torch.tensor([0, 5])
    for call in (
        lambda: diffusion.loss(model, x0, t=t, seed=0, sample_index=t),
        lambda: diffusion.vlb_terms(model, x0),
    ):
        with pytest.raises(ValueError, match=rf"\(2, {expected}, 4, 4\).*\(2, {channels}, 4, 4\)"):
            call()


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "diffusion",
    [
        Diffusion(),
        Diffusion(Schedule.cosine(50), "x0", "learned", "vlb"),
        Diffusion(Schedule.constant(7, 0.3), "mean", "fixed_small"),
        Diffusion(Schedule(np.array([0.1, 1 / 3, 0.7])), loss="vlb"),
        Diffusion(Schedule.sigmoid(9), "v", loss_weight="min_snr", min_snr_gamma=3),
        Diffusion(Schedule.sigmoid_betas(3), "v", "learned_range", "hybrid", [0, 2, 1.5]),
        Diffusion(SCHEDULE, rescale_timesteps=True),
    ],
)
def test_config_round_trip(diffusion):
    config = json.loads(json.dumps(diffusion.to_config()))
    again = Diffusion.from_config(config)
    assert again.to_config() == config
    assert np.array_equal(again.schedule.betas, diffusion.schedule.betas)
    for name in ("prediction", "variance", "objective"):
        assert getattr(again, name) == getattr(diffusion, name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "red"}, "colour"),
        ({"prediction": "z"}, "prediction must be one of"),
        ({"loss_weight": [1, 2]}, r"loss_weight must be None, 'min_snr' or \(12,\) numbers"),
        ({"loss": "hybrid"}, "loss='hybrid' needs a variance that is learned"),
        ({"schedule": {"kind": "zigzag"}}, "schedule kind must be one of"),
        ({"schedule": {"kind": "linear", "S": 5}}, "linear.*'S'"),
        ({"schedule": None}, "schedule"),
    ],
)
def test_from_config_names_what_is_wrong(change, message):
    config = {**Diffusion(SCHEDULE).to_config(), **change}
    if config["schedule"] is None:
        del config["schedule"]
    with pytest.raises(ValueError, match=message):
        Diffusion.from_config(config)


def test_a_table_that_inference_made_serves_training():
    diffusion = process("mean", "learned", schedule=SCHEDULE.respace(5))
    x0, t = images(2, 1, 3, 3), torch.tensor([0, 3])
    weight = torch.ones(2, requires_grad=True)

    def model(x, t):
        return weight[None, :, None, None] * wave(x, t)

    with torch.inference_mode():
        diffusion.vlb_terms(model, x0)
    diffusion.loss(model, x0, t=t, seed=0, sample_index=t).sum().backward()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("schedule", ["linear", 1000, [0.1, 0.2], Diffusion()], ids=str)
def test_a_schedule_is_a_schedule(schedule):
    with pytest.raises(ValueError, match=r"schedule must be a fastddpm\.Schedule; got "):
        Diffusion(schedule)


def test_the_unet_trains_with_a_learned_variance():
    model = tiny_unet(diffusion=process("eps", "learned"))
    x0, t = images(2, 1, 8, 8), torch.tensor([0, 7])
    model.diffusion.loss(model, x0, t=t, seed=0, sample_index=t).mean().backward()
    for half in model.conv_out.weight.grad.chunk(2):
        assert half.abs().max() > 0
