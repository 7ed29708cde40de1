"""`fastddpm figures`: its options, one call of the library, and its report."""

from __future__ import annotations

import argparse
import os
import shlex
import time
from collections.abc import Callable
from typing import Any

from tabulate import tabulate

from fastddpm import console
from fastddpm.cli.arguments import alone, path
from fastddpm.doctor import what_runs
from fastddpm.figures.folder import FRAMES, ROWS, K, N, gallery
from fastddpm.figures.output import check_output
from fastddpm.figures.paper import FIGURES
from fastddpm.unet import UNet

# Options that are passed on by their names, and said in the page's command where they are given.
OPTIONS = (
    "n", "rows", "frames", "k", "search", "seed", "steps", "sampler", "eta", "precision", "engine",
    "extractor", "weights", "evaluation",
)  # fmt: skip


def run(a: argparse.Namespace) -> None:
    alone("a gallery")
    check_output(a.out, kinds=("",))
    model = UNet.from_pretrained(a.model).to(a.device)
    started = time.perf_counter()
    made = gallery(
        model, a.data, a.out, only=a.only, clip=not a.no_clip, progress=not a.quiet,
        title=os.path.basename(os.path.normpath(a.model)), command=_command(a),
        **{name: getattr(a, name) for name in OPTIONS},
    )  # fmt: skip
    seconds = time.perf_counter() - started
    rows = [
        (x.title, x.numbers, str(x.path), "kept" if x.seconds is None else f"{x.seconds:.1f} s")
        for x in made.shown
    ]
    there = {x.name for x in made.shown}
    for name, why in made.left_out.items():
        if a.only is None and name not in there:
            rows.append((FIGURES[name].title, FIGURES[name].numbers, "-", why))
    console.say(tabulate(rows, headers=("figure", "of the paper", "file", "time")))
    facts = {
        "page": f"{made.index}  (open it in a browser)",
        "time": f"{seconds:.1f} s",
        "ran": what_runs(model, a.engine, a.precision),
    }
    console.say("\n" + tabulate(facts.items(), tablefmt="plain"))


def _command(a: argparse.Namespace) -> str:
    """What draws this gallery, for the page: the options that were given, and those that say what
    it is of."""
    words = ["fastddpm", "figures", "--model", a.model]
    words += ["--data", a.data] if a.data is not None else []
    for name in OPTIONS:
        value = getattr(a, name)
        if name == "seed" or value != a.defaults[name]:
            words += [f"--{name}", str(value)]
    words += ["--no-clip"] * a.no_clip + ["--out", a.out]
    return shlex.join(words)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def add_options(p: argparse.ArgumentParser) -> None:
    add: Callable[..., Any] = p.add_argument
    add(
        "--data",
        type=path,
        help="the images that the model was trained on, as train takes them: samples are compared "
        "with them and they are mixed (default: none, and no such figures)",
    )
    add("--out", type=path, default="figures", help="the folder (default: figures)")
    add(
        "--only",
        type=_names,
        metavar="NAME,...",
        help=f"of {', '.join(FIGURES)} (default: all for which what they need is given)",
    )
    add("-n", "--n", type=int, help=f"uncurated samples (default: {N})")
    add("--rows", type=int, help=f"images of the other figures (default: {ROWS})")
    add("--frames", type=int, default=FRAMES, help=f"of each image over time (default: {FRAMES})")
    add("--k", type=int, help=f"nearest images of each (default: {K})")
    add("--search", type=int, help="of so many images of the data, evenly spaced (default: all)")
    add("--steps", type=int, help="a shorter chain of evenly strided steps (default: all)")
    add("--extractor", metavar="NAME", help="a network, for nearest images in its features")
    add("--weights", type=path, metavar="FILE", help="Inception's, which are not downloaded")
    add(
        "--evaluation",
        type=path,
        metavar="FOLDER",
        help="of fastddpm evaluate, for its plots of rate and distortion",
    )
    p.set_defaults(defaults={name: p.get_default(name) for name in OPTIONS})
