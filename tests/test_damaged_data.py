"""Damaged and hostile data: an error that names the file, or a picture left out with a word, and
never a wrong pixel, a crash, a hang or memory that nothing announced.

The thorough runs are marked slow: pytest -m slow tests/test_damaged_data.py
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import pickle
import random
import struct
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import (
    cifar10_files,
    cifar_batch,
    encoded,
    everything,
    fails,
    five_seconds,
    idx,
    nchw,
    pixels,
    write,
    write_lmdb,
    write_tar,
    write_zip,
)

from fastddpm import cli
from fastddpm.data import lmdb_source, open_dataset, sources

SMALL, THOROUGH = 20, 200  # bit flips of each form


# ---- forms ---------------------------------------------------------------------------------------


def write_form(base: Path, form: str) -> tuple[Path, np.ndarray]:
    """A file of the form, and its images (N, C, H, W)."""
    base.mkdir(exist_ok=True)
    path = base / f"x.{form}"
    rng = np.random.default_rng(1)
    if form.startswith("tar") or form == "cifar10":
        x = rng.integers(0, 50, (10, 3, 32, 32), dtype=np.uint8)
        files = cifar10_files(x) | {"test_batch.bin": cifar_batch(x), "readme.html": b"text"}
        return (write(path, files) if form == "cifar10" else write_tar(path, files)), x
    if form in ("npz", "deflated.npz", "npy", "idx", "idx.gz", "idx.bz2", "idx.xz"):
        x = rng.integers(0, 50, (12, 1, 20, 20), dtype=np.uint8)
        if form.startswith("idx"):
            pack = {"idx": bytes, "idx.gz": gzip.compress, "idx.bz2": bz2.compress}
            path = base / f"train-images-{form.replace('idx', 'idx3-ubyte')}"
            path.write_bytes(pack.get(form, lzma.compress)(idx(x[:, 0])))
        elif form == "npy":
            np.save(path, x)
        else:
            save = np.savez if form == "npz" else np.savez_compressed
            save(path, images=x, x=x[:, :, ::-1, ::-1])  # a damaged name must not choose
            x = x[:, :, ::-1, ::-1]
        return path, x
    x = rng.integers(0, 50, (6, 3, 16, 16), dtype=np.uint8)
    kind = "PPM" if form == "bare.zip" else "PNG"  # one has checksums of its own, one has none
    files = {f"img{k}.{kind.lower()}": encoded(i.transpose(1, 2, 0), kind) for k, i in enumerate(x)}
    if form in ("folder", "lmdb"):
        return (write(path, files) if form == "folder" else write_lmdb(path, files)), x
    method = {
        "zip": zipfile.ZIP_STORED, "bare.zip": zipfile.ZIP_DEFLATED,
        "bzip2.zip": zipfile.ZIP_BZIP2, "lzma.zip": zipfile.ZIP_LZMA,
    }[form]  # fmt: skip
    return write_zip(path, {**files, "labels.json": b"{}"}, method), x


PACKED = ["tar.gz", "tar.bz2", "tar.xz", "idx.gz", "idx.bz2", "idx.xz"]
ZIPS = ["npz", "deflated.npz", "zip", "bare.zip", "bzip2.zip", "lzma.zip"]
CHECKED = [*PACKED, *ZIPS, "folder"]  # every byte that a pixel depends on is under a checksum
UNCHECKED = ["tar", "idx", "npy", "cifar10", "lmdb"]


def outcome(path: Path, expected: np.ndarray, checked: bool = True) -> str:
    """ "right", "error" or, of pictures, "less": some are skipped and said to be."""
    message = None
    with five_seconds(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dataset = open_dataset(path, progress=False)
            images = everything(dataset).numpy()
        except (ValueError, OSError) as error:
            message = str(error)
    if message is not None:
        assert "\n" not in message
        assert path.name in message
        return "error"
    if not checked:
        return "right"
    if np.array_equal(images, expected):
        return "right"
    assert dataset.skipped
    assert len(images) < len(expected)
    left = iter(expected)
    assert all(any(np.array_equal(image, one) for one in left) for image in images)
    return "less"


def the_file(path: Path) -> Path:
    """What is damaged: the file itself, or one in the folder."""
    if not path.is_dir():
        return path
    return sorted(p for p in path.iterdir() if "test" not in p.name and p.name != "lock.mdb")[0]


@pytest.mark.parametrize("form", [*CHECKED, *UNCHECKED])
@pytest.mark.parametrize(
    "n", [SMALL, pytest.param(THOROUGH, marks=pytest.mark.slow)], ids=["small", "thorough"]
)
def test_flipped_bits(tmp_path, form, n):
    path, x = write_form(tmp_path, form)
    file = the_file(path)
    whole = file.read_bytes()
    if form in ("lmdb", "folder", "cifar10"):
        n = n // 4 if n == SMALL else n
    found = {"right": 0, "error": 0, "less": 0}
    assert outcome(path, x) == "right"
    random_ = random.Random(n)
    for _ in range(n):
        damaged = bytearray(whole)
        damaged[random_.randrange(len(whole))] ^= 1 << random_.randrange(8)
        file.write_bytes(damaged)
        found[outcome(path, x, checked=form in CHECKED)] += 1
    if form in CHECKED:
        assert found["error"] + found["less"] > n // 8  # the rest: time stamps, the other array


@pytest.mark.parametrize("form", ["zip", "npz"])
def test_every_bit_of_a_zips_directory(tmp_path, form):
    """Where nothing but a second copy of what it says can tell of damage: all bits, of every byte
    in turn one."""
    path, x = write_form(tmp_path, form)
    whole = path.read_bytes()
    for at in range(whole.index(b"PK\1\2"), len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << (at % 8)
        path.write_bytes(damaged)
        outcome(path, x)


def test_an_entry_of_a_zip_does_not_hide_in_a_comment(tmp_path):
    """46 + 8 + 10 bytes: an entry whose length is a power of two, so that one bit hides it."""
    x = [encoded(pixels(4, 4)) for _ in range(3)]
    path = write_zip(tmp_path / "x.zip", {f"image-of-no-{k:02d}.png": x[k] for k in range(3)})
    whole = bytearray(path.read_bytes())
    first = whole.index(b"PK\1\2")
    assert whole.index(b"PK\1\2", first + 1) == first + 64
    whole[first + 32] ^= 64  # of the length of its comment
    path.write_bytes(whole)
    fails(
        path, r"x.zip can't be read as a zip archive: .*directory is damaged: 3 members, 2 listed"
    )


@pytest.mark.parametrize("form", [*CHECKED, *UNCHECKED])
def test_cut_anywhere(tmp_path, form):
    path, x = write_form(tmp_path, form)
    file = the_file(path)
    whole = file.read_bytes()
    end = len(whole) - (1 if form != "tar" else 10240)  # a tar archive ends in zeros
    for length in {0, 1, 9, len(whole) // 3, len(whole) // 2, end}:
        file.write_bytes(whole[:length])
        assert outcome(path, x) in ("error", "less")


@pytest.mark.parametrize("form", [*PACKED, "tar", "idx", "npy"])
def test_bytes_behind_the_end(tmp_path, form):
    path, x = write_form(tmp_path, form)
    whole = path.read_bytes()
    path.write_bytes(whole + b"more")
    assert outcome(path, x) == "error"
    path.write_bytes(whole + whole)
    assert outcome(path, x) == "error"  # a second archive, or as many images again


@pytest.mark.parametrize("form", ["tar.gz", "tar.bz2", "tar.xz", "idx.gz", "idx.bz2", "idx.xz"])
def test_streams_in_a_row(tmp_path, form):
    """As `cat a.gz b.gz` makes them; the checksum of each is compared, and zeros may follow."""
    path, x = write_form(tmp_path, form)
    unpack, pack = {
        "gz": (gzip.decompress, gzip.compress), "bz2": (bz2.decompress, bz2.compress),
        "xz": (lzma.decompress, lzma.compress),
    }[form.rpartition(".")[2]]  # fmt: skip
    content = unpack(path.read_bytes())
    parts = [pack(content[:1000]), pack(b""), pack(content[1000:])]
    path.write_bytes(b"".join(parts) + bytes(8))
    assert outcome(path, x) == "right"
    path.write_bytes(parts[0] + parts[2][:-1])
    assert outcome(path, x) == "error"
    flipped = bytearray(parts[0])
    flipped[len(flipped) // 2] ^= 1
    path.write_bytes(bytes(flipped) + parts[2])
    assert outcome(path, x) == "error"


def test_tar_archives_of_other_writers(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (10, 3, 32, 32), dtype=np.uint8)
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        with tarfile.open(tmp_path / "x.tar.gz", "w:gz", format=form) as tar:
            folder = tarfile.TarInfo("cifar" * (1 if form == tarfile.USTAR_FORMAT else 60))
            folder.type, folder.mtime = tarfile.DIRTYPE, 1.5
            tar.addfile(folder)
            for name, content in cifar10_files(x).items():
                member = tarfile.TarInfo(f"{folder.name}/{name}")
                member.size, member.mtime = len(content), 0.25
                tar.addfile(member, io.BytesIO(content))
            link = tarfile.TarInfo("data_batch_9.bin")
            link.type, link.linkname = tarfile.SYMTYPE, "data_batch_1.bin"
            tar.addfile(link)
        assert np.array_equal(everything(open_dataset(tmp_path / "x.tar.gz")), x)
    with tarfile.open(tmp_path / "two.tar", "w") as tar:
        for folder_name in ("a", "b"):
            for name, content in cifar10_files(x).items():
                member = tarfile.TarInfo(f"{folder_name}/{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    fails(tmp_path / "two.tar", "two.tar can't be read as a tar archive: it holds two files data_")


def test_train_says_it_in_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for form in [*CHECKED, *UNCHECKED]:
        path, _ = write_form(tmp_path / "data", form)
        whole = the_file(path).read_bytes()
        the_file(path).write_bytes(whole[: len(whole) // 2])
        for file in path.iterdir() if path.is_dir() else []:
            file.write_bytes(b"" if file.name == "lock.mdb" else file.read_bytes()[:70])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            arguments = ["train", f"--data={path}", "--out=run", "--preset=fashion-mnist"]
            assert cli.main([*arguments, "--steps=1", "--quiet"]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith("fastddpm: error: ")
        assert path.name in err
    assert not (tmp_path / "run").exists()


# ---- .npy and .npz -------------------------------------------------------------------------------


def npy(shape: str, content: bytes, descr: str = "'|u1'", order: str = "False") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + content


@pytest.mark.parametrize(
    ("shape", "descr", "message"),
    [
        ("(True, 28, 28)", "'|u1'", r"has shape \(True, 28, 28\); give uint8 arrays"),
        ("(1, 28, True)", "'|u1'", "has shape"),
        ("(-1, 28, 28)", "'|u1'", r"has shape \(-1, 28, 28\)"),
        ("(-1, -28, 28)", "'|u1'", "has shape"),
        ("(1, 28.0, 28)", "'|u1'", "can't be read as a NumPy array"),
        ("(28, 28)", "'|u1'", "has shape"),
        ("(0, 28, 28)", "'|u1'", "holds no images"),
        ("(2, 28, 28)", "'|u1'", "is truncated"),
        ("(10**30, 28, 28)", "'|u1'", "can't be read as a NumPy array"),
        ("(1000000000000000000000, 28, 28)", "'|u1'", "is truncated"),
        ("(1, 28, 28)", "'|O'", "holds pickled objects"),
        ("(1, 28, 28)", "[('a', '|O')]", "holds pickled objects"),
        ("(1, 28, 28)", "[('a', '|u1')]", "give uint8 arrays"),
        ("(1, 28, 28)", "('|u1', (1,))", "give uint8 arrays"),
        ("(1, 28, 14)", "'>u2'", "holds >u2; give uint8 arrays"),
        ("(1, 28, 28)", "'|i1'", "holds int8; give uint8 arrays"),
        ("(1, 28, 28)", "'|S1'", r"holds \|S1; give uint8 arrays"),
    ],
)
@pytest.mark.parametrize("memory_limit", [1 << 30, 0], ids=["read", "stored"])
def test_headers_of_arrays(tmp_path, shape, descr, message, memory_limit):
    content = npy(shape, bytes(784), descr)
    path = write(tmp_path, {"x.npy": content}) / "x.npy"
    fails(path, message, memory_limit=memory_limit)
    fails(write_zip(tmp_path / "x.npz", {"x.npy": content}), message)


@pytest.mark.parametrize("memory_limit", [1 << 30, 0], ids=["read", "stored"])
def test_no_images_at_all(tmp_path, memory_limit):
    for shape in ("(0, 28, 28)", "(4, 0, 28)", "(0, 3, 99999999999999999999, 28)"):
        path = write(tmp_path, {"x.npy": npy(shape, b"")}) / "x.npy"
        fails(path, r"holds no images: \(", memory_limit=memory_limit)


@pytest.mark.parametrize("descr", ["'|u1'", "'u1'", "'>u1'", "'<u1'"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("memory_limit", [1 << 30, 0], ids=["read", "stored"])
def test_orders_of_bytes_and_axes(tmp_path, descr, order, memory_limit):
    for shape in ((3, 5, 7), (3, 5, 7, 3), (3, 2, 5, 7)):
        x = pixels(*shape)
        content = npy(str(shape), x.tobytes(order), descr, str(order == "F"))
        path = write(tmp_path, {"x.npy": content}) / "x.npy"
        expected = torch.from_numpy(x) if shape[1] == 2 else nchw(x)
        dataset = open_dataset(path, memory_limit=memory_limit)
        assert torch.equal(dataset.images([2, 0, 2]), expected[[2, 0, 2]])
        assert torch.equal(everything(pickle.loads(pickle.dumps(dataset))), expected)
        npz = write_zip(tmp_path / "x.npz", {"x.npy": content})
        assert torch.equal(everything(open_dataset(npz)), expected)


def test_an_array_that_is_cut_while_it_is_in_use(tmp_path):
    x = pixels(100, 30, 30)
    np.save(tmp_path / "x.npy", x)
    dataset = open_dataset(tmp_path / "x.npy", memory_limit=0)
    assert torch.equal(dataset.images([99]), nchw(x)[[99]])
    os.truncate(tmp_path / "x.npy", 128 + 50 * 900 + 7)
    assert torch.equal(dataset.images([49, 0]), nchw(x)[[49, 0]])
    for index in ([50], [99], range(100)):
        with pytest.raises(OSError, match=r"it has 45,135 bytes and had 90,128 when .*x.npy"):
            dataset.images(index)


# ---- lmdb ----------------------------------------------------------------------------------------


def test_a_database_that_kills_its_reader(tmp_path):
    """Its file is cut behind the reader's back: a read of a page that is gone is a SIGBUS."""
    x = pixels(40, 64, 64, 3)
    path = write_lmdb(tmp_path / "x", {f"{k:02d}.png": encoded(x[k]) for k in range(40)})
    dataset = open_dataset(path, memory_limit=0)
    assert torch.equal(dataset.images([39, 0]), nchw(x)[[39, 0]])
    os.truncate(path / "data.mdb", 8192)
    for _ in range(2):  # then and from then on
        with (
            five_seconds(),
            pytest.raises(
                ValueError, match=r"data.mdb can't be read as an lmdb database: it .*damaged"
            ),
        ):
            dataset.images(range(40))


def test_pages_of_a_database_that_are_damaged(tmp_path):
    """Each page in turn: overwritten by noise, by zeros, and by another."""
    pytest.importorskip("lmdb")
    path, x = write_form(tmp_path, "lmdb")
    whole = (path / "data.mdb").read_bytes()
    for page in range(len(whole) // 4096):
        for noise in (os.urandom(4096), bytes(4096), whole[8192 : 8192 + 4096]):
            damaged = bytearray(whole)
            damaged[page * 4096 : page * 4096 + 4096] = noise
            (path / "data.mdb").write_bytes(damaged)
            outcome(path, x)  # pictures have checksums here, the database has none


def test_a_reader_that_says_nothing(tmp_path, monkeypatch):
    path = write_lmdb(tmp_path / "x", {"a.png": encoded(pixels(4, 4))})
    (tmp_path / "reader.py").write_text("import time; time.sleep(99)")
    monkeypatch.setattr(lmdb_source.lmdb_reader, "__file__", str(tmp_path / "reader.py"))
    monkeypatch.setattr(lmdb_source, "PATIENCE_S", 0.3)
    with five_seconds():
        fails(path, "data.mdb can't be read as an lmdb database: its reader said nothing for 0.3 s")


def test_a_value_too_long_for_an_image(tmp_path, monkeypatch):
    files = {"a": encoded(pixels(50, 50, 3)), "b": encoded(pixels(4, 4, 3))}
    path = write_lmdb(tmp_path / "x", files)
    monkeypatch.setattr(sources, "ENCODED_LIMIT", 1000)
    with pytest.warns(UserWarning, match=r"a \([0-9,]+ bytes, more than 1,000\)"):
        dataset = open_dataset(path, memory_limit=0)
    assert len(everything(dataset)) == 1


def test_a_reader_ends_with_its_dataset(tmp_path):
    path = write_lmdb(tmp_path / "x", {"a.png": encoded(pixels(4, 4))})
    dataset = open_dataset(path, memory_limit=0)
    process = dataset._source._reader._process
    assert process.poll() is None
    del dataset
    assert process.poll() is not None
