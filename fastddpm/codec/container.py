"""The file of coded images: its layout, read with everything checked. No coding.

    signature   89 44 50 4D 0D 0A 1A 0A ("\\x89DPM", then what shows a transfer as text, as PNG's)
    chunk       length of the payload (4 bytes, big-endian), kind (4 letters), payload, CRC-32 of
                kind and payload (4 bytes, big-endian); and so on

A kind that begins with a small letter may be skipped by who does not know it; any other may not.

    HEAD  JSON, see `Head`
    GRUP  a group of images, see group.py; in order, as many as hold all images
    DONE  nothing: the file is whole

Version 1 has no other kinds. All that the pixels depend on beside the payloads is named in HEAD, by
digests; a group's checksums are of the pixels."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from fastddpm.options import shown

SIGNATURE = b"\x89DPM\r\n\x1a\n"
VERSION = 1
MOST_PIXELS = 2**26  # of an image
LONGEST_HEAD = 2**24
KINDS = (b"HEAD", b"GRUP", b"DONE")


@dataclass(frozen=True)
class Head:
    """What a file says of itself.

    images:     how many
    shape:      (C, H, W) of each
    model:      fingerprint of configuration, process and weights
    steps:      of the chain: how many, strided; or the model's own t of each
    tables:     digest of the chain's tables, the grids and the table of Phi
    arithmetic: in what the network's bits were computed, see network.py
    torch:      the version that took part, for messages
    """

    images: int
    shape: tuple[int, int, int]
    model: str
    steps: int | list[int]
    tables: str
    arithmetic: dict[str, str]
    torch: str
    version: int = VERSION
    kind: str = "lossless"

    def to_bytes(self) -> bytes:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> Head:
        """ValueError names what is missing or of another form, and a newer version."""
        try:
            said = json.loads(content.decode())
        except (ValueError, RecursionError):
            raise ValueError("its HEAD is not JSON") from None
        if not isinstance(said, dict):
            raise ValueError("its HEAD is no JSON object")
        if (version := said.get("version")) != VERSION or isinstance(version, bool):
            raise ValueError(
                f"it is of version {shown(version)}, and this fastddpm reads version {VERSION}"
            )
        if said.get("kind") != "lossless":
            raise ValueError(f"it is of the kind {shown(said.get('kind'))}, not 'lossless'")
        for field in dataclasses.fields(cls):
            if not _FORMS[field.name](said.get(field.name)):
                raise ValueError(f"HEAD's {field.name!r} is {shown(said.get(field.name))}")
        if unknown := said.keys() - {field.name for field in dataclasses.fields(cls)}:
            raise ValueError(f"HEAD has the unknown entry {shown(sorted(unknown)[0])}")
        return cls(**{**said, "shape": tuple(said["shape"])})


def _is_count(value: Any, most: int = 2**63 - 1) -> bool:
    return type(value) is int and 1 <= value <= most


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 100 and value.isprintable()


def _is_shape(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(_is_count(size, MOST_PIXELS) for size in value)
        and value[0] * value[1] * value[2] <= MOST_PIXELS
    )


def _are_steps(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) > 0 and all(type(t) is int and 0 <= t < 2**32 for t in value)
    return _is_count(value, 2**32)


_FORMS: dict[str, Any] = {
    "images": _is_count,
    "shape": _is_shape,
    "model": _is_word,
    "steps": _are_steps,
    "tables": _is_word,
    "arithmetic": lambda x: isinstance(x, dict) and all(map(_is_word, x.values())),
    "torch": _is_word,
    "version": _is_count,
    "kind": _is_word,
}


def write_chunk(file: BinaryIO, kind: bytes, payload: bytes) -> None:
    body = kind + payload
    file.write(struct.pack(">I", len(payload)) + body + struct.pack(">I", zlib.crc32(body)))


class Reader:
    """Reads a file from its beginning; every ValueError names the file.

    name: how messages call it
    """

    def __init__(self, file: BinaryIO, name: str):
        self._file, self._name = file, name
        at = file.tell()
        self._left = file.seek(0, os.SEEK_END) - at
        file.seek(at)
        signature = self._read(len(SIGNATURE), "its signature")
        if signature != SIGNATURE:
            raise ValueError(f"{name} is no file of coded images: its first bytes are others")
        kind, payload = self._chunk()
        if kind != b"HEAD":
            raise self._damaged(f"it begins with {_printable(kind)}, not with HEAD")
        try:
            self.head = Head.from_bytes(payload)
        except ValueError as error:
            raise ValueError(f"{name} can't be read: {error}") from None

    def groups(self) -> Iterator[bytes]:
        """The payload of each group, up to the end of the file."""
        while True:
            kind, payload = self._chunk()
            if kind == b"GRUP":
                yield payload
            elif kind == b"DONE":
                if self._left or payload:
                    raise self._damaged(f"{self._left + len(payload):,} bytes follow its end")
                return
            elif kind == b"HEAD":
                raise self._damaged("it has a second HEAD")

    def _chunk(self) -> tuple[bytes, bytes]:
        """The next that is known; CRC-32 and length are right."""
        while True:
            length, kind = struct.unpack(">I4s", self._read(8, "a chunk"))
            if not re.fullmatch(rb"[A-Za-z]{4}", kind):
                raise self._damaged(f"a chunk's kind is {_printable(kind)}")
            if kind == b"HEAD" and length > LONGEST_HEAD:
                raise self._damaged(f"its HEAD is {length:,} bytes long")
            what = f"a chunk {_printable(kind)}"
            payload = self._read(length, what)
            if zlib.crc32(kind + payload) != struct.unpack(">I", self._read(4, what))[0]:
                raise self._damaged(f"the checksum of {what} is wrong")
            if kind in KINDS:
                return kind, payload
            if kind[:1].isupper():
                raise ValueError(
                    f"{self._name} has {what}, which this fastddpm does not know and may not skip"
                )

    def _read(self, size: int, what: str) -> bytes:
        if size > self._left:
            raise ValueError(
                f"{self._name} is cut off in {what}: {size:,} bytes should follow, and "
                f"{self._left:,} do"
            )
        self._left -= size
        content = self._file.read(size)
        if len(content) != size:
            raise ValueError(f"{self._name} became shorter while it was read")
        return content

    def _damaged(self, what: str) -> ValueError:
        return ValueError(f"{self._name} is damaged: {what}")


def _printable(kind: bytes) -> str:
    return repr(kind.decode("latin-1"))
