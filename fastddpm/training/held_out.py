"""Images that a run does not train on, by whose bits/dim it is judged as it goes, and the best of
its models by that number. No training."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastddpm import ranks
from fastddpm.checkpoint import read_metadata, write_json
from fastddpm.data import Dataset
from fastddpm.data.identity import Fingerprint
from fastddpm.evaluation import bits_per_dim
from fastddpm.options import check_integer
from fastddpm.pretrained import CONFIG, WEIGHTS, save_config, save_model
from fastddpm.training.run_folder import BEST, NOTE
from fastddpm.training.trainer import Trainer
from fastddpm.unet import UNet


class HeldOut:
    """Some images of `dataset`, and when and how a model is judged by them.

    every:  steps between two looks; there is one at the run's end, too
    images: how many of the set, evenly spaced in its order; all where it has no more
    steps:  of the chain, evenly strided; all where it has no more

    The number is the mean over the images of the variational bound in bits/dim (DDPM Eq. 5) of the
    averaged model on a chain of so many steps, with the noise of seed 0: a function of weights and
    images, to be compared between steps and runs that agree in images and steps. For less than all
    steps of the chain it is larger than the bound of the whole, which is what papers state.

    Raises ValueError for numbers out of range."""

    def __init__(self, dataset: Dataset, *, every: int = 5000, images: int = 256, steps: int = 50):
        self.dataset = dataset
        self.every = check_integer("evaluate_every", every, 1)
        self.steps = check_integer("evaluate_steps", steps, 1)
        count = min(check_integer("evaluate_images", images, 1), len(dataset))
        self.indices = np.arange(count) * len(dataset) // count
        self.best: dict[str, Any] | None = None

    def describe(self) -> str:
        """One line for people: "256 of 10,000 held-out images, a chain of 50 steps"."""
        return (
            f"{len(self.indices):,} of {len(self.dataset):,} held-out images, a chain of "
            f"{self.steps} steps"
        )

    def check(self, dataset: Dataset) -> None:
        """ValueError if the images are of another shape than those of `dataset`, or the same."""
        own = self.dataset
        if own.shape != dataset.shape:
            raise ValueError(
                f"the held-out images of {own.path} have shape {own.shape}; those of "
                f"{dataset.path}, which are trained on, {dataset.shape}"
            )
        a, b = own.path.resolve(), dataset.path.resolve()
        if own.kind == dataset.kind == "folder" and (a in b.parents or b in a.parents):
            raise ValueError(
                f"{own.path} is to be held out, and what is trained on, {dataset.path}, lies in it "
                "or holds it: give two folders that lie apart"
            )
        if len(own) == len(dataset) and own.fingerprint() == dataset.fingerprint():
            raise ValueError(
                f"{own.path} is to be held out, and has the images that are trained on"
            )

    def identity(self, T: int) -> dict[str, Any]:
        """What makes two numbers comparable, JSON-ready."""
        images = self.dataset.images(self.indices)
        fingerprint = Fingerprint()
        fingerprint.add(images.numpy())
        return {
            "images": len(images),
            "sha256 of the pixels": fingerprint.hexdigest(),
            "steps of the chain": min(self.steps, T),
        }

    def resume(self, out: Path, T: int) -> None:
        """Take up the best so far of the run in `out`; ValueError if it was another's best: by
        other images or another chain."""
        self.best = read_best(out)
        if self.best is None:
            return
        for name, value in self.identity(T).items():
            if self.best.get(name) != value:
                raise ValueError(
                    f"{out / BEST} was chosen by other numbers: {name} is "
                    f"{self.best.get(name)!r} there and {value!r} here; give the same held-out "
                    f"images, or remove {out / BEST} to choose anew"
                )

    def is_due(self, step: int, last: int) -> bool:
        return step % self.every == 0 or step == last

    def measure(self, trainer: Trainer) -> float:
        """Bits/dim now; inf where the model gives no number. Of several ranks each judges its share
        of the images, and all get the number: a collective."""
        start, stop = ranks.share(len(self.indices), *ranks.place())
        total = torch.empty(0, device=trainer.device)
        with ranks.together():
            if stop > start:
                total = self._bounds(trainer, start, stop)
        return ranks.gather(total, len(self.indices)).double().mean().item()

    def _bounds(self, trainer: Trainer, start: int, stop: int) -> torch.Tensor:
        """Of the images start .. stop - 1, on the trainer's device."""
        images = self.dataset.images(self.indices[start:stop])
        try:
            return bits_per_dim(
                trainer.ema_model(), images, diffusion=trainer.diffusion, first_index=start,
                steps=min(self.steps, trainer.diffusion.T), progress=False,
            ).total  # fmt: skip
        except FloatingPointError:
            return torch.full((len(images),), math.inf, device=trainer.device)

    def keep(self, trainer: Trainer, out: Path, bits: float) -> None:
        """Write the averaged model into `out`/best, of a UNet, if none before it had fewer bits."""
        if not isinstance(trainer.network, UNet) or not math.isfinite(bits):
            return
        if self.best is not None and bits >= self.best["bits_per_dim"]:
            return
        self.best = {
            "step": trainer.step_count, "bits_per_dim": bits, **self.identity(trainer.diffusion.T)
        }  # fmt: skip
        folder = out / BEST
        folder.mkdir(exist_ok=True)
        if not (folder / CONFIG).exists():  # so that weights never stand there without
            save_config(trainer.network, folder)
        # What is said of the weights is in their own file, or it might be said of others.
        note = {NOTE: json.dumps(self.best)}
        save_model(trainer.network, folder, trainer.ema_weights(), note)
        write_json(folder / f"{NOTE}.json", self.best)


def read_best(out: Path) -> dict[str, Any] | None:
    """Step, bits/dim and what they were found by, of the model in `out`/best; None where there is
    none. ValueError names a file that can't be."""
    path = out / BEST / WEIGHTS
    if not os.path.lexists(path):
        return None
    try:
        note = json.loads(read_metadata(path).get(NOTE, ""))
        check_integer("step", note["step"], 1)
        if not math.isfinite(note["bits_per_dim"]):
            raise ValueError(f"bits_per_dim is {note['bits_per_dim']}")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not the best model of a run: {error}; remove it") from None
    return note
