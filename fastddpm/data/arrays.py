"""Images that lie in arrays: a Dataset of one, idx, CIFAR-10's records. No encoded images; NumPy's
files are numpy_files.py's.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from fastddpm.data.archives import read_exactly, read_tar
from fastddpm.data.dataset import Dataset
from fastddpm.data.errors import reading
from fastddpm.data.files import RegularFile
from fastddpm.data.limits import check_memory
from fastddpm.data.streams import compression, expanded


class Array(Protocol):
    """As much of an array as a dataset needs."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: np.ndarray) -> np.ndarray: ...


class ArrayDataset(Dataset):
    """Images of an (N, C, H, W) uint8 array of any strides, or of what is indexed like one.

    size is no more than a wish of the caller: a warning says when the images have another.
    """

    def __init__(
        self,
        path: Path,
        kind: str,
        images: Array,
        size: tuple[int, int] | None = None,
        channels: int | None = None,
        skipped: Sequence[tuple[str, str]] = (),
        others: Mapping[str, int] | None = None,
    ):
        n, c, h, w = images.shape
        if 0 in images.shape:
            raise ValueError(f"{path} holds no images: {images.shape}")
        if channels not in (None, c):
            raise ValueError(f"{path} has {c} channels; got channels={channels}")
        if size not in (None, (h, w)):
            warnings.warn(
                f"{path}: arrays keep their size, {h}x{w}; "
                "only encoded images are resized to the given one",
                stacklevel=3,
            )
        super().__init__(path, kind, n, (c, h, w), skipped, others)
        self._images = images

    def _read(self, index: np.ndarray) -> np.ndarray:
        return self._images[index]


def idx_names(split: str) -> tuple[str, ...]:
    """The names that a split's images go by in a folder of the MNIST family."""
    prefix = {"train": "train", "test": "t10k"}[split]
    return tuple(f"{prefix}-images{s}idx3-ubyte{gz}" for s in ("-", ".") for gz in ("", ".gz"))


def idx_file(path: Path, split: str) -> Path:
    """The file of a split: `path` itself, or the one in the folder `path`."""
    if not path.is_dir():
        if split == "test" and not path.name.startswith("t10k"):
            raise ValueError(f"{path} is not a test split (t10k-...); leave split out to read it")
        return path
    for name in idx_names(split):
        if (path / name).exists():
            return path / name
    raise FileNotFoundError(f"{path} holds no {idx_names(split)[0]}(.gz), its {split} split")


def read_idx(path: Path) -> np.ndarray:
    """An idx3-ubyte file, compressed or not, as (N, 1, H, W); ValueError names what is wrong.

    Layout: 00 00, 08 (uint8), 03 (dimensions), N, H, W as big-endian 32 bits, then the pixels. No
    more is expanded than the header says.
    """
    with reading(path, "an idx file"):
        file = RegularFile(path)
    with file:
        packed = compression(file.read(8, 0))
        form = f"a {packed} file" if packed else "an idx file"
        source = expanded(file.stream(), packed) if packed else file.stream()
        with reading(path, form):
            head = source.read(16)
        if len(head) < 16:
            raise ValueError(f"{path} is truncated: {len(head)} bytes; an idx3 header has 16")
        if head[:4] != b"\0\0\x08\x03":
            raise ValueError(
                f"{path} starts with {head[:4].hex(' ')}; idx images of uint8 start with "
                "00 00 08 03"
            )
        n, h, w = struct.unpack(">3I", head[4:])
        size = n * h * w
        said = f"{n}x{h}x{w} in its header"
        if not packed and file.length != 16 + size:
            what = "is truncated" if file.length < 16 + size else "is too long"
            raise ValueError(f"{path} {what}: {file.length - 16:,} bytes of pixels, {said}")
        with reading(path, form):
            check_memory(size)
            content = read_exactly(source, size)
            longer = source.read(1)
        if longer:
            raise ValueError(f"{path} is too long: more than {size:,} bytes of pixels, {said}")
    return np.frombuffer(content, np.uint8).reshape(n, 1, h, w)


def cifar10_names(split: str) -> tuple[str, ...]:
    """The files of a split of CIFAR-10's binary version."""
    if split == "test":
        return ("test_batch.bin",)
    return tuple(f"data_batch_{k}.bin" for k in range(1, 6))


def read_cifar10(path: Path, split: str) -> np.ndarray:
    """CIFAR-10's binary version, a folder or a tar archive, as (N, 3, 32, 32).

    Layout: records of 3073 bytes: the label, then the red, green and blue plane.
    """
    names = cifar10_names(split)
    parts: Mapping[str, bytes | bytearray] = (
        _folder_files(path, names) if path.is_dir() else _tar_files(path, names)
    )
    images: list[np.ndarray] = []
    for name in names:
        if name not in parts:
            raise ValueError(
                f"{path} holds no {name}: give CIFAR-10's binary version, whole "
                "(the Python version is a pickle, which is never loaded)"
            )
        if not parts[name] or len(parts[name]) % 3073:
            raise ValueError(
                f"{path}: {name} is truncated or no CIFAR-10 batch: {len(parts[name]):,} bytes are "
                "not a whole number of records of 3073"
            )
        records = np.frombuffer(parts[name], np.uint8).reshape(-1, 3073)
        images.append(records[:, 1:].reshape(-1, 3, 32, 32))
        if len(images[0]) != len(images[-1]):  # a cut at the end of a record
            raise ValueError(
                f"{path}: {name} is truncated or no CIFAR-10 batch: {len(images[-1]):,} images, "
                f"{len(images[0]):,} in {names[0]}"
            )
    return np.concatenate(images)


def _folder_files(path: Path, names: tuple[str, ...]) -> Mapping[str, bytes]:
    files = {}
    for name in names:
        if (path / name).exists():
            with reading(path / name, "a CIFAR-10 batch"), RegularFile(path / name) as file:
                check_memory(file.length)
                files[name] = file.read(file.length, 0)
    return files


def _tar_files(path: Path, names: tuple[str, ...]) -> Mapping[str, bytearray]:
    with reading(path, "a tar archive"):
        return read_tar(path, names)
