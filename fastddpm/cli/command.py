"""The command line: arguments in, one call of the library, a short table out. No computation of its
own.

Every mistake of the user is one line on stderr and exit code 2, made before anything long begins.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import Any, get_args

import torch
from tabulate import tabulate

import fastddpm
from fastddpm import batching, console, figures, ranks, shards
from fastddpm.cli import beginning
from fastddpm.cli import codec as cli_codec
from fastddpm.cli import convert as cli_convert
from fastddpm.cli import evaluate as cli_evaluate
from fastddpm.cli import figures as cli_figures
from fastddpm.cli import train as cli_train
from fastddpm.cli.arguments import alone, integers, machine, path, timeout, visited
from fastddpm.doctor import doctor, what_runs
from fastddpm.engine import EngineName
from fastddpm.host import check_threads
from fastddpm.ops.dispatch import BackendError
from fastddpm.precision import Precision
from fastddpm.sampling import draw_shared_latent
from fastddpm.spacing import Spacing
from fastddpm.unet import UNet

MISTAKES = (
    ValueError, OSError, ImportError, FloatingPointError, ranks.RankError, BackendError,
)  # fmt: skip


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
    beginning.check_options(a, to_folder=to_folder)
    model = UNet.from_pretrained(a.model).to(a.device)
    figures.check_output(out, channels=model.in_channels)
    options = _sampler_options(a)
    steps = model.diffusion.respace(a.steps, spacing=a.spacing).T
    begins, n, of_init = beginning.read(a, model, 8 if figure else 64)
    options |= begins
    samples = f"samples {a.first_index} .. {a.first_index + n - 1} of seed {a.seed}{of_init}"
    started = time.perf_counter()
    labels: dict[str, Any] = {}
    if a.progressive:
        _, x0, times = fastddpm.sample_progressive(
            model, n, frames=a.frames, seed=a.seed, first_index=a.first_index, **options
        )
        images = x0.transpose(0, 1).flatten(0, 1)
        labels = {"columns": [str(t + 1) for t in times], "corner": "t"}
        what = f"one image a row, its x0 predictions at t = {', '.join(labels['columns'])}{of_init}"
    elif a.shared_latent:
        rows = [max(1, round(steps * share)) for share in (1, 0.75, 0.5, 0.25)]
        drawn, latents = draw_shared_latent(
            model, n, t=rows, seed=a.seed, first_index=a.first_index, **options
        )
        images = torch.cat((latents[:, None], drawn), dim=1).flatten(0, 1)
        labels = {"rows": [str(t) for t in rows], "corner": "t", "apart": (1,)}
        labels["columns"] = ["x_t", "samples", *[""] * (n - 1)]
        what = f"a row shares x_t, shown first, at t = {', '.join(map(str, rows))} of {steps} steps"
    elif to_folder:
        missed = fastddpm.sample_to_folder(
            model, out, n, seed=a.seed, first_index=a.first_index, shard_size=a.shard_size,
            batch_size=a.batch_size, **options,
        )  # fmt: skip
        what = samples + f", {n - missed} of them there before" * (missed < n)
        n = missed
    else:
        images = fastddpm.sample(
            model, n, seed=a.seed, first_index=a.first_index, batch_size=a.batch_size, **options
        )
        what = samples
    seconds = time.perf_counter() - started
    if ranks.place()[0] != 0:
        return
    if figure:
        first = "x0 predicted from x_t" if a.progressive else "Samples of p(x0 | x_t)"
        title = f"{first}: {a.sampler.upper()}, {steps:,} steps, seed {a.seed}"
        _save_labelled(out, images, title, **labels)
    elif not to_folder:
        figures.save_samples(images, out)
    _report(out, {"images": what, "chain": f"{a.sampler}, {steps} steps"}, seconds, n, model, a)


def _interpolate(a: argparse.Namespace) -> None:
    alone("an interpolation")
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
    weights = [f"{weight:.3g}" for weight in torch.linspace(0, 1, a.n).tolist()]
    _save_labelled(
        out, torch.cat(rows), f"Interpolation: {a.sampler.upper()}, seed {a.seed}",
        rows=[str(t) for t in a.t], columns=["source", *weights, "source"], corner="t \\ λ",
        apart=(1, a.n + 1),
    )  # fmt: skip
    what = f"source | {a.n} mixtures | source, a row each at t = {', '.join(map(str, a.t))}"
    _report(out, {"images": what}, seconds, a.n * len(a.t), model, a)


def _doctor(a: argparse.Namespace) -> None:
    console.say(doctor(), wanted=True)


def _save_labelled(out: Path, images: torch.Tensor, title: str, **labels: Any) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    figures.save_image(figures.labelled_grid(images, title=title, **labels), out)


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


def _sampler_options(a: argparse.Namespace) -> dict:
    options = {name: getattr(a, name) for name in ("sampler", "eta", "precision", "engine")}
    options |= {"progress": not a.quiet, "clip": not a.no_clip}
    if hasattr(a, "steps"):
        options |= {"steps": a.steps, "spacing": a.spacing}
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
        return p

    add = command(
        "sample", _sample, "Draw images from a model (Algorithm 2).", machine(), _chain(),
        smaller="give a smaller --batch-size, or a folder as --out for fewer images at a time",
    ).add_argument  # fmt: skip
    add(
        "-n",  # torchrun takes a --n for one of its own
        "--n",
        type=int,
        help="images to draw (default: 64; 8 rows or columns of the figures)",
    )
    add("--first-index", type=int, default=0, help="continue a set: the first sample's number")
    add(
        "--steps",
        type=visited,
        help="a shorter chain: how many steps, or OpenAI's words for them, ddim50 or 10,15,20 for "
        "so many of each equal section (default: all)",
    )
    add(
        "--spacing",
        default="strided",
        choices=get_args(Spacing),
        help="which steps a number of --steps takes (default: strided, with the first and last)",
    )
    beginning.add_options(add)
    add("--batch-size", type=int, help="images at a time (default: what memory holds)")
    add(
        "--shard-size",
        type=int,
        help="images a .npz file of an --out that is a folder, 0: a .png each "
        f"(default: 0 for up to {shards.PICTURES}, else {shards.SHARD})",
    )
    timeout(add)
    add("--out", type=path, default="samples.png", help=f"{figures.FORMATS}; default samples.png")
    add("--progressive", action="store_true", help="show the x0 predictions over time (Fig. 6)")
    add(
        "--frames",
        type=int,
        default=10,
        help="x0 predictions shown with --progressive (default: 10)",
    )
    add("--shared-latent", action="store_true", help="show samples that share x_t (Fig. 7)")

    add = command(
        "interpolate", _interpolate, "Mix two images' latents (Fig. 8, 9).", machine(), _chain(),
        smaller="give a smaller --n",
    ).add_argument  # fmt: skip
    add("first", type=path, metavar="A.png", help="an image file")
    add("second", type=path, metavar="B.png", help="another")
    add("--n", type=int, default=9, help="mixtures a row (default: 9)")
    add(
        "--t",
        type=integers,
        default=[500],
        help="steps of the latents, a row each: 500 or 250,500,750",
    )
    add(
        "--out",
        type=path,
        default="interpolation.png",
        help="a .png file (default: interpolation.png)",
    )

    cli_figures.add_options(command(
        "figures", cli_figures.run, "Draw the paper's figures of a model, and a page of them.",
        machine(), _chain(), smaller="give a smaller --n",
    ))  # fmt: skip

    cli_train.add_options(command(
        "train", cli_train.train, "Train a model (Algorithm 1).", machine(),
        smaller="give a smaller --batch-size, --image-size or --preset",
    ))  # fmt: skip

    cli_evaluate.add_options(command(
        "evaluate", cli_evaluate.run,
        "Judge a model: bits/dim, rate and distortion, FID (Tables 1 and 4, Figure 5).",
        machine(), _chain(), smaller="give a smaller --batch-size",
    ))  # fmt: skip

    cli_convert.add_options(command(
        "convert", cli_convert.run, "Write a model or another trainer's checkpoint as a folder.",
    ))  # fmt: skip
    cli_codec.add_compress(command(
        "compress", cli_codec.compress, "Images as a small file, to the pixel, by a model's bound.",
        cli_codec.machine(), smaller="give a smaller --batch-size",
    ))  # fmt: skip
    cli_codec.add_decompress(command(
        "decompress", cli_codec.decompress, "The images of such a file, as a folder of .png.",
        cli_codec.machine(),
    ))  # fmt: skip
    command("doctor", _doctor, "Say what was built, what can run here, and why not the faster one.")
    return parser


def _chain() -> argparse.ArgumentParser:
    """Options of every command that samples."""
    p = argparse.ArgumentParser(add_help=False)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--precision", default="auto", choices=get_args(Precision), help="(default: auto)"
    )
    p.add_argument(
        "--model",
        type=path,
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
