"""`fastddpm compress` and `decompress`: their options, one call of the library each, and its
report."""

from __future__ import annotations

import argparse
import math
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tabulate import tabulate

from fastddpm import console, figures
from fastddpm.checkpoint import atomic_folder, atomic_write, check_free, named
from fastddpm.cli.arguments import alone, path
from fastddpm.codec import Decoder, encode_file
from fastddpm.data import Dataset, open_dataset
from fastddpm.options import check_count
from fastddpm.unet import UNet


def compress(a: argparse.Namespace) -> None:
    alone("compression")
    out = _free(a.out)
    model = UNet.from_pretrained(a.model)
    images = _First(_exact(a, model.in_channels), a.n)
    started = time.perf_counter()
    with atomic_write(out) as file:
        coded = encode_file(
            model, images, file, steps=a.steps, batch_size=a.batch_size, progress=not a.quiet
        )
        size = file.tell()
        check_free(out)
    values = len(images) * math.prod(images.shape)
    plain = f"{coded.plain} of them plainly, whose bits the others begin with"
    rows = {
        "read": f"{len(images):,} images {'x'.join(map(str, images.shape))}",
        "coded": f"{plain}; those at {coded.net:.3f} bits/dim" if coded.net else "all plainly",
        "wrote": str(out),
        "size": f"{size:,} bytes, {8 * size / values:.3f} bits/dim, {values / size:.2f} times less",
        "time": f"{time.perf_counter() - started:.1f} s",
    }
    console.say(tabulate(rows.items(), tablefmt="plain", disable_numparse=True))


def decompress(a: argparse.Namespace) -> None:
    alone("decompression")
    folder = _free(a.folder)
    started = time.perf_counter()
    with open(_regular(a.source), "rb") as file:
        decoder = Decoder(UNet.from_pretrained(a.model), file, a.source)
        head = decoder.head
        figures.check_channels(head.shape[0])
        digits, written = max(6, len(str(head.images - 1))), 0
        with atomic_folder(folder) as temporary:
            for images in decoder.images(progress=not a.quiet):
                for image in images:
                    picture = figures.to_pil(image)
                    picture.save(temporary / f"{written:0{digits}d}.png")
                    written += 1
    rows = {
        "read": a.source,
        "wrote": f"{written:,} images {'x'.join(map(str, head.shape))} into {folder}",
        "time": f"{time.perf_counter() - started:.1f} s",
    }
    console.say(tabulate(rows.items(), tablefmt="plain", disable_numparse=True))


class _First:
    """The first n images of a data set, or all."""

    def __init__(self, images: Dataset, n: int | None):
        self.images, self.shape = images.images, images.shape
        self._n = len(images) if n is None else check_count("--n", n, len(images))

    def __len__(self) -> int:
        return self._n


def _exact(a: argparse.Namespace, channels: int) -> Dataset:
    """The data set, if what a model of so many channels is given are the pixels that were there."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        images = open_dataset(a.images, split=a.split, progress=not a.quiet)
        if images.shape[0] == 1 and channels == 3 and images.kind in ("folder", "zip", "lmdb"):
            images = open_dataset(a.images, split=a.split, channels=3, progress=not a.quiet)
    if images.skipped or images.transparent:
        raise ValueError(
            f"{told[-1].message}: compression is to the pixel, so take those out, or convert them"
        )
    for warning in told:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if images.shape[0] != channels:
        raise ValueError(
            f"{a.images} holds images of {images.shape[0]} channels, and the model {a.model} has "
            f"{channels}: give another model"
        )
    return images


def _free(given: str) -> Path:
    """The path, if something can be written there that was not there."""
    path = named(given)
    check_free(path)
    parent = path.absolute().parent
    if not parent.is_dir():
        raise FileNotFoundError(f"output {given!r}: there is no folder {parent}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"output {given!r}: {parent} can't be written to")
    return path


def _regular(given: str) -> str:
    """A path to read: no pipe, which would be waited for."""
    if not os.path.exists(given):
        raise FileNotFoundError(f"no such file: {given}")
    if not os.path.isfile(given):
        raise ValueError(f"{given} is no regular file")
    return given


# ---- arguments -----------------------------------------------------------------------------------


def machine() -> argparse.ArgumentParser:
    """Options of both: the network runs on the CPU, where its bits are known."""
    p = argparse.ArgumentParser(add_help=False)
    p.add_argument(
        "--model",
        type=path,
        default="fashion-mnist",
        help="a folder, or a bundled model's name (default: fashion-mnist)",
    )
    p.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    return p


def add_compress(p: argparse.ArgumentParser) -> None:
    add: Callable[..., Any] = p.add_argument
    add("images", type=path, help="a folder of images, or a data set as `train` takes it")
    add("out", type=path, metavar="out.ddpm", help="the file to write, which must not be there")
    add("--steps", type=int, help="a shorter chain of evenly strided steps (default: all)")
    add("--split", default="train", choices=("train", "test"), help="(default: train)")
    add("--n", type=int, help="the first so many (default: all)")
    add("--batch-size", type=int, help="images at a time (default: what memory holds)")


def add_decompress(p: argparse.ArgumentParser) -> None:
    p.add_argument("source", type=path, metavar="in.ddpm", help="a file by `compress`")
    p.add_argument("folder", type=path, help="the folder to write, which must not be there")
