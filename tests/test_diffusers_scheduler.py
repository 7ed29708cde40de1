"""Our DDPMScheduler: diffusers' cases for a scheduler, its numbers against theirs and float64."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import logging
import pickle
import sys

import numpy as np
import pytest
import torch
from toy import generator, tiny_unet

diffusers = pytest.importorskip("diffusers")

from fastddpm import Diffusion, Schedule, ops  # noqa: E402
from fastddpm.integrations.diffusers import (  # noqa: E402
    DDPMScheduler,
    PipelineUNet,
    to_diffusers,
)
from fastddpm.integrations.schedulers import process  # noqa: E402

Theirs = diffusers.DDPMScheduler
CONFIG = {
    "num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear",
    "variance_type": "fixed_small", "clip_sample": True,
}  # fmt: skip
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid")
X, E, S = (torch.randn(2, 3, 8, 8, generator=generator(seed)) for seed in (1, 2, 3))


def pair(**options):
    """(theirs, ours in their arithmetic)."""
    return Theirs(**options), DDPMScheduler(**options, exact_tables=False)


def output_for(variance: str, e=E) -> torch.Tensor:
    """A model's output, with a second half where the variance is learned."""
    spread = {"learned": S.abs(), "learned_range": S.tanh()}.get(variance)
    return e if spread is None else torch.cat((e, spread.to(e.dtype)), dim=1)


def assert_same_step(theirs, ours, t, output, x=X, rtol=1e-6, atol=2e-6):
    a = theirs.step(output, t, x, generator=generator(7))
    b = ours.step(output, t, x, generator=generator(7))
    assert (b[0].dtype, b[1].dtype) == (a[0].dtype, a[1].dtype)
    torch.testing.assert_close(b[0], a[0], rtol=rtol, atol=atol)
    amplified = max(1.0, float(theirs.alphas_cumprod[t]) ** -0.5) if t < 999 else 2e2
    torch.testing.assert_close(b[1], a[1], rtol=rtol, atol=atol * amplified)


# ---- diffusers' own cases ------------------------------------------------------------------------


def deterministic_sample(values: torch.Tensor | None = None) -> torch.Tensor:
    count = 4 * 3 * 8 * 8
    values = torch.arange(count) if values is None else values
    return (values.reshape(3, 8, 8, 4) / count).permute(3, 0, 1, 2)


def shrink(x: torch.Tensor, t) -> torch.Tensor:
    """Their stand-in for a model."""
    return x * t / (t + 1)


def loop(scheduler, start: int | None = None) -> tuple[float, float]:
    """(sum, mean) of |x_0| after a chain from the deterministic sample, or from it noised to the
    timestep at index `start`.
    """
    x, random = deterministic_sample(), torch.manual_seed(0)
    steps = list(reversed(range(len(scheduler))))
    if start is not None:
        steps = scheduler.timesteps[start:]
        noise = deterministic_sample(torch.arange(x.numel()).flip(-1))
        x = scheduler.add_noise(x, noise, steps[:1])
    for t in steps:
        x = scheduler.step(shrink(x, t), t, x, generator=random).prev_sample
    return x.abs().sum().item(), x.abs().mean().item()


@pytest.mark.parametrize(
    ("options", "total", "mean"),
    [
        ({}, 258.9606, 0.3372),
        ({"prediction_type": "v_prediction"}, 202.0296, 0.2631),
    ],
)
@pytest.mark.parametrize("exact_tables", [True, False])
def test_full_loop(options, total, mean, exact_tables):
    found = loop(DDPMScheduler(**CONFIG, **options, exact_tables=exact_tables))
    assert found == (pytest.approx(total, abs=1e-2), pytest.approx(mean, abs=1e-3))


@pytest.mark.parametrize(
    ("exact_tables", "total"),
    [(False, 387.9466), (True, 387.9672)],  # float32's 1 - abar_1, and float64's
)
def test_full_loop_from_a_noised_sample(exact_tables, total):
    found = loop(DDPMScheduler(**CONFIG, exact_tables=exact_tables), start=998)
    assert found == (pytest.approx(total, abs=2e-3), pytest.approx(0.5051, abs=1e-3))


def check_saved(tmp_path, t=0, **options):
    """A scheduler that was saved and read steps as the one that was saved."""
    ours = DDPMScheduler(**{**CONFIG, **options})
    ours.save_config(tmp_path)
    read = DDPMScheduler.from_pretrained(tmp_path)
    x = torch.rand(4, 3, 8, 8, generator=generator(3))
    a, b = (s.step(0.1 * x, t, x, generator=torch.manual_seed(0)) for s in (ours, read))
    assert torch.equal(a.prev_sample, b.prev_sample)
    assert a.prev_sample.shape == x.shape


@pytest.mark.parametrize(
    "options",
    [
        *({"num_train_timesteps": T} for T in (1, 5, 100, 1000)),
        *(
            {"beta_start": start, "beta_end": end}
            for start, end in ((1e-4, 2e-3), (1e-3, 0.02), (0.01, 0.2), (0.1, 2))
        ),
        *({"beta_schedule": name} for name in SCHEDULES),
        *({"variance_type": name} for name in ("fixed_small", "fixed_large", "other")),
        *({"clip_sample": clip} for clip in (True, False)),
        {"thresholding": False},
        *(
            {"thresholding": True, "prediction_type": name, "sample_max_value": most}
            for name in PREDICTIONS
            for most in (0.5, 1.0, 2.0)
        ),
        *({"prediction_type": name} for name in PREDICTIONS),
        {"rescale_betas_zero_snr": True},
        {"exact_tables": False},
    ],
    ids=str,
)
def test_every_config_can_be_saved(options, tmp_path):
    check_saved(tmp_path, **options)


@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_every_timestep(t, tmp_path):
    check_saved(tmp_path, t)


def test_variance():
    ours = DDPMScheduler(**CONFIG)
    for t, variance in ((0, 0.0), (487, 0.00979), (999, 0.02)):
        assert abs(ours._get_variance(t) - variance) < 1e-5


@pytest.mark.parametrize("kind", [*VARIANCES, "fixed_large_log"])
@pytest.mark.parametrize("t", [0, 1, 500])
def test_variances_are_theirs(kind, t):
    theirs, ours = pair()
    a, b = (s._get_variance(t, S, kind) for s in (theirs, ours))
    torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


def test_custom_timesteps():
    ours = DDPMScheduler(**CONFIG)
    chain = [100, 87, 50, 1, 0]
    ours.set_timesteps(timesteps=chain)
    for t, after in zip(ours.timesteps, [*chain[1:], -1], strict=True):
        assert ours.previous_timestep(t).item() == after
    assert DDPMScheduler().previous_timestep(5) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timesteps": [100, 87, 50, 51, 0]}, "timesteps must be in descending order"),
        ({"timesteps": [100, 100]}, "timesteps must be in descending order"),
        ({"timesteps": []}, "descending order, at least one; got"),
        ({"timesteps": [1000]}, r"timesteps must be in 0 .. 999, num_train_timesteps being 1000"),
        ({"timesteps": [5, -1]}, r"timesteps must be in 0 .. 999"),
        ({"timesteps": [5.5, 1]}, r"timesteps must be a list of integers; got \[5.5, 1\]"),
        ({"timesteps": [5, 1], "num_inference_steps": 2}, "got both"),
        ({}, "give one of num_inference_steps and timesteps; got neither"),
        ({"num_inference_steps": 1001}, r"num_inference_steps must be an integer in 1 .. 1000"),
        ({"num_inference_steps": 0}, r"num_inference_steps must be an integer in 1 .. 1000"),
    ],
)
def test_timesteps_that_can_not_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        DDPMScheduler().set_timesteps(**arguments)


def test_compatibles():
    """Through the config of every class it is compatible with, ours comes back unchanged."""
    ours = DDPMScheduler(**CONFIG)
    names = {kind.__name__ for kind in ours.compatibles}
    assert {"DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"} < names
    for kind in ours.compatibles:
        if "requires_backends" in inspect.getsource(kind.from_config):
            continue  # a placeholder: what it needs is not installed
        other = kind.from_config(ours.config)
        back = DDPMScheduler.from_config(other.config)
        assert {k: v for k, v in back.config.items() if k in ours.config} == dict(ours.config)
        options = set(inspect.signature(DDPMScheduler.__init__).parameters)
        assert not (back.config.keys() - ours.config.keys()) & options


def test_saved_and_read_config(tmp_path):
    ours = DDPMScheduler(**CONFIG)
    ours.save_pretrained(tmp_path)
    config = dict(ours.config)
    del config["_use_default_values"]
    assert config == DDPMScheduler.from_pretrained(tmp_path).config


def test_trained_betas(tmp_path):
    ours = DDPMScheduler(**CONFIG, trained_betas=np.array([0.1, 0.3]))
    ours.save_pretrained(tmp_path)
    assert DDPMScheduler.from_pretrained(tmp_path).betas.tolist() == ours.betas.tolist()
    assert_same_step(*pair(trained_betas=[0.1, 0.3]), 1, E)
    with pytest.raises(ValueError, match="no step from t = 2"):
        ours.step(E, 2, X)
    for bad in ([], [[0.1]], [0.1, float("nan")], "0.1"):
        with pytest.raises(ValueError, match="trained_betas must be a list of"):
            DDPMScheduler(trained_betas=bad)


def test_tuple_and_output_are_equal():
    ours = DDPMScheduler(**CONFIG)
    ours.set_timesteps(50)
    output = ours.step(E, 0, X, generator=torch.manual_seed(0))
    values = ours.step(E, 0, X, generator=torch.manual_seed(0), return_dict=False)
    assert isinstance(values, tuple)
    assert isinstance(output, diffusers.schedulers.scheduling_ddpm.DDPMSchedulerOutput)
    for a, b in zip(values, output.values(), strict=True):
        assert torch.equal(a, b)


def test_public_names():
    ours = DDPMScheduler(**CONFIG)
    x = torch.rand(4, 3, 8, 8)
    assert (ours.init_noise_sigma, ours.order, len(ours), ours.one) == (1.0, 1, 1000, 1.0)
    assert ours.scale_model_input(x, 0.0) is x
    assert (ours.timesteps[0], ours.timesteps[-1], ours.num_inference_steps) == (999, 0, None)
    assert inspect.signature(ours.step) == inspect.signature(Theirs().step).replace(
        parameters=inspect.signature(ours.step).parameters.values(),
        return_annotation=inspect.signature(ours.step).return_annotation,
    )
    assert list(inspect.signature(ours.step).parameters) == [
        "model_output", "timestep", "sample", "generator", "return_dict",
    ]  # fmt: skip
    assert not ours._deprecated_kwargs
    assert "kwargs" not in inspect.signature(DDPMScheduler.__init__).parameters
    theirs = Theirs()
    for name in ("betas", "alphas", "alphas_cumprod", "timesteps"):
        a, b = getattr(theirs, name), getattr(ours, name)
        torch.testing.assert_close(b, a, rtol=2e-6, atol=0)


def test_attributes_of_the_config():
    ours = DDPMScheduler(**CONFIG)
    ours.dummy_attribute = 5
    ours.register_to_config(test_attribute=5)
    assert ours.dummy_attribute == 5
    with pytest.warns(FutureWarning):
        assert ours.test_attribute == 5
    with pytest.raises(AttributeError) as error:
        _ = ours.does_not_exist
    assert str(error.value) == "'DDPMScheduler' object has no attribute 'does_not_exist'"


# ---- steps against theirs, and against float64 ---------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize(
    "clip",
    [
        {},
        {"clip_sample_range": 0.5},
        {"clip_sample_range": 3.0},
        {"clip_sample": False},
        {"thresholding": True, "sample_max_value": 2.0, "dynamic_thresholding_ratio": 0.9},
    ],
    ids=str,
)
def test_steps_are_theirs(prediction, variance, clip):
    """With their tables, every step of full and shorter chains, noise included."""
    theirs, ours = pair(prediction_type=prediction, variance_type=variance, **clip)
    output = output_for(variance)
    for t in (999, 500, 1, 0):
        assert_same_step(theirs, ours, t, output)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(7)
    for t in ours.timesteps:
        assert_same_step(theirs, ours, t, output)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_schedules_are_theirs(schedule, zero_snr):
    options = {"beta_schedule": schedule, "rescale_betas_zero_snr": zero_snr}
    theirs, ours = pair(**options)
    assert torch.equal(theirs.alphas_cumprod, ours.alphas_cumprod)
    torch.testing.assert_close(DDPMScheduler(**options).alphas_cumprod, theirs.alphas_cumprod)
    for prediction in PREDICTIONS:
        theirs, ours = pair(**options, prediction_type=prediction)
        for t in (999, 998, 500, 1, 0):
            assert_same_step(theirs, ours, t, E, rtol=1e-5)


def expected_step(ours, t, after, x, output, z, variance):
    """A step by the formulas in float64, from the betas of the config."""
    c = ours.config
    betas = np.linspace(c.beta_start, c.beta_end, c.num_train_timesteps)
    ab = np.append(np.cumprod(1 - betas), 1.0)  # index -1 is the end
    x, output, z = (v.double() for v in (x, output, z))
    output, spread = output[:, :3], output[:, 3:]
    if c.prediction_type == "epsilon":
        x0 = (x - (1 - ab[t]) ** 0.5 * output) / ab[t] ** 0.5
    elif c.prediction_type == "sample":
        x0 = output
    else:
        x0 = ab[t] ** 0.5 * x - (1 - ab[t]) ** 0.5 * output
    if c.clip_sample:
        x0 = x0.clamp(-c.clip_sample_range, c.clip_sample_range)
    beta = 1 - ab[t] / ab[after]
    small = max((1 - ab[after]) / (1 - ab[t]) * beta, 1e-20)
    mean = ab[after] ** 0.5 * beta * x0 + (1 - beta) ** 0.5 * (1 - ab[after]) * x
    sigma = {
        "fixed_small": small**0.5, "fixed_small_log": small**0.5, "fixed_large": beta**0.5,
        "fixed_large_log": beta**0.5, "learned": spread.sqrt(),
        "learned_range": (beta ** ((spread + 1) / 2) * small ** ((1 - spread) / 2)) ** 0.5,
    }[variance]  # fmt: skip
    return mean / (1 - ab[t]) + (sigma * z if t > 0 else 0), x0


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", [*VARIANCES, "fixed_large_log"])
def test_steps_in_float64(prediction, variance):
    """By default results are float64's to float32's last digits, at small t too, where 1 - abar in
    float32 has three.
    """
    for clip_range in (1.0, 0.3):
        ours = DDPMScheduler(
            prediction_type=prediction, variance_type=variance, clip_sample_range=clip_range
        )
        output = output_for(variance)
        for chain in (None, [999, 412, 37, 1, 0], [700, 20]):
            if chain:
                ours.set_timesteps(timesteps=chain)
            for t, after in itertools.pairwise([*(chain or (3, 2, 1, 0)), -1]):
                z = torch.randn(X.shape, generator=generator(5))
                mean, x0 = expected_step(ours, t, after, X, output, z, variance)
                found = ours.step(output, t, X, generator=generator(5))
                torch.testing.assert_close(found.prev_sample.double(), mean, rtol=1e-6, atol=3e-6)
                atol = 2e-5 if t > 500 else 1e-6  # 1 / sqrt(abar) is 150 there
                torch.testing.assert_close(
                    found.pred_original_sample.double(), x0, rtol=1e-6, atol=atol
                )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"thresholding": True}, {"variance_type": "learned"}])
def test_other_dtypes(dtype, options):
    """Half precision is rounded where it is stored alone; float64 is float64 throughout."""
    ours = DDPMScheduler(**options, prediction_type="sample")
    variance = options.get("variance_type", "fixed_small")
    x, output = X.to(dtype), output_for(variance, E.clamp(-1, 1).to(dtype))
    z = torch.randn(X.shape, generator=generator(5), dtype=dtype)
    expected, x0 = expected_step(ours, 40, 39, x, output, z, variance)
    found = ours.step(output, 40, x, generator=generator(5))
    eps = max(torch.finfo(dtype).eps, 1e-13)
    for a, b in ((found.prev_sample, expected), (found.pred_original_sample, x0)):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=eps, atol=eps / 8)


def test_mixed_dtypes_promote_as_theirs():
    theirs, ours = pair()
    half, single = E.half(), X
    assert_same_step(theirs, ours, 50, half, single, atol=4e-3)
    assert_same_step(theirs, ours, 50, single, half, atol=4e-3)
    assert_same_step(theirs, ours, 50, single.double(), single, rtol=1e-5)
    assert_same_step(theirs, ours, 50, single, single.double(), rtol=1e-5)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 8), (2, 3, 2, 4, 8), (0, 3, 4, 4), (1, 1, 1, 1)])
def test_any_number_of_dimensions(shape):
    theirs, ours = pair(variance_type="learned_range")
    x, e, s = (torch.randn(shape, generator=generator(seed)) for seed in (1, 2, 3))
    assert_same_step(theirs, ours, 50, torch.cat((e, s), 1), x)
    t = torch.full(shape[:1], 77)
    torch.testing.assert_close(ours.add_noise(x, e, t), theirs.add_noise(x, e, t))
    torch.testing.assert_close(ours.get_velocity(x, e, t), theirs.get_velocity(x, e, t))


def test_memory_formats():
    theirs, ours = pair()
    x = X.to(memory_format=torch.channels_last)
    assert_same_step(theirs, ours, 50, E, x)
    assert_same_step(theirs, ours, 50, E.to(memory_format=torch.channels_last), x)
    assert_same_step(theirs, ours, 50, E.expand(2, 3, 8, 8)[:, :, ::2], x[:, :, 1::2])


def test_generators():
    """One, one for each sample, or torch's own: theirs in number and order."""
    theirs, ours = pair()
    for make in (lambda: None, lambda: generator(3), lambda: [generator(3), generator(4)]):
        found = []
        for scheduler in (theirs, ours):
            torch.manual_seed(11)
            random, x = make(), X
            for t in (3, 2, 1, 0):
                x = scheduler.step(E, t, x, generator=random).prev_sample
            left = torch.randn(2, generator=random) if isinstance(random, torch.Generator) else 0
            found.append((x, torch.rand(2), left))
        torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([generator(0)] * 3, "a list of 2, one for each sample; got a list of 3"),
        ([], "got a list of 0"),
        (3, "or a list of one for each sample; got int"),
        ([generator(0), None], "for each sample; got NoneType"),
    ],
    ids=["long", "empty", "number", "none"],
)
def test_generators_that_are_none(given, message):
    with pytest.raises(ValueError, match=message):
        DDPMScheduler().step(E, 500, X, generator=given)


def test_a_tuple_of_generators_is_a_list():
    a, b = (
        DDPMScheduler().step(E, 500, X, generator=kind(generator(k) for k in range(2)))[0]
        for kind in (list, tuple)
    )
    assert torch.equal(a, b)


def test_gradients_are_theirs():
    theirs, ours = pair(clip_sample_range=0.7, variance_type="learned_range")
    grads = []
    for scheduler in (theirs, ours):
        x, output = X.clone().requires_grad_(), output_for("learned_range").requires_grad_()
        result = scheduler.step(output, 60, x, generator=generator(5))
        (result.prev_sample.square().sum() + result.pred_original_sample.sum()).backward()
        grads.append((x.grad, output.grad))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-5)


def test_the_end_of_zero_snr():
    """At abar = 0 a prediction of eps is clipped to its sign; without a clip there is no x0."""
    options = {"rescale_betas_zero_snr": True}
    ours = DDPMScheduler(**options)
    assert ours.alphas_cumprod[-1] == 0
    x0 = ours.step(E, 999, X).pred_original_sample
    assert torch.equal(x0, (X - E).sign())
    with pytest.raises(ValueError, match="at t = 999 abar_t is 0: a prediction of eps says"):
        DDPMScheduler(**options, clip_sample=False).step(E, 999, X)


def test_a_noisy_last_step_is_theirs():
    """Where the chain ends above t = 0 they draw noise for the last step too."""
    for variance in ("fixed_small", "fixed_large"):
        theirs, ours = pair(variance_type=variance, steps_offset=1)
        for scheduler in (theirs, ours):
            scheduler.set_timesteps(10)
        assert ours.timesteps[-1] == 1
        assert_same_step(theirs, ours, 1, E)


def test_add_noise_and_velocity():
    theirs, exact = Theirs(), DDPMScheduler()
    ours = DDPMScheduler(exact_tables=False)
    for t in (
        torch.tensor([0, 999]),
        torch.tensor([3]),
        torch.tensor(500),
        torch.tensor([[7], [8]]),
    ):
        for name in ("add_noise", "get_velocity"):
            a, b, c = (getattr(s, name)(X, E, t) for s in (theirs, ours, exact))
            torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6)
            ab = exact._ab[t.flatten()][:, None, None, None]
            x, e = X.double(), E.double()
            mixed = (x, e) if name == "add_noise" else (e, -x)
            expected = ab.sqrt() * mixed[0] + (1 - ab).sqrt() * mixed[1]
            torch.testing.assert_close(c.double(), expected, rtol=1e-6, atol=1e-6)
    one = ours.add_noise(X[:1], E, torch.tensor([5, 6], dtype=torch.int32))
    torch.testing.assert_close(one, theirs.add_noise(X[:1], E, torch.tensor([5, 6])))
    half = exact.add_noise(X.half(), E.half(), torch.tensor([0, 1]))  # 1 - abar is 0 in float16
    assert half.dtype == torch.float16
    torch.testing.assert_close(
        half, exact.add_noise(X.half().float(), E.half().float(), torch.tensor([0, 1])).half()
    )
    grads = []
    for scheduler in (theirs, ours):
        x = X.clone().requires_grad_()
        scheduler.add_noise(x, E, torch.tensor([5, 600])).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("t", "kind", "message"),
    [
        (torch.tensor([0, 1000]), ValueError, "t must be in 0 .. 999; got 1000"),
        (torch.tensor([-1, 0]), ValueError, "t must be in 0 .. 999; got -1"),
        (torch.tensor([0.5, 1]), TypeError, "timesteps must be integers; got torch.float32"),
        (torch.tensor([True, False]), TypeError, "timesteps must be integers; got torch.bool"),
    ],
)
def test_noise_at_a_t_that_is_not(t, kind, message):
    with pytest.raises(kind, match=message):
        DDPMScheduler().add_noise(X, E, t)


@pytest.mark.parametrize(
    ("noise", "t"), [(E[:, :2], [1, 2]), (E[..., :3], [1, 2]), (E, [1, 2, 3])], ids=["C", "W", "t"]
)
def test_noise_that_does_not_fit_is_named(noise, t):
    for mixture in (DDPMScheduler().add_noise, DDPMScheduler().get_velocity):
        with pytest.raises(ValueError, match="samples and noise must be of one shape, with a time"):
            mixture(X, noise, torch.tensor(t))


@pytest.mark.parametrize("name", ["add_noise", "get_velocity"])
def test_mixtures_compile_into_one_graph(name):
    """Also with an abar that training scripts have written over."""
    ours, t = DDPMScheduler(), torch.tensor([5, 900])
    compiled = torch.compile(
        lambda *given: getattr(ours, name)(*given), backend="eager", fullgraph=True
    )
    for _ in range(2):
        torch.testing.assert_close(compiled(X, E, t), getattr(ours, name)(X, E, t))
        ours.alphas_cumprod = ours.alphas_cumprod**2


def test_noise_of_bytes_is_refused():
    with pytest.raises(TypeError, match=r"samples must be .* of a float dtype; got torch.uint8"):
        DDPMScheduler().add_noise(X.byte(), E, torch.tensor([1]))


def test_noise_beyond_the_betas_is_refused():
    ours = DDPMScheduler(beta_start=0.1, beta_end=2)
    assert ours.add_noise(X, E, torch.tensor([1, 2])).isfinite().all()
    with pytest.raises(ValueError, match="0 <= abar_t <= 1"):
        ours.add_noise(X, E, torch.tensor([1, 475]))
    with pytest.raises(ValueError, match="no step from t = 475 to 474"):
        ours.step(E, 475, X)


@pytest.mark.parametrize(
    ("t", "output", "x", "kind", "message"),
    [
        (
            1000,
            E,
            X,
            ValueError,
            "timestep must be one of the chain's 1000 timesteps 999, 998",
        ),
        (-1, E, X, ValueError, "timestep must be one of the chain's"),
        (0.5, E, X, ValueError, "timestep must be one integer; got 0.5"),
        (True, E, X, ValueError, "timestep must be one integer; got True"),
        (torch.tensor(True), E, X, ValueError, "timestep must be one integer"),
        (torch.tensor([1, 2]), E, X, ValueError, "timestep must be one integer"),
        (1, E[:, :2], X, ValueError, r"model_output must have the shape of sample"),
        (
            1,
            output_for("learned"),
            X,
            ValueError,
            "twice the sample's 3 channels, but",
        ),
        (1, None, X, TypeError, "model_output must be a float tensor; got NoneType"),
        (1, E, X.long(), TypeError, "sample must be a float tensor; got torch.int64"),
        (1, E[0, 0, 0], X, ValueError, r"model_output must be \(N, C, ...\); got \(8,\)"),
    ],
)
def test_steps_that_can_not_be(t, output, x, kind, message):
    with pytest.raises(kind, match=message):
        DDPMScheduler().step(output, t, x)


def test_a_step_outside_the_chain_that_was_set():
    ours = DDPMScheduler()
    ours.set_timesteps(timesteps=[9, 4, 0])
    for call in (lambda: ours.step(E, 5, X), lambda: ours.previous_timestep(5)):
        with pytest.raises(ValueError, match="timestep must be one of the chain's"):
            call()


def test_a_learned_variance_needs_both_halves():
    for kind in ("learned", "learned_range"):
        ours = DDPMScheduler(variance_type=kind)
        with pytest.raises(ValueError, match=f"'{kind}' needs a model_output of twice"):
            ours.step(E, 3, X)


# ---- timesteps -----------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("T", [1000, 50])
def test_timesteps_are_theirs(spacing, T):
    """All numbers of steps; "trailing" without the step -1 that theirs end with for some."""
    theirs, ours = pair(timestep_spacing=spacing, num_train_timesteps=T)
    mended = 0
    for steps in range(1, T + 1, 1 if T < 100 else 12):
        for scheduler in (theirs, ours):
            scheduler.set_timesteps(steps)
        expected = theirs.timesteps.tolist()
        if spacing == "trailing" and expected[-1] < 0:
            expected, mended = expected[:-1], mended + 1
        assert ours.timesteps.tolist() == expected
        assert len(expected) == steps == ours.num_inference_steps
    assert (mended > 0) == (spacing == "trailing")


def test_an_offset_beyond_the_end():
    ours = DDPMScheduler(steps_offset=1)
    ours.set_timesteps(500)
    assert (ours.timesteps[0], ours.timesteps[-1]) == (999, 1)
    with pytest.raises(ValueError, match="1000 leading timesteps of 1000 with steps_offset 1"):
        ours.set_timesteps(1000)


def test_timesteps_from_outside():
    """A chain that was set by hand or cut is the one that is followed."""
    theirs, ours = pair()
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(10)
    assert_same_step(theirs, ours, 300, E)
    for scheduler in (theirs, ours):
        scheduler.timesteps[-1] = 50  # in place: 100 is not followed by 0 any more
    assert_same_step(theirs, ours, 100, E)
    for scheduler in (theirs, ours):
        scheduler.timesteps = scheduler.timesteps[5:7]
    assert_same_step(theirs, ours, 400, E)
    assert_same_step(theirs, ours, 300, E)  # now the last one


# ---- the x0 prediction is computed when it is looked at ------------------------------------------


@pytest.fixture
def computed(monkeypatch) -> list:
    """Grows by one for every x0 prediction."""
    found: list = []
    whole = DDPMScheduler._x0
    monkeypatch.setattr(
        DDPMScheduler, "_x0", lambda *arguments: (found.append(1), whole(*arguments))[1]
    )
    return found


@pytest.mark.parametrize(
    "look",
    [
        lambda output: output.pred_original_sample,
        lambda output: output["pred_original_sample"],
        lambda output: output.get("pred_original_sample"),
        lambda output: output[1],
        lambda output: output.to_tuple()[1],
        lambda output: list(output.values())[1],
        lambda output: dict(output)["pred_original_sample"],
        lambda output: {**output}["pred_original_sample"],
        lambda output: copy.deepcopy(output).pred_original_sample,
        lambda output: pickle.loads(pickle.dumps(output)).pred_original_sample,
        lambda output: torch.utils._pytree.tree_leaves(output)[1],
    ],
)
def test_outputs_compute_once(look, computed):
    expected = Theirs().step(E, 9, X).pred_original_sample
    output = DDPMScheduler().step(E, 9, X)
    assert output.prev_sample is output["prev_sample"] is output[0]
    assert not computed
    torch.testing.assert_close(look(output), expected, rtol=1e-5, atol=1e-5)
    assert len(computed) == 1
    assert list(output.keys()) == ["prev_sample", "pred_original_sample"]
    assert len(output) == 2
    assert output.pred_original_sample is output.pred_original_sample
    assert len(computed) == 1


@pytest.mark.parametrize(
    "look",
    [
        lambda values: values[1],
        lambda values: values[-1],
        lambda values: values[:2][1],
        lambda values: list(values)[1],
        lambda values: tuple(values)[1],
        lambda values: (values + ())[1],
        lambda values: (lambda _, x0: x0)(*values),
        lambda values: next(x0 for i, x0 in enumerate(values) if i),
        lambda values: copy.deepcopy(values)[1],
        lambda values: pickle.loads(pickle.dumps(values))[1],
    ],
)
def test_tuples_compute_once(look, computed):
    expected = Theirs().step(E, 9, X).pred_original_sample
    values = DDPMScheduler().step(E, 9, X, return_dict=False)
    assert values[0].shape == X.shape
    assert len(values) == 2
    assert not computed
    torch.testing.assert_close(look(values), expected, rtol=1e-5, atol=1e-5)
    x, x0 = values
    assert x is values[0]
    assert x0 is values[1]
    assert len(computed) == 1


def test_x0_is_that_of_the_step():
    """A write in between is an error, and later settings and modes change nothing."""
    ours = DDPMScheduler()
    x, e = X.clone(), E.clone().requires_grad_()
    output = ours.step(e, 9, x)
    ours.register_to_config(prediction_type="sample", clip_sample=False)
    ours.set_timesteps(3)
    with torch.no_grad():
        x0 = output.pred_original_sample
    assert x0.requires_grad
    torch.testing.assert_close(
        x0, Theirs().step(E, 9, X).pred_original_sample, rtol=1e-5, atol=1e-5
    )

    for written in (x, e):
        output = DDPMScheduler().step(e, 9, x)
        with torch.no_grad():
            written.add_(1)
        assert output.prev_sample.shape == x.shape
        with pytest.raises(RuntimeError, match="has been written to in place since"):
            _ = output.pred_original_sample


def test_inference_mode_computes_at_once(computed):
    """Nothing counts writes to inference tensors; and what is kept serves a training afterwards."""
    ours = DDPMScheduler()
    with torch.inference_mode():
        x = X.clone()
        output = ours.step(E, 9, x)
        x.zero_()
        found = output.pred_original_sample.clone()
        ours.add_noise(x, E, torch.tensor([3]))
    expected = Theirs().step(E, 9, X).pred_original_sample
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    e = E.clone().requires_grad_()
    ours.step(e, 9, X).prev_sample.sum().backward()
    ours.add_noise(e, E, torch.tensor([3])).sum().backward()


# ---- configs -------------------------------------------------------------------------------------

READ = [
    name
    for name in DDPMScheduler._compatibles
    if "kwargs" not in inspect.signature(getattr(diffusers, name).__init__).parameters
]


@pytest.mark.parametrize("name", READ)
def test_configs_of_every_compatible_class(name, tmp_path):
    """What they read of it is what we read of it, in memory and from a file."""
    other = getattr(diffusers, name)(beta_end=0.01, num_train_timesteps=50, beta_start=0.001)
    other.save_pretrained(tmp_path)
    for config in (other.config, DDPMScheduler.load_config(tmp_path)):
        theirs = Theirs.from_config(config)
        ours = DDPMScheduler.from_config(config)
        assert {k: v for k, v in ours.config.items() if k in theirs.config and k[0] != "_"} == {
            k: v for k, v in theirs.config.items() if k[0] != "_"
        }
        torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod)
        assert ours.step(E, 7, X).prev_sample.isfinite().all()


def test_every_other_class_is_refused():
    others = {
        name
        for name in dir(diffusers)
        if name.endswith("Scheduler") and name not in DDPMScheduler._compatibles
    }
    assert {"EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler", "UnCLIPScheduler"} < others
    for name in others:
        with pytest.raises(ValueError, match=f"got that of '{name}', which is another process"):
            DDPMScheduler.from_config({"_class_name": name})
    edm = diffusers.EDMEulerScheduler()
    edm.register_to_config(_class_name="EDMEulerScheduler")
    with pytest.raises(ValueError, match="got that of 'EDMEulerScheduler'"):
        DDPMScheduler.from_config(edm.config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_flow_sigmas": True}, "use_flow_sigmas must be False here; got True: flow matching"),
        ({"prediction_type": "flow_prediction"}, "prediction_type must be one of 'epsilon', 'sa"),
        ({"timestep_type": "continuous"}, "timestep_type must be 'discrete' here"),
        ({"predict_epsilon": False}, "predict_epsilon must be True here; .* say prediction_type"),
        ({"shift": 3.0}, "the option shift is not known here; got 3.0"),
        ({"beta_schedule": "exp"}, "beta_schedule must be one of 'linear', 'scaled_linear'"),
        ({"timestep_spacing": "karras"}, "timestep_spacing must be one of 'linspace'"),
        ({"num_train_timesteps": 0}, r"num_train_timesteps must be an integer in 1 .. 1000000"),
        ({"beta_start": "a"}, "beta_start must be at least 0; got 'a'"),
        ({"beta_end": -0.1}, "beta_end must be at least 0; got -0.1"),
        ({"clip_sample_range": 0.0}, "clip_sample_range must be a number inside"),
        ({"clip_sample_range": -1.0}, "clip_sample_range must be a number inside"),
        ({"sample_max_value": 0}, "sample_max_value must be a number inside"),
        ({"dynamic_thresholding_ratio": 1.5}, "dynamic_thresholding_ratio must be a number in 0"),
        ({"exact_tables": "no"}, "exact_tables must be True or False; got 'no'"),
    ],
    ids=str,
)
def test_options_that_can_not_be(options, message):
    with pytest.raises(ValueError, match=message):
        DDPMScheduler.from_config(options)


def test_what_files_leave_open():
    """null, and what only says how another class samples."""
    config = {
        "_class_name": "DPMSolverMultistepScheduler", "_diffusers_version": "0", "solver_order": 2,
        "variance_type": None, "trained_betas": None, "use_flow_sigmas": False, "shift": None,
        "timestep_type": "discrete", "predict_epsilon": True, "tensor_format": "pt",
    }  # fmt: skip
    ours = DDPMScheduler.from_config(config)
    found = ours.step(E, 5, X, generator=generator(1)).prev_sample
    assert torch.equal(found, DDPMScheduler().step(E, 5, X, generator=generator(1)).prev_sample)


def test_what_a_scheduler_that_was_made_does_not_tell():
    """Its config names no class. These have betas that are no option."""
    for made in (diffusers.IPNDMScheduler(), diffusers.UnCLIPScheduler()):
        with pytest.raises(ValueError, match="have a beta_start: a DDPMScheduler can't be made"):
            DDPMScheduler.from_config(made.config)
    assert DDPMScheduler.from_config({"num_train_timesteps": 7}).config.num_train_timesteps == 7


def test_an_option_that_there_is_not_is_named():
    with pytest.warns(UserWarning, match="clip_sampel is no option of DDPMScheduler"):
        DDPMScheduler.from_config(Theirs().config, clip_sampel=False)


def test_a_default_of_another_class_is_named():
    """Heun's own betas are not taken over, as with theirs; but it is said."""
    with pytest.warns(UserWarning, match="0.0001, DDPMScheduler's default, not 0.00085"):
        ours = DDPMScheduler.from_config(diffusers.HeunDiscreteScheduler(beta_end=0.02).config)
    assert ours.config.beta_start == 0.0001
    assert DDPMScheduler.from_config(
        diffusers.HeunDiscreteScheduler(beta_end=0.02).config, beta_start=0.00085
    ).config.beta_start == 0.00085  # fmt: skip


def test_a_variance_type_that_there_is_not():
    ours = DDPMScheduler(variance_type="other")
    assert ours.step(E, 0, X).prev_sample.shape == X.shape
    for call in (lambda: ours.step(E, 1, X), lambda: ours._get_variance(1)):
        with pytest.raises(ValueError, match="variance_type must be one of 'fixed_small'"):
            call()


def test_exact_tables_in_configs(tmp_path, caplog):
    """Only an option that is not the default is written: diffusers reads ours without a word."""
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        DDPMScheduler().save_pretrained(tmp_path)
        assert "exact_tables" not in json.loads((tmp_path / "scheduler_config.json").read_text())
        theirs = Theirs.from_pretrained(tmp_path)
        Theirs.from_config(DDPMScheduler().config)
        assert not caplog.records
    finally:
        logger.removeHandler(caplog.handler)
    assert len(theirs) == process(DDPMScheduler.load_config(tmp_path), "").schedule.T

    old = DDPMScheduler(exact_tables=False)
    old.save_pretrained(tmp_path)
    for read in (
        DDPMScheduler.from_pretrained(tmp_path),
        DDPMScheduler.from_config(old.config),
        DDPMScheduler.from_config(Theirs().config, exact_tables=False),
    ):
        assert read.config.exact_tables is False
        assert_same_step(Theirs(), read, 1, E)
    process(DDPMScheduler.load_config(tmp_path), "")
    exact = DDPMScheduler.from_config(old.config, exact_tables=True)
    a, b = (s.step(E, 1, X, generator=generator(1)).prev_sample for s in (exact, DDPMScheduler()))
    assert torch.equal(a, b)


def test_a_config_that_changes_is_followed():
    theirs, ours = pair()
    assert_same_step(theirs, ours, 9, E)
    for options in (
        {"prediction_type": "v_prediction"},
        {"variance_type": "fixed_large"},
        {"clip_sample_range": 0.25},
        {"thresholding": True},
    ):
        for scheduler in (theirs, ours):
            scheduler.register_to_config(**options)
        assert_same_step(theirs, ours, 9, E)
    ours.variance_type = "learned_range"
    assert ours.config.variance_type == "learned_range"
    ours.register_to_config(prediction_type="x")
    with pytest.raises(ValueError, match="prediction_type must be one of"):
        ours.step(E, 9, X)


def test_an_abar_from_outside_is_followed():
    """Scripts that set it, write to it, or move it."""
    theirs, ours = pair()
    exact, untouched = DDPMScheduler(), DDPMScheduler()
    for scheduler in (theirs, ours, exact):
        scheduler.alphas_cumprod[700:] *= 0.5
    assert_same_step(theirs, ours, 800, E, rtol=1e-5)
    t = torch.tensor([699, 800])
    torch.testing.assert_close(ours.add_noise(X, E, t), theirs.add_noise(X, E, t))
    x = [s.step(E, 1, X, generator=generator(1)).prev_sample for s in (exact, untouched)]
    assert torch.equal(*x)  # what was not written to keeps its digits

    other = Theirs(beta_end=0.01).alphas_cumprod
    for scheduler in (theirs, ours):
        scheduler.alphas_cumprod = other
    assert_same_step(theirs, ours, 800, E, rtol=1e-5)
    moved = DDPMScheduler()
    moved.alphas_cumprod = moved.alphas_cumprod.clone().double()
    x = [s.step(E, 1, X, generator=generator(1)).prev_sample for s in (moved, untouched)]
    assert torch.equal(*x)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies(again):
    ours = DDPMScheduler(prediction_type="v_prediction")
    ours.set_timesteps(10)
    first = ours.step(E, 100, X, generator=generator(1)).prev_sample
    other = again(ours)
    assert type(other) is DDPMScheduler
    assert dict(other.config) == dict(ours.config)
    assert torch.equal(other.step(E, 100, X, generator=generator(1)).prev_sample, first)
    other.set_timesteps(20)
    assert len(ours.timesteps) == 10
    assert torch.equal(ours.step(E, 100, X, generator=generator(1)).prev_sample, first)


def test_the_hosts_defaults_change_nothing(monkeypatch):
    expected = DDPMScheduler(beta_schedule="sigmoid")
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            ours = DDPMScheduler(beta_schedule="sigmoid")
            ours.set_timesteps(1000)
            a = ours.step(E, 9, X, generator=generator(1))
            assert a.pred_original_sample.device.type == "cpu"
            assert ours.add_noise(X, E, torch.tensor([3], device="cpu")).device.type == "cpu"
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(ours.alphas_cumprod, expected.alphas_cumprod)
    assert torch.equal(a.prev_sample, expected.step(E, 9, X, generator=generator(1)).prev_sample)


def test_diffusers_is_imported_when_it_is_asked_for(monkeypatch):
    import fastddpm.integrations.diffusers as module

    class Missing:
        def find_spec(self, name, *_):
            if name == "diffusers":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for name in list(sys.modules):
        if name.startswith(("fastddpm.integrations.diffusers_", "diffusers")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    for name in ("DDPMScheduler", "PipelineUNet"):
        with pytest.raises(ImportError, match=rf"{name} needs diffusers: pip install 'fastddpm\["):
            getattr(module, name)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = module.Nothing


# ---- pipelines and training ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def unet():
    """A UNet whose scheduler diffusers has, and diffusers' network of the same weights."""
    model = tiny_unet(in_channels=3, out_channels=3, diffusion=Diffusion(Schedule.linear()))
    return model, to_diffusers(model)


def draw(network, scheduler, **options):
    pipe = diffusers.DDPMPipeline(network, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        batch_size=2, generator=generator(3), num_inference_steps=12, output_type="np", **options
    ).images


def test_pipeline(unet):
    """Their pipeline and network, with one line changed; and with our network too."""
    ours, theirs = unet
    expected = draw(theirs, Theirs())
    assert expected.std() > 0.1
    old = DDPMScheduler.from_config(Theirs().config, exact_tables=False)
    for network in (theirs, PipelineUNet(ours)):
        np.testing.assert_allclose(draw(network, old), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(draw(theirs, DDPMScheduler()), expected, atol=1e-3)


def test_pipelines_are_saved_and_read(unet, tmp_path):
    """With our scheduler in them, and into a pipeline that was read."""
    _, theirs = unet
    pipe = diffusers.DDPMPipeline(theirs, DDPMScheduler(variance_type="fixed_large"))
    pipe.save_pretrained(tmp_path)
    read = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert type(read.scheduler) is DDPMScheduler
    assert read.scheduler.config.variance_type == "fixed_large"
    given = diffusers.DDPMPipeline.from_pretrained(tmp_path, scheduler=DDPMScheduler())
    assert given.scheduler.config.variance_type == "fixed_small"


def test_pipeline_unet(unet):
    ours, theirs = unet
    model = PipelineUNet(ours)
    assert (model.dtype, model.device) == (torch.float32, torch.device("cpu"))
    config = model.config
    assert (config.sample_size, config["in_channels"], config.out_channels) == (8, 3, 3)
    for t in (7, torch.tensor(7), torch.tensor([7]), torch.tensor([7, 7], dtype=torch.int32)):
        with torch.no_grad():
            found = model(X, t)
            torch.testing.assert_close(found.sample, theirs(X, t).sample, rtol=1e-5, atol=1e-5)
            assert torch.equal(model(X, t, return_dict=False)[0], found.sample)
    with pytest.raises(ValueError, match=r"unet must be a fastddpm.UNet; got Linear"):
        PipelineUNet(torch.nn.Linear(2, 2))


def test_training_loop_with_our_ops(unet):
    """Their unconditional training with our scheduler, network and loss, against all theirs."""
    ours, theirs = (copy.deepcopy(model).train() for model in unet)
    images = torch.rand(4, 4, 3, 8, 8, generator=generator(9)) * 2 - 1

    def train(model, scheduler, loss_of):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        random, losses = generator(4), []
        for clean in images:
            noise = torch.randn(clean.shape, generator=random)
            t = torch.randint(0, len(scheduler), (len(clean),), generator=random)
            noisy = scheduler.add_noise(clean, noise, t)
            loss = loss_of(model(noisy, t).sample, noise)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    expected = train(theirs, Theirs(), torch.nn.functional.mse_loss)
    found = train(PipelineUNet(ours), DDPMScheduler(), lambda a, b: ops.squared_error(a, b).mean())
    assert expected[-1] != expected[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
