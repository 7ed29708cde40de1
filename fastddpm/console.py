"""What a command says, on streams that may be closed, full, broken or of few signs: none of that is
an error of work that is done. No commands."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TextIO


def say(text: str, *, wanted: bool = False) -> None:
    """A line on stdout, signs that it can't encode as escapes.

    wanted: the text is what the command is for, so one that can't be written is an OSError; not so
            where the reader has left (`| head`)."""
    try:
        _write(sys.stdout, text)
    except BrokenPipeError:
        pass
    except OSError:
        if wanted:
            raise


def complain(text: str) -> None:
    """A line on stderr, if there is one."""
    with contextlib.suppress(OSError):
        _write(sys.stderr, text)


def warn(message: Warning | str, *_: object, **__: object) -> None:
    """A `warnings.showwarning` for who runs a command and not for who wrote a line of source."""
    complain(f"fastddpm: warning: {' '.join(str(message).split())}")


def _write(stream: TextIO | None, text: str) -> None:
    if stream is None:
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        stream.flush()
    except ValueError as error:  # closed
        raise OSError(str(error)) from None


def open_descriptors() -> None:
    """The null device for each of the descriptors 0, 1 and 2 that is closed: the next file that is
    opened would take its number, and what is said to nobody would be written into it."""
    for descriptor in range(3):
        if not _is_open(descriptor):
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def settle() -> None:
    """Leave nothing for the interpreter to write at its end, where a failure is an exit code."""
    for stream in (sys.stdout, sys.stderr):
        if stream is None:
            continue
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream.fileno())
                os.close(null)
