"""What the figures of a gallery are of, and the samples that they share. No pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastddpm.batching import MOST
from fastddpm.data import batch_indices
from fastddpm.evaluation.extractors import Extractor
from fastddpm.evaluation.images import Images
from fastddpm.figures.pictures import to_uint8
from fastddpm.progress import Whole
from fastddpm.sampling import sample_progressive
from fastddpm.schedule import Schedule
from fastddpm.unet import UNet

NO_DATA = "figures are left out where what they need is not given"


@dataclass
class Progression:
    """n samples and how they came to be.

    images (n, C, H, W) uint8;  predictions (frames, rows, C, H, W) uint8: of x0, of the first
    samples;  times: the paper's t of each, from T on;  rmse: (frames,), of all n samples'
    predictions against the samples, on the 0 .. 255 scale;  every: the predictions of all samples,
    where they were drawn just now
    """

    images: torch.Tensor
    predictions: torch.Tensor
    times: list[int]
    rmse: list[float]
    every: torch.Tensor | None = None


@dataclass
class Job:
    """What the figures are of.

    options:  of `fastddpm.sample`: the chain, precision and engine
    schedule: of the chain
    data:     the images that are mixed;  searched: those that samples are compared with
    """

    model: UNet
    options: dict[str, Any]
    schedule: Schedule
    data: Images | None
    searched: Images | None
    n: int
    rows: int
    frames: int
    k: int
    seed: int
    extractor: Extractor | None
    evaluation: Path | None
    whole: Whole
    said: str = field(init=False)
    progression: Progression | None = None

    def __post_init__(self) -> None:
        T, sampler = self.schedule.T, self.options["sampler"]
        of = "" if self.schedule.full_steps == T else f" of {self.schedule.full_steps:,}"
        self.said = f"{sampler.upper()}, {T:,}{of} steps, seed {self.seed}"

    @property
    def model_shape(self) -> tuple[int, int, int]:
        return (self.model.in_channels, *self.model.image_size)

    @property
    def T(self) -> int:
        return self.schedule.T

    def paper_t(self, level: int) -> int:
        """The paper's t of the x_t that `level` steps of the chain lead from to x_0."""
        return int(self.schedule.timesteps[level - 1]) + 1 if level else 0

    def levels(self, shares: Sequence[float], least: int) -> list[int]:
        """Steps of the chain at these shares of it, falling, each once."""
        found = {max(least, round(self.T * share)) for share in shares}
        return sorted(found, reverse=True)

    def drawn(self, *, every: bool = False) -> Progression:
        """The samples of all figures that show some, drawn once; drawn again where those that are
        there lack what is wanted."""
        if self.progression is None or (every and self.progression.every is None):
            self.progression = self._draw()
        return self.progression

    def _draw(self) -> Progression:
        """A batch after the other, so that no more predictions are in memory than are kept."""
        most = MOST.get(next(self.model.parameters()).device.type, MOST["cpu"])
        images, predictions, squares = [], [], torch.zeros((), dtype=torch.float64)
        for first in range(0, self.n, most):
            count = min(most, self.n - first)
            with self.whole.part(count * self.T, self.T):
                x, x0, times = sample_progressive(
                    self.model, count, first_index=first, frames=self.frames, seed=self.seed,
                    progress=False, **self.options,
                )  # fmt: skip
            squares = squares + (x0 - x).double().square().sum(dim=(1, 2, 3, 4)).cpu()
            images.append(to_uint8(x).cpu())
            kept = count if self.extractor is not None else max(0, self.rows - first)
            predictions.append(to_uint8(x0[:, :kept]).cpu())
        every = torch.cat(predictions, dim=1)
        mean = squares / (self.n * math.prod(self.model_shape))
        return Progression(
            torch.cat(images), every[:, : self.rows].clone(), [t + 1 for t in times],
            (mean.sqrt() * 127.5).tolist(), every if self.extractor is not None else None,
        )  # fmt: skip

    def pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Images to mix, drawn from the data by the seed; half as many as there are rows."""
        assert self.data is not None, NO_DATA
        data = self.data
        count = min(max(1, self.rows // 2), len(data) // 2)
        picked = batch_indices(len(data), 2 * count, 0, seed=self.seed).tolist()
        x = [data[k : k + 1][0] for k in picked]
        return list(zip(x[::2], x[1::2], strict=True))
