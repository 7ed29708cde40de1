"""tqdm's bar as we show it: a stderr that is closed, full or gone ends the bar and not the run."""

from __future__ import annotations

import contextlib
import sys
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
