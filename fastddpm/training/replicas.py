"""One model's steps on several ranks: torch's DistributedDataParallel, found in a model or put
around it, and what its ranks tell each other in a step. No optimiser, no files."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from fastddpm.training.upload import uploaded
from fastddpm.unet import UNet
from fastddpm.wrapped import _inside

if dist.is_available():
    from torch.nn.parallel import DistributedDataParallel
else:  # pragma: no cover
    DistributedDataParallel = None  # type: ignore[assignment, misc]


class Part(NamedTuple):
    """Of the `total` examples of a step those that one rank computes: start .. stop - 1."""

    start: int
    stop: int
    total: int


class Replicas:
    """The ranks that train a model together: those of the DistributedDataParallel that it is, or
    that is inside it; else this process alone.

    DistributedDataParallel averages the ranks' gradients: `weight` makes a mean over the step's
    examples of it, whatever each rank's share of them."""

    def __init__(self, model: Any):
        self._ddp = _replicated(model)
        self.rank, self.world = 0, 1
        if self._ddp is not None:
            group = self._ddp.process_group
            self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)

    def part(self, given: Any, n: int) -> Part:
        """This rank's part of a step of which it has n images; None: as many as each other has.

        Raises ValueError for what is none."""
        if given is None:
            return Part(self.rank * n, (self.rank + 1) * n, self.world * n)
        try:
            start, stop, total = part = Part(*map(int, given))
        except (TypeError, ValueError):
            raise ValueError(f"part must be (start, stop, total); got {given!r}") from None
        if not 0 <= start <= stop <= total or not total:
            raise ValueError(f"part must be start <= stop <= total of a step; got {tuple(part)}")
        if n != max(1, stop - start):
            raise ValueError(
                f"part {tuple(part)} is of {stop - start} images; got {n}: a rank whose part is "
                "empty gives one image, which does not count"
            )
        if self.world == 1 and part != (0, n, n):
            raise ValueError(f"one process takes a step whole: part {tuple(part)} is not all of it")
        return part

    def weight(self, n: int, part: Part) -> float:
        """What the mean loss of n of this rank's images is to be multiplied by, so that the
        gradients are those of the mean over all of the step."""
        return self.world * n / part.total if part.stop > part.start else 0.0

    def reducing(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around forward and backward: the ranks' gradients become their mean in the last ones of
        a step, and are added up before."""
        return contextlib.nullcontext() if last or self._ddp is None else self._ddp.no_sync()

    def gather(self, mine: torch.Tensor) -> torch.Tensor:
        """(world, ...): the tensors of all ranks. A collective."""
        if self._ddp is None:
            return mine[None]
        everyone = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(everyone, mine, group=self._ddp.process_group)
        return torch.stack(everyone)

    def agreed(
        self, loss: torch.Tensor, pixels: torch.Tensor, part: Part, counts: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(loss of the whole step, range of its pixels, not 0 where the ranks' parts and counts
        are not those of one step), the same on every rank.

        loss: (), this rank's share in the mean;  pixels: (2,)"""
        if self.world == 1:
            return loss, pixels, None
        facts = uploaded(torch.tensor((*part, *counts), dtype=torch.float64), loss.device)
        rows = self.gather(torch.cat((loss[None].double(), pixels.double(), facts)))
        losses, low, high, start, stop, total, *_ = rows.unbind(dim=1)
        unlike = (rows[:, 5:] != rows[:1, 5:]).any() | (start[0] != 0) | (stop[-1] != total[0])
        unlike |= (start[1:] != stop[:-1]).any()
        pixels = torch.stack((low.amin(), high.amax())).float()
        return losses.sum().float(), pixels, unlike[None].float()


def cut(n: int, parts: int) -> list[tuple[int, int]]:
    """The ranges of n numbers in so many that follow one another; of fewer numbers, one each."""
    parts = min(n, parts)
    return [(n * k // parts, n * (k + 1) // parts) for k in range(parts)]


def replicated(model: nn.Module, device: torch.device) -> nn.Module:
    """The model in a DistributedDataParallel over all ranks, who call this together, and get rank
    0's weights."""
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        # A U-Net's parameters all get a gradient; of another network, who knows.
        find_unused_parameters=not isinstance(model, UNet),
    )


def _replicated(model: Any) -> Any:
    if DistributedDataParallel is None:
        return None
    while model is not None and not isinstance(model, DistributedDataParallel):
        model = _inside(model)
    return model
