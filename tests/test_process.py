"""v, a learned range, the hybrid loss, weights of the loss and rescaled times, by the formulas of
their papers and of improved-diffusion, written anew in float64."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from toy import SCHEDULE, Oracle, generator, images, tiny_unet, wave

import fastddpm
from fastddpm import Diffusion, Schedule, Trainer, UNet, _native, ops
from fastddpm.engine import make_engine
from fastddpm.engine.cuda_plan import CudaPlan

T = SCHEDULE.T
RANGED = Diffusion(SCHEDULE, "v", "learned_range", "hybrid")


def column(values) -> torch.Tensor:
    return torch.as_tensor(np.asarray(values), dtype=torch.float64)[:, None, None, None]


def ab_of(schedule: Schedule) -> torch.Tensor:
    return column(np.cumprod(1 - schedule.betas))


def both_halves(x, t):
    return torch.cat((wave(x, t), torch.cos(2 * x)), dim=1)


# ---- v -------------------------------------------------------------------------------------------


def test_v_of_a_known_image_is_that_image():
    """x0 = sqrt(abar) x_t - sqrt(1 - abar) v at every t, and the loss of the true v is 0."""
    diffusion, x0 = Diffusion(SCHEDULE, "v"), images(T, 1, 3, 3)
    t, eps = torch.arange(T), torch.randn(T, 1, 3, 3, generator=generator())
    oracle = Oracle(diffusion, x0)
    xt = diffusion.q_sample(x0, t, eps)
    predicted = diffusion.predict_x0(xt, oracle(xt, t), t)
    torch.testing.assert_close(predicted.double(), oracle.x0, atol=2e-6, rtol=0)
    assert diffusion.loss(oracle, x0, t=t, eps=eps).max() < 1e-11


def test_the_loss_of_v_by_its_formula():
    diffusion, x0 = Diffusion(SCHEDULE, "v"), torch.rand(T, 2, 3, 3, generator=generator()) * 2 - 1
    t, eps = torch.arange(T), torch.randn(T, 2, 3, 3, generator=generator(1))
    ab = ab_of(SCHEDULE)
    xt = ab.sqrt() * x0.double() + (1 - ab).sqrt() * eps.double()
    v = ab.sqrt() * eps.double() - (1 - ab).sqrt() * x0.double()
    expected = (wave(xt, t) - v).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(
        diffusion.loss(wave, x0, t=t, eps=eps).double(), expected, rtol=1e-5, atol=0
    )
    flipped = diffusion.loss(wave, x0.flip(-1), t=t, eps=eps, flip=torch.ones(T).bool())
    torch.testing.assert_close(flipped.double(), expected, rtol=1e-5, atol=0)


# ---- a learned range, as improved-diffusion has it -----------------------------------------------


def improved_p_mean_variance(betas, x, t, output, clip):
    """gaussian_diffusion.py's p_mean_variance for LEARNED_RANGE and EPSILON."""
    ab = np.cumprod(1 - betas)
    before = np.append(1.0, ab[:-1])
    variance = betas * (1.0 - before) / (1.0 - ab)
    clipped = np.log(np.append(variance[1], variance[1:]))
    eps, values = output.chunk(2, dim=1)
    low, high = column(clipped)[t], column(np.log(betas))[t]
    frac = (values + 1) / 2
    log_variance = frac * high + (1 - frac) * low
    x0 = column(np.sqrt(1 / ab))[t] * x - column(np.sqrt(1 / ab - 1))[t] * eps
    x0 = x0.clamp(-1, 1) if clip else x0
    mean = column(betas * np.sqrt(before) / (1 - ab))[t] * x0
    return mean + column((1 - before) * np.sqrt(1 - betas) / (1 - ab))[t] * x, log_variance


def improved_vb(betas, x0, xt, t, output, clip=False):
    """_vb_terms_bpd: a KL in bits/dim, or the decoder at t = 0 (whose cdf they approximate)."""
    ab = np.cumprod(1 - betas)
    before = np.append(1.0, ab[:-1])
    variance = betas * (1.0 - before) / (1.0 - ab)
    true_log_variance = column(np.log(np.append(variance[1], variance[1:])))[t]
    true_mean = column(betas * np.sqrt(before) / (1 - ab))[t] * x0
    true_mean = true_mean + column((1 - before) * np.sqrt(1 - betas) / (1 - ab))[t] * xt
    mean, log_variance = improved_p_mean_variance(betas, xt, t, output, clip)
    kl = 0.5 * (
        -1.0
        + log_variance
        - true_log_variance
        + torch.exp(true_log_variance - log_variance)
        + ((true_mean - mean) ** 2) * torch.exp(-log_variance)
    )
    inv_stdv = torch.exp(-0.5 * log_variance)

    def cdf(x):
        return 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    above, below = (cdf(inv_stdv * (x0 - mean + s / 255)) for s in (1, -1))
    mass = torch.where(x0 < -0.999, above, torch.where(x0 > 0.999, 1 - below, above - below))
    nll = -torch.log(mass.clamp(min=1e-300))
    term = torch.where(t.eq(0)[:, None, None, None], nll, kl)
    return term.mean(dim=(1, 2, 3)) / math.log(2)


@pytest.mark.parametrize("steps", [None, 5, [0, 3, 10], "ddim4"])
@pytest.mark.parametrize("clip", [True, False])
def test_a_learned_range_is_improved_diffusions(steps, clip, backend, device):
    """Over all steps and respaced: log beta and log beta-tilde are the shorter chain's own."""
    diffusion = Diffusion(SCHEDULE, "eps", "learned_range", "hybrid").respace(steps)
    n, betas = diffusion.T, diffusion.schedule.betas
    random = generator(2)
    xt, z = (torch.randn(n, 2, 3, 5, generator=random) for _ in range(2))
    output, t = 1.5 * torch.randn(n, 4, 3, 5, generator=random), torch.arange(n)
    mean, log_variance = improved_p_mean_variance(betas, xt.double(), t, output.double(), clip)
    sample = mean + (t > 0)[:, None, None, None] * torch.exp(0.5 * log_variance) * z.double()
    xt, output, t, z = (x.to(device) for x in (xt, output, t, z))
    got = diffusion.p_mean_variance(xt, output, t, clip=clip)
    for a, b in zip(got, (mean, log_variance), strict=True):
        torch.testing.assert_close(a.cpu().double(), b, atol=1e-5, rtol=1e-5)
    got = diffusion.p_step(xt, output, t, z=z, clip=clip).cpu().double()
    torch.testing.assert_close(got, sample, atol=1e-5, rtol=1e-5)
    # ddim has a variance of its own.
    ddim = diffusion.p_step(xt, output, t, z=z, clip=clip, sampler="ddim")
    fixed = Diffusion(diffusion.schedule).p_step(
        xt, output[:, :2], t, z=z, clip=clip, sampler="ddim"
    )
    assert torch.equal(ddim, fixed)


def test_the_hybrid_loss_is_improved_diffusions():
    """MSE + vb T / 1000, value and gradients; the mean learns nothing of the bound."""
    diffusion = Diffusion(SCHEDULE, "eps", "learned_range", "hybrid")
    x0, t = images(T, 2, 3, 3), torch.arange(T)
    eps = torch.randn(T, 2, 3, 3, generator=generator(1))
    given = torch.randn(T, 4, 3, 3, generator=generator(4))
    output = given.clone().requires_grad_()
    loss = diffusion.loss(lambda x, t: output, x0, t=t, eps=eps)
    loss.sum().backward()

    true = given.double().requires_grad_()
    real, ab = x0.double() / 127.5 - 1, ab_of(SCHEDULE)
    xt = ab.sqrt() * real + (1 - ab).sqrt() * eps.double()
    mean, values = true.chunk(2, dim=1)
    frozen = torch.cat((mean.detach(), values), dim=1)
    vb = improved_vb(SCHEDULE.betas, real, xt, t, frozen) * T / 1000
    expected = (eps.double() - mean).square().mean(dim=(1, 2, 3)) + vb
    expected.sum().backward()
    torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(output.grad.double(), true.grad, rtol=1e-4, atol=1e-7)
    simple = (2 / 18 * (given[:, :2] - eps)).double()
    torch.testing.assert_close(output.grad[:, :2].double(), simple, rtol=1e-5, atol=1e-8)
    assert output.grad[:, 2:].abs().min() > 0


def test_the_bound_of_a_learned_range_by_improved_diffusions_formula():
    diffusion, x0 = Diffusion(SCHEDULE, "eps", "learned_range", "hybrid"), images(3, 1, 4, 4)
    for steps in (None, 5):
        for clip in (True, False):
            short = diffusion.respace(steps)
            got = fastddpm.bits_per_dim(
                both_halves, x0, diffusion=diffusion, seed=3, steps=steps, clip=clip,
                progress=False,
            )  # fmt: skip
            real, ab = x0.double() / 127.5 - 1, ab_of(short.schedule)
            for i, own in enumerate(short.schedule.timesteps.tolist()):
                t = torch.full((3,), i)
                eps = ops.randn(x0.shape, seed=3, step=own)
                xt = ab[i].sqrt() * real + (1 - ab[i]).sqrt() * eps.double()
                output = both_halves(xt, torch.full((3,), own))
                term = improved_vb(short.schedule.betas, real, xt, t, output, clip)
                torch.testing.assert_close(got.terms[:, i].double(), term, rtol=2e-3, atol=2e-4)


def test_the_bound_without_the_clip_is_another():
    x0 = images(2, 1, 4, 4)
    clipped, free = (
        fastddpm.bits_per_dim(
            lambda x, t: 3 * wave(x, t), x0, diffusion=Diffusion(SCHEDULE), clip=clip,
            progress=False,
        )
        for clip in (True, False)
    )  # fmt: skip
    assert free.total.min() > clipped.total.max()
    assert free.mse.max() > clipped.mse.max()
    with pytest.raises(ValueError, match="clip must be True or False"):
        fastddpm.bits_per_dim(wave, x0, clip="no", progress=False)


# ---- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("gamma", [5.0, 1.0])
def test_min_snr_is_its_formula(prediction, gamma):
    """Hang et al. 2023, as diffusers' training scripts have it: of x0 it is min(SNR, gamma)."""
    plain = Diffusion(SCHEDULE, prediction)
    weighted = Diffusion(SCHEDULE, prediction, loss_weight="min_snr", min_snr_gamma=gamma)
    x0, t = images(T, 1, 3, 3), torch.arange(T)
    noise = {"seed": 1, "sample_index": t}
    ratio = weighted.loss(wave, x0, t=t, **noise) / plain.loss(wave, x0, t=t, **noise)
    ab = torch.tensor(np.cumprod(1 - SCHEDULE.betas))
    snr = ab / (1 - ab)
    clipped = torch.stack((snr, torch.full_like(snr, gamma)), dim=1).min(dim=1)[0]
    over = {"eps": snr, "x0": 1, "v": snr + 1}[prediction]
    torch.testing.assert_close(ratio.double(), clipped / over, rtol=1e-5, atol=0)


def test_min_snr_is_one_loss_whatever_is_predicted():
    """The same x0 costs the same: SNR |x0|^2 clipped; eps, v and x0 of one model."""
    x0, t = images(T, 1, 3, 3), torch.arange(T)
    eps, ab = torch.randn(x0.shape, generator=generator()), ab_of(SCHEDULE)
    real = x0.double() / 127.5 - 1
    xt, guess = ab.sqrt() * real + (1 - ab).sqrt() * eps.double(), real.flip(0)
    noise = (xt - ab.sqrt() * guess) / (1 - ab).sqrt()
    outputs = {"x0": guess, "eps": noise, "v": ab.sqrt() * noise - (1 - ab).sqrt() * guess}
    losses = [
        Diffusion(SCHEDULE, name, loss_weight="min_snr").loss(
            lambda x, t, output=output: output.float(), x0, t=t, eps=eps
        )
        for name, output in outputs.items()
    ]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("given", [list, np.array, torch.tensor])
def test_weights_of_each_step_are_taken_along(given):
    values = [0.0, *np.linspace(3, 0.1, T - 1).tolist()]
    weighted = Diffusion(SCHEDULE, "mean", "learned", "hybrid", given(values))
    plain = Diffusion(SCHEDULE, "mean", "learned", "hybrid")
    x0, t = images(T, 1, 3, 3), torch.arange(T)
    noise = {"seed": 1, "sample_index": t}
    losses = [d.loss(both_halves, x0, t=t, **noise) for d in (weighted, plain)]
    bound = Diffusion(SCHEDULE, "mean", "learned", "vlb").loss(both_halves, x0, t=t, **noise)
    simple = losses[1] - T / 1000 * bound
    difference = losses[0] - losses[1]
    torch.testing.assert_close(difference, (torch.tensor(values).float() - 1) * simple,
                               rtol=1e-3, atol=1e-4)  # fmt: skip
    short = weighted.respace([2, 5, 11])
    np.testing.assert_allclose(short.loss_weight, np.array(values)[[2, 5, 11]], rtol=1e-6)
    assert weighted.respace([1, 2, 5, 11]).respace([1, 3]).loss_weight.tolist() == [
        weighted.loss_weight[2], weighted.loss_weight[11],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_weight": "snr"}, "loss_weight must be None, 'min_snr' or a number for each step"),
        ({"loss_weight": [1.0] * 11}, r"or \(12,\) numbers, one for each step; got .* \(11,\)"),
        ({"loss_weight": [-1.0] * 12}, "loss_weight must be finite and at least 0"),
        ({"loss_weight": [math.nan] * 12}, "loss_weight must be finite and at least 0"),
        ({"loss_weight": ["a"] * 12}, "loss_weight must be None, 'min_snr' or"),
        ({"loss_weight": [[1], [2, 3]]}, r"loss_weight must be \(12,\) numbers"),
        ({"loss_weight": 2.0}, "loss_weight must be None, 'min_snr' or"),
        ({"loss_weight": "min_snr", "min_snr_gamma": 0}, "min_snr_gamma must be above 0; got 0"),
        ({"loss_weight": "min_snr", "min_snr_gamma": math.inf}, "min_snr_gamma must be above 0"),
        ({"min_snr_gamma": 4}, "min_snr_gamma is of loss_weight='min_snr'; got loss_weight None"),
        ({"loss_weight": "min_snr", "prediction": "mean"}, "is not defined for prediction='mean'"),
        ({"loss_weight": "min_snr", "loss": "vlb"}, "loss='vlb' has no part of"),
        ({"rescale_timesteps": 1}, "rescale_timesteps must be True or False; got 1"),
        ({"loss": "hybrid"}, "'learned' or 'learned_range': its bound teaches nothing else"),
        ({"variance": "learned_range"}, "variance='learned_range' needs loss='vlb' or 'hybrid'"),
    ],
    ids=str,
)
def test_what_is_no_process_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        Diffusion(SCHEDULE, **options)


def test_options_survive_respacing_and_files():
    full = Diffusion(
        SCHEDULE, "v", "learned_range", "hybrid", "min_snr", min_snr_gamma=2, rescale_timesteps=True
    )
    for other in (full.respace(4), Diffusion.from_config(full.to_config()), copy.deepcopy(full)):
        for name in ("prediction", "variance", "objective", "loss_weight", "min_snr_gamma"):
            assert getattr(other, name) == getattr(full, name)
        assert other.rescale_timesteps
    assert full._is_like(Diffusion.from_config(full.to_config()))
    assert not full._is_like(Diffusion(SCHEDULE, "v", "learned_range", "hybrid"))
    assert set(Diffusion(SCHEDULE).to_config()) == {"schedule", "prediction", "variance", "loss"}


# ---- rescaled times ------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [None, 5])
def test_the_model_gets_improved_diffusions_times(steps):
    """t.float() * (1000 / T) of the model's own t, in float32; the noise keeps the integer."""
    seen = []

    def model(x, t):
        seen.append(t)
        return wave(x, t)

    diffusion = Diffusion(SCHEDULE, rescale_timesteps=True).respace(steps)
    own = torch.tensor(diffusion.schedule.timesteps.copy())
    x0, t = images(len(own), 1, 2, 2), torch.arange(len(own))
    diffusion.loss(model, x0, t=t, seed=0, sample_index=t)
    assert seen[-1].dtype == torch.float32
    assert torch.equal(seen[-1], own.float() * (1000.0 / 12))
    assert torch.equal(diffusion.model_t(t), own)
    xt = torch.randn(x0.shape, generator=generator())
    z = ops.randn(xt.shape, seed=4, step=own, sample_index=t)
    drawn = diffusion.p_step(xt, xt, t, seed=4, sample_index=t)
    assert torch.equal(drawn, diffusion.p_step(xt, xt, t, z=z))


OPTIONS = {
    "v": {"diffusion": Diffusion(SCHEDULE, "v")},
    "learned range": {"diffusion": RANGED},
    "mean and range": {"diffusion": Diffusion(SCHEDULE, "mean", "learned_range", "hybrid")},
    "rescaled": {"diffusion": Diffusion(SCHEDULE, rescale_timesteps=True)},
    "rescaled classes": {
        "diffusion": Diffusion(SCHEDULE, "v", rescale_timesteps=True), "num_classes": 3,
    },
}  # fmt: skip


@pytest.mark.skipif(_native.C is None, reason="plans need the native module")
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("steps", [None, 5])
@pytest.mark.parametrize("name", OPTIONS)
def test_plans_take_the_steps_of_eager(name, steps, sampler):
    """The CPU's in one native call a step, and a GPU's with its recording played on the CPU."""
    model = tiny_unet(seed=5, **OPTIONS[name])
    cpu = torch.device("cpu")
    options = {"device": cpu, "precision": "fp32", "sampler": sampler}
    chain = model.diffusion.respace(steps)
    index = torch.tensor([3, 4])
    x = ops.randn((2, 1, 8, 8), seed=2, step=T, sample_index=index)
    kwargs = {"y": torch.tensor([0, 2])} if model.config["num_classes"] else {}
    run = {"seed": 2, "sample_index": index, "model_kwargs": kwargs}
    expected = make_engine("eager", model, chain, **options).run(x, **run)
    if reason := fastddpm.engine.cpu_plan.unsupported(model, cpu):
        assert "num_classes" in reason
    else:
        got = make_engine("cpu_plan", model, chain, **options).run(x, **run)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)

    def tape(step, rewind, device):
        rewind()
        step()
        return step

    if not kwargs:
        plan = CudaPlan(model, chain, record=tape, **options)
        torch.testing.assert_close(plan.run(x, **run), expected, rtol=1e-4, atol=1e-4)


def test_a_unet_sees_a_rescaled_time_to_the_bit():
    model = tiny_unet(diffusion=Diffusion(Schedule.linear(700), rescale_timesteps=True))
    seen = []
    plain = UNet.sinusoids
    model.sinusoids = lambda t: seen.append(t) or plain(model, t)
    model.diffusion.loss(model, images(2, 1, 8, 8), t=torch.tensor([699, 1]), seed=0,
                         sample_index=torch.arange(2))  # fmt: skip
    assert torch.equal(seen[0], torch.tensor([699.0, 1.0]) * (1000.0 / 700))


# ---- training, labels ----------------------------------------------------------------------------


def test_a_trainer_learns_both_halves():
    model = tiny_unet(diffusion=Diffusion(SCHEDULE, "v", "learned_range", "hybrid", "min_snr"))
    before = model.conv_out.weight.detach().clone()
    trainer = Trainer(model, lr=1e-2, warmup=0, precision="fp32")
    x0 = images(8, 1, 8, 8)
    losses = [trainer.step(x0).item() for _ in range(16)]
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])
    for half in (model.conv_out.weight - before).chunk(2):
        assert half.abs().max() > 1e-3
    wrong = Diffusion(SCHEDULE, "eps", "learned_range", "hybrid")
    with pytest.raises(ValueError, match="variance 'learned_range' it needs 2"):
        Trainer(tiny_unet(), diffusion=wrong)


def test_labels_of_a_bound_are_cut_with_its_batches():
    def model(x, t, y, scale):
        return wave(x, t) * y[:, None, None, None].float() * scale

    x0, y = images(5, 1, 4, 4), torch.tensor([0, 3, 1, 2, 1])
    options = {"diffusion": Diffusion(SCHEDULE), "progress": False, "seed": 2}
    got = fastddpm.bits_per_dim(
        model, x0, batch_size=2, model_kwargs={"y": y, "scale": 0.25}, **options
    )
    for k in range(5):
        one = fastddpm.bits_per_dim(
            lambda x, t, k=k: wave(x, t) * y[k].float() * 0.25, x0[k : k + 1], first_index=k,
            **options,
        )  # fmt: skip
        torch.testing.assert_close(got.terms[k : k + 1], one.terms, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="model_kwargs must be a dict"):
        fastddpm.bits_per_dim(model, x0, model_kwargs=[y], **options)
    with pytest.raises(ValueError, match="the model can't be called as"):
        fastddpm.bits_per_dim(wave, x0, model_kwargs={"y": y}, **options)
