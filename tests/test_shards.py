"""Sets of samples in folders: the samples of `sample`, whatever ended a run and whoever goes on."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import five_seconds
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from toy import tiny_unet, wave

import fastddpm
from fastddpm import Diffusion, Schedule, cli, shards
from fastddpm.checkpoint import atomic_write
from fastddpm.data import open_dataset
from fastddpm.figures import to_uint8
from fastddpm.pretrained import save_model
from fastddpm.shards import cut, missing, sample_to_folder

OPTIONS = {"precision": "fp32", "engine": "eager", "progress": False}


@pytest.fixture(scope="module")
def model() -> fastddpm.UNet:
    return tiny_unet(in_channels=3)


def expected(model, n, **options) -> np.ndarray:
    x = fastddpm.sample(model, n, **{**OPTIONS, **options})
    return to_uint8(x).permute(0, 2, 3, 1).numpy()


def contents(folder: Path) -> dict[int, np.ndarray]:
    """{index: image} of all files in the folder, each index once, by their names."""
    images: dict[int, np.ndarray] = {}
    for path in folder.glob("[!.]*"):
        if path.suffix == ".png":
            with Image.open(path) as image:
                found = {int(path.stem): np.asarray(image)}
        else:
            first, stop = map(int, path.stem.split("-"))
            with np.load(path) as file:
                found = dict(zip(range(first, stop), file["images"], strict=True))
        assert not images.keys() & found.keys()
        images |= found
    return images


def assert_set(folder: Path, model, n: int, **options) -> None:
    """The folder holds samples 0 .. n - 1, to a rounding: batches are not those of `expected`."""
    images = contents(folder)
    assert sorted(images) == list(range(n))
    difference = np.stack([images[k] for k in range(n)]).astype(int) - expected(model, n, **options)
    assert np.abs(difference).max() <= 1


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.iterdir()}


# ---- what is written -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shard_size", "names"),
    [
        (3, ["00000000-00000003.npz", "00000003-00000006.npz", "00000006-00000007.npz"]),
        (0, [f"{k:06d}.png" for k in range(7)]),
        (None, [f"{k:06d}.png" for k in range(7)]),
    ],
)
def test_a_folder_holds_the_samples_under_their_numbers(model, tmp_path, shard_size, names):
    assert sample_to_folder(model, tmp_path / "x", 7, shard_size=shard_size, **OPTIONS) == 7
    assert sorted(stamps(tmp_path / "x")) == names
    assert_set(tmp_path / "x", model, 7)


def test_large_sets_are_shards(model, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "PICTURES", 4)
    monkeypatch.setattr(shards, "SHARD", 3)
    sample_to_folder(model, tmp_path, 5, **OPTIONS)
    assert sorted(stamps(tmp_path)) == ["00000000-00000003.npz", "00000003-00000005.npz"]


def test_a_shard_says_what_drew_it_and_is_a_data_set(model, tmp_path):
    sample_to_folder(
        model, tmp_path, 2, shard_size=2, seed=4, steps=3, sampler="ddim", eta=0.5, **OPTIONS
    )
    path = tmp_path / "00000000-00000002.npz"
    with np.load(path) as file:
        assert file["images"].dtype == np.uint8
        about = json.loads(str(file["about"]))
    assert about == {
        "model": shards.fingerprint(model), "seed": 4, "shape": [3, 8, 8], "steps": 3,
        "sampler": "ddim", "eta": 0.5, "clip": True, "precision": "fp32",
    }  # fmt: skip
    assert len(open_dataset(path)) == 2


def test_the_fingerprint_is_the_models(model):
    same, other, process = tiny_unet(in_channels=3), tiny_unet(in_channels=3), tiny_unet()
    with torch.no_grad():
        other.conv_out.bias[1] += 1e-3
    prints = [shards.fingerprint(m) for m in (model, same, other, process)]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


# ---- going on ------------------------------------------------------------------------------------


def test_finished_files_are_kept_and_damaged_ones_drawn_again(model, tmp_path):
    sample_to_folder(model, tmp_path, 8, shard_size=2, **OPTIONS)
    before = stamps(tmp_path)
    (tmp_path / "00000002-00000004.npz").unlink()
    cut_short = tmp_path / "00000004-00000006.npz"
    cut_short.write_bytes(cut_short.read_bytes()[:-40])
    leftover = tmp_path / ".00000002-00000004.npz.a1b2c3d4"
    leftover.write_bytes(b"half")
    assert sample_to_folder(model, tmp_path, 8, shard_size=2, **OPTIONS) == 4
    assert_set(tmp_path, model, 8)
    after = stamps(tmp_path)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"00000002-00000004.npz", cut_short.name}
    assert not leftover.exists()
    assert sample_to_folder(model, tmp_path, 8, shard_size=2, **OPTIONS) == 0
    assert stamps(tmp_path) == after


def test_what_another_process_still_writes_is_left_to_it(model, tmp_path):
    sample_to_folder(model, tmp_path, 1, **OPTIONS)
    name = "000001.png"
    with atomic_write(tmp_path / name) as file:
        file.write(b"of the other process")
        (tmp_path / f".{name}.0123abcd").write_bytes(b"of one that was killed")
        assert sample_to_folder(model, tmp_path, 3, **OPTIONS) == 2
        assert len(list(tmp_path.glob(".*"))) == 1
    assert sorted(stamps(tmp_path)) == [f"{k:06d}.png" for k in range(3)]
    assert (tmp_path / name).read_bytes() == b"of the other process"


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_set_that_is_gone_on_with_is_cut_as_one_that_was_not_interrupted(
    model, tmp_path, monkeypatch, world
):
    options = {"shard_size": 4, "first_index": 1, "steps": 1, **OPTIONS}
    sample_to_folder(model, tmp_path / "whole", 12, **options)
    names = stamps(tmp_path / "whole").keys()
    assert sorted(names) == [
        "00000001-00000004.npz", "00000004-00000008.npz", "00000008-00000012.npz",
        "00000012-00000013.npz",
    ]  # fmt: skip
    monkeypatch.setattr(shards.ranks, "agree", lambda **_: None)
    monkeypatch.setattr(shards.ranks, "from_first", lambda pieces: pieces)
    monkeypatch.setattr(shards.ranks, "place", lambda: (0, world))
    monkeypatch.setattr(shards.ranks, "together", contextlib.nullcontext)
    for lost in sorted(names):
        (tmp_path / "whole" / lost).unlink()
        sample_to_folder(model, tmp_path / "whole", 12, **options)
        assert stamps(tmp_path / "whole").keys() <= names
    sample_to_folder(model, tmp_path / "new", 12, **options)
    assert sorted(stamps(tmp_path / "new")) == sorted(names)[::world]


def test_damaged_pictures_are_drawn_again(model, tmp_path):
    sample_to_folder(model, tmp_path, 3, **OPTIONS)
    whole = (tmp_path / "000001.png").read_bytes()
    flipped = bytearray(whole)
    flipped[-20] ^= 1
    for damaged in (b"", b"no picture", whole[:-30], bytes(flipped)):
        (tmp_path / "000001.png").write_bytes(damaged)
        assert sample_to_folder(model, tmp_path, 3, **OPTIONS) == 1
    assert_set(tmp_path, model, 3)


def test_a_set_is_continued_in_any_pieces(model, tmp_path):
    numbers = {"seed": np.int64(0), "first_index": np.int64(4)}
    sample_to_folder(model, tmp_path, 3, shard_size=2, **numbers, **OPTIONS)
    assert sample_to_folder(model, tmp_path, 6, shard_size=4, **OPTIONS) == 4
    assert sample_to_folder(model, tmp_path, 9, **OPTIONS) == 2  # pictures beside the shards
    assert_set(tmp_path, model, 9)


@pytest.mark.parametrize("shard_size", [0, 2])
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 1}, "its seed is 0 and here 1"),
        ({"steps": 3}, "its steps is 12 and here 3"),
        ({"sampler": "ddim"}, "its sampler is 'ddpm' and here 'ddim'"),
        ({"clip": False}, "its clip is True and here False"),
        ({"precision": "bf16"}, "its precision is 'fp32' and here 'bf16'"),
        ({"model": tiny_unet(in_channels=3, seed=1)}, "its model is"),
    ],
    ids=str,
)
def test_another_set_is_refused(model, tmp_path, shard_size, other, message):
    sample_to_folder(model, tmp_path, 2, shard_size=shard_size, **OPTIONS)
    before = stamps(tmp_path)
    arguments = {"model": model, "n": 4, "shard_size": shard_size, **OPTIONS, **other}
    with pytest.raises(ValueError, match=message):
        sample_to_folder(arguments.pop("model"), tmp_path, **arguments)
    assert stamps(tmp_path) == before


def test_pictures_of_unknown_origin_are_not_overwritten(model, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "000001.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "cat.png")  # nor looked at
    with pytest.raises(ValueError, match=r"000001\.png does not say what drew it"):
        sample_to_folder(model, tmp_path, 3, **OPTIONS)
    (tmp_path / "000001.png").unlink()
    assert sample_to_folder(model, tmp_path, 3, **OPTIONS) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n must be an integer of at least 1; got 0"),
        ({"first_index": -1}, "first_index must be"),
        ({"seed": -1}, "seed must be"),
        ({"shard_size": -1}, "shard_size must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"steps": 0}, "steps must be"),
    ],
)
def test_mistakes_are_named_before_the_folder_is_made(model, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        sample_to_folder(model, tmp_path / "x", **{"n": 2, **OPTIONS, **options})
    assert not (tmp_path / "x").exists()


def test_a_set_is_of_one_process(model, tmp_path):
    """Samples of another schedule, prediction or shorter chain were put beside the first ones."""
    folder, own = tmp_path / "x", model.diffusion
    sample_to_folder(model, folder, 2, steps=5, **OPTIONS)
    assert sample_to_folder(model, folder, 3, steps=5, diffusion=own, **OPTIONS) == 1
    for other in (Diffusion(Schedule.cosine(12)), Diffusion(own.schedule, "x0")):
        with pytest.raises(ValueError, match="is a sample of another set: its model is"):
            sample_to_folder(model, folder, 4, steps=5, diffusion=other, **OPTIONS)
    # 5 of 12 steps by way of 7: others than those that are taken of 12 at once.
    shorter = own.respace(7).respace(5)
    with pytest.raises(ValueError, match="is a sample of another set: its model is"):
        sample_to_folder(model, folder, 4, diffusion=shorter, **OPTIONS)
    assert sample_to_folder(model, tmp_path / "y", 2, diffusion=shorter, **OPTIONS) == 2
    assert_set(tmp_path / "y", model, 2, diffusion=shorter)
    respaced = tiny_unet(in_channels=3, diffusion=shorter)
    assert sample_to_folder(respaced, tmp_path / "y", 3, **OPTIONS) == 1


@pytest.mark.parametrize("shard_size", [0, 2])
def test_the_classes_of_a_set_go_with_its_samples(tmp_path, shard_size):
    model, y = tiny_unet(in_channels=3, num_classes=4), torch.tensor([0, 3, 1, 2, 2])
    options = {**OPTIONS, "shard_size": shard_size}

    def to_folder(first, stop, y=y):
        told = {"first_index": first, "model_kwargs": {"y": y[first:stop]}}
        return sample_to_folder(model, tmp_path, stop - first, batch_size=2, **told, **options)

    assert to_folder(0, 3) == 3
    assert to_folder(2, 5) == 2  # gone on with, the third of the same class
    assert_set(tmp_path, model, 5, model_kwargs={"y": y})
    other = y.clone()
    other[1] = 0
    before = stamps(tmp_path)
    with pytest.raises(ValueError, match="another set: y of sample 1 is 3 and here 0"):
        to_folder(0, 3, other)
    with pytest.raises(ValueError, match="the model has 4 classes: it needs y"):
        sample_to_folder(model, tmp_path, 5, **options)
    assert stamps(tmp_path) == before
    assert to_folder(2, 5, other) == 0


def test_a_sets_steps_are_told_apart(model, tmp_path):
    sample_to_folder(model, tmp_path, 2, steps=4, **OPTIONS)
    assert sample_to_folder(model, tmp_path, 2, steps=[11, 7, 4, 0], **OPTIONS) == 0
    with pytest.raises(ValueError, match=r"its steps is 4 and here \[2, 5, 8, 11\]"):
        sample_to_folder(model, tmp_path, 3, steps=4, spacing="trailing", **OPTIONS)


@pytest.mark.parametrize(
    "name", ["x_T", "init", "start", "generator", "on_step", "denoised_fn", "cond_fn",
             "self_condition", "distributed"],
)  # fmt: skip
def test_what_no_file_says_is_refused(model, tmp_path, name):
    with pytest.raises(ValueError, match=f"sample_to_folder takes no {name}: fastddpm.sample does"):
        sample_to_folder(model, tmp_path / "x", 2, **{name: 3}, **OPTIONS)
    assert not (tmp_path / "x").exists()


def test_only_a_unet_has_a_fingerprint(tmp_path):
    with pytest.raises(ValueError, match=r"model must be a fastddpm\.UNet; got function"):
        sample_to_folder(wave, tmp_path, 2, shape=(1, 8, 8))


def test_nan_is_not_written(tmp_path):
    broken = tiny_unet()
    with torch.no_grad():
        broken.conv_out.bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="2 of 2 images are not finite"):
        sample_to_folder(broken, tmp_path, 4, shard_size=2, **OPTIONS)
    assert stamps(tmp_path) == {}


# ---- ranges --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "there", "gaps"),
    [
        ((0, 10), [], [(0, 10)]),
        ((0, 10), [(0, 10)], []),
        ((3, 10), [(0, 4), (6, 7)], [(4, 6), (7, 10)]),
        ((3, 10), [(8, 20), (5, 6), (5, 9)], [(3, 5)]),
        ((3, 10), [(0, 2), (10, 12)], [(3, 10)]),
        ((3, 10), [(0, 30)], []),
    ],
)
def test_missing(wanted, there, gaps):
    assert missing(wanted, there) == gaps


@pytest.mark.parametrize("size", [1, 3, 4, 100])
def test_cut(size):
    ranges = [(0, 1), (3, 11), (12, 24)]
    pieces = cut(ranges, size)
    indices = [i for start, stop in pieces for i in range(start, stop)]
    assert indices == [i for start, stop in ranges for i in range(start, stop)]
    assert all(start < stop for start, stop in pieces)
    assert all(start // size == (stop - 1) // size for start, stop in pieces)


# ---- the command, killed and under torchrun ------------------------------------------------------


def command(
    folder: Path, model: Path, n: int, *launcher: str, more: Sequence[str] = (), **options
) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    arguments = (
        *("sample", "--model", str(model), "-n", str(n), "--out", str(folder)),
        *("--shard-size", "2", "--precision", "fp32", "--engine", "eager", "--quiet"),
        *more,
    )
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, "fastddpm.cli", *arguments],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, **options,
    )  # fmt: skip


TWO_RANKS = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")


@pytest.mark.parametrize("launcher", [(), TWO_RANKS], ids=["alone", "torchrun"])
def test_a_killed_run_is_resumed(model, tmp_path, launcher):
    if launcher and not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    n = 24
    folder, saved = tmp_path / "shards", tmp_path / "model"
    save_model(model, saved)
    run = command(folder, saved, n, *launcher)
    deadline = time.monotonic() + 240
    while not list(folder.glob("*.npz")):
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(run.pid, signal.SIGKILL)
    if launcher:  # the ranks have sessions of their own
        _kill_ranks_of(folder)
    run.communicate()
    kept = {k: v for k, v in stamps(folder).items() if not k.startswith(".")}
    assert 1 <= len(kept) < n // 2, "the run ended before it was killed"

    again = command(folder, saved, n, *launcher)
    out, err = again.communicate(timeout=240)
    assert again.returncode == 0, err
    assert f"samples 0 .. {n - 1} of seed 0, {2 * len(kept)} of them there before" in out
    assert out.count("wrote") == 1  # one rank reports
    after = stamps(folder)
    assert {name: after[name] for name in kept} == kept
    assert_set(folder, model, n)


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--shard-size=2",), ("--shard-size=0",)], ids=str)
def test_a_set_of_a_run_that_is_killed_again_and_again_gets_whole(model, tmp_path, options):
    """20 times, at random moments of starting, drawing and writing; what is there is whole."""
    folder, saved, n = tmp_path / "set", tmp_path / "model", 60
    save_model(model, saved)
    moments, kills, kept = random.Random(0), 0, {}
    while True:
        run = command(folder, saved, n, more=options)
        try:
            _, err = run.communicate(timeout=moments.uniform(0.5, 6) if kills < 20 else 240)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            run.communicate()
            kills += 1
        else:
            assert run.returncode == 0, err
            if kills == 20:
                break
            for path in list(folder.iterdir())[::2]:  # it was too quick: some more to draw
                kept.pop(path.name, None)
                path.unlink()
        there = {k: v for k, v in stamps(folder).items() if k[0] != "."} if folder.exists() else {}
        assert kept.items() <= there.items()
        kept = there
        images = contents(folder) if folder.exists() else {}  # reads them all
        assert len(images) >= len(kept)
    assert not list(folder.glob(".*"))
    assert_set(folder, model, n)


@pytest.mark.slow
def test_processes_may_draw_into_one_folder(model, tmp_path):
    """All do the work; none takes the others' half-written files for a dead one's."""
    folder, saved, n = tmp_path / "set", tmp_path / "model", 200
    save_model(model, saved)
    runs = [command(folder, saved, n, more=("--shard-size=0",)) for _ in range(3)]
    for run in runs:
        _, err = run.communicate(timeout=240)
        assert run.returncode == 0, err
    assert not list(folder.glob(".*"))
    assert_set(folder, model, n)


def _kill_ranks_of(folder: Path) -> None:
    """Every process whose command line names the folder."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            named = str(folder).encode() in path.read_bytes()
        except OSError:
            continue
        if named:
            os.kill(int(path.parent.name), signal.SIGKILL)


def test_the_command_refuses_another_set_in_one_line(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_model(model, tmp_path / "model")
    arguments = ["sample", "--model=model", "--n=1", "--out=x", "--quiet"]
    assert cli.main(arguments) == 0
    assert cli.main([*arguments, "--seed=5"]) == 2
    assert "its seed is 0 and here 5; give another folder\n" in capsys.readouterr().err
    assert cli.main([*arguments[:-2], "--out=x.npz", "--shard-size=2"]) == 2
    assert "--shard-size is for an --out that is a folder; got 'x.npz'" in capsys.readouterr().err


def test_an_existing_folder_is_one_whatever_its_name(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(model, tmp_path / "model")
    (tmp_path / "old.png").mkdir()
    assert cli.main(["sample", "--model=model", "--n=1", "--out=old.png", "--quiet"]) == 0
    assert sorted(stamps(tmp_path / "old.png")) == ["000000.png"]


# ---- files that others left ----------------------------------------------------------------------


def _saying(path: Path, text: str) -> None:
    about = PngInfo()
    about.add_text("fastddpm", text)
    Image.new("L", (8, 8)).save(path, format="PNG", pnginfo=about)


@pytest.mark.parametrize("text", ["[1]", '"abc"', "5"])
def test_a_picture_that_says_something_else_is_of_another_set(tmp_path, model, text):
    _saying(tmp_path / "000000.png", text)
    with pytest.raises(ValueError, match=r"000000\.png does not say what drew it"):
        sample_to_folder(model, tmp_path, 1, **OPTIONS)


@pytest.mark.parametrize("damage", ["nested", "bomb", "deflate", "scalar"])
def test_damaged_files_of_every_kind_are_drawn_again(tmp_path, model, damage):
    picture, shard = tmp_path / "000000.png", tmp_path / "00000000-00000001.npz"
    if damage == "nested":
        _saying(picture, "[" * 100_000)
    elif damage == "bomb":
        head = b"IHDR" + struct.pack(">2I5B", 30_000, 30_000, 8, 0, 0, 0, 0)
        picture.write_bytes(
            b"\x89PNG\r\n\x1a\n\0\0\0\x0d" + head + struct.pack(">I", zlib.crc32(head))
        )
    elif damage == "deflate":
        x = np.random.default_rng(0).integers(0, 255, (1, 8, 8, 3), dtype=np.uint8)
        np.savez_compressed(shard, images=x, about=np.array("{}"))
        content = bytearray(shard.read_bytes())
        content[60:64] = b"\xff" * 4
        shard.write_bytes(content)
    else:
        np.savez(shard, images=np.uint8(3), about=np.array("{}"))
    size = 0 if picture.exists() else 1
    assert sample_to_folder(model, tmp_path, 1, shard_size=size, **OPTIONS) == 1
    assert_set(tmp_path, model, 1)


@pytest.mark.parametrize("kind", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("name", ["000000.png", "00000000-00000001.npz"])
def test_what_is_no_file_is_named_and_not_waited_for(tmp_path, model, name, kind):
    kind(tmp_path / name)
    with five_seconds(), pytest.raises(ValueError, match=f"{name} is no regular file"):
        sample_to_folder(model, tmp_path, 1, **OPTIONS)
