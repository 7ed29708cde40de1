"""PNG's chunks and their checksums, which Pillow does not compare for pixels. No decoding."""

from __future__ import annotations

import struct
import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"
TURNS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")  # texts that hold an orientation


def without_damage(content: bytes | bytearray) -> bytes | bytearray:
    """The PNG without the chunks that no pixel depends on, which may be damaged or a bomb, and
    Pillow raises for some; kept are those that may say how the image is turned.

    Layout: the signature, then chunks: length (4 bytes), kind (4), data, CRC-32 of kind and data;
    bit 5 of the kind's first byte marks what is not needed to show the image. Raises ValueError for
    an end that is missing and for wrong checksums of all other chunks.
    """
    view, at, kind = memoryview(content), len(SIGNATURE), b""
    good = [view[:at]]
    while kind != b"IEND":
        head = view[at : at + 8]
        length, kind = struct.unpack(">I4s", head) if len(head) == 8 else (0, b"IEND")
        chunk = view[at : at + 12 + length]
        if len(chunk) < 12 + length:
            raise ValueError(f"truncated in or before its {_printable(kind)} chunk")
        if zlib.crc32(chunk[4:-4]) == struct.unpack(">I", chunk[-4:])[0]:
            if _is_used(kind, chunk[8:-4]):
                good.append(chunk)
        elif kind[0] & 0x20 == 0 or kind == b"tRNS":
            raise ValueError(f"the checksum of its {_printable(kind)} chunk is wrong")
        at += len(chunk)
    return b"".join(good)


def _is_used(kind: bytes, data: memoryview) -> bool:
    if kind in (b"tEXt", b"zTXt", b"iTXt"):
        return bytes(data[:40]).startswith(TURNS)
    return kind[0] & 0x20 == 0 or kind in (b"tRNS", b"eXIf")


def depth_and_colour(content: bytes | bytearray) -> tuple[int, int]:
    """Bits a sample, and the colour type: 0 grey, 2 RGB, 3 palette, 4 grey and 6 RGB with alpha."""
    return content[24], content[25]


def _printable(kind: bytes) -> str:
    return repr(kind.decode("latin-1"))
