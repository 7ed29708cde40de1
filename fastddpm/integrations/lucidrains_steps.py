"""The methods of denoising_diffusion_pytorch's GaussianDiffusion that are more than a network's
call, each a fused pass. `self` is such an object: its float32 buffers are the coefficients.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from fastddpm import ops
from fastddpm.integrations.images import as_images, compute_dtype, laid_out_as
from fastddpm.progress import tqdm
from fastddpm.schedule import K

OBJECTIVES = {"pred_noise": "eps", "pred_x0": "x0", "pred_v": "v"}  # in ops' words


def q_sample(self: Any, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise; an immiscible process pairs images and noise
    first.
    """
    noise = torch.randn_like(x_start) if noise is None else noise
    if getattr(self, "immiscible", False):
        noise = noise[self.noise_assignment(x_start, noise)]
    return _mixture(self.sqrt_alphas_cumprod, x_start, self.sqrt_one_minus_alphas_cumprod, noise, t)


@torch.inference_mode()
def p_sample(
    self: Any, x: Tensor, t: int, x_self_cond: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(x_{t-1}, the clipped x0 that it was made from); no noise is drawn at t = 0."""
    times = torch.full((len(x),), t, dtype=torch.int64, device=self.betas.device)
    output = self.model(x, times, x_self_cond)
    sigma = (0.5 * self.posterior_log_variance_clipped).exp()
    sigma[0] = 0
    table = _table(self, self.posterior_mean_coef1, self.posterior_mean_coef2, sigma)
    noise = torch.randn_like(x) if t > 0 else x
    return _step(self, x, output, times, table, noise), _x0(self, x, output, times)


@torch.inference_mode()
def ddim_sample(self: Any, shape: Any, return_all_timesteps: bool = False) -> Tensor:
    """x_0 by DDIM over sampling_timesteps of the steps, as images that `unnormalize` gives back."""
    times = torch.linspace(-1, self.num_timesteps - 1, steps=self.sampling_timesteps + 1)
    chain = torch.tensor(times.int().tolist()[::-1], device=self.betas.device)
    table = _ddim_table(self, chain)
    x = torch.randn(tuple(shape), dtype=torch.float32, device=self.betas.device)
    images, x0, last = [x], None, len(chain) - 2
    for i in tqdm(range(last + 1), desc="sampling loop time step"):
        row = torch.full((len(x),), i, dtype=torch.int64, device=x.device)
        t = chain[i].expand(len(x))
        output = self.model(x, t, x0 if self.self_condition else None)
        noise = torch.randn_like(x) if i < last else x
        if self.self_condition:
            x0 = _x0(self, x, output, t)
        x = _step(self, x, output, row, table, noise)
        images.append(x)
    return self.unnormalize(torch.stack(images, dim=1) if return_all_timesteps else x)


def p_losses(
    self: Any,
    x_start: Tensor,
    t: Tensor,
    noise: Tensor | None = None,
    offset_noise_strength: float | None = None,
    loss_reduction: str = "mean",
) -> Tensor:
    """The weighted mean squared error of what the network predicts: of the batch, or (N,) with
    loss_reduction="none".
    """
    noise = torch.randn_like(x_start) if noise is None else noise
    strength = offset_noise_strength
    if strength is None:
        strength = self.offset_noise_strength
    if strength > 0:
        offset = torch.randn(x_start.shape[:2], dtype=torch.float32, device=self.betas.device)
        noise = noise + strength * offset[:, :, None, None]
    x = self.q_sample(x_start=x_start, t=t, noise=noise)
    seen = None
    if self.self_condition and random.random() < 0.5:
        with torch.no_grad():
            seen = self.model_predictions(x, t).pred_x_start.detach()
    output = self.model(x, t, seen)
    target = {"pred_noise": noise, "pred_x0": x_start}.get(self.objective)
    if target is None:
        root, rest = self.sqrt_alphas_cumprod, -self.sqrt_one_minus_alphas_cumprod
        target = _mixture(root, noise, rest, x_start, t)
    dtype = compute_dtype(output, target)
    loss = ops.squared_error(output.to(dtype), target.to(dtype)) * self.loss_weight[t]
    return loss if loss_reduction == "none" else loss.mean()


STEPS = {
    "q_sample": q_sample,
    "p_sample": p_sample,
    "ddim_sample": ddim_sample,
    "p_losses": p_losses,
}


def _table(self: Any, mean_x0: Tensor, mean_xt: Tensor, sigma: Tensor) -> Tensor:
    """ops' table of all T steps; the last column is of no use here."""
    return torch.stack(
        (*_of_x0(self), mean_x0, mean_xt, sigma, self.posterior_log_variance_clipped), dim=1
    )


def _of_x0(self: Any) -> tuple[Tensor, ...]:
    """The columns that an x0 prediction takes."""
    return (
        self.sqrt_alphas_cumprod,
        self.sqrt_one_minus_alphas_cumprod,
        self.sqrt_recip_alphas_cumprod,
        self.sqrt_recipm1_alphas_cumprod,
    )


def _ddim_table(self: Any, chain: Tensor) -> Tensor:
    """A row for each step from chain[i] to chain[i + 1], DDIM's Eq. 12 in x0 and x_t; the one that
    ends at -1 gives x0.
    """
    now, after = chain[:-1], chain[1:]
    eta = self.ddim_sampling_eta
    ab = self.alphas_cumprod.double()
    ab_after = torch.where(after < 0, 1.0, ab[after.clamp(min=0)])
    ab = ab[now]
    sigma = eta * ((1 - ab / ab_after) * (1 - ab_after) / (1 - ab)).sqrt()
    mean_xt = ((1 - ab_after - sigma**2) / (1 - ab)).sqrt()
    mean_x0 = ab_after.sqrt() - mean_xt * ab.sqrt()
    own = [column[now].double() for column in _of_x0(self)]
    return torch.stack((*own, mean_x0, mean_xt, sigma, torch.zeros_like(ab)), dim=1).float()


def _step(self: Any, x: Tensor, output: Tensor, t: Tensor, table: Tensor, noise: Tensor) -> Tensor:
    dtype = compute_dtype(x, output)
    image = ops.posterior_step(
        x.to(dtype), output.to(dtype), t, table, z=noise.to(dtype), clip=True,
        prediction=OBJECTIVES[self.objective],  # type: ignore[arg-type]
    )  # fmt: skip
    # Their sum begins with x0, which is the output itself or begins with x_t.
    return laid_out_as(image, output if self.objective == "pred_x0" else x)


def _x0(self: Any, x: Tensor, output: Tensor, t: Tensor) -> Tensor:
    """The clipped x0 prediction."""
    if self.objective == "pred_x0":
        return output.to(compute_dtype(x, output)).clamp(-1, 1)
    root, rest, recip, recipm1 = _of_x0(self)
    first, second = (recip, recipm1) if self.objective == "pred_noise" else (root, rest)
    return _mixture(first, x, -second, output, t).clamp_(-1, 1)


def _mixture(a: Tensor, x: Tensor, b: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """a_t x + b_t y in one pass, float32 or float64; a, b: (T,) float32."""
    dtype = compute_dtype(x, y)
    table = torch.stack((a, b, *[torch.zeros_like(a)] * (K - 2)), dim=1)
    images, other = as_images(x.to(dtype)), as_images(y.to(dtype))
    return ops.noise(images, t, table, eps=other, dtype=dtype)[0].reshape(x.shape)
