"""Compressed bytes, expanded piece by piece and read to their end, where their checksums are. No
archives.
"""

from __future__ import annotations

import bz2
import lzma
import struct
import zlib
from collections.abc import Callable
from typing import Any, Protocol

from fastddpm.data.files import PIECE

DICTIONARY_LIMIT = 256 << 20  # bytes that an xz stream may have its decoder keep; xz -9 has 64 MiB


class Readable(Protocol):
    """Bytes, one after the other."""

    def read(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the end only."""


class Expanded:
    """What compressed bytes expand to: no more at a time than asked for, whatever they claim.

    compressed: the bytes
    decoder:    makes the decoder of one compressed stream
    many:       several streams may follow each other, with zeros between and after them, as gzip,
                bzip2 and xz allow; else there is one

    `read` raises ValueError, or what the decoder raises, for damage: wrong checksums, a stream that
    does not end, and bytes behind it that are none. Each is met by the read that comes to the end.
    """

    def __init__(self, compressed: Readable, decoder: Callable[[], Any], many: bool):
        self._compressed, self._new, self._many = compressed, decoder, many
        self._decoder: Any = decoder()
        self._input = b""

    def read(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the end only."""
        pieces = []
        while size > 0 and (piece := self._piece(min(size, PIECE))):
            pieces.append(piece)
            size -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _piece(self, size: int) -> bytes:
        while self._decoder is not None:
            if self._decoder.eof:
                self._next_stream(self._decoder.unused_data)
                continue
            piece = self._decoder.decompress(self._input, size)
            self._input = b""
            if piece:
                return piece
            if not self._decoder.eof:
                self._input = self._compressed.read(1 << 16)
                if not self._input:
                    raise ValueError("it is truncated: its compressed stream does not end")
        return b""

    def _next_stream(self, rest: bytes) -> None:
        """Behind the end of a stream: another, or nothing."""
        rest = rest.lstrip(b"\0")
        while self._many and not rest and (more := self._compressed.read(1 << 16)):
            rest = more.lstrip(b"\0")
        self._decoder, self._input = (self._new(), rest) if self._many and rest else (None, b"")


class _Deflate:
    """zlib's decoder with the names that bz2's and lzma's have."""

    def __init__(self, wbits: int):
        self._decoder = zlib.decompressobj(wbits)

    @property
    def eof(self) -> bool:
        return self._decoder.eof

    @property
    def unused_data(self) -> bytes:
        return self._decoder.unused_data

    def decompress(self, content: bytes, size: int) -> bytes:
        tail = self._decoder.unconsumed_tail
        return self._decoder.decompress(tail + content if tail else content, size)


def _xz() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=DICTIONARY_LIMIT)


_FILES: dict[bytes, tuple[str, Callable[[], Any]]] = {
    b"\x1f\x8b": ("gzip", lambda: _Deflate(31)),
    b"BZh": ("bzip2", bz2.BZ2Decompressor),
    b"\xfd7zXZ\0": ("xz", _xz),
}


def compression(start: bytes) -> str | None:
    """The compression of a file that starts so: gzip, bzip2, xz or None."""
    return next((name for magic, (name, _) in _FILES.items() if start.startswith(magic)), None)


def expanded(compressed: Readable, name: str) -> Expanded:
    """A file's bytes expanded, by a name that `compression` gave."""
    return Expanded(compressed, dict(_FILES.values())[name], many=True)


def expanded_member(compressed: Readable, method: int, size: int) -> Readable:
    """A zip member of `size` bytes expanded; ValueError for a method that is not read."""
    if method == 0:
        return compressed
    if method == 8:
        return Expanded(compressed, lambda: _Deflate(-15), many=False)
    if method == 12:
        return Expanded(compressed, bz2.BZ2Decompressor, many=False)
    if method == 14:
        lzma_decoder = _zip_lzma(compressed, size)
        return Expanded(compressed, lambda: lzma_decoder, many=False)
    raise ValueError(f"it is compressed by method {method} of zip, which is not read here")


def _zip_lzma(compressed: Readable, size: int) -> Any:
    """Layout: version (2 bytes), 5 (2 bytes), lc + 9 (lp + 5 pb), the dictionary's bytes (4)."""
    head = compressed.read(9)
    if len(head) < 9 or head[2:4] != b"\5\0" or head[4] >= 9 * 5 * 5:
        raise ValueError("its LZMA header is damaged")
    lp_pb, lc = divmod(head[4], 9)
    pb, lp = divmod(lp_pb, 5)
    # No more than the member has: all that lies further back is never referred to.
    dictionary = max(4096, min(struct.unpack("<I", head[5:])[0], size))
    options = {"id": lzma.FILTER_LZMA1, "dict_size": dictionary, "lc": lc, "lp": lp, "pb": pb}
    return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[options])
