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


def in_range(low: float, high: float) -> bool:
    """Whether pixels are; NaN is in no range."""
    return low >= -1 - SLACK and high <= 1 + SLACK


def out_of_range(low: float, high: float) -> str:
    return (
        f"images of floats must lie in [-1, 1]; got {low:.6g} .. {high:.6g}: of 0 .. 255, give "
        "uint8, or x / 127.5 - 1"
    )


class Stop(NamedTuple):
    """The step that stopped a run, and how many were taken after it, all of them left out."""

    loss: float
    norm: float
    low: float
    high: float
    unlike: float
    after: int

    @property
    def is_none(self) -> bool:
        """Whether that step was none, whatever its numbers: its images or its ranks were wrong."""
        return not in_range(self.low, self.high) or self.unlike > 0

    def error(self, step: int) -> Exception:
        """What to raise of it: ValueError of a step that is none, else FloatingPointError.

        step: its number"""
        what = f"step {step}: loss {self.loss}, gradient norm {self.norm}"
        left = f"; steps {step + 1} .. {step + self.after} were left out, too" if self.after else ""
        if self.after == 1:
            left = f"; step {step + 1} was left out, too"
        if not self.is_none:
            return FloatingPointError(
                f"{what}: it is the {IN_A_ROW}th step in a row that is not finite; the weights are "
                f"those before step {step - IN_A_ROW + 1}{left}"
            )
        what += f"; the weights are those before this step{left}"
        if not in_range(self.low, self.high):  # which may be why the loss is not finite
            return ValueError(f"{out_of_range(self.low, self.high)} ({what})")
        return ValueError(
            "the ranks did not take one step together: their parts must follow one another and "
            f"make up a step, the same one on each; without part=, as many images ({what})"
        )


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
