"""Training images of any common form as one Dataset, and the examples of each step. Public names
and the choice of the format; the reading itself is in the files beside it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from fastddpm.data import arrays, numpy_files
from fastddpm.data.batches import batch_indices
from fastddpm.data.dataset import Dataset
from fastddpm.data.decode import check_size, decode_image
from fastddpm.data.lmdb_source import LmdbSource
from fastddpm.data.scan import open_images
from fastddpm.data.sources import FolderSource, Source, ZipSource
from fastddpm.options import check_integer, check_number

__all__ = ["WITH_SPLITS", "Dataset", "batch_indices", "check_size", "decode_image", "open_dataset"]

FORMATS = (
    "a folder or a .zip of images, idx files or their folder (MNIST family, .gz or not), a .npy or "
    ".npz of uint8, CIFAR-10's binary .tar.gz or folder, an lmdb folder (data.mdb)"
)
SPLITS = ("train", "test")
WITH_SPLITS = ("idx", "CIFAR-10")  # kinds that have both
MEMORY_LIMIT = 4 << 30


def open_dataset(
    path: str | os.PathLike,
    *,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    split: Literal["train", "test"] = "train",
    memory_limit: int = MEMORY_LIMIT,
    progress: bool = True,
) -> Dataset:
    """The images at `path`, in the first of these forms that fits:

    - lmdb:     a folder with data.mdb (LSUN); values are encoded images, in the order of their keys
    - idx:      the MNIST family: a file, or a folder with {train,t10k}-images-idx3-ubyte(.gz), such
                as /usr/share/datasets/fashion-mnist, which Debian installs
    - CIFAR-10: the binary version: its .tar.gz, or a folder with data_batch_{1..5}.bin
    - folder:   every image below it, in natural order (img2 before img10), links followed
    - zip:      every image in it, in natural order
    - arrays:   .npy or .npz (key x, images, arr_0 or the only one) of uint8, (N, H, W),
                (N, C, H, W) or (N, H, W, C): C is the axis of 1 to 4; both such: pass channels

    size:         pixels, one number or (H, W), that encoded images are cropped and resized to, by
                  the rule of `decode_image`; None: all must have the same size. Arrays keep theirs,
                  with a warning if it differs
    channels:     1 or 3 for encoded images, None: 3 if any of them has colours, which is said when
                  others are grey; of arrays, a check
    split:        "train" or "test", of forms that have both
    memory_limit: bytes. Encoded images that all fit decoded are kept so, and the disk is not read
                  again; else they are decoded as asked for. A larger .npy is read as asked for too,
                  unless it is in Fortran order, in which an image does not lie in one piece
    progress:     show a bar when decoding takes more than 2 s

    Encoded images (lmdb, folder, zip) are all decoded once, here. In folders and zips an image is
    what `decode.EXTENSIONS` names; hidden files are left out, other ones are counted in `describe`.
    The ones that can't be decoded, and pictures of other formats, are in `Dataset.skipped` and in
    one warning, which tells too how many are put onto white where they are transparent.

    All that has a checksum is read to where it stands. No more is expanded than headers announce,
    and nothing that the free memory can't hold. Pipes, devices and the like are not read.

    Raises FileNotFoundError when nothing is at `path`; ImportError when lmdb is missing; ValueError
    for options out of range, unknown formats, damaged archives and arrays, differing sizes without
    `size`, and when no image is left.
    """
    path = Path(path)
    wanted = check_size(size)
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    if channels is not None and check_integer("channels", channels, 1) > 4:
        raise ValueError(f"channels must be None or 1 to 4; got {channels!r}")
    check_number("memory_limit", memory_limit, lambda x: x >= 0, "at least 0 bytes")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if not (path.is_dir() or path.is_file()):
        raise ValueError(f"{path} is neither a regular file nor a folder")

    kind = _kind(path)
    if kind not in WITH_SPLITS and split != "train":
        raise ValueError(f"{path} ({kind}) has no splits: give the path of the test images instead")
    if kind in _SOURCES:
        if channels not in (None, 1, 3):
            raise ValueError(f"channels must be None, 1 or 3 for encoded images; got {channels}")
        return open_images(_SOURCES[kind](path), wanted, channels, memory_limit, progress)
    if kind == "idx":
        images: arrays.Array = arrays.read_idx(arrays.idx_file(path, split))
    elif kind == "CIFAR-10":
        images = arrays.read_cifar10(path, split)
    elif kind == "npy":
        images = numpy_files.read_npy(path, channels, memory_limit)
    else:
        images = numpy_files.read_npz(path, channels)
    return arrays.ArrayDataset(path, kind, images, wanted, channels)


_SOURCES: dict[str, type[Source]] = {"lmdb": LmdbSource, "folder": FolderSource, "zip": ZipSource}


def _kind(path: Path) -> str:
    """The format, from the names alone; ValueError lists what is read."""
    if path.is_dir():
        if (path / "data.mdb").exists():
            return "lmdb"
        if any((path / name).exists() for split in SPLITS for name in arrays.idx_names(split)):
            return "idx"
        if any((path / name).exists() for split in SPLITS for name in arrays.cifar10_names(split)):
            return "CIFAR-10"
        return "folder"
    name = path.name.lower()
    for suffixes, kind in (
        ((".zip",), "zip"),
        ((".npy",), "npy"),
        ((".npz",), "npz"),
        ((".tar", ".tgz", ".tbz2", ".txz"), "CIFAR-10"),
        ((".tar.gz", ".tar.bz2", ".tar.xz"), "CIFAR-10"),
        ((".gz", ".bz2", ".xz"), "idx"),
    ):
        if name.endswith(suffixes):
            return kind
    if re.search(r"idx\d", name):
        return "idx"
    raise ValueError(f"{path} is of no format that is read here; give {FORMATS}")
