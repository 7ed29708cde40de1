"""Where the samples of a command begin: images that the user gives, noised to a step of the chain
(image to image). No sampling of its own."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastddpm import figures
from fastddpm.cli.arguments import path
from fastddpm.data import open_dataset
from fastddpm.unet import UNet

SUFFIXES = (".npz", ".npy", ".zip")  # of many images


def add_options(add: Callable[..., Any]) -> None:
    add(
        "--init",
        type=path,
        metavar="IMAGES",
        help="begin at these, noised: a picture for all samples, or a folder, .npz, .npy or .zip "
        "of one each; needs --start",
    )
    add("--start", type=int, metavar="K", help="of --init: the steps of the chain that are left")


def check_options(a: argparse.Namespace, *, to_folder: bool) -> None:
    """ValueError where --init and --start do not go together, or with what is to be written."""
    if (a.init is None) != (a.start is None):
        given, missing = ("--start", "--init") if a.init is None else ("--init", "--start")
        raise ValueError(
            f"{given} needs {missing}: --init says which images samples begin at, and --start how "
            "many steps are left of the chain: the more, the less of the images"
        )
    if a.init is None:
        return
    if not Path(a.init).exists():
        raise FileNotFoundError(f"--init: {a.init} does not exist")
    if a.shared_latent:
        raise ValueError("--shared-latent begins at x_T: --init is for samples and --progressive")
    if to_folder:
        raise ValueError(
            f"--init is for an --out that is a .png or .npz, which hold one call's samples; got "
            f"{a.out!r}"
        )


def read(a: argparse.Namespace, model: UNet, n: int) -> tuple[dict[str, Any], int, str]:
    """(options of fastddpm.sample, how many samples, a word for the report). n: where the command
    does not say how many; a set of images has one for each sample.
    """
    if a.init is None:
        return {}, n if a.n is None else a.n, ""
    place = Path(a.init)
    if not (place.is_dir() or place.suffix.lower() in SUFFIXES):
        n = n if a.n is None else a.n
        one = figures.read_image(place, model.image_size, model.in_channels)
        init = one.expand(max(n, 0), *one.shape)
    else:
        channels = None if place.suffix.lower() in SUFFIXES[:2] else model.in_channels
        data = open_dataset(place, size=model.image_size, channels=channels, progress=not a.quiet)
        shape = (model.in_channels, *model.image_size)
        if data.shape != shape:
            raise ValueError(
                f"--init: {place} has images {_size(data.shape)}; the model's are {_size(shape)}"
            )
        n = min(n, len(data)) if a.n is None else a.n
        if n > len(data):
            raise ValueError(f"--init: {place} has {len(data)} images, too few for --n {n}")
        init = data.images(torch.arange(max(n, 0), device="cpu"))
    return {"init": init, "start": a.start}, n, f", from {place} with {a.start} steps left"


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
