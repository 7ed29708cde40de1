"""denoising_diffusion_pytorch's GaussianDiffusion accelerated in place: its numbers, its random
numbers, copies, and what is left alone. A copy of its arithmetic stands in for the package; the
package itself is tried where it is installed.
"""

from __future__ import annotations

import copy
import importlib.util
import pickle
import random
import types

import lucidrains_plain
import pytest
import torch
from toy import generator

import fastddpm
from fastddpm.integrations import lucidrains
from fastddpm.integrations.lucidrains_steps import OBJECTIVES

STEPS = ("q_sample", "p_sample", "ddim_sample", "p_losses")
SHAPE = (3, 1, 4, 4)


class Network(torch.nn.Module):
    """Two convolutions of x, of the last x0 and of a wave in t."""

    channels = out_dim = 1

    def __init__(self, self_condition: bool = False):
        super().__init__()
        self.self_condition, self.random_or_learned_sinusoidal_cond = self_condition, False
        self.first, self.second = torch.nn.Conv2d(2, 8, 3, 1, 1), torch.nn.Conv2d(8, 1, 3, 1, 1)
        random = generator(3)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.15 * torch.randn(p.shape, generator=random))

    def forward(self, x, t, x_self_cond=None):
        seen = torch.zeros_like(x) if x_self_cond is None else x_self_cond
        wave = torch.sin(0.01 * t.float())[:, None, None, None]
        return self.second(torch.tanh(self.first(torch.cat((x, seen), 1)) + wave))


def process(self_condition=False, **options):
    model = Network(self_condition)
    return lucidrains_plain.GaussianDiffusion(model, **{"timesteps": 24, **options})


def seeded(call, *arguments, **options):
    torch.manual_seed(1)
    random.seed(1)
    result = call(*arguments, **options)
    return result, (torch.rand(1).item(), random.random())


def assert_near(ours, plain, tolerance=1e-4):
    assert ours.dtype == torch.float32
    assert ours.shape == plain.shape
    assert (ours - plain).abs().max() <= tolerance * plain.abs().max()


@pytest.mark.parametrize("self_condition", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_steps_and_losses(objective, self_condition):
    options = {"objective": objective, "offset_noise_strength": 0.1, "gamma": 5}
    options |= {"beta_schedule": "linear", "sampling_timesteps": 7, "ddim_sampling_eta": 0.5}
    double = process(self_condition, dtype=torch.float64, **options)
    ours = process(self_condition, **options)
    keys = list(ours.state_dict())
    assert lucidrains.accelerate(ours) is ours
    assert lucidrains.accelerate(ours) is ours
    assert ours.report() == dict.fromkeys(STEPS, "replaced")
    assert list(ours.state_dict()) == keys
    assert type(ours).__name__ == "GaussianDiffusion"
    assert isinstance(ours, lucidrains_plain.GaussianDiffusion)
    x = torch.randn(SHAPE, generator=generator()).clamp(-1, 1)
    t, seen = torch.tensor([0, 7, 19]), (x / 2 if self_condition else None)
    for name, arguments in (
        ("q_sample", (x, t)), ("p_losses", (x, t)), ("p_losses", (x, t, x.sin(), 0.0, "none")),
        ("p_sample", (x, 0, seen)), ("p_sample", (x, 9, seen)), ("p_sample", (x, 19, seen)),
        ("p_sample_loop", (SHAPE,)), ("p_sample_loop", (SHAPE, True)), ("sample", (2,)),
        ("ddim_sample", (SHAPE,)), ("ddim_sample", (SHAPE, True)),
    ):  # fmt: skip
        exact = [
            a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
            for a in arguments
        ]
        mine, after = seeded(getattr(ours, name), *arguments)
        plain, then = seeded(getattr(double, name), *exact)
        assert after == then, name
        for a, b in zip(
            *((r if isinstance(r, tuple) else (r,)) for r in (mine, plain)), strict=True
        ):
            assert_near(a, b)
    gradients = []
    for one, image in ((ours, x), (double, x.double())):
        loss, _ = seeded(one, image)
        gradients.append(torch.autograd.grad(loss, list(one.parameters())))
    for a, b in zip(*gradients, strict=True):
        assert_near(a, b)


def test_two_hundred_steps_of_training():
    x = torch.randn(200, 4, 1, 4, 4, generator=generator()).clamp(-1, 1)
    losses = []
    for kind in ("theirs", "ours"):
        one = process(True, gamma=5)
        if kind == "ours":
            lucidrains.accelerate(one)
        optimizer = torch.optim.Adam(one.parameters(), 1e-3)

        def train(one=one, optimizer=optimizer):
            for images in x:
                loss = one((images + 1) / 2)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                yield loss.item()

        losses.append(torch.tensor(seeded(lambda train=train: list(train()))[0]))
    assert losses[0][-20:].mean() < 0.9 * losses[0][:20].mean()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)


@pytest.mark.parametrize(("objective", "schedule"), [("pred_v", "sigmoid"), ("pred_x0", "cosine")])
def test_a_thousand_steps(objective, schedule):
    options = {"objective": objective, "beta_schedule": schedule, "timesteps": 1000}
    ours = lucidrains.accelerate(process(**options))
    expected, _ = seeded(process(dtype=torch.float64, **options).sample, 2)
    images, _ = seeded(ours.sample, 2)
    assert_near(images, expected)


@pytest.mark.parametrize("sampling_timesteps", [None, 6])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_noise_is_drawn_in_the_memory_order_that_its_sums_have(objective, sampling_timesteps):
    """A network's output that lies otherwise decides in which order x_{t-1} is filled."""
    options = {
        "objective": objective,
        "sampling_timesteps": sampling_timesteps,
        "ddim_sampling_eta": 1.0,
    }
    plain = process(**options)
    forward = plain.model.forward
    plain.model.forward = lambda *given: forward(*given).mT.contiguous().mT
    expected, _ = seeded(plain.sample, 2)
    images, _ = seeded(lucidrains.accelerate(plain).sample, 2)
    assert_near(images, expected, 1e-3)


def test_an_immiscible_process_pairs_noise_as_its_own():
    ours, plain = lucidrains.accelerate(process(immiscible=True)), process(immiscible=True)
    x, t = torch.randn(SHAPE, generator=generator()), torch.tensor([3, 5, 9])
    assert_near(ours.q_sample(x, t, x.sin()), plain.q_sample(x, t, x.sin()))
    assert_near(*(seeded(one.p_losses, x, t)[0] for one in (ours, plain)))


def test_buffers_that_change_are_followed():
    ours, linear = lucidrains.accelerate(process()), process(beta_schedule="linear")
    x, t = torch.randn(SHAPE, generator=generator()), torch.tensor([3, 5, 9])
    before = ours.q_sample(x, t, x)
    ours.load_state_dict(linear.state_dict())
    assert not torch.allclose(before, linear.q_sample(x, t, x))
    assert_near(ours.q_sample(x, t, x), linear.q_sample(x, t, x))
    assert_near(seeded(ours.sample, 2)[0], seeded(linear.sample, 2)[0])


def test_copies_are_their_own_and_undo_gives_the_class_back():
    ours = lucidrains.accelerate(process())
    images = seeded(ours.sample, 2)[0]
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert other.report() == ours.report()
        assert torch.equal(seeded(other.sample, 2)[0], images)
        with torch.no_grad():
            other.model.second.bias.add_(0.5)
        assert not torch.equal(seeded(other.sample, 2)[0], images)
        assert torch.equal(seeded(ours.sample, 2)[0], images)
        assert other.undo() is other
        assert type(other) is lucidrains_plain.GaussianDiffusion
    assert ours.undo() is ours
    assert type(ours) is lucidrains_plain.GaussianDiffusion
    assert vars(ours).keys() == vars(process()).keys()
    assert lucidrains.report(ours) == {}
    assert lucidrains.undo(ours) is ours
    assert type(ours) is lucidrains_plain.GaussianDiffusion
    assert lucidrains.is_process(ours)
    assert not lucidrains.is_process(ours.model)
    assert_near(seeded(ours.sample, 2)[0], images)


def test_the_probe_leaves_random_numbers_and_the_network_alone():
    one = process(self_condition=True)
    one.model.forward = None
    state, own = torch.get_rng_state(), random.getstate()
    lucidrains.accelerate(one)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == own


class Averaged(torch.nn.Module):
    """A process and its average, as a trainer holds them."""

    def __init__(self, model):
        super().__init__()
        self.online_model, self.ema_model = model, copy.deepcopy(model)


def test_accelerate_hands_a_process_on():
    plain = process()
    ours = copy.deepcopy(plain)
    ours.model.second = torch.nn.Sequential(torch.nn.Conv2d(8, 64, 3, 1, 1),
                                            torch.nn.Conv2d(64, 64, 3, 1, 1),
                                            torch.nn.Conv2d(64, 1, 1))  # fmt: skip
    plain.model = copy.deepcopy(ours.model)
    assert fastddpm.accelerate(ours) is ours
    replaced = ours.report().replaced
    assert replaced[""].startswith("q_sample, p_sample, ddim_sample, p_losses of denoising_diff")
    assert replaced.keys() == {"", "model.second.1"}
    x, t = torch.randn(SHAPE, generator=generator()), torch.tensor([0, 7, 19])
    for other in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert other.report().model is other
        for name, arguments in (("sample", (2,)), ("p_losses", (x, t))):
            mine, theirs = (seeded(getattr(one, name), *arguments) for one in (other, plain))
            assert mine[1] == theirs[1]
            assert_near(mine[0].detach(), theirs[0].detach())
    lucidrains.accelerate(ours)
    assert fastddpm.accelerate(ours).report().replaced == replaced
    assert ours.undo() is ours
    assert type(ours) is lucidrains_plain.GaussianDiffusion
    assert vars(ours).keys() == vars(plain).keys()
    assert "forward" not in vars(ours.model.second[1])


def test_accelerate_finds_processes_within():
    both = fastddpm.accelerate(Averaged(process()))
    assert both.report().replaced.keys() == {"online_model", "ema_model"}
    assert lucidrains.report(both.ema_model) == dict.fromkeys(STEPS, "replaced")
    both.undo()
    assert type(both.ema_model) is lucidrains_plain.GaussianDiffusion
    trainer = types.SimpleNamespace(model=process(), ema=both)
    with pytest.raises(TypeError, match=r"such as its \.model and its \.ema; got"):
        fastddpm.accelerate(trainer)


def test_accelerate_says_which_steps_it_left():
    model = Network()
    loud = fastddpm.accelerate(Louder(model, timesteps=24))
    assert "p_sample" not in loud.report().replaced[""]
    assert "numbers are not those" in loud.report().left["p_sample"]


class Louder(lucidrains_plain.GaussianDiffusion):
    """Another arithmetic, under the same names."""

    def p_mean_variance(self, x, t, x_self_cond=None):
        mean, log_variance, x0 = super().p_mean_variance(x, t, x_self_cond)
        return mean, log_variance + 0.1, x0


class Others(lucidrains_plain.GaussianDiffusion):
    def p_sample(self, x, t: int, x_self_cond=None, classes=None):
        return super().p_sample(x, t, x_self_cond)

    def ddim_sample(self, shape, return_all_timesteps=False):
        raise RuntimeError("not today")

    def p_losses(
        self, x_start, t, noise=None, offset_noise_strength=None, loss_reduction="mean"
    ):  # fmt: skip
        noise = torch.rand_like(x_start) if noise is None else noise
        return super().p_losses(x_start, t, noise, offset_noise_strength, loss_reduction)


def test_what_only_looks_like_it_is_left():
    louder = Louder(Network(), timesteps=24)
    images = seeded(louder.sample, 2)[0]
    report = lucidrains.accelerate(louder).report()
    assert report.pop("p_sample") == "its numbers are not those of the published one"
    assert set(report.values()) == {"replaced"}
    assert torch.equal(seeded(louder.sample, 2)[0], images)

    report = lucidrains.accelerate(Others(Network(), timesteps=24)).report()
    assert report["q_sample"] == "replaced"
    assert "'classes'" in report["p_sample"]
    assert report["ddim_sample"] == "a probe of it failed: RuntimeError: not today"
    assert report["p_losses"] == "its numbers are not those of the published one"

    patched = process()
    patched.p_mean_variance = patched.p_mean_variance
    with pytest.raises(ValueError, match="q_sample: p_mean_variance was set on this object"):
        lucidrains.accelerate(patched)


def test_what_is_no_such_process_is_named():
    with pytest.raises(ValueError, match="GaussianDiffusion, a torch module; got dict"):
        lucidrains.accelerate({})
    with pytest.raises(ValueError, match="this Network has no betas"):
        lucidrains.accelerate(Network())
    other = process()
    other.objective = "pred_score"
    with pytest.raises(ValueError, match=r"objective must be one of 'pred_noise'.*'pred_score'"):
        lucidrains.accelerate(other)


def installed():
    """The package, or a skip with the reason."""
    if importlib.util.find_spec("denoising_diffusion_pytorch") is None:
        pytest.skip("denoising_diffusion_pytorch is not installed")
    import denoising_diffusion_pytorch

    return denoising_diffusion_pytorch


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_package_itself(objective):
    package = installed()
    options = {"image_size": 4, "timesteps": 24, "objective": objective, "auto_normalize": False}
    x, t = torch.randn(SHAPE, generator=generator()).clamp(-1, 1), torch.tensor([0, 7, 19])
    for more in ({}, {"sampling_timesteps": 7, "ddim_sampling_eta": 0.5, "immiscible": True}):
        theirs = package.GaussianDiffusion(Network(True), **options, **more)
        ours = lucidrains.accelerate(copy.deepcopy(theirs))
        assert ours.report() == dict.fromkeys(STEPS, "replaced")
        for name, arguments in (("sample", (2,)), ("sample", (2, True)), ("p_losses", (x, t))):
            (mine, after), (plain, then) = (
                seeded(getattr(one, name), *arguments) for one in (ours, theirs)
            )
            assert after == then
            assert_near(mine, plain)


def test_its_trainer_trains(tmp_path):
    from PIL import Image

    package = installed()
    for i in range(100):  # its fewest
        Image.new("L", (16, 16), 2 * i).save(tmp_path / f"{i}.png")
    unet = package.Unet(dim=8, dim_mults=(1, 2), channels=1, flash_attn=False)
    ours = lucidrains.accelerate(package.GaussianDiffusion(unet, image_size=16, timesteps=4))
    before = [p.clone() for p in unet.parameters()]
    trainer = package.Trainer(
        ours, tmp_path, train_batch_size=16, gradient_accumulate_every=1, train_num_steps=2,
        save_and_sample_every=2, num_samples=1, calculate_fid=False, ema_update_every=1,
        results_folder=str(tmp_path / "results"),
    )  # fmt: skip
    assert trainer.ema.ema_model.report() == ours.report()
    trainer.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, unet.parameters(), strict=True))
    assert (tmp_path / "results" / "model-1.pt").exists()
    trainer.load(1)
