"""What other people's trainers and samplers compute, written anew by their names and arguments:
stand in for them in tests, around the networks of peers.py and port_plain.py.
"""

from __future__ import annotations

import itertools
import types

import torch
import torch.nn.functional as F
from peers import W86, OpenAI, Tqch
from port_plain import Port
from torch import Tensor, nn

from fastddpm import Schedule


def rows(values, t: Tensor) -> Tensor:
    return torch.tensor(values)[t.long()].float()[:, None, None, None]


class Process:
    """Eq. 4 and Algorithm 2 with sigma^2 = beta, x0 predictions clipped or not."""

    def __init__(self, T: int, clip: bool):
        self.T, self.clip, s = T, clip, Schedule.linear(T, 1e-4, 0.02)
        self.betas, self.ab, self.before = s.betas, s.alphas_cumprod, s.alphas_cumprod_prev

    def noised(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        return rows(self.ab**0.5, t) * x0 + rows((1 - self.ab) ** 0.5, t) * eps

    def step(self, model, x: Tensor, t: Tensor) -> Tensor:
        ab, before, beta = (rows(v, t) for v in (self.ab, self.before, self.betas))
        x0 = (x - (1 - ab).sqrt() * model(x, t)) / ab.sqrt()
        x0 = x0.clamp(-1, 1) if self.clip else x0
        mean = (
            before.sqrt() * beta / (1 - ab) * x0 + (1 - beta).sqrt() * (1 - before) / (1 - ab) * x
        )
        return mean + (t > 0).float()[:, None, None, None] * beta.sqrt() * torch.randn_like(x)

    def chain(self, model, x: Tensor, float_t: bool = False) -> Tensor:
        with torch.no_grad():
            for i in reversed(range(self.T)):
                t = torch.full((len(x),), i)
                x = self.step(model, x, t.float() if float_t else t)
        return x


# ---- w86763777/pytorch-ddpm: the modules model and diffusion -------------------------------------


class W86Trainer(nn.Module):
    def __init__(self, model, beta_1: float, beta_T: float, T: int):
        super().__init__()
        self.model, self.process = model, Process(T, clip=False)

    def forward(self, x_0: Tensor) -> Tensor:
        t, noise = torch.randint(self.process.T, (len(x_0),)), torch.randn_like(x_0)
        output = self.model(self.process.noised(x_0, t, noise), t)
        return F.mse_loss(output, noise, reduction="none")


class W86Sampler(nn.Module):
    def __init__(self, model, beta_1, beta_T, T: int, img_size: int, mean_type, var_type):
        super().__init__()
        assert (mean_type, var_type) == ("epsilon", "fixedlarge")
        self.model, self.process = model, Process(T, clip=False)

    def forward(self, x_T: Tensor) -> Tensor:
        return self.process.chain(self.model, x_T).clip(-1, 1)


def w86763777() -> dict[str, types.SimpleNamespace]:
    def network(T, ch, ch_mult, attn, num_res_blocks, dropout):
        return W86(T, ch, ch_mult, attn, num_res_blocks)

    process = {"GaussianDiffusionTrainer": W86Trainer, "GaussianDiffusionSampler": W86Sampler}
    model, diffusion = types.SimpleNamespace(UNet=network), types.SimpleNamespace(**process)
    return {"model": model, "diffusion": diffusion}


# ---- tqch/ddpm-torch -----------------------------------------------------------------------------


class TqchTrainer:
    def __init__(
        self, model, optimizer, diffusion: Process, epochs: int, trainloader, *, shape, num_samples,
        image_intv=1,
    ):  # fmt: skip
        self.model, self.optimizer, self.diffusion = model, optimizer, diffusion
        self.batches, self.shape = trainloader, shape

    def train(self) -> None:
        self.model.train()
        for x_0 in self.batches:
            t, noise = torch.randint(self.diffusion.T, (len(x_0),)), torch.randn_like(x_0)
            output = self.model(self.diffusion.noised(x_0, t, noise), t)
            self.optimizer.zero_grad()
            (noise - output).pow(2).mean().backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()

    def sample_fn(self, sample_size: int) -> Tensor:
        return self.diffusion.chain(self.model, torch.randn(sample_size, *self.shape))


def tqch() -> dict[str, types.SimpleNamespace]:
    def network(in_channels, hid_channels, out_channels, ch_multipliers, num_res_blocks,
                apply_attn, drop_rate):  # fmt: skip
        return Tqch(hid_channels, ch_multipliers, num_res_blocks, apply_attn, in_channels)

    def process(betas, model_mean_type, model_var_type, loss_type):
        assert (model_mean_type, model_var_type, loss_type) == ("eps", "fixed-large", "mse")
        return Process(len(betas), clip=True)

    def betas(kind, first, last, T):
        return torch.linspace(first, last, T, dtype=torch.float64)

    return {"ddpm_torch": types.SimpleNamespace(
        UNet=network, Trainer=TqchTrainer, GaussianDiffusion=process, get_beta_schedule=betas,
    )}  # fmt: skip


# ---- pesser/pytorch_diffusion --------------------------------------------------------------------


class PortDiffusion:
    def __init__(self, diffusion_config, model_config, device):
        size, (mult, blocks) = model_config["resolution"], (
            model_config[name] for name in ("ch_mult", "num_res_blocks")
        )  # fmt: skip
        levels = [i for i in range(len(mult)) if size >> i in model_config["attn_resolutions"]]
        self.model = Port(
            model_config["ch"], channel_mult=mult, num_res_blocks=blocks, image_size=size,
            attention_levels=levels,
        )  # fmt: skip
        self.process = Process(diffusion_config["num_diffusion_timesteps"], clip=True)
        self.shape = (model_config["in_channels"], size, size)

    def denoise(self, n: int, progress_bar=None) -> Tensor:
        return self.process.chain(self.model, torch.randn(n, *self.shape), float_t=True)


def port() -> dict[str, types.SimpleNamespace]:
    return {"pytorch_diffusion.diffusion": types.SimpleNamespace(Diffusion=PortDiffusion)}


# ---- openai/guided-diffusion ---------------------------------------------------------------------


def openai() -> dict[str, types.SimpleNamespace]:
    def network(image_size, dropout, **options):
        return OpenAI(**options)

    return {"guided_diffusion.unet": types.SimpleNamespace(UNetModel=network)}


# ---- NVlabs/edm ----------------------------------------------------------------------------------


class Conv2d(nn.Module):
    """Theirs where it does not resample: a class of its own, with a bias that is added after."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.in_channels, self.out_channels, self.up, self.down = c_in, c_out, False, False
        self.weight = nn.Parameter(torch.randn(c_out, c_in, 3, 3) * (9 * c_in) ** -0.5)
        self.bias = nn.Parameter(torch.zeros(c_out))
        self.register_buffer("resample_filter", None)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, padding=1).add_(self.bias.reshape(1, -1, 1, 1))


class Precond(nn.Module):
    """The preconditioning of a network of three convolutions."""

    def __init__(self, img_resolution: int, img_channels: int, *, model_type, model_channels):
        super().__init__()
        self.first, self.last = Conv2d(img_channels, model_channels), Conv2d(model_channels, 3)
        self.inner = Conv2d(model_channels, model_channels)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        x, sigma = x.float(), sigma.float().reshape(-1, 1, 1, 1)
        rest = 1 / (sigma**2 + 0.25)
        h = F.silu(self.inner(F.silu(self.first(x * rest.sqrt()))))
        return 0.25 * rest * x + 0.5 * sigma * rest.sqrt() * self.last(h)


class EDMLoss:
    def __call__(self, net, images: Tensor) -> Tensor:
        sigma = (1.2 * torch.randn(len(images), 1, 1, 1) - 1.2).exp()
        noised = images + sigma * torch.randn_like(images)
        return (sigma**2 + 0.25) / (sigma * 0.5) ** 2 * (net(noised, sigma) - images) ** 2


def edm_sampler(net, latents: Tensor, num_steps: int) -> Tensor:
    """Euler's rule alone."""
    ends = 80.0 ** (1 / 7), 0.002 ** (1 / 7)
    sigmas = [*torch.linspace(*ends, num_steps, dtype=torch.float64) ** 7, torch.tensor(0.0)]
    x = latents.double() * sigmas[0]
    for now, after in itertools.pairwise(sigmas):
        x = x + (after - now) * (x - net(x, now).double()) / now
    return x


def edm() -> dict[str, types.SimpleNamespace]:
    return {
        "training.networks": types.SimpleNamespace(EDMPrecond=Precond),
        "training.loss": types.SimpleNamespace(EDMLoss=EDMLoss),
        "generate": types.SimpleNamespace(edm_sampler=edm_sampler),
    }
