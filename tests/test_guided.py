"""What a caller puts between the network and the step, against a plain loop in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from loops import plain
from toy import PREDICTIONS, SCHEDULE, tiny_unet, wave

import fastddpm
from fastddpm import Diffusion, ops
from fastddpm.engine import choose
from fastddpm.engine.cpu_plan import CpuPlan
from fastddpm.engine.cuda_graph import CudaGraph
from fastddpm.engine.eager import Eager

T = SCHEDULE.T
SHAPE = (2, 3, 5)
DIFFUSION = Diffusion(SCHEDULE)
N = 3


def draw(model=wave, n=N, **options) -> torch.Tensor:
    defaults = {"shape": SHAPE, "diffusion": DIFFUSION, "progress": False, "seed": 4}
    return fastddpm.sample(model, n, **{**defaults, **options})


def looped(model=wave, **options) -> torch.Tensor:
    """The same set by the plain loop, with the same noise."""
    schedule = options.pop("schedule", SCHEDULE)

    def z(i):
        return ops.randn((N, *SHAPE), seed=4, step=int(schedule.timesteps[i]))

    x = ops.randn((N, *SHAPE), seed=4, step=T)
    return plain(model, x, z, schedule=schedule, **options).float()


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def shrunk(x0):
    return 0.9 * x0.clamp(-3, 3) + 0.05


def toward(x, t, **_):
    """The gradient of a Gaussian's log density, as a classifier's caller would write it."""
    with torch.enable_grad():
        at = x.detach().requires_grad_(True)
        log_p = -(at - 0.3).square().sum() * (1 + t[0] / 10)
        return torch.autograd.grad(log_p, at)[0]


def seeing(x, t, x0):
    return torch.sin(2 * x + x0 + t[:, None, None, None])


@pytest.mark.parametrize(
    ("options", "hooks"),
    [
        *itertools.product(
            ({}, {"clip": False}, {"variance": "fixed_small"}, {"eta": 0.0}, {"eta": 0.7},
             {"steps": 5}, {"steps": 5, "eta": 0.5}),
            ({"denoised_fn": shrunk}, {"cond_fn": toward},
             {"denoised_fn": shrunk, "cond_fn": toward}),
        ),
        *(({"clip": clip}, {"self_condition": True}) for clip in (True, False)),
        ({}, {"self_condition": True, "denoised_fn": shrunk, "cond_fn": toward}),
        ({"eta": 0.5, "steps": 5}, {"self_condition": True, "cond_fn": toward}),
    ],
    ids=str,
)  # fmt: skip
def test_hooks_do_what_the_published_loops_do(options, hooks):
    steps, eta = options.get("steps"), options.get("eta")
    variance, clip = options.get("variance", "fixed_large"), options.get("clip", True)
    model = seeing if hooks.get("self_condition") else wave
    sampler = {} if eta is None else {"sampler": "ddim", "eta": eta}
    of = {"diffusion": Diffusion(SCHEDULE, variance=variance), "clip": clip, "steps": steps}
    got = draw(model, **of, **sampler, **hooks)
    schedule = SCHEDULE if steps is None else SCHEDULE.respace(steps)
    expected = looped(model, schedule=schedule, clip=clip, variance=variance, eta=eta, **hooks)
    close(got, expected, 1e-4 if clip else 2e-3)
    assert (got - draw(**of, **sampler)).abs().mean() > 0.01


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("steps", [None, 5])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_denoised_fn_is_of_every_prediction(prediction, steps, sampler):
    """The same network said in other words draws the same samples."""
    diffusion = Diffusion(SCHEDULE, prediction)

    def model(x, t):
        eps = wave(x, t)
        x0 = DIFFUSION.predict_x0(x, eps, t, clip=False)
        ab = torch.tensor(SCHEDULE.alphas_cumprod, dtype=torch.float32)[t][:, None, None, None]
        v = ab.sqrt() * eps - (1 - ab).sqrt() * x0
        mean = DIFFUSION.q_posterior(x0, x, t)[0]
        return {"eps": eps, "x0": x0, "mean": mean, "v": v}[prediction]

    options = {"sampler": sampler, "steps": steps, "clip": False, "denoised_fn": shrunk}
    close(draw(model, diffusion=diffusion, **options), draw(**options), 1e-3)


@pytest.mark.parametrize("variance", ["fixed_large", "learned", "learned_range"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_denoised_fn_that_does_nothing_does_nothing(prediction, variance):
    learned = variance != "fixed_large"
    diffusion = Diffusion(SCHEDULE, prediction, variance, "vlb" if learned else "simple")

    def model(x, t):
        output = torch.tanh(wave(x, t))
        return torch.cat((output, output / 10 - 3), dim=1) if learned else output

    for options in ({}, {"steps": 5}, {"sampler": "ddim", "eta": 0.5}):
        same = draw(model, diffusion=diffusion, denoised_fn=lambda x0: x0, **options)
        close(same, draw(model, diffusion=diffusion, **options), 2e-4)


def test_a_learned_variance_scales_the_gradient():
    """A model that says beta-tilde is guided as one whose variance is beta-tilde."""
    log_variance = torch.from_numpy(SCHEDULE.posterior_log_variance).float()

    def model(x, t):
        return torch.cat((wave(x, t), log_variance[t][:, None, None, None].expand_as(x)), dim=1)

    # Not in the last step, where what the model says is log beta-tilde of the one before.
    only = {"cond_fn": lambda x, t: toward(x, t) * (t[0] > 0)}
    got = draw(model, diffusion=Diffusion(SCHEDULE, variance="learned", loss="vlb"), **only)
    close(got, draw(diffusion=Diffusion(SCHEDULE, variance="fixed_small"), **only))


def test_the_range_of_a_learned_variance_scales_the_gradient():
    """A model that says log beta is guided as one whose variance is beta."""

    def model(x, t):
        return torch.cat((wave(x, t), torch.ones_like(x)), dim=1)

    only = {"cond_fn": lambda x, t: toward(x, t) * (t[0] > 0)}
    learned = Diffusion(SCHEDULE, variance="learned_range", loss="vlb")
    close(draw(model, diffusion=learned, **only), draw(**only), 2e-4)


def test_a_classifier_is_asked_at_the_time_that_the_model_is_asked_at():
    seen = []

    def model(x, t):
        seen.append(t)
        return torch.sin(3 * x)

    def cond_fn(x, t):
        assert t.dtype == torch.float32
        assert torch.equal(t, seen[-1])
        return torch.zeros_like(x)

    draw(model, diffusion=Diffusion(SCHEDULE, rescale_timesteps=True), steps=5, cond_fn=cond_fn)
    assert len(seen) == 5


def test_hooks_see_the_models_own_steps_and_arguments():
    seen = []

    def cond_fn(x, t, y, scale):
        seen.append((int(t[0]), y.tolist(), scale))
        x.add_(100)  # its own copy
        return torch.zeros_like(x)

    def model(x, t, y, scale):
        return wave(x, t)

    kwargs = {"y": torch.tensor([3, 1, 2]), "scale": 2.5}
    got = draw(model, steps=5, cond_fn=cond_fn, model_kwargs=kwargs, batch_size=2)
    assert seen == [(t, y, 2.5) for y in ([3, 1], [2]) for t in (11, 8, 6, 3, 0)]
    close(got, draw(steps=5), 1e-5)


def test_the_first_prediction_that_is_seen_is_zero_and_starts_anew_with_each_batch():
    firsts = []

    def model(x, t, x0):
        if int(t[0]) == T - 1:
            firsts.append(x0.abs().max().item())
        return seeing(x, t, x0)

    apart = draw(model, self_condition=True, batch_size=1)
    assert firsts == [0.0] * N
    assert torch.equal(apart, draw(model, self_condition=True))


def test_a_prediction_that_is_written_to_is_not_what_the_network_sees():
    """An x0 that is the network's output as it is, unclipped."""
    options = {"diffusion": Diffusion(SCHEDULE, "x0"), "clip": False, "self_condition": True}
    expected = draw(seeing, **options)
    assert torch.equal(draw(seeing, on_step=lambda i, x, x0: x0().zero_(), **options), expected)


def test_hooks_work_in_a_unets_plan_and_with_its_frames():
    """The plan's network, eager's step."""
    model = tiny_unet()
    options = {"precision": "fp32", "progress": False, "denoised_fn": shrunk, "cond_fn": toward}
    eager = fastddpm.sample(model, 2, engine="eager", **options)
    close(fastddpm.sample(model, 2, engine="cpu_plan", **options), eager)
    samples, x0, times = fastddpm.sample_progressive(model, 2, frames=3, **options)
    close(samples, eager)
    assert (x0.shape[0], times) == (3, [11, 6, 0])
    assert x0.abs().max() <= 1


def test_a_hook_may_not_be_silently_wrong():
    wrong = {
        r"a tensor of shape \(3, 2, 3, 5\) here; got \(2, 3, 5\)": lambda x, *_: x[0],
        "got NoneType": lambda *_: None,
        "real numbers": lambda x, *_: x + 1j,
    }
    for message, function in wrong.items():
        for name in ("denoised_fn", "cond_fn"):
            with pytest.raises(ValueError, match=f"{name} must return .*{message}"):
                draw(**{name: function})
    for name in ("denoised_fn", "cond_fn"):
        with pytest.raises(FloatingPointError, match=f"{name} returned NaN or inf .* step 11"):
            draw(**{name: lambda x, *_: x / 0})


def test_a_recorded_step_can_not_be_guided_and_says_so():
    gpu = torch.device("cuda")
    for engine, model in (("cuda_graph", wave), ("cuda_graph", tiny_unet())):
        for guided in ("cond_fn", "generator"):
            with pytest.raises(ValueError, match=f"engine '{engine}' can't run here: {guided} is"):
                choose(engine, model, gpu, "fp32", (guided,))
    with pytest.raises(ValueError, match="engine 'cuda_plan' can't run here: denoised_fn is"):
        choose("cuda_plan", tiny_unet(), gpu, "fp32", ("denoised_fn",))
    with pytest.raises(ValueError, match="'cuda_graph' can't run here: it passes no context"):
        choose("cuda_graph", wave, gpu, "fp32", (), ("y", "context"))
    assert choose("auto", tiny_unet(), torch.device("cpu"), "fp32", ("cond_fn",))[0] is CpuPlan
    assert choose("auto", wave, torch.device("cpu"), "fp32", ("cond_fn",), ("y", "z"))[0] is Eager
    assert issubclass(choose("cuda_graph", wave, gpu, "fp32", (), ("y",))[0], CudaGraph)
    assert choose("auto", tiny_unet(), gpu, "fp32", ("generator",))[0] is Eager
