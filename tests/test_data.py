"""The datasets: every format, mode and damage, the resize rule, and the batches of a step."""

from __future__ import annotations

import gzip
import os
import pickle
import random
import warnings
import zipfile
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from image_files import (
    cifar_batch,
    encoded,
    everything,
    fails,
    idx,
    nchw,
    pixels,
    rng,
    write,
    write_lmdb,
    write_tar,
    write_zip,
)
from PIL import Image

from fastddpm.data import batch_indices, decode_image, lmdb_source, open_dataset, sources

WRITERS = {
    "folder": lambda base, files: write(base / "images", files),
    "zip": lambda base, files: write_zip(base / "images.zip", files),
    "lmdb": lambda base, files: write_lmdb(base / "images", files),
}


@pytest.fixture(params=WRITERS)
def write_images(request, tmp_path):
    """Writes {name: encoded image} as a folder, a zip or an lmdb database; returns its path."""
    return lambda files: WRITERS[request.param](tmp_path, files)


# Encoded images, wherever they lie


def test_images_in_natural_order(write_images):
    x = pixels(12, 8, 6, 3)
    shuffled = rng.permutation(12)
    path = write_images({f"img{k:02d}.png": encoded(x[k]) for k in shuffled})
    dataset = open_dataset(path)
    assert len(dataset) == 12
    assert dataset.shape == (3, 8, 6)
    assert dataset.skipped == []
    assert torch.equal(everything(dataset), nchw(x))
    assert dataset.describe() == f"12 images 3x8x6, {dataset.kind}"


def test_lazy_equals_in_memory(write_images):
    x = pixels(9, 40, 30, 3)
    path = write_images({f"{k}.png": encoded(x[k]) for k in range(9)})
    in_memory = open_dataset(path, size=(16, 20))
    lazy = open_dataset(path, size=(16, 20), memory_limit=9 * 3 * 16 * 20 - 1)
    assert type(in_memory) is not type(lazy)
    indices = [8, 0, 0, 3, 5]
    images = lazy.images(indices)
    assert images.dtype == torch.uint8
    assert images.is_contiguous()
    assert torch.equal(images, in_memory.images(indices))
    assert torch.equal(pickle.loads(pickle.dumps(lazy)).images(indices), images)


def test_in_memory_never_reads_again(write_images):
    x = pixels(3, 5, 5)
    path = write_images({f"{k}.png": encoded(x[k]) for k in range(3)})
    dataset = open_dataset(path)
    for file in [path, *path.glob("*")]:
        if file.is_file():
            file.unlink()
    assert torch.equal(everything(dataset), nchw(x))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_lazy_after_fork(write_images):
    x = pixels(20, 16, 16, 3)
    path = write_images({f"{k:02d}.png": encoded(x[k]) for k in range(20)})
    dataset = open_dataset(path, memory_limit=0)
    child = os.fork()
    wrong = any(not torch.equal(everything(dataset), nchw(x)) for _ in range(5))
    if child == 0:
        os._exit(wrong)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not wrong


def damaged_files() -> dict[str, tuple[bytes, str]]:
    """Name -> (content, a part of the reason for skipping it)."""
    noise = random.Random(0).randbytes(3000)
    jpeg, png = encoded(pixels(64, 64, 3), "JPEG"), encoded(pixels(64, 64, 3))
    return {
        "cut.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "cut.png": (png[: len(png) // 2], "truncated"),
        "empty.png": (b"", "0 bytes"),
        "float.tif": (encoded(np.ones((64, 64), np.float32), "TIFF"), "floating-point"),
        "header.gif": (b"GIF89a", "none of"),
        "lines.png": (b"no\nimage\n" * 9, "none of"),
        "noise.webp": (noise, "none of"),
        "page.eps": (encoded(pixels(64, 64, 3), "EPS"), "none of"),
    }


def test_damaged_files_are_skipped(write_images):
    x = pixels(2, 64, 64, 3)
    bad = {name: content for name, (content, _) in damaged_files().items()}
    files = {"a.png": encoded(x[0]), "z.png": encoded(x[1]), **bad}
    path = write_images(files)
    with pytest.warns(UserWarning, match="can't be used and are skipped: ") as record:
        dataset = open_dataset(path)
    assert len(record) == 1
    assert "\n" not in str(record[0].message)
    assert "..." in str(record[0].message)
    assert torch.equal(everything(dataset), nchw(x))
    # An .eps is no image by its name; lmdb's values have none.
    expected = set(bad) if dataset.kind == "lmdb" else set(bad) - {"page.eps"}
    assert {name for name, _ in dataset.skipped} == expected
    for name, reason in dataset.skipped:
        assert damaged_files()[Path(name).name][1] in reason
    assert dataset.describe().endswith(f"{len(expected)} skipped")


def test_all_damaged(write_images):
    path = write_images({"a.png": b"x", "b.jpg": b"y"})
    fails(path, r"none of 2 images can be decoded: a.png \(none of .*\), b.jpg")


def test_decompression_bomb_is_skipped(write_images, monkeypatch):
    x = pixels(6, 6)
    path = write_images({"bomb.png": encoded(pixels(90, 90)), "good.png": encoded(x)})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.warns(UserWarning, match="decompression bomb"):
        dataset = open_dataset(path)
    assert torch.equal(everything(dataset), nchw(x[None]))


def test_encoded_file_too_long_is_skipped(tmp_path, monkeypatch):
    files = {"a.png": encoded(pixels(50, 50, 3)), "b.png": encoded(pixels(4, 4, 3))}
    monkeypatch.setattr(sources, "ENCODED_LIMIT", 1000)
    for path in (write(tmp_path / "folder", files), write_zip(tmp_path / "x.zip", files)):
        with pytest.warns(UserWarning, match=r"a.png \([0-9,]+ bytes, more than 1,000\)"):
            assert len(open_dataset(path)) == 1


def test_differing_sizes(write_images):
    path = write_images({"a.png": encoded(pixels(8, 6)), "b.png": encoded(pixels(8, 7))})
    fails(path, "a.png is 8x6, b.png is 8x7: pass size")
    assert open_dataset(path, size=4).shape == (1, 4, 4)
    assert open_dataset(path, size=(4, 2)).shape == (1, 4, 2)


@pytest.mark.parametrize(
    ("size", "channels", "split", "match"),
    [
        (0, None, "train", "size must be a positive integer"),
        (-3, None, "train", "size must be"),
        ((4, 0), None, "train", "size must be"),
        ((4, 4, 4), None, "train", "size must be"),
        (4.0, None, "train", "size must be"),
        ("44", None, "train", "size must be"),
        (10**11, None, "train", r"size must be of at most [\d,]+ pixels"),
        ((1, 10**9), None, "train", r"size must be of at most [\d,]+ pixels"),
        (True, None, "train", "size must be"),
        (4, 0, "train", "channels must be"),
        (4, 5, "train", "channels must be"),
        (4, True, "train", "channels must be an integer; got True"),
        (4, 1.0, "train", "channels must be an integer"),
        (4, 2, "train", "channels must be None, 1 or 3 for encoded images"),
        (4, None, "valid", "split must be one of train, test"),
        (4, None, "test", "has no splits"),
    ],
)
def test_options(tmp_path, size, channels, split, match):
    write(tmp_path, {"a.png": encoded(pixels(4, 4))})
    fails(tmp_path, match, size=size, channels=channels, split=split)
    fails(tmp_path, "memory_limit must be at least 0 bytes; got", memory_limit="1 GB")


def test_channels_of_grey_and_colour(tmp_path):
    grey, colour = pixels(5, 5), pixels(5, 5, 3)
    write(tmp_path / "grey", {"1.png": encoded(grey), "2.png": encoded(colour)})
    write(tmp_path / "colour", {"1.png": encoded(colour), "2.png": encoded(grey)})
    for name in ("grey", "colour"):  # whichever comes first
        with pytest.warns(UserWarning, match="1 of 2 are grey and are read as colours") as record:
            assert open_dataset(tmp_path / name).shape == (3, 5, 5)
        assert len(record) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what was asked for is no surprise
            assert open_dataset(tmp_path / name, channels=3).shape == (3, 5, 5)
            assert open_dataset(tmp_path / name, channels=1).shape == (1, 5, 5)
    luma = open_dataset(tmp_path / "colour", channels=1).images([0, 1])
    assert torch.equal(luma[1, 0], torch.from_numpy(grey))
    expected = colour.astype(float) @ (0.299, 0.587, 0.114)
    assert np.abs(luma[0, 0].numpy() - expected).max() <= 1


def test_progress_bar_only_when_slow(tmp_path, monkeypatch, capsys):
    write(tmp_path, {f"{k}.png": encoded(pixels(4, 4)) for k in range(8)})
    open_dataset(tmp_path)
    assert capsys.readouterr().err == ""
    from fastddpm.data import scan

    bar = scan.tqdm
    monkeypatch.setattr(scan, "tqdm", lambda **options: bar(**{**options, "delay": 1e-9}))
    open_dataset(tmp_path)
    assert "checking images" in capsys.readouterr().err
    open_dataset(tmp_path, progress=False)
    assert capsys.readouterr().err == ""


# Folders


def test_folder_is_searched_in_natural_order(tmp_path):
    names = ["a/img2.png", "a/img10.PNG", "b/1/x.png", "b/x.png", "img1.png", "img02.png"]
    x = pixels(len(names), 4, 4)
    write(tmp_path, {name: encoded(x[k]) for k, name in reversed(list(enumerate(names)))})
    write(
        tmp_path, {"notes.txt": b"", ".hidden.png": b"", ".cache/x.png": b"", "a/._img2.png": b""}
    )
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(everything(open_dataset(tmp_path)), nchw(x))


def test_folder_follows_links(tmp_path):
    write(tmp_path / "elsewhere", {"x.png": encoded(pixels(4, 4))})
    write(tmp_path / "images", {"a.png": encoded(pixels(4, 4))})
    (tmp_path / "images" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images" / "b.png").symlink_to(tmp_path / "gone")
    with pytest.warns(UserWarning, match=r"b.png \(No such file or directory\)"):
        assert len(open_dataset(tmp_path / "images")) == 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes on this platform")
def test_folder_with_a_pipe(tmp_path):
    write(tmp_path, {"a.png": encoded(pixels(4, 4))})
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.warns(UserWarning, match=r"pipe.png \(not a regular file\)"):
        assert len(open_dataset(tmp_path)) == 1


def test_folder_that_can_not_be_listed(tmp_path, monkeypatch):
    write(tmp_path, {"a.png": encoded(pixels(4, 4)), "closed/b.png": encoded(pixels(4, 4))})
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.warns(UserWarning, match=r"1 of 2 can't be used .*closed \(Permission denied\)"):
        assert len(open_dataset(tmp_path)) == 1


def test_lost_file_is_replaced(tmp_path):
    x = pixels(5, 6, 6, 3)
    write(tmp_path, {f"{k}.png": encoded(x[k]) for k in range(5)})
    dataset = open_dataset(tmp_path, memory_limit=0)
    (tmp_path / "1.png").unlink()
    (tmp_path / "2.png").write_bytes(encoded(pixels(7, 7, 3)))
    (tmp_path / "4.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="1.png .* can't be read any more: the next") as record:
        images = dataset.images([0, 1, 2])
    assert len(record) == 1
    assert torch.equal(images, nchw(x)[[0, 3, 3]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(everything(dataset), nchw(x)[[0, 3, 3, 3, 0]])
    assert len(dataset) == 5
    assert [name for name, _ in dataset.skipped] == ["1.png", "2.png", "4.png"]
    for k in (0, 3):
        (tmp_path / f"{k}.png").unlink()
    with pytest.raises(OSError, match="none of its 5 images can be read any more"):
        dataset.images([0])


def test_no_images(tmp_path):
    fails(tmp_path, r"holds no images \(.*\.png.*\.webp\)")
    fails(tmp_path / "gone", "gone does not exist", FileNotFoundError)
    write(tmp_path, {"x.txt": b"", "x.png": encoded(pixels(4, 4)), "x.rar": b""})
    fails(tmp_path / "x.rar", "no format that is read here; give a folder.*idx.*npz.*lmdb")
    fails(tmp_path / "x.png", "no format that is read here")


# Zips


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_zip_methods(tmp_path, method):
    x = pixels(3, 8, 8, 3)
    files = {f"00000/img{k}.png": encoded(x[k]) for k in range(3)}
    files |= {"dataset.json": b"{}", "__MACOSX/._img1.png": b""}
    dataset = open_dataset(write_zip(tmp_path / "x.zip", files, method), memory_limit=0)
    assert torch.equal(everything(dataset), nchw(x))


def test_damaged_zips(tmp_path):
    x = pixels(8, 8, 3)
    content = write_zip(tmp_path / "x.zip", {"a.png": encoded(x), "b.png": encoded(x)}).read_bytes()
    for name, damaged in (("cut", content[: len(content) // 2]), ("empty", b""), ("text", b"x")):
        write(tmp_path, {f"{name}.zip": damaged})
        fails(tmp_path / f"{name}.zip", f"{name}.zip can't be read as a zip archive")
    flipped = bytearray(content)
    flipped[content.index(b"IDAT") + 20] ^= 255
    write(tmp_path, {"flipped.zip": bytes(flipped)})
    with pytest.warns(UserWarning, match=r"a.png \(Bad CRC-32"):
        assert len(open_dataset(tmp_path / "flipped.zip")) == 1
    fails(write_zip(tmp_path / "no.zip", {"x.txt": b""}), "no.zip holds no images")


# lmdb


def test_lmdb_values_of_any_key(tmp_path):
    x = pixels(3, 16, 16, 3)
    lmdb = pytest.importorskip("lmdb")
    environment = lmdb.open(str(tmp_path), map_size=1 << 20)
    with environment.begin(write=True) as transaction:
        for k, key in ((2, b"\xff\x00\n"), (0, b"\x00"), (1, b"a10")):
            transaction.put(key, encoded(x[k], "WEBP", lossless=True))
    environment.close()
    first, second = open_dataset(tmp_path, memory_limit=0), open_dataset(tmp_path, memory_limit=0)
    assert torch.equal(everything(first), nchw(x))
    del first
    assert torch.equal(everything(second), nchw(x))


def test_damaged_lmdb(tmp_path):
    folder = write_lmdb(tmp_path / "x", {f"{k}": encoded(pixels(64, 64, 3)) for k in range(9)})
    content = (folder / "data.mdb").read_bytes()
    for name, damaged, match in (
        ("cut", content[: len(content) // 2], "is truncated"),
        ("empty", b"", "is truncated: 0 bytes"),
        ("header", content[:100], "can't be read as an lmdb database"),
        ("text", b"text" * 5000, "can't be read as an lmdb database"),
    ):
        fails(write(tmp_path / name, {"data.mdb": damaged}), f"data.mdb {match}")
    fails(write_lmdb(tmp_path / "none", {}), "none holds no images")


def test_lmdb_missing(tmp_path, monkeypatch):
    folder = write_lmdb(tmp_path / "x", {"a": encoded(pixels(4, 4))})
    monkeypatch.setattr(lmdb_source, "lmdb", None)
    fails(folder, r"pip install 'fastddpm\[lmdb\]'", ImportError)


# One image: modes, orientation, resizing


def decoded(content: bytes, **options) -> np.ndarray:
    """(H, W) or (H, W, C)."""
    image = decode_image(content, "x", **options)
    assert image.dtype == torch.uint8
    assert image.is_contiguous()
    return image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()


GREY_MODES = {"1": "PNG", "L": "PNG", "LA": "PNG", "I;16": "PNG", "I;16B": "TIFF"}
COLOUR_MODES = {"P": "GIF", "RGB": "PNG", "RGBA": "WEBP", "CMYK": "JPEG", "YCbCr": "JPEG"}


@pytest.mark.parametrize(("mode", "fmt"), [*GREY_MODES.items(), *COLOUR_MODES.items()])
def test_modes(mode, fmt):
    content = encoded(Image.new(mode, (5, 4)), fmt, **({"lossless": True} if fmt == "WEBP" else {}))
    grey = mode in GREY_MODES
    assert decoded(content).shape == ((4, 5) if grey else (4, 5, 3))
    white = 255 if mode in ("LA", "RGBA", "CMYK") else 0  # transparent, or without ink
    for channels, shape in ((1, (4, 5)), (3, (4, 5, 3))):
        image = decoded(content, channels=channels)
        assert image.shape == shape
        if mode != "YCbCr":  # whose zeros are green
            assert (image == white).all()


def test_exact_values_of_modes():
    x, y = pixels(6, 7), pixels(6, 7, 3)
    bits = x > 127
    assert (decoded(encoded(Image.fromarray(bits))) == bits * 255).all()
    assert (decoded(encoded(x.astype(np.uint16) * 257)) == x).all()
    sixteen = np.array([[0, 128, 129, 385, 386, 65535]], np.uint16)
    assert decoded(encoded(sixteen)).tolist() == [[0, 0, 1, 1, 2, 255]]
    assert (decoded(encoded(x), channels=3) == x[:, :, None]).all()
    assert (decoded(encoded(np.stack([x] * 3, 2)), channels=1) == x).all()
    palette = Image.fromarray(y).quantize(16)
    assert (decoded(encoded(palette)) == np.array(palette.convert("RGB"))).all()
    for fmt in ("PNG", "BMP", "TIFF", "PPM"):
        assert (decoded(encoded(y, fmt)) == y).all()


def test_alpha_is_composited_onto_white():
    grey, alpha = pixels(9, 9), pixels(9, 9)
    alpha[0], alpha[1] = 0, 255
    expected = (grey * (alpha / 255.0) + 255 * (1 - alpha / 255.0)).round()
    la = encoded(np.stack((grey, alpha), 2))
    rgba = encoded(np.stack((grey, grey, grey, alpha), 2))
    for content in (la, rgba):
        for channels in (1, 3):
            image = decoded(content, channels=channels).astype(float)
            if channels == 3:
                assert (image == image[:, :, :1]).all()
                image = image[:, :, 0]
            assert np.abs(image - expected).max() <= 1
            assert (image[0] == 255).all()
            assert (image[1] == grey[1]).all()


def test_transparent_colour_is_white():
    x = np.array([[10, 20, 30]], np.uint8)
    assert decoded(encoded(x, transparency=20)).tolist() == [[10, 255, 30]]
    sixteen = encoded(x.astype(np.uint16) * 257, transparency=20 * 257)
    assert decoded(sixteen).tolist() == [[10, 255, 30]]
    palette = Image.fromarray(x).convert("P")
    assert decoded(encoded(palette, transparency=20), channels=1).tolist() == [[10, 255, 30]]


@pytest.mark.parametrize("fmt", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation(fmt):
    x = pixels(4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    options = {"lossless": True} if fmt == "WEBP" else {}
    assert (decoded(encoded(x, fmt, exif=exif, **options)) == np.rot90(x, -1)).all()


@hypothesis.given(
    st.integers(0, 255),
    st.integers(1, 70),
    st.integers(1, 70),
    st.integers(1, 40),
    st.integers(1, 40),
)
def test_constant_stays_constant(value, h, w, H, W):
    image = decoded(encoded(np.full((h, w), value, np.uint8)), size=(H, W))
    assert image.shape == (H, W)
    assert (image == value).all()


def test_resize_rule():
    x = pixels(8, 13)
    # No scaling: the middle 8 columns, the odd column lost on the right.
    assert (decoded(encoded(x), size=8) == x[:, 2:10]).all()
    assert (decoded(encoded(x.T.copy()), size=8) == x.T[2:10]).all()
    # Shrunk by whole factors: the mean of each block, of the middle 8 x 12.
    blocks = x[:, :12].reshape(2, 4, 3, 4).mean((1, 3))
    assert np.abs(decoded(encoded(x), size=(2, 3)) - blocks).max() <= 1
    assert decoded(encoded(np.array([[0, 100], [50, 250]], np.uint8)), size=1).tolist() == [[100]]
    # Enlarged: Pillow's bicubic filter.
    large = Image.fromarray(x[:, 2:10]).resize((20, 20), Image.Resampling.BICUBIC)
    assert (decoded(encoded(x), size=20) == np.array(large)).all()
    # A line: cropped to one pixel, at the centre.
    line = pixels(1, 9)
    assert (decoded(encoded(line), size=3) == line[0, 4]).all()
    assert (decoded(encoded(x)) == x).all()


def test_decode_image_names_the_file():
    with pytest.raises(ValueError, match=r"cat.png can't be read as an image: none of"):
        decode_image(b"text", "cat.png")
    with pytest.raises(ValueError, match=r"cat.png: channels must be None, 1 or 3; got 4"):
        decode_image(encoded(pixels(2, 2)), "cat.png", channels=4)


# idx


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gz"])
@pytest.mark.parametrize("separator", ["-", "."])
def test_idx(tmp_path, pack, separator):
    train, test = pixels(7, 5, 4), pixels(3, 5, 4)
    suffix = f"-images{separator}idx3-ubyte" + (".gz" if pack is gzip.compress else "")
    write(tmp_path, {f"train{suffix}": pack(idx(train)), f"t10k{suffix}": pack(idx(test))})
    write(tmp_path, {"train-labels-idx1-ubyte": idx(pixels(20), b"\0\0\x08\x01")})
    for path, split, expected in (
        (tmp_path, "train", train),
        (tmp_path, "test", test),
        (tmp_path / f"train{suffix}", "train", train),
        (tmp_path / f"t10k{suffix}", "train", test),
        (tmp_path / f"t10k{suffix}", "test", test),
    ):
        dataset = open_dataset(path, split=split)
        assert torch.equal(everything(dataset), nchw(expected))
    assert dataset.describe() == "3 images 1x5x4, idx"
    fails(tmp_path / f"train{suffix}", "is not a test split", split="test")
    (tmp_path / f"t10k{suffix}").unlink()
    fails(tmp_path, "holds no t10k-images-idx3-ubyte", FileNotFoundError, split="test")
    fails(
        tmp_path / "train-labels-idx1-ubyte", "starts with 00 00 08 01; idx images .* 00 00 08 03"
    )


def test_damaged_idx(tmp_path):
    good = idx(pixels(7, 5, 4))
    for name, content, match in (
        ("empty", b"", "is truncated: 0 bytes"),
        ("header", good[:9], "is truncated: 9 bytes"),
        ("cut", good[:-1], "is truncated: 139 bytes of pixels, 7x5x4"),
        ("long", good + b"x", "is too long: 141 bytes"),
        ("huge", b"\0\0\x08\x03" + b"\xff" * 12, "is truncated: 0 bytes of pixels"),
        ("none", idx(pixels(0, 5, 4)), "holds no images"),
        ("float", idx(pixels(7, 5, 4), b"\0\0\x0d\x03"), "starts with 00 00 0d 03"),
        ("cut_gz", gzip.compress(good)[:-30], "can't be read as a gzip file"),
        ("bad_gz", b"\x1f\x8b" + good, "can't be read as a gzip file"),
    ):
        path = tmp_path / f"{name}-idx3-ubyte"
        path.write_bytes(content)
        fails(path, f"{name}-idx3-ubyte {match}")


# NumPy


@pytest.mark.parametrize("memory_limit", [0, 1 << 20], ids=["stored", "read"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_layouts(tmp_path, memory_limit, order):
    path = tmp_path / "x.npy"
    for shape in ((6, 5, 9), (6, 5, 9, 1), (6, 5, 9, 3), (6, 5, 9, 4)):
        x = pixels(*shape)
        np.save(path, np.asarray(x, order=order))
        assert torch.equal(everything(open_dataset(path, memory_limit=memory_limit)), nchw(x))
        if x.ndim == 4:
            np.save(path, np.asarray(nchw(x).numpy(), order=order))
            dataset = open_dataset(path, memory_limit=memory_limit)
            assert torch.equal(everything(dataset), nchw(x))
            assert dataset.images([1]).is_contiguous()
            assert dataset.shape == (shape[3], 5, 9)


def test_ambiguous_arrays(tmp_path):
    path, x = tmp_path / "x.npy", pixels(6, 3, 8, 4)
    np.save(path, x)
    fails(path, r"shape \(6, 3, 8, 4\), in which axis 1 or 3 may be the channels; pass channels")
    fails(path, "pass channels", channels=1)
    assert open_dataset(path, channels=3).shape == (3, 8, 4)
    assert open_dataset(path, channels=4).shape == (4, 3, 8)
    for shape in ((6, 8, 8, 8), (6, 4), (6,), (6, 3, 8, 8, 1)):
        np.save(path, pixels(*shape))
        fails(path, rf"has shape \({shape[0]},.*; give uint8 arrays of shape \(N, H, W\)")
    np.save(path, pixels(0, 8, 8))
    fails(path, "holds no images")


def test_npz_keys(tmp_path):
    path, x, other = tmp_path / "x.npz", pixels(4, 8, 8, 3), pixels(2, 8, 8)
    for arrays in (
        {"x": x, "y": np.arange(4)},
        {"images": x, "labels": other},
        {"arr_0": x, "arr_1": other},
        {"whatever": x},
    ):
        for save in (np.savez, np.savez_compressed):
            save(path, **arrays)
            assert torch.equal(everything(open_dataset(path)), nchw(x))
    np.savez(path, a=x, b=x)
    fails(path, "has the arrays a, b; name the images x, images or arr_0")
    np.savez(path)
    fails(path, r"has the arrays \(none\)")


class Trap:
    def __reduce__(self):
        return os._exit, (1,)


def test_pickles_are_never_loaded(tmp_path):
    trap = np.empty(2, object)
    trap[:] = Trap()
    np.save(tmp_path / "x.npy", trap)
    fails(tmp_path / "x.npy", "x.npy holds pickled objects, which are never loaded")
    np.savez(tmp_path / "x.npz", x=trap)
    fails(tmp_path / "x.npz", r"x.npz\[x\] holds pickled objects, which are never loaded")
    (tmp_path / "y.npy").write_bytes(pickle.dumps(Trap()))
    fails(tmp_path / "y.npy", "can't be read as a NumPy array .pickles are never loaded")


def test_damaged_numpy_files(tmp_path):
    np.save(tmp_path / "x.npy", pixels(4, 8, 8))
    np.savez(tmp_path / "x.npz", pixels(4, 8, 8))
    npy, npz = (tmp_path / "x.npy").read_bytes(), (tmp_path / "x.npz").read_bytes()
    flipped = bytearray(npz)
    flipped[len(npz) // 2] ^= 255
    for name, content, match in (
        ("empty.npy", b"", "can't be read as a NumPy array"),
        ("header.npy", npy[:40], "can't be read as a NumPy array"),
        ("cut.npy", npy[:-1], "is truncated"),
        ("empty.npz", b"", "can't be read as a .npz"),
        ("cut.npz", npz[: len(npz) // 2], "can't be read as a .npz"),
        ("flipped.npz", bytes(flipped), "can't be read as a NumPy array .*Bad CRC"),
    ):
        (tmp_path / name).write_bytes(content)
        fails(tmp_path / name, rf"{name}(\[arr_0\])? {match}")
    write_zip(tmp_path / "inner.npz", {"x.npy": npy[:-1]})
    fails(tmp_path / "inner.npz", r"inner.npz\[x\] is truncated")
    for dtype in (np.float32, np.int64, bool, np.int8):
        np.save(tmp_path / "x.npy", np.zeros((4, 8, 8), dtype))
        fails(tmp_path / "x.npy", f"x.npy holds {np.dtype(dtype)}; give uint8 arrays of shape")


def test_arrays_keep_size_and_channels(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, pixels(4, 8, 6, 2))
    with pytest.warns(UserWarning, match=r"x.npy: arrays keep their size, 8x6"):
        assert open_dataset(path, size=16).shape == (2, 8, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_dataset(path, size=(8, 6), channels=2).shape == (2, 8, 6)
    fails(path, "has 2 channels; got channels=3", channels=3)
    fails(path, "has no splits", split="test")


# CIFAR-10


@pytest.fixture
def cifar10():
    """The images of the training and test split, and the files that hold them."""
    x, names = pixels(12, 3, 32, 32), [f"data_batch_{k}.bin" for k in range(1, 6)]
    parts = {name: x[2 * k : 2 * k + 2] for k, name in enumerate(names)}
    parts["test_batch.bin"] = x[10:]
    files = {name: cifar_batch(part) for name, part in parts.items()}
    return torch.from_numpy(x[:10]), torch.from_numpy(x[10:]), files


@pytest.mark.parametrize("form", ["folder", "x.tar.gz", "x.tgz", "x.tar"])
def test_cifar10(tmp_path, cifar10, form):
    train, test, files = cifar10
    files["readme.html"] = b"text"
    if form == "folder":
        path = write(tmp_path, files)
    else:
        path = write_tar(tmp_path / form, files)
    dataset = open_dataset(path)
    assert torch.equal(everything(dataset), train)
    assert dataset.describe() == "10 images 3x32x32, CIFAR-10"
    assert torch.equal(everything(open_dataset(path, split="test")), test)


def test_damaged_cifar10(tmp_path, cifar10):
    _, _, files = cifar10
    whole = write_tar(tmp_path / "x.tar.gz", files).read_bytes()
    for name, content in (
        ("cut", whole[: len(whole) // 2]),
        ("empty", b""),
        ("text", b"text" * 999),
    ):
        write(tmp_path, {f"{name}.tar.gz": content})
        fails(tmp_path / f"{name}.tar.gz", f"{name}.tar.gz can't be read as a tar archive")
    write(tmp_path / "folder", files | {"data_batch_4.bin": files["data_batch_4.bin"][:-1]})
    fails(tmp_path / "folder", "data_batch_4.bin is truncated or no CIFAR-10 batch: 6,145 bytes")
    write(tmp_path / "folder", {"data_batch_4.bin": b""})
    fails(tmp_path / "folder", "data_batch_4.bin is truncated or no CIFAR-10 batch: 0 bytes")
    (tmp_path / "folder" / "data_batch_4.bin").unlink()
    fails(tmp_path / "folder", "holds no data_batch_4.bin")
    del files["data_batch_3.bin"]
    fails(write_tar(tmp_path / "less.tar.gz", files), "less.tar.gz holds no data_batch_3.bin")


# Indices


def test_images_takes_any_integers(tmp_path):
    x = pixels(6, 4, 4)
    np.save(tmp_path / "x.npy", x)
    dataset = open_dataset(tmp_path / "x.npy")
    for indices in ([5, 0, 5], (5, 0, 5), torch.tensor([5, 0, 5]), np.array([5, 0, 5], np.uint8)):
        assert torch.equal(dataset.images(indices), nchw(x)[[5, 0, 5]])
    assert dataset.images([]).shape == (0, 1, 4, 4)
    dataset.images([0]).zero_()
    assert torch.equal(dataset.images([0]), nchw(x)[:1])
    for indices in ([6], [-1], [0, 1 << 40]):
        with pytest.raises(IndexError, match=r"is not in 0 .. 5"):
            dataset.images(indices)
    for indices in ([0.0], [[0]], 0, [True] * 6):
        with pytest.raises(TypeError, match="indices must be integers in one dimension"):
            dataset.images(indices)


sizes = st.integers(1, 40)


@hypothesis.given(sizes, sizes, st.integers(0, 2**63), st.integers(0, 30))
def test_epochs_are_permutations(n, batch_size, seed, first):
    steps = range(first, first + 3 + 3 * n // batch_size)
    batches = [batch_indices(n, batch_size, step, seed=seed) for step in steps]
    assert all(batch.shape == (batch_size,) and batch.dtype == torch.int64 for batch in batches)
    stream = torch.cat(batches).tolist()
    start = -first * batch_size % n
    epochs = [stream[k : k + n] for k in range(start, len(stream) - n + 1, n)]
    assert len(epochs) >= 2
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)


@hypothesis.given(sizes, sizes, sizes, st.randoms())
def test_batches_do_not_depend_on_the_order_of_calls(n, batch_size, seed, random):
    steps = list(range(12))
    batches = {step: batch_indices(n, batch_size, step, seed=seed) for step in steps}
    random.shuffle(steps)
    for step in steps:
        batch_indices(n + 1, batch_size, step, seed=seed + 1)
        assert torch.equal(batch_indices(n, batch_size, step, seed=seed), batches[step])


@hypothesis.given(sizes, sizes, sizes)
def test_the_stream_does_not_depend_on_the_batch_size(n, a, b):
    streams = [
        torch.cat([batch_indices(n, size, step, seed=3) for step in range(other)])
        for size, other in ((a, b), (b, a))
    ]
    assert torch.equal(*streams)


def test_batches_are_frozen():
    """A resumed run needs these very numbers, with every version of NumPy."""
    assert batch_indices(10, 13, 0, seed=0).tolist() == [3, 2, 1, 8, 6, 0, 7, 4, 5, 9, 7, 4, 5]
    assert batch_indices(10, 13, 1, seed=0)[:7].tolist() == [1, 9, 8, 6, 2, 0, 3]
    assert batch_indices(1000, 4, 10**9, seed=2**62).tolist() == [878, 314, 291, 239]


def test_epochs_and_seeds_differ():
    epochs = {tuple(batch_indices(50, 50, k, seed=s).tolist()) for k in range(5) for s in range(5)}
    assert len(epochs) == 25


@pytest.mark.parametrize("name", ["n", "batch_size", "step", "seed"])
def test_batch_options(name):
    options = {"n": 10, "batch_size": 2, "step": 0, "seed": 0, name: -1}
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        batch_indices(**options)


def test_a_batch_is_the_callers_own():
    batch = batch_indices(10, 10, 0, seed=0)
    expected = batch.clone()
    batch.zero_()
    assert torch.equal(batch_indices(10, 10, 0, seed=0), expected)
