"""A folder that one process at a time may write into."""

from __future__ import annotations

import contextlib
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path

from fastddpm.checkpoint import _lock
from fastddpm.host import callers_level

LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: Path, work: str) -> Iterator[None]:
    """`folder` for this process alone, until the block or the process ends, however it does.

    Raises BlockingIOError, naming the process that has it; `work` says what it does there.
    """
    handle = _locked_handle(folder, work)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(folder / LOCK)  # while it is locked: the next one makes its own
        os.close(handle)


def _locked_handle(folder: Path, work: str) -> int:
    path = folder / LOCK
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        taken = _lock(handle, wait=False)
        if taken is False:
            with os.fdopen(handle, "rb") as file:
                holder = file.read(200).decode(errors="replace").strip()
            raise BlockingIOError(
                f"{folder} is in use by another {work}{f' ({holder})' if holder else ''}: end that "
                "one, or give another folder"
            )
        if taken is None:
            warnings.warn(
                f"{folder} is on a file system without locks: see to it that no other {work} "
                "writes there",
                stacklevel=callers_level(),
            )
        if _is_at(path, handle):
            with contextlib.suppress(OSError):  # on a full disk it is nameless
                os.ftruncate(handle, 0)
                os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
            return handle
        os.close(handle)  # one that ended removed it between the two calls


def _is_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False
