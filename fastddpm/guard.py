"""The steps of a run that may not count, found out on the device: no step waits for the answer, and
none after the first of them changes anything."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch

SLACK = 1e-3  # of pixels beyond [-1, 1], for what rounding makes of it
_LARGEST = torch.finfo(torch.float32).max


class Refused(NamedTuple):
    """The first step that was refused, and how many were with those after it."""

    loss: float
    norm: float
    low: float
    high: float
    steps: int

    @property
    def out_of_range(self) -> bool:
        """Whether its pixels were, which may be why its loss is not finite; NaN is in no range."""
        return not (self.low >= -1 - SLACK and self.high <= 1 + SLACK)


class Guard:
    """Looks at every step's loss, gradient norm and pixels. From the first step on where one of
    them is not finite, or a pixel not in [-1, 1], `refused` is 1: Adam and the average leave all
    as it is, so that the state is the one before that step whenever the host reads of it.

    refused: () float32 on the device, 0 or 1: what fused optimisers call found_inf"""

    def __init__(self, device: torch.device):
        self._state = torch.zeros(6, dtype=torch.float32, device=device)
        # Of the last step, or from the refused one on of this one.
        self._seen, self.refused, self._steps = self._state[:4], self._state[4], self._state[5]
        self._limits = torch.full((4,), 1 + SLACK, dtype=torch.float32, device=device)
        self._limits[:2] = _LARGEST
        self._bytes = torch.ones(2, dtype=torch.float32, device=device)
        self._bytes[0] = -1

    def look(self, loss: torch.Tensor, norm: torch.Tensor, images: torch.Tensor) -> None:
        """Judge a step by these, unless one before it was refused."""
        pixels = self._bytes
        if images.is_floating_point():
            pixels = torch.stack(torch.aminmax(images)).float()
        now = torch.cat((torch.stack((loss, norm)).float(), pixels))
        torch.where(self.refused > 0, self._seen, now, out=self._seen)
        within = self._seen.abs() <= self._limits  # NaN is not
        self.refused.copy_(within.all().logical_not())
        self._steps += self.refused

    def read(self) -> Refused | None:
        """Wait for the steps so far. None where all count; else what was refused, and the next step
        is looked at anew."""
        loss, norm, low, high, refused, steps = self._state.tolist()
        if not refused:
            return None
        self.reset()
        return Refused(loss, norm, low, high, int(steps))

    def reset(self) -> None:
        self._state.zero_()

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """Steps in here change nothing, and are not looked at."""
        before = self._state.clone()
        self._seen.fill_(torch.nan)
        self.refused.fill_(1)
        try:
            yield
        finally:
            self._state.copy_(before)
