"""Regular files, read by position. Nothing that could wait for ever, no formats."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

PIECE = 1 << 20  # bytes read at a time


class RegularFile:
    """The bytes of a regular file, as many as it had when it was opened.

    Reads share no position, so threads and forks need no lock. A pipe, a socket, a device, a file
    of /proc or the like is an OSError, since reading one may wait for ever; so is a file that lost
    bytes, where a memory map would end the process.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._handle: int | None = None
        # Asked before it is opened: opening a device may do something.
        self._check(os.stat(path))
        self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        status = os.fstat(self._handle)
        self._check(status)
        self.length = status.st_size

    def _check(self, status: os.stat_result) -> None:
        if not stat.S_ISREG(status.st_mode) or status.st_dev in system_devices():
            self.close()
            raise OSError(errno.EINVAL, "not a regular file", str(self.path))

    def read(self, size: int, offset: int) -> bytes:
        """`size` bytes from `offset` on, fewer where the file ended when it was opened."""
        size = max(0, min(size, self.length - offset))
        content = os.pread(self.fileno(), size, offset)
        if len(content) < size:  # of very many, the system gives a part
            buffer = bytearray(size)
            self.read_into(memoryview(buffer), offset)
            return bytes(buffer)
        return content

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill the buffer from `offset` on; OSError if the file has not so many bytes any more."""
        at = 0
        while at < len(buffer):
            piece = os.pread(self.fileno(), min(PIECE, len(buffer) - at), offset + at)
            if not piece:
                raise OSError(
                    errno.EIO,
                    f"it has {os.fstat(self.fileno()).st_size:,} bytes and had {self.length:,} "
                    "when it was opened",
                    str(self.path),
                )
            buffer[at : at + len(piece)] = piece
            at += len(piece)

    def stream(self, start: int = 0, stop: int | None = None) -> Stream:
        """Its bytes from `start` up to `stop`, one after the other."""
        return Stream(self, start, self.length if stop is None else min(stop, self.length))

    def fileno(self) -> int:
        if self._handle is None:
            raise ValueError(f"{self.path} is closed")
        return self._handle

    def close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __enter__(self) -> RegularFile:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class Stream:
    """A part of a file, read forward."""

    def __init__(self, file: RegularFile, start: int, stop: int):
        self._file, self._at, self._stop = file, start, stop

    def read(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the end only."""
        content = self._file.read(max(0, min(size, self._stop - self._at)), self._at)
        self._at += len(content)
        return content


def system_devices() -> set[int]:
    """Of /proc and the like, where folders and files are made up as they are read."""
    return {os.stat(path).st_dev for path in ("/proc", "/sys") if os.path.ismount(path)}
