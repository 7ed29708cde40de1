"""Recipes: which options there are, what stands above what, and files that are none."""

from __future__ import annotations

import argparse
import inspect
import json
import os

import numpy as np
import pytest
import torch
from test_cli import call, model, refused, row  # noqa: F401
from toy import images

import fastddpm
from fastddpm import Diffusion, Schedule, Trainer, UNet
from fastddpm.checkpoint import read_json, read_tensors, write_json
from fastddpm.cli import command
from fastddpm.cli import train as cli_train
from fastddpm.training.presets import PRESETS
from fastddpm.training.recipe import NUMBERS_OF_SCHEDULES, OPTIONS, SCHEDULES, Recipe, read_recipe
from fastddpm.training.run import STATE, fit

SMALL = """
preset = "fashion-mnist"
[data]
path = "data.npz"
[model]
channels = 8
channel_mult = [1, 2]
attention_levels = []
num_groups = 4
[diffusion]
T = 12
beta_end = 0.35
[training]
steps = 2
batch_size = 2
precision = "fp32"
[run]
sample_every = 0
"""
pytestmark = pytest.mark.filterwarnings("ignore:.*arrays keep their size")


@pytest.fixture
def small(tmp_path):
    """A recipe of a run of two steps, in the folder of its data."""
    np.savez(tmp_path / "data.npz", images=images(6, 1, 8, 8).numpy())
    (tmp_path / "small.toml").write_text(SMALL)
    return tmp_path / "small.toml"


def parsed(*words: str) -> argparse.Namespace:
    return command._parser().parse_args(["train", "--out=run", *words])


def laid_over(folder, *words: str) -> Recipe:
    return cli_train._recipe(parsed(*words), folder / "run")[0]


# ---- the options ---------------------------------------------------------------------------------


def names(of, *without: str) -> set[str]:
    return set(inspect.signature(of).parameters) - set(without)


def test_every_option_of_the_library_is_one_of_a_recipe():
    sections = {section: {o.name for o in OPTIONS if o.section == section}
                for section in ("model", "diffusion", "training", "run")}  # fmt: skip
    of_data = ("image_size", "in_channels", "out_channels", "diffusion")
    assert sections["model"] == names(UNet, *of_data, "num_classes")  # a run's images have none
    numbers = set().union(*(names(getattr(Schedule, kind)) for kind in SCHEDULES))
    assert numbers == {"T", *NUMBERS_OF_SCHEDULES}
    assert sections["diffusion"] == names(Diffusion) | numbers
    of_trainer = names(Trainer, "model", "diffusion", "read_every", "record")
    assert sections["training"] == of_trainer | {"steps", "batch_size", "checkpoint_blocks"}
    evaluate = {f"evaluate_{name}" for name in ("every", "images", "steps")}
    of_fit = names(fit, "trainer", "dataset", "out", "held_out", "record", "resume", "progress")
    assert sections["run"] == of_fit - {"steps", "batch_size"} | evaluate


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_is_a_recipe_for_all_options(name):
    recipe, chosen = Recipe.of_preset(name), PRESETS[name]
    defaults = {k: p.default for k, p in inspect.signature(UNet).parameters.items()}
    for key, value in recipe.section("model").items():
        expected = chosen.model.get(key, defaults[key])
        assert value == (list(expected) if isinstance(expected, tuple) else expected)
    assert recipe["diffusion.variance"] == chosen.variance
    for key in ("batch_size", "lr", "warmup", "ema_decay", "ema_warmup", "grad_clip", "flip"):
        assert recipe[f"training.{key}"] == getattr(chosen, key)
    assert recipe.schedule().to_config() == Schedule.linear().to_config()


WORDS = {
    "--model-channels=24": ("model.channels", 24),
    "--channel-mult=1,3": ("model.channel_mult", [1, 3]),
    "--num-res-blocks=3": ("model.num_res_blocks", 3),
    "--attention-levels=0,1": ("model.attention_levels", [0, 1]),
    "--attention-levels=none": ("model.attention_levels", []),
    "--head-dim=8": ("model.head_dim", 8),
    "--head-dim=none": ("model.head_dim", None),
    "--num-heads=2": ("model.num_heads", 2),
    "--num-groups=4": ("model.num_groups", 4),
    "--norm-eps=1e-5": ("model.norm_eps", 1e-5),
    "--dropout=0.3": ("model.dropout", 0.3),
    "--downsample-padding=1": ("model.downsample_padding", 1),
    "--freq-shift=0": ("model.freq_shift", 0),
    "--flip-sin-to-cos": ("model.flip_sin_to_cos", True),
    "--scale-shift-norm": ("model.scale_shift_norm", True),
    "--resblock-updown": ("model.resblock_updown", True),
    "--schedule=cosine": ("diffusion.schedule", "cosine"),
    "--T=50": ("diffusion.T", 50),
    "--beta-start=1e-3": ("diffusion.beta_start", 1e-3),
    "--beta-end=0.1": ("diffusion.beta_end", 0.1),
    "--scaled": ("diffusion.scaled", True),
    "--beta=0.2": ("diffusion.beta", 0.2),
    "--cosine-s=0.1": ("diffusion.s", 0.1),
    "--beta-max=0.9": ("diffusion.beta_max", 0.9),
    "--prediction=x0": ("diffusion.prediction", "x0"),
    "--variance=learned": ("diffusion.variance", "learned"),
    "--variance=learned_range": ("diffusion.variance", "learned_range"),
    "--prediction=v": ("diffusion.prediction", "v"),
    "--loss=vlb": ("diffusion.loss", "vlb"),
    "--loss=hybrid": ("diffusion.loss", "hybrid"),
    "--loss-weight=min_snr": ("diffusion.loss_weight", "min_snr"),
    "--min-snr-gamma=4.5": ("diffusion.min_snr_gamma", 4.5),
    "--rescale-timesteps": ("diffusion.rescale_timesteps", True),
    "--schedule=sigmoid_betas": ("diffusion.schedule", "sigmoid_betas"),
    "--sigmoid-start=-2": ("diffusion.start", -2),
    "--sigmoid-end=2": ("diffusion.end", 2),
    "--sigmoid-tau=0.5": ("diffusion.tau", 0.5),
    "--steps=7": ("training.steps", 7),
    "--batch-size=9": ("training.batch_size", 9),
    "--accumulate=3": ("training.accumulate", 3),
    "--checkpoint-blocks": ("training.checkpoint_blocks", True),
    "--lr=1": ("training.lr", 1),
    "--warmup=0": ("training.warmup", 0),
    "--ema-decay=0.5": ("training.ema_decay", 0.5),
    "--no-ema-warmup": ("training.ema_warmup", False),
    "--grad-clip=inf": ("training.grad_clip", float("inf")),
    "--no-flip": ("training.flip", False),
    "--flip": ("training.flip", True),
    "--precision=bf16": ("training.precision", "bf16"),
    "--seed=4": ("training.seed", 4),
    "--data=d": ("data.path", "d"),
    "--held-out=test": ("data.held_out", "test"),
    "--image-size=8x4": ("data.image_size", (8, 4)),
    "--channels=1": ("data.channels", 1),
    "--save-every=5": ("run.save_every", 5),
    "--sample-every=0": ("run.sample_every", 0),
    "--evaluate-every=6": ("run.evaluate_every", 6),
    "--evaluate-images=7": ("run.evaluate_images", 7),
    "--evaluate-steps=8": ("run.evaluate_steps", 8),
    "--tensorboard": ("run.tensorboard", True),
}


def test_every_word_of_the_command_line_gives_its_option(tmp_path):
    assert {key for key, _ in WORDS.values()} == {option.key for option in OPTIONS}
    for word, (key, value) in WORDS.items():
        recipe = laid_over(tmp_path, word, *["--held-out=test"] * ("evaluate" in word))
        assert recipe[key] == value, word
        assert type(recipe[key]) is type(value), word


def test_the_command_line_stands_above_the_file_and_that_above_the_preset(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text('preset = "cifar10"\n[model]\ndropout = 0.2\n[training]\nlr = 1\nseed = 3\n')
    recipe = laid_over(tmp_path, f"--recipe={path}", "--lr=2", "--no-flip")
    of_preset = PRESETS["cifar10"]
    got = [recipe[f"training.{name}"] for name in ("lr", "seed", "flip", "steps", "batch_size")]
    assert got == [2, 3, False, of_preset.steps, of_preset.batch_size]
    assert recipe["model.dropout"] == 0.2
    assert recipe.preset == "cifar10"
    recipe = laid_over(tmp_path, f"--recipe={path}", "--preset=lsun-cat")
    assert (recipe.preset, recipe["training.batch_size"], recipe["training.lr"]) == (
        "lsun-cat",
        64,
        1,
    )
    assert laid_over(tmp_path).preset == "cifar10"


def test_another_schedule_has_its_own_numbers(tmp_path):
    path = tmp_path / "r.json"
    path.write_text('{"diffusion": {"schedule": "linear", "T": 20, "beta_end": 0.3}}')
    recipe = laid_over(tmp_path, f"--recipe={path}", "--beta-start=0.01")
    assert recipe.schedule().to_config() == Schedule.linear(20, 0.01, 0.3).to_config()
    recipe = laid_over(tmp_path, f"--recipe={path}", "--schedule=cosine", "--cosine-s=0.1")
    assert recipe.schedule().to_config() == Schedule.cosine(20, 0.1).to_config()
    with pytest.raises(
        ValueError, match="beta_start is none of the numbers of the schedule 'cosine'"
    ):
        laid_over(tmp_path, "--schedule=cosine", "--beta-start=0.01").schedule()
    with pytest.raises(ValueError, match="'constant', which are T, beta"):
        laid_over(tmp_path, "--schedule=constant", "--no-scaled").schedule()


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model]\nchanels = 3", "[model] has no 'chanels'; it may have channels, channel_mult, "),
        ("[model]\nlr = 3", "[model] has no 'lr'; lr stands in [training]; it may have channels"),
        ("[model]\nimage_size = 3", "the images have it: [data] image_size and channels choose"),
        ("lr = 0.1", "'lr' is no section; a recipe has preset, [data], [model], [diffusion], "),
        ("[optimiser]\nlr = 0.1", "'optimiser' is no section"),
        ("model = 3", "model must be a section [model]; got 3"),
        ("[model]\nchannels = 'x'", "[model] channels must be an integer; got 'x'"),
        ("[model]\nchannels = 3.0", "[model] channels must be an integer; got 3.0"),
        ("[model]\nchannels = true", "[model] channels must be an integer; got True"),
        ("[model]\nchannel_mult = [1, '2']", "must be a list of integers; got [1, '2']"),
        ("[model]\nchannel_mult = 2", "channel_mult must be a list of integers; got 2"),
        ("[model]\ndropout = 'much'", "[model] dropout must be a number; got 'much'"),
        ("[model]\ndropout = 2020-01-01", "[model] dropout must be a number; got datetime.date("),
        ("[training]\nflip = 0", "[training] flip must be true or false; got 0"),
        ("[training]\nprecision = 'fp8'", "must be one of 'auto', 'fp32', 'bf16'; got 'fp8'"),
        ("[diffusion]\nschedule = 'sine'", "one of 'linear', 'quadratic', 'constant', 'cosine'"),
        ("[data]\npath = ''", "[data] path must be a path; got ''"),
        ("[data]\nimage_size = [1, 2, 3]", "image_size must be an integer or [height, width]"),
        ("preset = 'imagenet'", "preset must be one of"),
        ("preset = 3", "preset must be a name in quotes; got 3"),
        ("[training]\nlr = 1\nlr = 2", "lr = 2 stands there twice"),
        ("[model]\n[training]\n[model]", "[model] stands there twice"),
        ("[model\nchannels = 3", "[model is no TOML"),
        ("[model]\nchannels: 3", "channels: 3 is no TOML"),
        ("[model]\nchannels = 0", "[model] channels must be a positive integer; got 0"),
        ("[model]\ndropout = 1", "[model] dropout must lie in [0, 1); got 1"),
        ("[training]\nlr = 0", "[training] lr must be above 0; got 0"),
        ("[training]\nseed = -1", "[training] seed must be at least 0; got -1"),
        ("[training]\nsteps = 0", "[training] steps must be at least 1; got 0"),
        ("[run]\nsave_every = 0", "[run] save_every must be at least 1; got 0"),
        ("[diffusion]\nT = 0", "[diffusion] T must be"),
        ("[diffusion]\nbeta_end = 1", "[diffusion] beta_end must"),
        ("[diffusion]\ns = 0.1", "[diffusion] s is none of the numbers of the schedule 'linear'"),
        ("[run]\nevaluate_every = 0\n[data]\nheld_out = 'data.npz'", "evaluate_every must be"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_file_is_one_line_that_names_it(small, refused, text, message):  # noqa: F811
    path = small.parent / "r.toml"
    path.write_text(text)
    before = sorted(os.listdir(small.parent))
    line = refused("train", "--out=run", f"--recipe={path}", "--data=data.npz")
    assert message in line
    assert f"{path}: " in line
    assert sorted(os.listdir(small.parent)) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"model": {"channels": 3, "channels": 4}}', "channels stands there twice"),
        (b'{"model": {}, "model": {}}', "model stands there twice"),
        (b"[1]", "it must be an object of data, model"),
        (b"{", "Expecting property name"),
        (b'{"model": ' * 100_000, "nested too deep"),
        (b"\xff\xfe", "can't decode byte 0xff"),
        (b'{"model": {"channels": 1e400}}', "channels must be an integer; got inf"),
        (b'{"model": {"channels": null}}', "channels must be an integer; got None"),
        (b'{"data": {"path": "\\ud800"}}', "path must be a path"),
        (b" " * 2**21, "it is longer than 1048576 bytes"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path, content, message):
    path = tmp_path / "r.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"r\.json: ") as error:
        read_recipe(path)
    assert message in str(error.value)


def test_a_recipe_that_is_no_file(tmp_path, refused):  # noqa: F811
    (tmp_path / "d.toml").mkdir()
    cases = {
        "gone.toml": "no such file: gone.toml", "r.yaml": "a .toml or a .json",
        ".": "a .toml or a .json", "d.toml": "not a regular file",
    }  # fmt: skip
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "p.toml")  # which would be waited for
        cases["p.toml"] = "not a regular file"
    for name, message in cases.items():
        assert message in refused("train", "--out=run", "--data=x", f"--recipe={name}")
    assert "there is no data: give --data" in refused("train", "--out=run")


# ---- runs ----------------------------------------------------------------------------------------


def same_run(a, b) -> None:
    (one, its), (other, others) = (read_tensors(out / STATE) for out in (a, b))
    assert json.loads(its["trainer"]) == json.loads(others["trainer"])
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_writes_the_recipe_that_makes_it_again(small, call, refused, monkeypatch):  # noqa: F811
    folder = small.parent
    words = ("--no-flip", "--dropout=0.1", "--seed=3", "--lr=0.01", "--head-dim=none", "--quiet")
    call("train", "--recipe=small.toml", "--out=a", *words)
    written = read_json(folder / "a" / "recipe.json")
    assert written["fastddpm"] == fastddpm.__version__
    assert written["data"] == {
        "path": str(folder / "data.npz"),
        "image_size": [8, 8],
        "channels": 1,
    }
    assert (written["diffusion"]["beta_start"], written["diffusion"]["beta_end"]) == (1e-4, 0.35)
    config = read_json(folder / "a" / "config.json")["unet"]
    assert {**config, **written["model"]} == config
    # As a file, from elsewhere, and in TOML too.
    (folder / "elsewhere").mkdir()
    call("train", f"--recipe={folder}/a/recipe.json", "--out=b", "--quiet")
    same_run(folder / "a", folder / "b")
    again = read_json(folder / "b" / "recipe.json")
    assert again == written
    assert "gives every option: of --preset cifar10 nothing would be left" in refused(
        "train", "--recipe=a/recipe.json", "--out=c", "--preset=cifar10"
    )
    # And the run goes on with nothing said again, or with the same said again.
    assert (
        row(call("train", "--out=a", "--resume", "--steps=3", "--quiet"), "steps") == "3, 6 images"
    )
    same = ("--recipe=small.toml", *words, "--preset=fashion-mnist")
    call("train", "--out=b", "--resume", "--steps=3", *same)
    same_run(folder / "a", folder / "b")
    assert read_json(folder / "a" / "recipe.json")["training"]["steps"] == 3
    for other, message in (
        ("--dropout=0.2", "--dropout is 0.1 there and 0.2 here"),
        ("--flip", "flip is False there and True here"),
        ("--T=13", "--schedule is {'kind': 'linear', 'T': 12"),
        ("--preset=cifar10", "--preset is 'fashion-mnist' there and 'cifar10' here"),
        ("--channel-mult=1,2,2", "--channel-mult is [1, 2] there and [1, 2, 2] here"),
        ("--batch-size=3", "batches of 2; got batch_size 3"),
    ):
        assert message in refused("train", "--out=a", "--resume", "--steps=4", other)


def test_a_run_of_before_recipes_is_resumed_with_its_options_said_again(small, call, refused):  # noqa: F811
    words = ("train", "--recipe=small.toml", "--out=a", "--quiet")
    call(*words, "--lr=0.01")
    (small.parent / "a" / "recipe.json").unlink()
    assert "lr is 0.01 there and 0.001 here" in refused(*words[:-1], "--resume", "--steps=3")
    assert row(call(*words, "--resume", "--steps=3", "--lr=0.01"), "steps") == "3, 6 images"
    assert read_json(small.parent / "a" / "recipe.json")["training"]["lr"] == 0.01


def test_a_recipe_of_the_users_in_the_runs_folder_is_not_written_over(small, call, refused):  # noqa: F811
    out = small.parent / "a"
    out.mkdir()
    mine = {"training": {"steps": 1}}
    write_json(out / "recipe.json", mine)
    words = ("train", "--recipe=small.toml", "--out=a")
    assert "recipe.json was not written by a run" in refused(*words)
    assert read_json(out / "recipe.json") == mine
    (out / "recipe.json").unlink()
    call(*words, "--quiet")


def test_a_damaged_recipe_of_a_run_is_named(small, call, refused):  # noqa: F811
    call("train", "--recipe=small.toml", "--out=a", "--quiet")
    (small.parent / "a" / "recipe.json").write_text("{")
    assert "a/recipe.json: " in refused("train", "--out=a", "--resume", "--steps=3")


def test_blocks_that_are_computed_again_take_the_same_steps(small, call, monkeypatch):  # noqa: F811
    asked = []
    own = UNet.checkpoint_blocks
    monkeypatch.setattr(UNet, "checkpoint_blocks", lambda m, on: asked.append(on) or own(m, on))
    call("train", "--recipe=small.toml", "--out=a", "--quiet", "--dropout=0.1")
    call(
        "train", "--recipe=small.toml", "--out=b", "--quiet", "--dropout=0.1", "--checkpoint-blocks"
    )
    assert asked == [False, True]
    same_run(small.parent / "a", small.parent / "b")
    # And a run may go on in either way.
    call("train", "--resume", "--out=b", "--quiet", "--no-checkpoint-blocks", "--steps=3")
    call("train", "--resume", "--out=a", "--quiet", "--steps=3")
    assert asked == [False, True, False, False]
    same_run(small.parent / "a", small.parent / "b")


def test_the_report(small, call):  # noqa: F811
    report = call("train", "--recipe=small.toml", "--out=a", "--quiet")
    assert row(report, "steps") == "2, 4 images"
    assert "waiting for data" in row(report, "time")
    assert row(report, "images/s").endswith("of a/log.csv")
    assert row(report, "loss").endswith("at the end")
    assert "bits/dim" not in report
