"""Files that say what they are of: kept for who asks for the same again, never written over by
another's. What each says, and how, is its writer's."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from fastddpm.options import shown

T = TypeVar("T")
KEY = "fastddpm"  # of a .png file's text: JSON of what it is of


def check_regular(path: Path) -> None:
    """ValueError for what is no file: it could not be replaced, or would be waited for."""
    if os.path.lexists(path) and not path.is_file():
        raise ValueError(f"{path} is no regular file: give another folder")


def check_same(path: Path, other: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """The ValueError that names the first of `ours` that the file has otherwise. other: what it is
    then, "of another gallery", say."""
    for name, value in ours.items():
        if theirs.get(name) != value:
            raise ValueError(
                f"{path} is {other}: its {name} is {shown(theirs.get(name))} and here "
                f"{shown(value)}; give another folder"
            )


def if_whole(read: Callable[[], T]) -> T | None:
    """What `read` finds in a file; None if that is damaged."""
    try:
        return read()
    except MemoryError:  # no fault of the file
        raise
    except Exception:  # on hostile bytes decoders raise nearly anything
        return None


def png_text(path: Path) -> str:
    """The JSON in a .png file that is whole, "{}" where there is none."""
    with Image.open(path, formats=("PNG",)) as image:
        text = image.info.get(KEY, "{}")
        image.verify()
    return text


def check_apart(data: Any, out: Path, message: str) -> None:
    """ValueError(message) if what is written into the folder `out` would be among the data."""
    source, folder = Path(data).resolve(), out.resolve()
    if source.is_dir() and (folder == source or source in folder.parents):
        raise ValueError(message)
