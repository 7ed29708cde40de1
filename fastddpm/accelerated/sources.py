"""Where each weight of a U-Net comes from among the tensors of another project's network, found by
sending the numbers 0, 1, 2, ... through the reader of that project's files. No network here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastddpm.weights import Tensors


@dataclass(frozen=True)
class Source:
    """One weight as a function of others, which autograd follows: the tensors `names`, each as the
    list of its elements, one behind the other; of those the elements `index` (None: all of them in
    order), in `shape`. rows: elements that stay together, if index counts such."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    index: Tensor | None = None
    rows: int = 1

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """The weight, of the tensors called `names`; the very tensor where that is the weight."""
        if len(tensors) == 1 and self.index is None:
            (one,) = tensors
            return one if one.shape == self.shape else one.reshape(self.shape)
        parts = [tensor.reshape(-1, self.rows) for tensor in tensors]
        joined = torch.cat(parts) if len(parts) > 1 else parts[0]
        if self.index is not None:
            joined = joined.index_select(0, self.index.to(joined.device))
        return joined.reshape(self.shape)


def traced(
    weights: Tensors, convert: Callable[[Tensors], Tensors], kept: Sequence[str] = ()
) -> dict[str, Source]:
    """The sources of all that convert makes of the weights, by name. kept: those whose values it
    looks at and leaves out.

    Tensors with pixels are followed as whole ones, so that they cost no memory: convert must leave
    them as they are. Raises ValueError where it makes one that is none of its input's elements."""
    numbers: Tensors = {}
    starts: list[int] = []
    numbered: list[str] = []
    at = 0
    for name, tensor in weights.items():
        if name in kept:
            numbers[name] = tensor.detach().cpu()
            continue
        if tensor.dim() > 2 and any(side != 1 for side in tensor.shape[2:]):
            numbers[name] = torch.empty(tensor.shape, device="meta")
            continue
        numbers[name] = torch.arange(at, at + tensor.numel(), device="cpu").view(tensor.shape)
        starts.append(at)
        numbered.append(name)
        at += tensor.numel()
    name_of = {id(tensor): name for name, tensor in numbers.items()}
    first = torch.tensor(starts, device="cpu")
    found = {}
    for name, made in convert(numbers).items():
        shape = tuple(made.shape)
        if id(made) in name_of:
            found[name] = Source((name_of[id(made)],), shape)
            continue
        if made.is_meta or made.dtype != torch.int64:
            raise ValueError(f"{name} is not made of the elements of other tensors")
        places = torch.bucketize(made.flatten(), first, right=True) - 1
        used = places.unique().tolist()
        names = tuple(numbered[i] for i in used)
        counts = torch.tensor([numbers[each].numel() for each in names], device="cpu")
        before = torch.zeros(len(starts), dtype=torch.int64, device="cpu")
        before[used] = counts.cumsum(0) - counts
        index = made.flatten() - first[places] + before[places]
        found[name] = _shortest(names, shape, index, int(counts.sum()))
    return found


def _shortest(names: tuple[str, ...], shape: tuple[int, ...], index: Tensor, total: int) -> Source:
    """All elements in order, or whole rows, or one element after the other."""
    if len(index) == total and torch.equal(index, torch.arange(total, device="cpu")):
        return Source(names, shape)
    width = shape[-1]
    rows = index.view(-1, width)
    whole = rows[:, :1] + torch.arange(width, device="cpu")
    if width > 1 and torch.equal(rows, whole) and bool((rows[:, 0] % width == 0).all()):
        return Source(names, shape, rows[:, 0] // width, width)
    return Source(names, shape, index)
