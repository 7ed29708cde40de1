"""The reverse chain as others write it: a plain loop in float64, from the published formulas."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fastddpm import Schedule

Noise = Callable[[int], Tensor]


def plain(
    model: Callable[..., Tensor],
    x: Tensor,
    z: Noise,
    *,
    schedule: Schedule,
    start: int | None = None,
    clip: bool = True,
    variance: str = "fixed_large",
    eta: float | None = None,
    denoised_fn: Callable[[Tensor], Tensor] | None = None,
    cond_fn: Callable[..., Tensor] | None = None,
    self_condition: bool = False,
    **model_kwargs: Tensor,
) -> Tensor:
    """x_0 of x_t at `start` steps, of a model that predicts eps.

    z(i): the noise of the step at the chain index i. eta: DDIM's, None for DDPM. The gradient is
    guided-diffusion's condition_mean, or its condition_score for DDIM; the prediction shown to a
    self-conditioned model is lucidrains'."""
    beta, ab = schedule.betas, np.cumprod(1 - schedule.betas)
    x, last = x.double(), torch.zeros_like(x, dtype=torch.float64)
    for i in reversed(range(schedule.T if start is None else start)):
        t = torch.full((len(x),), int(schedule.timesteps[i]))
        before = ab[i - 1] if i else 1.0
        eps = model(x, t, *[last] * self_condition, **model_kwargs)
        x0 = (x - np.sqrt(1 - ab[i]) * eps) / np.sqrt(ab[i])
        x0 = x0 if denoised_fn is None else denoised_fn(x0)
        x0 = last = x0.clamp(-1, 1) if clip else x0
        gradient = 0 if cond_fn is None else cond_fn(x, t, **model_kwargs)
        tilde = beta[i] * (1 - before) / (1 - ab[i])
        if eta is not None:
            eps = (x - np.sqrt(ab[i]) * x0) / np.sqrt(1 - ab[i])
            eps = eps - np.sqrt(1 - ab[i]) * gradient
            x0 = (x - np.sqrt(1 - ab[i]) * eps) / np.sqrt(ab[i])
            sigma = eta * np.sqrt(tilde)
            x = np.sqrt(before) * x0 + np.sqrt(1 - before - sigma**2) * eps
        else:
            mean = np.sqrt(before) * beta[i] * x0 + np.sqrt(1 - beta[i]) * (1 - before) * x
            var = {"fixed_small": tilde, "fixed_large": beta[i]}[variance]
            if i == 0 and variance == "fixed_large":
                var = beta[1] * (1 - ab[0]) / (1 - ab[1])  # OpenAI's: beta-tilde of the step before
            x, sigma = mean / (1 - ab[i]) + var * gradient, np.sqrt(var)
        x = x + (sigma * z(i).double() if i else 0)
    return x
