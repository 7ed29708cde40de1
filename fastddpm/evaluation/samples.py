"""A model's samples to be judged: some at a time, as uint8, read where they lie and drawn where
they are missing. The drawing is sampling.py's, the files shards.py's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fastddpm import arguments, shards
from fastddpm.batching import Batches
from fastddpm.chain import Chain, Steps, bar, finite
from fastddpm.figures import to_uint8
from fastddpm.given import refuse
from fastddpm.host import own_state
from fastddpm.wrapped import unwrap

PIECE = 1 << 28  # bytes of float32 samples that are held at a time where no folder takes them


class Samples:
    """The samples first_index .. first_index + n - 1 of one set, in order: len(samples) of them;
    each iteration gives (k, C, H, W) uint8 tensors one after the other.

    shape: (C, H, W)"""

    def __init__(self, n: int, shape: tuple[int, int, int]):
        self._n, self.shape = n, shape

    def __len__(self) -> int:
        return self._n

    def __iter__(self) -> Iterator[torch.Tensor]:
        raise NotImplementedError


class _Stored(Samples):
    def __init__(self, n: int, shape: tuple[int, int, int], folder: Path, first: int):
        super().__init__(n, shape)
        self._folder, self._first = folder, first

    def __iter__(self) -> Iterator[torch.Tensor]:
        return shards.read(self._folder, self._first, len(self))


class _Drawn(Samples):
    def __init__(
        self, n: int, chain: Chain, first: int, seed: int, batches: Batches, progress: bool
    ):
        super().__init__(n, chain.shape)
        self._chain, self._first, self._seed = chain, first, seed
        self._batches, self._progress = batches, progress
        self._given = chain.given(n, first)

    def __iter__(self) -> Iterator[torch.Tensor]:
        n, piece = len(self), max(1, PIECE // (4 * math.prod(self.shape)))
        with bar(n, self._chain.T, self._progress) as steps:
            for start in range(0, n, piece):
                stop = min(start + piece, n)
                yield self._piece(start, stop, steps)

    @own_state()
    def _piece(self, start: int, stop: int, steps: Steps) -> torch.Tensor:
        index = torch.arange(self._first + start, self._first + stop, device="cpu")
        later = len(self) - stop
        drawn = self._chain.draw(
            self._seed, index, self._batches, steps, later=later, given=self._given
        )
        return to_uint8(finite(torch.cat(drawn))).cpu()


@own_state()
def samples(
    model: Any,
    n: int,
    *,
    folder: str | Path | None = None,
    seed: int = 0,
    first_index: int = 0,
    progress: bool = True,
    **options: Any,
) -> Samples:
    """The samples first_index .. first_index + n - 1 of `model`.

    folder:  where they are kept, as `fastddpm.sample_to_folder` writes them: what is there is not
             drawn again, what is missing is drawn before this returns, and a call that was
             interrupted goes on. None: they are drawn as they are asked for, each time anew
    options: those of `sample` but hooks, beginnings and generators, as `sample_to_folder` has it;
             shard_size too where there is a folder

    Several ranks of torch.distributed share the drawing where there is a folder, and all must make
    the call; without one each draws all. Raises ValueError for a folder of another model, chain or
    seed, and for anything that does not fit, before anything is drawn.
    """
    n, first_index = arguments.indices(n, first_index)
    seed = arguments.seed(seed)
    if folder is not None:
        options |= {"seed": seed, "first_index": first_index, "progress": progress}
        shards.sample_to_folder(model, folder, n, **options)
        shape = arguments.image_shape(unwrap(model), options.get("shape"))
        return _Stored(n, shape, Path(folder), first_index)
    refuse("samples", options, shards.NOT_SAID)
    batch_size = options.pop("batch_size", None)
    chain = Chain(model, **options)
    return _Drawn(n, chain, first_index, seed, chain.batches(batch_size), progress)
