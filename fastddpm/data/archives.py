"""The members of zip and tar archives, each checked before it is given out. No images."""

from __future__ import annotations

import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path

from fastddpm.data.errors import one_line
from fastddpm.data.files import PIECE, RegularFile
from fastddpm.data.streams import Readable, compression, expanded, expanded_member

TAR_LIMIT = 1 << 30  # bytes that a tar archive may unpack to; CIFAR-10's has 184 million
TAR_HEADER_LIMIT = 1 << 20  # bytes of a member's extended header


class Zip:
    """A zip archive; several threads may read its members.

    Sizes, names and checksums are said twice in a zip, in its directory and beside each member, and
    all must agree. Raises ValueError, OSError or what zipfile raises for an archive that is none.

    members: by name
    """

    def __init__(self, path: Path):
        self._file = RegularFile(path)
        with os.fdopen(os.dup(self._file.fileno()), "rb") as file, zipfile.ZipFile(file) as archive:
            listed = archive.infolist()
        self.members = {member.filename: member for member in listed}
        if len(self.members) < len(listed):
            raise ValueError("two of its members have the same name")
        # zipfile does not compare these: entries may hide in what claims to be a comment.
        tail = self._file.read(1 << 17, max(0, self._file.length - (1 << 17)))
        (count,) = struct.unpack_from("<H", tail, tail.rindex(b"PK\5\6") + 10)
        if count not in (len(listed) & 0xFFFF, 0xFFFF):
            raise ValueError(f"its directory is damaged: {count} members, {len(listed)} listed")
        if sum(member.compress_size for member in listed) > self._file.length:
            raise ValueError("its members overlap")

    def check(self, name: str) -> int:
        """Compare what the directory and the member's header say; where its bytes start."""
        member = self.members[name]
        head = self._file.read(30, member.header_offset)
        if len(head) < 30 or head[:4] != b"PK\3\4":
            raise ValueError("its header is not where the directory says")
        _, flags, method = struct.unpack_from("<3H", head, 4)
        name_length, extra_length = struct.unpack_from("<2H", head, 26)
        encoding = "utf-8" if member.flag_bits & 0x800 else "cp437"
        there = self._file.read(name_length, member.header_offset + 30)
        if there != member.orig_filename.encode(encoding) or (flags ^ member.flag_bits) & 0x800:
            raise ValueError(
                f"the directory names it so, its header {one_line(there.decode('latin-1'))!r}"
            )
        if method != member.compress_type:
            raise ValueError("the directory and its header name different methods of compression")
        if (flags | member.flag_bits) & 1:
            raise ValueError("it is encrypted")
        return member.header_offset + 30 + name_length + extra_length

    def read(self, name: str) -> bytearray:
        """A whole member whose checksum is right; its length is `members[name].file_size`."""
        start, member = self.check(name), self.members[name]
        stream = self._file.stream(start, start + member.compress_size)
        source = expanded_member(stream, member.compress_type, member.file_size)
        content = read_exactly(source, member.file_size)
        if zlib.crc32(content) != member.CRC:
            raise ValueError("Bad CRC-32: its checksum and its bytes differ")
        return content

    def close(self) -> None:
        self._file.close()


def read_exactly(source: Readable, size: int) -> bytearray:
    """The next `size` bytes, without a second copy of them; ValueError if there are fewer.

    It grows with what is there, not with what is announced.
    """
    content = bytearray()
    while len(content) < size:
        piece = source.read(min(PIECE, size - len(content)))
        if not piece:
            raise ValueError(f"it is truncated: {len(content):,} bytes, {size:,} announced")
        content += piece
    return content


def read_tar(path: Path, wanted: Collection[str]) -> dict[str, bytearray]:
    """The files of these names in a tar archive, wherever they lie in it, compressed or not.

    It is read to its end, so that a compressed one's checksum is met. Raises ValueError, OSError or
    what tarfile and the decoders raise for damage of any kind, for two files of one name, and for
    archives that unpack to more than TAR_LIMIT.
    """
    files: dict[str, bytearray] = {}
    with RegularFile(path) as file:
        packed = compression(file.read(8, 0))
        stream = expanded(file.stream(), packed) if packed else file.stream()
        source = _Limited(stream, TAR_LIMIT)
        extended: dict[bytes, bytes] = {}  # what headers before a member say of it
        while block := _block(source):
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            size = header.size
            if header.type in _NO_DATA:
                size = 0
            if header.type in _EXTENDED:
                if size > TAR_HEADER_LIMIT:
                    raise ValueError(f"a header in it has {size:,} bytes")
                extended |= _extended(header.type, bytes(_data(source, size)))
                continue
            if header.type == tarfile.GNUTYPE_SPARSE or any(b"sparse" in key for key in extended):
                raise ValueError("it holds sparse files, which are not read here")
            size = int(extended.get(b"size", size))
            if size < 0 or size > source.left:
                raise ValueError(f"it unpacks to more than {TAR_LIMIT:,} bytes")
            whole_name = extended.get(b"path", header.name.encode("utf-8", "surrogateescape"))
            name = whole_name.rpartition(b"/")[2].decode("utf-8", "replace")
            if name in wanted and header.isreg():
                if name in files:
                    raise ValueError(f"it holds two files {name}")
                files[name] = _data(source, size)
            else:
                _skip(source, size + -size % 512)
            extended = {}
        while block := source.read(PIECE):
            if block.strip(b"\0"):
                raise ValueError("bytes follow its end")
    return files


# Those of links, devices and folders say a size that no bytes follow.
_NO_DATA = tuple(b"%d" % k for k in range(1, 7))
_LONG_NAME, _LONG_LINK = tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
_EXTENDED = (_LONG_NAME, _LONG_LINK, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)


def _block(source: Readable) -> bytes:
    """The next header; empty for the mark of the archive's end, which must be there."""
    block = source.read(512)
    if len(block) < 512:
        raise ValueError("it is truncated: the mark of its end is missing")
    return block if block.strip(b"\0") else b""


def _data(source: Readable, size: int) -> bytearray:
    content = read_exactly(source, size)
    _skip(source, -size % 512)
    return content


def _skip(source: Readable, size: int) -> None:
    while size:
        piece = source.read(min(PIECE, size))
        if not piece:
            raise ValueError("it is truncated")
        size -= len(piece)


def _extended(kind: bytes, content: bytes) -> dict[bytes, bytes]:
    """Of the member that follows: GNU's long name, or pax's records "length key=value"."""
    if kind == _LONG_NAME:
        return {b"path": content.rstrip(b"\0")}
    if kind in (_LONG_LINK, tarfile.XGLTYPE):
        return {}
    records = {}
    while content:
        length = int(content.partition(b" ")[0])
        if not 4 < length <= len(content):
            raise ValueError("a header in it is damaged")
        key, _, value = content[:length].partition(b" ")[2][:-1].partition(b"=")
        records[key] = value
        content = content[length:]
    return records


class _Limited:
    """A source that may give so many bytes."""

    def __init__(self, source: Readable, limit: int):
        self._source, self._limit, self.left = source, limit, limit

    def read(self, size: int) -> bytes:
        piece = self._source.read(min(size, self.left + 1))
        self.left -= len(piece)
        if self.left < 0:
            raise ValueError(f"it unpacks to more than {self._limit:,} bytes")
        return piece
