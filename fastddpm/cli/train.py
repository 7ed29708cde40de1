"""`fastddpm train`: its options, what it builds of them, and its report."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any, Literal

import torch
from tabulate import tabulate

import fastddpm
from fastddpm import console, figures, ranks
from fastddpm.checkpoint import read_json
from fastddpm.cli.arguments import path, timeout
from fastddpm.data import WITH_SPLITS, Dataset, check_size, open_dataset
from fastddpm.diffusion import Diffusion
from fastddpm.host import seeded
from fastddpm.pretrained import CONFIG, build_model
from fastddpm.training import run_folder
from fastddpm.training.held_out import HeldOut
from fastddpm.training.recipe import (
    BY_KEY,
    FLAG,
    NUMBERS_OF_SCHEDULES,
    OF_THE_DATA,
    OPTIONS,
    PLAIN,
    SECTIONS,
    Recipe,
    read_recipe,
)
from fastddpm.training.run import PRESETS, STATE, Ran, Trainer, fit, preset
from fastddpm.training.run_folder import BEST, BOARD, LOG, PLOT, RECIPE, SAMPLES
from fastddpm.unet import UNet

DEFAULT_PRESET = "cifar10"
SPLIT: Literal["test"] = "test"  # as --held-out


def train(a: argparse.Namespace) -> None:
    with ranks.launched(a.device, a.timeout) as a.device:
        _train(a)


def _train(a: argparse.Namespace) -> None:
    out = Path(a.out)
    if a.resume and not (out / STATE).is_file():
        raise FileNotFoundError(f"nothing to resume: {out / STATE} does not exist")
    if not a.resume:
        run_folder.check_new(out)
    figures.check_output(out, kinds=("",))
    recipe, model = _recipe(a, out)
    if (source := recipe["data.path"]) is None:
        raise ValueError("there is no data: give --data, or path in [data] of a recipe")
    run_folder.check_apart(source, out)
    with recipe.blamed():
        dataset, model = _built(recipe, source, model)
        options = recipe.section("training")
        steps, batch_size = options.pop("steps"), options.pop("batch_size")
        held_out = _held_out(recipe, source, dataset)
        model.checkpoint_blocks(options.pop("checkpoint_blocks"))
        trainer = Trainer(model.to(a.device), **options)
    rank, world = ranks.place()
    parameters = sum(p.numel() for p in model.parameters())
    if rank == 0:
        on = f", {world} ranks" * (world > 1)
        console.say(f"data   {dataset.describe()}")
        console.say(
            f"model  {parameters:,} parameters, preset {recipe.preset}, {trainer.precision}{on}"
        )
        if held_out is not None:
            console.say(f"test   {held_out.describe()}")
    started = time.perf_counter()
    with recipe.blamed():
        ran = fit(
            trainer,
            dataset,
            out,
            steps=steps,
            batch_size=batch_size,
            save_every=recipe["run.save_every"],
            sample_every=recipe["run.sample_every"],
            held_out=held_out,
            tensorboard=recipe["run.tensorboard"],
            record=_record(recipe, trainer, model),
            resume=a.resume,
            progress=not a.quiet,
        )
    if rank == 0:
        _report(out, trainer, ran, held_out, time.perf_counter() - started)


def _report(
    out: Path, trainer: Trainer, ran: Ran, held_out: HeldOut | None, seconds: float
) -> None:
    pictures = [str(out / PLOT), str(out / SAMPLES)]
    if (out / BOARD).is_dir():
        pictures.append(f"{out / BOARD}  (tensorboard --logdir {out / BOARD})")
    rows = {
        "model": f"{out}  (fastddpm sample --model {out})",
        "pictures": ", ".join(pictures),
        "steps": f"{trainer.step_count:,}, {trainer.example_count:,} images",
        "time": f"{seconds:.1f} s, {ran.share_waited:.1%} of the steps' was waiting for data",
    }
    if trainer.skipped:
        rows["skipped"] = f"{trainer.skipped:,} steps, whose loss or gradient was not finite"
    if ran.rows:
        rate = statistics.median(row.images_per_second for row in ran.rows)
        rows["images/s"] = f"{rate:.4g}, the median of the rows of {out / LOG}"
        rows["loss"] = f"{ran.rows[-1].loss:.6f} at the end"
    if held_out is not None:
        judged = [row for row in ran.rows if row.bits_per_dim is not None]
        if judged:
            rows["bits/dim"] = f"{judged[-1].bits_per_dim:.4f} of {held_out.describe()}"
        if (best := held_out.best) is not None:
            rows["best"] = (
                f"{out / BEST}  ({best['bits_per_dim']:.4f} bits/dim, step {best['step']:,})"
            )
    console.say(tabulate(rows.items(), tablefmt="plain", disable_numparse=True))


def _recipe(a: argparse.Namespace, out: Path) -> tuple[Recipe, UNet | None]:
    """What the run's own recipe, the preset, the file and the command line make together; and the
    model of the run that is to go on, with fresh weights, or None.
    """
    file = read_recipe(a.recipe) if a.recipe is not None else None
    if file is not None and file.whole and a.preset not in (None, file.preset):
        raise ValueError(
            f"{a.recipe} is a run's of preset {file.preset!r} and gives every option: of --preset "
            f"{a.preset} nothing would be left"
        )
    name = a.preset or (file.preset if file is not None else None)
    asked = dict(file.values) if file is not None else {}
    words = {o.key: o.value(v) for o in OPTIONS if (v := getattr(a, o.key)) is not None}
    asked |= words

    own = read_recipe(out / RECIPE) if a.resume and os.path.lexists(out / RECIPE) else None
    recipe = Recipe.of_preset((own.preset if own is not None else None) or name or DEFAULT_PRESET)
    model = None
    if own is not None:
        recipe.lay_over(own.values)
    if a.resume:
        model = build_model(read_json(out / CONFIG), out / CONFIG)
        recipe.lay_over(_of_model(model))
        _check_model(out, model, recipe, asked, name, known=own is not None)
    if file is not None:
        recipe.lay_over(file.values, a.recipe)
    recipe.lay_over(words)
    unused = [BY_KEY[key].flag for key in words if key.startswith("run.evaluate_")]
    if file is not None and not file.whole:
        named = (key for key in file.values if key.startswith("run.evaluate_"))
        unused += [f"{a.recipe}: [run] {BY_KEY[key].name}" for key in named]
    if unused and recipe["data.held_out"] is None:
        raise ValueError(f"{unused[0]} is of held-out images: give --held-out")
    return recipe, model


def _built(recipe: Recipe, source: str, model: UNet | None) -> tuple[Dataset, UNet]:
    """The data and the model: of a new run it follows the images, in a run that goes on they have
    to be of its size.
    """
    size, channels = check_size(recipe["data.image_size"], "image_size"), recipe["data.channels"]
    dataset = open_dataset(source, size=size, channels=channels)
    if model is not None:
        own = (model.in_channels, *model.image_size)
        if own != tuple(dataset.shape):
            raise ValueError(
                f"{source} has images of shape {dataset.shape}; the run's model takes {own}"
            )
        return dataset, model
    diffusion = Diffusion(recipe.schedule(), **recipe.process())
    shape: dict[str, Any] = {"in_channels": dataset.shape[0], "image_size": dataset.shape[1:]}
    seed = recipe["training.seed"]
    with seeded(seed % 2**63, torch.device("cpu")):  # the Trainer names one out of range
        return dataset, UNet(**recipe.section("model"), **shape, diffusion=diffusion)


def _held_out(recipe: Recipe, source: str, dataset: Dataset) -> HeldOut | None:
    """The images to judge by, in the size and the colours of those that are trained on."""
    given = recipe["data.held_out"]
    if given is None:
        return None
    shape: dict[str, Any] = {"size": dataset.shape[1:], "channels": dataset.shape[0]}
    if given == SPLIT and (dataset.kind in WITH_SPLITS or not os.path.lexists(given)):
        images = open_dataset(source, split=SPLIT, **shape)
    else:
        images = open_dataset(given, **shape)
    names = ("every", "images", "steps")
    return HeldOut(images, **{name: recipe[f"run.evaluate_{name}"] for name in names})


def _of_model(model: UNet) -> dict[str, Any]:
    """A model's own options by the recipe's keys."""
    process = model.diffusion.to_config()
    schedule = process.pop("schedule")
    kind = schedule.pop("kind")
    values = {f"model.{k}": v for k, v in model.config.items() if k not in OF_THE_DATA}
    values |= {f"diffusion.{name}": None for name in ("T", *NUMBERS_OF_SCHEDULES)}
    values |= {f"diffusion.{k}": v for k, v in {**PLAIN, **process, "schedule": kind}.items()}
    if kind != "custom":
        values |= {f"diffusion.{k}": v for k, v in schedule.items()}
    return {**values, "data.image_size": list(model.image_size), "data.channels": model.in_channels}


def _record(recipe: Recipe, trainer: Trainer, model: UNet) -> dict[str, Any] | None:
    """The whole recipe of this run, as a file of which it can be begun again; None where a schedule
    or the loss's weights have no name.
    """
    of_model = _of_model(model)
    weight = of_model["diffusion.loss_weight"]
    if of_model["diffusion.schedule"] == "custom" or not isinstance(weight, str):
        return None
    whole = Recipe(recipe.preset, {**recipe.values, **of_model})
    whole.values |= {
        "training.precision": trainer.precision,
        "data.path": os.path.abspath(recipe["data.path"]),
    }
    if (held_out := recipe["data.held_out"]) not in (None, SPLIT):
        whole.values["data.held_out"] = os.path.abspath(held_out)
    return whole.to_json(fastddpm.__version__)


def _check_model(
    out: Path, model: UNet, own: Recipe, asked: dict[str, Any], name: str | None, *, known: bool
) -> None:
    """ValueError names what was asked for and is another in the run in `out`. What is not asked for
    is the run's.

    own: the run's; known: it has a recipe, so that the preset need not be named again
    """
    there: dict[str, Any] = {"--schedule": model.diffusion.schedule.to_config()}
    here: dict[str, Any] = {}
    of_schedule = [f"diffusion.{k}" for k in ("schedule", "T", *NUMBERS_OF_SCHEDULES)]
    if numbers := {k: v for k, v in asked.items() if k in of_schedule}:
        wanted = Recipe(own.preset, dict(own.values))
        wanted.lay_over(numbers)
        if wanted["diffusion.schedule"] != "custom":
            here["--schedule"] = wanted.schedule().to_config()
    for option in OPTIONS:
        if option.section in ("model", "diffusion") and option.key not in of_schedule:
            there[option.flag] = own[option.key]
            if option.key in asked:
                here[option.flag] = asked[option.key]
    if name is not None and (not known or name != own.preset):
        of_preset = {k: v for k, v in preset(name).model.items() if k not in OF_THE_DATA}
        there |= {f"--preset {name}: {k}": model.config[k] for k in of_preset}
        here |= {
            f"--preset {name}: {k}": _listed(v)
            for k, v in of_preset.items()
            if f"model.{k}" not in asked
        }
        there["--preset"], here["--preset"] = own.preset, name
    elif name is None and not known:
        fitting = [name for name in PRESETS if _is_of(model, name)]
        if fitting and DEFAULT_PRESET not in fitting:
            raise ValueError(
                f"{out / CONFIG}: the run's model is not that of {DEFAULT_PRESET}, the preset "
                f"where none is given: add --preset {' or '.join(fitting)}, as it was begun with"
            )
    for word, value in here.items():
        if value != there[word]:
            raise ValueError(f"{out / CONFIG}: {word} is {there[word]!r} there and {value!r} here")


def _is_of(model: UNet, name: str) -> bool:
    options = preset(name).model.items()
    return all(model.config[k] == _listed(v) for k, v in options if k not in OF_THE_DATA)


def _listed(value):
    """As it is read from JSON."""
    return list(value) if isinstance(value, tuple) else value


# ---- arguments ----------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=path, required=True, help="the run's folder")
    add(
        "--preset",
        type=_preset,
        metavar="NAME",
        help=f"model and recipe: {', '.join(sorted(PRESETS))} (default: {DEFAULT_PRESET})",
    )
    add(
        "--recipe",
        type=path,
        metavar="FILE",
        help="options from a .toml or .json file, such as the recipe.json of a run: over the "
        "preset's, and under those given here",
    )
    add("--resume", action="store_true", help="go on from the last checkpoint in --out, exactly")
    timeout(add)
    for section in SECTIONS:
        group = parser.add_argument_group(f"[{section}]")
        for option in (o for o in OPTIONS if o.section == section):
            word: dict[str, Any] = {"dest": option.key, "help": option.help}
            if option.kind is FLAG:
                word["action"] = argparse.BooleanOptionalAction
            elif option.kind.choices is not None:
                word["choices"] = option.kind.choices
            else:
                word |= {"type": option.kind.parse, "metavar": option.name.upper()}
            if option.key == "data.channels":
                word["choices"] = (1, 3)
            group.add_argument(option.flag, **word)


def _preset(name: str) -> str:
    try:
        preset(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name
