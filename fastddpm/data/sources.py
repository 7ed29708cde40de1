"""Where encoded images come from: a folder, a zip, an lmdb database. Names and bytes, no decoding.

A source may be used by several threads, after a fork and after pickling.
"""

from __future__ import annotations

import os
import re
import stat
import threading
import weakref
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from fastddpm.data.decode import EXTENSIONS
from fastddpm.data.errors import one_line, reading, reason

try:
    import lmdb
except ImportError:
    lmdb = None  # type: ignore[assignment]

ENCODED_LIMIT = 1 << 30  # bytes of one encoded image; more is no image that Pillow would decode

Reader = Callable[[str], bytes]


class Source(ABC):
    """Encoded images by name.

    names:      in the order of the dataset
    unreadable: (name, reason) of what could not even be listed
    """

    kind: str

    def __init__(self, path: Path):
        self.path = path
        self.names: list[str] = []
        self.unreadable: list[tuple[str, str]] = []

    @abstractmethod
    def reader(self) -> Reader:
        """The function name -> bytes, good for all threads of this process until `close`."""

    @abstractmethod
    def close(self) -> None:
        """Let go of what `reader` opened; it opens it again if need be."""


class FolderSource(Source):
    """The image files below a folder; names are paths from it."""

    kind = "folder"

    def __init__(self, path: Path):
        super().__init__(path)
        seen = set()
        for folder, folders, files in os.walk(path, followlinks=True, onerror=self._unlistable):
            real = os.path.realpath(folder)
            if real in seen:  # a link back up would be followed for ever
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            inside = (Path(folder, file).relative_to(path).as_posix() for file in files)
            self.names += filter(_is_image, inside)
        self.names.sort(key=_natural)

    def _unlistable(self, error: OSError) -> None:
        self.unreadable.append((one_line(str(error.filename)), reason(error)))

    def reader(self) -> Reader:
        return self._read

    def close(self) -> None:
        return

    def _read(self, name: str) -> bytes:
        status = os.stat(self.path / name)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not a regular file")  # reading a pipe would wait for ever
        _check_length(status.st_size)
        return (self.path / name).read_bytes()


class ZipSource(Source):
    """The image members of a zip archive, compressed or not."""

    kind = "zip"

    def __init__(self, path: Path):
        super().__init__(path)
        self._handle: tuple[int, zipfile.ZipFile, threading.Lock] | None = None
        members = set(self._opened()[1].namelist())
        self.names = sorted(filter(_is_image, members), key=_natural)

    def reader(self) -> Reader:
        self._opened()
        return self._read

    def close(self) -> None:
        if self._handle is not None and self._handle[0] == os.getpid():
            self._handle[1].close()
        self._handle = None

    def _opened(self) -> tuple[int, zipfile.ZipFile, threading.Lock]:
        """(process, archive, lock): a fork would share the position in the file with its parent."""
        if self._handle is None or self._handle[0] != os.getpid():
            with reading(self.path, "a zip archive"):
                archive = zipfile.ZipFile(self.path)
            self._handle = os.getpid(), archive, threading.Lock()
        return self._handle

    def _read(self, name: str) -> bytes:
        _, archive, lock = self._opened()
        _check_length(archive.getinfo(name).file_size)
        with lock:
            return archive.read(name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}


class LmdbSource(Source):
    """The values of an lmdb database, whose keys may be any bytes: names are the keys as latin-1.

    Read without lmdb's lock file, so that read-only disks do and a fork may go on reading.
    """

    kind = "lmdb"
    # lmdb opens a database once in a process, so sources of one folder share it.
    _open: ClassVar[weakref.WeakValueDictionary[str, Any]] = weakref.WeakValueDictionary()

    def __init__(self, path: Path):
        super().__init__(path)
        self._environment: Any = None
        environment = self._attached()
        with reading(path, "an lmdb database"), environment.begin() as transaction:
            keys = transaction.cursor().iternext(keys=True, values=False)
            self.names = [key.decode("latin-1") for key in keys]

    def reader(self) -> Reader:
        self._attached()
        return self._read

    def _attached(self) -> Any:
        if self._environment is None:
            real = os.path.realpath(self.path)
            self._environment = self._open.get(real) or self._open_environment(real)
            self._open[real] = self._environment
        return self._environment

    def _open_environment(self, real: str) -> Any:
        if lmdb is None:
            raise ImportError(
                f"{self.path} is an lmdb database; to read it: pip install 'fastddpm[lmdb]'"
            )
        data = self.path / "data.mdb"
        if data.stat().st_size == 0:
            raise ValueError(f"{data} is truncated: 0 bytes")
        with reading(data, "an lmdb database"):
            environment = lmdb.open(real, readonly=True, lock=False, readahead=False, create=False)
        pages = environment.info()["last_pgno"] + 1
        if data.stat().st_size < pages * environment.stat()["psize"]:
            # Checked, since a page beyond the end of the mapped file kills the process.
            raise ValueError(f"{data} is truncated: {pages} pages in its header, fewer on the disk")
        return environment

    def _read(self, name: str) -> bytes:
        with self._environment.begin() as transaction:
            value = transaction.get(name.encode("latin-1"))
        if value is None:
            raise KeyError("no such key")
        return value

    def close(self) -> None:
        self._environment = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_environment": None}


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") and part.strip(".") for part in path.parts)
    return not hidden and path.suffix.lower() in EXTENSIONS


def _natural(name: str) -> tuple[list[Any], str]:
    """Sort key by which img2 comes before img10; the name itself settles img2 and img02."""
    parts: list[Any] = re.split("([0-9]+)", name)
    for k in range(1, len(parts), 2):
        digits = parts[k].lstrip("0")
        parts[k] = (len(digits), digits)
    return parts, name


def _check_length(length: int) -> None:
    if length > ENCODED_LIMIT:
        raise OSError(f"{length:,} bytes, more than {ENCODED_LIMIT:,}")
