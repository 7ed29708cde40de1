"""Sampling: Algorithm 2 against closed forms, and what the same seed has to mean everywhere."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toy import PREDICTIONS, SCHEDULE, Gaussian, images, tiny_unet, wave

import fastddpm
from fastddpm import Diffusion, Schedule, batching, ops, reference

T = SCHEDULE.T
DIFFUSION = Diffusion(SCHEDULE)
SHAPE = (2, 3, 5)


def draw(n=5, model=wave, **options) -> torch.Tensor:
    defaults = {"shape": SHAPE, "diffusion": DIFFUSION, "progress": False}
    return fastddpm.sample(model, n, **{**defaults, **options})


class Recorder:
    """A model that keeps what it was given: {t: x_t}."""

    def __init__(self, model=wave):
        self.model, self.seen = model, {}

    def __call__(self, x, t):
        (step,) = set(t.tolist())
        self.seen[step] = x.clone()
        return self.model(x, t)


# ---- a chain with a closed form ------------------------------------------------------------------


def linear_chain(schedule: Schedule, model: Gaussian, variance: str, ddim: bool):
    """[(A, B, sigma)] from t = T-1 down: x_{t-1} = A x_t + B + sigma z, in float64.

    From Eq. 15 and Eq. 7 of DDPM, and Eq. 12 of DDIM, with eps = gain (x_t - centre).
    """
    beta, ab = schedule.betas, np.cumprod(1 - schedule.betas)
    steps = []
    for t in reversed(range(schedule.T)):
        before = ab[t - 1] if t else 1.0
        gain, centre = model.gain[t], model.centre[t]
        root = np.sqrt(1 - ab[t])
        # x0 = a x_t + b
        a, b = (1 - root * gain) / np.sqrt(ab[t]), root * gain * centre / np.sqrt(ab[t])
        tilde = beta[t] * (1 - before) / (1 - ab[t])
        if ddim:
            weight_x0, weight_eps = np.sqrt(before), np.sqrt(1 - before)
            steps.append(
                (weight_x0 * a + weight_eps * gain, weight_x0 * b - weight_eps * gain * centre, 0)
            )
            continue
        weight_x0 = np.sqrt(before) * beta[t] / (1 - ab[t])
        weight_xt = np.sqrt(1 - beta[t]) * (1 - before) / (1 - ab[t])
        sigma = np.sqrt(beta[t] if variance == "fixed_large" else tilde) if t else 0
        steps.append((weight_x0 * a + weight_xt, weight_x0 * b, sigma))
    return steps


@pytest.mark.parametrize("steps", [None, 8])
@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
def test_ddpm_of_gaussian_data_has_the_mean_and_variance_of_its_recursion(variance, steps):
    schedule = Schedule.linear(20, 0.01, 0.35)
    full = Gaussian(schedule, 0.3, 0.4)
    # The recursion sees the betas of the shorter chain and the model's gain at the steps it keeps.
    short, known = schedule, copy.copy(full)
    if steps is not None:
        short = schedule.respace(steps)
        known.gain, known.centre = (v[short.timesteps] for v in (full.gain, full.centre))
    mean, var = 0.0, 1.0
    for a, b, sigma in linear_chain(short, known, variance, ddim=False):
        mean, var = a * mean + b, a * a * var + sigma**2
    x = draw(
        50, full, shape=(3, 40, 40), diffusion=Diffusion(schedule, variance=variance),
        steps=steps, clip=False, seed=1,
    ).double()  # fmt: skip
    n = x.numel()
    assert abs(x.mean() - mean) < 4 * (var / n) ** 0.5
    assert abs(x.var() - var) < 4 * var * (2 / n) ** 0.5


def test_the_two_variances_of_that_chain_differ_by_more_than_the_test_allows():
    schedule = Schedule.linear(20, 0.01, 0.35)
    var = {}
    for variance in ("fixed_large", "fixed_small"):
        var[variance] = 1.0
        for a, _, sigma in linear_chain(schedule, Gaussian(schedule, 0.3, 0.4), variance, False):
            var[variance] = a * a * var[variance] + sigma**2
    assert var["fixed_large"] > 1.05 * var["fixed_small"]


def test_a_thousand_steps_arrive_at_the_data():
    x = draw(
        7, Gaussian(Schedule.linear(), 0.2, 0.3), shape=(3, 32, 32), diffusion=Diffusion()
    ).double()
    n = x.numel()
    # With the paper's 1000 steps, L_T and the discretisation move the moments by less than 2 %.
    assert abs(x.mean() - 0.2) < 4 * 0.3 / n**0.5 + 0.005
    assert abs(x.std() / 0.3 - 1) < 4 * (0.5 / n) ** 0.5 + 0.02


@pytest.mark.parametrize("schedule", [SCHEDULE, Schedule.linear()])
def test_ddim_without_noise_transports_each_sample_by_its_recursion(schedule):
    model = Gaussian(schedule, 0.3, 0.4)
    x = draw(4, model, diffusion=Diffusion(schedule), sampler="ddim", clip=False, seed=3)
    expected = ops.randn((4, *SHAPE), seed=3, step=schedule.T).double().numpy()
    for a, b, _ in linear_chain(schedule, model, "fixed_large", ddim=True):
        expected = a * expected + b
    np.testing.assert_allclose(x.numpy(), expected, atol=2e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_draws_the_same_samples(prediction):
    diffusion = Diffusion(SCHEDULE, prediction)
    eps_model = Gaussian(SCHEDULE, 0.3, 0.4)

    def model(x, t):
        eps = eps_model(x, t)
        x0 = DIFFUSION.predict_x0(x, eps, t, clip=False)
        ab = torch.tensor(SCHEDULE.alphas_cumprod, dtype=torch.float32)[t][:, None, None, None]
        return {
            "eps": eps, "x0": x0, "mean": DIFFUSION.q_posterior(x0, x, t)[0],
            "v": ab.sqrt() * eps - (1 - ab).sqrt() * x0,
        }[prediction]  # fmt: skip

    for sampler in ("ddpm", "ddim"):
        options = {"sampler": sampler, "clip": False, "seed": 5}
        torch.testing.assert_close(
            draw(3, model, diffusion=diffusion, **options),
            draw(3, eps_model, **options),
            atol=2e-4,
            rtol=0,
        )


# ---- one seed, one set ---------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("batch_size", [1, 3, 7, 64])
def test_samples_do_not_depend_on_the_batch(sampler, batch_size):
    whole = draw(7, sampler=sampler)
    assert torch.equal(draw(7, sampler=sampler, batch_size=batch_size), whole)
    parts = [
        draw(n, sampler=sampler, first_index=first, batch_size=batch_size)
        for n, first in ((2, 0), (4, 2), (1, 6))
    ]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(whole[0], whole[1])


def test_samples_of_a_unet_do_not_depend_on_the_batch():
    model = tiny_unet()
    options = {"progress": False, "precision": "fp32"}
    whole = fastddpm.sample(model, 5, **options)
    assert whole.shape == (5, 1, 8, 8)
    apart = torch.cat(
        [fastddpm.sample(model, 2, batch_size=1, **options),
         fastddpm.sample(model, 3, first_index=2, **options)]
    )  # fmt: skip
    torch.testing.assert_close(apart, whole, atol=1e-4, rtol=0)


def test_a_large_first_index_is_the_sample_of_that_number():
    first = 2**40 + 3
    recorder = Recorder()
    draw(2, recorder, first_index=first)
    expected = ops.randn((2, *SHAPE), seed=0, step=T, first_index=first)
    assert torch.equal(recorder.seen[T - 1], expected)


@pytest.mark.parametrize(
    "options",
    [{}, {"sampler": "ddim"}, {"sampler": "ddim", "eta": 0.5}, {"steps": 4}, {"clip": False}],
)
def test_every_sampler_and_length_starts_from_the_same_x_T(options):
    recorder = Recorder()
    draw(3, recorder, seed=8, **options)
    assert torch.equal(recorder.seen[T - 1], ops.randn((3, *SHAPE), seed=8, step=T))


def test_seeds_differ_and_repeat():
    assert torch.equal(draw(seed=1), draw(seed=1))
    assert not torch.isclose(draw(seed=1), draw(seed=2)).all()


def test_the_global_random_state_has_no_say_and_is_left_alone():
    before = torch.get_rng_state()
    a = draw()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(draw(), a)


def test_all_steps_are_the_default():
    assert torch.equal(draw(steps=T), draw())
    assert not torch.equal(draw(steps=T - 1), draw())


def test_ddim_with_eta_1_and_all_steps_is_ddpm_with_the_posterior_variance():
    ddpm = draw(diffusion=Diffusion(SCHEDULE, variance="fixed_small"), clip=False)
    ddim = draw(sampler="ddim", eta=1.0, clip=False)
    torch.testing.assert_close(ddim, ddpm, atol=1e-4, rtol=0)
    assert not torch.allclose(draw(sampler="ddim", eta=0.9, clip=False), ddpm, atol=1e-2)


def test_a_shorter_chain_shows_the_model_its_own_steps():
    recorder = Recorder()
    draw(2, recorder, steps=5)
    assert list(recorder.seen) == [11, 8, 6, 3, 0]


def test_algorithm_2_line_by_line():
    x = ops.randn((3, *SHAPE), seed=4, step=T)
    index = torch.arange(3)
    c = SCHEDULE.columns("fixed_large")
    for t in reversed(range(T)):
        eps = wave(x, torch.full((3,), t))
        x0 = (c["inv_sqrt_ab"][t] * x - c["sqrt_inv_ab_m1"][t] * eps).clamp(-1, 1)
        z = ops.randn(x.shape, seed=4, step=t, sample_index=index)
        x = c["mean_x0"][t] * x0 + c["mean_xt"][t] * x + (c["sigma"][t] * z if t else 0)
    torch.testing.assert_close(draw(3, seed=4), x.float(), atol=1e-4, rtol=0)


def test_clipped_samples_lie_in_range_and_clipping_can_be_left_out():
    wild = lambda x, t: -3 * torch.ones_like(x)  # noqa: E731
    assert draw(model=wild).abs().max() <= 1
    assert draw(model=wild, clip=False).abs().max() > 2


# ---- models --------------------------------------------------------------------------------------


def test_outputs_with_a_sample_attribute_are_taken():
    assert torch.equal(draw(model=lambda x, t: SimpleNamespace(sample=wave(x, t))), draw())


def test_a_learned_variance_is_used():
    diffusion = Diffusion(SCHEDULE, variance="learned", loss="vlb")
    log_variance = torch.from_numpy(SCHEDULE.posterior_log_variance).float()

    def model(x, t, shift=0.0):
        variance = (log_variance[t] + shift)[:, None, None, None].expand_as(x)
        return torch.cat((wave(x, t), variance), dim=1)

    expected = draw(diffusion=Diffusion(SCHEDULE, variance="fixed_small"))
    torch.testing.assert_close(draw(model=model, diffusion=diffusion), expected, atol=1e-4, rtol=0)
    other = draw(model=lambda x, t: model(x, t, 1.0), diffusion=diffusion)
    assert not torch.allclose(other, expected, atol=1e-2)


@pytest.mark.parametrize("training", [True, False])
def test_a_module_is_evaluated_and_left_in_the_mode_of_each_part(training):
    model = tiny_unet(dropout=0.5).train(training)
    model.mid.eval()
    modes = [m.training for m in model.modules()]
    weights = copy.deepcopy(model.state_dict())
    for precision in ("fp32", "bf16"):
        options = {"progress": False, "precision": precision}
        a, b = (fastddpm.sample(model, 2, **options) for _ in range(2))
        assert torch.equal(a, b), "dropout is on"
        assert [m.training for m in model.modules()] == modes
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])
        assert value.dtype == weights[name].dtype
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_module_is_left_in_its_mode_when_it_raises():
    class Broken(torch.nn.Linear):
        def forward(self, x, t):
            raise RuntimeError("broken")

    model = Broken(2, 2)
    with pytest.raises(RuntimeError, match="broken"):
        draw(model=model)
    assert model.training


def test_no_graph_is_kept():
    model = tiny_unet()
    options = {"progress": False, "precision": "fp32"}
    samples, x0, _ = fastddpm.sample_progressive(model, 2, frames=3, **options)
    shared = fastddpm.sample_shared_latent(model, 2, t=(5,), **options)
    a, b = images(2, 1, 8, 8)
    mixed = fastddpm.interpolate(model, a, b, n=2, t=3, **options)
    for result in (samples, x0, shared, mixed):
        assert not result.requires_grad


def test_bf16_is_close_to_fp32():
    model = tiny_unet()
    fp32, bf16 = (
        fastddpm.sample(model, 4, precision=precision, progress=False)
        for precision in ("fp32", "bf16")
    )
    assert bf16.dtype == torch.float32
    difference = (fp32 - bf16).abs()
    assert 0 < difference.mean() < 0.004
    assert difference.max() < 0.05


def test_a_bf16_module_that_is_no_unet_runs_under_autocast():
    seen = []

    class Convolution(torch.nn.Conv2d):
        def forward(self, x, t):
            y = super().forward(x)
            seen.append(y.dtype)
            return y

    model = Convolution(2, 2, 3, padding=1)
    assert draw(model=model, precision="bf16").dtype == torch.float32
    assert set(seen) == {torch.bfloat16}
    seen.clear()
    draw(model=model, precision="auto")
    assert set(seen) == {torch.float32}


def test_the_models_own_diffusion_and_shape_are_the_default():
    model = tiny_unet(image_size=(8, 4), diffusion=Diffusion(SCHEDULE, variance="fixed_small"))
    a = fastddpm.sample(model, 2, progress=False, precision="fp32")
    b = fastddpm.sample(
        lambda x, t: model(x, t), 2, shape=(1, 8, 4), diffusion=model.diffusion, progress=False
    )
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


# ---- progressive ---------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(
    ("steps", "frames", "times"),
    [(None, 4, [11, 7, 4, 0]), (5, 9, [11, 8, 6, 3, 0]), (4, 1, [11])],
)
def test_progressive_frames_are_the_x0_predictions_at_the_stated_times(
    steps, frames, times, clip, monkeypatch
):
    monkeypatch.setitem(batching.MOST, "cpu", 2)  # five samples in three batches
    options = {"shape": SHAPE, "diffusion": DIFFUSION, "seed": 2, "progress": False, "clip": clip}
    samples, x0, at = fastddpm.sample_progressive(
        wave, 5, frames=frames, steps=steps, first_index=1, **options
    )
    assert at == times
    assert torch.equal(samples, draw(5, steps=steps, seed=2, first_index=1, clip=clip))
    recorder = Recorder()
    draw(5, recorder, steps=steps, seed=2, first_index=1, clip=clip, batch_size=5)
    assert x0.shape == (len(times), 5, *SHAPE)
    for k, t in enumerate(times):
        xt, ab = recorder.seen[t], SCHEDULE.alphas_cumprod[t]
        expected = (xt - (1 - ab) ** 0.5 * wave(xt, torch.full((5,), t))) / ab**0.5
        expected = expected.clamp(-1, 1) if clip else expected
        torch.testing.assert_close(x0[k], expected, atol=1e-5, rtol=1e-5)


def test_the_last_prediction_is_the_sample():
    samples, x0, times = fastddpm.sample_progressive(
        wave, 2, frames=3, shape=SHAPE, diffusion=DIFFUSION, progress=False
    )
    assert times[-1] == 0
    torch.testing.assert_close(x0[-1], samples, atol=1e-6, rtol=0)


# ---- shared latents ------------------------------------------------------------------------------


def test_shared_latents():
    options = {"shape": SHAPE, "diffusion": DIFFUSION, "seed": 6, "progress": False}
    rows = fastddpm.sample_shared_latent(wave, 4, t=(3, T, 7), first_index=5, **options)
    assert rows.shape == (3, 4, *SHAPE)
    plain = draw(1, seed=6, first_index=5)[0]
    for row in rows:  # the first draw follows the plain sample
        assert torch.equal(row[0], plain)
        assert len({tuple(x.flatten().tolist()) for x in row}) == 4
    # The rest of each row by hand: x_t of sample 5, then everyone's own noise.
    recorder = Recorder()
    draw(1, recorder, seed=6, first_index=5)
    for row, level in zip(rows, (3, T, 7), strict=True):
        x = recorder.seen[level - 1].expand(4, -1, -1, -1)
        for t in reversed(range(level)):
            step = torch.full((4,), t)
            x = DIFFUSION.p_step(x, wave(x, step), step, seed=6, sample_index=torch.arange(5, 9))
        assert torch.equal(row, x)


def test_shared_latents_of_a_unet_follow_the_plain_sample():
    model = tiny_unet()
    options = {"seed": 1, "progress": False, "precision": "fp32"}
    rows = fastddpm.sample_shared_latent(model, 3, t=(T, 2), **options)
    plain = fastddpm.sample(model, 1, **options)[0]
    for row in rows:
        torch.testing.assert_close(row[0], plain, atol=1e-4, rtol=0)
    # A latent shared for longer leaves less room to differ.
    assert rows[1].std(0).mean() < rows[0].std(0).mean()


# ---- interpolation -------------------------------------------------------------------------------


def decode(xt: torch.Tensor, level: int, seed: int) -> torch.Tensor:
    """One latent down the chain with the noise that all mixtures share, sample 2's."""
    x, index = xt[None], torch.tensor([2])
    for t in reversed(range(level)):
        step = torch.tensor([t])
        x = DIFFUSION.p_step(x, wave(x, step), step, seed=seed, sample_index=index)
    return x[0]


@pytest.mark.parametrize("level", [1, 5, T])
def test_interpolation_mixes_the_latents(level):
    a, b = images(2, *SHAPE)
    mixed = fastddpm.interpolate(
        wave, a, b, n=5, t=level, seed=3, diffusion=DIFFUSION, progress=False
    )
    assert mixed.shape == (5, *SHAPE)
    ab = SCHEDULE.alphas_cumprod[level - 1]
    eps = ops.randn((2, *SHAPE), seed=3, step=level - 1)
    xt = ab**0.5 * reference.to_unit(torch.stack((a, b))) + (1 - ab) ** 0.5 * eps
    for k, weight in enumerate((0, 0.25, 0.5, 0.75, 1)):
        expected = decode((1 - weight) * xt[0] + weight * xt[1], level, seed=3)
        torch.testing.assert_close(mixed[k], expected, atol=1e-4, rtol=0)


def test_interpolation_without_steps_is_the_mixture_of_pixels():
    a, b = images(2, *SHAPE)
    mixed = fastddpm.interpolate(wave, a, b, n=3, t=0, diffusion=DIFFUSION, progress=False)
    unit = reference.to_unit(torch.stack((a, b)))
    torch.testing.assert_close(mixed[0], unit[0])
    torch.testing.assert_close(mixed[1], unit.mean(0), atol=1e-6, rtol=0)
    torch.testing.assert_close(mixed[2], unit[1])


def test_interpolation_at_several_steps_is_one_row_each():
    a, b = images(2, *SHAPE)
    options = {"n": 3, "diffusion": DIFFUSION, "progress": False, "seed": 1}
    rows = fastddpm.interpolate(wave, a, b, t=(0, 4, T), **options)
    assert rows.shape == (3, 3, *SHAPE)
    for row, level in zip(rows, (0, 4, T), strict=True):
        assert torch.equal(row, fastddpm.interpolate(wave, a, b, t=level, **options))


def test_interpolation_takes_floats_in_range():
    a, b = images(2, *SHAPE)
    options = {"n": 2, "t": 3, "diffusion": DIFFUSION, "progress": False}
    floats = (reference.to_unit(x) for x in (a, b))
    assert torch.equal(
        fastddpm.interpolate(wave, *floats, **options), fastddpm.interpolate(wave, a, b, **options)
    )


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n must be an integer of at least 1; got 0"),
        ({"n": -2}, "n must be"),
        ({"n": 2.5}, r"n must be .* got 2\.5"),
        ({"n": True}, "n must be"),
        ({"steps": 0}, "steps must be an integer in 1 .. 12; got 0"),
        ({"steps": T + 1}, "steps must be an integer in 1 .. 12; got 13"),
        ({"steps": 2.0}, "steps must be"),
        ({"sampler": "euler"}, "sampler must be one of 'ddpm', 'ddim'"),
        ({"engine": "warp"}, "engine must be one of .*'eager'.* got 'warp'"),
        ({"precision": "fp8"}, "precision must be one of 'auto', 'fp32', 'bf16'"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"first_index": -1}, "first_index must be"),
        ({"first_index": 0.5}, "first_index must be"),
        ({"first_index": 2**63}, "first_index must be"),
        ({"seed": -1}, "seed must be in 0"),
        ({"seed": 2**64}, "seed must be in 0"),
        ({"sampler": "ddim", "eta": -0.1}, "eta must be at least 0"),
        ({"sampler": "ddim", "eta": 5.0}, "eta = 5.0"),
        ({"sampler": "ddim", "eta": float("nan")}, "eta must be"),
        ({"shape": None}, r"shape=\(C, H, W\) is needed"),
        ({"shape": (3, 8)}, "shape must be"),
        ({"shape": (3, 8, 0)}, "shape must be"),
        ({"shape": (3, 8.0, 8)}, "shape must be"),
        ({"diffusion": SCHEDULE}, "diffusion must be a fastddpm.Diffusion; got Schedule"),
        ({"model": 3}, "model must be a callable .* got int"),
        *(({name: value}, f"{name} must be .*; got ")
          for name in ("n", "seed", "first_index", "batch_size", "steps", "shape")
          for value in (True, 1.5, np.float64(2), np.bool_(1), "3", torch.tensor(1.0), [1, "3"])),
        *(({"shape": shape}, "shape must be") for shape in (8, "3, 8", (3, True, 8), (3, 8, "8"))),
        *(({"n": n}, "n must be") for n in (2**63, 2**70)),
        *(({"clip": value}, "clip must be True or False") for value in ("no", 0.5, None)),
        *(({"sampler": "ddim", "eta": value}, "eta must be") for value in ("0.5", None, True, 1j)),
        *(({"device": value}, "device must be") for value in ("toaster", 1.5, "meta", "xpu:7")),
    ],
)  # fmt: skip
def test_bad_arguments_are_named_before_the_model_runs(options, message):
    def model(x, t):
        raise AssertionError("the model ran")

    with pytest.raises(ValueError, match=message):
        draw(**{"model": model, **options})


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda x, t: x[:, :1], r"shape \(5, 2, 3, 5\) here; got \(5, 1, 3, 5\)"),
        (lambda x, t: x.mean(), r"got \(\)"),
        (lambda x, t: torch.cat((x, x), 1), r"got \(5, 4, 3, 5\)"),
        (lambda x, t: (x,), "got tuple"),
        (lambda x, t: None, "got NoneType"),
    ],
)
def test_an_output_of_another_shape_is_refused(model, message):
    with pytest.raises(ValueError, match=f"the model must return .*{message}"):
        draw(model=model)


def test_a_unet_refuses_another_shape():
    with pytest.raises(ValueError, match="x must be"):
        fastddpm.sample(tiny_unet(), 1, shape=(3, 8, 8), progress=False)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_model_that_fails_at_one_step_is_told_of(bad):
    def model(x, t):
        y = wave(x, t)
        y[1] = torch.where(t[1] == 6, bad, y[1])
        return y

    with pytest.raises(FloatingPointError, match="1 of 5 images are not finite"):
        draw(model=model, clip=False)


def test_nan_is_not_clipped_away(backend, device):
    if device.type != "cpu":
        pytest.skip("the model of this test is on the CPU")
    with pytest.raises(FloatingPointError, match="5 of 5"):
        draw(model=lambda x, t: x * torch.where(t[0] == 6, float("nan"), 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"t": 0}, "t must be steps in 1 .. 12; got 0"),
        ({"t": (0,)}, r"t must be steps in 1 .. 12; got \(0,\)"),
        ({"t": (T + 1,)}, r"t must be steps in 1 .. 12; got \(13,\)"),
        ({"t": (5, 2.5)}, "t must be"),
        ({"t": ()}, "t must be"),
        ({"n": 0, "t": (3,)}, "n must be"),
        ({"first_index": -1, "t": (3,)}, "first_index must be"),
        ({"first_index": 1.5, "t": (3,)}, "first_index must be"),
    ],
)
def test_shared_latent_mistakes(options, message):
    arguments = {"shape": SHAPE, "diffusion": DIFFUSION, "progress": False, **options}
    with pytest.raises(ValueError, match=message):
        fastddpm.sample_shared_latent(wave, **{"n": 2, **arguments})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"t": -1}, "t must be steps in 0 .. 12; got -1"),
        ({"t": T + 1}, "t must be"),
        ({"t": (3, T + 1)}, "t must be"),
        ({"t": 2.5}, "t must be"),
        ({"t": ()}, "t must be"),
        ({"n": 0}, "n must be"),
        ({"b": torch.zeros(2, 3, 4)}, "a and b must be .* alike"),
        ({"b": torch.zeros(2, 3, 5, dtype=torch.int64)}, "a and b must be .*uint8 or float"),
    ],
)
def test_interpolate_mistakes(options, message):
    a, b = images(2, *SHAPE)
    options = {"a": a, "b": b, "t": 3, "diffusion": DIFFUSION, "progress": False, **options}
    with pytest.raises(ValueError, match=message):
        fastddpm.interpolate(wave, **options)


def test_progressive_mistakes():
    for options, message in (({"frames": 0}, "frames must be"), ({"n": 0}, "n must be")):
        with pytest.raises(ValueError, match=message):
            fastddpm.sample_progressive(wave, shape=SHAPE, progress=False, **options)


def test_numbers_of_numpy_are_numbers():
    plain = draw(n=3, seed=7, first_index=2, batch_size=2, steps=5)
    for number in (np.int64, np.int8, np.uint8, np.array, torch.tensor):
        count = number if number in (np.int64, np.int8, np.uint8) else int
        x = draw(
            n=count(3), seed=number(7), first_index=number(2), batch_size=count(2), steps=count(5),
            shape=[number(size) for size in SHAPE], clip=np.bool_(True), eta=np.float32(0),
        )  # fmt: skip
        assert torch.equal(x, plain)
    assert draw(n=np.uint8(200), first_index=np.uint8(100), steps=1).shape == (200, *SHAPE)
    for frames in (np.int64(2), np.uint8(2)):
        _, x0, _ = fastddpm.sample_progressive(
            wave, np.int8(2), frames=frames, shape=SHAPE, diffusion=DIFFUSION, progress=False
        )
        assert x0.shape == (2, 2, *SHAPE)
    options = {"shape": SHAPE, "diffusion": DIFFUSION, "progress": False}
    rows = fastddpm.sample_shared_latent(wave, 2, t=(3, 7), **options)
    for t in (np.array([3, 7]), torch.tensor([3, 7]), [np.int64(3), np.int8(7)]):
        assert torch.equal(fastddpm.sample_shared_latent(wave, np.int64(2), t=t, **options), rows)
    a, b = images(2, *SHAPE)
    mixed = fastddpm.interpolate(wave, a, b, n=2, t=5, **options)
    for t in (np.int64(5), np.array(5), torch.tensor(5)):
        assert torch.equal(fastddpm.interpolate(wave, a, b, n=np.int64(2), t=t, **options), mixed)


@pytest.mark.parametrize("t", [True, 2.0, "5", "500", [True], [2.5], np.array([1.0]), None, [], 0])
def test_levels_that_are_none_are_named(t):
    with pytest.raises(ValueError, match=r"t must be steps in 1 \.\. 12; got "):
        fastddpm.sample_shared_latent(
            wave, 1, t=t, shape=SHAPE, diffusion=DIFFUSION, progress=False
        )


def test_a_models_own_image_size_may_be_one_number():
    def model(size, channels=2):
        network = SimpleNamespace(in_channels=channels, image_size=size)
        return type("Network", (SimpleNamespace,), {"__call__": lambda self, x, t: wave(x, t)})(
            **vars(network)
        )

    options = {"diffusion": DIFFUSION, "progress": False}
    expected = draw(n=1, shape=(2, 8, 8))
    for size in (8, np.int64(8), (8, 8), [8, 8], torch.Size([8, 8]), np.array([8, 8])):
        assert torch.equal(fastddpm.sample(model(size), 1, **options), expected)
    for size in ("8", 8.0, (8,), (8, 8, 8), True, 0):
        with pytest.raises(ValueError, match=r"Network's \(in_channels, image_size\) must be"):
            fastddpm.sample(model(size), 1, **options)
    for network in (model(8, None), model(None), SimpleNamespace(image_size=8, __call__=wave)):
        network = network if callable(network) else wave
        with pytest.raises(ValueError, match=r"shape=\(C, H, W\) is needed"):
            fastddpm.sample(network, 1, **options)


@pytest.mark.parametrize(
    "image", [np.zeros((2, 3, 5), np.uint8), "A.png", None, torch.full(SHAPE, 128.0),
              torch.full(SHAPE, torch.nan)],
    ids=["array", "name", "none", "0 .. 255", "nan"],
)  # fmt: skip
def test_interpolate_names_what_is_no_image(image):
    for pair in ((image, image), (torch.zeros(SHAPE), image)):
        with pytest.raises(ValueError, match=r"^(a|b) must be "):
            fastddpm.interpolate(wave, *pair, diffusion=DIFFUSION, progress=False)


def test_model_and_device_have_to_agree():
    with pytest.raises(ValueError, match="move the model first"):
        fastddpm.sample(tiny_unet(), 1, device="meta", progress=False)


def test_the_progress_bar_counts_steps_and_can_be_silent(capsys):
    draw(2, progress=True)
    assert f"{T}/{T}" in capsys.readouterr().err
    draw(2, progress=False)
    assert capsys.readouterr().err == ""
