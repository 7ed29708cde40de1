"""Files of every form that the datasets read, written for tests: none of a test's own."""

from __future__ import annotations

import io
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastddpm.data import open_dataset

rng = np.random.default_rng(0)


def pixels(*shape: int) -> np.ndarray:
    return rng.integers(0, 256, shape, dtype=np.uint8)


def encoded(array: np.ndarray | Image.Image, fmt: str = "PNG", **options) -> bytes:
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def nchw(array: np.ndarray) -> torch.Tensor:
    """(N, H, W) or (N, H, W, C) -> (N, C, H, W)."""
    return torch.from_numpy(array[:, None] if array.ndim == 3 else array.transpose(0, 3, 1, 2))


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_lmdb(path: Path, files: dict[str, bytes]) -> Path:
    lmdb = pytest.importorskip("lmdb")
    environment = lmdb.open(str(path), map_size=1 << 24)
    with environment.begin(write=True) as transaction:
        for name, content in files.items():
            transaction.put(name.encode(), content)
    environment.close()
    return path


def everything(dataset) -> torch.Tensor:
    return dataset.images(range(len(dataset)))


def fails(path, match: str, error: type[Exception] = ValueError, **options):
    """open_dataset fails in one line that matches."""
    with pytest.raises(error, match=match) as info:
        open_dataset(path, **options)
    assert "\n" not in str(info.value)


def idx(array: np.ndarray, magic: bytes = b"\0\0\x08\x03") -> bytes:
    return magic + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def cifar_batch(x: np.ndarray) -> bytes:
    """Records of a label and (3, 32, 32) pixels."""
    labels = np.full((len(x), 1), 9, np.uint8)
    return np.concatenate((labels, x.reshape(len(x), -1)), 1).tobytes()


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    packed = {".gz": "gz", ".tgz": "gz", ".bz2": "bz2", ".xz": "xz"}.get(path.suffix, "")
    with tarfile.open(path, f"w:{packed}") as tar:
        for name, content in reversed(files.items()):
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path
