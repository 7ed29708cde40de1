"""A contestant of throughput.py in a process of its own, which answers calls: so that its memory is
its own and nothing that a library sets reaches another. No table."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).parent.parent))  # the checkout that this file is in

import contestants
import torch
from contestants import Job
from machine import peak_memory, reset_peak_memory, synchronize
from torch import Tensor

from fastddpm import ops
from fastddpm.checkpoint import read_tensors, write_tensors

T_SAMPLED = 1000


def implied_eps(engine: Any, x: Tensor, i: int) -> Tensor:
    """The eps that the engine's x0 prediction at chain index i stands for, float64: the inverse of
    Eq. 15."""
    index = torch.arange(len(x), device=x.device)
    x0: list[Tensor] = []
    engine.run(
        x, seed=0, sample_index=index, start=i + 1, stop=i,
        on_step=lambda i, x, predicted: x0.append(predicted().double()),
    )  # fmt: skip
    ab = float(engine.diffusion.schedule.alphas_cumprod[i])
    return (x.double() / math.sqrt(ab) - x0[0]) / math.sqrt(1 / ab - 1)


class Runner:
    """A contestant, built."""

    def __init__(self, job: Job):
        torch.set_num_threads(job.threads)
        self.device = torch.device(job.device)
        self.engine = contestants.build(job)
        self.index = torch.arange(job.batch, device=self.device)
        self.x = ops.randn((job.batch, *job.shape), seed=0, step=T_SAMPLED, sample_index=self.index)

    def eps(self, path: str, i: int) -> None:
        """Read x from the file and leave eps there."""
        x = read_tensors(path)[0]["x"].to(self.device)
        write_tensors(path, {"eps": implied_eps(self.engine, x, i)})

    def seconds(self, steps: int) -> float:
        """Of `steps` steps down to the middle of the chain."""
        middle = self.engine.diffusion.T // 2
        synchronize(self.device)
        start = time.perf_counter()
        self.engine.run(self.x, seed=0, sample_index=self.index, start=middle + steps, stop=middle)
        synchronize(self.device)
        return time.perf_counter() - start

    def forget_peak(self) -> None:
        reset_peak_memory(self.device)

    def memory(self) -> int:
        return peak_memory(self.device)


def serve(make: Callable[[Job], Any], job: Job) -> None:
    """Calls of a runner's methods as lines of JSON, from stdin to stdout."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is not an answer
    runner = make(job)
    print("null", file=answers, flush=True)
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        print(json.dumps(getattr(runner, method)(*arguments)), file=answers, flush=True)


class Failed(Exception):
    """A contestant's process ended or kept silent: the last line that it wrote, or for how long."""


class Remote:
    """A runner in a process of its own, with the same methods.

    patience: seconds that it may take to be made, or to answer a call"""

    runs: type = Runner
    script = __file__  # whose main makes it

    @staticmethod
    def needs_preparing(job: Job) -> bool:
        return contestants.needs_preparing(job)

    def __init__(self, job: Job, patience: float):
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        self.patience = patience
        if self.needs_preparing(job):
            self.process = self._start("--prepare", job)
            try:
                ended = self.process.wait(patience)
            except subprocess.TimeoutExpired:
                self._give_up()
            if ended != 0:
                raise Failed(self._last_line())
        self.process = self._start("--serve", job)
        self._answer()

    def _start(self, role: str, job: Job) -> subprocess.Popen:
        environment = {**os.environ, "OMP_NUM_THREADS": str(job.threads)}
        return subprocess.Popen(
            [sys.executable, self.script, role, json.dumps(dataclasses.asdict(job))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
            env=environment,
        )  # fmt: skip

    def _last_line(self) -> str:
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else "it ended without a word"

    def _give_up(self) -> NoReturn:
        self.process.kill()
        self.process.communicate()
        raise Failed(f"no answer within {self.patience:g} s")

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], self.patience)[0]:
            self._give_up()
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise Failed(self._last_line())
        return json.loads(line)

    def __getattr__(self, method: str) -> Any:
        def call(*arguments: Any) -> Any:
            assert self.process.stdin is not None
            print(json.dumps([method, *arguments]), file=self.process.stdin, flush=True)
            return self._answer()

        return call

    def close(self) -> None:
        self.process.communicate()
        self.log.close()


def prepare(job: Job) -> None:
    os.dup2(2, 1)  # nobody reads it
    contestants.prepare(job)


def main(make: Callable[[Job], Any]) -> None:
    """What a process of Remote's does. make: the runner, of a job."""
    role, text = sys.argv[1:]
    fields = json.loads(text)
    job = Job(**{**fields, "shape": tuple(fields["shape"])})
    if role == "--prepare":
        prepare(job)
    else:
        serve(make, job)


if __name__ == "__main__":
    main(Runner)
