"""Images that lie in arrays: idx, CIFAR-10's records, NumPy files. No encoded images."""

from __future__ import annotations

import gzip
import math
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np

from fastddpm.data.dataset import Dataset
from fastddpm.data.errors import reading

LAYOUTS = "uint8 arrays of shape (N, H, W), (N, C, H, W) or (N, H, W, C)"


class ArrayDataset(Dataset):
    """Images of an (N, C, H, W) uint8 array of any strides, in memory or memory-mapped.

    size is no more than a wish of the caller: a warning says when the images have another.
    """

    def __init__(
        self,
        path: Path,
        kind: str,
        images: np.ndarray,
        size: tuple[int, int] | None = None,
        channels: int | None = None,
        skipped: Sequence[tuple[str, str]] = (),
    ):
        n, c, h, w = images.shape
        if images.size == 0:
            raise ValueError(f"{path} holds no images: {images.shape}")
        if channels not in (None, c):
            raise ValueError(f"{path} has {c} channels; got channels={channels}")
        if size not in (None, (h, w)):
            warnings.warn(
                f"{path}: arrays keep their size, {h}x{w}; "
                "only encoded images are resized to the given one",
                stacklevel=3,
            )
        super().__init__(path, kind, n, (c, h, w), skipped)
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
    """An idx3-ubyte file, gzipped or not, as (N, 1, H, W); ValueError names what is wrong with it.

    Layout: 00 00, 08 (uint8), 03 (dimensions), N, H, W as big-endian 32 bits, then the pixels.
    """
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        with reading(path, "a gzip file"):
            content = gzip.decompress(content)
    if len(content) < 16:
        raise ValueError(f"{path} is truncated: {len(content)} bytes; an idx3 header has 16")
    if content[:4] != b"\0\0\x08\x03":
        raise ValueError(
            f"{path} starts with {content[:4].hex(' ')}; idx images of uint8 start with 00 00 08 03"
        )
    n, h, w = struct.unpack(">3I", content[4:16])
    if len(content) != 16 + n * h * w:
        what = "is truncated" if len(content) < 16 + n * h * w else "is too long"
        raise ValueError(
            f"{path} {what}: {len(content) - 16:,} bytes of pixels, {n}x{h}x{w} in its header"
        )
    return np.frombuffer(content, np.uint8, offset=16).reshape(n, 1, h, w)


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
    parts = _folder_files(path, names) if path.is_dir() else _tar_files(path, names)
    images = []
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
    return np.concatenate(images)


def _folder_files(path: Path, names: tuple[str, ...]) -> Mapping[str, bytes]:
    return {name: (path / name).read_bytes() for name in names if (path / name).exists()}


def _tar_files(path: Path, names: tuple[str, ...]) -> Mapping[str, bytes]:
    files = {}
    with reading(path, "a tar archive"), tarfile.open(path) as tar:
        for member in tar:
            name = PurePosixPath(member.name).name
            if name in names and (file := tar.extractfile(member)) is not None:
                files[name] = file.read()
    return files


def read_npy(path: Path, channels: int | None, memory_limit: int) -> np.ndarray:
    """A .npy file as (N, C, H, W), memory-mapped if it is larger than the limit."""
    length = path.stat().st_size
    with path.open("rb") as file:
        _check_npy(file, length, str(path))
    images = np.load(path, mmap_mode="r" if length > memory_limit else None, allow_pickle=False)
    return _nchw(images, channels, str(path))


def read_npz(path: Path, channels: int | None) -> np.ndarray:
    """The images in a .npz file as (N, C, H, W): key x, images or arr_0, or the only array."""
    with reading(path, "a .npz file"):
        archive = zipfile.ZipFile(path)
    with archive:
        members = {m.filename.removesuffix(".npy"): m for m in archive.infolist()}
        key: str | None = next((k for k in ("x", "images", "arr_0") if k in members), None)
        if key is None and len(members) == 1:
            (key,) = members
        if key is None:
            raise ValueError(
                f"{path} has the arrays {', '.join(members) or '(none)'}; "
                "name the images x, images or arr_0"
            )
        name, member = f"{path}[{key}]", members[key]
        with reading(name, "a NumPy array"):
            file = archive.open(member)
        with file:
            _check_npy(file, member.file_size, name)
        with reading(name, "a NumPy array"), archive.open(member) as file:
            images = np.lib.format.read_array(file, allow_pickle=False)
    return _nchw(images, channels, name)


def _check_npy(file: IO[bytes], length: int, name: str) -> None:
    """ValueError unless `file`, of `length` bytes, starts with the header of a whole uint8 array.

    Before anything is allocated, and in words of this package instead of NumPy's.
    """
    with reading(name, f"a NumPy array (pickles are never loaded; give {LAYOUTS})"):
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            read = np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    if dtype.hasobject:
        raise ValueError(f"{name} holds pickled objects, which are never loaded; give {LAYOUTS}")
    if dtype != np.uint8:
        raise ValueError(f"{name} holds {dtype}; give {LAYOUTS}")
    if length - file.tell() < math.prod(shape):
        raise ValueError(f"{name} is truncated: fewer bytes than its shape {shape} takes")


def _nchw(images: np.ndarray, channels: int | None, name: str) -> np.ndarray:
    if images.ndim == 3:
        return images[:, np.newaxis]
    shape = images.shape
    axes = [axis for axis in (1, 3) if images.ndim == 4 and 1 <= shape[axis] <= 4]
    if len(axes) == 2:
        axes = [axis for axis in axes if shape[axis] == channels] or axes
    if len(axes) == 2:
        raise ValueError(
            f"{name} has shape {shape}, in which axis 1 or 3 may be the channels; pass channels, "
            "or give (N, C, H, W) or (N, H, W, C) with one of the two in 1 .. 4"
        )
    if not axes:
        raise ValueError(f"{name} has shape {shape}; give {LAYOUTS}, C in 1 .. 4")
    return images if axes == [1] else images.transpose(0, 3, 1, 2)
