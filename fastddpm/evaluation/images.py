"""The images that a model is judged by: some or all of a data set, read as they are asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastddpm import arguments, kept
from fastddpm.data import WITH_SPLITS, Dataset, open_dataset
from fastddpm.data.dataset import CHUNK
from fastddpm.data.identity import Fingerprint
from fastddpm.options import check_count
from fastddpm.progress import tqdm


class Images:
    """(n, C, H, W) uint8: len, slices (tensors of their own) and a digest. Never all in memory,
    where the data set is not.

    data: a `fastddpm.data.Dataset`, or a tensor
    n:    so many of them, evenly spaced in their order; None, or more than there are: all

    Raises ValueError for what is neither, and for n below 1."""

    def __init__(self, data: Dataset | torch.Tensor, n: int | None = None, *, name: str = "data"):
        if isinstance(data, torch.Tensor):
            if data.dtype != torch.uint8 or data.dim() != 4:
                raise ValueError(
                    f"{name} must be (N, C, H, W) uint8; got {tuple(data.shape)} {data.dtype}"
                )
            arguments.check_pixels(name, data)
            self.shape, self.source = tuple(data.shape[1:]), f"{name}, a tensor"
        elif isinstance(data, Dataset):
            self.shape, self.source = tuple(data.shape), str(data.path)
        else:
            raise ValueError(
                f"{name} must be a fastddpm.data.Dataset, a path or a uint8 tensor (N, C, H, W); "
                f"got {type(data).__name__}"
            )
        self.data, self.of = data, len(data)
        count = self.of if n is None else min(check_count(f"images of {name}", n), self.of)
        self.indices = np.arange(count) * self.of // max(count, 1)
        self._digest: str | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, part: slice) -> torch.Tensor:
        index = self.indices[part]
        if isinstance(self.data, Dataset):
            return self.data.images(index)
        return self.data[torch.from_numpy(index).to(self.data.device)]

    def __iter__(self) -> Iterator[torch.Tensor]:
        """The images in parts, (k, C, H, W) each, in order."""
        many = max(1, CHUNK // max(1, int(np.prod(self.shape))))
        for start in range(0, len(self), many):
            yield self[start : start + many]

    def fingerprint(self, progress: bool = False) -> str:
        """SHA-256 of the pixels in order, as a Dataset's; a bar where it takes more than 2 s."""
        if self._digest is None:
            if isinstance(self.data, Dataset) and len(self) == self.of:
                self._digest = self.data.fingerprint(progress)
            else:
                digest = Fingerprint()
                bar = tqdm(total=len(self), desc="the data's digest", delay=2, disable=not progress)
                with bar:
                    for part in self:
                        digest.add(part.cpu().numpy())
                        bar.update(len(part))
                self._digest = digest.hexdigest()
        return self._digest

    def describe(self) -> str:
        """ "256 of 10,000 images of PATH"."""
        some = f"{len(self):,}" if len(self) == self.of else f"{len(self):,} of {self.of:,}"
        return f"{some} images of {self.source}"


def opened(data: Any, name: str, shape: tuple[int, ...] | None, *, test: bool) -> Any:
    """A Dataset of what is a path; anything else as it is.

    shape: (C, H, W) that encoded pictures are brought to; None: their own
    test:  of kinds with both splits, the images that models are not trained on"""
    if not isinstance(data, (str, os.PathLike)):
        return data
    if not os.fspath(data):
        raise ValueError(f"{name} is '': give a path")
    as_model: dict[str, Any] = {} if shape is None else {"size": shape[1:], "channels": shape[0]}
    dataset = open_dataset(data, **as_model)
    if test and dataset.kind in WITH_SPLITS:
        dataset = open_dataset(data, split="test", **as_model)
    return dataset


def check_apart(data: Any, out: Path) -> None:
    """ValueError if what is written into `out` would be among the images."""
    if isinstance(data, Dataset):
        data = data.path
    if not isinstance(data, (str, os.PathLike)):
        return
    kept.check_apart(
        data, out, f"the results' folder {out} lies in the data {data}: samples would be among the "
        "images; give another folder",
    )  # fmt: skip
