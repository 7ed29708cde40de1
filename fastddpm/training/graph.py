"""A training step recorded once as a CUDA graph and replayed for every batch of its shape: one
launch in place of some thousand. What a step computes is trainer.py's."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

from fastddpm.engine.cuda_graph import Record
from fastddpm.ops.dispatch import report_slower
from fastddpm.presence import first_line
from fastddpm.training.guard import Guard

Compute = Callable[
    [
        torch.Tensor, "torch.Tensor | None", torch.Tensor, "float | torch.Tensor",
        "float | torch.Tensor",
    ],
    torch.Tensor,
]  # fmt: skip


class Recordings:
    """The recording that serves the steps of a run, while they stay alike.

    Steps that are alike have the same key: the shape of the batch, the addresses of all that a step
    writes, and whatever else Python decides by. Batches of a shape that comes once, the last of an
    epoch say, are not worth a recording: the second in a row that are alike are recorded. A step
    that can't be recorded is a warning, once, and the run goes on without."""

    def __init__(self, record: Record | None, device: torch.device, guard: Guard):
        self.record, self._device, self._guard = record, device, guard
        self._last: Hashable = None
        self._step: _Step | None = None

    def forget(self) -> None:
        self._last = self._step = None

    def get(
        self, key: Hashable, compute: Compute, x0: torch.Tensor, y: torch.Tensor | None
    ) -> _Step | None:
        """What replays `compute` for batches like x0 and y; None for a step to be made as it is."""
        if self.record is None:
            return None
        last, self._last = self._last, key
        if self._step is not None and self._step.key == key:
            return self._step
        if key != last:
            return None
        self._step = None  # its memory first
        try:
            self._step = _Step(key, compute, x0, y, self.record, self._device, self._guard)
        except RuntimeError as error:  # of memory, too: a recording has its own
            self.record, why = None, first_line(error)
            report_slower(f"fastddpm trains step by step, not by a CUDA graph: {why}")
        return self._step


class _Step:
    """A recording with the tensors that it reads."""

    def __init__(
        self,
        key: Hashable,
        compute: Compute,
        x0: torch.Tensor,
        y: torch.Tensor | None,
        record: Record,
        device: torch.device,
        guard: Guard,
    ):
        self.key = key
        self._x0 = x0.clone(memory_format=torch.preserve_format)
        self._y = None if y is None else y.clone()
        self._index = torch.zeros(x0.shape[0], dtype=torch.int64, device=device)
        self._rate = torch.zeros((), dtype=torch.float32, device=device)
        self._share = torch.zeros((), dtype=torch.float32, device=device)
        self._loss = self._rate  # the recording's, once it is made

        def step() -> None:
            self._loss = compute(self._x0, self._y, self._index, self._rate, self._share)

        with guard.refusing():  # warming up moves nothing
            self._replay = record(step, _nothing, device)

    @torch.no_grad()
    def __call__(
        self, x0: torch.Tensor, y: torch.Tensor | None, first: int, rate: float, share: float
    ) -> torch.Tensor:
        """The step for these examples, first, first + 1, ...; returns the loss."""
        self._x0.copy_(x0)
        if self._y is not None and y is not None:
            self._y.copy_(y)
        torch.arange(first, first + len(self._index), out=self._index)
        self._rate.fill_(rate)
        self._share.fill_(share)
        self._replay()
        return self._loss.clone()


def _nothing() -> None:
    """What makes another step possible where it moved nothing."""
