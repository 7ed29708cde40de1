"""improved- and guided-diffusion's GaussianDiffusion by its names: numbers as its formulas in
float64 give them, torch's noise in its order.
"""

from __future__ import annotations

import copy
import enum
import itertools
import pickle

import numpy as np
import pytest
import torch
from openai_plain import Plain, tanh_cdf
from toy import generator

import fastddpm
from fastddpm.integrations import openai
from fastddpm.integrations.openai import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    SpacedDiffusion,
)

BETAS = np.linspace(0.01, 0.35, 12)
MEANS, VARIANCES = tuple(ModelMeanType.__members__), tuple(ModelVarType.__members__)
LOSSES = tuple(LossType.__members__)
SHAPE = (3, 2, 5, 4)


class Network(torch.nn.Module):
    """Two convolutions of x and of a wave in t; y shifts the output."""

    def __init__(self, channels: int = 2, out: int | None = None, gain: float = 1.0):
        super().__init__()
        random = generator(3)
        self.first, self.second = (
            torch.nn.Conv2d(*size, 3, padding=1) for size in ((channels, 8), (8, out or channels))
        )
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(gain * 0.3 * torch.randn(p.shape, generator=random))

    def forward(self, x, t, y=None):
        wave = torch.sin(0.01 * t.float())[:, None, None, None]
        out = self.second(torch.tanh(self.first(x) + wave))
        return out if y is None else out + 0.1 * y.float()[:, None, None, None]


def network(variance: str, channels: int = 2, **options) -> Network:
    return Network(channels, channels * (2 if variance.startswith("LEARNED") else 1), **options)


def pair(mean="EPSILON", variance="FIXED_LARGE", loss="MSE", betas=BETAS, **options):
    """Ours and the plain formulas."""
    rescale = options.pop("rescale_timesteps", False)
    ours = GaussianDiffusion(
        betas=betas, model_mean_type=ModelMeanType[mean], model_var_type=ModelVarType[variance],
        loss_type=LossType[loss], rescale_timesteps=rescale, **options,
    )  # fmt: skip
    cdf = tanh_cdf if options.get("likelihood") == "tanh" else None
    return ours, Plain(betas, mean, variance, loss, rescale=rescale, cdf=cdf)


def close(ours, plain, rtol=1e-5, atol=1e-5):
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), plain, rtol=rtol, atol=atol)


def inputs(seed: int = 0, shape=SHAPE):
    x0 = torch.randint(0, 256, shape, generator=generator(seed)) / 127.5 - 1
    noise = torch.randn(shape, generator=generator(seed + 1))
    return x0, noise, torch.tensor([0, 5, 11])


def gradient(x, t, y=None):
    return torch.cos(x) * (1 + 0.001 * t.float()[:, None, None, None])


def test_attributes_are_theirs():
    ours, plain = pair()
    for name, value in {
        "betas": plain.beta, "alphas_cumprod": plain.ab, "alphas_cumprod_prev": plain.prev,
        "alphas_cumprod_next": plain.next, "sqrt_alphas_cumprod": plain.ab.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - plain.ab).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - plain.ab).log(),
        "sqrt_recip_alphas_cumprod": (1 / plain.ab).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / plain.ab - 1).sqrt(),
        "posterior_variance": plain.tilde, "posterior_log_variance_clipped": plain.log_tilde,
        "posterior_mean_coef1": plain.beta * plain.prev.sqrt() / (1 - plain.ab),
        "posterior_mean_coef2": (1 - plain.prev) * (1 - plain.beta).sqrt() / (1 - plain.ab),
    }.items():  # fmt: skip
        array = getattr(ours, name)
        assert array.dtype == np.float64
        np.testing.assert_allclose(array, value.numpy(), rtol=1e-12, atol=0)
        with pytest.raises(ValueError, match="read-only"):  # tables are made of them
            array[0] = 1
    assert ours.num_timesteps == 12
    assert ours.loss_type is LossType.MSE
    assert [x for x in LossType if x.is_vb()] == [LossType.KL, LossType.RESCALED_KL]


def test_q():
    ours, plain = pair()
    x0, noise, t = inputs()
    mean, variance, log_variance = ours.q_mean_variance(x0, t)
    ab = plain.ab[t][:, None, None, None]
    close(mean, ab.sqrt() * x0.double())
    close(variance, (1 - ab).expand(SHAPE))
    close(log_variance, (1 - ab).log().expand(SHAPE))
    close(ours.q_sample(x0, t, noise), plain.q(x0, t, noise))
    torch.manual_seed(5)
    drawn = ours.q_sample(x0, t.int())
    torch.manual_seed(5)
    assert torch.equal(drawn, ours.q_sample(x0, t, torch.randn_like(x0)))
    mean, variance, log_variance = ours.q_posterior_mean_variance(x0, noise, t)
    close(mean, plain.posterior(x0, noise, t))
    close(variance, plain.tilde[t][:, None, None, None].expand(SHAPE))
    close(log_variance, plain.log_tilde[t][:, None, None, None].expand(SHAPE))


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("mean", MEANS)
def test_p(mean, variance):
    model = network(variance)
    ours, plain = pair(mean, variance)
    _, x, t = inputs()
    kwargs = {"y": torch.tensor([1, 2, 3])}
    for clip, fn in itertools.product((True, False), (None, torch.sin)):
        given = ours.p_mean_variance(model, x, t, clip, fn, kwargs)
        expected = plain.p(model, x, t, clip, fn, kwargs)
        assert given.keys() == expected.keys()
        for name, value in expected.items():
            close(given[name], value, atol=1e-4 if mean == "PREVIOUS_X" else 1e-5)
    for options in (
        {},
        {"clip_denoised": False},
        {"denoised_fn": torch.sin},
        {"cond_fn": gradient},
    ):
        theirs = {"clip" if k == "clip_denoised" else k: v for k, v in options.items()}
        for name, eta in (("step", {}), ("ddim", {}), ("ddim", {"eta": 0.7})):
            torch.manual_seed(1)
            method = ours.p_sample if name == "step" else ours.ddim_sample
            given = method(model, x, t, model_kwargs=kwargs, **options, **eta)
            torch.manual_seed(1)
            sample, x0 = getattr(plain, name)(model, x.double(), t, kwargs=kwargs, **theirs, **eta)
            close(given["sample"], sample, atol=1e-4)
            close(given["pred_xstart"], x0, atol=1e-4)
            assert torch.randn(1) == torch.randn(1, generator=after(1, 1))
    given = ours.ddim_reverse_sample(model, x, t, model_kwargs=kwargs)
    sample, x0 = plain.reverse(model, x.double(), t, kwargs=kwargs)
    close(given["sample"], sample, atol=1e-4)
    close(given["pred_xstart"], x0, atol=1e-4)


@pytest.mark.parametrize("mean", MEANS)
def test_gradients_go_through_a_step(mean):
    """As guidance through the x0 prediction takes them."""
    model = network("LEARNED_RANGE")
    ours, plain = pair(mean, "LEARNED_RANGE")
    _, x, t = inputs()
    gradients = []
    for process in (ours, plain):
        start = x.clone().requires_grad_()
        torch.manual_seed(0)
        if process is ours:
            out = ours.p_sample(model, start, t)
            parts = (out["sample"], out["pred_xstart"], ours.ddim_sample(model, start, t)["sample"])
        else:
            parts = (*plain.step(model, start, t), plain.ddim(model, start, t)[0])
        weights = [torch.randn(SHAPE, generator=generator(k)) for k in range(3)]
        total = sum((part * weight).sum() for part, weight in zip(parts, weights, strict=True))
        gradients.append(torch.autograd.grad(total, start)[0])
    assert_near(*gradients)


def after(seed: int, draws: int) -> torch.Generator:
    """Torch's generator after so many draws of SHAPE."""
    random = generator(seed)
    for _ in range(draws):
        torch.randn(SHAPE, generator=random)
    return random


@pytest.mark.parametrize(("mean", "variance", "rescale"), [
    ("EPSILON", "LEARNED_RANGE", True), ("START_X", "FIXED_LARGE", False),
])  # fmt: skip
def test_a_thousand_steps(mean, variance, rescale):
    betas = openai.get_named_beta_schedule("linear", 1000)
    model, shape = network(variance, 1, gain=0.5), (2, 1, 4, 4)
    ours, plain = pair(mean, variance, betas=betas, rescale_timesteps=rescale)
    with torch.no_grad():
        torch.manual_seed(2)
        expected = plain.chain(plain.step, model, shape)
        torch.manual_seed(2)
        assert_near(ours.p_sample_loop(model, shape), expected)


def test_a_thousand_steps_of_ddim():
    model, shape = network("LEARNED_RANGE", 1, gain=0.5), (2, 1, 4, 4)
    betas = openai.get_named_beta_schedule("linear", 1000)
    ours, plain = pair("EPSILON", "LEARNED_RANGE", betas=betas)
    with torch.no_grad():
        torch.manual_seed(2)
        expected = plain.chain(plain.ddim, model, shape, eta=0.5)
        torch.manual_seed(2)
        assert_near(ours.ddim_sample_loop(model, shape, eta=0.5), expected)


@pytest.mark.parametrize("hooks", ["", "denoised_fn", "cond_fn"])
@pytest.mark.parametrize("shape", [(3, 2, 4, 4), (3, 4, 5)], ids=str)
@pytest.mark.parametrize("chain", ["ddpm", "ddim"])
@pytest.mark.parametrize("mean", MEANS)
def test_noise_is_drawn_in_the_memory_order_that_their_sums_have(mean, chain, shape, hooks):
    """A network whose output lies in another order, as one in channels_last, decides in which
    order torch.randn_like fills x_{t-1}.
    """

    def model(x, t):
        wave = torch.sin(2 * x + 0.1 * t.reshape(-1, *[1] * (x.dim() - 1)))
        return wave.movedim(1, -1).contiguous().movedim(-1, 1)

    options = {"denoised_fn": lambda x: 0.9 * x} if hooks == "denoised_fn" else {}
    options |= {"cond_fn": lambda x, t: torch.cos(x)} if hooks == "cond_fn" else {}
    options |= {"eta": 1.0} if chain == "ddim" else {}
    ours, plain = pair(mean, "FIXED_LARGE")
    torch.manual_seed(2)
    expected = plain.chain(plain.step if chain == "ddpm" else plain.ddim, model, shape, **options)
    torch.manual_seed(2)
    loop = ours.p_sample_loop if chain == "ddpm" else ours.ddim_sample_loop
    assert_near(loop(model, shape, **options), expected)


def assert_near(ours, plain):
    assert (ours.double() - plain).abs().max() < 1e-4 * plain.abs().max()


def test_spaced():
    model = network("LEARNED_RANGE")
    options = {
        "betas": BETAS, "model_mean_type": ModelMeanType.EPSILON, "rescale_timesteps": True,
        "model_var_type": ModelVarType.LEARNED_RANGE, "loss_type": LossType.RESCALED_MSE,
    }  # fmt: skip
    ours = SpacedDiffusion(openai.space_timesteps(12, "3,2"), **options)
    steps = [0, 2, 5, 6, 11]
    assert ours.timestep_map == steps
    assert ours.use_timesteps == set(steps)
    assert (ours.original_num_steps, ours.num_timesteps) == (12, 5)
    ab = np.cumprod(1 - BETAS)[steps]
    plain = Plain(
        1 - ab / np.append(1, ab[:-1]), "EPSILON", "LEARNED_RANGE", "RESCALED_MSE",
        rescale=True, steps=steps, T=12,
    )  # fmt: skip
    np.testing.assert_allclose(ours.betas, plain.beta.numpy(), rtol=1e-12)
    kwargs = {"y": torch.tensor([0, 1, 2])}
    with torch.no_grad():
        for cond_fn in (None, gradient):
            for theirs, name in ((plain.step, "p_sample_loop"), (plain.ddim, "ddim_sample_loop")):
                torch.manual_seed(2)
                expected = plain.chain(theirs, model, SHAPE, kwargs=kwargs, cond_fn=cond_fn)
                torch.manual_seed(2)
                loop = getattr(ours, name)
                assert_near(loop(model, SHAPE, model_kwargs=kwargs, cond_fn=cond_fn), expected)
    x0, noise, t = inputs()
    losses = ours.training_losses(model, x0, t // 3, model_kwargs=kwargs, noise=noise)
    for name, value in plain.losses(model, x0, t // 3, noise, kwargs).items():
        close(losses[name], value, rtol=1e-4)
    whole = SpacedDiffusion(range(12), **options)
    np.testing.assert_array_equal(whole.betas, BETAS)


@pytest.mark.parametrize(("mean", "variance", "loss"), [
    *itertools.product(("EPSILON",), ("FIXED_SMALL", "LEARNED", "LEARNED_RANGE"), LOSSES),
    ("START_X", "LEARNED_RANGE", "MSE"), ("PREVIOUS_X", "FIXED_LARGE", "MSE"),
])  # fmt: skip
def test_losses_and_their_gradients(mean, variance, loss):
    model = network(variance)
    ours, plain = pair(mean, variance, loss)
    x0, noise, t = inputs()
    if mean == "START_X":  # an x0 far from the data has no likelihood in float64's erfc
        t = t.clamp(min=1)
    torch.manual_seed(4)
    given = ours.training_losses(model, x0, t, model_kwargs={"y": t})
    torch.manual_seed(4)
    expected = plain.losses(model, x0, t, torch.randn_like(x0), {"y": t})
    assert given.keys() == expected.keys()
    for name, value in expected.items():
        close(given[name], value, rtol=1e-4)
    parameters = list(model.parameters())
    one, two = (
        torch.autograd.grad(losses["loss"].mean(), parameters) for losses in (given, expected)
    )
    for a, b in zip(one, two, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()
    close(ours.training_losses(model, x0, t, noise=noise)["loss"],
          plain.losses(model, x0, t, noise)["loss"], rtol=1e-4)  # fmt: skip


def test_the_likelihood_of_their_numbers():
    """Of bins within 2.5 sigma, where float32 has digits enough to tell the two."""
    x0, noise, t = inputs()
    model = lambda x, t: 0.8 * noise  # noqa: E731
    bits = {}
    for name in ("tanh", "exact"):
        ours, plain = pair(loss="KL", likelihood=name)
        bits[name] = ours.training_losses(model, x0, t, noise=noise)["loss"]
        close(bits[name], plain.losses(model, x0, t, noise)["loss"], rtol=1e-4)
    apart = (bits["tanh"] - bits["exact"]).abs() / bits["exact"]
    assert 1e-5 < apart[0] < 1e-2
    assert torch.equal(bits["tanh"][1:], bits["exact"][1:])


@pytest.mark.parametrize("clip", [True, False])
def test_the_bound(clip):
    model = network("LEARNED_RANGE")
    ours, plain = pair(variance="LEARNED_RANGE")
    x0, _, t = inputs()
    torch.manual_seed(6)
    given = ours.calc_bpd_loop(model, x0, clip_denoised=clip, model_kwargs={"y": t})
    torch.manual_seed(6)
    with torch.no_grad():
        expected = plain.bpd(model, x0, clip, {"y": t})
    assert given.keys() == expected.keys()
    for name, value in expected.items():
        close(given[name], value, rtol=1e-4)
    process = fastddpm.Diffusion(fastddpm.Schedule(BETAS), variance="learned_range", loss="hybrid")
    torch.testing.assert_close(given["prior_bpd"], process.prior_kl(x0))


def test_a_progressive_loop_shows_each_step_and_leaves_gradients_alone():
    model = network("FIXED_LARGE").train()
    ours, _ = pair()
    x_T = torch.randn(SHAPE, generator=generator())
    for loop, whole in (
        (ours.p_sample_loop_progressive, ours.p_sample_loop),
        (ours.ddim_sample_loop_progressive, ours.ddim_sample_loop),
    ):
        torch.manual_seed(0)
        seen = []
        for out in loop(model, SHAPE, noise=x_T, device="cpu"):
            assert torch.is_grad_enabled()
            seen.append(out)
        assert len(seen) == 12
        assert seen[0].keys() == {"sample", "pred_xstart"}
        assert not seen[0]["sample"].requires_grad
        torch.manual_seed(0)
        assert torch.equal(whole(model, SHAPE, noise=x_T, progress=True), seen[-1]["sample"])
        assert torch.equal(seen[-1]["sample"], seen[-1]["pred_xstart"])
    assert model.training
    assert torch.equal(x_T, torch.randn(SHAPE, generator=generator()))


def test_a_subclass_has_its_own_parts():
    class Halved(GaussianDiffusion):
        def p_mean_variance(self, model, x, t, **options):
            out = super().p_mean_variance(model, x, t, **options)
            return {**out, "mean": out["mean"] / 2, "pred_xstart": out["pred_xstart"] / 2}

    names = {"model_mean_type": ModelMeanType.EPSILON, "loss_type": LossType.MSE}
    options = {"betas": BETAS, "model_var_type": ModelVarType.FIXED_SMALL, **names}
    model, (_, x, _) = network("FIXED_SMALL"), inputs()
    t = torch.zeros(3, dtype=torch.int64)
    plain, halved = GaussianDiffusion(**options), Halved(**options)
    for name in ("p_sample", "ddim_sample", "ddim_reverse_sample"):
        once, half = (getattr(process, name)(model, x, t) for process in (plain, halved))
        torch.testing.assert_close(half["pred_xstart"], once["pred_xstart"] / 2)
        assert not torch.allclose(half["sample"], once["sample"])
    patched = GaussianDiffusion(**options)
    patched.p_mean_variance = halved.p_mean_variance
    assert torch.equal(
        patched.p_sample(model, x, t)["sample"], halved.p_sample(model, x, t)["sample"]
    )


def test_other_dimensions_and_dtypes():
    ours, plain = pair()
    model = lambda x, t: torch.sin(x + t.reshape(-1, *[1] * (x.dim() - 1)))  # noqa: E731
    t = torch.tensor([0, 5, 11])
    for shape in ((3, 7), (3, 2, 9), (3, 2, 3, 4, 5)):
        x = torch.randn(shape, generator=generator())
        torch.manual_seed(0)
        given = ours.p_sample(model, x, t)["sample"]
        torch.manual_seed(0)
        close(given, plain.step(model, x.double(), t)[0])
        assert ours.p_sample_loop(model, shape).shape == shape
        close(ours.training_losses(model, x.clamp(-1, 1), t, noise=x)["loss"],
              plain.losses(model, x.clamp(-1, 1), t, x)["loss"], rtol=1e-4)  # fmt: skip
    x = torch.randn(SHAPE, generator=generator())
    for dtype in (torch.float16, torch.bfloat16):
        small = x.to(dtype)
        given = ours.p_mean_variance(lambda x, t: torch.sin(x), small, t)
        assert all(value.dtype == torch.float32 for value in given.values())
        assert ours.p_sample(lambda x, t: x, small, t)["sample"].dtype == torch.float32
        assert ours.ddim_sample(lambda x, t: x, small, t)["sample"].dtype == torch.float32
    double = ours.p_mean_variance(lambda x, t: torch.sin(x.double()), x.double(), t)
    expected = plain.p(lambda x, t: torch.sin(x.double()), x.float().double(), t)
    torch.testing.assert_close(double["mean"], expected["mean"], rtol=1e-12, atol=1e-12)
    nearer = ours.p_sample_loop(
        network("FIXED_LARGE"), SHAPE, noise=x.to(memory_format=torch.channels_last)
    )
    assert nearer.shape == SHAPE


def test_what_others_say_by_our_names():
    """Their own enums are taken, and a process survives copies."""

    class Theirs:
        ModelMeanType = enum.Enum("ModelMeanType", "PREVIOUS_X START_X EPSILON VELOCITY")
        ModelVarType = enum.Enum("ModelVarType", list(VARIANCES))
        LossType = enum.Enum("LossType", list(LOSSES))

    options = {
        "betas": BETAS, "model_mean_type": Theirs.ModelMeanType.START_X,
        "model_var_type": Theirs.ModelVarType.FIXED_SMALL, "loss_type": Theirs.LossType.KL,
    }  # fmt: skip
    theirs = GaussianDiffusion(**options)
    assert theirs.loss_type is Theirs.LossType.KL
    ours, _ = pair("START_X", "FIXED_SMALL", "KL")
    model, (x0, noise, t) = network("FIXED_SMALL"), inputs()
    expected = ours.training_losses(model, x0, t, noise=noise)["loss"]
    for process in (theirs, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(process.training_losses(model, x0, t, noise=noise)["loss"], expected)
    with pytest.raises(
        ValueError, match=r"model_mean_type must be one of .*EPSILON; got .*VELOCITY"
    ):
        GaussianDiffusion(**{**options, "model_mean_type": Theirs.ModelMeanType.VELOCITY})


def test_the_factory():
    ours = openai.create_gaussian_diffusion(
        steps=100, learn_sigma=True, noise_schedule="cosine", rescale_learned_sigmas=True,
        timestep_respacing="ddim25",
    )  # fmt: skip
    assert isinstance(ours, SpacedDiffusion)
    assert ours.timestep_map == list(range(0, 100, 4))
    assert ours.model_var_type is ModelVarType.LEARNED_RANGE
    assert ours.loss_type is LossType.RESCALED_MSE
    plain = openai.create_gaussian_diffusion(predict_xstart=True, use_kl=True, sigma_small=True)
    assert plain.num_timesteps == 1000
    assert plain.model_mean_type is ModelMeanType.START_X
    assert plain.model_var_type is ModelVarType.FIXED_SMALL
    assert plain.loss_type is LossType.RESCALED_KL
    assert openai.create_gaussian_diffusion().model_var_type is ModelVarType.FIXED_LARGE
    assert openai.space_timesteps(300, [10, 15, 20]) == openai.space_timesteps(300, "10,15,20")
    assert len(openai.space_timesteps(300, [10, 15, 20])) == 45
    ab = lambda t: np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2  # noqa: E731
    np.testing.assert_allclose(
        openai.betas_for_alpha_bar(100, ab), openai.get_named_beta_schedule("cosine", 100)
    )
    np.testing.assert_allclose(
        openai.get_named_beta_schedule("linear", 500), np.linspace(2e-4, 0.04, 500)
    )


def test_two_hundred_steps_of_training():
    ours, plain = pair(variance="LEARNED_RANGE", loss="RESCALED_MSE")
    random = generator(1)
    x0, t = 0.5 + torch.zeros(8, 2, 4, 4), torch.randint(0, 12, (200, 8), generator=random)
    noise = torch.randn(200, *x0.shape, generator=random)
    losses = []
    for training_losses in (
        lambda model, i: ours.training_losses(model, x0, t[i], noise=noise[i]),
        lambda model, i: plain.losses(model, x0, t[i], noise[i]),
    ):
        model = network("LEARNED_RANGE")
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        losses.append([])
        for i in range(200):
            loss = training_losses(model, i)["loss"].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert sum(losses[0][-20:]) < 0.6 * sum(losses[0][:20])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


X = torch.zeros(SHAPE)
T = torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(("call", "error", "match"), [
    (lambda p, m: p.q_sample(X.byte(), T), TypeError, "x_start must be a tensor of floats; got u"),
    (lambda p, m: p.q_sample(X, T, X[:1]), ValueError, "noise must have the shape of x_start"),
    (lambda p, m: p.q_sample(X, T.float()), TypeError, "t must be a tensor of integers"),
    (lambda p, m: p.q_sample(X, T[:1]), ValueError, r"t must have shape \(3,\)"),
    (lambda p, m: p.q_mean_variance(X, T - 1), ValueError, r"t must lie in 0 .. 11; got -1 .. -1"),
    (lambda p, m: p.p_sample(m, X, T + 12), ValueError, r"t must lie in 0 .. 11; got 12"),
    (lambda p, m: p.p_sample(lambda x, t: x[:1], X, T), ValueError, "FIXED_LARGE the model must"),
    (lambda p, m: p.p_sample(lambda x, t: (x,), X, T), ValueError, "got tuple"),
    (lambda p, m: p.p_sample(network("LEARNED"), X, T), ValueError, r"\(3, 2, 5, 4\) here; got"),
    (lambda p, m: p.ddim_sample(m, X, T, eta=1.5), ValueError, "eta = 1.5"),
    (lambda p, m: p.ddim_reverse_sample(m, X, T, eta=0.1), ValueError, "eta must be 0"),
    (lambda p, m: p.p_sample(m, X, T, cond_fn=lambda x, t: x[:1]), ValueError, "cond_fn must ret"),
    (lambda p, m: p.p_sample(m, X, T, denoised_fn=lambda x: None), ValueError, "denoised_fn must"),
    (lambda p, m: p.p_sample_loop(m, 3), ValueError, "shape must be a tuple"),
    (lambda p, m: p.p_sample_loop(m, (3, 2, 0, 4)), ValueError, "a dimension of shape must be"),
    (lambda p, m: p.p_sample_loop(m, SHAPE, noise=X[:1]), ValueError, "noise must be a tensor"),
    (lambda p, m: p.p_sample_loop(m, SHAPE, device="cuda:77"), ValueError, "cuda:77"),
])  # fmt: skip
def test_bad_calls_are_named(call, error, match):
    ours, _ = pair()
    with pytest.raises(error, match=match):
        call(ours, network("FIXED_LARGE"))


@pytest.mark.parametrize(("change", "match"), [
    ({"betas": [0.1, 1.0]}, r"every beta must lie inside \(0, 1\)"),
    ({"betas": [[0.1, 0.2]]}, "1-D"),
    ({"model_mean_type": "eps"}, "model_mean_type must be one of ModelMeanType.PREVIOUS_X"),
    ({"model_var_type": LossType.KL}, "model_var_type must be one of"),
    ({"loss_type": None}, "loss_type must be one of"),
    ({"rescale_timesteps": 1}, "rescale_timesteps must be True or False"),
    ({"likelihood": "erf"}, "likelihood must be one of 'exact', 'tanh'"),
])  # fmt: skip
def test_bad_options_are_named(change, match):
    options = {
        "betas": BETAS, "model_mean_type": ModelMeanType.EPSILON,
        "model_var_type": ModelVarType.FIXED_LARGE, "loss_type": LossType.MSE, **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=match):
        GaussianDiffusion(**options)
    if "betas" not in change:
        with pytest.raises(ValueError, match=match):
            SpacedDiffusion([0, 3], **options)


def test_bad_steps_are_named():
    options = {
        "betas": BETAS, "model_mean_type": ModelMeanType.EPSILON,
        "model_var_type": ModelVarType.FIXED_LARGE, "loss_type": LossType.MSE,
    }  # fmt: skip
    for steps in ([0, 12], [], "ddim3", 5, [0.5], {"a"}):
        with pytest.raises(ValueError, match=r"steps"):
            SpacedDiffusion(steps, **options)
    with pytest.raises(ValueError, match="betas must be given"):
        SpacedDiffusion([0])
    for counts in ("ddim7", "13", [0], [1.5], "a", 5):
        with pytest.raises(ValueError):
            openai.space_timesteps(12, counts)
    with pytest.raises(ValueError, match="schedule_name must be one of 'linear', 'cosine'"):
        openai.get_named_beta_schedule("sqrt", 100)
