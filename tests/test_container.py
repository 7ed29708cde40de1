"""The file of coded images: what it says, and that no cut, flip or lie in it gives wrong pixels."""

from __future__ import annotations

import io
import json
import random
import struct
import zlib

import pytest
import torch
from test_codec import MODEL, QUIET, smooth
from toy import images, tiny_unet

from fastddpm import _native
from fastddpm.codec import compress, decompress
from fastddpm.codec.container import SIGNATURE, Reader

pytestmark = pytest.mark.skipif(_native.C is None, reason="the codec needs the native module")


@pytest.fixture(scope="module")
def data() -> bytes:
    return compress(MODEL, smooth(9), **QUIET)


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    found, at = [], len(SIGNATURE)
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        found.append((kind, data[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def joined(parts: list[tuple[bytes, bytes]]) -> bytes:
    """A file of these chunks, its checksums right."""
    body = [
        struct.pack(">I", len(payload)) + kind + payload
        + struct.pack(">I", zlib.crc32(kind + payload))
        for kind, payload in parts
    ]  # fmt: skip
    return SIGNATURE + b"".join(body)


def with_head(data: bytes, **changes) -> bytes:
    (kind, payload), *rest = chunks(data)
    head = {**json.loads(payload), **changes}
    head = {key: value for key, value in head.items() if value is not ...}
    return joined([(kind, json.dumps(head).encode()), *rest])


def refused(data: bytes, model=MODEL) -> str:
    with pytest.raises(ValueError) as error:
        decompress(model, data, **QUIET)
    said = str(error.value)
    assert "\n" not in said
    assert len(said) < 400
    return said


def test_the_layout_is_the_documented_one(data):
    assert data[:8] == bytes.fromhex("8944504D0D0A1A0A")
    assert [kind for kind, _ in chunks(data)] == [b"HEAD", b"GRUP", b"DONE"]
    head = json.loads(chunks(data)[0][1])
    assert head["images"] == 9
    assert head["shape"] == [1, 8, 8]
    assert head["steps"] == 12
    assert head["version"] == 1
    assert head["arithmetic"]["precision"] == "fp32"
    assert joined(chunks(data)) == data


def test_a_cut_file_is_named_at_every_length(data):
    for length in (*range(60), *range(60, len(data), 3)):
        said = refused(data[:length])
        assert "cut off" in said
        assert "the data" in said


def test_every_flipped_byte_is_noticed(data):
    for at in (*range(60), *range(60, len(data), 3)):
        damaged = bytearray(data)
        damaged[at] ^= 1 << at % 8
        refused(bytes(damaged))


def test_what_follows_the_end_is_noticed(data):
    assert "follow its end" in refused(data + b"\0")
    assert "follow its end" in refused(data + data)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"version": 2}, "version 2"),
        ({"version": True}, "version"),
        ({"kind": "progressive"}, "kind"),
        ({"images": 10}, "HEAD says 10 images"),
        ({"images": 8}, "HEAD says 8 images"),
        ({"images": -1}, "'images' is -1"),
        ({"images": ...}, "'images' is None"),
        ({"shape": [1, 8]}, "'shape'"),
        ({"shape": [1, 2**20, 2**20]}, "'shape'"),
        ({"shape": [1, 8, 10]}, ""),
        ({"steps": 4}, "tables"),
        ({"steps": 10**6}, "steps"),
        ({"steps": [3, 1]}, "tables"),
        ({"steps": [2**31]}, "steps"),
        ({"steps": "x"}, "'steps'"),
        ({"tables": "0" * 12}, "tables"),
        ({"model": "0" * 16}, "another model"),
        ({"arithmetic": {"precision": "exact"}}, "'exact'"),
        ({"arithmetic": {"precision": "fp32"}}, "arithmetic"),
        ({"arithmetic": 3}, "'arithmetic'"),
        ({"torch": None}, "'torch'"),
        ({"more": 1}, "unknown entry 'more'"),
    ],
)
def test_what_the_head_says_is_checked(data, changes, what):
    assert what in refused(with_head(data, **changes))


@pytest.mark.parametrize("head", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b"1"])
def test_a_head_has_to_be_an_object(data, head):
    assert "HEAD" in refused(joined([(b"HEAD", head), *chunks(data)[1:]]))


def test_chunks_have_to_come_in_order(data):
    head, images, done = chunks(data)
    assert "begins with" in refused(joined([images, head, done]))
    assert "second HEAD" in refused(joined([head, head, images, done]))
    assert "more" in refused(joined([head, images, images, done]))
    assert "hold 0" in refused(joined([head, done]))
    assert "follow its end" in refused(joined([head, images, (b"DONE", b"x")]))
    assert "cut off" in refused(joined([head, images]))
    assert "may not skip" in refused(joined([head, (b"NEWS", b""), images, done]))
    assert "kind" in refused(joined([head, (b"NE.S", b""), images, done]))
    more = joined([head, (b"note", b"what a later version says"), images, done])
    assert torch.equal(decompress(MODEL, more, **QUIET), smooth(9))


@pytest.mark.parametrize("foreign", [b"", b"\x89PNG\r\n\x1a\n" + bytes(100), b"PK\3\4" * 50])
def test_other_files_are_named(foreign):
    assert "cut off" in (said := refused(foreign)) or "no file of coded images" in said


def test_a_stream_is_read_from_where_it_stands(data):
    file = io.BytesIO(b"before" + data)
    file.seek(6)
    assert Reader(file, "the stream").head.images == 9


def said_or_found(data: bytes, model, x: torch.Tensor) -> bool:
    """Whether decoding ends in one line, or in the very images: some bits stand for nothing."""
    try:
        return torch.equal(decompress(model, data, **QUIET), x)
    except ValueError as error:
        return "\n" not in str(error)


def test_a_flip_behind_right_checksums_gives_no_other_pixels():
    model, x = tiny_unet(), images(4, 1, 8, 8)
    head, (kind, payload), done = chunks(compress(model, x, steps=2, **QUIET))
    for at in range(0, len(payload), 4):
        damaged = bytearray(payload)
        damaged[at] ^= 1 << at % 8
        assert said_or_found(joined([head, (kind, bytes(damaged)), done]), model, x)


@pytest.mark.slow
def test_ten_thousand_mutated_files():
    """Cut, flipped, spliced and lied to, half of them with right checksums: none gives an image
    that is not the encoder's, and none ends otherwise than in one line."""
    model = tiny_unet(channels=4, channel_mult=(1,), attention_levels=(), num_groups=2)
    x = images(5, 1, 8, 8)
    whole = compress(model, x, steps=3, **QUIET)
    draw = random.Random(0)
    for k in range(10_000):
        parts = chunks(whole)
        if k % 2:
            at = draw.choice([0, 1, 1, 1])
            parts[at] = (parts[at][0], mutated(parts[at][1], draw))
            data = joined(parts)
        else:
            data = mutated(whole, draw)
        assert said_or_found(data, model, x)


def mutated(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 5])):
        at, kind = draw.randrange(len(changed) + 1), draw.randrange(5)
        size = draw.choice([1, 2, 4, 8, 100])
        if kind == 0:
            del changed[at : at + size]
        elif kind == 1:
            changed[at:at] = draw.randbytes(size)
        elif kind == 2:
            changed[at : at + size] = bytes([draw.choice([0, 255])]) * size
        elif kind == 3 and at < len(changed):
            changed[at] ^= 1 << draw.randrange(8)
        else:
            other = draw.randrange(len(content))
            changed[at : at + size] = content[other : other + size]
        if not changed:
            break
    return bytes(changed)
