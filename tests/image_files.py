"""Files of every form that the datasets read, written for tests: none of a test's own."""

from __future__ import annotations

import contextlib
import io
import signal
import struct
import tarfile
import zipfile
import zlib
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


def png(depth: int, colour: int, rows: list[bytes], *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of rows as they are stored, with `chunks` before its pixels. colour: 0 grey, 2 RGB,
    4 grey and alpha.
    """
    samples = {0: 1, 2: 3, 4: 2}[colour]
    width = len(rows[0]) * 8 // (depth * samples)
    head = struct.pack(">2I5B", width, len(rows), depth, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [(b"IHDR", head), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*part) for part in parts)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def tiff(array: np.ndarray, bits: int, white_is_zero: bool, sample_format: int) -> bytes:
    """A little-endian TIFF of (H, W) or (H, W, 3); sample_format: 1 unsigned, 2 signed, 3 float."""
    samples = 1 if array.ndim == 2 else 3
    content = array.tobytes() if bits != 12 else pack_12_bits(array)
    photometric = 2 if samples == 3 else int(not white_is_zero)
    tags = [
        (256, 4, array.shape[1]), (257, 4, array.shape[0]), (258, 3, bits), (259, 3, 1),
        (262, 3, photometric), (273, 4, 8), (277, 3, samples), (278, 4, array.shape[0]),
        (279, 4, len(content)), (339, 3, sample_format),
    ]  # fmt: skip
    directory, behind = struct.pack("<H", len(tags)), b""
    end = 8 + len(content) + 2 + 12 * len(tags) + 4
    for tag, kind, value in tags:
        count = samples if tag in (258, 339) else 1
        if count == 3:  # too long for its entry, so it stands behind the directory
            packed, behind = (
                struct.pack("<I", end + len(behind)),
                behind + struct.pack("<3H", *[value] * 3),
            )
        else:
            packed = struct.pack("<I" if kind == 4 else "<Hxx", value)
        directory += struct.pack("<2HI", tag, kind, count) + packed
    return b"II*\0" + struct.pack("<I", 8 + len(content)) + content + directory + bytes(4) + behind


def pack_12_bits(array: np.ndarray) -> bytes:
    """Each row's values, the first in the upper bits."""
    rows = ["".join(f"{value:012b}" for value in row) for row in array]
    return b"".join(int(row, 2).to_bytes(len(row) // 8, "big") for row in rows)


def cifar10_files(x: np.ndarray) -> dict[str, bytes]:
    """The training split's files, two images each."""
    return {f"data_batch_{k}.bin": cifar_batch(x[2 * k - 2 : 2 * k]) for k in range(1, 6)}


@contextlib.contextmanager
def five_seconds():
    """Nothing may hang longer."""

    def stop(*_):
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
