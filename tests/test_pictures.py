"""Pictures as they come: what counts as one, what its numbers mean, a folder's colour and alpha."""

from __future__ import annotations

import itertools
import warnings
import zlib

import numpy as np
import pytest
import torch
from image_files import (
    encoded,
    everything,
    fails,
    nchw,
    pixels,
    png,
    tiff,
    write,
    write_zip,
)
from PIL import Image

from fastddpm.data import decode_image, open_dataset
from fastddpm.data.decode import DECODERS, EXTENSIONS


def decoded(content: bytes, **options) -> np.ndarray:
    """(H, W) or (H, W, C)."""
    image = decode_image(content, "x", **options).numpy()
    return image[0] if len(image) == 1 else image.transpose(1, 2, 0)


def refused(content: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=f"x can't be read as an image: .*{reason}"):
        decode_image(content, "x")


# ---- names ---------------------------------------------------------------------------------------


def test_every_suffix_of_what_is_decoded_is_an_image():
    Image.init()
    suffixes = {name for name, form in Image.registered_extensions().items() if form in DECODERS}
    assert suffixes == set(EXTENSIONS)


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_no_picture_is_left_out_without_a_word(tmp_path, form):
    x = pixels(4, 6, 6, 3)
    files = {
        "a.jfif": encoded(x[0], "JPEG"), "b.jpe": encoded(x[1], "JPEG"), "c.png": encoded(x[2]),
        "d.dib": encoded(x[3], "DIB"), "e.avif": b"x", "f.JP2": b"x", "g.heic": b"x",
        "labels.txt": b"x", "more.txt": b"x", "README": b"x", ".hidden": b"x", "a/.b/c.txt": b"x",
    }  # fmt: skip
    path = (
        write(tmp_path / "x", files) if form == "folder" else write_zip(tmp_path / "x.zip", files)
    )
    with pytest.warns(
        UserWarning, match=r"3 of 7 can't be used .* e.avif \(.avif is not read here"
    ):
        dataset = open_dataset(path)
    assert [name for name, _ in dataset.skipped] == ["e.avif", "f.JP2", "g.heic"]
    assert dataset.describe() == (
        f"4 images 3x6x6, {form}, 3 other files (2 .txt, 1 no suffix), 3 skipped"
    )
    assert np.array_equal(dataset.images([2, 3]), nchw(x[2:]))


def test_other_files_are_counted_where_there_is_no_image(tmp_path):
    write(tmp_path, {"a": b"", "b": b"", "c.txt": b""})
    fails(tmp_path, r"holds no images \(.*\), 3 other files \(2 no suffix, 1 .txt\)")
    write(tmp_path, {"a.avif": b""})
    fails(tmp_path, r"none of 1 images can be decoded: a.avif \(.avif is not read here\)")


# ---- PNG's chunks --------------------------------------------------------------------------------


def with_chunk(kind: bytes, content: bytes, checksum: int = 0) -> tuple[np.ndarray, bytes]:
    """Pixels, and their PNG with a chunk whose checksum is off by `checksum`."""
    x = pixels(5, 6)
    whole = bytearray(png(8, 0, [row.tobytes() for row in x], (kind, content)))
    at = whole.index(kind) + 4 + len(content)
    whole[at] ^= checksum
    return x, bytes(whole)


@pytest.mark.parametrize("checksum", [0, 1], ids=["content", "checksum"])
@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (b"eXIf", b"no EXIF"),
        (b"eXIf", b"MM\0*\0\0\0\x08\xff\xff" + bytes(range(200))),
        (b"eXIf", b""),
        (b"zTXt", b"Raw profile type exif\0\0damaged"),
        (b"tEXt", b"Raw profile type exif\0\n\n\nzz"),
        (b"prIv", b"text"),
        *((kind, b"") for kind in (b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"acTL", b"fcTL")),
        *((kind, b"\xff\xfe\0\1garb") for kind in (b"iCCP", b"zTXt", b"pHYs", b"cHRM", b"fcTL")),
        (b"zTXt", b"a\0\0" + zlib.compress(bytes(4 << 20))),  # a bomb
    ],
)
def test_pixels_do_not_depend_on_a_damaged_extra(kind, content, checksum):
    x, whole = with_chunk(kind, content, checksum)
    assert np.array_equal(decoded(whole), x)


def test_an_orientation_counts_when_its_checksum_is_right():
    exif = Image.Exif()
    exif[0x0112] = 6
    x, whole = with_chunk(b"eXIf", exif.tobytes()[6:])
    assert np.array_equal(decoded(whole), np.rot90(x, -1))
    x, whole = with_chunk(b"eXIf", exif.tobytes()[6:], 1)
    assert np.array_equal(decoded(whole), x)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    x = pixels(4, 6)
    turned = {
        1: x, 2: x[:, ::-1], 3: x[::-1, ::-1], 4: x[::-1], 5: x.T, 6: np.rot90(x, -1),
        7: x[::-1, ::-1].T, 8: np.rot90(x),
    }[orientation]  # fmt: skip
    assert np.array_equal(decoded(encoded(x, exif=exif)), turned)


def test_damage_that_pixels_depend_on(tmp_path):
    _, whole = with_chunk(b"tRNS", b"\0\7", 1)
    refused(whole, "the checksum of its 'tRNS' chunk is wrong")
    whole = encoded(pixels(20, 20, 3))
    refused(whole[:-12], "truncated in or before its 'IEND' chunk")
    start, stop = whole.index(b"IDAT") + 4, whole.index(b"IEND") - 8
    for at in range(start, stop, 7):
        flipped = bytearray(whole)
        flipped[at] ^= 4
        refused(bytes(flipped), "the checksum of its 'IDAT' chunk is wrong")
    assert np.array_equal(decoded(whole + b"behind its end"), decoded(whole))


# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int16, np.int8, np.float32])
@pytest.mark.parametrize("top", [1, 120])
def test_numbers_of_unknown_range_are_refused(dtype, top):
    x = (np.arange(20).reshape(4, 5) % (top + 1)).astype(dtype)
    kind = {"i": 2, "u": 1, "f": 3}[np.dtype(dtype).kind]
    word = {"i": "signed", "u": "32 bits", "f": "floating-point"}[np.dtype(dtype).kind]
    refused(tiff(x, x.itemsize * 8, False, kind), f"{word}.*, whose range is unknown")


def test_signed_colours_are_refused():
    x = pixels(4, 5, 3)
    assert np.array_equal(decoded(tiff(x, 8, False, 1)), x)
    refused(tiff(x, 8, False, 2), "(signed|a kind that Pillow does not read)")
    for kind in ("TIFF", "PPM"):
        image = Image.fromarray(np.ones((4, 4), np.float32))
        refused(encoded(image, kind), "floating-point pixels, whose range is unknown")


@pytest.mark.parametrize("white_is_zero", [False, True])
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_tiff_grey_of_any_bits(bits, white_is_zero):
    top = 2**bits - 1
    x = np.linspace(0, top, 24).round().reshape(4, 6).astype(np.uint8 if bits == 8 else np.uint16)
    expected = np.round(x.astype(float) * 255 / top)
    if white_is_zero:
        expected = 255 - expected
    content = tiff(x, bits, white_is_zero, 1)
    if (bits, white_is_zero) == (12, True):
        refused(content, "of a kind that Pillow does not read")
    else:
        assert np.array_equal(decoded(content), expected)
        assert np.array_equal(decoded(content, channels=3), np.stack([expected] * 3, 2))


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate"])
def test_sixteen_bits_by_pillow(compression):
    x = np.linspace(0, 65535, 24).round().reshape(4, 6).astype(np.uint16)
    expected = np.round(x / 257)
    for photometric, right in ((1, expected), (0, 255 - expected)):
        tags = {262: photometric}
        content = encoded(x, "TIFF", tiffinfo=tags, compression=compression)
        assert np.array_equal(decoded(content), right)
    for kind in ("PNG", "PPM"):
        assert np.array_equal(decoded(encoded(x, kind)), expected)


def test_tiles_are_bounded_like_pictures(monkeypatch):
    content = bytearray(tiff(pixels(4, 5), 8, False, 1))
    at = content.index(struct_entry(278))  # rows a strip becomes a tile's width, and so on
    content[at : at + 2] = (322).to_bytes(2, "little")
    content[at + 8 : at + 12] = (100_000_000).to_bytes(4, "little")
    refused(bytes(content), "100,000,000 pixels, more than the 89,478,485")


def struct_entry(tag: int) -> bytes:
    return tag.to_bytes(2, "little") + (4).to_bytes(2, "little") + (1).to_bytes(4, "little")


@pytest.mark.parametrize("depth", [2, 4, 8])
def test_transparent_grey_of_few_bits(depth):
    row = bytes([0b00011011] * (depth // 2 + 2))
    values = decoded(png(depth, 0, [row]))
    for key in {2, 3, 0b0001, 0b1011, 27} & set(range(2**depth)):
        shown = key * 255 // (2**depth - 1)
        expected = np.where(values == shown, 255, values)
        content = png(depth, 0, [row], (b"tRNS", key.to_bytes(2, "big")))
        assert np.array_equal(decoded(content), expected)


def test_colours_of_sixteen_bits():
    x = (pixels(3, 4, 3).astype(np.uint16) << 8) + pixels(3, 4, 3)
    rows = [row.astype(">u2").tobytes() for row in x]
    assert np.array_equal(decoded(png(16, 2, rows)), x >> 8)
    refused(png(16, 2, rows, (b"tRNS", b"123456")), "a transparent colour of 16 bits")
    grey = np.stack([x[..., 0], np.full((3, 4), 65535, np.uint16)], 2)
    content = png(16, 4, [row.astype(">u2").tobytes() for row in grey])
    assert np.array_equal(decoded(content), x[..., 0] >> 8)


# ---- folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", sorted(set(itertools.permutations("ggcc"))), ids="".join)
@pytest.mark.parametrize("memory_limit", [1 << 20, 4 * 30, 0], ids=["kept", "grown", "lazy"])
def test_one_colour_makes_all_colours(tmp_path, order, memory_limit):
    x = [pixels(5, 6) if kind == "g" else pixels(5, 6, 3) for kind in order]
    write(tmp_path, {f"{k}.png": encoded(image) for k, image in enumerate(x)})
    expected = np.stack([np.stack([i] * 3, 2) if i.ndim == 2 else i for i in x])
    with pytest.warns(UserWarning, match="2 of 4 are grey and are read as colours") as record:
        dataset = open_dataset(tmp_path, memory_limit=memory_limit)
    assert len(record) == 1
    assert torch.equal(everything(dataset), nchw(expected))
    resized = [
        open_dataset(tmp_path, size=(3, 4), channels=3, memory_limit=m) for m in (0, 1 << 20)
    ]
    with pytest.warns(UserWarning, match="grey"):
        mixed = open_dataset(tmp_path, size=(3, 4), memory_limit=memory_limit)
    for dataset in resized:
        assert torch.equal(everything(dataset), everything(mixed))


def test_all_grey_stays_grey_in_silence(tmp_path):
    x = pixels(3, 5, 6)
    write(tmp_path, {f"{k}.png": encoded(image) for k, image in enumerate(x)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(everything(open_dataset(tmp_path)), nchw(x))


def test_transparency_is_said(tmp_path):
    x = pixels(3, 5, 6, 4)
    x[0, ..., 3] = 255
    x[1:, 0, 0, 3] = 0
    write(tmp_path, {f"{k}.png": encoded(image) for k, image in enumerate(x)})
    with pytest.warns(UserWarning, match="2 of 3 are transparent and are put onto white") as record:
        dataset = open_dataset(tmp_path)
    assert len(record) == 1
    assert dataset.shape == (3, 5, 6)
    assert torch.equal(dataset.images([0])[0], torch.from_numpy(x[0, ..., :3]).permute(2, 0, 1))
    assert (dataset.images([1, 2])[..., 0, 0] == 255).all()
