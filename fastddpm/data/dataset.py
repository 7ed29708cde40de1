"""What every dataset offers, whatever it reads. No file formats."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from fastddpm.data.identity import Fingerprint
from fastddpm.progress import tqdm

CHUNK = 1 << 24  # bytes of images that are read at a time for a fingerprint


class Dataset(ABC):
    """Images of one shape, by index.

    shape:   (C, H, W)
    skipped: (name, reason) of every image that was found and can't be used
    transparent: how many are put onto white
    """

    transparent = 0

    def __init__(
        self,
        path: Path,
        kind: str,
        n: int,
        shape: tuple[int, int, int],
        skipped: Sequence[tuple[str, str]] = (),
        others: Mapping[str, int] | None = None,
    ):
        self.path, self.kind, self.shape = path, kind, shape
        self.skipped = list(skipped)
        self._others = dict(others or {})  # suffix: files beside the images
        self._n = n
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return self._n

    def images(self, indices: Sequence[int] | np.ndarray | torch.Tensor) -> torch.Tensor:
        """The images `indices`, (n, C, H, W) uint8, contiguous, a copy.

        Raises TypeError unless the indices are whole numbers in one dimension, IndexError out of
        0 .. len - 1.
        """
        if isinstance(indices, torch.Tensor):
            indices = indices.cpu().numpy()
        index = np.asarray(indices)
        if index.ndim != 1 or (index.size and index.dtype.kind not in "iu"):
            raise TypeError(
                f"indices must be integers in one dimension; got {index.dtype} of {index.shape}"
            )
        index = index.astype(np.int64)
        if index.size and not 0 <= index.min() <= index.max() < len(self):
            wrong = index[(index < 0) | (index >= len(self))][0]
            raise IndexError(f"index {wrong} is not in 0 .. {len(self) - 1}, {self.path}")
        return torch.from_numpy(np.ascontiguousarray(self._read(index)))

    @abstractmethod
    def _read(self, index: np.ndarray) -> np.ndarray:
        """The images of checked int64 indices, a fresh (n, C, H, W) uint8 array."""

    def fingerprint(self, progress: bool = False) -> str:
        """SHA-256 of all pixels in order, see `Fingerprint`: two sets with the same are the same to
        a training run. Every image is read once, and the result is kept.

        progress: show a bar when that takes more than 2 s
        """
        if self._fingerprint is None:
            fingerprint = Fingerprint()
            many = max(1, CHUNK // max(1, math.prod(self.shape)))
            starts = range(0, len(self), many)
            for start in tqdm(starts, desc="the data's digest", delay=2, disable=not progress):
                fingerprint.add(self.images(range(start, min(start + many, len(self)))).numpy())
            self._fingerprint = fingerprint.hexdigest()
        return self._fingerprint

    def describe(self) -> str:
        """One line for people: "60,000 images 1x28x28, idx"."""
        skipped = f", {len(self.skipped):,} skipped" if self.skipped else ""
        others = count_others(self._others)
        return (
            f"{len(self):,} images {'x'.join(map(str, self.shape))}, {self.kind}{others}{skipped}"
        )


def count_others(others: Mapping[str, int]) -> str:
    """Files that are no images by their names, to go on a line: ", 3 other files (2 .txt, ...)"."""
    if not others:
        return ""
    most = sorted(others.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{count:,} {suffix}" for suffix, count in most[:3])
    n = sum(others.values())
    return f", {n:,} other file{'s' * (n > 1)} ({shown}{', ...' * (len(most) > 3)})"
