"""The command line: arguments in, one call of the library, a short table out. No computation of its
own.

Every mistake of the user is one line on stderr and exit code 2, made before anything long begins.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any, get_args

import torch
from tabulate import tabulate

import fastddpm
from fastddpm import batching, console, figures, ranks, run_folder, shards
from fastddpm.checkpoint import read_json
from fastddpm.data import open_dataset
from fastddpm.diffusion import Diffusion
from fastddpm.doctor import doctor, what_runs
from fastddpm.engine import EngineName
from fastddpm.host import check_threads, seeded
from fastddpm.ops.dispatch import BackendError
from fastddpm.pretrained import CONFIG, build_model
from fastddpm.schedule import Schedule
from fastddpm.training import PRESETS, STATE, Trainer, fit, preset
from fastddpm.unet import UNet

MISTAKES = (
    ValueError, OSError, ImportError, FloatingPointError, ranks.RankError, BackendError,
)  # fmt: skip
SCHEDULES = ("linear", "quadratic", "constant", "cosine")
DEFAULT_PRESET = "cifar10"
OF_THE_DATA = ("image_size", "in_channels")  # of a preset's model, which follow the images


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code. Without argv it is the program's, whose process ends
    with it."""
    if argv is not None:
        return _run(argv)
    console.open_descriptors()
    warnings.showwarning = console.warn
    try:
        return _run(sys.argv[1:])
    finally:
        console.settle()


def _run(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    try:
        if getattr(arguments, "threads", None) is not None:
            check_threads("--threads", arguments.threads)
            torch.set_num_threads(arguments.threads)
        arguments.run(arguments)
    except KeyboardInterrupt:
        console.complain("fastddpm: interrupted")
        return 130
    except Exception as error:
        if batching.is_out_of_memory(error):
            said = f"out of memory ({batching.first_line(error)}): {arguments.smaller}"
        elif isinstance(error, MISTAKES):
            said = " ".join(str(error).split())
        else:
            raise
        console.complain(f"fastddpm: error: {said}")
        return 2
    return 0


# ---- commands -----------------------------------------------------------------------------------


def _sample(a: argparse.Namespace) -> None:
    with ranks.launched(a.device, a.timeout) as a.device:
        _sample_on(a)


def _sample_on(a: argparse.Namespace) -> None:
    if a.progressive and a.shared_latent:
        raise ValueError("--progressive and --shared-latent are two pictures: give one of them")
    figure = a.progressive or a.shared_latent
    out = figures.check_output(a.out, kinds=(".png",) if figure else (".png", ".npz", ""))
    to_folder = not figure and (out.is_dir() or out.suffix == "")
    if a.shard_size is not None and not to_folder:
        raise ValueError(f"--shard-size is for an --out that is a folder; got {a.out!r}")
    model = UNet.from_pretrained(a.model).to(a.device)
    figures.check_output(out, channels=model.in_channels)
    options = _sampler_options(a)
    n = a.n if a.n is not None else (8 if figure else 64)
    samples = f"samples {a.first_index} .. {a.first_index + n - 1} of seed {a.seed}"
    started = time.perf_counter()
    if a.progressive:
        _, x0, times = fastddpm.sample_progressive(
            model, n, frames=a.frames, seed=a.seed, first_index=a.first_index, **options
        )
        images, columns = x0.transpose(0, 1).flatten(0, 1), len(times)
        what = f"one image a row, its x0 predictions at t = {', '.join(map(str, times))}"
    elif a.shared_latent:
        T = model.diffusion.T if a.steps is None else a.steps
        rows = [max(1, round(T * share)) for share in (1, 0.75, 0.5, 0.25)]
        latents = fastddpm.sample_shared_latent(
            model, n, t=rows, seed=a.seed, first_index=a.first_index, **options
        )
        images, columns = latents.flatten(0, 1), n
        what = f"a row shares x_t, at t = {', '.join(map(str, rows))} of {T} steps"
    elif to_folder:
        drawn = fastddpm.sample_to_folder(
            model, out, n, seed=a.seed, first_index=a.first_index, shard_size=a.shard_size,
            batch_size=a.batch_size, **options,
        )  # fmt: skip
        what = samples + f", {n - drawn} of them there before" * (drawn < n)
        n = drawn
    else:
        images = fastddpm.sample(
            model, n, seed=a.seed, first_index=a.first_index, batch_size=a.batch_size, **options
        )
        columns, what = None, samples
    seconds = time.perf_counter() - started
    if ranks.place()[0] != 0:
        return
    if not to_folder:
        figures.save_samples(images, out, columns=columns)
    steps = model.diffusion.T if options.get("steps") is None else options["steps"]
    _report(out, {"images": what, "chain": f"{a.sampler}, {steps} steps"}, seconds, n, model, a)


def _interpolate(a: argparse.Namespace) -> None:
    _alone("an interpolation")
    out = figures.check_output(a.out, kinds=(".png",))
    model = UNet.from_pretrained(a.model).to(a.device)
    figures.check_output(out, channels=model.in_channels)
    first, second = (
        figures.read_image(path, model.image_size, model.in_channels)
        for path in (a.first, a.second)
    )
    options = _sampler_options(a)
    started = time.perf_counter()
    images = fastddpm.interpolate(model, first, second, n=a.n, t=a.t, seed=a.seed, **options)
    seconds = time.perf_counter() - started
    ends = torch.stack((first, second)).to(images.device)
    rows = [
        torch.cat((figures.to_uint8(ends[:1]), figures.to_uint8(row), figures.to_uint8(ends[1:])))
        for row in images
    ]
    figures.save_samples(torch.cat(rows), out, columns=a.n + 2)
    what = f"source | {a.n} mixtures | source, a row each at t = {', '.join(map(str, a.t))}"
    _report(out, {"images": what}, seconds, a.n * len(a.t), model, a)


def _train(a: argparse.Namespace) -> None:
    _alone("a training run")
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
    )
    parameters, name = sum(p.numel() for p in model.parameters()), a.preset or DEFAULT_PRESET
    console.say(f"data   {dataset.describe()}")
    console.say(f"model  {parameters:,} parameters, preset {name}, {trainer.precision}")
    started = time.perf_counter()
    fit(
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
    rows = {
        "model": f"{out}  (fastddpm sample --model {out})",
        "pictures": f"{out / 'loss.png'}, {out / 'samples'}",
        "steps": f"{trainer.step_count:,}, {trainer.example_count:,} images",
        "time": f"{time.perf_counter() - started:.1f} s",
    }
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


def _doctor(a: argparse.Namespace) -> None:
    console.say(doctor(), wanted=True)


def _report(
    out: Path, rows: dict[str, str], seconds: float, images: int, model: UNet, a: argparse.Namespace
) -> None:
    rows = {
        "wrote": str(out),
        **rows,
        "time": f"{seconds:.1f} s, {images / seconds:.2f} images/s",
        "ran": what_runs(model, a.engine, a.precision),
    }
    console.say(tabulate(rows.items(), tablefmt="plain"))


def _alone(what: str) -> None:
    """ValueError where several ranks were launched of what is one process."""
    if (world := os.environ.get("WORLD_SIZE") or "1") != "1":
        raise ValueError(
            f"{what} is one process, and WORLD_SIZE is {world}: start it without torchrun, or "
            "unset WORLD_SIZE"
        )


def _or(value, default):
    """What was given on the command line, be it 0, or the default."""
    return default if value is None else value


def _sampler_options(a: argparse.Namespace) -> dict:
    options = {name: getattr(a, name) for name in ("sampler", "eta", "precision", "engine")}
    options |= {"progress": not a.quiet, "clip": not a.no_clip}
    if hasattr(a, "steps"):
        options["steps"] = a.steps
    return options


# ---- arguments ----------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastddpm", description="Denoising diffusion probabilistic models, fast and exact."
    )
    parser.add_argument("--version", action="version", version=f"fastddpm {fastddpm.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, run, summary: str, *parents: argparse.ArgumentParser, smaller: str = ""):
        """smaller: what to do where memory is out."""
        p = commands.add_parser(name, help=summary, description=summary, parents=parents)
        p.set_defaults(run=run, smaller=smaller or "a smaller model or more memory is needed")
        return p.add_argument

    add = command(
        "sample", _sample, "Draw images from a model (Algorithm 2).", _machine(), _chain(),
        smaller="give a smaller --batch-size, or a folder as --out for fewer images at a time",
    )  # fmt: skip
    add(
        "-n",  # torchrun takes a --n for one of its own
        "--n",
        type=int,
        help="images to draw (default: 64; 8 rows or columns of the figures)",
    )
    add("--first-index", type=int, default=0, help="continue a set: the first sample's number")
    add("--steps", type=int, help="a shorter chain of evenly strided steps (default: all)")
    add("--batch-size", type=int, help="images at a time (default: what memory holds)")
    add(
        "--shard-size",
        type=int,
        help="images a .npz file of an --out that is a folder, 0: a .png each "
        f"(default: 0 for up to {shards.PICTURES}, else {shards.SHARD})",
    )
    add(
        "--timeout",
        type=float,
        help="seconds after which a rank that gives no sign of life is given up "
        f"(default: FASTDDPM_TIMEOUT, or {ranks.TIMEOUT:g})",
    )
    add("--out", type=_path, default="samples.png", help=f"{figures.FORMATS}; default samples.png")
    add("--progressive", action="store_true", help="show the x0 predictions over time (Fig. 6)")
    add(
        "--frames",
        type=int,
        default=10,
        help="x0 predictions shown with --progressive (default: 10)",
    )
    add("--shared-latent", action="store_true", help="show samples that share x_t (Fig. 7)")

    add = command(
        "interpolate", _interpolate, "Mix two images' latents (Fig. 8, 9).", _machine(), _chain(),
        smaller="give a smaller --n",
    )  # fmt: skip
    add("first", type=_path, metavar="A.png", help="an image file")
    add("second", type=_path, metavar="B.png", help="another")
    add("--n", type=int, default=9, help="mixtures a row (default: 9)")
    add(
        "--t",
        type=_integers,
        default=[500],
        help="steps of the latents, a row each: 500 or 250,500,750",
    )
    add(
        "--out",
        type=_path,
        default="interpolation.png",
        help="a .png file (default: interpolation.png)",
    )

    add = command(
        "train", _train, "Train a model (Algorithm 1).", _machine(),
        smaller="give a smaller --batch-size, --image-size or --preset",
    )  # fmt: skip
    add(
        "--data",
        type=_path,
        required=True,
        help="a folder of images, idx, npz or npy arrays, CIFAR-10's archive, a zip, an lmdb",
    )
    add("--out", type=_path, required=True, help="the run's folder")
    add(
        "--preset",
        type=_preset,
        metavar="NAME",
        help=f"model and recipe: {', '.join(sorted(PRESETS))} (default: {DEFAULT_PRESET})",
    )
    add("--resume", action="store_true", help="go on from the last checkpoint in --out, exactly")
    add("--steps", type=int, help="optimiser steps in all (default: the preset's)")
    add("--batch-size", type=int, help="(default: the preset's)")
    add("--lr", type=float, help="learning rate (default: the preset's)")
    add("--warmup", type=int, help="steps to reach it (default: the preset's)")
    add("--ema-decay", type=float, help="of the averaged weights (default: the preset's)")
    add(
        "--image-size",
        type=_size,
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

    command("doctor", _doctor, "Say what was built, what can run here, and why not the faster one.")
    return parser


def _machine() -> argparse.ArgumentParser:
    """Options of every command that computes."""
    p = argparse.ArgumentParser(add_help=False)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--precision", default="auto", choices=("auto", "fp32", "bf16"), help="(default: auto)"
    )
    p.add_argument(
        "--device", type=_device, default=_device(None), help="cpu or cuda (default: cuda if there)"
    )
    p.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    return p


def _chain() -> argparse.ArgumentParser:
    """Options of every command that samples."""
    p = argparse.ArgumentParser(add_help=False)
    p.add_argument(
        "--model",
        type=_path,
        default="fashion-mnist",
        help="a folder, or a bundled model's name (default: fashion-mnist)",
    )
    p.add_argument("--sampler", default="ddpm", choices=("ddpm", "ddim"), help="(default: ddpm)")
    p.add_argument("--eta", type=float, default=0.0, help="noise of ddim, 0 .. 1 (default: 0)")
    p.add_argument(
        "--no-clip", action="store_true", help="do not clip the x0 predictions to [-1, 1]"
    )
    p.add_argument("--engine", default="auto", choices=get_args(EngineName), help="(default: auto)")
    return p


def _device(text: str | None) -> torch.device:
    if text is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a device; give cpu or cuda")
    cards = torch.cuda.device_count()
    if device.type == "cuda" and not cards:
        raise argparse.ArgumentTypeError("no CUDA device can be used here; give cpu")
    if device.type == "cuda" and (device.index or 0) >= cards:
        raise argparse.ArgumentTypeError(f"{text!r}: this machine has {cards}, numbered from 0")
    return device


def _path(text: str) -> str:
    """Not "", which Path takes for the current folder."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no path")
    return text


def _size(text: str) -> int | tuple[int, int]:
    """64, or (H, W) of 64x48 or 64,48."""
    try:
        sizes = [int(part) for part in text.lower().replace("x", ",").split(",")]
    except ValueError:
        sizes = []
    if len(sizes) not in (1, 2):
        raise argparse.ArgumentTypeError(
            f"{text!r}: give an integer, or height x width as 64x48 or 64,48"
        )
    return sizes[0] if len(sizes) == 1 else (sizes[0], sizes[1])


def _preset(name: str) -> str:
    try:
        preset(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give an integer, or several with commas"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
