"""A run's identity and its folder: what goes on is the run that was stopped, on its own data, by
one process, and nothing else is written over."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import five_seconds
from safetensors.torch import save_file
from test_cli import call, model, refused, row  # noqa: F401
from test_training import SHORT, assert_same, log, quick, state, steps_done, trainer  # noqa: F401
from test_training import command as resume_command
from test_training import start as start_run
from toy import SCHEDULE, images, tiny_unet

from fastddpm import Diffusion, UNet, checkpoint, cli, figures, folder_lock
from fastddpm.checkpoint import CONFIG, WEIGHTS, read_json, read_tensors, write_json, write_tensors
from fastddpm.data import open_dataset
from fastddpm.data.identity import Fingerprint
from fastddpm.training import run_folder, run_log
from fastddpm.training.run import STATE, Trainer, fit

RUN = ("--batch-size=2", "--sample-every=0", "--preset=fashion-mnist", "--quiet")
pytestmark = pytest.mark.filterwarnings("ignore:.*arrays keep their size")


def save_pictures(folder: Path, pictures: torch.Tensor) -> None:
    folder.mkdir(exist_ok=True)
    for k, image in enumerate(pictures):
        figures.save_image(figures.to_pil(image), folder / f"{k}.png")


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- the data ------------------------------------------------------------------------------------


def test_a_fingerprint_is_of_the_pixels_alone(tmp_path, monkeypatch):
    x = images(5, 1, 6, 5)
    np.savez(tmp_path / "a.npz", images=x.numpy())
    np.save(tmp_path / "b.npy", np.asfortranarray(x.numpy()))
    save_pictures(tmp_path / "c", x)
    known = Fingerprint()
    known.add(x.numpy())
    kinds = [
        open_dataset(tmp_path / "a.npz"),
        open_dataset(tmp_path / "b.npy"),
        open_dataset(tmp_path / "b.npy", memory_limit=0),
        open_dataset(tmp_path / "c"),
        open_dataset(tmp_path / "c", memory_limit=0),
    ]
    for dataset in kinds:
        assert dataset.fingerprint() == known.hexdigest()
    monkeypatch.setattr("fastddpm.data.dataset.CHUNK", 50)  # whatever is read at a time
    assert open_dataset(tmp_path / "a.npz").fingerprint() == known.hexdigest()
    assert kinds[0].fingerprint() is kinds[0].fingerprint()


@pytest.mark.filterwarnings("ignore:.*are grey and are read as colours")
def test_a_fingerprint_of_grey_and_coloured_pictures_is_that_of_what_is_trained_on(tmp_path):
    for k, channels in enumerate((1, 3, 1, 3)):
        picture = figures.to_pil(images(channels, 6, 5, seed=k))
        figures.save_image(picture, tmp_path / f"{k}.png")
    kept, encoded = (open_dataset(tmp_path, memory_limit=limit) for limit in (1 << 20, 0))
    pixels = Fingerprint()
    pixels.add(kept.images(range(4)).numpy())
    assert kept.shape == (3, 6, 5)
    assert kept.fingerprint() == encoded.fingerprint() == pixels.hexdigest()


def test_a_fingerprint_sees_every_change():
    def of(x: np.ndarray) -> str:
        fingerprint = Fingerprint()
        fingerprint.add(x)
        return fingerprint.hexdigest()

    x = images(4, 1, 6, 4).numpy()
    changed = x.copy()
    changed[3, 0, 5, 3] ^= 1
    variants = [x, changed, x[:3], x[::-1], x.reshape(4, 1, 4, 6), x.reshape(2, 2, 6, 4),
                x.transpose(0, 1, 3, 2), x[:0], np.concatenate((x, x))]  # fmt: skip
    assert len({of(v) for v in variants}) == len(variants)


def test_a_run_goes_on_with_its_own_data_alone(tmp_path, quick):  # noqa: F811
    x = images(20, 1, 8, 8).numpy()
    np.savez(tmp_path / "data.npz", images=x)
    out = tmp_path / "run"
    fit(trainer(tiny_unet()), open_dataset(tmp_path / "data.npz"), out, **SHORT, steps=2)
    before, resumed = snapshot(out), trainer(tiny_unet(seed=1))
    untouched = resumed.model.conv_in.weight.clone()
    pixel = x.copy()
    pixel[7, 0, 3, 3] ^= 128
    for other in (
        pixel,
        x[:16],
        np.concatenate((x, x[:4])),
        np.ascontiguousarray(x[::-1]),
        np.ascontiguousarray(x.reshape(20, 1, 4, 16)),
        images(20, 1, 8, 8, seed=9).numpy(),
    ):
        np.savez(tmp_path / "data.npz", images=other)
        with pytest.raises(ValueError, match=f"{STATE}: data: .* there and .* here"):
            fit(resumed, open_dataset(tmp_path / "data.npz"), out, **SHORT, steps=4, resume=True)
        assert snapshot(out) == before
        assert torch.equal(resumed.model.conv_in.weight, untouched)
    # The same pixels under another name and in another form are the same data.
    save_pictures(tmp_path / "moved", torch.from_numpy(x))
    fit(resumed, open_dataset(tmp_path / "moved"), out, **SHORT, steps=4, resume=True)
    assert resumed.step_count == 4


@pytest.mark.parametrize("data", ["pictures", "link"])
@pytest.mark.parametrize("out", ["pictures", "pictures/run", "link/run", "pictures/a/../b", "."])
def test_a_runs_folder_is_not_within_its_data(refused, tmp_path, data, out):  # noqa: F811
    save_pictures(tmp_path / "pictures", images(4, 1, 8, 8))
    (tmp_path / "link").symlink_to("pictures")
    before = snapshot(tmp_path)
    data = "." if out == "." else data
    assert "must be apart" in refused("train", f"--data={data}", f"--out={out}", *RUN, "--steps=1")
    assert snapshot(tmp_path) == before
    with pytest.raises(ValueError, match="must be apart"):
        fit(trainer(tiny_unet()), open_dataset(data), out, **SHORT, steps=1)
    assert snapshot(tmp_path) == before
    # Nor are the pictures that it makes.
    with pytest.raises(ValueError, match="must be apart"):
        run_folder.check_apart("x/samples/old", "x")
    run_folder.check_apart("x/data", "x")
    run_folder.check_apart(data, tmp_path.parent / "elsewhere")


# ---- the model and the recipe --------------------------------------------------------------------


ARGUMENTS = (
    "train", "--data=data.npz", "--out=run", "--batch-size=2", "--sample-every=0", "--lr=0.001",
    "--precision=fp32", "--warmup=500", "--ema-decay=0.9995", "--quiet",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of two steps of the command line, and of its data."""
    folder = tmp_path_factory.mktemp("finished")
    np.savez(folder / "data.npz", images=images(6, 1, 8, 8).numpy())
    with _chdir(folder):
        assert cli.main([*ARGUMENTS, "--preset=fashion-mnist", "--steps=2"]) == 0
    return folder


@contextlib.contextmanager
def _chdir(folder):  # contextlib's is Python 3.11's
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, and the arguments to go on with it."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    again = (*ARGUMENTS, "--resume", "--steps=3", "--preset=fashion-mnist")
    return tmp_path / "run", again


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--schedule=cosine"], "--schedule is {'kind': 'linear'.* there and {'kind': 'cosine'"),
        (["--prediction=x0"], "--prediction is 'eps' there and 'x0' here"),
        (["--variance=fixed_small"], "--variance is 'fixed_large' there and 'fixed_small' here"),
        (["--loss=vlb"], "--loss is 'simple' there and 'vlb' here"),
        (["--variance=learned", "--loss=vlb"], "--variance is 'fixed_large' there"),
        (["--preset=cifar10"], "--preset cifar10: dropout is 0.0 there and 0.1 here"),
        (["--preset=lsun-bedroom"], "--preset lsun-bedroom: channel_mult is .1, 2, 3. there and "),
        (["--channels=3"], "has 1 channels; got channels=3"),
        (["--seed=1"], "seed is 0 there and 1 here"),
        (["--precision=bf16"], "precision is 'fp32' there and 'bf16' here"),
    ],
)
def test_resume_with_another_recipe_is_an_error(run, refused, arguments, message):  # noqa: F811
    out, again = run
    before = snapshot(out)
    line = refused(*again, *arguments)
    assert re.search(message, line), line
    assert snapshot(out) == before


def test_resume_takes_what_is_not_asked_for_from_the_run_and_what_is_the_same(run, call):  # noqa: F811
    _, again = run
    same = ("--schedule=linear", "--prediction=eps", "--variance=fixed_large", "--loss=simple")
    assert row(call(*again, *same), "steps") == "3, 6 images"
    assert row(call(*again, "--steps=4"), "steps") == "4, 8 images"


def test_resume_without_the_preset_names_it(run, refused):  # noqa: F811
    """Its default is not what the run was begun with: "ema_warmup is True there and False here". A
    run that wrote its recipe needs no word of it."""
    out, again = run
    (out / run_folder.RECIPE).unlink()
    before = snapshot(out)
    line = refused(*(word for word in again if not word.startswith("--preset")))
    assert "the run's model is not that of cifar10" in line
    assert "add --preset fashion-mnist, as it was begun with" in line
    assert snapshot(out) == before


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("norm_eps", 1e-5),
        ("dropout", 0.1),
        ("head_dim", 8),
        ("num_groups", 4),
        ("freq_shift", 0),
        ("downsample_padding", 1),
        ("flip_sin_to_cos", True),
        ("image_size", [8, 16]),
    ],
)
def test_an_edited_config_is_another_model(run, refused, field, value):  # noqa: F811
    out, again = run
    config = read_json(out / CONFIG)
    assert config["unet"][field] != value
    config["unet"][field] = value
    config.pop("digest", None)
    write_json(out / CONFIG, config)
    before = snapshot(out)
    line = refused(*again)
    assert f"model: {field} is" in line or f": {field} is" in line or "images of shape" in line
    assert snapshot(out) == before


def test_another_network_of_the_same_shapes_is_another_model(tmp_path):
    def net(eps: float, rate: float) -> torch.nn.Module:
        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.one, self.drop = torch.nn.Conv2d(1, 1, 1), torch.nn.Dropout(rate)
                self.norm = torch.nn.GroupNorm(1, 1, eps)

            def forward(self, x, t):
                return self.norm(self.drop(self.one(x)))

        return Net()

    trainer(net(1e-5, 0.1)).save(tmp_path)
    trainer(net(1e-5, 0.1)).load(tmp_path)
    for other in (net(1e-6, 0.1), net(1e-5, 0.2)):
        with pytest.raises(ValueError, match=r"model is '.*' there and '.*' here"):
            trainer(other).load(tmp_path)
    frozen = net(1e-5, 0.1)
    frozen.one.bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"frozen is \[\] there and \['one.bias'\] here"):
        trainer(frozen).load(tmp_path)


def test_another_number_of_threads_is_told_of(tmp_path):
    run = trainer()
    run.save(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer().load(tmp_path)
        run.step(images(2, 1, 6, 5))
        run.save(tmp_path)
        trainer().load(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.warns(UserWarning, match=f"threads was {threads} and is {threads + 1}"):
            trainer().load(tmp_path)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("count", [10**30, -1, 2**63, 1.5, True, None, "3"])
@pytest.mark.parametrize("name", ["step_count", "example_count"])
def test_counts_that_are_none_are_refused(tmp_path, name, count):
    run = trainer()
    run.save(tmp_path)
    tensors, metadata = read_tensors(tmp_path / STATE)
    settings = {**json.loads(metadata["trainer"]), name: count}
    write_tensors(tmp_path / STATE, tensors, {"trainer": json.dumps(settings)})
    with pytest.raises(ValueError, match=f"{STATE}: {name} must be"):
        run.load(tmp_path)


def test_a_state_without_its_digest_was_edited(tmp_path):
    """Its counts, moments and averages could be anything: 2^61 steps ended the run at once."""
    run = trainer(tiny_unet())
    run.step(images(2, 1, 8, 8))
    run.save(tmp_path)
    tensors, metadata = read_tensors(tmp_path / STATE)
    settings = {**json.loads(metadata["trainer"]), "step_count": 2**61}
    save_file(tensors, tmp_path / STATE, {"trainer": json.dumps(settings)})
    before = state(run)
    with pytest.raises(ValueError, match=r"is not as it was written: the digest .* is missing"):
        run.load(tmp_path)
    assert_same(state(run), before)


def test_a_state_that_is_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    path = tmp_path / STATE
    write_tensors(path, {"a": torch.zeros(3)})

    def replaced_meanwhile(*_):
        monkeypatch.undo()
        write_tensors(path, {"a": torch.ones(3)})
        return "sha256: of the header of one and the tensors of the other"

    monkeypatch.setattr(checkpoint.digest, "of_tensors", replaced_meanwhile)
    assert read_tensors(path)[0]["a"].tolist() == [1, 1, 1]


def flipped_bits_are_refused(tmp_path: Path, trials: int) -> None:
    def taken(t: Trainer):
        return {**state(t), **{f"b.{k}": v for k, v in t.model.named_buffers()}}

    run = trainer(tiny_unet(dropout=0.1))
    for k in range(2):
        run.step(images(2, 1, 8, 8, seed=k))
    run.save(tmp_path)
    good, content = taken(run), (tmp_path / STATE).read_bytes()
    header = int.from_bytes(content[:8], "little") + 8
    random, refused_ = np.random.default_rng(trials), 0
    other = trainer(tiny_unet(dropout=0.1, seed=1))
    other.step(images(2, 1, 8, 8))
    before = taken(other)
    for k in range(trials):
        at = int(random.integers(header) if k % 2 else random.integers(header, len(content)))
        damaged = bytearray(content)
        damaged[at] ^= 1 << int(random.integers(8))
        (tmp_path / STATE).write_bytes(damaged)
        with contextlib.suppress(ValueError):
            other.load(tmp_path)
            before = good  # a bit that says nothing: the state is as it was written
            refused_ -= 1
        assert_same(taken(other), before)
        refused_ += 1
    assert refused_ > 0.95 * trials


def test_flipped_bits_of_the_state_are_refused(tmp_path):
    flipped_bits_are_refused(tmp_path, 12)


@pytest.mark.slow
def test_many_flipped_bits_of_the_state_are_refused(tmp_path):
    flipped_bits_are_refused(tmp_path, 200)


# ---- the folder ----------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path):
    np.savez(tmp_path / "data.npz", images=images(20, 8, 8, 1).numpy())
    return open_dataset(tmp_path / "data.npz")


@pytest.mark.parametrize("kind", ["ours", "weights", "diffusers", "pipeline", "nonsense"])
def test_a_model_is_not_written_over(tmp_path, dataset, quick, refused, kind):  # noqa: F811
    out = tmp_path / "model"
    out.mkdir()
    if kind == "ours":
        tiny_unet().save_pretrained(out)
    name = {"weights": WEIGHTS, "pipeline": "model_index.json"}.get(kind, CONFIG)
    if kind != "ours":
        text = {"diffusers": '{"_class_name": "UNet2DModel"}', "nonsense": "{"}.get(kind, "{}")
        (out / name).write_text(text)
    before = snapshot(out)
    with pytest.raises(FileExistsError, match="holds a model"):
        fit(trainer(tiny_unet()), dataset, out, **SHORT, steps=1)
    assert "holds a model" in refused("train", "--data=data.npz", "--out=model", *RUN, "--steps=1")
    assert snapshot(out) == before


def test_one_run_at_a_time_writes_into_a_folder(tmp_path, dataset, quick):  # noqa: F811
    out, tried = tmp_path / "run", []
    run = trainer(tiny_unet())
    step = run.step

    def try_it_in_between(x0):
        for resume in [False, True] if (out / STATE).exists() else [False]:
            expected = FileExistsError if (out / STATE).exists() and not resume else BlockingIOError
            before = snapshot(out)
            with pytest.raises(expected) as error:
                fit(trainer(tiny_unet()), dataset, out, **SHORT, steps=9, resume=resume)
            tried.append(str(error.value))
            assert snapshot(out) == before
        return step(x0)

    run.step = try_it_in_between
    fit(run, dataset, out, **{**SHORT, "save_every": 1}, steps=3)
    in_use = f"in use by another training (process {os.getpid()} on "
    assert [in_use in text for text in tried] == [True, False, True, False, True]
    assert not (out / ".lock").exists()
    run.step = step
    fit(run, dataset, out, **SHORT, steps=4, resume=True)


def test_a_lock_ends_with_its_process(tmp_path):
    script = (
        "import sys, time; from pathlib import Path\n"
        "from fastddpm.training.run_folder import locked\n"
        "with locked(Path(sys.argv[1])): print('mine', flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], env=environment, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout.readline() == b"mine\n"
        with (
            pytest.raises(BlockingIOError, match=f"process {process.pid} on"),
            run_folder.locked(tmp_path),
        ):
            pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert (tmp_path / ".lock").exists()
    with run_folder.locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "_lock", lambda handle, wait: None)
    with pytest.warns(UserWarning, match="without locks"), run_folder.locked(tmp_path):
        pass


def test_a_stray_number_of_ranks_is_refused_in_words(refused, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("WORLD_SIZE", "4")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    line = refused("train", "--data=x.npz", "--out=run", *RUN)
    assert "WORLD_SIZE is 4 in the environment, but not RANK, MASTER_ADDR, MASTER_PORT" in line
    assert list(tmp_path.iterdir()) == []


def test_what_killed_runs_left_half_written_is_removed(tmp_path, dataset, quick):  # noqa: F811
    out = tmp_path / "run"
    (out / "samples").mkdir(parents=True)
    stale = [out / f".{name}.0123abcd" for name in (STATE, WEIGHTS, CONFIG, "log.csv", "loss.png")]
    stale.append(out / "samples" / ".step_000002.png.0123abcd")
    others = [out / ".hidden", out / ".notes.txt.0123abcd", out / "samples" / ".mine.png.0123abcd"]
    for path in (*stale, *others):
        path.write_bytes(b"half")
    fit(trainer(tiny_unet()), dataset, out, **SHORT, steps=1)
    assert not any(path.exists() for path in stale)
    assert all(path.exists() for path in others)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", ["log.csv", "loss.png", "samples", ".lock"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "loop"])
def test_what_is_in_the_way_of_a_run_is_named(tmp_path, dataset, quick, name, kind, resume):  # noqa: F811
    """Before a step is made that could not be written, and without waiting for it."""
    if (name, kind) == ("samples", "folder"):
        return  # as it should be
    run = tmp_path / "run"
    run.mkdir()
    if resume:
        (run / STATE).touch()
    path = run / name
    {"pipe": os.mkfifo, "folder": os.mkdir, "loop": lambda p: p.symlink_to(p.name)}[kind](path)
    before = sorted(run.iterdir())
    with five_seconds(), pytest.raises(ValueError, match=rf"{re.escape(str(path))} is no "):
        fit(trainer(tiny_unet()), dataset, run, **{**SHORT, "steps": 1, "resume": resume})
    assert sorted(run.iterdir()) == before


@pytest.mark.parametrize("file", [4, 5, 6, 7])
def test_a_disk_that_is_full_in_the_middle_of_a_checkpoint_loses_nothing(
    tmp_path, dataset, quick, monkeypatch, file  # noqa: F811
):  # fmt: skip
    """Two checkpoints are eight files: one of the second's does not get onto the disk."""
    out, options = tmp_path / "b", {**SHORT, "steps": 4, "save_every": 2}
    straight = trainer(tiny_unet())
    fit(straight, dataset, tmp_path / "a", **options)
    fsync, written = os.fsync, []

    def full(handle):
        if stat.S_ISREG(os.fstat(handle).st_mode):  # not a folder
            written.append(handle)
            if len(written) > file:
                raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device"):
            fit(trainer(tiny_unet()), dataset, out, **options)
    assert steps_done(out) == 2
    assert not list(out.rglob(".*"))
    UNet.from_pretrained(out)
    resumed = trainer(tiny_unet())
    fit(resumed, dataset, out, **options, resume=True)
    assert_same(state(resumed), state(straight))
    assert log(out) == log(tmp_path / "a")


def test_a_log_that_is_none_is_named(tmp_path, dataset, quick):  # noqa: F811
    out = tmp_path / "run"
    fit(trainer(tiny_unet()), dataset, out, **SHORT, steps=2)
    options = {**SHORT, "steps": 4, "resume": True}
    header = b"step,loss,images_per_second\n"
    for content in (
        b"",
        b"\0\1\2",
        b"\xff\xfe",
        b"a,b\n1,2\n",
        header + b"2,x,1\n",
        header + b"2,1",
    ):
        (out / "log.csv").write_bytes(content)
        before = snapshot(out)
        with pytest.raises(ValueError, match=r"run/log.csv can't be read near line \d:.* remove"):
            fit(trainer(tiny_unet()), dataset, out, **options)
        assert snapshot(out) == before
    (out / "log.csv").unlink()
    fit(trainer(tiny_unet()), dataset, out, **options)
    assert [step for step, _ in log(out)] == [4]


def test_a_run_that_was_killed_before_its_first_model_has_one_when_it_is_resumed(
    tmp_path, dataset, quick  # noqa: F811
):  # fmt: skip
    out = tmp_path / "run"
    fit(trainer(tiny_unet()), dataset, out, **SHORT, steps=2)
    weights, about = read_tensors(out / WEIGHTS)
    (out / WEIGHTS).unlink()
    fit(trainer(tiny_unet()), dataset, out, **SHORT, steps=2, resume=True)  # no step is left
    again, about_again = read_tensors(out / WEIGHTS)  # the order of a header's entries is open
    assert about_again == about
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_a_state_that_was_saved_by_hand_has_no_data_to_compare(tmp_path, dataset, quick):  # noqa: F811
    run = trainer(tiny_unet())
    run.step(dataset.images([0, 1, 2]))
    run.save(tmp_path / "run")
    with pytest.warns(UserWarning, match="was not saved by a run: its data can't be compared"):
        fit(trainer(tiny_unet()), dataset, tmp_path / "run", **SHORT, steps=2, resume=True)
    trainer(tiny_unet()).load(tmp_path / "run")  # a run's state by hand


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 9, 8)])
def test_data_that_does_not_fit_the_model_is_an_error_before_the_folder_is_made(tmp_path, shape):
    np.savez(tmp_path / "data.npz", images=images(4, *shape).numpy())
    run = trainer(tiny_unet())
    with pytest.raises(ValueError, match=r"data\.npz does not fit the model: "):
        fit(run, open_dataset(tmp_path / "data.npz"), tmp_path / "x", steps=1, **SHORT)
    assert not (tmp_path / "x").exists()


def test_a_process_that_can_not_be_saved_is_an_error_before_the_first_step(tmp_path, dataset):
    respaced = trainer(tiny_unet(), diffusion=Diffusion(SCHEDULE.respace(4)))
    with pytest.raises(ValueError, match="respaced schedule is not saved"):
        fit(respaced, dataset, tmp_path / "run", **SHORT, steps=1)
    assert respaced.step_count == 0
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is Linux")
@pytest.mark.parametrize("stderr", ["full", "closed", "none"])
def test_a_lost_stderr_does_not_stop_a_run(tmp_path, dataset, quick, monkeypatch, stderr):  # noqa: F811
    with open("/dev/full", "w", buffering=1) as full:
        if stderr == "closed":
            full.close()
        monkeypatch.setattr(sys, "stderr", None if stderr == "none" else full)
        run = trainer(tiny_unet())
        fit(run, dataset, tmp_path / "run", **{**SHORT, "progress": True}, steps=3)
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()
    assert steps_done(tmp_path / "run") == 3


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX")
def test_a_run_that_is_killed_twenty_times_is_the_uninterrupted_run(tmp_path, monkeypatch):
    """At random moments: while it starts, reads, computes and writes, of runs of a few seconds."""
    monkeypatch.setattr(run_log, "loss_plot", lambda *_: None)
    data = tmp_path / "data.npz"
    np.savez(data, images=images(30, 1, 8, 8).numpy())
    steps = "--steps=400"

    def arguments(run: str) -> list[str]:
        return [*resume_command(data, tmp_path / run), steps, "--save-every=1"]

    for name in "ab":
        start_run(tmp_path / name)
    assert cli.main(arguments("a")) == 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    random, kills = np.random.default_rng(0), 0
    while kills < 20:
        process = subprocess.Popen(
            [sys.executable, "-m", "fastddpm.cli", *arguments("b")],
            cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        before, deadline = steps_done(tmp_path / "b"), time.monotonic() + 120
        while steps_done(tmp_path / "b") == before and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(float(random.random()) * 0.3)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        assert steps_done(tmp_path / "b") < 400, "too few steps for so many kills"
    assert cli.main(arguments("b")) == 0
    (expected, ended), (got, resumed) = (read_tensors(tmp_path / run / STATE) for run in "ab")
    assert resumed == ended
    assert_same(got, expected)
    assert_same(*(read_tensors(tmp_path / run / WEIGHTS)[0] for run in "ab"))
    assert not list((tmp_path / "b").rglob(".*"))
    UNet.from_pretrained(tmp_path / "b")
    checkpoint.read_json(tmp_path / "b" / CONFIG)
