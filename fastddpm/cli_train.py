"""`fastddpm train`: its options, what it builds of them, and its report."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from fastddpm import console, figures, ranks, run_folder
from fastddpm.checkpoint import read_json
from fastddpm.cli_arguments import path, size, timeout
from fastddpm.data import open_dataset
from fastddpm.diffusion import Diffusion
from fastddpm.host import seeded
from fastddpm.pretrained import CONFIG, build_model
from fastddpm.schedule import Schedule
from fastddpm.training import PRESETS, STATE, Trainer, fit, preset
from fastddpm.unet import UNet

SCHEDULES = ("linear", "quadratic", "constant", "cosine")
DEFAULT_PRESET = "cifar10"
OF_THE_DATA = ("image_size", "in_channels")  # of a preset's model, which follow the images


def train(a: argparse.Namespace) -> None:
    with ranks.launched(a.device, a.timeout) as a.device:
        _train(a)


def _train(a: argparse.Namespace) -> None:
    out, recipe = Path(a.out), preset(a.preset or DEFAULT_PRESET)
    if a.resume and not (out / STATE).is_file():
        raise FileNotFoundError(f"nothing to resume: {out / STATE} does not exist")
    if not a.resume:
        run_folder.check_new(out)
    figures.check_output(out, kinds=("",))
    run_folder.check_apart(a.data, out)
    # What folders are resized to; arrays keep their size, and the model of a new run follows.
    size, channels = recipe.model["image_size"], a.channels
    if a.resume:
        model = _resumed(a, out)
        own = (model.in_channels, *model.image_size)
        size, channels = model.image_size, _or(channels, model.in_channels)
    dataset = open_dataset(a.data, size=_or(a.image_size, size), channels=channels)
    if a.resume:
        if own != tuple(dataset.shape):
            raise ValueError(
                f"{a.data} has images of shape {dataset.shape}; the run's model takes {own}"
            )
    else:
        diffusion = Diffusion(
            getattr(Schedule, a.schedule or "linear")(),
            a.prediction or "eps",
            a.variance or recipe.variance,
            a.loss or "simple",
        )
        shape = {"in_channels": dataset.shape[0], "image_size": dataset.shape[1:]}
        with seeded(a.seed % 2**63, torch.device("cpu")):  # the Trainer names one out of range
            model = UNet(**{**recipe.model, **shape}, diffusion=diffusion)
    trainer = Trainer(
        model.to(a.device),
        precision=a.precision,
        lr=_or(a.lr, recipe.lr),
        ema_decay=_or(a.ema_decay, recipe.ema_decay),
        ema_warmup=recipe.ema_warmup,
        grad_clip=recipe.grad_clip,
        warmup=_or(a.warmup, recipe.warmup),
        flip=recipe.flip,
        seed=a.seed,
        accumulate=a.accumulate,
    )
    rank, world = ranks.place()
    parameters, name = sum(p.numel() for p in model.parameters()), a.preset or DEFAULT_PRESET
    if rank == 0:
        on = f", {world} ranks" * (world > 1)
        console.say(f"data   {dataset.describe()}")
        console.say(f"model  {parameters:,} parameters, preset {name}, {trainer.precision}{on}")
    started = time.perf_counter()
    ran = fit(
        trainer,
        dataset,
        out,
        steps=_or(a.steps, recipe.steps),
        batch_size=_or(a.batch_size, recipe.batch_size),
        save_every=a.save_every,
        sample_every=a.sample_every,
        resume=a.resume,
        progress=not a.quiet,
    )
    if rank > 0:
        return
    rows = {
        "model": f"{out}  (fastddpm sample --model {out})",
        "pictures": f"{out / 'loss.png'}, {out / 'samples'}",
        "steps": f"{trainer.step_count:,}, {trainer.example_count:,} images",
        "time": f"{time.perf_counter() - started:.1f} s, {ran.share_waited:.1%} of the steps' was "
        "waiting for data",
    }
    if trainer.skipped:
        rows["skipped"] = f"{trainer.skipped:,} steps, whose loss or gradient was not finite"
    console.say(tabulate(rows.items(), tablefmt="plain"))


def _resumed(a: argparse.Namespace, out: Path) -> UNet:
    """The model of the run in `out` with fresh weights; ValueError names what was asked for and is
    another there. What is not asked for is the run's.
    """
    model = build_model(read_json(out / CONFIG), out / CONFIG)
    process = model.diffusion
    there: dict[str, Any] = {
        "--schedule": process.schedule.to_config(),
        "--prediction": process.prediction,
        "--variance": process.variance,
        "--loss": process.objective,
    }
    asked = {name: getattr(a, name.removeprefix("--")) for name in there}
    if a.schedule is not None:
        asked["--schedule"] = getattr(Schedule, a.schedule)().to_config()
    if a.preset is not None:
        of_preset = {k: v for k, v in preset(a.preset).model.items() if k not in OF_THE_DATA}
        there |= {f"--preset {a.preset}: {k}": model.config[k] for k in of_preset}
        asked |= {f"--preset {a.preset}: {k}": _listed(v) for k, v in of_preset.items()}
    else:
        fitting = [name for name in PRESETS if _is_of(model, name)]
        if fitting and DEFAULT_PRESET not in fitting:
            raise ValueError(
                f"{out / CONFIG}: the run's model is not that of {DEFAULT_PRESET}, the preset "
                f"where none is given: add --preset {' or '.join(fitting)}, as it was begun with"
            )
    for name, value in asked.items():
        if value is not None and value != there[name]:
            raise ValueError(f"{out / CONFIG}: {name} is {there[name]!r} there and {value!r} here")
    return model


def _is_of(model: UNet, name: str) -> bool:
    options = preset(name).model.items()
    return all(model.config[k] == _listed(v) for k, v in options if k not in OF_THE_DATA)


def _listed(value):
    """As it is read from JSON."""
    return list(value) if isinstance(value, tuple) else value


def _or(value, default):
    """What was given on the command line, be it 0, or the default."""
    return default if value is None else value


def add_options(add: Callable[..., Any]) -> None:
    add(
        "--data",
        type=path,
        required=True,
        help="a folder of images, idx, npz or npy arrays, CIFAR-10's archive, a zip, an lmdb",
    )
    add("--out", type=path, required=True, help="the run's folder")
    add(
        "--preset",
        type=_preset,
        metavar="NAME",
        help=f"model and recipe: {', '.join(sorted(PRESETS))} (default: {DEFAULT_PRESET})",
    )
    add("--resume", action="store_true", help="go on from the last checkpoint in --out, exactly")
    add("--steps", type=int, help="optimiser steps in all (default: the preset's)")
    add("--batch-size", type=int, help="(default: the preset's)")
    add(
        "--accumulate",
        type=int,
        default=1,
        help="pieces of a batch, computed one after the other for less memory (default: 1)",
    )
    add("--lr", type=float, help="learning rate (default: the preset's)")
    add("--warmup", type=int, help="steps to reach it (default: the preset's)")
    add("--ema-decay", type=float, help="of the averaged weights (default: the preset's)")
    add(
        "--image-size",
        type=size,
        help="resize images of a folder to it: 64, or 64x48 for height x width (default: the "
        "preset's)",
    )
    add("--channels", type=int, choices=(1, 3), help="grey or colour (default: colour if any is)")
    add("--schedule", choices=SCHEDULES, help="betas (default: linear)")
    add("--prediction", choices=("eps", "x0", "mean"), help="(default: eps)")
    add(
        "--variance",
        choices=("fixed_large", "fixed_small", "learned"),
        help="(default: the preset's)",
    )
    add("--loss", choices=("simple", "vlb"), help="(default: simple)")
    add("--save-every", type=int, default=1000, help="steps between checkpoints (default: 1000)")
    add(
        "--sample-every",
        type=int,
        default=5000,
        help="steps between sample grids, 0: none (default: 5000)",
    )
    timeout(add)


def _preset(name: str) -> str:
    try:
        preset(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name
