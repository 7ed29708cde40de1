"""Training runs: `fit`, which runs Algorithm 1 with data, files and pictures; the Trainer of one
step at a time is trainer.py's, recipes are presets.py's."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from fastddpm import ranks
from fastddpm.checkpoint import named
from fastddpm.data import Dataset, batch_indices
from fastddpm.data.limits import check_memory
from fastddpm.figures import check_channels, save_samples
from fastddpm.host import own_state
from fastddpm.options import check_integer
from fastddpm.presets import PRESETS, Preset, preset
from fastddpm.pretrained import WEIGHTS
from fastddpm.progress import tqdm
from fastddpm.run_folder import SAMPLES, STATE, check_apart, check_kinds, check_new, locked
from fastddpm.run_log import Log
from fastddpm.sampling import sample
from fastddpm.trainer import Trainer
from fastddpm.training_step import CHOICES_STEP
from fastddpm.unet import UNet
from fastddpm.upload import staged, uploaded

__all__ = ["CHOICES_STEP", "PRESETS", "STATE", "Log", "Preset", "Trainer", "fit", "preset"]

CPU = torch.device("cpu")
LOG_EVERY = 50  # steps that a row of log.csv averages over
BYTES_A_VALUE = 5  # of a batch, at the least: as bytes and as float32


@own_state()
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

    A run is one process with one folder, which is locked while it lasts, and one set of images: the
    state names the pixels' digest, and only the same set goes on.

    Raises FileExistsError when `out` holds a run and resume is not asked for, or a model alone,
    FileNotFoundError the other way round, BlockingIOError while another process trains into it,
    ValueError for what does not fit, all before anything is written."""
    steps, batch_size = check_integer("steps", steps, 1), check_integer("batch_size", batch_size, 1)
    save_every = check_integer("save_every", save_every, 1)
    sample_every = check_integer("sample_every", sample_every, 0)
    if ranks.place()[1] > 1:
        raise ValueError(
            f"a training run is one process; this is one of {ranks.place()[1]} ranks: start one, "
            "or make the steps of a Trainer on your own"
        )
    if isinstance(trainer.network, UNet):
        if sample_every:
            check_channels(trainer.network.in_channels)
        _check_fits(dataset, trainer.network)
    out = named(out)
    check_apart(dataset.path, out)
    check_kinds(out)
    if not resume:
        check_new(out)
    elif not (out / STATE).is_file():
        raise FileNotFoundError(f"no such file: {out / STATE}")
    trainer.recipe()  # what can't be saved is an error now, not at the first checkpoint
    check_memory(batch_size * math.prod(dataset.shape) * BYTES_A_VALUE)
    run = identity(dataset, progress)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        if resume:
            log = _resumed(trainer, out, run, batch_size)
        else:
            check_new(out)  # once more: another run may have ended meanwhile
            log = Log(out, trainer.step_count, trainer.diffusion.objective)
        (out / SAMPLES).mkdir(exist_ok=True)
        _run(trainer, dataset, out, run, log, steps, batch_size, save_every, sample_every, progress)


def _check_fits(dataset: Dataset, network: UNet) -> None:
    one = torch.empty(1, *dataset.shape, dtype=torch.float32, device="meta")
    try:
        network.check_input(one, torch.empty(1, dtype=torch.int64, device="meta"))
    except ValueError as error:
        raise ValueError(f"{dataset.path} does not fit the model: {error}") from None


def identity(dataset: Dataset, progress: bool = False) -> dict[str, Any]:
    """What tells a run's data from others: see Dataset.fingerprint. JSON-ready."""
    return {
        "data": {
            "images": len(dataset),
            "shape": list(dataset.shape),
            "sha256 of the pixels": dataset.fingerprint(progress),
        }
    }


def _resumed(trainer: Trainer, out: Path, run: dict[str, Any], batch_size: int) -> Log:
    """The trainer and the log where the run was stopped."""
    trainer.load(out, run)
    if trainer.example_count != trainer.step_count * batch_size:
        before = trainer.example_count // max(trainer.step_count, 1)
        raise ValueError(f"{out / STATE} has batches of {before}; got batch_size {batch_size}")
    log = Log(out, trainer.step_count, trainer.diffusion.objective)
    if not (out / WEIGHTS).exists():  # the run was killed between its first state and model
        trainer.save_model(out)
    return log


def _run(
    trainer: Trainer,
    dataset: Dataset,
    out: Path,
    run: dict[str, Any],
    log: Log,
    steps: int,
    batch_size: int,
    save_every: int,
    sample_every: int,
    progress: bool,
) -> None:
    with tqdm(
        total=steps, initial=trainer.step_count, unit="step", desc="training", disable=not progress
    ) as bar:
        losses: list[torch.Tensor] = []
        started, first = time.perf_counter(), trainer.step_count
        for images in _batches(
            dataset, batch_size, trainer.step_count, steps, trainer.seed, trainer.device
        ):
            losses.append(trainer.step(images))
            bar.update()
            done = trainer.step_count
            if done % LOG_EVERY == 0 or done == steps:
                trainer.check_finite()  # so that a row is of steps that are done and count
                rate = (done - first) * batch_size / (time.perf_counter() - started)
                loss = torch.stack(losses).mean().item()
                log.add(done, loss, rate)
                bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} images/s")
                losses, started, first = [], time.perf_counter(), done
            if done % save_every == 0 or done == steps:
                log.write()  # first: rows after the state that is resumed are dropped, not missed
                trainer.save(out, run)
            if (
                sample_every
                and isinstance(trainer.network, UNet)
                and (done % sample_every == 0 or done == steps)
            ):
                images = sample(
                    trainer.ema_model(), 36, steps=min(50, trainer.diffusion.T), sampler="ddim",
                    diffusion=trainer.diffusion, progress=False,
                )  # fmt: skip
                save_samples(images, out / SAMPLES / f"step_{done:06d}.png")


def _batches(
    dataset: Dataset,
    batch_size: int,
    start: int,
    stop: int,
    seed: int,
    device: torch.device = CPU,
) -> Iterator[torch.Tensor]:
    """The images of the steps start .. stop - 1 on `device`, each batch read, and for a GPU put
    into pinned memory, while the step before it computes.
    """

    def load(step: int) -> torch.Tensor:
        images = dataset.images(batch_indices(len(dataset), batch_size, step, seed=seed))
        return staged(images, device)

    with ThreadPoolExecutor(1) as reader:
        ahead = [reader.submit(load, step) for step in range(start, min(start + 1, stop))]
        for step in range(start, stop):
            images = ahead.pop().result()
            if step + 1 < stop:
                ahead.append(reader.submit(load, step + 1))
            yield uploaded(images, device, ours=True)
