"""The steps of a run that may not count, found out on the device: no step waits for the answer, and
none of them changes anything."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch

SLACK = 1e-3  # of pixels beyond [-1, 1], for what rounding makes of it
IN_A_ROW = 10  # steps that are not finite, one after the other, are no accident: they stop a run
_LARGEST = torch.finfo(torch.float32).max


class Stop(NamedTuple):
    """The step that stopped a run, and how many were taken after it, all of them left out."""

    loss: float
    norm: float
    low: float
    high: float
    unlike: float
    after: int

    @property
    def out_of_range(self) -> bool:
        """Whether its pixels were, which may be why its loss is not finite; NaN is in no range."""
        return not (self.low >= -1 - SLACK and self.high <= 1 + SLACK)


class Seen(NamedTuple):
    """What the guard saw since it was read before.

    skipped:  steps that were not finite;  in_a_row: the last so many, those before included"""

    skipped: int
    in_a_row: int
    stop: Stop | None


class Guard:
    """Looks at every step's loss, gradient norm and pixels. Where `refused` is 1, Adam and the
    average leave all as it is:

    - in a step whose loss or norm is not finite: it is skipped, and the next one counts again;
    - from the IN_A_ROW-th of such steps in a row on, and from a step on with a pixel that is not in
      [-1, 1] or whose ranks do not take one step together: the run is stopped, until it is read.

    So the state is a good one whenever the host looks at it.

    refused: () float32 on the device, 0 or 1: what fused optimisers call found_inf"""

    def __init__(self, device: torch.device):
        self._state = torch.zeros(10, dtype=torch.float32, device=device)
        self._seen = self._state[:5]  # of the last step, or of the one that stopped the run
        self.refused, self._row, self._skipped, self._stopped, self._after = self._state[5:]
        self._limits = torch.full((5,), 1 + SLACK, dtype=torch.float32, device=device)
        self._limits[:2] = _LARGEST
        self._limits[4] = 0
        self._bytes = torch.ones(2, dtype=torch.float32, device=device)
        self._bytes[0] = -1
        self._alike = torch.zeros(1, dtype=torch.float32, device=device)

    def range_of(self, images: torch.Tensor) -> torch.Tensor:
        """(least, largest) pixel in [-1, 1], (2,) float32 on the device."""
        if not images.is_floating_point():
            return self._bytes
        return torch.stack(torch.aminmax(images)).float()

    def look(
        self,
        loss: torch.Tensor,
        norm: torch.Tensor,
        pixels: torch.Tensor,
        unlike: torch.Tensor | None = None,
    ) -> None:
        """Judge a step by these.

        loss, norm: ();  pixels: `range_of` its images;  unlike: (1,), not 0 where ranks differ"""
        numbers = torch.stack((loss, norm)).float()
        now = torch.cat((numbers, pixels, self._alike if unlike is None else unlike))
        within = now.abs() <= self._limits  # NaN is not
        stopped = self._stopped > 0
        wrong = within[2:].all().logical_not()
        # A step after the one that stopped the run is none: it is left out, and counts as nothing.
        skips = within[:2].all().logical_or(wrong).logical_or(stopped).logical_not()
        torch.where(stopped, self._seen, now, out=self._seen)
        self._after += stopped
        self._skipped += skips
        self._row.copy_(torch.where(skips, self._row + 1, self._row * stopped))
        self._stopped.copy_(stopped | wrong | (self._row >= IN_A_ROW))
        torch.maximum(self._stopped, skips.float(), out=self.refused)

    def read(self) -> Seen:
        """Wait for the steps so far. Where they were stopped, the next one is looked at anew."""
        loss, norm, low, high, unlike, _, row, skipped, stopped, after = self._state.tolist()
        self.reset(0 if stopped else int(row))
        stop = Stop(loss, norm, low, high, unlike, int(after)) if stopped else None
        return Seen(int(skipped), int(row), stop)

    def reset(self, in_a_row: int = 0) -> None:
        """As if no step had been seen but so many in a row that were not finite."""
        self._state.zero_()
        self._row.fill_(in_a_row)

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """Steps in here change nothing, and are not looked at."""
        before = self._state.clone()
        self._seen.fill_(torch.nan)
        self._stopped.fill_(1)
        self.refused.fill_(1)
        try:
            yield
        finally:
            self._state.copy_(before)
