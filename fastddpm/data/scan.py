"""Encoded images as a Dataset: all are decoded once, then kept or decoded again as asked for. No
file formats.
"""

from __future__ import annotations

import itertools
import math
import os
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

from fastddpm.batching import free_bytes
from fastddpm.data import sources
from fastddpm.data.arrays import ArrayDataset
from fastddpm.data.dataset import Dataset, count_others
from fastddpm.data.decode import EXTENSIONS, Picture, decode
from fastddpm.data.errors import Unusable, one_line, reason
from fastddpm.data.identity import Fingerprint
from fastddpm.data.limits import Budget
from fastddpm.data.sources import Reader, Source
from fastddpm.progress import tqdm

THREADS = min(8, os.cpu_count() or 1)
AHEAD, AHEAD_BYTES = 4 * THREADS, 256 << 20  # images, and their bytes, decoded before their turn
ENCODED = Budget(sources.ENCODED_LIMIT)  # bytes of all encoded images in hand


def open_images(
    source: Source,
    size: tuple[int, int] | None,
    channels: int | None,
    memory_limit: int,
    progress: bool,
) -> Dataset:
    """Decode every image of `source`; ValueError when none is left or, without `size`, sizes
    differ. Without `channels`, all are colours if one is.
    """
    if not source.names and not source.unreadable:
        raise ValueError(
            f"{source.path} holds no images ({', '.join(EXTENSIONS)}){count_others(source.others)}"
        )
    good: list[str] = []
    shape: tuple[int, int, int] | None = None
    kept: np.ndarray | None = None
    skipped = list(source.unreadable)
    fingerprint = Fingerprint()
    grey = transparent = 0
    for name, picture in _decoded_in_order(source, size, channels, progress):
        if isinstance(picture, str):
            skipped.append((one_line(name), picture))
            continue
        image = picture.pixels
        if shape is None:
            shape = (image.shape[0], image.shape[1], image.shape[2])
            kept = _array(len(source.names), shape, memory_limit)
        if image.shape[1:] != shape[1:]:
            raise ValueError(
                f"{source.path}: {one_line(good[0])} is {shape[1]}x{shape[2]}, {one_line(name)} is "
                f"{image.shape[1]}x{image.shape[2]}: pass size to crop and resize all to one"
            )
        if image.shape[0] > shape[0]:  # the first colours, behind greys
            shape, before = (image.shape[0], *shape[1:]), kept
            kept = None if before is None else _array(len(source.names), shape, memory_limit)
            if kept is not None and before is not None:
                kept[: len(good)] = before[: len(good)]
        if kept is not None:
            kept[len(good)] = image  # grey is the same in all three channels
        good.append(name)
        fingerprint.add([image])
        grey += image.shape[0] == 1
        transparent += picture.transparent

    total = len(good) + len(skipped)
    if shape is None:
        raise ValueError(
            f"{source.path}: none of {total:,} images can be decoded: {_first(skipped)}"
        )
    told = []
    if skipped:
        told.append(
            f"{len(skipped):,} of {total:,} can't be used and are skipped: {_first(skipped)}"
        )
    if shape[0] == 3 and grey:
        told.append(
            f"{grey:,} of {len(good):,} are grey and are read as colours, as the others are"
        )
    if transparent:
        told.append(f"{transparent:,} of {len(good):,} are transparent and are put onto white")
    if told:
        warnings.warn(f"{source.path}: {'; '.join(told)}", stacklevel=3)
    dataset: Dataset
    if kept is None:
        dataset = EncodedDataset(source, good, shape, size, skipped, source.others)
    else:
        source.close()
        images = kept[: len(good)]
        dataset = ArrayDataset(
            source.path, source.kind, images, skipped=skipped, others=source.others
        )
    dataset._fingerprint = fingerprint.hexdigest()
    dataset.transparent = transparent
    return dataset


def _array(n: int, shape: tuple[int, ...], memory_limit: int) -> np.ndarray | None:
    """Memory for all images, if the limit and the machine have it."""
    size = n * math.prod(shape)
    free = free_bytes(torch.device("cpu"))
    if size > memory_limit or (free is not None and size > free // 2):
        return None
    return np.empty((n, *shape), np.uint8)


def _decoded_in_order(
    source: Source, size: tuple[int, int] | None, channels: int | None, progress: bool
) -> Iterator[tuple[str, Picture | str]]:
    """(name, image or the reason why there is none) of every name, decoded by several threads.

    Nothing is decoded ahead of the first, which tells how much of the rest there may be at a time.
    """
    read, names = source.reader(), iter(source.names)
    pending: deque[tuple[str, Future[Picture | str]]] = deque()
    bar = tqdm(
        total=len(source.names),
        desc="checking images",
        unit=" images",
        delay=2,
        disable=not progress,
    )
    ahead = 1
    with bar, ThreadPoolExecutor(THREADS) as pool:
        while True:
            for name in itertools.islice(names, ahead - len(pending)):
                pending.append((name, pool.submit(_decode, source, read, name, size, channels)))
            if not pending:
                return
            name, future = pending.popleft()
            picture = future.result()
            if isinstance(picture, Picture):
                ahead = max(1, min(AHEAD, AHEAD_BYTES // picture.pixels.nbytes))
            yield name, picture
            bar.update()


def _decode(
    source: Source, read: Reader, name: str, size: tuple[int, int] | None, channels: int | None
) -> Picture | str:
    try:
        # Held while it is decoded; who decodes waits for no one that reads.
        with ENCODED.take(min(source.length(name), sources.ENCODED_LIMIT)):
            return decode(read(name), size, channels)
    except Unusable:
        raise
    except MemoryError as error:  # or the images would depend on what else runs
        raise Unusable(f"{source.path}: {one_line(name)} can't be read: {reason(error)}") from None
    except Exception as error:  # archives raise nearly anything on hostile bytes
        return reason(error)


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
        others: Mapping[str, int],
    ):
        super().__init__(source.path, source.kind, len(names), shape, skipped, others)
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
            picture = _decode(self._source, read, self._names[k], self._size, self.shape[0])
            if isinstance(picture, Picture) and picture.pixels.shape == self.shape:
                return picture.pixels
            self._lost[k] = picture if isinstance(picture, str) else "its size has changed"
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
