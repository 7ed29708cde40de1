"""Encoded images as a Dataset: all are decoded once, then kept or decoded again as asked for. No
file formats.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np

from fastddpm.data.arrays import ArrayDataset
from fastddpm.data.dataset import Dataset
from fastddpm.data.decode import EXTENSIONS, decode
from fastddpm.data.errors import one_line, reason
from fastddpm.data.identity import Fingerprint
from fastddpm.data.sources import Reader, Source
from fastddpm.progress import tqdm

THREADS = min(8, os.cpu_count() or 1)
AHEAD = 4 * THREADS  # images decoded before their turn, which bounds the memory of the scan


def open_images(
    source: Source,
    size: tuple[int, int] | None,
    channels: int | None,
    memory_limit: int,
    progress: bool,
) -> Dataset:
    """Decode every image of `source`; ValueError when none is left or, without `size`, sizes
    differ.
    """
    if not source.names and not source.unreadable:
        raise ValueError(f"{source.path} holds no images ({', '.join(EXTENSIONS)})")
    good: list[str] = []
    shape: tuple[int, int, int] | None = None
    kept: np.ndarray | None = None
    skipped = list(source.unreadable)
    fingerprint = Fingerprint()
    for name, image in _decoded_in_order(source, size, channels, progress):
        if isinstance(image, str):
            skipped.append((one_line(name), image))
            continue
        if shape is None:
            shape = (image.shape[0], image.shape[1], image.shape[2])
            if len(source.names) * image.nbytes <= memory_limit:
                kept = np.empty((len(source.names), *shape), np.uint8)
        if image.shape != shape:
            raise ValueError(
                f"{source.path}: {one_line(good[0])} is {shape[1]}x{shape[2]}, {one_line(name)} is "
                f"{image.shape[1]}x{image.shape[2]}: pass size to crop and resize all to one"
            )
        if kept is not None:
            kept[len(good)] = image
        good.append(name)
        fingerprint.add([image])

    total = len(good) + len(skipped)
    if shape is None:
        raise ValueError(
            f"{source.path}: none of {total:,} images can be decoded: {_first(skipped)}"
        )
    if skipped:
        warnings.warn(
            f"{source.path}: {len(skipped):,} of {total:,} can't be used and are skipped: "
            f"{_first(skipped)}",
            stacklevel=3,
        )
    dataset: Dataset
    if kept is None:
        dataset = EncodedDataset(source, good, shape, size, skipped)
    else:
        source.close()
        dataset = ArrayDataset(source.path, source.kind, kept[: len(good)], skipped=skipped)
    dataset._fingerprint = fingerprint.hexdigest()
    return dataset


def _decoded_in_order(
    source: Source, size: tuple[int, int] | None, channels: int | None, progress: bool
) -> Iterator[tuple[str, np.ndarray | str]]:
    """(name, image or the reason why there is none) of every name, decoded by several threads.

    Without `channels` the first image sets them, so nothing is decoded ahead of it.
    """
    read, names = source.reader(), iter(source.names)
    pending: deque[tuple[str, Future[np.ndarray | str]]] = deque()
    bar = tqdm(
        total=len(source.names),
        desc="checking images",
        unit=" images",
        delay=2,
        disable=not progress,
    )
    with bar, ThreadPoolExecutor(THREADS) as pool:
        while True:
            ahead = 1 if channels is None else AHEAD
            for name in itertools.islice(names, ahead - len(pending)):
                pending.append((name, pool.submit(_decode, read, name, size, channels)))
            if not pending:
                return
            name, future = pending.popleft()
            image = future.result()
            if channels is None and not isinstance(image, str):
                channels = image.shape[0]
            yield name, image
            bar.update()


def _decode(
    read: Reader, name: str, size: tuple[int, int] | None, channels: int | None
) -> np.ndarray | str:
    try:
        content = read(name)
    except Exception as error:  # archives raise nearly anything on hostile bytes
        return reason(error)
    return decode(content, size, channels)


def _first(skipped: Sequence[tuple[str, str]]) -> str:
    """The first few, for a message of one line."""
    shown = ", ".join(f"{name} ({why})" for name, why in skipped[:3])
    return f"{shown}, ..." if len(skipped) > 3 else shown


class EncodedDataset(Dataset):
    """Images decoded each time they are asked for.

    One that could be decoded once and no longer can is replaced by the next one that can, for good.
    A warning tells of the first, `skipped` names them all.
    """

    def __init__(
        self,
        source: Source,
        names: list[str],
        shape: tuple[int, int, int],
        size: tuple[int, int] | None,
        skipped: Sequence[tuple[str, str]],
    ):
        super().__init__(source.path, source.kind, len(names), shape, skipped)
        self._source, self._names, self._size = source, names, size
        self._skipped_at_scan = len(skipped)
        self._lost: dict[int, str] = {}

    def _read(self, index: np.ndarray) -> np.ndarray:
        images = np.empty((len(index), *self.shape), np.uint8)
        load = partial(self._image, self._source.reader())
        with ThreadPoolExecutor(THREADS) as pool:
            for row, image in zip(images, pool.map(load, index.tolist()), strict=True):
                row[:] = image
        if len(self._lost) > len(self.skipped) - self._skipped_at_scan:
            self._report()
        return images

    def _image(self, read: Reader, index: int) -> np.ndarray:
        for k in itertools.chain(range(index, len(self)), range(index)):
            if k in self._lost:
                continue
            image = _decode(read, self._names[k], self._size, self.shape[0])
            if isinstance(image, np.ndarray) and image.shape == self.shape:
                return image
            self._lost[k] = image if isinstance(image, str) else "its size has changed"
        raise OSError(f"{self.path}: none of its {len(self):,} images can be read any more")

    def _report(self) -> None:
        lost = [(one_line(self._names[k]), why) for k, why in sorted(self._lost.items())]
        told = len(self.skipped) > self._skipped_at_scan
        self.skipped[self._skipped_at_scan :] = lost
        if not told:
            warnings.warn(
                f"{self.path}: {_first(lost)} can't be read any more: the next image stands in for "
                "it, as for any other that is lost from now on",
                stacklevel=4,
            )
