"""Damaged and hostile data: an error that names the file, or a picture left out with a word, and
never a wrong pixel, a crash, a hang or memory that nothing announced.

The thorough runs are marked slow: pytest -m slow tests/test_damaged_data.py
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import os
import pickle
import random
import signal
import socket
import struct
import tarfile
import threading
import time
import tracemalloc
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import (
    cifar_batch,
    encoded,
    everything,
    fails,
    idx,
    nchw,
    pixels,
    write,
    write_lmdb,
    write_tar,
    write_zip,
)

from fastddpm import cli
from fastddpm.data import archives, decode, limits, lmdb_source, open_dataset, scan, sources

SMALL, THOROUGH = 20, 200  # bit flips of each form


@pytest.fixture(autouse=True)
def _no_hang():
    """Nothing here may take longer than 5 s at a time; the thorough runs are many times."""

    def stop(*_):
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def five_seconds():
    signal.setitimer(signal.ITIMER_REAL, 5)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)


# ---- forms ---------------------------------------------------------------------------------------


def cifar10_files(x: np.ndarray) -> dict[str, bytes]:
    return {f"data_batch_{k}.bin": cifar_batch(x[2 * k - 2 : 2 * k]) for k in range(1, 6)}


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


# ---- bombs ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def little_memory(limit: int = 16 << 20):
    """Python and NumPy may take so much here, and 5 s."""
    tracemalloc.start()
    try:
        with five_seconds():
            yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_an_idx_file_is_expanded_as_far_as_it_announces(tmp_path, pack):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(pack(idx(np.zeros((4, 28, 28), np.uint8)) + bytes(32 << 20)))
    with little_memory():
        fails(path, "ubyte.gz is too long: more than 3,136 bytes of pixels, 4x28x28 in its header")


@pytest.mark.parametrize("name", ["x-idx3-ubyte.gz", "x.npz", "x.npy"])
def test_more_than_memory_holds(tmp_path, monkeypatch, name):
    x = np.zeros((500, 28, 28), np.uint8)
    path = tmp_path / name
    if name == "x.npz":
        np.savez_compressed(path, x)
    elif name == "x.npy":
        np.save(path, x)
    else:
        path.write_bytes(gzip.compress(idx(x)))
    monkeypatch.setattr(limits, "free_bytes", lambda _: 100_000)
    with little_memory(1 << 20):
        fails(path, rf"{name}.* it takes 392,\d\d\d bytes of memory, and 100,000 are free")


def test_an_array_that_announces_more_than_it_has(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "free_bytes", lambda _: None)  # nobody says
    path = tmp_path / "x-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(b"\0\0\x08\x03" + struct.pack(">3I", 1000, 10000, 100) + b"x"))
    with little_memory(1 << 20):
        fails(path, "it is truncated: 1 bytes, 1,000,000,000 announced")


@pytest.mark.parametrize("suffix", ["tar.gz", "tar.bz2", "tar.xz"])
@pytest.mark.parametrize("where", ["data_batch_1.bin", "readme", "behind", "header"])
def test_a_tar_archive_unpacks_to_a_limit(tmp_path, monkeypatch, suffix, where):
    monkeypatch.setattr(archives, "TAR_LIMIT", 1 << 20)
    zeros, files = bytes(32 << 20), cifar10_files(pixels(10, 3, 32, 32))
    path, kind = tmp_path / f"x.{suffix}", suffix.rpartition(".")[2]
    with tarfile.open(path, f"w:{kind}", **({"preset": 0} if kind == "xz" else {})) as tar:
        for name, content in files.items():
            content = zeros if name == where else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        if where in ("readme", "header"):
            member = tarfile.TarInfo(where)
            member.size = len(zeros)
            member.type = tarfile.XHDTYPE if where == "header" else tarfile.REGTYPE
            tar.addfile(member, io.BytesIO(zeros))
    if where == "behind":
        pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[kind]
        path.write_bytes(path.read_bytes() + pack(zeros))
    with little_memory():
        fails(
            path,
            r"x.tar.*: (it unpacks to more than 1,048,576|a header in it has 33,554,432) bytes",
        )


@pytest.mark.parametrize("method", [8, 12, 14])
@pytest.mark.parametrize("announced", [None, 1000])
def test_a_zip_member_is_expanded_as_far_as_it_announces(tmp_path, monkeypatch, method, announced):
    bomb = encoded(pixels(4, 4), "BMP") + bytes(32 << 20)
    path = write_zip(tmp_path / "x.zip", {"a.bmp": bomb}, method)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("b.png", encoded(pixels(4, 4)))
    whole = bytearray(path.read_bytes())
    if announced:
        struct.pack_into("<I", whole, whole.index(b"PK\1\2") + 24, announced)
        path.write_bytes(whole)
    monkeypatch.setattr(sources, "ENCODED_LIMIT", 1 << 20)
    reason = "Bad CRC-32" if announced else "[0-9,]+ bytes, more than 1,048,576"
    with little_memory(), pytest.warns(UserWarning, match=rf"a.bmp \({reason}"):
        assert len(open_dataset(path)) == 1


def test_members_of_a_zip_that_share_their_bytes(tmp_path):
    path = write_zip(tmp_path / "x.zip", {f"{k}.png": encoded(pixels(99, 99)) for k in range(2)})
    whole = bytearray(path.read_bytes())
    first = whole.index(b"PK\1\2")
    struct.pack_into("<I", whole, first + 20, len(whole))
    path.write_bytes(whole)
    fails(path, "x.zip can't be read as a zip archive: its members overlap")


def bomb(side: int = 12000) -> bytes:
    """A PNG of a side like this in 1 bit a pixel, 18 million bytes of zeros and a small file."""
    head = struct.pack(">2I5B", side, side, 1, 0, 0, 0, 0)
    content = zlib.compress(bytes(side * (1 + side // 8)), 1)
    parts = [(b"IHDR", head), (b"IDAT", content), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in parts
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_of_a_picture_is_skipped_by_its_header(tmp_path):
    x = pixels(8, 8)
    write(tmp_path, {"a.png": encoded(x), **{f"b{k}.png": bomb() for k in range(9)}})
    started = time.perf_counter()
    with (
        five_seconds(),
        pytest.warns(UserWarning, match="144,000,000 pixels, more than the 89,478,485") as record,
    ):
        assert torch.equal(everything(open_dataset(tmp_path, size=8)), nchw(x[None]))
    assert time.perf_counter() - started < 3
    assert any("9 of 10 can't be used" in str(warning.message) for warning in record)


def test_threads_share_what_decoding_may_take(tmp_path, monkeypatch):
    write(tmp_path, {f"{k}.png": encoded(pixels(64, 64)) for k in range(12)})
    held, most = [0], [0]
    lock, decoded = threading.Lock(), decode._decoded

    def watched(file, *rest):
        with lock:
            held[0] += 1
            most[0] = max(most[0], held[0])
        time.sleep(0.01)
        with lock:
            held[0] -= 1
        return decoded(file, *rest)

    monkeypatch.setattr(decode, "_decoded", watched)
    monkeypatch.setattr(scan, "THREADS", 6)
    size = 64 * 64 * decode.BYTES_A_PIXEL
    for total, images in ((6 * size, range(3, 7)), (2 * size, [2]), (size, [1]), (1, [1])):
        monkeypatch.setattr(decode, "DECODING", limits.Budget(total))
        most[0] = 0
        with five_seconds():
            assert len(open_dataset(tmp_path)) == 12
        assert most[0] in images
    monkeypatch.setattr(limits, "free_bytes", lambda _: size - 1)
    fails(tmp_path, "it takes 65,536 bytes of memory, and 65,535 are free")


def test_a_budget_outlives_errors_and_forks():
    budget = limits.Budget(10)
    with pytest.raises(KeyError), budget.take(10):
        raise KeyError
    with budget.take(10):
        child = os.fork()
        if child == 0:
            with budget.take(10):
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# ---- what is no file -----------------------------------------------------------------------------


@pytest.fixture(params=["pipe", "socket", "/dev/zero", "/proc/kmsg", "/proc/self/mem"])
def no_file(request, tmp_path):
    """Puts something that can't be read to its end where a file is expected."""
    kept = []

    def put(path: Path) -> None:
        if request.param == "pipe":
            os.mkfifo(path)
        elif request.param == "socket":
            kept.append(socket.socket(socket.AF_UNIX))
            kept[0].bind(os.path.relpath(path))
        else:
            if not os.path.exists(request.param):
                pytest.skip(f"no {request.param} here")
            path.symlink_to(request.param)

    yield put
    for opened in kept:
        opened.close()


@pytest.mark.parametrize(
    "name",
    [
        "x.npy", "x.npz", "x.zip", "x.tar", "x.tar.gz", "x-idx3-ubyte", "x-idx3-ubyte.gz", "x.png",
        "train-images-idx3-ubyte", "data_batch_1.bin", "data.mdb",
    ],
)  # fmt: skip
def test_only_regular_files_are_read(tmp_path, monkeypatch, capsys, no_file, name):
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.chdir(folder)
    no_file(folder / name)
    inside = not name.startswith("x") or name == "x.png"
    path = folder if inside else folder / name
    with five_seconds():
        arguments = ["train", f"--data={path}", f"--out={tmp_path / 'run'}", "--steps=1", "--quiet"]
        assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert (err.count("\n"), name in err) == (1, True)


def test_a_picture_to_interpolate_is_a_regular_file(tmp_path, monkeypatch, capsys, no_file):
    monkeypatch.chdir(tmp_path)
    no_file(tmp_path / "x.png")
    with five_seconds():
        assert cli.main(["interpolate", "x.png", "x.png", "--t=3"]) == 2
    assert "x.png can't be read as an image" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.ismount("/proc"), reason="no /proc here")
def test_folders_of_the_system_are_not_walked(tmp_path):
    x = pixels(4, 4)
    write(tmp_path, {"a.png": encoded(x)})
    (tmp_path / "linked").symlink_to("/proc/self")
    with five_seconds(), pytest.warns(UserWarning, match=r"linked \(a folder of the system\)"):
        assert torch.equal(everything(open_dataset(tmp_path)), nchw(x[None]))
    with five_seconds():
        fails(Path("/proc/self"), r"none of 1 images can be decoded: /proc/self \(a folder of the")


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
