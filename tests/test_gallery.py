"""The gallery: what its pictures show, that it goes on and is never another's, its page, and bad
input."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toy import SCHEDULE, images, tiny_unet

import fastddpm
from fastddpm import checkpoint, cli, figures, progress
from fastddpm.data import open_dataset
from fastddpm.evaluation.extractors import Extractor
from fastddpm.evaluation.images import Images
from fastddpm.evaluation.plots import PLOTS
from fastddpm.figures import folder, gallery, job, paper, store
from fastddpm.pretrained import save_model
from fastddpm.sampling import draw_shared_latent
from fastddpm.shards import fingerprint

T = SCHEDULE.T
MODEL = tiny_unet()
SMALL = {"n": 4, "rows": 2, "frames": 3, "precision": "fp32", "progress": False}
PLAIN = ("samples", "progressive", "quality", "shared-latent")
MIXED = ("interpolation", "coarse-to-fine")


def network(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(1).float()[:, :5] / 255


MEAN = Extractor("corner", "-Corner", 5, "0123456789abcdef", network, lambda f: f * 3)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.npy"
    np.save(path, images(20, 1, 8, 8, seed=3).numpy())
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data) -> Path:
    """A gallery; tests work on a copy."""
    out = tmp_path_factory.mktemp("whole") / "out"
    gallery(MODEL, data, out, **SMALL)
    return out


@pytest.fixture
def out(tmp_path, whole) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "out"))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def holds(picture: Path, x: torch.Tensor) -> bool:
    """Whether an image stands in a picture, enlarged by some whole factor."""
    found, x = pixels(picture), figures.to_uint8(x)[0].numpy()
    for factor in range(8, 0, -1):
        cell = x.repeat(factor, 0).repeat(factor, 1)
        for y, left in zip(*np.nonzero(found == cell[0, 0]), strict=True):
            part = found[y : y + len(cell), left : left + len(cell)]
            if part.shape == cell.shape and np.array_equal(part, cell):
                return True
    return False


def test_pictures_show_what_the_samplers_give(tmp_path, data):
    made = gallery(MODEL, data, tmp_path / "out", seed=5, **SMALL)
    at = {x.name: x.path for x in made.shown}
    assert list(at) == [*PLAIN, *MIXED, "nearest-pixels"]
    assert set(made.left_out) == {"quality-features", "nearest-features", "rate-distortion"}
    quiet = {"seed": 5, "precision": "fp32", "progress": False}

    drawn, x0, times = fastddpm.sample_progressive(MODEL, 4, frames=3, **quiet)
    assert all(holds(at["samples"], x) for x in drawn)
    assert all(holds(at["progressive"], x) for x in (*x0[:, :2].flatten(0, 1), *drawn[:2]))
    assert times == [T - 1, 6, 0]

    shared, latents = draw_shared_latent(MODEL, 2, t=(12, 9, 6, 3), **quiet)
    assert all(holds(at["shared-latent"], x) for x in (*shared.flatten(0, 1), *latents))

    of = open_dataset(data)
    a, b = of.images(folder_pairs(of, 5)[0])
    mixed = fastddpm.interpolate(MODEL, a, b, n=11, t=6, **quiet)
    assert all(holds(at["interpolation"], x) for x in (a, *mixed, b))
    fine = fastddpm.interpolate(MODEL, a, b, n=11, t=(12, 10, 9, 8, 6, 4, 3, 2, 0), **quiet)
    assert all(holds(at["coarse-to-fine"], x) for x in fine[[0, 3, 8]].flatten(0, 1))

    near, _ = figures.nearest(drawn[:2], of, k=8, progress=False)
    for k in range(20):
        assert holds(at["nearest-pixels"], of.images([k])[0]) == (k in near)


def folder_pairs(data, seed):
    """The images that are mixed: the first of the seed's order."""
    return fastddpm.data.batch_indices(len(data), 2, 0, seed=seed).reshape(1, 2)


def test_labels_say_t_and_lambda(tmp_path, data, monkeypatch):
    said = {}

    def grid(images, rows=None, columns=None, **options):
        said[options["title"].split(":")[0]] = rows, columns, options
        return figures.labelled_grid(images, rows, columns, **options)

    monkeypatch.setattr(paper, "labelled_grid", grid)
    gallery(MODEL, data, tmp_path / "out", **SMALL)
    assert said["x0 predicted from x_t"][1] == ["12", "7", "1", "sample"]
    assert said["Samples of p(x0 | x_t)"][0] == ["12", "9", "6", "3"]
    tenths = ["source", "0", *(f"0.{k}" for k in range(1, 10)), "1", "source"]
    assert said["Interpolation"][:2] == (["6"], tenths)
    fine = ["12", "10", "9", "8", "6", "4", "3", "2", "0"]
    assert said["Coarse to fine interpolation"][:2] == (fine, tenths)
    assert said["Coarse to fine interpolation"][2]["corner"] == "t \\ λ"
    assert all(f"DDPM, {T} steps, seed 0" in x[2]["title"] for x in said.values())

    said.clear()
    gallery(MODEL, data, tmp_path / "short", steps=4, **SMALL)
    assert said["x0 predicted from x_t"][1] == ["12", "8", "1", "sample"]  # of the model's 12
    assert said["Samples of p(x0 | x_t)"][0] == ["12", "8", "5", "1"]
    assert all(f"DDPM, 4 of {T} steps" in x[2]["title"] for x in said.values())


def test_quality_over_time_is_the_predictions_distance_to_the_samples(tmp_path):
    gallery(MODEL, None, tmp_path / "out", only=["quality"], **SMALL)
    drawn, x0, _ = fastddpm.sample_progressive(MODEL, 4, frames=3, precision="fp32", progress=False)
    expected = [float(((x - drawn) * 127.5).double().square().mean().sqrt()) for x in x0]
    rmse = store.Store(tmp_path / "out", *identity(MODEL)).progression().rmse
    assert np.allclose(rmse, expected, rtol=1e-6)
    assert rmse[0] > rmse[-1]


def test_many_samples_are_drawn_in_batches(tmp_path, whole, monkeypatch):
    monkeypatch.setitem(job.MOST, "cpu", 3)
    gallery(MODEL, None, tmp_path / "out", only=["samples", "progressive", "quality"], **SMALL)
    of = [store.Store(out, *identity(MODEL)).progression() for out in (tmp_path / "out", whole)]
    assert (of[0].images.int() - of[1].images.int()).abs().max() <= 1  # a batch of another size
    assert (of[0].predictions.int() - of[1].predictions.int()).abs().max() <= 1
    assert of[0].times == of[1].times
    assert np.allclose(of[0].rmse, of[1].rmse, rtol=1e-5)


def identity(model):
    base = {"model": fingerprint(model), "seed": 0}
    return base, {"n": 4, "rows": 2, "frames": 3}


def test_features(tmp_path, data):
    only = ["nearest-features", "quality-features"]
    made = gallery(MODEL, data, tmp_path / "out", only=only, extractor=MEAN, k=2, **SMALL)
    assert [x.name for x in made.shown] == ["quality-features", "nearest-features"]
    assert "KID-Corner and IS-Corner" in made.shown[0].caption
    assert "corner" in made.shown[1].caption
    drawn = fastddpm.sample(MODEL, 2, precision="fp32", progress=False)
    of = open_dataset(data)
    near, _ = figures.nearest(drawn, of, k=2, features=MEAN, progress=False)
    for k in range(20):
        assert holds(made.shown[1].path, of.images([k])[0]) == (k in near)
    other = dataclasses.replace(MEAN, fingerprint="another")
    with pytest.raises(ValueError, match="its extractor is '0123456789abcdef' and here 'another'"):
        gallery(MODEL, data, tmp_path / "out", only=only, extractor=other, k=2, **SMALL)


# ---- going on ------------------------------------------------------------------------------------


def stamps(out: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in out.iterdir() if p.name != "index.html"}


def test_it_goes_on_where_it_was_stopped(tmp_path, data, monkeypatch):
    out = tmp_path / "out"

    def stop(*_):
        raise KeyboardInterrupt

    figure = paper.FIGURES["interpolation"]
    monkeypatch.setitem(paper.FIGURES, "interpolation", figure._replace(draw=stop))
    with pytest.raises(KeyboardInterrupt):
        gallery(MODEL, data, out, **SMALL)
    monkeypatch.setitem(paper.FIGURES, "interpolation", figure)
    before = stamps(out)
    assert {*before} == {f"{name}.png" for name in PLAIN} | {store.CHAIN}
    assert "progressive.png" in (out / "index.html").read_text()  # a page of what there is

    monkeypatch.setattr("fastddpm.figures.job.sample_progressive", stop)  # no sample is drawn again
    made = gallery(MODEL, data, out, **SMALL)
    assert stamps(out).items() >= before.items()
    assert [x.name for x in made.shown if x.seconds is None] == list(PLAIN)
    made = gallery(MODEL, data, out, **SMALL)
    assert all(x.seconds is None for x in made.shown)


@pytest.mark.parametrize("name", ["samples.png", store.CHAIN])
def test_damaged_files_are_drawn_again(out, data, name):
    whole = (out / name).read_bytes()
    good = content(out / name)
    (out / name).write_bytes(whole[: len(whole) // 2])
    (out / "nearest-pixels.png").unlink()  # of the samples too
    gallery(MODEL, data, out, **SMALL)
    assert content(out / name) == good


def content(path):
    """What a file says; the order of a safetensors file's metadata is any."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    tensors, metadata = checkpoint.read_tensors(path)
    return {name: x.tolist() for name, x in tensors.items()}, metadata


def test_pictures_of_one_gallery_may_be_drawn_one_by_one(tmp_path, data, whole):
    for name in ("samples", "nearest-pixels"):
        made = gallery(MODEL, data, tmp_path / "one", only=[name], **SMALL)
    assert [x.name for x in made.shown] == ["samples", "nearest-pixels"]
    for name in ("samples.png", "nearest-pixels.png"):
        assert (tmp_path / "one" / name).read_bytes() == (whole / name).read_bytes()
    # without the data what needs some stays, and is on the page
    made = gallery(MODEL, None, tmp_path / "one", **SMALL)
    assert [x.name for x in made.shown] == [*PLAIN, "nearest-pixels"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "its seed is 0 and here 1"),
        ({"n": 5}, "its n is 4 and here 5"),
        ({"steps": 4}, "its steps is 12 and here 4"),
        ({"sampler": "ddim"}, "its sampler is 'ddpm' and here 'ddim'"),
        ({"precision": "bf16"}, "its precision is 'fp32' and here 'bf16'"),
        ({"model": tiny_unet(seed=1)}, "its model is '[0-9a-f]{16}' and here"),
        ({"k": 3}, "nearest-pixels.png is of another gallery: its k is 8 and here 3"),
        ({"search": 10}, "its search is 20 and here 10"),
        ({"data": images(20, 1, 8, 8, seed=4)}, "interpolation.png .* its data is '[0-9a-f]+' and"),
    ],
)
def test_another_gallery_is_never_written_over(out, data, change, message):
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(ValueError, match=message + ".*; give another folder") as caught:
        call(**{"model": MODEL, "data": data, "out": out, **SMALL, **change})
    assert "\n" not in str(caught.value)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def call(model, data, out, **options):
    return gallery(model, data, out, **options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("index.html", "index.html was not written by a gallery"),
        ("samples.png", "samples.png does not say what drew it"),
        (store.CHAIN, f"{store.CHAIN} does not say what drew it"),
        ("quality.png/", "quality.png is no regular file"),
    ],
)
def test_files_of_others_stay(tmp_path, name, message):
    out = tmp_path / "out"
    out.mkdir()
    if name.endswith("/"):
        (out / name).mkdir()
    elif name == "index.html":
        (out / name).write_text("<html>mine</html>")
    elif name.endswith(".png"):
        figures.save_image(figures.to_pil(images(1, 8, 8)), out / name)
    else:
        fastddpm.checkpoint.write_tensors(out / name, {"x": torch.zeros(2)})
    before = {p.name: p.is_file() and p.read_bytes() for p in out.iterdir()}
    with pytest.raises(ValueError, match=f"{message}.*: give another folder"):
        gallery(MODEL, None, out, **SMALL)
    assert {p.name: p.is_file() and p.read_bytes() for p in out.iterdir()} == before


# ---- the page ------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags that are all closed in order, links, ids and the text of the page."""

    VOID = ("meta", "img", "link", "br")

    def __init__(self, text: str):
        super().__init__()
        self.open, self.links, self.ids, self.alts, self.text = [], [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.links += [given[x] for x in ("href", "src") if x in given]
        self.ids += [given["id"]] if "id" in given else []
        self.alts += [given.get("alt")] if tag == "img" else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page(out, data):
    command = "fastddpm figures --model 'a <b> & \"c\"' --out x"
    made = gallery(MODEL, data, out, title="a <b>", command=command, **SMALL)
    source = made.index.read_text()
    page = Page(source)
    names = [x.name for x in made.shown]
    local = [link for link in page.links if not link.startswith("#")]
    assert {*local} == {f"{name}.png" for name in names}  # relative, and nothing else
    assert all((out / link).is_file() for link in local)
    assert {link[1:] for link in page.links if link.startswith("#")} <= {*page.ids}
    assert not re.search(r"https?:|<script|@import|url\(|<link", source)
    assert len(page.alts) == len(names)
    assert all(page.alts)
    assert "prefers-color-scheme: dark" in source
    assert "width=device-width" in source
    for said in (
        "Gallery of a <b>", fingerprint(MODEL), f"ddpm, {T} of {T} steps", "Figures 6 and 14",
        "20 images of", f"{command} --only nearest-pixels", *(x.caption for x in made.shown),
        "Rate and distortion", "needs --evaluation",
    ):  # fmt: skip
        assert said in page.text, said


# ---- an evaluation's plots -----------------------------------------------------------------------


@pytest.fixture
def evaluation(tmp_path) -> Path:
    out = tmp_path / "evaluation"
    out.mkdir()
    (out / folder.RESULTS).write_text(json.dumps({"about": {"model": fingerprint(MODEL)}}))
    for k, name in enumerate(PLOTS):
        figures.save_image(figures.to_pil(images(3, 20, 30, seed=k)), out / name)
    return out


def test_plots_of_an_evaluation(tmp_path, evaluation):
    made = gallery(MODEL, None, tmp_path / "out", only=["rate-distortion"], evaluation=evaluation)
    shown = pixels(made.shown[0].path)
    assert np.array_equal(shown, np.concatenate([pixels(evaluation / x) for x in PLOTS], axis=1))
    (evaluation / folder.RESULTS).write_text(
        json.dumps({"about": {"model": fingerprint(MODEL)}, "more": 1})
    )
    with pytest.raises(ValueError, match="is of another gallery: its evaluation is"):
        gallery(MODEL, None, tmp_path / "out", only=["rate-distortion"], evaluation=evaluation)


def test_evaluations_that_do_not_fit(tmp_path, evaluation):
    def refused(error, message):
        with pytest.raises(error, match=message):
            gallery(MODEL, None, tmp_path / "out", evaluation=evaluation, **SMALL)
        assert not (tmp_path / "out").exists()

    (evaluation / PLOTS[1]).write_bytes(b"no picture")
    refused(ValueError, f"{PLOTS[1]} can't be read as a plot")
    (evaluation / folder.RESULTS).write_text(json.dumps({"about": {"model": "another"}}))
    refused(ValueError, "evaluation.json is of another model: its fingerprint is 'another'")
    (evaluation / folder.RESULTS).unlink()
    refused(FileNotFoundError, "no such file: .*evaluation.json; give a folder of")


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": ["sample"]}, "only must be one of 'samples', .*; got 'sample'"),
        ({"only": []}, "no figure is asked for; give some of samples, "),
        ({"only": "nearest-pixels"}, "the figure 'nearest-pixels' needs --data"),
        ({"only": "nearest-features"}, "the figure 'nearest-features' needs --data"),
        ({"only": "rate-distortion"}, "the figure 'rate-distortion' needs --evaluation"),
        ({"n": 0}, "n must be an integer of at least 1"),
        ({"rows": 5}, "rows must be at most n, the 4 samples; got 5"),
        ({"frames": 0}, "frames must be"),
        ({"seed": -1}, "seed must be"),
        ({"steps": 13}, "steps must be an integer in 1 .. 12"),
        ({"sampler": "euler"}, "sampler must be"),
        ({"engine": "warp"}, "engine must be"),
        ({"data": images(1, 1, 8, 8)}, "data, a tensor has one image, and interpolations mix two"),
        ({"data": images(4, 1, 8, 8), "k": 5}, "k must be at most the 4 images searched; got 5"),
        ({"data": images(4, 1, 8, 8), "search": 0}, "must be an integer of at least 1"),
        ({"data": images(4, 3, 8, 8)}, r"shape \(3, 8, 8\); the model draws \(1, 8, 8\)"),
        ({"data": images(4, 1, 8, 9)}, r"shape \(1, 8, 9\); the model draws \(1, 8, 8\)"),
        ({"data": images(4, 1, 8, 8)[:0]}, "has no images"),
        ({"data": 3}, "data must be a fastddpm.data.Dataset, a path or"),
        ({"extractor": "vgg"}, "extractor must be one of .*; got 'vgg'"),
        ({"weights": "x.pth"}, "weights are those of an extractor that is named"),
        ({"extractor": 3}, "extractor must be one of .*, or an Extractor; got 3"),
        ({"model": torch.nn.Identity()}, "model must be a fastddpm.UNet; got Identity"),
        ({"model": tiny_unet(num_classes=3)}, "the model has 3 classes"),
        ({"model": tiny_unet(in_channels=5)}, "images of 5 channels can't be a .png"),
        ({"model": tiny_unet(in_channels=4), "extractor": MEAN}, "the model's have 4 channels"),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_anything_is_made(tmp_path, options, message):
    given = {"model": MODEL, "data": None, "out": tmp_path / "out", **SMALL, **options}
    with pytest.raises(ValueError, match=message) as caught:
        call(**given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_data_of_another_size_is_one_line(tmp_path, recwarn):
    np.save(tmp_path / "x.npy", images(4, 1, 9, 9).numpy())
    with pytest.raises(ValueError, match=r"x.npy has images of shape \(1, 9, 9\)"):
        gallery(MODEL, tmp_path / "x.npy", tmp_path / "out", **SMALL)
    assert not recwarn.list


def test_a_gallery_among_its_data_is_refused(tmp_path):
    (tmp_path / "pictures").mkdir()
    for k in range(3):
        picture = figures.to_pil(images(1, 8, 8, seed=k))
        figures.save_image(picture, tmp_path / "pictures" / f"{k}.png")
    for out in (tmp_path / "pictures", tmp_path / "pictures" / "out"):
        with pytest.raises(ValueError, match="would lie among its data"):
            gallery(MODEL, tmp_path / "pictures", out, **SMALL)
    made = gallery(MODEL, tmp_path / "pictures", tmp_path / "out", **SMALL)
    assert len(made.shown) == 7  # three images: eight neighbours are three then


def test_a_model_that_returns_nan_leaves_no_picture(tmp_path):
    broken = tiny_unet()
    with torch.no_grad():
        next(broken.parameters()).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="not a number or infinite at step"):
        gallery(broken, None, tmp_path / "out", only=["samples"], **SMALL)
    assert not list((tmp_path / "out").glob("*.png"))


@pytest.mark.parametrize("channels", [3, 4])
def test_colours_and_alpha(tmp_path, channels):
    model, x = tiny_unet(in_channels=channels), images(5, channels, 8, 8)
    made = gallery(model, Images(x).data, tmp_path / "out", **SMALL)
    assert len(made.shown) == 7
    with Image.open(tmp_path / "out" / "interpolation.png") as picture:
        assert picture.mode == figures.MODES[channels]


# ---- the command ---------------------------------------------------------------------------------


def test_the_command(tmp_path, data, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_model(MODEL, tmp_path / "tiny")
    shutil.copy(data, "data.npy")
    words = ["figures", "--model=tiny", "--data=data.npy", "--out=out", "-n=4", "--rows=2"]
    words.append("--quiet")
    assert cli.main(words) == 0
    report = capsys.readouterr().out
    assert re.search(r"Uncurated samples +Figures 11 and 13 +out/samples.png +\d+\.\d s", report)
    assert re.search(r"Rate and distortion +Figure 5 +- +needs --evaluation", report)
    assert "page  out/index.html" in report
    page = Page((tmp_path / "out" / "index.html").read_text())
    said = "fastddpm figures --model tiny --data data.npy --n 4 --rows 2 --seed 0 --out out"
    assert said in page.text
    assert cli.main([*said.split()[1:], "--only", "samples,quality", "--quiet"]) == 0
    assert re.search(r"out/samples.png +kept", capsys.readouterr().out)

    assert cli.main([*words, "--seed", "1"]) == 2
    assert capsys.readouterr().err == (
        "fastddpm: error: out/samples.png is of another gallery: its seed is 0 and here 1; give "
        "another folder\n"
    )
    assert cli.main([*words, "--only", "samples,none"]) == 2
    assert capsys.readouterr().err.startswith("fastddpm: error: only must be one of 'samples'")


# ---- one bar over all ----------------------------------------------------------------------------


def test_the_bar_ends_at_its_total_and_never_goes_back(tmp_path, data, monkeypatch):
    bars = []

    class Watched(progress.Whole):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options | {"disable": False, "file": io.StringIO()})
            self.seen = []
            bars.append(self)

        def update(self, n=1):
            shown = super().update(n)
            self.seen.append(self.n)
            return shown

    monkeypatch.setattr(folder, "Whole", Watched)
    gallery(MODEL, data, tmp_path / "out", extractor=MEAN, **SMALL)
    (bar,) = bars
    assert bar.seen == sorted(bar.seen)
    assert bar.n == pytest.approx(bar.total)
    assert len({*bar.seen}) > 50  # step by step


def test_a_part_is_done_when_its_block_ends():
    with progress.Whole(total=10, disable=False, file=io.StringIO()) as whole:
        with whole.part(4, 8), progress.tqdm(disable=True) as inner:
            inner.update(2)
            assert whole.n == 1
            inner.update(100)  # more than was said
            assert whole.n == 4
        with whole.part(6, 3):
            pass
        assert whole.n == 10
        progress.tqdm(disable=True).update(5)  # outside: no part of it
        assert whole.n == 10
