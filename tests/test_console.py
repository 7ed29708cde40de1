"""The command on streams that are closed, full, broken or of few signs, and out of memory."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_batching import ERRORS
from test_progress import STREAMS, Failing
from toy import images, tiny_unet

import fastddpm
from fastddpm import cli, console, figures, host
from fastddpm.cli import train as cli_train
from fastddpm.data import open_dataset
from fastddpm.pretrained import save_model
from fastddpm.training.run import STATE, fit


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder, with a model and images in it."""
    monkeypatch.chdir(tmp_path)
    save_model(tiny_unet(), tmp_path / "model")
    np.save(tmp_path / "data.npy", images(4, 1, 8, 8).numpy())
    return tmp_path


SAMPLE = ("sample", "--model=model", "-n=1", "--steps=1")
TRAIN = ("train", "--data=data.npy", "--preset=fashion-mnist", "--steps=1", "--batch-size=2",
         "--sample-every=0")  # fmt: skip


# ---- streams -------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "utf-8"])
def test_a_stdout_of_few_signs_is_no_error(folder, monkeypatch, encoding):
    written = io.BytesIO()
    stdout = io.TextIOWrapper(written, encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    name = "☃ \udcff €.png"  # a snowman, a byte that is no UTF-8, and a sign of cp1252
    assert cli.main([*SAMPLE, f"--out={name}"]) == 0
    assert cli.main(["doctor"]) == 0
    stdout.flush()
    text = written.getvalue().decode(encoding)
    snowman = "☃" if encoding == "utf-8" else "\\u2603"
    euro = "€" if encoding in ("utf-8", "cp1252") else "\\u20ac"
    assert f"{snowman} \\udcff {euro}.png" in text
    assert "bundled models" in text
    assert (folder / name).is_file()


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
def test_streams_that_fail_stop_no_work(folder, monkeypatch, stream):
    monkeypatch.setattr(sys, "stdout", stream())
    monkeypatch.setattr(sys, "stderr", stream())
    assert cli.main([*SAMPLE, "--out=x.png"]) == 0
    with Image.open(folder / "x.png") as image:
        image.load()
    assert cli.main([*SAMPLE, "--out=x.jpeg"]) == 2


@pytest.mark.filterwarnings("ignore:.*arrays keep their size")
@pytest.mark.parametrize("name", ["full later", "closed"])
def test_streams_that_fail_stop_no_training(folder, monkeypatch, name):
    monkeypatch.setattr(sys, "stdout", STREAMS[name]())
    monkeypatch.setattr(sys, "stderr", STREAMS[name]())
    assert cli.main([*TRAIN, "--out=run"]) == 0
    assert (folder / "run" / STATE).is_file()


def test_a_report_that_can_not_be_written_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Failing(OSError(errno.ENOSPC, "No space left"), 1))
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == "fastddpm: error: [Errno 28] No space left\n"
    monkeypatch.setattr(sys, "stdout", Failing(BrokenPipeError(errno.EPIPE, "Broken pipe"), 1))
    assert cli.main(["doctor"]) == 0  # `fastddpm doctor | head -1`


def program(command: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    """A line of the shell in which $F is the command."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "F": f"{sys.executable} -m fastddpm.cli"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        cwd=cwd, env={**environment, **variables}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


DRAW = "$F sample --model model -n 1 --steps 1 --out x.png"


def test_the_program_survives_full_streams(folder):
    done = program(f"{DRAW} >/dev/full 2>/dev/full", folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (folder / "x.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "code"),
    [
        (f"{DRAW} >&-", 0),
        (f"{DRAW} 2>&-", 0),
        (f"{DRAW} <&- >&- 2>&-", 0),
        (f"{DRAW} | true", 0),
        (f"{DRAW} 2>&1 | true", 0),
        (f"{DRAW} 2> >(true)", 0),
        ("$F doctor | true", 0),
        ("$F doctor >&-", 0),
        ("$F doctor >/dev/full", 2),
        ("$F --help | true", 0),
        ("$F --help >/dev/full", 0),
        ("$F --version >&-", 0),
        ("$F sample --out x.jpeg 2>&-", 2),
        ("$F sample --out x.jpeg 2>/dev/full", 2),
        ("$F sample --colour 2>/dev/full", 2),
    ],
)
def test_what_becomes_of_the_streams_is_no_exit_code(folder, command, code):
    done = program(command, folder)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    if DRAW in command:
        with Image.open(folder / "x.png") as image:
            image.load()


def test_a_warning_is_one_line(monkeypatch):
    stream = Failing(OSError("never"), 10**9)
    monkeypatch.setattr(sys, "stderr", stream)
    console.warn(RuntimeWarning("two\n lines"), RuntimeWarning, "file.py", 3)
    assert stream.getvalue() == "fastddpm: warning: two lines\n"


@pytest.mark.slow
def test_training_survives_a_reader_that_leaves(folder):
    command = " ".join(("$F", *TRAIN, "--out=run", "--steps=30"))
    done = program(f"{command} 2>&1 | head -c 60", folder)
    assert done.returncode == 0
    assert (folder / "run" / STATE).is_file()


def test_descriptors_that_are_closed_are_taken(monkeypatch):
    """A file that is opened next must not become stderr."""
    code = (
        "import os, sys; os.close(0); os.close(2)\n"
        "from fastddpm import console\n"
        "console.open_descriptors(); console.complain('x'); console.settle()\n"
        "sys.exit(os.open('.', os.O_RDONLY) < 3)"
    )
    path = str(Path(fastddpm.__file__).parent)
    code = code.replace(
        "from fastddpm import console", f"sys.path.insert(0, {path!r}); import console"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---- settings that are no settings ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("FASTDDPM_BACKEND", "must be one of 'auto', 'reference'"),
        pytest.param("FASTDDPM_ISA", "must be one of 'plain'", marks=pytest.mark.slow),
    ],
)
def test_a_misspelt_setting_is_one_line(tmp_path, name, message):
    if name == "FASTDDPM_ISA":
        pytest.importorskip("fastddpm._C")
    said = f"{name} {message}"
    done = program("$F doctor; $F sample -n 1 --steps 1 --quiet", tmp_path, **{name: "fast"})
    assert done.returncode == 2
    assert said in done.stdout.splitlines()[1]  # the report goes on, about what is known
    assert "bundled models" in done.stdout
    assert done.stderr.startswith(f"fastddpm: error: {said}")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "--out="], "argument --out: '' is no path"),
        (["sample", "--model="], "argument --model: '' is no path"),
        (["train", "--data=", "--out=run"], "argument --data: '' is no path"),
        (["train", "--data=data.npy", "--out="], "argument --out: '' is no path"),
        (["interpolate", "", "b.png"], "argument A.png: '' is no path"),
        (["train", "--data=d", "--out=r", "--image-size=8x"], "'8x': give an integer, or height"),
        (["train", "--data=d", "--out=r", "--image-size=8x8x8"], "'8x8x8': give an integer"),
        (["train", "--data=d", "--out=r", "--image-size="], "'': give an integer"),
        (["sample", "--timeout=soon"], "invalid float value: 'soon'"),
    ],
)
def test_arguments_that_are_none(folder, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert sorted(p.name for p in folder.iterdir()) == ["data.npy", "model"]


def test_the_library_does_not_write_into_the_current_folder_unasked(folder):
    with pytest.raises(ValueError, match="output ''"):
        fastddpm.sample_to_folder(tiny_unet(), "", 1, progress=False)
    with pytest.raises(ValueError, match="output ''"):
        figures.save_samples(torch.zeros(1, 1, 8, 8), "")
    with pytest.raises(ValueError, match="output ''"):
        tiny_unet().save_pretrained("")
    trainer = fastddpm.Trainer(tiny_unet())
    with pytest.raises(ValueError, match="output ''"):
        trainer.save("")
    with pytest.raises(ValueError, match="output ''"):
        fit(trainer, open_dataset(folder / "data.npy"), "", steps=1, progress=False)
    assert sorted(p.name for p in folder.iterdir()) == ["data.npy", "model"]


@pytest.mark.parametrize("threads", [0, -1, host.MOST_THREADS + 1, 20_000, 2**31, 2**70])
def test_threads_have_a_bound(folder, capsys, threads):
    before = torch.get_num_threads()
    assert cli.main([*SAMPLE, "--out=x.png", f"--threads={threads}"]) == 2
    bound = "at least 1" if threads < 1 else f"at most {host.MOST_THREADS} here"
    said = f"--threads must be {bound}; got {threads}"
    assert capsys.readouterr().err == f"fastddpm: error: {said}\n"
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("size", ["8x4", "8,4", "8X4"])
def test_an_image_size_may_be_height_and_width(folder, capsys, size):
    (folder / "pictures").mkdir()
    for k, image in enumerate(images(4, 1, 16, 12)):
        figures.save_image(figures.to_pil(image), folder / "pictures" / f"{k}.png")
    train = [*TRAIN, "--data=pictures", "--out=run", f"--image-size={size}", "--quiet"]
    assert cli.main(train) == 0
    assert "4 images 1x8x4" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["sample", "train", "interpolate"])
def test_a_stray_world_size_is_named_at_once(folder, monkeypatch, capsys, command):
    monkeypatch.setenv("WORLD_SIZE", "3")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    arguments = {"sample": SAMPLE, "train": (*TRAIN, "--out=run"), "interpolate": (
        "interpolate", "a.png", "b.png", "--model=model")}[command]  # fmt: skip
    assert cli.main(list(arguments)) == 2
    err = capsys.readouterr().err
    assert "WORLD_SIZE is 3" in err
    assert "unset WORLD_SIZE" in err
    assert sorted(p.name for p in folder.iterdir()) == ["data.npy", "model"]


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*arrays keep their size")
@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_no_memory_is_one_line_that_says_what_to_do(folder, monkeypatch, capsys, error):
    def raising(*_, **__):
        raise error

    monkeypatch.setattr(fastddpm, "sample", raising)
    monkeypatch.setattr(cli_train, "Trainer", raising)
    for command in (SAMPLE, (*TRAIN, "--out=run")):
        assert cli.main(list(command)) == 2
        err = capsys.readouterr().err.splitlines()[-1]
        assert err.startswith("fastddpm: error: out of memory (")
        assert "give a smaller --batch-size" in err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
@pytest.mark.parametrize("engine", ["cpu_plan", "eager"])
def test_limits_of_memory_give_images_or_one_line(folder, engine):
    """From limits that hold little more than the libraries to such that hold all."""
    fastddpm.UNet(channels=32, image_size=64).save_pretrained(folder / "large")
    peak = "open('/proc/self/status').read().split('VmPeak:')[1].split()[0]"
    command = [sys.executable, "-c", f"import fastddpm.cli; print({peak})"]
    imported = int(subprocess.check_output(command, text=True)) // 1024
    # Libraries that don't load say so by a traceback; what counts begins when they are there.
    begun = 'from fastddpm.cli import main; print("begun", flush=True); raise SystemExit(main())'
    sample = f"{sys.executable} -c '{begun}' sample --model large -n 8 --batch-size 8 --steps 1"
    codes = []
    for megabytes in range(imported + 20, imported + 2500, 200):  # below, theirs hang at times
        (folder / "x.npz").unlink(missing_ok=True)
        done = program(
            f"ulimit -v {megabytes * 1024}; {sample} --engine {engine} --precision fp32 "
            "--out x.npz --quiet", folder,
        )  # fmt: skip
        codes.append(done.returncode)
        assert (done.returncode == 0) == (folder / "x.npz").exists(), done.stderr
        loading = not done.stdout.startswith("begun") or "ImportError" in done.stderr
        if done.returncode != 0 and not loading:
            assert done.returncode == 2, (megabytes, done.stderr)
            assert "Traceback" not in done.stderr, (megabytes, done.stderr)
    assert codes[-1] == 0
