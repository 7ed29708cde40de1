"""What denoising_diffusion_pytorch's GaussianDiffusion computes, written anew by its names: stands
in for the package in tests. Noise is drawn in float32 whatever it computes in.
"""

from __future__ import annotations

import itertools
import random
from collections import namedtuple

import torch
import torch.nn.functional as F
from torch import nn

from fastddpm import Schedule

Predictions = namedtuple("Predictions", "pred_noise pred_x_start")


def draw(x):
    return torch.randn_like(x, dtype=torch.float32).to(x.dtype)


def rows(values, t, x):
    return values[t].reshape(-1, *[1] * (x.dim() - 1))


class GaussianDiffusion(nn.Module):
    def __init__(
        self, model, *, image_size=4, timesteps=1000, sampling_timesteps=None, objective="pred_v",
        beta_schedule="sigmoid", ddim_sampling_eta=0.0, offset_noise_strength=0.0, gamma=None,
        immiscible=False, dtype=torch.float32,
    ):  # fmt: skip
        super().__init__()
        self.model, self.channels, self.self_condition = model, 1, model.self_condition
        self.image_size, self.objective = (image_size, image_size), objective
        schedule = {
            "sigmoid": Schedule.sigmoid, "cosine": Schedule.cosine,
            "linear": lambda T: Schedule.linear(T, scaled=True),
        }[beta_schedule](timesteps)  # fmt: skip
        self.num_timesteps, self.sampling_timesteps = timesteps, sampling_timesteps or timesteps
        self.is_ddim_sampling = self.sampling_timesteps < timesteps
        self.ddim_sampling_eta, self.immiscible = ddim_sampling_eta, immiscible
        self.offset_noise_strength = offset_noise_strength
        betas = torch.tensor(schedule.betas)
        ab = torch.cumprod(1 - betas, 0)
        prev = F.pad(ab[:-1], (1, 0), value=1.0)
        variance = betas * (1 - prev) / (1 - ab)
        snr = ab / (1 - ab)
        clipped = snr if gamma is None else snr.clamp(max=gamma)
        weight = {"pred_noise": clipped / snr, "pred_x0": clipped, "pred_v": clipped / (snr + 1)}
        for name, values in {
            "betas": betas, "alphas_cumprod": ab, "alphas_cumprod_prev": prev,
            "sqrt_alphas_cumprod": ab.sqrt(), "sqrt_one_minus_alphas_cumprod": (1 - ab).sqrt(),
            "sqrt_recip_alphas_cumprod": (1 / ab).sqrt(), "posterior_variance": variance,
            "sqrt_recipm1_alphas_cumprod": (1 / ab - 1).sqrt(),
            "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
            "posterior_mean_coef1": betas * prev.sqrt() / (1 - ab),
            "posterior_mean_coef2": (1 - prev) * (1 - betas).sqrt() / (1 - ab),
            "loss_weight": weight[objective],
        }.items():  # fmt: skip
            self.register_buffer(name, values.to(dtype))

    def normalize(self, x):
        return 2 * x - 1

    def unnormalize(self, x):
        return (x + 1) / 2

    def call(self, x, t, seen):
        return self.model(x.float(), t, None if seen is None else seen.float()).to(x.dtype)

    def predicted(self, x, t, output):
        if self.objective == "pred_x0":
            return output
        root, rest = self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod
        if self.objective == "pred_v":
            return rows(root, t, x) * x - rows(rest, t, x) * output
        recip, recipm1 = self.sqrt_recip_alphas_cumprod, self.sqrt_recipm1_alphas_cumprod
        return rows(recip, t, x) * x - rows(recipm1, t, x) * output

    def model_predictions(self, x, t, x_self_cond=None):
        return Predictions(None, self.predicted(x, t, self.call(x, t, x_self_cond)))

    def p_mean_variance(self, x, t, x_self_cond=None):
        x0 = self.model_predictions(x, t, x_self_cond).pred_x_start.clamp(-1, 1)
        mean = rows(self.posterior_mean_coef1, t, x) * x0
        mean = mean + rows(self.posterior_mean_coef2, t, x) * x
        return mean, rows(self.posterior_log_variance_clipped, t, x), x0

    @torch.inference_mode()
    def p_sample(self, x, t: int, x_self_cond=None):
        times = torch.full((len(x),), t)
        mean, log_variance, x0 = self.p_mean_variance(x, times, x_self_cond)
        return mean + (0.5 * log_variance).exp() * (draw(x) if t > 0 else 0), x0

    @torch.inference_mode()
    def p_sample_loop(self, shape, return_all_timesteps=False):
        x, x0 = torch.randn(shape).to(self.betas.dtype), None
        images = [x]
        for t in reversed(range(self.num_timesteps)):
            x, x0 = self.p_sample(x, t, x0 if self.self_condition else None)
            images.append(x)
        return self.unnormalize(torch.stack(images, 1) if return_all_timesteps else x)

    @torch.inference_mode()
    def ddim_sample(self, shape, return_all_timesteps=False):
        steps = torch.linspace(-1, self.num_timesteps - 1, self.sampling_timesteps + 1)
        steps = steps.int().tolist()[::-1]
        x, x0 = torch.randn(shape).to(self.betas.dtype), None
        images = [x]
        for now, after in itertools.pairwise(steps):
            t = torch.full((len(x),), now)
            seen = x0 if self.self_condition else None
            x0 = self.model_predictions(x, t, seen).pred_x_start.clamp(-1, 1)
            recip, recipm1 = self.sqrt_recip_alphas_cumprod, self.sqrt_recipm1_alphas_cumprod
            eps = (recip[now] * x - x0) / recipm1[now]
            if after < 0:
                x = x0
            else:
                a, b = self.alphas_cumprod[now], self.alphas_cumprod[after]
                sigma = self.ddim_sampling_eta * ((1 - a / b) * (1 - b) / (1 - a)).sqrt()
                x = x0 * b.sqrt() + (1 - b - sigma**2).sqrt() * eps + sigma * draw(x)
            images.append(x)
        return self.unnormalize(torch.stack(images, 1) if return_all_timesteps else x)

    def sample(self, batch_size=16, return_all_timesteps=False):
        loop = self.ddim_sample if self.is_ddim_sampling else self.p_sample_loop
        return loop((batch_size, self.channels, *self.image_size), return_all_timesteps)

    def noise_assignment(self, x_start, noise):
        return torch.arange(len(noise) - 1, -1, -1)  # a pairing of its own

    def q_sample(self, x_start, t, noise=None):
        noise = draw(x_start) if noise is None else noise
        if self.immiscible:
            noise = noise[self.noise_assignment(x_start, noise)]
        root, rest = self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod
        return rows(root, t, x_start) * x_start + rows(rest, t, x_start) * noise

    def p_losses(
        self, x_start, t, noise=None, offset_noise_strength=None, loss_reduction="mean"
    ):  # fmt: skip
        noise = draw(x_start) if noise is None else noise
        offset = offset_noise_strength
        offset = self.offset_noise_strength if offset is None else offset
        if offset > 0:
            noise = noise + offset * torch.randn(x_start.shape[:2]).to(noise)[:, :, None, None]
        x, seen = self.q_sample(x_start, t, noise), None
        if self.self_condition and random.random() < 0.5:
            with torch.no_grad():
                seen = self.model_predictions(x, t).pred_x_start
        output = self.call(x, t, seen)
        root, rest = self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod
        v = rows(root, t, x) * noise - rows(rest, t, x) * x_start
        target = {"pred_noise": noise, "pred_x0": x_start, "pred_v": v}[self.objective]
        loss = ((output - target) ** 2).flatten(1).mean(1) * self.loss_weight[t]
        return loss if loss_reduction == "none" else loss.mean()

    def forward(self, img, *args, **kwargs):
        times = torch.randint(0, self.num_timesteps, (len(img),))
        return self.p_losses(self.normalize(img), times, *args, **kwargs)
