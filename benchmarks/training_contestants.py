"""Who takes part in benchmarks/throughput.py --train: how each implementation is found and built,
at the fastest training step that its users know. No clock and no table.

A contestant has `step(x0, draws)`, one step of Algorithm 1 on a uint8 batch, and `state()`: the
gradients, as the optimiser got them, the weights and their average after its first step."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import itertools
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from contestants import Job, installed
from torch import Tensor, nn

from fastddpm import Trainer
from fastddpm.checkpoint import read_tensors
from fastddpm.integrations.diffusers import to_diffusers
from fastddpm.precision import autocast
from fastddpm.training.run_folder import STATE

LR, BETAS, ADAM_EPS, CLIP, EMA_DECAY = 2e-4, (0.9, 0.999), 1e-8, 1.0, 0.9999


@dataclass
class Draws:
    """What is random in a step: t (N,) int64, flip (N,) bool, eps like x_t; None: draw it."""

    t: Tensor
    flip: Tensor
    eps: Tensor


class Contestant(Protocol):
    def step(self, x0: Tensor, draws: Draws | None = None) -> Tensor:
        """Takes a step on x0, (N, C, H, W) uint8, and returns its loss."""

    def state(self) -> dict[str, Tensor]:
        """gradient.NAME, weight.NAME and, where it follows each step, average.NAME."""

    @property
    def network(self) -> nn.Module: ...


def clipped(gradients: list[Tensor], limit: float) -> list[Tensor]:
    """The gradients times min(1, limit / norm of all), as clip_grad_norm_ and Trainer do it."""
    norm = torch.stack([g.double().norm() for g in gradients]).norm()
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    return [g * scale.to(g.dtype) for g in gradients]


# ---- ours ----------------------------------------------------------------------------------------


class Ours:
    """fastddpm.Trainer. What a step draws follows from (seed, example): it needs no `draws`."""

    def __init__(self, job: Job):
        self.trainer = Trainer(
            job.unet(), precision=job.precision, lr=LR, warmup=0, ema_decay=EMA_DECAY,
            grad_clip=CLIP, seed=0,
        )  # fmt: skip
        self.network = self.trainer.network

    def step(self, x0: Tensor, draws: Draws | None = None) -> Tensor:
        return self.trainer.step(x0)

    def state(self) -> dict[str, Tensor]:
        with tempfile.TemporaryDirectory() as folder:
            self.trainer.save(folder)
            tensors = read_tensors(Path(folder) / STATE)[0]
        kinds = {"adam.exp_avg.": "gradient.", "model.": "weight.", "ema.": "average."}
        return {
            theirs + name.removeprefix(ours): tensor / (1 - BETAS[0]) if "adam" in ours else tensor
            for name, tensor in tensors.items()
            for ours, theirs in kinds.items()
            if name.startswith(ours)
        }


# ---- the peers -----------------------------------------------------------------------------------


class Torch:
    """diffusers' U-Net, and everything beside it by the one call of torch for all tensors."""

    def __init__(self, job: Job, memory_format: torch.memory_format, mode: str | None = None):
        model = job.unet()
        self.T = model.diffusion.T
        ab = torch.as_tensor(model.diffusion.schedule.alphas_cumprod)
        self.scale, self.sigma = (
            x.sqrt().float().to(job.device)[:, None, None, None] for x in (ab, 1 - ab)
        )
        self.memory_format = memory_format
        self.precision, self.device = job.precision, torch.device(job.device)
        self.network = to_diffusers(model).to(memory_format=memory_format).train()
        self.call = self.network
        if mode is not None:
            self.call = torch.compile(self.network, dynamic=False, mode=mode)
        self.parameters = list(self.network.parameters())
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.Adam(
            self.parameters, lr=LR, betas=BETAS, eps=ADAM_EPS, fused=True
        )

    def step(self, x0: Tensor, draws: Draws | None = None) -> Tensor:
        x0 = x0.to(self.device, torch.float32, memory_format=self.memory_format) / 127.5 - 1
        if draws is None:
            draws = Draws(
                torch.randint(0, self.T, (len(x0),), device=self.device),
                torch.rand(len(x0), device=self.device) < 0.5,
                torch.randn_like(x0),
            )
        x0 = torch.where(draws.flip[:, None, None, None], x0.flip(-1), x0)
        xt = self.scale[draws.t] * x0 + self.sigma[draws.t] * draws.eps
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.precision, self.device):
            eps = self.call(xt, draws.t, return_dict=False)[0]
        loss = nn.functional.mse_loss(eps.float(), draws.eps)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, CLIP, foreach=True)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - EMA_DECAY)
        return loss.detach()

    def state(self) -> dict[str, Tensor]:
        tensors = {}
        for (name, p), average in zip(self.network.named_parameters(), self.average, strict=True):
            moment = self.optimizer.state[p]["exp_avg"]
            tensors[f"gradient.{name}"] = moment / (1 - BETAS[0])
            tensors[f"weight.{name}"] = p.detach()
            tensors[f"average.{name}"] = average
        return tensors


def eager_nchw(job: Job) -> Contestant:
    return Torch(job, torch.contiguous_format)


def eager_nhwc(job: Job) -> Contestant:
    return Torch(job, torch.channels_last)


def compiled(job: Job) -> Contestant:
    return Torch(job, torch.channels_last, "default")


def compiled_autotuned(job: Job) -> Contestant:
    return Torch(job, torch.channels_last, "max-autotune")


class Lucidrains:
    """denoising-diffusion-pytorch's Trainer and its own U-Net of the same widths.

    The trainer's own loop runs, over batches that are in memory; its DataLoader does not. Adam,
    the schedule, the objective and the average's decay are set to what the others have; that the
    average follows each tenth step only is left as it comes."""

    def __init__(self, job: Job):
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet
        from denoising_diffusion_pytorch import Trainer as TheirTrainer

        if job.device == "cpu":
            os.environ["ACCELERATE_USE_CPU"] = "true"
        model = job.unet()
        self.device = torch.device(job.device)
        torch.manual_seed(0)
        net = Unet(
            model.config["channels"], dim_mults=tuple(model.config["channel_mult"]),
            channels=model.in_channels, dropout=model.config["dropout"], flash_attn=True,
        )  # fmt: skip
        self.diffusion = GaussianDiffusion(
            net, image_size=tuple(model.image_size), timesteps=model.diffusion.T,
            objective="pred_noise", beta_schedule="linear",
        )  # fmt: skip
        self.network = net
        self.exact_diffusion = copy.deepcopy(self.diffusion).double()
        images = Path(job.folder) / "images"  # that it insists on, and which are not read
        images.mkdir(exist_ok=True)
        for i in range(100):
            (images / f"{i}.png").touch()
        self.trainer = TheirTrainer(
            self.diffusion, images, train_batch_size=job.batch, train_lr=LR, adam_betas=BETAS,
            ema_decay=EMA_DECAY, max_grad_norm=CLIP, calculate_fid=False,
            amp=job.precision == "bf16", mixed_precision_type="bf16",
            results_folder=str(Path(job.folder) / "results"), save_and_sample_every=10**9,
        )  # fmt: skip
        self.loss = torch.zeros(())
        self.batches: list[Tensor] = []
        self.trainer.dl = (self.batches.pop() for _ in itertools.count())
        self.draws: Draws | None = None
        p_losses = self.diffusion.p_losses

        def losses(x: Tensor, t: Tensor, **options: Any) -> Tensor:
            if self.draws is not None:
                t, options = self.draws.t, {**options, "noise": self.draws.eps}
            self.loss = p_losses(x, t, **options)
            return self.loss

        self.diffusion.p_losses = losses

    def step(self, x0: Tensor, draws: Draws | None = None) -> Tensor:
        x0 = x0.to(self.device, torch.float32) / 255
        self.draws = draws
        flip = torch.rand(len(x0), device=self.device) < 0.5 if draws is None else draws.flip
        self.batches.append(torch.where(flip[:, None, None, None], x0.flip(-1), x0))
        self.trainer.train_num_steps = self.trainer.step + 1
        self.trainer.train()
        return self.loss.detach()

    def state(self) -> dict[str, Tensor]:
        tensors = {}
        for name, p in self.diffusion.named_parameters():
            moment = self.trainer.opt.state[p]["exp_avg"]
            tensors[f"gradient.{name}"] = moment / (1 - BETAS[0])
            tensors[f"weight.{name}"] = p.detach()
        return tensors

    def exact(self, x0: Tensor, draws: Draws) -> dict[str, Tensor]:
        """loss, start.NAME and gradient.NAME of the first step on this network in float64."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)  # of what it makes on the way
        try:
            x0 = torch.where(draws.flip[:, None, None, None], x0.flip(-1), x0) / 255.0
            loss = self.exact_diffusion(x0.double(), times=draws.t, noise=draws.eps.double())
            loss.backward()
        finally:
            torch.set_default_dtype(before)
        names, parameters = zip(*self.exact_diffusion.named_parameters(), strict=True)
        gradients = clipped([p.grad for p in parameters], CLIP)
        return {
            "loss": loss.detach(),
            **{f"start.{n}": p.detach() for n, p in zip(names, parameters, strict=True)},
            **{f"gradient.{n}": g for n, g in zip(names, gradients, strict=True)},
        }


THEIR_UNET, INDUCTOR = "diffusers.models.unets.unet_2d", "torch._inductor.compile_fx"


@dataclass(frozen=True)
class Peer:
    """build: makes it;  needs: packages;  same: whether its network is ours, so that its seconds
    are those of the same work;  devices: where it has something to win;  libraries: what it
    computes with, loaded before its memory counts
    """

    build: Callable[[Job], Contestant]
    needs: tuple[str, ...] = ("diffusers",)
    same: bool = True
    devices: tuple[str, ...] = ("cpu", "cuda")
    libraries: tuple[str, ...] = (THEIR_UNET,)


LUCIDRAINS = ("denoising_diffusion_pytorch", "ema_pytorch", "accelerate", "einops", "torchvision")
PEERS = {
    "diffusers NCHW": Peer(eager_nchw),
    "diffusers channels_last": Peer(eager_nhwc),
    "torch.compile": Peer(compiled, libraries=(THEIR_UNET, INDUCTOR)),
    "torch.compile max-autotune": Peer(
        compiled_autotuned, devices=("cuda",), libraries=(THEIR_UNET, INDUCTOR)
    ),
    "lucidrains": Peer(
        Lucidrains, LUCIDRAINS, same=False, libraries=("denoising_diffusion_pytorch",)
    ),
}
OURS = ("fastddpm Trainer",)


# ---- what the race calls -------------------------------------------------------------------------


def missing(name: str, precision: str, device: str) -> str | None:
    """Why `name` can't take part, as far as can be said before it is built; or None."""
    if name in OURS:
        return None
    peer = PEERS[name]
    if absent := [need for need in peer.needs if importlib.util.find_spec(need) is None]:
        return f"{', '.join(absent)} not installed"
    return None if device in peer.devices else f"set up here for {peer.devices[0]} only"


def versions() -> dict[str, str]:
    return installed(package for peer in PEERS.values() for package in peer.needs)


def load(job: Job) -> None:
    """Import what the contestant computes with."""
    for name in ("torch._dynamo", *(PEERS[job.name].libraries if job.name in PEERS else ())):
        importlib.import_module(name)  # any optimiser of torch's loads the first


def build(job: Job) -> Contestant:
    return Ours(job) if job.name in OURS else PEERS[job.name].build(job)
