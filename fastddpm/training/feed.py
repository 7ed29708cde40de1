"""The images of a run's steps, read ahead of them, and how long the steps waited. What a step takes
is data/batches.py's."""

from __future__ import annotations

import collections
import time
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from fastddpm import ranks
from fastddpm.data import Dataset, batch_indices
from fastddpm.training.upload import staged, uploaded

AHEAD = 3  # batches that are read, or being read, while a step computes


class Feed:
    """Iterates over the images of some steps of a run, (N, C, H, W) uint8 on `device`: of each step
    those that this rank of `world` computes.

    Batches are read in a thread of their own, and for a GPU put into pinned memory, up to AHEAD of
    them before they are asked for, in the order of the steps: one that takes longer than its step
    holds nothing up while the others make up for it.

    part:   (start, stop, batch_size): the examples of every step that are this rank's; of an empty
            part there is one image, see Trainer.step
    waited: seconds so far in which a step waited for its images. Of a GPU's steps, which are queued
            ahead of it, it is the host that waited: the GPU did so no longer"""

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        steps: range,
        *,
        seed: int,
        device: torch.device,
        place: tuple[int, int] = (0, 1),
    ):
        self._dataset, self._steps, self._seed, self._device = dataset, steps, seed, device
        self.part = (*ranks.share(batch_size, *place), batch_size)
        self.waited = 0.0

    def __iter__(self) -> Generator[torch.Tensor, None, None]:
        pending: collections.deque[Future[torch.Tensor]] = collections.deque()
        reader = ThreadPoolExecutor(1)
        try:
            for step in self._steps[:AHEAD]:
                pending.append(reader.submit(self._read, step))
            for later in range(AHEAD, AHEAD + len(self._steps)):
                started = time.perf_counter()
                images = pending.popleft().result()
                self.waited += time.perf_counter() - started
                if later < len(self._steps):
                    pending.append(reader.submit(self._read, self._steps[later]))
                yield uploaded(images, self._device, ours=True)
        finally:
            reader.shutdown(cancel_futures=True)

    def _read(self, step: int) -> torch.Tensor:
        start, stop, batch_size = self.part
        index = batch_indices(len(self._dataset), batch_size, step, seed=self._seed)
        own = index[start:stop] if stop > start else index[:1]
        return staged(self._dataset.images(own), self._device)
