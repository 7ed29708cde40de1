"""Who takes part in benchmarks/drop_in.py: the networks of people's trainers at CIFAR-10's size, a
step of their chain and of their training, and the line of ours for each. No clock and no table.

A network is the project's own where its code is found (--code), else the one of tests/peers.py,
which is written from what is published of it."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from contestants import installed
from torch import Tensor, nn

import fastddpm
from fastddpm.integrations import diffusers as our_diffusers
from fastddpm.integrations import openai as our_openai

sys.path.append(str(Path(__file__).parent.parent / "tests"))

import peers

T, SHAPE, LR, CLIP = 1000, (3, 32, 32), 2e-4, 1.0
MULT, BLOCKS = (1, 2, 2, 2), 2
_THEIR_PROCESS = "guided_diffusion.gaussian_diffusion"


class Trainer:
    """A trainer of theirs around a network, or the same with our line.

    network: the module that is trained;  sample(x, i): one step of their chain, x_i -> x_{i-1};
    loss(x0): theirs of a batch in [-1, 1];  both draw from torch's generator
    """

    line = "fastddpm.accelerate(model)"  # what is put in
    known = True  # whether the network is one that accelerate recognises

    def __init__(self, width: int):
        self.network = self.make(width)
        peers.randomised(self.network)
        self.first = {k: v.clone() for k, v in self.network.state_dict().items()}
        self.optimiser: torch.optim.Optimizer | None = None

    def reset(self) -> None:
        """As it was made, but for its form."""
        self.network.load_state_dict(self.first)
        self.optimiser = None

    def make(self, width: int) -> nn.Module:
        raise NotImplementedError

    def put_in(self) -> None:
        fastddpm.accelerate(self.network)

    def sample(self, x: Tensor, i: int) -> Tensor:
        raise NotImplementedError

    def loss(self, x0: Tensor) -> Tensor:
        raise NotImplementedError

    def training_step(self, x0: Tensor) -> Tensor:
        """Theirs, with torch's fused Adam and clipping by foreach, the fastest that there are."""
        self.network.train()
        if self.optimiser is None:
            self.optimiser = torch.optim.Adam(self.network.parameters(), lr=LR, fused=True)
        self.optimiser.zero_grad()
        loss = self.loss(x0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), CLIP, foreach=True)
        self.optimiser.step()
        return loss.detach()


class Gaussian(Trainer):
    """Eq. 14 and Algorithm 2 in torch's ops, float32 coefficients of float64 tables, as all of
    these projects compute them around their networks."""

    def __init__(self, width: int):
        super().__init__(width)
        s = fastddpm.Schedule.linear(T, 1e-4, 0.02)
        ab, before, beta = map(torch.tensor, (s.alphas_cumprod, s.alphas_cumprod_prev, s.betas))
        self.root, self.rest = ab.sqrt(), (1 - ab).sqrt()
        self.recip, self.recipm1 = (1 / ab).sqrt(), (1 / ab - 1).sqrt()
        self.mean_x0 = beta * before.sqrt() / (1 - ab)
        self.mean_xt = (1 - beta).sqrt() * (1 - before) / (1 - ab)
        self.log_variance = torch.cat(((beta * (1 - before) / (1 - ab))[1:2], beta[1:])).log()

    def rows(self, values: Tensor, t: Tensor) -> Tensor:
        return values.gather(0, t).float()[:, None, None, None]

    def sample(self, x: Tensor, i: int) -> Tensor:
        self.network.eval()
        with torch.no_grad():
            t = torch.full((len(x),), i)
            eps = self.network(x, t)
            x0 = self.rows(self.recip, t) * x - self.rows(self.recipm1, t) * eps
            x0 = x0.clamp(-1, 1)
            mean = self.rows(self.mean_x0, t) * x0 + self.rows(self.mean_xt, t) * x
            return mean + (0.5 * self.rows(self.log_variance, t)).exp() * torch.randn_like(x)

    def loss(self, x0: Tensor) -> Tensor:
        t, eps = torch.randint(T, (len(x0),)), torch.randn_like(x0)
        xt = self.rows(self.root, t) * x0 + self.rows(self.rest, t) * eps
        return nn.functional.mse_loss(self.network(xt, t), eps)


class W86763777(Gaussian):
    def make(self, width: int) -> nn.Module:
        if theirs := own("model", "UNet"):
            return theirs(T, width, MULT, attn=[1], num_res_blocks=BLOCKS, dropout=0.0)
        return without_dropout(peers.W86(T, width, MULT, (1,), BLOCKS))


class Tqch(Gaussian):
    def make(self, width: int) -> nn.Module:
        attended = (False, True, False, False)
        if theirs := own("ddpm_torch", "UNet"):
            return theirs(3, width, 3, MULT, BLOCKS, attended)
        return peers.Tqch(width, MULT, BLOCKS, attended)


class Port(Gaussian):
    def make(self, width: int) -> nn.Module:
        if theirs := own("pytorch_diffusion.model", "Model"):
            return theirs(
                ch=width, out_ch=3, ch_mult=MULT, num_res_blocks=BLOCKS, attn_resolutions=(16,),
                in_channels=3, resolution=32,
            )  # fmt: skip
        port = importlib.import_module("port_plain").Port
        return port(
            width, image_size=32, channel_mult=MULT, num_res_blocks=BLOCKS, attention_levels=(1,)
        )


class OpenAI(Gaussian):
    """guided-diffusion's network with scale and shift. With their code: its process, a learned
    range, whose place fastddpm.integrations.openai's of the same names takes."""

    line = "fastddpm.accelerate(model); from fastddpm.integrations import openai as gd"

    def __init__(self, width: int):
        super().__init__(width)
        there = found(_THEIR_PROCESS)
        self.process = self._process(importlib.import_module(_THEIR_PROCESS)) if there else None

    def _process(self, module: Any) -> Any:
        return module.GaussianDiffusion(
            betas=our_openai.get_named_beta_schedule("linear", T),
            model_mean_type=module.ModelMeanType.EPSILON,
            model_var_type=module.ModelVarType.LEARNED_RANGE,
            loss_type=module.LossType.RESCALED_MSE,
        )

    def make(self, width: int) -> nn.Module:
        options = {
            "in_channels": 3, "model_channels": width, "num_res_blocks": BLOCKS,
            "attention_resolutions": (2, 4), "channel_mult": MULT, "num_heads": 4,
            "use_scale_shift_norm": True,
        }  # fmt: skip
        if theirs := own("guided_diffusion.unet", "UNetModel"):
            return theirs(image_size=32, out_channels=6, **options)
        return without_dropout(peers.OpenAI(out_channels=3, **options))

    def put_in(self) -> None:
        super().put_in()
        if self.process is not None:
            self.process = self._process(our_openai)

    def sample(self, x: Tensor, i: int) -> Tensor:
        if self.process is None:
            return super().sample(x, i)
        self.network.eval()
        with torch.no_grad():
            return self.process.p_sample(self.network, x, torch.full((len(x),), i))["sample"]

    def loss(self, x0: Tensor) -> Tensor:
        if self.process is None:
            return super().loss(x0)
        t = torch.randint(T, (len(x0),))
        return self.process.training_losses(self.network, x0, t)["loss"].mean()


class Diffusers(Trainer):
    """The google/ddpm-cifar10-32 network, DDPMScheduler, and the loop of train_unconditional.py."""

    line = "fastddpm.accelerate(pipe.unet); pipe.scheduler = DDPMScheduler.from_config(...)"

    def __init__(self, width: int):
        super().__init__(width)
        from diffusers import DDPMScheduler

        self.scheduler: Any = DDPMScheduler(variance_type="fixed_large")

    def make(self, width: int) -> nn.Module:
        from diffusers import UNet2DModel

        return UNet2DModel(
            sample_size=32, block_out_channels=[width * k for k in MULT], layers_per_block=BLOCKS,
            down_block_types=["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
            up_block_types=["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
            attention_head_dim=None, norm_eps=1e-6, downsample_padding=0, flip_sin_to_cos=False,
            freq_shift=1,
        )  # fmt: skip

    def put_in(self) -> None:
        super().put_in()
        self.scheduler = our_diffusers.DDPMScheduler.from_config(self.scheduler.config)

    def sample(self, x: Tensor, i: int) -> Tensor:
        self.network.eval()
        with torch.no_grad():
            return self.scheduler.step(self.network(x, i).sample, i, x).prev_sample

    def loss(self, x0: Tensor) -> Tensor:
        eps, t = torch.randn_like(x0), torch.randint(0, T, (len(x0),))
        xt = self.scheduler.add_noise(x0, eps, t)
        return nn.functional.mse_loss(self.network(xt, t, return_dict=False)[0], eps)


class Lucidrains(Trainer):
    """Its Unet, and its GaussianDiffusion with the objective pred_noise."""

    line, known = "fastddpm.accelerate(diffusion)", False

    def make(self, width: int) -> nn.Module:
        package: Any = importlib.import_module("denoising_diffusion_pytorch")
        unet = package.Unet(dim=width, dim_mults=MULT, flash_attn=True)
        return package.GaussianDiffusion(
            unet, image_size=32, timesteps=T, objective="pred_noise", beta_schedule="linear"
        )

    def sample(self, x: Tensor, i: int) -> Tensor:
        self.network.eval()
        return self.network.p_sample(x, i)[0]  # type: ignore[operator]

    def loss(self, x0: Tensor) -> Tensor:
        return self.network((x0 + 1) / 2)


class EDM(Trainer):
    """NVlabs/edm's DDPM++ network, one evaluation of its Euler step, and its loss."""

    known = False

    def make(self, width: int) -> nn.Module:
        theirs: Any = own("training.networks", "EDMPrecond")
        return theirs(32, 3, model_type="SongUNet", model_channels=width, dropout=0.0)

    def sample(self, x: Tensor, i: int) -> Tensor:
        self.network.eval()
        now, after = torch.tensor([80.0, 60.0], dtype=torch.float64) * (i + 1) / T
        with torch.no_grad():
            denoised = self.network(x, now).double()
            return (x + (after - now) * (x - denoised) / now).float()

    def loss(self, x0: Tensor) -> Tensor:
        loss: Any = own("training.loss", "EDMLoss")
        return loss()(net=self.network, images=x0).mean()


@dataclass(frozen=True)
class Entry:
    """build: makes it;  theirs: the module of the project's own code;  needs: a package or module
    without which it can't take part"""

    build: Callable[[int], Trainer]
    theirs: str
    needs: str | None = None

    def missing(self) -> str | None:
        if self.needs and not found(self.needs):
            return f"{self.needs} is not here"
        return None

    def network(self) -> str:
        return self.theirs if found(self.theirs) else "as published (tests/)"


TRAINERS = {
    "w86763777/pytorch-ddpm": Entry(W86763777, "model"),
    "tqch/ddpm-torch": Entry(Tqch, "ddpm_torch"),
    "pesser/pytorch_diffusion": Entry(Port, "pytorch_diffusion"),
    "openai/guided-diffusion": Entry(OpenAI, "guided_diffusion"),
    "diffusers": Entry(Diffusers, "diffusers", "diffusers"),
    "lucidrains": Entry(
        Lucidrains, "denoising_diffusion_pytorch", "denoising_diffusion_pytorch"
    ),
    "NVlabs/edm": Entry(EDM, "training.networks", "training.networks"),
}  # fmt: skip


def found(module: str) -> bool:
    with contextlib.suppress(ImportError):
        return importlib.util.find_spec(module) is not None
    return False


def own(module: str, name: str) -> Any:
    """That name of the project's own code, or None where it is not here."""
    return getattr(importlib.import_module(module), name) if found(module) else None


def without_dropout(network: nn.Module) -> nn.Module:
    """As all networks are here, so that both sides compute the same."""
    for layer in network.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return network


def versions() -> dict[str, str]:
    return installed(("diffusers", "denoising_diffusion_pytorch"))


# ---- diffusers' scheduler alone ------------------------------------------------------------------


def scheduler_calls(batch: int) -> Iterator[tuple[str, Callable[[], Tensor], Callable[[], Tensor]]]:
    """(name, theirs, ours) of what a DDPMScheduler computes; each gives what is compared."""
    from diffusers import DDPMScheduler

    theirs: Any = DDPMScheduler(variance_type="fixed_large")
    ours = our_diffusers.DDPMScheduler.from_config(theirs.config)
    random = torch.Generator().manual_seed(0)
    x, e = torch.randn(2, batch, *SHAPE, generator=random)
    t = torch.randint(0, T, (batch,), generator=random)

    def step(scheduler: Any) -> Callable[[], Tensor]:
        return lambda: scheduler.step(e, 500, x).prev_sample

    def noised(scheduler: Any) -> Callable[[], Tensor]:
        return lambda: scheduler.add_noise(x, e, t)

    def velocity(scheduler: Any) -> Callable[[], Tensor]:
        return lambda: scheduler.get_velocity(x, e, t)

    for name, make in (("step", step), ("add_noise", noised), ("get_velocity", velocity)):
        yield name, make(theirs), make(ours)
