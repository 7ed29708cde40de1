"""Several processes that draw one set or train one model (torch.distributed): who does what, and
what they tell each other. No models."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fastddpm.presence import Presence, RankError

TIMEOUT = 300.0  # seconds without a sign of life
MOST_SECONDS = 10**7


def place() -> tuple[int, int]:
    """(rank, number of ranks); (0, 1) where no process group was initialised."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def environment(name: str, default: int) -> int:
    """A number in the environment, as torchrun sets them, `default` where there is none.

    ValueError names one that is no number, or less than its default."""
    text = os.environ.get(name) or str(default)
    if not text.strip().isdecimal() or int(text) < default:
        raise ValueError(
            f"{name} is {text!r} in the environment; it must be an integer of at least {default}"
        )
    return int(text)


def launched_ranks() -> int:
    """How many ranks torchrun, or who sets its variables, has started of this process; 1 for none.

    ValueError for a WORLD_SIZE that comes without the others: nobody would ever answer."""
    world = environment("WORLD_SIZE", 1)
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if world > 1 and missing:
        raise ValueError(
            f"WORLD_SIZE is {world} in the environment, but not {', '.join(missing)}: start the "
            "ranks with torchrun, or unset WORLD_SIZE for one process"
        )
    if world > 1 and environment("RANK", 0) >= world:
        raise ValueError(f"RANK is {os.environ['RANK']} in the environment, of {world} ranks")
    return world


@contextlib.contextmanager
def launched(device: torch.device, timeout: float | None = None) -> Iterator[torch.device]:
    """The process group of torchrun's ranks for as long as the block lasts, if there are several
    and none was initialised; yields this rank's device.

    timeout: seconds after which a rank that gives no sign of life is given up, in RankError; None:
             FASTDDPM_TIMEOUT of the environment, or TIMEOUT. One that is at work may take any time.

    NCCL on GPUs, a GPU a rank, and gloo on the CPU. ValueError where there are fewer GPUs.
    """
    seconds = _seconds(timeout)
    world = launched_ranks()
    if world == 1 or place()[1] > 1:
        yield device
        return
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", environment("LOCAL_RANK", 0))
        if (cards := torch.cuda.device_count()) <= device.index:
            raise ValueError(
                f"LOCAL_RANK is {device.index} in the environment, and each rank needs a GPU of "
                f"its own; this machine has {cards}: start as many ranks, or choose the CPU"
            )
        torch.cuda.set_device(device)
    global _presence
    if not dist.is_available():
        raise ValueError("this torch has no torch.distributed, which several ranks need")
    with Presence(environment("RANK", 0), world, seconds) as presence:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("group", presence.store()),
            rank=presence.rank,
            world_size=world,
            timeout=timedelta(seconds=max(seconds, 60)),
        )
        _presence = presence
        try:
            with warnings.catch_warnings():
                if presence.rank:
                    warnings.simplefilter("ignore")  # what all would say alike, rank 0 says
                yield device
        except BaseException as error:
            if not isinstance(error, RankError):
                presence.say(_said(error))
            raise
        finally:
            _presence = None
            dist.destroy_process_group()


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _seconds(timeout: float | None) -> float:
    name, value = "timeout", timeout  # type: str, Any
    if timeout is None:
        name, value = "FASTDDPM_TIMEOUT", os.environ.get("FASTDDPM_TIMEOUT") or TIMEOUT
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 < seconds <= MOST_SECONDS:
        raise ValueError(
            f"{name} must be seconds, above 0 and at most {MOST_SECONDS}; got {value!r}"
        )
    return seconds


_presence: Presence | None = None  # of the ranks in `launched`


@contextlib.contextmanager
def _meeting() -> Iterator[None]:
    """The block of a collective, which begins when all ranks have come; RankError says who can't.

    The collective itself then takes no longer than its messages, however long a rank has worked. In
    a group that another than `launched` initialised, that group's own timeout is all there is."""
    if _presence is not None:
        _presence.meet()
    try:
        yield
    except RuntimeError as error:  # gloo's and NCCL's, of a rank that was lost in the middle
        why = str(error).strip().splitlines()[0]
        raise RankError(f"the ranks lost one another: {why}") from None


@contextlib.contextmanager
def losing() -> Iterator[None]:
    """A block of work whose collectives are torch's: RankError where a rank was lost in one, saying
    what that rank said last."""
    try:
        yield
    except RuntimeError as error:
        if not _is_of_a_lost_rank(error):
            raise
        why = str(error).strip().splitlines()[0]
        said = "" if _presence is None else _presence.last_words()
        raise RankError(said or f"the ranks lost one another: {why}") from None


def _is_of_a_lost_rank(error: RuntimeError) -> bool:
    """NCCL's errors have a class of their own, gloo's the path of its sources."""
    return dist.is_available() and (isinstance(error, dist.DistError) or "gloo" in str(error))


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
        mine = None if error is None else _said(error)
        with _meeting():
            dist.all_gather_object(failures, mine)
    if error is not None:
        raise error
    for rank, failure in enumerate(failures):
        if failure is not None:
            raise RankError(f"rank {rank} failed: {failure}")


def agree(must: str = "must draw the same set", **facts: Any) -> None:
    """RankError on every rank if the ranks' facts differ, naming the first, and what they `must`
    do. A collective."""
    everyone: list[Any] = [facts] * place()[1]
    if len(everyone) > 1:
        with _meeting():
            dist.all_gather_object(everyone, facts)
    for name in facts:
        if any(other[name] != everyone[0][name] for other in everyone):
            values = ", ".join(str(other[name]) for other in everyone)
            raise RankError(f"all ranks {must}; {name} differs: {values}")


def from_first(value: Any) -> Any:
    """Rank 0's value, on every rank. A collective."""
    if place()[1] == 1:
        return value
    box = [value]
    with _meeting():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def everyone(value: Any) -> list[Any]:
    """The ranks' values, in their order, on every rank. A collective."""
    values = [value] * place()[1]
    if len(values) > 1:
        with _meeting():
            dist.all_gather_object(values, value)
    return values


def gather(mine: torch.Tensor, n: int) -> torch.Tensor:
    """All n rows in order on every rank, of the parts that `share` gave them. A collective."""
    rank, world = place()
    if world == 1:
        return mine
    device = mine.device if dist.get_backend() == "nccl" else torch.device("cpu")
    parts = []
    with _meeting():
        for source in range(world):
            start, stop = share(n, source, world)
            part = mine if source == rank else mine.new_empty(stop - start, *mine.shape[1:])
            part = part.to(device).contiguous()
            if stop > start:
                dist.broadcast(part, src=source)
            parts.append(part)
    return torch.cat(parts).to(mine.device)
