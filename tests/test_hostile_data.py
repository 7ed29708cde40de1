"""Hostile data: what expands to more than it announces or memory holds, and what is no file. An
error or a word, in little time and memory.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import os
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import (
    cifar10_files,
    encoded,
    everything,
    fails,
    five_seconds,
    idx,
    nchw,
    pixels,
    png,
    write,
    write_zip,
)
from PIL import Image

from fastddpm import cli
from fastddpm.data import archives, decode, limits, open_dataset, scan, sources

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


def test_a_zip_member_of_zeros_is_a_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LARGE", 1 << 20)
    files = {"a.bmp": bytes(2 << 20), "b.bmp": encoded(np.zeros((1400, 800), np.uint8), "BMP")}
    files["c.bmp"] = encoded(pixels(1400, 800), "BMP")  # as large, and there is something in it
    path = write_zip(tmp_path / "x.zip", files, zipfile.ZIP_DEFLATED)
    with pytest.warns(UserWarning, match=r"2 of 3 .*a.bmp \(a decompression bomb, 2,097,152 bytes"):
        assert open_dataset(path).shape == (1, 1400, 800)


@pytest.mark.slow
def test_memory_of_many_large_pictures(tmp_path):
    """81 million pixels in each of 8 threads: one at a time, and none is kept."""
    (tmp_path / "0.png").write_bytes(encoded(Image.new("RGB", (9000, 9000)), compress_level=1))
    for k in range(1, 8):
        os.link(tmp_path / "0.png", tmp_path / f"{k}.png")
    program = """
import resource, sys
from fastddpm.data import open_dataset, scan
scan.THREADS = 8
used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
before = used()
assert len(open_dataset(sys.argv[1], size=8)) == 8
print(used() - before)"""
    run = subprocess.run(
        [sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) < 1600  # MiB


def test_members_of_a_zip_that_share_their_bytes(tmp_path):
    path = write_zip(tmp_path / "x.zip", {f"{k}.png": encoded(pixels(99, 99)) for k in range(2)})
    whole = bytearray(path.read_bytes())
    first = whole.index(b"PK\1\2")
    struct.pack_into("<I", whole, first + 20, len(whole))
    path.write_bytes(whole)
    fails(path, "x.zip can't be read as a zip archive: its members overlap")


def bomb(side: int = 12000) -> bytes:
    """A PNG of side x side black pixels, in 1 bit each: 18 million bytes and a small file."""
    return png(1, 0, [bytes(side // 8)] * side)


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
