"""tqdm's bar as we show it: a stderr that is closed, full or gone ends the bar and not the run."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, TextIO

import tqdm as tqdm_package


class tqdm(tqdm_package.tqdm):  # its name and its options
    """A progress bar on sys.stderr; none where there is no stderr."""

    def __init__(self, *arguments: Any, **options: Any):
        if sys.stderr is None:  # under pythonw, or descriptor 2 was closed when Python began
            options["disable"] = True
        else:
            options.setdefault("file", _Unfailing(sys.stderr))
        options.setdefault("dynamic_ncols", True)  # else tqdm asks sys.stderr alone for its width
        super().__init__(*arguments, **options)

    def update(self, n: float | None = 1) -> bool | None:
        hears = _hears.get()
        if hears is not None and hears is not self:
            hears.hear(n or 0)
        return super().update(n)


class Whole(tqdm):
    """One bar over many pieces of work of different sizes, which bars of their own count, shown or
    not: the time that is left is that of all of them."""

    _scale, _end = 0.0, 0.0

    @contextlib.contextmanager
    def part(self, share: float, updates: float) -> Iterator[None]:
        """A piece that is `share` of this bar's total, in which other bars are updated by `updates`
        in all; it is done when the block ends, however many those were."""
        self._scale, self._end = share / max(updates, 1), self.n + share
        token = _hears.set(self)
        try:
            yield
        finally:
            _hears.reset(token)
        self.update(self._end - self.n)

    def hear(self, n: float) -> None:
        self.update(max(0.0, min(n * self._scale, self._end - self.n)))


_hears: ContextVar[Whole | None] = ContextVar("_hears", default=None)


class _Unfailing:
    """A text stream that goes silent at the first write that fails."""

    def __init__(self, stream: TextIO):
        self._stream, self._failed = stream, False

    def write(self, text: str) -> int:
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        with contextlib.suppress(OSError, ValueError):
            return self._stream.isatty()
        return False

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "ascii"  # the signs that a bar may have

    def _try(self, name: str, *arguments: str) -> None:
        if not self._failed:
            try:
                getattr(self._stream, name)(*arguments)
            except (OSError, ValueError):  # ValueError: it is closed, or can't encode a sign
                self._failed = True
