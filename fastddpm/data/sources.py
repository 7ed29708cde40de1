"""Where encoded images come from: a folder, a zip; an lmdb database is lmdb_source.py's. Names and
bytes, no decoding.

A source may be used by several threads, after a fork and after pickling.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from fastddpm.data.archives import Zip
from fastddpm.data.decode import EXTENSIONS, PICTURES
from fastddpm.data.errors import one_line, reading, reason
from fastddpm.data.files import RegularFile, system_devices

ENCODED_LIMIT = 512 << 20  # bytes of one encoded image; more is no image that Pillow would decode
LARGE, RATIO_LIMIT = 64 << 20, 100  # of a zip: larger members expand no more than so many times

Reader = Callable[[str], bytes | bytearray]


class Source(ABC):
    """Encoded images by name.

    names:      in the order of the dataset
    unreadable: (name, reason) of what could not even be listed, or is a picture of no format that
                is read
    others:     how many other files there are, by suffix
    """

    kind: str

    def __init__(self, path: Path):
        self.path = path
        self.names: list[str] = []
        self.unreadable: list[tuple[str, str]] = []
        self.others: Counter[str] = Counter()

    def _sort_out(self, names: Iterable[str]) -> None:
        """Images, in natural order, from what else there is. Hidden files do not count."""
        for name in names:
            path = PurePosixPath(name)
            suffix = path.suffix.lower()
            if any(part.startswith(".") and part.strip(".") for part in path.parts):
                continue
            if suffix in EXTENSIONS:
                self.names.append(name)
            elif suffix in PICTURES:
                self.unreadable.append((one_line(name), f"{suffix} is not read here"))
            else:
                self.others[one_line(suffix) or "no suffix"] += 1
        self.names.sort(key=_natural)
        self.unreadable.sort()

    @abstractmethod
    def reader(self) -> Reader:
        """The function name -> bytes, good for all threads of this process until `close`.

        It raises OSError or ValueError, errors.Unusable when nothing more can be read.
        """

    def length(self, name: str) -> int:
        """The bytes that reading it takes, as far as that is announced."""
        return 0

    @abstractmethod
    def close(self) -> None:
        """Let go of what `reader` opened; it opens it again if need be."""


class FolderSource(Source):
    """The image files below a folder; names are paths from it.

    Links are followed, but not into the system's own file systems, whose folders change while they
    are walked and lead everywhere.
    """

    kind = "folder"

    def __init__(self, path: Path):
        super().__init__(path)
        system, seen, names = system_devices(), set(), []
        for folder, folders, files in os.walk(path, followlinks=True, onerror=self._unlistable):
            real = os.path.realpath(folder)
            if real in seen:  # a link back up would be followed for ever
                folders.clear()
                continue
            seen.add(real)
            if os.stat(folder).st_dev in system:
                self.unreadable.append((one_line(folder), "a folder of the system"))
                folders.clear()
                continue
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            names += [Path(folder, file).relative_to(path).as_posix() for file in files]
        self._sort_out(names)

    def _unlistable(self, error: OSError) -> None:
        self.unreadable.append((one_line(str(error.filename)), reason(error)))

    def reader(self) -> Reader:
        return self._read

    def length(self, name: str) -> int:
        return os.stat(self.path / name).st_size

    def close(self) -> None:
        return

    def _read(self, name: str) -> bytes:
        return read_encoded(self.path / name)


class ZipSource(Source):
    """The image members of a zip archive, compressed or not."""

    kind = "zip"

    def __init__(self, path: Path):
        super().__init__(path)
        self._archive: Zip | None = None
        archive = self._opened()
        self._sort_out(name for name in archive.members if not name.endswith("/"))
        images = set(self.names)
        with reading(self.path, "a zip archive"):
            for name in archive.members.keys() - images:
                archive.check(name)  # or a damaged name would hide an image

    def reader(self) -> Reader:
        self._opened()
        return self._read

    def length(self, name: str) -> int:
        return self._opened().members[name].file_size

    def close(self) -> None:
        if self._archive is not None:
            self._archive.close()
        self._archive = None

    def _opened(self) -> Zip:
        if self._archive is None:
            with reading(self.path, "a zip archive"):
                self._archive = Zip(self.path)
        return self._archive

    def _read(self, name: str) -> bytearray:
        archive = self._opened()
        member = archive.members[name]
        check_length(member.file_size)
        if member.file_size > max(LARGE, RATIO_LIMIT * member.compress_size):
            raise OSError(f"a decompression bomb, {member.file_size:,} bytes in an archive")
        return archive.read(name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_archive": None}


def read_encoded(path: str | os.PathLike) -> bytes:
    """The bytes of an image file; OSError for what is no regular file, or too long to be one."""
    with RegularFile(path) as file:
        check_length(file.length)
        return file.read(file.length, 0)


def check_length(length: int) -> None:
    """OSError for more bytes than an encoded image may have."""
    if length > ENCODED_LIMIT:
        raise OSError(f"{length:,} bytes, more than {ENCODED_LIMIT:,}")


def _natural(name: str) -> tuple[list[Any], str]:
    """Sort key by which img2 comes before img10; the name itself settles img2 and img02."""
    parts: list[Any] = re.split("([0-9]+)", name)
    for k in range(1, len(parts), 2):
        digits = parts[k].lstrip("0")
        parts[k] = (len(digits), digits)
    return parts, name
