"""Small models with known answers, shared by the tests of everything above the ops."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastddpm import Diffusion, Schedule, UNet, reference

PREDICTIONS = ("eps", "x0", "mean", "v")
SCHEDULE = Schedule.linear(12, 0.01, 0.35)  # few steps that end near N(0, I): abar_T = 0.08


def images(*shape: int, seed: int = 0) -> Tensor:
    """Random uint8 images, 0 and 255 among their pixels."""
    x = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator(seed))
    x.view(-1)[:2] = torch.tensor([0, 255], dtype=torch.uint8)
    return x


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny_unet(*, seed: int = 0, **options) -> UNet:
    """A UNet of 45,000 parameters, all of them random: a fresh one's output would be all but 0."""
    model = UNet(
        **{
            "image_size": 8,
            "in_channels": 1,
            "channels": 8,
            "channel_mult": (1, 2),
            "num_res_blocks": 1,
            "num_groups": 4,
            "diffusion": Diffusion(SCHEDULE),
            **options,
        }
    )
    random = generator(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 0.1 if p.dim() == 1 else p[0].numel() ** -0.5
            p.copy_(torch.randn(p.shape, generator=random) * scale + float("norm" in name) / 2)
    return model.eval()


def wave(x: Tensor, t: Tensor) -> Tensor:
    """An elementwise model: no sample of a batch knows of another, so results agree to the bit."""
    return torch.sin(3 * x + t[:, None, None, None])


class Oracle:
    """The model that knows x0, so that its prediction is exact; computed in float64."""

    def __init__(self, diffusion: Diffusion, x0: Tensor, log_variance: Tensor | None = None):
        self.diffusion, self.log_variance = diffusion, log_variance
        self.x0 = (reference.to_unit(x0) if x0.dtype == torch.uint8 else x0).double()

    def __call__(self, xt: Tensor, t: Tensor) -> Tensor:
        schedule = self.diffusion.schedule
        ab, ab_prev, beta = (
            torch.tensor(values)[t][:, None, None, None]
            for values in (schedule.alphas_cumprod, schedule.alphas_cumprod_prev, schedule.betas)
        )
        xt = xt.double()
        if self.diffusion.prediction == "eps":
            output = (xt - ab.sqrt() * self.x0) / (1 - ab).sqrt()
        elif self.diffusion.prediction == "x0":
            output = self.x0
        elif self.diffusion.prediction == "v":
            output = (ab.sqrt() * xt - self.x0) / (1 - ab).sqrt()
        else:
            output = ab_prev.sqrt() * beta * self.x0 + (1 - beta).sqrt() * (1 - ab_prev) * xt
            output = output / (1 - ab)
        if self.log_variance is not None:
            log_variance = self.log_variance[t][:, None, None, None].expand_as(xt)
            output = torch.cat((output, log_variance.double()), dim=1)
        return output.float()


class Gaussian:
    """The best eps(x, t) for data N(mean, std^2 I): E[eps | x_t], linear in x_t."""

    def __init__(self, schedule: Schedule, mean: float, std: float):
        ab = np.cumprod(1 - schedule.betas)
        self.gain = np.sqrt(1 - ab) / (ab * std**2 + 1 - ab)
        self.centre = np.sqrt(ab) * mean

    def __call__(self, xt: Tensor, t: Tensor) -> Tensor:
        gain, centre = (
            torch.from_numpy(values).float()[t][:, None, None, None]
            for values in (self.gain, self.centre)
        )
        return gain * (xt - centre)


class Optimal:
    """The best model of data N(0, std^2), in closed form: with v_t = Var(x_t),

    E[eps | x_t] = sqrt(1 - abar_t) x_t / v_t and E[x_0 | x_t] = sqrt(abar_t) std^2 x_t / v_t,
    E[x_{t-1} | x_t] = sqrt(alpha_t) v_{t-1} x_t / v_t,  Var(x_{t-1} | x_t) = beta_t v_{t-1} / v_t.
    A learned range has the fraction at which that variance's logarithm lies.
    """

    def __init__(self, diffusion: Diffusion, std: float, error: float = 0.0):
        schedule = diffusion.schedule
        ab = np.cumprod(1 - schedule.betas)
        v = ab * std**2 + 1 - ab
        before = np.append(std**2, v[:-1])
        gain = {
            "eps": np.sqrt(1 - ab) / v,
            "x0": np.sqrt(ab) * std**2 / v,
            "mean": np.sqrt(schedule.alphas) * before / v,
            "v": np.sqrt(ab * (1 - ab)) * (1 - std**2) / v,
        }[diffusion.prediction]
        self.gain = torch.tensor(gain, dtype=torch.float32)
        self.log_variance = None
        if diffusion.learns_variance:
            log_variance = np.log(schedule.betas * before / v)
            if diffusion.variance == "learned_range":
                lower, way = schedule.log_variance_bounds()
                log_variance = 2 * (log_variance - lower) / way - 1
            self.log_variance = torch.tensor(log_variance, dtype=torch.float32) + error

    def __call__(self, xt: Tensor, t: Tensor) -> Tensor:
        output = self.gain[t][:, None, None, None] * xt
        if self.log_variance is None:
            return output
        log_variance = self.log_variance[t][:, None, None, None].expand_as(xt)
        return torch.cat((output, log_variance), dim=1)
