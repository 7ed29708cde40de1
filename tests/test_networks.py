"""What is no network is told what to pass instead, wherever a model is asked for."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toy import SCHEDULE, images, tiny_unet, wave

import fastddpm
from fastddpm import Diffusion, Trainer

SHAPE = (3, 4, 4)


class Network(nn.Module):
    def __init__(self, factor: int = 1):
        super().__init__()
        self.layer, self.factor = nn.Conv2d(3, 3, 1), factor

    def forward(self, x, t):
        return torch.cat([self.layer(x)] * self.factor, dim=1)


class GaussianDiffusion(nn.Module):
    """Named and called as lucidrains'."""

    def __init__(self, model, objective="pred_noise"):
        super().__init__()
        self.model, self.objective = model, objective

    def p_sample_loop(self, shape):
        raise AssertionError("it ran")

    def p_losses(self, x_start, t):
        raise AssertionError("it ran")

    def forward(self, img, *args, **kwargs):
        raise AssertionError("it ran")


class SpacedDiffusion:
    """OpenAI's: no module, and it can't be called."""

    def p_sample_loop(self, model, shape):
        raise AssertionError("it ran")


class EMA(nn.Module):
    """ema_pytorch's around it."""

    def __init__(self, model):
        super().__init__()
        self.ema_model = model

    def forward(self, *args, **kwargs):
        return self.ema_model(*args, **kwargs)


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args):
        return self.module(*args)


def ways(model):
    """Every way to pass a model."""
    x0 = images(2, *SHAPE)
    yield lambda: fastddpm.sample(model, 1, shape=SHAPE, progress=False)
    yield lambda: fastddpm.interpolate(model, *x0, progress=False)
    yield lambda: fastddpm.bits_per_dim(model, x0, progress=False)
    yield lambda: Trainer(model)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (GaussianDiffusion(Network()), r"a GaussianDiffusion is a process .* inside it, \.model, "),
        (GaussianDiffusion(Network()), r"Diffusion\(fastddpm\.Schedule\(betas\), prediction='eps'"),
        (GaussianDiffusion(Network(), "pred_v"), "prediction='v'"),
        (GaussianDiffusion(Network(), "other"), r"Schedule\(betas\)\)$"),
        (EMA(GaussianDiffusion(Network())), "a GaussianDiffusion is a process"),
        (Wrapper(GaussianDiffusion(Network())), "a GaussianDiffusion is a process"),
        (SpacedDiffusion(), "a SpacedDiffusion is a process .* the network that it is called with"),
    ],
    ids=["module", "eps", "v", "other", "ema", "wrapped", "openai"],
)  # fmt: skip
def test_a_process_is_no_network(model, message):
    for way in ways(model):
        with pytest.raises(ValueError, match=message):
            way()


def test_a_pipeline_and_its_scheduler_are_none():
    diffusers = pytest.importorskip("diffusers")
    from fastddpm.integrations.diffusers import to_diffusers

    scheduler = diffusers.DDPMScheduler(12)
    network = to_diffusers(tiny_unet())
    pipeline = diffusers.DDPMPipeline(network, scheduler)
    for way in ways(pipeline):
        with pytest.raises(ValueError, match=r"a DDPMPipeline is a pipeline .* \.unet, with diff"):
            way()
    for way in ways(scheduler):
        with pytest.raises(ValueError, match="a DDPMScheduler is a scheduler and not a network"):
            way()
    options = {"shape": (1, 8, 8), "diffusion": Diffusion(SCHEDULE), "progress": False}
    assert fastddpm.sample(pipeline.unet, 1, **options).shape == (1, 1, 8, 8)


def test_twice_the_channels_are_of_a_learned_variance():
    options = {"shape": SHAPE, "progress": False}
    message = r"must return .* here; got \(1, 6, 4, 4\): .*variance='learned_range'"
    with pytest.raises(ValueError, match=message):
        fastddpm.sample(Network(2), 1, diffusion=Diffusion(SCHEDULE), **options)
    learned = Diffusion(SCHEDULE, variance="learned", loss="vlb")
    with pytest.raises(ValueError, match=r"got \(1, 3, 4, 4\): .*variance='learned' .* twice"):
        fastddpm.sample(Network(), 1, diffusion=learned, **options)
    with pytest.raises(ValueError, match=r"got \(1, 9, 4, 4\)$"):
        fastddpm.sample(Network(3), 1, diffusion=Diffusion(SCHEDULE), **options)


def test_networks_are_networks():
    """A network may have parts of such names."""

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.unet, self.model = Network(), GaussianDiffusion(Network())

        def forward(self, x, t):
            return self.unet(x, t)

    options = {"shape": SHAPE, "diffusion": Diffusion(SCHEDULE), "progress": False}
    for model in (Holder(), Network(), EMA(Network()), Wrapper(Network()), wave):
        assert fastddpm.sample(model, 2, **options).shape == (2, *SHAPE)
