"""A contestant of throughput.py --train in a process of its own: see processes.py."""

from __future__ import annotations

import copy
import ctypes
import gc
import itertools
import time

import torch
import training_contestants
from contestants import Job
from machine import peak_memory, reset_peak_memory, resident_memory, synchronize
from networks import products
from processes import Remote, main
from torch import nn
from training_contestants import Draws

from fastddpm.checkpoint import read_tensors, write_tensors

BATCHES = 4  # in memory, in turn


class TrainingRunner:
    """A contestant, built. Memory is what it took since its libraries were loaded."""

    def __init__(self, job: Job):
        torch.set_num_threads(job.threads)
        self.device, self.shape = torch.device(job.device), job.shape
        training_contestants.load(job)
        self.idle = resident_memory(self.device)
        self.contestant = training_contestants.build(job)
        random = torch.Generator().manual_seed(0)
        batches = (
            torch.randint(0, 256, (job.batch, *job.shape), dtype=torch.uint8, generator=random)
            for _ in range(BATCHES)
        )
        self.batches = itertools.cycle(list(batches))

    def first_step(self, path: str) -> None:
        """Take the first step without dropout, on the file's x0, t, flip and eps, and leave there
        its loss and the state after it; `exact.` before a name says that it is the contestant's own
        in float64.
        """
        layers = [m for m in self.contestant.network.modules() if isinstance(m, nn.Dropout)]
        shares = [layer.p for layer in layers]
        for layer in layers:
            layer.p = 0.0
        tensors = read_tensors(path)[0]
        x0 = tensors["x0"]
        draws = Draws(*(tensors[k].to(self.device) for k in ("t", "flip", "eps")))
        loss = self.contestant.step(x0, draws)
        for layer, p in zip(layers, shares, strict=True):
            layer.p = p
        answer = {"loss": loss.reshape(()), **self.contestant.state()}
        if hasattr(self.contestant, "exact"):
            exact = self.contestant.exact(x0.to(self.device), draws)
            answer |= {f"exact.{name}": tensor for name, tensor in exact.items()}
        write_tensors(path, {k: v.detach().cpu().contiguous() for k, v in answer.items()})

    def flop(self) -> int:
        """Of one image's forward, of a network of its own."""
        network = copy.deepcopy(self.contestant.network)
        x = torch.zeros(1, *self.shape, device=self.device)
        with torch.no_grad():
            return products(network, x, torch.zeros(1, dtype=torch.int64, device=self.device))

    def seconds(self, steps: int) -> float:
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(steps):
            self.contestant.step(next(self.batches))
        synchronize(self.device)
        return time.perf_counter() - start

    def forget_peak(self) -> None:
        gc.collect()
        if self.device.type == "cpu":  # what the check took and has given back is not the step's
            ctypes.CDLL(None).malloc_trim(0)
        reset_peak_memory(self.device)

    def memory(self) -> int:
        return peak_memory(self.device) - self.idle


class TrainingRemote(Remote):
    runs = TrainingRunner
    script = __file__

    @staticmethod
    def needs_preparing(job: Job) -> bool:
        return False


if __name__ == "__main__":
    main(TrainingRunner)
