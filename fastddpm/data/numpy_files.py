"""Images in .npy and .npz files: headers are checked first, no pickle, no memory map."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastddpm.data.archives import Zip
from fastddpm.data.arrays import Array
from fastddpm.data.errors import reading
from fastddpm.data.files import RegularFile
from fastddpm.data.limits import check_memory

LAYOUTS = "uint8 arrays of shape (N, H, W), (N, C, H, W) or (N, H, W, C)"
FORM = f"a NumPy array (pickles are never loaded; give {LAYOUTS})"
HEADER_LIMIT = 1 << 14  # bytes; NumPy reads none of more than 10,000


class Header(NamedTuple):
    """Of an array of uint8: what np.save wrote before its bytes."""

    shape: tuple[int, ...]
    fortran: bool
    start: int  # of the first element, in bytes


def read_npy(path: Path, channels: int | None, memory_limit: int) -> Array:
    """A .npy file as (N, C, H, W), read as asked for if it is larger than the limit."""
    with reading(path, "a .npy file"):
        file = RegularFile(path)
    header = _header(file.read(HEADER_LIMIT, 0), file.length, str(path))
    _layout(header.shape, channels, str(path))  # before anything is read
    if file.length > memory_limit and not header.fortran:
        return StoredArray(file, header, channels)
    with file, reading(path, "a .npy file"):
        check_memory(math.prod(header.shape))
        content = np.empty(math.prod(header.shape), np.uint8)
        file.read_into(content.data, header.start)
    return _shaped(content, header, channels, str(path))


def read_npz(path: Path, channels: int | None) -> np.ndarray:
    """The images in a .npz file as (N, C, H, W): key x, images or arr_0, or the only array."""
    with reading(path, "a .npz file"):
        archive = Zip(path)
        for member in archive.members:
            archive.check(member)  # or a damaged name would make the choice
    members = {name.removesuffix(".npy"): name for name in archive.members}
    key: str | None = next((k for k in ("x", "images", "arr_0") if k in members), None)
    if key is None and len(members) == 1:
        (key,) = members
    if key is None:
        raise ValueError(
            f"{path} has the arrays {', '.join(members) or '(none)'}; "
            "name the images x, images or arr_0"
        )
    name = f"{path}[{key}]"
    with reading(name, FORM):
        check_memory(archive.members[members[key]].file_size)
        content = archive.read(members[key])
        archive.close()
    header = _header(content[:HEADER_LIMIT], len(content), name)
    return _shaped(np.frombuffer(content, np.uint8, offset=header.start), header, channels, name)


def _header(content: bytes | bytearray, length: int, name: str) -> Header:
    """Of a file that starts with `content`; ValueError unless it is a whole array of uint8 and no
    more, in words of this package instead of NumPy's.
    """
    file = io.BytesIO(content)
    with reading(name, FORM):
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            read = np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise ValueError(f"{name} holds pickled objects, which are never loaded; give {LAYOUTS}")
    if dtype != np.uint8:
        raise ValueError(f"{name} holds {dtype}; give {LAYOUTS}")
    if any(type(side) is not int or side < 0 for side in shape):  # NumPy takes True and -1
        raise ValueError(f"{name} has shape {shape}; give {LAYOUTS}")
    if 0 in shape:
        raise ValueError(f"{name} holds no images: {shape}")
    header = Header(shape, fortran, file.tell())
    left = length - header.start - math.prod(shape)
    if left < 0:
        raise ValueError(f"{name} is truncated: fewer bytes than its shape {shape} takes")
    if left > 0:
        raise ValueError(f"{name} is too long: {left:,} bytes follow its shape {shape}")
    return header


def _layout(shape: tuple[int, ...], channels: int | None, name: str) -> str:
    """ "NHW", "NCHW" or "NHWC"; ValueError when it is none of them, or may be two."""
    if len(shape) == 3:
        return "NHW"
    axes = [axis for axis in (1, 3) if len(shape) == 4 and 1 <= shape[axis] <= 4]
    if len(axes) == 2:
        axes = [axis for axis in axes if shape[axis] == channels] or axes
    if len(axes) == 2:
        raise ValueError(
            f"{name} has shape {shape}, in which axis 1 or 3 may be the channels; pass channels, "
            "or give (N, C, H, W) or (N, H, W, C) with one of the two in 1 .. 4"
        )
    if not axes:
        raise ValueError(f"{name} has shape {shape}; give {LAYOUTS}, C in 1 .. 4")
    return "NCHW" if axes == [1] else "NHWC"


def _nchw(images: np.ndarray, layout: str) -> np.ndarray:
    if layout == "NHW":
        return images[:, np.newaxis]
    return images if layout == "NCHW" else images.transpose(0, 3, 1, 2)


def _shaped(content: np.ndarray, header: Header, channels: int | None, name: str) -> np.ndarray:
    images = content.reshape(header.shape, order="F" if header.fortran else "C")
    return _nchw(images, _layout(header.shape, channels, name))


class StoredArray:
    """The images of a .npy file in C order as (N, C, H, W), read from it as they are asked for.

    By reads and not through a memory map, which ends the process when the file is cut. A fork may
    go on reading; what was pickled opens the file again.
    """

    def __init__(self, file: RegularFile, header: Header, channels: int | None):
        self._path, self._header = file.path.absolute(), header
        self._layout = _layout(header.shape, channels, str(file.path))
        self._file: RegularFile | None = file

    @property
    def shape(self) -> tuple[int, ...]:
        none = np.empty((0, *self._header.shape[1:]), np.uint8)
        return (self._header.shape[0], *_nchw(none, self._layout).shape[1:])

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        if self._file is None:
            self._file = RegularFile(self._path)
        images = np.empty((len(index), *self._header.shape[1:]), np.uint8)
        size = math.prod(self._header.shape[1:])
        for k, image in zip(index.tolist(), images, strict=True):
            self._file.read_into(image.reshape(-1).data, self._header.start + k * size)
        return _nchw(images, self._layout)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}
