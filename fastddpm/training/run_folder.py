"""The folder of a training run: when one may begin there, who may write into it, and what killed
ones left. No training."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from fastddpm import folder_lock
from fastddpm.checkpoint import read_json, read_metadata, remove_abandoned
from fastddpm.folder_lock import LOCK
from fastddpm.pretrained import CONFIG, WEIGHTS

STATE, LOG, PLOT, SAMPLES = "trainer.safetensors", "log.csv", "loss.png", "samples"
RECIPE = "recipe.json"  # all options of the run, see recipe.py
BEST, NOTE = "best", "best"  # the folder of the best model; the key, and the file, of what it is
BOARD = "tensorboard"
WRITER = "fastddpm"  # key of the version that wrote a recipe: the mark of a run's own


def check_new(out: Path) -> None:
    """FileExistsError if a run that begins in `out` would write over another or over a model."""
    if (out / STATE).exists():
        raise FileExistsError(
            f"{out} holds a run: add --resume to go on with it, or give another folder"
        )
    there = [name for name in (WEIGHTS, "model_index.json") if (out / name).exists()]
    if (out / BEST / WEIGHTS).exists() and NOTE not in read_metadata(out / BEST / WEIGHTS):
        there.append(f"{BEST}/{WEIGHTS}")
    if not there and (out / CONFIG).exists() and not _is_ours(out / CONFIG):
        there = [CONFIG]
    if there:
        raise FileExistsError(
            f"{out} holds a model ({there[0]}) and no run ({STATE}): give another folder, a run "
            "would write over it"
        )

    if (out / RECIPE).exists() and not _has(out / RECIPE, WRITER):
        raise FileExistsError(
            f"{out / RECIPE} was not written by a run, which would write over it: give it another "
            "name, or the run another folder"
        )


def _has(file: Path, key: str) -> bool:
    try:
        return key in read_json(file)
    except ValueError:
        return False


def _is_ours(config: Path) -> bool:
    """True for the config.json of a run that was killed before its first checkpoint was whole."""
    try:
        return read_json(config).get("format") == "fastddpm"
    except ValueError:
        return False


def check_kinds(out: Path) -> None:
    """ValueError if one of a run's names in `out` is taken by what is no file, or no folder: it
    could not be written, or reading it would wait for ever.
    """
    of_best = [f"{BEST}/{name}" for name in (CONFIG, WEIGHTS, f"{NOTE}.json")]
    for name in (CONFIG, WEIGHTS, STATE, LOG, PLOT, RECIPE, LOCK, *of_best):
        if os.path.lexists(out / name) and not (out / name).is_file():
            raise ValueError(f"{out / name} is no regular file, and a run keeps one there")
    for folder in (out, out / SAMPLES, out / BEST, out / BOARD):
        if os.path.lexists(folder) and not folder.is_dir():
            raise ValueError(f"{folder} is no folder, and a run keeps its files there")


def check_apart(data: str | os.PathLike, out: str | os.PathLike) -> None:
    """ValueError if the pictures of the run in `out` would be among its data."""
    source, run = Path(data).resolve(), Path(out).resolve()
    inside = source.is_dir() and (run == source or source in run.parents)
    pictures = run / SAMPLES
    if inside or source == pictures or pictures in source.parents:
        raise ValueError(
            f"the run's folder {out} and its data {data} must be apart: it would train on its own "
            "pictures; give another --out"
        )


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """`out` for this process alone, until the block or the process ends, however it does.

    Raises BlockingIOError, naming the process that has it. What killed runs left half-written is
    removed.
    """
    with folder_lock.locked(out, "training"):
        for folder, names in (
            (out, {CONFIG, WEIGHTS, STATE, LOG, PLOT, RECIPE}.__contains__),
            (out / BEST, {CONFIG, WEIGHTS, f"{NOTE}.json"}.__contains__),
            (out / SAMPLES, re.compile(r"step_\d+\.png").fullmatch),
        ):
            remove_abandoned(folder, lambda name, names=names: bool(names(name)))  # type: ignore[misc]
        yield
