"""Encoded images in an lmdb database, read by a process of its own. No decoding.

lmdb maps its file and trusts it: a page that is damaged, or gone, kills the process that reads it.
"""

from __future__ import annotations

import io
import json
import os
import select
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Any

from fastddpm.data import lmdb_reader, sources
from fastddpm.data.errors import Unusable, one_line, reading
from fastddpm.data.files import RegularFile
from fastddpm.data.sources import Reader, Source

try:
    import lmdb
except ImportError:
    lmdb = None  # type: ignore[assignment]

PATIENCE_S = 60  # without a byte from the reader


class LmdbSource(Source):
    """The values of an lmdb database, whose keys may be any bytes: names are the keys as latin-1.

    Read without lmdb's lock file, so that read-only disks do. A fork and what was pickled start a
    reader of their own. Damage that is met is errors.Unusable, then and from then on.
    """

    kind = "lmdb"

    def __init__(self, path: Path):
        super().__init__(path)
        self._reader: LmdbReader | None = None
        self.names = [key.decode("latin-1") for key in self._attached().keys]

    def reader(self) -> Reader:
        self._attached()
        return self._read

    def _attached(self) -> LmdbReader:
        """The reader of this process."""
        if self._reader is None or self._reader.owner != os.getpid():
            self._reader = LmdbReader(self.path)
        return self._reader

    def _read(self, name: str) -> bytes:
        return self._attached().value(name.encode("latin-1"))

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
        self._reader = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}


class LmdbReader:
    """The process of lmdb_reader.py on a folder, one question at a time.

    owner: the process that started it and alone may ask it
    keys:  of the database, in its order
    """

    def __init__(self, folder: Path):
        self.owner, self._lock = os.getpid(), threading.Lock()
        self._data, self._ended = folder / "data.mdb", False
        if lmdb is None:
            raise ImportError(
                f"{folder} is an lmdb database; to read it: pip install 'fastddpm[lmdb]'"
            )
        with reading(self._data, "an lmdb database"), RegularFile(self._data) as file:
            length = file.length
        if length == 0:
            raise ValueError(f"{self._data} is truncated: 0 bytes")
        # Isolated, with our own path to modules, so that it finds the lmdb that was found here.
        self._process = subprocess.Popen(
            [sys.executable, "-I", lmdb_reader.__file__, os.fspath(folder), json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
        self._answers = io.BufferedReader(_Patient(self._pipe(self._process.stdout)), 1 << 16)
        self.keys = []
        while (answer := self._answer())[0] == b"k":
            self.keys.append(answer[1])

    def value(self, key: bytes) -> bytes:
        """The value of a key; KeyError without one, OSError for one too long to be an image."""
        with self._lock:
            if self._ended:
                raise self._unusable("it was damaged before")
            question = struct.pack("<2Q", len(key), sources.ENCODED_LIMIT) + key
            try:
                self._pipe(self._process.stdin).write(question)
            except BrokenPipeError:
                raise self._death() from None
            kind, content = self._answer()
        if kind == b"l":
            sources.check_length(*struct.unpack("<Q", content))
        if kind != b"v":
            raise KeyError("no such key")
        return content

    def _answer(self) -> tuple[bytes, bytes]:
        try:
            head = self._answers.read(9)
            if len(head) < 9:
                raise self._death()
            content = self._answers.read(length := struct.unpack("<Q", head[1:])[0])
        except TimeoutError as error:
            self._process.kill()
            raise self._unusable(str(error)) from None
        if len(content) < length:
            raise self._death()
        if head[:1] == b"x":
            self._ended = True
            raise Unusable(f"{self._data} {one_line(content.decode(errors='replace'))}")
        return head[:1], content

    def _death(self) -> Unusable:
        """The error that the reader has ended."""
        code = self._process.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return self._unusable(f"it is damaged, and its reader died of it ({how})")

    def _unusable(self, why: str) -> Unusable:
        self._ended = True
        return Unusable(f"{self._data} can't be read as an lmdb database: {why}")

    @staticmethod
    def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
        assert pipe is not None
        return pipe

    def close(self) -> None:
        """End the reader, if it is this process's own."""
        if self.owner == os.getpid():
            self._process.kill()
            self._process.wait()
        self._pipe(self._process.stdin).close()
        self._pipe(self._process.stdout).close()

    def __del__(self) -> None:
        if hasattr(self, "_process"):
            self.close()


class _Patient(io.RawIOBase):
    """A pipe that is waited for PATIENCE_S and no longer."""

    def __init__(self, pipe: IO[bytes]):
        self._handle, self._poll = pipe.fileno(), select.poll()
        self._poll.register(self._handle, select.POLLIN)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._poll.poll(PATIENCE_S * 1000):
            raise TimeoutError(f"its reader said nothing for {PATIENCE_S} s")
        return os.readv(self._handle, [buffer])
