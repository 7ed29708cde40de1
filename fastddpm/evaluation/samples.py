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
from fastddpm.chain import Chain
from fastddpm.diffusion import Model
from fastddpm.figures import to_uint8
from fastddpm.given import refuse
from fastddpm.host import own_state
from fastddpm.sampling import sample
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
        self, n: int, shape: tuple[int, int, int], model: Model, first: int, options: dict[str, Any]
    ):
        super().__init__(n, shape)
        self._model, self._first, self._options = model, first, options

    def __iter__(self) -> Iterator[torch.Tensor]:
        piece = max(1, PIECE // (4 * math.prod(self.shape)))
        for start in range(0, len(self), piece):
            count, options = min(piece, len(self) - start), dict(self._options)
            if (named := options.get("model_kwargs")) is not None:
                options["model_kwargs"] = _rows(named, start, count, len(self))
            drawn = sample(self._model, count, first_index=self._first + start, **options)
            yield to_uint8(drawn).cpu()


def _rows(named: dict[str, Any], start: int, count: int, n: int) -> dict[str, Any]:
    """What the samples start .. start + count - 1 of n are given, see Given."""

    def cut(value: Any) -> Any:
        each = isinstance(value, torch.Tensor) and value.shape[:1] == (n,)
        return value[start : start + count] if each else value

    return {name: cut(value) for name, value in named.items()}


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

    Several ranks of torch.distributed share the drawing; all must make the call, and go through
    what it returns. Raises ValueError for a folder of another model, chain or seed, and for
    anything that does not fit, before anything is drawn.
    """
    n, first_index = arguments.indices(n, first_index)
    seed = arguments.seed(seed)
    if folder is not None:
        options |= {"seed": seed, "first_index": first_index, "progress": progress}
        shards.sample_to_folder(model, folder, n, **options)
        shape = arguments.image_shape(unwrap(model), options.get("shape"))
        return _Stored(n, shape, Path(folder), first_index)
    refuse("samples", options, tuple(name for name in shards.NOT_SAID if name != "distributed"))
    chain = {k: v for k, v in options.items() if k not in ("batch_size", "distributed")}
    checked = Chain(model, **chain)
    checked.given(n, first_index)
    checked.batches(options.get("batch_size"))
    return _Drawn(
        n, checked.shape, model, first_index, {**options, "seed": seed, "progress": progress}
    )
