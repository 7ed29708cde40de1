"""Which examples an optimiser step takes. Indices only, no images."""

from __future__ import annotations

import functools

import numpy as np
import torch


def batch_indices(n: int, batch_size: int, step: int, *, seed: int) -> torch.Tensor:
    """The examples of optimiser step `step` (0-based), (batch_size,) int64 in 0 .. n - 1.

    The stream of examples is one random permutation of 0 .. n - 1 after the other, and step k takes
    its elements k batch_size .. (k + 1) batch_size - 1: every epoch takes each example once, a
    batch may straddle epochs, and the result is a function of the arguments alone, so a resumed run
    sees the batches of an uninterrupted one.

    The permutation of an epoch sorts the first n raw 64-bit outputs of NumPy's
    PCG64(SeedSequence([seed, epoch])). NumPy promises those bits for all versions and platforms; it
    does not promise `Generator.permutation`.

    Raises ValueError unless n, batch_size >= 1 and step, seed >= 0.
    """
    for name, value, least in (
        ("n", n, 1),
        ("batch_size", batch_size, 1),
        ("step", step, 0),
        ("seed", seed, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")
    pieces = []
    position, stop = step * batch_size, (step + 1) * batch_size
    while position < stop:
        epoch, first = divmod(position, n)
        piece = _permutation(n, seed, epoch)[first : first + stop - position]
        pieces.append(piece)
        position += len(piece)
    return torch.from_numpy(np.concatenate(pieces))


@functools.lru_cache(maxsize=2)  # two: a batch that straddles epochs needs both
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(n)
    order = np.argsort(keys, kind="stable").astype(np.int64)
    order.setflags(write=False)
    return order
