"""The command line: what each command writes and says, and one line for every mistake."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import five_seconds
from PIL import Image
from toy import SCHEDULE, images, tiny_unet

import fastddpm
from fastddpm import cli, figures
from fastddpm.checkpoint import read_tensors, write_tensors
from fastddpm.cli import train as cli_train
from fastddpm.data import open_dataset
from fastddpm.pretrained import save_model
from fastddpm.sampling import draw_shared_latent
from fastddpm.training.run import STATE

T = SCHEDULE.T


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """The folder of a tiny model; tests that damage it work on a copy."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(tiny_unet(), folder)
    return folder


@pytest.fixture
def call(tmp_path, monkeypatch, capsys, model):
    """Run a command in tmp_path; returns its report, and the exit code has to be 0."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> str:
        assert cli.main(list(map(str, arguments))) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Run a command that has to fail with one line; returns the line."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> str:
        assert cli.main([*map(str, arguments), "--quiet"]) == 2
        out, err = capsys.readouterr()
        assert err.endswith("\n")
        assert err.count("\n") == 1, err
        assert err.startswith("fastddpm: error: ")
        assert "wrote" not in out
        return err

    return run


def samples(model: Path, n: int, **options) -> np.ndarray:
    """What `sample` should have written, (n, H, W, C) uint8."""
    x = fastddpm.sample(fastddpm.UNet.from_pretrained(model), n, progress=False, **options)
    return figures.to_uint8(x).permute(0, 2, 3, 1).numpy()


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def row(report: str, name: str) -> str:
    match = re.search(rf"^{name} +(.*?) *$", report, re.MULTILINE)
    assert match, f"no {name!r} in\n{report}"
    return match[1]


# ---- sample --------------------------------------------------------------------------------------


def test_sample_writes_a_grid(call, model, tmp_path):
    report = call("sample", "--model", model, "--n", 5, "--seed", 3, "--quiet")
    x = fastddpm.sample(fastddpm.UNet.from_pretrained(model), 5, seed=3, progress=False)
    assert np.array_equal(picture(tmp_path / "samples.png"), np.asarray(figures.grid(x)))
    assert row(report, "wrote") == "samples.png"
    assert row(report, "images") == "samples 0 .. 4 of seed 3"
    assert row(report, "chain") == f"ddpm, {T} steps"
    assert re.fullmatch(r"\d+\.\d s, \d+\.\d\d images/s", row(report, "time"))
    assert re.match(r"engine cpu_plan, (fp32|bf16), cpu with \d+ threads, ", row(report, "ran"))


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["--seed=7"], {"seed": 7}),
        (["--first-index=3"], {"first_index": 3}),
        (["--steps=4"], {"steps": 4}),
        (["--steps=2,2"], {"steps": "2,2"}),
        (["--steps=4", "--spacing=trailing"], {"steps": 4, "spacing": "trailing"}),
        (["--sampler=ddim"], {"sampler": "ddim"}),
        (["--sampler=ddim", "--eta=0.5"], {"sampler": "ddim", "eta": 0.5}),
        (["--no-clip"], {"clip": False}),
        (["--precision=fp32"], {"precision": "fp32"}),
        (["--precision=bf16"], {"precision": "bf16"}),
        (["--batch-size=2"], {"batch_size": 2}),
    ],
)
def test_every_option_of_sample_arrives(call, model, tmp_path, arguments, options):
    report = call("sample", "--model", model, "--n=3", "--out=x.npz", "--quiet", *arguments)
    with np.load(tmp_path / "x.npz") as file:
        assert np.array_equal(file["images"], samples(model, 3, **options))
        differs = not np.array_equal(file["images"], samples(model, 3))
    assert differs or "batch_size" in options or "precision" in options
    if "precision" in options:
        assert f", {options['precision']}, " in row(report, "ran")
    if "steps" in options:
        assert row(report, "chain") == "ddpm, 4 steps"


def test_sample_writes_a_folder_that_can_be_continued(call, model, tmp_path):
    call("sample", "--model", model, "--n=2", "--out=all", "--precision=fp32", "--quiet")
    call(
        "sample",
        "--model",
        model,
        "--n=1",
        "--first-index=2",
        "--out=all",
        "--precision=fp32",
        "--quiet",
    )
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == [
        "000000.png", "000001.png", "000002.png",
    ]  # fmt: skip
    expected = samples(model, 3, precision="fp32")
    for k in range(3):
        got = picture(tmp_path / "all" / f"{k:06d}.png").astype(int)
        assert np.abs(got - expected[k, :, :, 0]).max() <= 1  # a batch of another size


def test_threads_are_set(call, model):
    before = torch.get_num_threads()
    try:
        report = call("sample", "--model", model, "--n=1", "--steps=1", "--threads=2", "--quiet")
        assert torch.get_num_threads() == 2
        assert "cpu with 2 threads" in row(report, "ran")
    finally:
        torch.set_num_threads(before)


def test_progressive(call, model, tmp_path):
    report = call("sample", "--model", model, "--n=2", "--progressive", "--frames=4", "--quiet")
    assert row(report, "images").endswith("at t = 12, 8, 5, 1")
    _, x0, _ = fastddpm.sample_progressive(
        fastddpm.UNet.from_pretrained(model), 2, frames=4, progress=False
    )
    expected = figures.labelled_grid(  # one image a row
        torch.cat((x0[:, 0], x0[:, 1])), columns=["12", "8", "5", "1"], corner="t",
        title="x0 predicted from x_t: DDPM, 12 steps, seed 0",
    )  # fmt: skip
    assert np.array_equal(picture(tmp_path / "samples.png"), np.asarray(expected))


def test_samples_that_begin_at_images(call, model, tmp_path):
    """One picture is for all samples; of a set each has its own."""
    several = images(4, 1, 8, 8)
    np.savez(tmp_path / "set.npz", images=several.numpy()[:, 0, ..., None])
    figures.save_image(figures.to_pil(several[2]), tmp_path / "one.png")
    for init, arguments, expected in (
        ("one.png", ["--n=3"], several[2:3].expand(3, 1, 8, 8)),
        ("set.npz", [], several),
        ("set.npz", ["--n=2", "--steps=6"], several[:2]),
    ):
        said = ["--model", model, "--quiet", "--out=x.npz", f"--init={init}", "--start=3"]
        report = call("sample", *said, *arguments)
        options = {"steps": 6} if "--steps=6" in arguments else {}
        with np.load(tmp_path / "x.npz") as file:
            x = samples(model, len(expected), init=expected, start=3, **options)
            assert np.array_equal(file["images"], x)
        assert row(report, "images").endswith(f"of seed 0, from {init} with 3 steps left")
    report = call(
        "sample", "--model", model, "--quiet", "--n=1", "--progressive", "--frames=2",
        "--init=one.png", "--start=4",
    )  # fmt: skip
    assert "at t = 4, 1, from one.png with 4 steps left" in row(report, "images")


def test_what_samples_can_not_begin_at(refused, model, tmp_path):
    np.savez(tmp_path / "small.npz", images=images(2, 7, 7, 1).numpy())
    np.savez(tmp_path / "set.npz", images=images(2, 8, 8, 1).numpy())
    figures.save_image(figures.to_pil(images(1, 8, 8)), tmp_path / "one.png")
    (tmp_path / "text.png").write_text("no picture")
    for arguments, message in (
        (["--init=one.png"], "--init needs --start"),
        (["--start=3"], "--start needs --init"),
        (["--init=nowhere.png", "--start=3"], "nowhere.png does not exist"),
        (["--init=one.png", "--start=13"], "start must be an integer in 1 .. 12; got 13"),
        (["--init=one.png", "--start=0"], "start must be an integer in 1 .. 12; got 0"),
        (["--init=one.png", "--start=5", "--steps=4"], "start must be an integer in 1 .. 4; got 5"),
        (["--init=one.png", "--start=3", "--n=0"], "n must be"),
        (["--init=set.npz", "--start=3", "--n=3"], "has 2 images, too few for --n 3"),
        (["--init=small.npz", "--start=3"], "has images 1x7x7; the model's are 1x8x8"),
        (["--init=text.png", "--start=3"], "text.png can't be read as an image"),
        (["--init=one.png", "--start=3", "--out=folder"], "--init is for an --out that is a .png"),
        (["--init=one.png", "--start=3", "--shared-latent"], "--shared-latent begins at x_T"),
        (["--steps=ddim", "--out=x.png"], "steps as a word must be 'ddimN'"),
        (["--steps=9,9", "--out=x.png"], "section 1 is of 6 of the 12 steps"),
        (["--steps=3,1", "--spacing=linspace"], "spacing='linspace' says how a number of steps"),
    ):
        assert message in refused("sample", f"--model={model}", *arguments)
    assert not list(tmp_path.glob("samples*"))


@pytest.mark.parametrize(("steps", "rows"), [(None, (12, 9, 6, 3)), (4, (4, 3, 2, 1))])
def test_shared_latent(call, model, tmp_path, steps, rows):
    arguments = [] if steps is None else [f"--steps={steps}"]
    report = call("sample", "--model", model, "--n=3", "--shared-latent", "--quiet", *arguments)
    assert f"at t = {', '.join(map(str, rows))} of {steps or T} steps" in row(report, "images")
    assert row(report, "chain") == f"ddpm, {steps or T} steps"
    x, latents = draw_shared_latent(
        fastddpm.UNet.from_pretrained(model), 3, t=rows, steps=steps, progress=False
    )
    expected = figures.labelled_grid(
        torch.cat((latents[:, None], x), 1).flatten(0, 1), [str(t) for t in rows],
        ["x_t", "samples", "", ""], corner="t", apart=(1,),
        title=f"Samples of p(x0 | x_t): DDPM, {steps or T} steps, seed 0",
    )  # fmt: skip
    assert np.array_equal(picture(tmp_path / "samples.png"), np.asarray(expected))


def test_interpolate(call, model, tmp_path):
    a, b = images(2, 1, 8, 8)
    for name, x in (("A.png", a), ("B.png", b)):
        figures.save_image(figures.to_pil(x), tmp_path / name)
    report = call("interpolate", "A.png", "B.png", "--model", model, "--n=3", "--t=4,9", "--quiet")
    assert row(report, "images").endswith("a row each at t = 4, 9")
    mixed = fastddpm.interpolate(
        fastddpm.UNet.from_pretrained(model), a, b, n=3, t=(4, 9), progress=False
    )
    rows = [torch.cat((a[None], figures.to_uint8(x), b[None])) for x in mixed]
    expected = figures.labelled_grid(
        torch.cat(rows), ["4", "9"], ["source", "0", "0.5", "1", "source"], corner="t \\ λ",
        apart=(1, 4), title="Interpolation: DDPM, seed 0",
    )  # fmt: skip
    assert np.array_equal(picture(tmp_path / "interpolation.png"), np.asarray(expected))


@pytest.mark.parametrize("channels", [2, 4])
def test_pictures_with_alpha(call, tmp_path, channels):
    save_model(tiny_unet(in_channels=channels), tmp_path / "model")
    call("sample", "--model=model", "--n=1", "--out=x", "--steps=2", "--quiet")
    call("sample", "--model=model", "--n=1", "--out=x.npz", "--steps=2", "--quiet")
    with np.load(tmp_path / "x.npz") as file:
        assert np.array_equal(picture(tmp_path / "x" / "000000.png"), file["images"][0])
    for name, x in zip(("A.png", "B.png"), images(2, channels, 8, 8), strict=True):
        figures.save_image(figures.to_pil(x), tmp_path / name)
    call("interpolate", "A.png", "B.png", "--model=model", "--n=1", "--t=2", "--quiet")
    row = picture(tmp_path / "interpolation.png")[:200, :200]
    enlarged = picture(tmp_path / "A.png").repeat(8, 0).repeat(8, 1)  # as far as it goes
    windows = np.lib.stride_tricks.sliding_window_view(row, enlarged.shape)
    assert (windows == enlarged).all(axis=(-3, -2, -1)).sum() == 1


# ---- train ---------------------------------------------------------------------------------------

SHORT = ("--batch-size=2", "--sample-every=0", "--preset=fashion-mnist", "--quiet")


@pytest.fixture
def data(tmp_path) -> Path:
    np.savez(tmp_path / "data.npz", images=images(6, 1, 8, 8).numpy())
    return tmp_path / "data.npz"


@pytest.mark.filterwarnings("ignore:.*arrays keep their size")
def test_train_and_resume(call, refused, data, tmp_path):
    out = tmp_path / "runs" / "x.1"
    arguments = ("train", f"--data={data}", f"--out={out}", *SHORT)
    report = call(*arguments, "--steps=2")
    assert row(report, "data").startswith("6 images 1x8x8")
    assert "preset fashion-mnist" in row(report, "model ")
    assert row(report, "steps") == "2, 4 images"
    state = (out / STATE).read_bytes()
    assert "add --resume" in refused(*arguments, "--steps=3")
    assert "lr is 0.001 there and 0.5 here" in refused(*arguments, "--resume", "--lr=0.5")
    assert "batches of 2; got batch_size 3" in refused(*arguments, "--resume", "--batch-size=3")
    assert (out / STATE).read_bytes() == state
    assert row(call(*arguments, "--steps=3", "--resume"), "steps") == "3, 6 images"
    # What was trained can be sampled from.
    call("sample", "--model", out, "--n=1", "--steps=2", "--quiet")


@pytest.mark.filterwarnings("ignore:.*arrays keep their size")
def test_every_option_of_train_arrives(call, data, tmp_path):
    out = tmp_path / "run"
    call(
        "train", f"--data={data}", f"--out={out}", *SHORT, "--steps=1", "--seed=5", "--lr=0.01",
        "--warmup=7", "--ema-decay=0.5", "--precision=fp32", "--schedule=cosine",
        "--prediction=x0", "--variance=learned", "--loss=vlb",
    )  # fmt: skip
    _, metadata = read_tensors(out / STATE)
    trainer = json.loads(metadata["trainer"])
    expected = {
        "seed": 5, "lr": 0.01, "warmup": 7, "ema_decay": 0.5, "ema_warmup": True, "flip": False,
        "precision": "fp32", "grad_clip": 1.0, "step_count": 1, "example_count": 2,
    }  # fmt: skip
    assert {name: trainer[name] for name in expected} == expected
    config = json.loads((out / "config.json").read_text())
    assert config["diffusion"]["schedule"]["kind"] == "cosine"
    assert {k: v for k, v in config["diffusion"].items() if k != "schedule"} == {
        "prediction": "x0", "variance": "learned", "loss": "vlb",
    }  # fmt: skip
    assert (config["unet"]["image_size"], config["unet"]["out_channels"]) == ([8, 8], 2)


@pytest.mark.filterwarnings("ignore:.*arrays keep their size")
def test_the_process_of_a_run_is_saved_and_goes_on(call, refused, data, tmp_path):
    out = tmp_path / "run"
    arguments = ("train", f"--data={data}", f"--out={out}", *SHORT)
    call(
        *arguments, "--steps=1", "--schedule=sigmoid", "--sigmoid-tau=0.9", "--prediction=v",
        "--variance=learned_range", "--loss=hybrid", "--loss-weight=min_snr", "--min-snr-gamma=3",
        "--rescale-timesteps",
    )  # fmt: skip
    process = json.loads((out / "config.json").read_text())["diffusion"]
    schedule = process.pop("schedule")
    assert (schedule["kind"], schedule["tau"], schedule["start"]) == ("sigmoid", 0.9, -3)
    assert process == {
        "prediction": "v", "variance": "learned_range", "loss": "hybrid",
        "loss_weight": "min_snr", "min_snr_gamma": 3, "rescale_timesteps": True,
    }  # fmt: skip
    recipe = json.loads((out / "recipe.json").read_text())["diffusion"]
    assert {name: recipe[name] for name in process} == process
    assert recipe["tau"] == 0.9
    call(*arguments, "--steps=2", "--resume")
    call(*arguments, "--steps=3", "--resume", "--min-snr-gamma=3")
    message = "--loss-weight is 'min_snr' there and 'none' here"
    assert message in refused(*arguments, "--steps=4", "--resume", "--loss-weight=none")
    call("sample", "--model", out, "--n=1", "--steps=2", "--quiet")


def test_a_run_on_pictures_is_resumed_at_its_own_size(call, tmp_path):
    (tmp_path / "pictures").mkdir()
    for k, image in enumerate(images(4, 1, 16, 12)):
        figures.save_image(figures.to_pil(image), tmp_path / "pictures" / f"{k}.png")
    arguments = ("train", "--data=pictures", "--out=run", *SHORT)
    report = call(*arguments, "--steps=1", "--image-size=8", "--channels=1")
    assert row(report, "data").startswith("4 images 1x8x8")
    assert row(call(*arguments, "--steps=2", "--resume"), "steps") == "2, 4 images"


def test_the_seed_of_train_sets_the_first_weights(call, data, tmp_path):
    weights = []
    for run, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(len(run))
        with pytest.warns(UserWarning, match="arrays keep their size"):
            call("train", f"--data={data}", f"--out={run}", *SHORT, "--steps=1", f"--seed={seed}")
        weights.append(read_tensors(tmp_path / run / STATE)[0]["model.conv_in.weight"])
    assert torch.equal(weights[0], weights[1])
    assert not torch.isclose(weights[0], weights[2]).any()


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n=0"], "n must be an integer of at least 1; got 0"),
        (["--n=-3"], "n must be"),
        (["--n=0", "--progressive"], "n must be"),
        (["--n=0", "--shared-latent"], "n must be"),
        (["--n=1", "--frames=0", "--progressive"], "frames must be"),
        (["--steps=0"], "steps must be an integer in 1 .. 12; got 0"),
        (["--steps=0", "--shared-latent"], "steps must be an integer in 1 .. 12; got 0"),
        (["--steps=13"], "steps must be"),
        (["--batch-size=0"], "batch_size must be"),
        (["--first-index=-1"], "first_index must be"),
        (["--first-index=9223372036854775808"], "first_index must be"),
        (["--seed=-1"], "seed must be"),
        (["--sampler=ddim", "--eta=7"], "eta = 7"),
        (["--threads=0"], "--threads must be at least 1; got 0"),
        (["--progressive", "--shared-latent"], "give one of them"),
        (["--out=x.jpg"], "'x.jpg': give a .png file"),
        (["--out=file/x.png"], "file is not a folder"),
        (["--out=file"], "file is not a folder"),
        (["--progressive", "--out=x.npz"], "'x.npz': give .png"),
        (["--model=nowhere"], "model 'nowhere': no such file or folder; give a folder with"),
        (["--model=."], "model '.': no config.json in it"),
    ],
)
def test_mistakes_of_sample(refused, model, tmp_path, monkeypatch, arguments, message):
    """Nothing is drawn, and what was there stays there."""
    for name in ("samples.png", "file"):
        (tmp_path / name).write_bytes(b"old")

    def drawn(*_):
        raise AssertionError("the model ran")

    monkeypatch.setattr(fastddpm.UNet, "forward", drawn)
    if not any(a.startswith("--model") for a in arguments):
        arguments = [f"--model={model}", *arguments]
    assert message in refused("sample", *arguments)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "samples.png"]
    assert {(tmp_path / name).read_bytes() for name in ("samples.png", "file")} == {b"old"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing key", "lacks 1 of .* keys, the first: conv_out.bias"),
        ("unknown key", "has 1 unknown keys, the first: surplus"),
        ("shape", r"conv_out.bias has shape \(2,\); this model's is \(1,\)"),
        ("cut", "model.safetensors is not a whole safetensors file"),
        ("no weights", "no such file: .*model.safetensors"),
        ("config", "config.json is not a readable JSON file"),
        ("list", "config.json must hold a JSON object; got list"),
        ("option", r"config.json: .*colour"),
        ("schedule", r"config.json: .*'schedule' is missing"),
    ],
)
def test_damaged_models(refused, tmp_path, damage, message):
    folder = tmp_path / "model"
    save_model(tiny_unet(), folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    tensors, _ = read_tensors(weights)
    content = json.loads(config.read_text())
    if damage == "missing key":
        del tensors["conv_out.bias"]
    elif damage == "unknown key":
        tensors["surplus"] = torch.zeros(1)
    elif damage == "shape":
        tensors["conv_out.bias"] = torch.zeros(2)
    elif damage == "option":
        content["unet"]["colour"] = "red"
    elif damage == "schedule":
        del content["diffusion"]["schedule"]
    write_tensors(weights, tensors)
    config.write_text(json.dumps([] if damage == "list" else content))
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-50])
    elif damage == "no weights":
        weights.unlink()
    elif damage == "config":
        config.write_text("{")
    (tmp_path / "x.png").write_bytes(b"old")
    assert re.search(message, refused("sample", "--model=model", "--out=x.png", "--n=1"))
    assert (tmp_path / "x.png").read_bytes() == b"old"


@pytest.mark.skipif(not os.path.exists("/proc/kmsg"), reason="no /proc/kmsg here")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_of_the_systems_is_not_waited_for(refused, tmp_path, name):
    save_model(tiny_unet(), tmp_path / "model")
    (tmp_path / "model" / name).unlink()
    (tmp_path / "model" / name).symlink_to("/proc/kmsg")
    with five_seconds():
        assert f"{name} is not a" in refused("sample", "--model=model")


def test_a_model_of_nan_leaves_the_old_samples(refused, tmp_path):
    broken = tiny_unet()
    with torch.no_grad():
        broken.conv_out.bias.fill_(torch.nan)
    save_model(broken, tmp_path / "model")
    (tmp_path / "x.npz").write_bytes(b"old")
    sample = ("sample", "--model=model", "--out=x.npz", "--n=2", "--precision=fp32")
    assert "2 of 2 images are not finite" in refused(*sample, "--engine=eager")
    assert "conv_out: its weights hold a NaN" in refused(*sample, "--engine=cpu_plan")
    assert (tmp_path / "x.npz").read_bytes() == b"old"


def test_five_channels_are_no_picture(refused, call, tmp_path, monkeypatch):
    save_model(tiny_unet(in_channels=5), tmp_path / "model")
    figures.save_image(figures.to_pil(images(1, 8, 8)), tmp_path / "A.png")
    call("sample", "--model=model", "--n=1", "--out=x.npz", "--steps=2", "--quiet")

    def drawn(*_, **__):
        raise AssertionError("something was drawn")

    monkeypatch.setattr("fastddpm.sampling.Chain.draw", drawn)
    monkeypatch.setattr("fastddpm.sampling.Chain.draw_batch", drawn)
    for command in (
        ("sample", "--out=x.png"),
        ("sample", "--out=pictures", "--n=2"),
        ("sample", "--out=x.png", "--progressive"),
        ("sample", "--out=x.png", "--shared-latent"),
        ("interpolate", "A.png", "A.png", "--t=2"),
    ):
        message = refused(*command, "--model=model")
        assert "images of 5 channels can't be a .png" in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["A.png", "model", "x.npz"]


def test_an_unwritable_output_is_found_before_anything_is_loaded(refused, tmp_path, monkeypatch):
    def loaded(*_, **__):
        raise AssertionError("something was loaded")

    monkeypatch.setattr(fastddpm.UNet, "from_pretrained", loaded)
    monkeypatch.setattr(cli_train, "open_dataset", loaded)
    (tmp_path / "file").write_bytes(b"old")
    for command in (
        ("sample", "--out=file/x.png"),
        ("interpolate", "a.png", "b.png", "--out=file/x.png"),
        ("train", "--data=data.npz", "--out=file/run"),
    ):
        assert "file is not a folder" in refused(*command)
    assert (tmp_path / "file").read_bytes() == b"old"


@pytest.mark.parametrize("name", ["x" * 250 + ".png", "/proc/x.png"])
def test_a_name_that_can_not_be_written_is_found_before_too(refused, tmp_path, monkeypatch, name):
    if not Path(name).parent.exists():
        pytest.skip("no /proc here")

    def loaded(*_, **__):
        raise AssertionError("something was loaded")

    monkeypatch.setattr(fastddpm.UNet, "from_pretrained", loaded)
    assert "can't be written to" in refused("sample", "--out", name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--t=0,13"], "t must be steps in 0 .. 12"),
        (["--t=3", "--n=0"], "n must be"),
        ([], "t must be steps in 0 .. 12; got [500]"),
    ],
)
def test_mistakes_of_interpolate(refused, model, tmp_path, arguments, message):
    for name, x in zip(("A.png", "B.png"), images(2, 1, 8, 8), strict=True):
        figures.save_image(figures.to_pil(x), tmp_path / name)
    assert message in refused("interpolate", "A.png", "B.png", f"--model={model}", *arguments)
    assert not (tmp_path / "interpolation.png").exists()


def test_interpolate_names_a_picture_that_is_none(refused, model, tmp_path):
    figures.save_image(figures.to_pil(images(1, 8, 8)), tmp_path / "A.png")
    (tmp_path / "text.png").write_text("text")
    arguments = ("--model", model, "--t=3")
    assert "text.png" in refused("interpolate", "A.png", "text.png", *arguments)
    assert "gone.png can't be read" in refused("interpolate", "gone.png", "A.png", *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data=nowhere"], "nowhere does not exist"),
        (["--data=empty"], "empty holds no images"),
        (["--data=data.npz", "--resume"], "nothing to resume"),
        (["--data=data.npz", "--steps=0"], "steps must be at least 1; got 0"),
        (["--data=data.npz", "--batch-size=0"], "batch_size must be at least 1; got 0"),
        (["--data=data.npz", f"--batch-size={10**12}"], "out of memory (it takes 448,000,"),
        (["--data=data.npz", f"--batch-size={2**62}"], "give a smaller --batch-size"),
        (["--data=data.npz", "--save-every=0"], "save_every must be at least 1; got 0"),
        (["--data=data.npz", "--sample-every=-1"], "sample_every must be at least 0; got -1"),
        (["--data=data.npz", "--lr=0"], "lr must be above 0; got 0"),
        (["--data=data.npz", "--ema-decay=1"], "ema_decay must be"),
        (["--data=data.npz", "--warmup=-1"], "warmup must be"),
        (["--data=data.npz", "--seed=-1"], "seed must be"),
        (["--data=data.npz", "--seed=99999999999999999999"], "seed must be"),
        (["--data=data.npz", "--image-size=0"], "image_size must be"),
        (["--data=data.npz", "--channels=3"], "data.npz has 1 channels; got channels=3"),
        (["--data=data.npz", "--variance=learned"], "'learned' needs loss='vlb' or 'hybrid'"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*arrays keep their size")
def test_mistakes_of_train(refused, data, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    options = ["--out=run", "--preset=fashion-mnist", "--steps=1", "--sample-every=0"]
    assert message in refused("train", *options, *arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["draw"],
        ["sample", "--precision=fp8"],
        ["sample", "--engine=warp"],
        ["sample", "--sampler=euler"],
        ["sample", "--n=2.5"],
        ["sample", "--device=toaster"],
        ["sample", "--device=meta"],
        ["interpolate", "A.png"],
        ["interpolate", "A.png", "B.png", "--t=1,x"],
        ["train", "--data=x"],
        ["train", "--data=x", "--out=run", "--preset=imagenet"],
        ["train", "--data=x", "--out=run", "--channels=2"],
    ],
)
def test_arguments_that_are_no_arguments(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert re.search(r"^fastddpm( \w+)?: error: ", capsys.readouterr().err, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


def test_cuda_without_a_device(capsys):
    with pytest.raises(SystemExit):
        cli.main(["sample", "--device=cuda"])
    assert "no CUDA device can be used here; give cpu" in capsys.readouterr().err


# ---- as a program --------------------------------------------------------------------------------


def program(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        [sys.executable, "-m", "fastddpm.cli", *map(str, arguments)],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_as_a_program(model, tmp_path):
    good = program("sample", "--model", model, "--n=2", "--out=x.npz", cwd=tmp_path)
    assert good.returncode == 0, good.stderr
    assert row(good.stdout, "wrote") == "x.npz"
    assert f"{T}/{T}" in good.stderr  # the progress bar
    assert len(open_dataset(tmp_path / "x.npz")) == 2  # and its samples are a data set

    before = (tmp_path / "x.npz").read_bytes()
    bad = program("sample", "--model", model, "--n=0", "--out=x.npz", cwd=tmp_path)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "fastddpm: error: n must be an integer of at least 1; got 0\n"
    assert (tmp_path / "x.npz").read_bytes() == before
