"""Algorithm 1: the Trainer of one step at a time and `fit`, which runs it with data, files and
pictures.

Everything random in step k (t, flips, eps, dropout) is a function of (seed, k), so a run that was
killed and resumed from a checkpoint takes the very same steps."""

from __future__ import annotations

import copy
import csv
import io
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastddpm import reference
from fastddpm.checkpoint import atomic_write, read_tensors, save_model, write_tensors
from fastddpm.data import Dataset, batch_indices
from fastddpm.diffusion import Diffusion
from fastddpm.figures import check_channels, loss_plot, save_samples
from fastddpm.precision import Precision, autocast, resolve_precision
from fastddpm.sampling import sample
from fastddpm.unet import UNet

STATE = "trainer.safetensors"
LOG_EVERY = 50  # steps that a row of log.csv averages over
CHOICES_STEP = 2**32 - 1  # the RNG contract's step word of t and flip, which no chain reaches


@dataclass(frozen=True)
class Preset:
    """A training recipe: the model's options and the trainer's."""

    model: dict[str, Any]
    batch_size: int = 128
    lr: float = 2e-4
    warmup: int = 5000
    ema_decay: float = 0.9999
    ema_warmup: bool = False
    grad_clip: float = 1.0
    flip: bool = True
    steps: int = 800_000


_256 = {"image_size": 256, "channel_mult": (1, 1, 2, 2, 4, 4), "attention_levels": (4,)}
PRESETS = {
    # Appendix B: 800k steps on CIFAR-10, 0.5M on CelebA-HQ, 2.4M and 1.15M on LSUN Bedroom.
    "cifar10": Preset({"image_size": 32, "dropout": 0.1}),
    "celebahq256": Preset(_256, batch_size=64, lr=2e-5, steps=500_000),
    "lsun256": Preset(_256, batch_size=64, lr=2e-5, steps=2_400_000),
    "lsun256-large": Preset({**_256, "channels": 192}, batch_size=64, lr=2e-5, steps=1_150_000),
    # A model small enough for two CPU cores; no flips, since shoes and sleeves have a side.
    "fashion-mnist": Preset(
        {
            "image_size": 28,
            "in_channels": 1,
            "channels": 16,
            "channel_mult": (1, 2, 3),
            "num_res_blocks": 1,
            "attention_levels": (2,),
            "num_groups": 8,
        },
        lr=1e-3,
        warmup=500,
        ema_decay=0.9995,
        ema_warmup=True,
        flip=False,
        steps=25_000,
    ),
}


class Trainer:
    """Algorithm 1 with Adam, gradient clipping, learning-rate warm-up and an exponential moving
    average.

    model:     any module (x_t, t) -> output; trained in place
    diffusion: None: the model's own, or the paper's
    precision: "fp32", "bf16" (autocast, float32 weights) or "auto" (bf16 where the hardware
               multiplies it)
    lr, warmup: Adam's rate, reached linearly over the first `warmup` steps; betas (0.9, 0.999), eps
                1e-8
    ema_decay: weight of the past in the average of the weights; grad_clip: largest norm of the
               gradient
    ema_warmup: average over the first steps with min(ema_decay, (1 + k) / (10 + k)), so that a
               short run's average is not the initial weights; the paper has none
    flip:      mirror half of the images

    Raises ValueError for an option out of range, FloatingPointError when the loss or gradient is
    not finite."""

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        diffusion: Diffusion | None = None,
        precision: Precision = "auto",
        lr: float = 2e-4,
        ema_decay: float = 0.9999,
        ema_warmup: bool = False,
        grad_clip: float = 1.0,
        warmup: int = 5000,
        flip: bool = True,
        seed: int = 0,
    ):
        for name, value, ok, allowed in (
            ("lr", lr, lr > 0, "above 0"),
            ("ema_decay", ema_decay, 0 <= ema_decay < 1, "in [0, 1)"),
            ("grad_clip", grad_clip, grad_clip > 0, "above 0"),
            ("warmup", warmup, warmup >= 0, "at least 0"),
            ("seed", seed, 0 <= seed < 2**63, "in [0, 2^63)"),
        ):
            if not ok:
                raise ValueError(f"{name} must be {allowed}; got {value!r}")
        self.model = model
        self.diffusion = Diffusion.of(model, diffusion)
        self.diffusion.warn_of_the_end()
        self.device = next(model.parameters()).device
        self.precision = resolve_precision(precision, self.device)
        self.lr, self.warmup, self.ema_decay, self.grad_clip = lr, warmup, ema_decay, grad_clip
        self.ema_warmup, self.flip, self.seed = ema_warmup, flip, seed
        self.step_count = 0
        self.example_count = 0
        self._named = dict(model.named_parameters())
        self._buffers = dict(model.named_buffers())
        self._parameters = list(self._named.values())
        self._ema = [p.detach().clone() for p in self._parameters]
        self.optimizer = torch.optim.Adam(self._parameters, lr=lr, fused=True)

    def step(self, x0: torch.Tensor) -> torch.Tensor:
        """One optimiser step on x0, (N, C, H, W) uint8 or float in [-1, 1]; returns the mean loss,
        detached.
        """
        x0 = x0.to(self.device)
        n, T = x0.shape[0], self.diffusion.T
        if n == 0:
            raise ValueError("a batch needs at least one image; got 0")
        index = torch.arange(self.example_count, self.example_count + n, device=self.device)
        words = reference.random_words(
            2, seed=self.seed, step=torch.full_like(index, CHOICES_STEP), sample_index=index
        )
        t = (words[:, 0] * T) >> 32
        flip = (words[:, 1] & 1).bool() if self.flip else None

        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min((self.step_count + 1) / max(self.warmup, 1), 1.0)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed((self.seed * 0x9E3779B97F4A7C15 + self.step_count) % 2**63)
            with autocast(self.precision, self.device):
                loss = self.diffusion.loss(
                    self.model, x0, t=t, flip=flip, seed=self.seed, sample_index=index
                ).mean()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self.grad_clip)
        if not torch.isfinite(norm + loss.detach()):
            raise FloatingPointError(
                f"step {self.step_count}: loss {loss.item()}, gradient norm {norm.item()}; "
                "the weights are those before this step"
            )
        self.optimizer.step()
        k = self.step_count
        decay = min(self.ema_decay, (1 + k) / (10 + k)) if self.ema_warmup else self.ema_decay
        torch._foreach_lerp_(self._ema, [p.detach() for p in self._parameters], 1 - decay)
        self.step_count += 1
        self.example_count += n
        return loss.detach()

    def ema_weights(self) -> dict[str, torch.Tensor]:
        """The averaged weights under the model's state_dict names."""
        return {**self._buffers, **dict(zip(self._named, self._ema, strict=True))}

    def ema_model(self) -> torch.nn.Module:
        """A copy of the model with the averaged weights, in eval mode."""
        model = copy.deepcopy(self.model).eval().requires_grad_(False)
        for p, ema in zip(model.parameters(), self._ema, strict=True):
            p.copy_(ema)
        return model

    def save(self, folder: str | Path) -> None:
        """Write the averaged model into `folder`, then the whole state into one file beside it,
        atomically: where there is a state, there is a model to resume with.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.model, UNet):
            save_model(self.model, folder, self.ema_weights())
        tensors: dict[str, torch.Tensor] = {f"buffer.{k}": v for k, v in self._buffers.items()}
        for (name, p), ema in zip(self._named.items(), self._ema, strict=True):
            tensors[f"model.{name}"], tensors[f"ema.{name}"] = p, ema
            for key, value in self.optimizer.state[p].items():
                tensors[f"adam.{key}.{name}"] = value
        settings = {
            "step_count": self.step_count,
            "example_count": self.example_count,
            **self._recipe(),
        }
        write_tensors(folder / STATE, tensors, {"trainer": json.dumps(settings)})

    def load(self, folder: str | Path) -> None:
        """Take up the state of `save`. ValueError names what differs from this trainer's model or
        recipe.
        """
        path = Path(folder) / STATE
        tensors, metadata = read_tensors(path)
        try:
            settings = json.loads(metadata["trainer"])
            step_count, example_count = settings.pop("step_count"), settings.pop("example_count")
        except (KeyError, json.JSONDecodeError):
            raise ValueError(f"{path} is not a trainer's state") from None
        own = self._recipe()
        for name in own:
            if settings.get(name) != own[name]:
                raise ValueError(
                    f"{path}: {name} is {settings.get(name)!r} there and {own[name]!r} here"
                )
        # A parameter that never had a gradient has no moments.
        moments = {
            name: ("exp_avg", "exp_avg_sq", "step") if f"adam.step.{name}" in tensors else ()
            for name in self._named
        }
        expected: dict[str, torch.Size] = {f"buffer.{k}": v.shape for k, v in self._buffers.items()}
        for name, p in self._named.items():
            for prefix in ("model", "ema", *(f"adam.{m}" for m in moments[name])):
                expected[f"{prefix}.{name}"] = torch.Size() if prefix == "adam.step" else p.shape
        got = {name: tensor.shape for name, tensor in tensors.items()}
        if got != expected:
            name = sorted(dict(got.items() ^ expected.items()))[0]
            raise ValueError(
                f"{path}: {name} has shape {got.get(name)}; expected {expected.get(name)}"
            )
        with torch.no_grad():
            for name, buffer in self._buffers.items():
                buffer.copy_(tensors[f"buffer.{name}"])
            for (name, p), ema in zip(self._named.items(), self._ema, strict=True):
                p.copy_(tensors[f"model.{name}"])
                ema.copy_(tensors[f"ema.{name}"])
                self.optimizer.state[p] = {
                    m: tensors[f"adam.{m}.{name}"].to(
                        p.device, memory_format=_format(tensors[f"adam.{m}.{name}"], p)
                    )
                    for m in moments[name]
                }
        self.step_count, self.example_count = step_count, example_count

    def _recipe(self) -> dict[str, Any]:
        """What must be the same for a resumed run to take the same steps."""
        return {
            "precision": self.precision,
            "lr": self.lr,
            "warmup": self.warmup,
            "ema_decay": self.ema_decay,
            "ema_warmup": self.ema_warmup,
            "grad_clip": self.grad_clip,
            "flip": self.flip,
            "seed": self.seed,
            "diffusion": self.diffusion.to_config(),
        }


def fit(
    trainer: Trainer,
    dataset: Dataset,
    out: str | Path,
    *,
    steps: int,
    batch_size: int = 128,
    save_every: int = 1000,
    sample_every: int = 5000,
    resume: bool = False,
    progress: bool = True,
) -> None:
    """Train until step `steps` on `dataset`, and keep in the folder `out` what a person and a
    restart need.

    config.json and model.safetensors (the averaged model), trainer.safetensors (the state for
    resume), log.csv, loss.png, samples/step_*.png (DDIM, 50 steps). All but the samples are written
    every `save_every` steps. resume: go on from trainer.safetensors; the steps are those that an
    uninterrupted run takes.

    Raises FileExistsError when `out` holds a run and resume is not asked for, FileNotFoundError the
    other way round."""
    for name, value in (("steps", steps), ("batch_size", batch_size), ("save_every", save_every)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    if sample_every < 0:
        raise ValueError(f"sample_every must be at least 0; got {sample_every}")
    if sample_every and isinstance(trainer.model, UNet):
        check_channels(trainer.model.in_channels)
    out = Path(out)
    if resume:
        trainer.load(out)
        if trainer.example_count != trainer.step_count * batch_size:
            before = trainer.example_count // max(trainer.step_count, 1)
            raise ValueError(f"{out / STATE} has batches of {before}; got batch_size {batch_size}")
    elif (out / STATE).exists():
        raise FileExistsError(f"{out} holds a run: resume it, or give another folder")
    (out / "samples").mkdir(parents=True, exist_ok=True)
    log = Log(out, trainer.step_count, trainer.diffusion.objective)

    with tqdm(
        total=steps, initial=trainer.step_count, unit="step", desc="training", disable=not progress
    ) as bar:
        losses: list[torch.Tensor] = []
        started, first = time.perf_counter(), trainer.step_count
        for images in _batches(dataset, batch_size, trainer.step_count, steps, trainer.seed):
            losses.append(trainer.step(images))
            bar.update()
            done = trainer.step_count
            if done % LOG_EVERY == 0 or done == steps:
                rate = (done - first) * batch_size / (time.perf_counter() - started)
                loss = torch.stack(losses).mean().item()
                log.add(done, loss, rate)
                bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} images/s")
                losses, started, first = [], time.perf_counter(), done
            if done % save_every == 0 or done == steps:
                log.write()  # first: rows after the state that is resumed are dropped, not missed
                trainer.save(out)
            if (
                sample_every
                and isinstance(trainer.model, UNet)
                and (done % sample_every == 0 or done == steps)
            ):
                images = sample(
                    trainer.ema_model(), 36, steps=min(50, trainer.diffusion.T), sampler="ddim",
                    diffusion=trainer.diffusion, progress=False,
                )  # fmt: skip
                save_samples(images, out / "samples" / f"step_{done:06d}.png")


def _batches(
    dataset: Dataset, batch_size: int, start: int, stop: int, seed: int
) -> Iterator[torch.Tensor]:
    """The images of the steps start .. stop - 1, each batch read while the step before it
    computes.
    """

    def load(step: int) -> torch.Tensor:
        return dataset.images(batch_indices(len(dataset), batch_size, step, seed=seed))

    with ThreadPoolExecutor(1) as reader:
        ahead = [reader.submit(load, step) for step in range(start, min(start + 1, stop))]
        for step in range(start, stop):
            images = ahead.pop().result()
            if step + 1 < stop:
                ahead.append(reader.submit(load, step + 1))
            yield images


class Log:
    """log.csv and loss.png of a run, up to the step that its checkpoint holds."""

    def __init__(self, out: Path, step: int, objective: str):
        self.out, self.unit = out, "mean squared error" if objective == "simple" else "bits/dim"
        self.rows: list[tuple[int, float, float]] = []
        if step and (out / "log.csv").exists():
            with (out / "log.csv").open(newline="") as file:
                rows = [
                    (int(s), float(loss), float(rate))
                    for s, loss, rate in list(csv.reader(file))[1:]
                ]
            self.rows = [row for row in rows if row[0] <= step]

    def add(self, step: int, loss: float, rate: float) -> None:
        self.rows.append((step, loss, rate))

    def write(self) -> None:
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(("step", "loss", "images_per_second"))
        writer.writerows((s, f"{loss:.6f}", f"{rate:.1f}") for s, loss, rate in self.rows)
        with atomic_write(self.out / "log.csv") as file:
            file.write(text.getvalue().encode())
        if self.rows:
            steps, losses, _ = zip(*self.rows, strict=True)
            loss_plot(self.out / "loss.png", steps, losses, self.unit)


def _format(tensor: torch.Tensor, like: torch.Tensor) -> torch.memory_format:
    """Adam's moments keep the layout of their parameter, or the fused step would not be the same
    one.
    """
    if tensor.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format
