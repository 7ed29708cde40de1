"""A group of images as one stack of bits: the first ones plainly, whose bytes the next ones pop,
then batches by bits back, as large as what lies on the stack allows.

Payload of a group; integers are LEB128 varints:

    images, of them plain, batches, their sizes
    bytes of the plain stream, words of it and of the random ones after it that were popped
    bytes of the plain stream that were not popped
    the state, 8 bytes little-endian;  words of 2 bytes, little-endian, the last is the top
    a checksum of each image, CRC-32's low 4, 8, 16 or 32 bits, packed
    16 bytes of the SHA-256 of all pixels in order

The stack ends, for the decoder, with the words that the encoder popped before it had pushed any:
they are the plain stream, and what follows that is random words that everybody knows."""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fastddpm import _native
from fastddpm.codec import bits_back, plain
from fastddpm.codec.bits_back import Network, OnStep
from fastddpm.codec.grid import Grids

PIXELS = 2**26  # of a group or a batch, at the most: what is in memory at a time
LARGEST_BATCH = 4096
SAFETY = 1.03  # of what a batch is expected to take from the stack


class Cursor:
    """Reads a payload; ValueError at its end."""

    def __init__(self, content: bytes):
        self._content, self._at = content, 0

    def take(self, size: int) -> bytes:
        if size > self.left:
            raise ValueError(f"a group ends early: {size:,} bytes are missing or were cut off")
        self._at += size
        return self._content[self._at - size : self._at]

    def integer(self, most: int, what: str) -> int:
        value = shift = 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            shift += 7
            if value > most or shift > 63:
                raise ValueError(f"a group has more {what} than the {most:,} that it can have")
            if byte < 128:
                return value

    @property
    def left(self) -> int:
        return len(self._content) - self._at


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def images_of_a_group(dims: int) -> int:
    return max(1, PIXELS // dims)


def encode(
    images: torch.Tensor, grids: Grids, network: Network, most: int, on_step: OnStep
) -> tuple[bytes, int, float]:
    """The payload of images (N, C, H, W) uint8, how many of them are coded plainly, and the bits of
    the others; most: images of a batch."""
    native: Any = _native.C
    n, dims = len(images), math.prod(images.shape[1:])
    first, supply = _plain_part(images, grids.bits_in_flight * dims)
    on_step(first * grids.T)
    sizes: list[int] = []
    coder = native.codec.Coder(supply + b"\0" * (len(supply) % 2))
    need, at = grids.bits_in_flight * dims, first
    on_stack = 8.0 * len(supply)
    while at < n:
        size = max(1, min(most, n - at, int(on_stack / need)))
        before = coder.bits
        coder.lowest()
        batch = images[at : at + size].contiguous()
        bits_back.encode(coder, grids, network, batch, on_step)
        # The first batch says how much a batch really takes, those after it how that varies.
        taken = SAFETY * (before - coder.lowest()) / size
        need = max(need, taken) if sizes else taken
        on_stack = coder.bits + 8.0 * len(supply)
        sizes.append(size)
        at += size
    state, words = coder.content()
    popped = coder.taken if sizes else 0
    head = [n, first, len(sizes), *sizes, len(supply), popped]
    checksums = bytes(_checksums(images))
    payload = b"".join((
        *map(_varint, head),
        supply[2 * popped :],
        *([struct.pack("<Q", state), _varint(len(words)), words] if sizes else []),
        checksums,
        hashlib.sha256(images.contiguous().numpy().data).digest()[:16],
    ))  # fmt: skip
    return payload, first, coder.bits


def _plain_part(images: torch.Tensor, need: float) -> tuple[int, bytes]:
    """How many images have to be coded plainly for `need` bits, and their stream."""
    for count in range(1, len(images) + 1):
        stream = plain.encode(images[:count])
        if 8 * len(stream) >= need:
            break
    return count, stream


def decode(
    payload: bytes,
    shape: tuple[int, int, int],
    grids: Grids,
    network: Callable[[], Network],
    on_step: OnStep,
) -> torch.Tensor:
    """The images of a payload; network: makes it, where it is needed. ValueError names what is
    damaged: no image is returned that is not the encoder's."""
    native: Any = _native.C
    dims = math.prod(shape)
    cursor = Cursor(payload)
    n = cursor.integer(images_of_a_group(dims), "images")
    first = cursor.integer(n, "plain images")
    batches = cursor.integer(n, "batches")
    sizes = [cursor.integer(min(n, LARGEST_BATCH), "images in a batch") for _ in range(batches)]
    if (
        n == 0
        or first + sum(sizes) != n
        or 0 in sizes
        or max(sizes, default=1) * dims > max(PIXELS, dims)
    ):
        raise ValueError("a group's batches are not its images: it is damaged")
    length = cursor.integer(9 * n * dims + 64, "bytes of plain images")
    popped = cursor.integer(2**40, "words")
    images = torch.empty((n, *shape), dtype=torch.uint8, device="cpu")
    rest = cursor.take(max(0, length - 2 * popped))
    if sizes:
        state = struct.unpack("<Q", cursor.take(8))[0]
        words = cursor.take(cursor.integer(cursor.left, "bytes"))
    checksums, digest = cursor.take(-(-n * _width(dims) // 8)), cursor.take(16)
    if cursor.left:
        raise ValueError(f"a group has {cursor.left:,} bytes behind its end: it is damaged")
    stream = rest
    if sizes:
        coder = _undamaged(native.codec.Coder, state, words)
        run, at = network(), n
        for size in reversed(sizes):
            images[at - size : at] = _undamaged(
                bits_back.decode, coder, grids, run, (size, *shape), on_step
            )
            at -= size
        state, words = coder.content()
        stream = _supplied(state, words, popped, length) + rest
    images[:first] = plain.decode(stream, (first, *shape)) if first else images[:0]
    on_step(first * grids.T)
    _check_pixels(images, checksums, digest)
    return images


def _undamaged(call: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except (ValueError, FloatingPointError) as error:
        raise ValueError(f"the coded images are damaged: {error}") from None


def _supplied(state: int, words: bytes, popped: int, length: int) -> bytes:
    """What the encoder popped of the plain stream's `length` bytes, of what a decoder is left with;
    ValueError where that is not where an encoder begins."""
    native: Any = _native.C
    first = struct.pack("<3H", state >> 32 & 0xFFFF, state >> 16 & 0xFFFF, state & 0xFFFF)
    supply = first + np.frombuffer(words, "<u2")[::-1].tobytes()
    even = length + length % 2
    begun = state >> 48 == 1 and len(supply) == 2 * popped
    if begun and supply[length:even] == b"\0" * len(supply[length:even]):
        random = supply[even:]
        if random == native.codec.random_words(len(random) // 2):
            return supply[:length]
    raise ValueError(
        "the coded images are damaged: the stack does not end as it began, and what was decoded is "
        "not what was coded"
    )


# ---- checksums -----------------------------------------------------------------------------------


def _width(dims: int) -> int:
    """Bits of an image's checksum: at most 0.006 a dimension, and 4 at the least."""
    return next(width for width in (32, 16, 8, 4) if width <= 0.006 * dims or width == 4)


def _checksum(image: torch.Tensor) -> int:
    return zlib.crc32(image.contiguous().numpy().data)


def _checksums(images: torch.Tensor) -> bytes:
    width = _width(math.prod(images.shape[1:]))
    values = [_checksum(image) & (1 << width) - 1 for image in images]
    if width >= 8:
        return b"".join(value.to_bytes(width // 8, "little") for value in values)
    values += [0] * (len(values) % 2)
    return bytes(low | high << 4 for low, high in zip(values[::2], values[1::2], strict=True))


def _check_pixels(images: torch.Tensor, checksums: bytes, digest: bytes) -> None:
    if hashlib.sha256(images.numpy().data).digest()[:16] == digest and (
        _checksums(images) == checksums
    ):
        return
    mine, width = _checksums(images), _width(math.prod(images.shape[1:]))
    wrong = [k for k in range(len(images)) if _bits(mine, k, width) != _bits(checksums, k, width)]
    named = f"image {wrong[0]} of the group is the first of {len(wrong)}" if wrong else "any may be"
    raise ValueError(
        f"the coded images are damaged: the pixels are not those that were coded ({named})"
    )


def _bits(packed: bytes, k: int, width: int) -> int:
    if width >= 8:
        return int.from_bytes(packed[k * width // 8 : (k + 1) * width // 8], "little")
    return packed[k // 2] >> 4 * (k % 2) & 15
