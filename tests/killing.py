"""A run that ends at one of its writes, which files are renamed into place by."""

import contextlib
import os
from collections.abc import Iterator

from fastddpm import checkpoint


class Killed(BaseException):
    pass


@contextlib.contextmanager
def killed_after(survived: int, monkeypatch) -> Iterator[list]:
    """A block in which so many files are put into place and the next one raises Killed; yields
    those that were."""
    replace, renamed = os.replace, []

    def until_killed(source, target):
        if len(renamed) == survived:
            raise Killed
        renamed.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", until_killed)
        yield renamed
