"""PNG's chunks and their checksums, which Pillow does not compare for pixels. No decoding."""

from __future__ import annotations

import struct
import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def without_damage(content: bytes | bytearray) -> bytes | bytearray:
    """The PNG without those damaged chunks that no pixel depends on, most often all of it.

    Layout: the signature, then chunks: length (4 bytes), kind (4), data, CRC-32 of kind and data;
    bit 5 of the kind's first byte marks what is not needed to show the image. Raises ValueError for
    an end that is missing and for wrong checksums of all other chunks.
    """
    view, at, kind = memoryview(content), len(SIGNATURE), b""
    good, damaged = [view[:at]], False
    while kind != b"IEND":
        head = view[at : at + 8]
        length, kind = struct.unpack(">I4s", head) if len(head) == 8 else (0, b"IEND")
        chunk = view[at : at + 12 + length]
        if len(chunk) < 12 + length:
            raise ValueError(f"truncated in or before its {_printable(kind)} chunk")
        if zlib.crc32(chunk[4:-4]) == struct.unpack(">I", chunk[-4:])[0]:
            good.append(chunk)
        elif kind[0] & 0x20 and kind != b"tRNS":
            damaged = True
        else:
            raise ValueError(f"the checksum of its {_printable(kind)} chunk is wrong")
        at += len(chunk)
    return b"".join(good) if damaged else content


def depth_and_colour(content: bytes | bytearray) -> tuple[int, int]:
    """Bits a sample, and the colour type: 0 grey, 2 RGB, 3 palette, 4 grey and 6 RGB with alpha."""
    return content[24], content[25]


def _printable(kind: bytes) -> str:
    return repr(kind.decode("latin-1"))
