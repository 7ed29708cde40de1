"""Where the time of a training step goes: what comes after the last gradient (norm, clipping, Adam,
average) against a copy of as many bytes, and how long `fit` waits for images."""

from __future__ import annotations

import contextlib
import copy
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import milliseconds, synchronize
from tabulate import tabulate

from fastddpm import Trainer, UNet
from fastddpm.data import open_dataset
from fastddpm.training import fit

# Of a parameter in float32, at the least: the norm reads its gradient, then gradient, moments,
# weight and average are read and all but the first are written.
SWEPT_BYTES = 4 * (1 + 5 + 4)
FIT_STEPS = 6


@contextlib.contextmanager
def ends_of_backward(device: torch.device) -> Iterator[list[float]]:
    """The times at which a backward pass ended, while the context lasts."""
    ends: list[float] = []
    original = torch.autograd.backward

    def backward(*arguments: Any, **options: Any) -> None:
        original(*arguments, **options)
        synchronize(device)
        ends.append(time.perf_counter())

    torch.autograd.backward = backward  # type: ignore[assignment]
    try:
        yield ends
    finally:
        torch.autograd.backward = original


def parts(take_step: Any, steps: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of `steps` whole steps, and of what follows the last backward pass in each: empty
    where none is seen, as in a recorded step."""
    found: dict[str, list[float]] = {"step": [], "sweep": []}
    with ends_of_backward(device) as ends:
        for _ in range(steps):
            ends.clear()
            synchronize(device)
            start = time.perf_counter()
            take_step()
            synchronize(device)
            stop = time.perf_counter()
            found["step"].append(stop - start)
            if ends:
                found["sweep"].append(stop - ends[-1])
    return found


def fitted(model: UNet, batch: int, device: str, precision: str) -> dict[str, float]:
    """Seconds of a short run of `fit` on random images of a .npy file, and those that it waited for
    images."""
    n = 2 * batch + 1
    shape = (n, model.in_channels, *model.image_size)
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "x.npy", random.integers(0, 256, shape, dtype=np.uint8))
        dataset = open_dataset(Path(folder) / "x.npy", channels=model.in_channels, progress=False)
        trainer = Trainer(copy.deepcopy(model).float().to(device), precision=precision)
        ran = fit(
            trainer, dataset, Path(folder) / "run", steps=FIT_STEPS, batch_size=batch,
            save_every=FIT_STEPS, sample_every=0, progress=False,
        )  # fmt: skip
    return {"seconds": ran.seconds, "waited": ran.waited}


def table(rows: list[dict[str, Any]], parameters: int, copied: float) -> str:
    """copied: bytes a second of a copy, those read and those written."""
    shown = []
    for row in rows:
        if not (found := row.get("parts")):
            continue
        line = {
            "batch": row["batch"], "": row["name"], "precision": row["precision"],
            "ms a step": milliseconds(found["step"]),
        }  # fmt: skip
        if found["sweep"]:
            seconds = statistics.median(found["sweep"])
            rate = parameters * SWEPT_BYTES / seconds
            line |= {
                "ms after the gradients": milliseconds(found["sweep"]),
                "share": f"{seconds / statistics.median(found['step']):.0%}",
                "GB/s": f"{rate / 1e9:.3g}",
                "of a copy": f"{rate / copied:.0%}",
            }
        shown.append(line)
    return tabulate(shown, headers="keys", tablefmt="simple", disable_numparse=True)
