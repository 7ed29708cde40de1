"""Errors of damaged and hostile files, in one line that names the file. No reading."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class Unusable(ValueError):
    """A whole source is damaged or gone: not an image of it, which could be left out."""


def one_line(text: str) -> str:
    """Text of unknown origin, fit for a message: one line, printable, not long."""
    line = " ".join(text.split()).encode("utf-8", "backslashreplace").decode()
    return line if len(line) <= 200 else line[:197] + "..."


def reason(error: Exception) -> str:
    """What went wrong, without the number and path that an OSError adds."""
    return one_line(getattr(error, "strerror", None) or str(error) or type(error).__name__)


@contextlib.contextmanager
def reading(name: object, form: str) -> Iterator[None]:
    """Every error inside becomes the ValueError that `name` can't be read as `form`, and why.

    Every one, since on hostile bytes the parsers of archives raise nearly anything.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(f"{name} can't be read as {form}: {reason(error)}") from None
