"""Several processes that draw one set (torch.distributed): who draws what, and what they tell each
other. No models."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


class RankError(RuntimeError):
    """Another rank failed, or was called with something else."""


def place() -> tuple[int, int]:
    """(rank, number of ranks); (0, 1) where no process group was initialised."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


@contextlib.contextmanager
def launched(device: torch.device) -> Iterator[torch.device]:
    """The process group of torchrun's ranks for as long as the block lasts, if there are several
    and none was initialised; yields this rank's device.

    NCCL on GPUs, a GPU a rank, and gloo on the CPU.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) == 1 or place()[1] > 1:
        yield device
        return
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK") or 0))
        torch.cuda.set_device(device)
    # Ranks meet when their work is done, and one may have much more of it.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=7))
    try:
        yield device
    finally:
        dist.destroy_process_group()


def share(n: int, rank: int, world: int) -> tuple[int, int]:
    """The range of n numbers that is this rank's; the ranges follow one another."""
    return n * rank // world, n * (rank + 1) // world


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block that all ranks leave at the same time: where it raised on one, it raises on all.

    RankError names the others' error. A collective: all ranks must enter it."""
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    failures: list[Any] = [None] * place()[1]
    if len(failures) > 1:
        mine = None if error is None else f"{type(error).__name__}: {error}"
        dist.all_gather_object(failures, mine)
    if error is not None:
        raise error
    for rank, failure in enumerate(failures):
        if failure is not None:
            raise RankError(f"rank {rank} failed: {failure}")


def agree(**facts: Any) -> None:
    """RankError on every rank if the ranks' facts differ, naming the first. A collective."""
    everyone: list[Any] = [facts] * place()[1]
    if len(everyone) > 1:
        dist.all_gather_object(everyone, facts)
    for name in facts:
        if any(other[name] != everyone[0][name] for other in everyone):
            values = ", ".join(str(other[name]) for other in everyone)
            raise RankError(f"all ranks must draw the same set; {name} differs: {values}")


def from_first(value: Any) -> Any:
    """Rank 0's value, on every rank. A collective."""
    if place()[1] == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(mine: torch.Tensor, n: int) -> torch.Tensor:
    """All n rows in order on every rank, of the parts that `share` gave them. A collective."""
    rank, world = place()
    if world == 1:
        return mine
    device = mine.device if dist.get_backend() == "nccl" else torch.device("cpu")
    parts = []
    for source in range(world):
        start, stop = share(n, source, world)
        part = mine if source == rank else mine.new_empty(stop - start, *mine.shape[1:])
        part = part.to(device).contiguous()
        if stop > start:
            dist.broadcast(part, src=source)
        parts.append(part)
    return torch.cat(parts).to(mine.device)
