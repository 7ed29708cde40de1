"""fastddpm.evaluate and its command: what is found, in a folder that is gone on with, and one line
for every mistake, before anything is computed or written."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import idx
from killing import Killed, killed_after
from test_cli import call, model, refused, row  # noqa: F401
from test_runs import snapshot
from toy import images, tiny_unet

import fastddpm
from fastddpm import bits_per_dim, digest, evaluate, figures, sample
from fastddpm.checkpoint import read_json, write_json
from fastddpm.data import open_dataset
from fastddpm.evaluation import extractors, task
from fastddpm.evaluation.bound import Bound
from fastddpm.evaluation.distances import compare
from fastddpm.evaluation.extractors import Extractor
from fastddpm.evaluation.plots import PLOTS
from fastddpm.pretrained import save_model
from fastddpm.shards import fingerprint

SHORT = {"n": 6, "extractor": "toy", "progress": False}
FILES = sorted(("evaluation.json", *PLOTS))


def features(x: torch.Tensor) -> torch.Tensor:
    pooled = torch.nn.functional.adaptive_avg_pool2d(x.float() / 255, 2)
    return pooled.flatten(1)


@pytest.fixture(autouse=True)
def toy(monkeypatch, tmp_path_factory):
    """An extractor of four means a channel, which is known by its name for as long as a test is."""
    monkeypatch.setenv("FASTDDPM_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(extractors, "_known", dict(extractors._known))
    extractors.register(
        "toy", lambda weights, device: Extractor("toy", "-Toy", 12, "0" * 16, features)
    )


@pytest.fixture
def data(tmp_path) -> Path:
    np.savez(tmp_path / "test.npz", images=images(9, 1, 8, 8).numpy())
    np.savez(tmp_path / "train.npz", images=images(12, 1, 8, 8, seed=1).numpy())
    return tmp_path / "test.npz"


def content(folder: Path) -> dict:
    return json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))


def pixels(path: Path) -> torch.Tensor:
    return open_dataset(path).images(range(len(open_dataset(path))))


# ---- what is found -------------------------------------------------------------------------------


def test_bits_are_those_of_bits_per_dim_on_either_side(data):
    network = tiny_unet()
    found = evaluate(network, data, train=data.parent / "train.npz", seed=3, extractor="none",
                     progress=False)  # fmt: skip
    for side, path in {"test": data, "train": data.parent / "train.npz"}.items():
        own = bits_per_dim(network, pixels(path), seed=3, progress=False)
        bound = found.bits_per_dim[side]
        assert (bound.n, bound.T, bound.dims) == (len(own.total), 12, 64)
        assert bound.total == pytest.approx(own.total.double().numpy(), rel=1e-5)
        assert bound.mean == pytest.approx(own.total.double().mean().item(), rel=1e-5)
        error = own.total.double().std().item() / len(own.total) ** 0.5
        assert bound.stderr == pytest.approx(error, rel=1e-4)
        assert bound.terms == pytest.approx(own.terms.double().mean(0).numpy(), rel=1e-4)
    assert found.rate_distortion.lossless == pytest.approx(found.bits_per_dim["test"].mean)
    assert found.distances == {}


def test_distances_are_those_of_the_models_samples(data):
    network = tiny_unet()
    found = evaluate(network, pixels(data), seed=3, **SHORT)
    drawn = figures.to_uint8(sample(network, 6, seed=3, progress=False))
    toy = extractors.extractor("toy")
    own = compare(toy(drawn).numpy(), toy(pixels(data)).numpy(), toy, seed=3)
    assert [f.name for f in found.distances["test"]] == [f.name for f in own]
    assert "FD-Toy" in [f.name for f in own]
    for mine, theirs in zip(found.distances["test"], own, strict=True):
        assert (mine.n_generated, mine.n_real) == (6, 9)
        assert mine.value == pytest.approx(theirs.value, rel=1e-6, abs=1e-9)


def test_some_images_are_evenly_spaced_ones(data):
    network, x = tiny_unet(), pixels(data)
    found = evaluate(network, data, images=4, reference=3, steps=5, **SHORT)
    own = bits_per_dim(network, x[[0, 2, 4, 6]], steps=5, progress=False)
    assert found.bits_per_dim["test"].mean == pytest.approx(own.total.mean().item(), rel=1e-5)
    assert found.bits_per_dim["test"].T == 5
    assert {f.n_real for f in found.distances["test"]} == {3}


def test_of_some_terms_the_curve_is_of_images_that_got_all(data, tmp_path):
    network, out = tiny_unet(), tmp_path / "out"
    options = {"terms": 3, "curve": 4, "extractor": "none", "progress": False}
    found = evaluate(network, data, train=tmp_path / "train.npz", out=out, **options)
    whole = evaluate(network, pixels(data)[[0, 2, 4, 6]], extractor="none", progress=False)
    assert found.bits_per_dim["test"].sampled == 3
    assert "9 and 12 images, 3 of 12 terms" in found.table()
    assert found.rate_distortion.n == 4
    assert "means of 4 test images" in found.table()
    assert found.rate_distortion.rows() == whole.rate_distortion.rows()
    assert [f["terms"] for f in content(out)["figures"]] == [3, 3]
    with pytest.raises(ValueError, match="curve test: data is "):
        evaluate(network, data, out=out, **{**options, "curve": 5})


def test_every_figure_says_what_it_is_a_function_of(data, tmp_path):
    network, out = tiny_unet(), tmp_path / "out"
    train = tmp_path / "train.npz"
    found = evaluate(network, data, train=train, out=out, steps=4, seed=2, images=5, **SHORT)
    assert sorted(p.name for p in out.iterdir() if p.is_file()) == FILES
    read = content(out)
    assert read["figures"] == found.figures()
    names = {(f["name"], f["images of"]) for f in read["figures"]}
    assert {(name, side) for name in ("bits/dim", "FD-Toy") for side in ("test", "train")} <= names
    for figure in read["figures"]:
        assert (figure["seed"], figure["steps"]) == (2, 4)
        assert figure["model"] == fingerprint(network)
        assert len(figure["data"]) == 64
        assert figure["ran"].keys() >= {"fastddpm", "torch", "numpy", "engine", "device"}
        assert np.isfinite(figure["value"])
        if figure["name"] == "bits/dim":
            assert (figure["n"], figure["precision"], figure["terms"]) == (5, "fp32", None)
            bound = found.bits_per_dim[figure["images of"]]
            assert (figure["value"], figure["standard error"]) == (bound.mean, bound.stderr)
        else:
            assert figure["n_generated"] == 6
            assert figure["extractor"] == ["toy", "0" * 16]
    table = [row["reverse process time"] for row in read["rate_distortion"]["table"]]
    assert table == [4, 3, 2, 1]
    assert read["rate_distortion"]["lossless"] == pytest.approx(found.bits_per_dim["test"].mean)
    text = found.table()
    assert "5 images, all 4 terms" in text
    assert "6 samples, 9 and 12 images" in text


def test_what_was_found_is_saved_elsewhere(data, tmp_path):
    found = evaluate(tiny_unet(), data, **SHORT)
    found.save(tmp_path / "a")
    written = snapshot(tmp_path / "a")
    assert content(tmp_path / "a")["figures"] == found.figures()
    found.save(tmp_path / "a")
    assert snapshot(tmp_path / "a") == written
    other = evaluate(tiny_unet(seed=1), data, **SHORT)
    with pytest.raises(ValueError, match="has the results of another evaluation: model is '"):
        other.save(tmp_path / "a")
    assert snapshot(tmp_path / "a") == written


# ---- a folder ------------------------------------------------------------------------------------


def test_run_again_it_recognises_that_all_is_there(data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    first = evaluate(tiny_unet(), data, out=out, **SHORT)
    written = snapshot(out)

    def never(*_, **__):
        raise AssertionError("it was computed again")

    for name in ("bound", "samples"):
        monkeypatch.setattr(task, name, never)
    again = evaluate(tiny_unet(), data, out=out, **SHORT)
    assert snapshot(out) == written
    assert again.figures() == first.figures()
    assert again.table() == first.table()
    (out / PLOTS[1]).unlink()
    evaluate(tiny_unet(), data, out=out, **SHORT)
    assert snapshot(out) == written


def test_what_is_asked_for_later_is_added(data, tmp_path, monkeypatch):
    out, train = tmp_path / "out", tmp_path / "train.npz"
    evaluate(tiny_unet(), data, out=out, extractor="none", progress=False)
    first = content(out)["parts"]
    bounds, bound = [], task.bound

    def counted(*arguments, **options):
        bounds.append(options)
        return bound(*arguments, **options)

    monkeypatch.setattr(task, "bound", counted)
    found = evaluate(tiny_unet(), data, train=train, out=out, **SHORT)
    assert len(bounds) == 1
    assert content(out)["parts"]["bits_per_dim test"] == first["bits_per_dim test"]
    assert set(found.bits_per_dim) == set(found.distances) == {"test", "train"}
    without = evaluate(tiny_unet(), data, out=out, extractor="none", progress=False)
    assert without.figures() == found.figures()


def pruned(folder: Path) -> list:
    return content(folder)["figures"]


@pytest.mark.parametrize("survived", [0, 2, 5, 9])
def test_whichever_write_is_the_last_it_goes_on(data, tmp_path, monkeypatch, survived):
    options = {"train": tmp_path / "train.npz", **SHORT, "steps": 3, "n": 3}
    evaluate(tiny_unet(), data, out=tmp_path / "a", **options)
    out = tmp_path / "b"
    with killed_after(survived, monkeypatch) as renamed:
        try:
            evaluate(tiny_unet(), data, out=out, **options)
        except Killed:
            assert len(renamed) == survived
    evaluate(tiny_unet(), data, out=out, **options)
    assert pruned(out) == pruned(tmp_path / "a")
    assert sorted(p.name for p in out.iterdir() if p.is_file()) == FILES


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"steps": 3}, "steps is 12 there and 3 here"),
        ({"clip": False}, "clip is True there and False here"),
        ({"images": 4}, r"bits_per_dim test: data is '\w+' there and '\w+' here"),
        ({"terms": 4}, "bits_per_dim test: terms is None there and 4 here"),
        ({"n": 7}, "distances test FD-Toy: samples is 6 there and 7 here"),
        ({"sampler": "ddim"}, r"FD-Toy: sampler is \['ddpm', 0.0\] there and \['ddim', 0.0\] here"),
        ({"precision": "bf16"}, "bits_per_dim test: precision is 'fp32' there and 'bf16' here"),
    ],
)
def test_a_folder_of_another_evaluation_is_refused(data, tmp_path, other, message, finished):
    written = snapshot(finished)
    with pytest.raises(ValueError, match=f"has the results of another evaluation: .*{message}"):
        evaluate(tiny_unet(), data, out=finished, **{**SHORT, **other})
    assert snapshot(finished) == written


@pytest.fixture
def finished(data, tmp_path) -> Path:
    evaluate(tiny_unet(), data, out=tmp_path / "out", **SHORT)
    return tmp_path / "out"


def test_a_folder_of_another_model_or_other_images_is_refused(data, tmp_path, finished):
    written = snapshot(finished)
    with pytest.raises(ValueError, match=r"another evaluation: model is '\w+' there and '\w+' her"):
        evaluate(tiny_unet(seed=1), data, out=finished, **SHORT)
    with pytest.raises(ValueError, match=r"another evaluation: .* test: data is "):
        evaluate(tiny_unet(), tmp_path / "train.npz", out=finished, **SHORT)
    assert snapshot(finished) == written


def test_a_file_that_is_no_evaluations_is_left(data, tmp_path, finished):
    edited = read_json(finished / "evaluation.json")
    edited["figures"][0]["value"] = 0.1
    write_json(finished / "evaluation.json", edited)
    for name, text, message in (
        ("edited", None, "is not as it was written"),
        ("foreign", "{}", "is not an evaluation's: give another folder"),
        ("damaged", '{"format', "is not a readable JSON file"),
    ):
        if text is not None:
            (finished / "evaluation.json").write_text(text)
        written = snapshot(finished)
        with pytest.raises(ValueError, match=message):
            evaluate(tiny_unet(), data, out=finished, **SHORT)
        assert snapshot(finished) == written, name
    (finished / "evaluation.json").unlink()
    with pytest.raises(ValueError, match=r"has a .*png and no evaluation.json: give another"):
        evaluate(tiny_unet(), data, out=finished, **SHORT)


def test_a_folder_has_one_writer(data, tmp_path, monkeypatch):
    tried = []

    def meanwhile(*_, **__):
        with pytest.raises(
            BlockingIOError, match=f"in use by another evaluation .process {os.getpid()}"
        ):
            evaluate(tiny_unet(), data, out=tmp_path / "out", **SHORT)
        tried.append(True)
        raise Killed

    monkeypatch.setattr(task, "bound", meanwhile)
    with pytest.raises(Killed):
        evaluate(tiny_unet(), data, out=tmp_path / "out", **SHORT)
    assert tried


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.fixture
def nothing_runs(monkeypatch):
    def never(*_, **__):
        raise AssertionError("something was computed")

    for name in ("bound", "samples"):
        monkeypatch.setattr(task, name, never)


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (images(9, 1, 8, 9), {}, r"data, a tensor has .* \(1, 8, 9\); the model takes \(1, 8, 8\)"),
        (images(9, 3, 8, 8), {}, r"images of shape \(3, 8, 8\); the model takes \(1, 8, 8\)"),
        (images(1, 1, 8, 8), {}, "has 1: an evaluation needs at least 2 images"),
        (images(2, 1, 8, 8).float(), {}, r"data must be \(N, C, H, W\) uint8; got .*float32"),
        (images(4, 8, 8), {}, r"data must be \(N, C, H, W\) uint8; got \(4, 8, 8\)"),
        ([1, 2], {}, "data must be a fastddpm.data.Dataset, a path or a uint8 tensor .*; got list"),
        ("", {}, "data is '': give a path"),
        (images(9, 1, 8, 8), {"train": images(9, 1, 8, 8)}, "train has the same images as data"),
        (images(9, 1, 8, 8), {"train": images(9, 1, 4, 4, seed=1)}, "train, a tensor has"),
        (images(9, 1, 8, 8), {"extractor": "vgg"}, "extractor must be one of 'auto', 'none'"),
        (images(9, 1, 8, 8), {"n": 1}, "n must be at least 2; got 1"),
        (images(9, 1, 8, 8), {"n": 2.5}, "n must be an integer"),
        (images(9, 1, 8, 8), {"images": 0}, "images must be an integer of at least 1; got 0"),
        (images(9, 1, 8, 8), {"images": 1}, "images is 1: an evaluation needs at least 2 images"),
        (images(9, 1, 8, 8), {"reference": 1}, "reference is 1: an evaluation needs at least 2"),
        (images(9, 1, 8, 8), {"terms": 13}, "terms must be an integer in 1 .. 12; got 13"),
        (images(9, 1, 8, 8), {"steps": 0}, "steps must be"),
        (images(9, 1, 8, 8), {"seed": -1}, "seed must be"),
        (images(9, 1, 8, 8), {"sampler": "heun"}, "sampler must be one of"),
        (images(9, 1, 8, 8), {"eta": -1.0}, "eta must be at least 0"),
        (images(9, 1, 8, 8), {"engine": "warp"}, "engine must be one of"),
        (images(9, 1, 8, 8), {"precision": "fp8"}, "precision must be one of"),
        (images(9, 1, 8, 8), {"clip": 1}, "clip must be True or False"),
    ],
)  # fmt: skip
def test_a_mistake_is_said_before_anything_runs(given, options, message, tmp_path, nothing_runs):
    with pytest.raises(ValueError, match=message) as raised:
        evaluate(tiny_unet(), given, out=tmp_path / "out", **{**SHORT, **options})
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_judged_are_refused(nothing_runs):
    x = images(4, 1, 8, 8)
    with pytest.raises(ValueError, match=r"model must be a fastddpm.UNet; got Linear"):
        evaluate(torch.nn.Linear(2, 2), x, **SHORT)
    with pytest.raises(ValueError, match="the model has 3 classes, and the images"):
        evaluate(tiny_unet(num_classes=3), x, **SHORT)
    with pytest.raises(ValueError, match=r"'toy': networks see images of 1 or 3 channels, .* 2"):
        evaluate(tiny_unet(in_channels=2), images(4, 2, 8, 8), **SHORT)


def test_an_extractor_that_is_missing_is_said_first(tmp_path, nothing_runs, monkeypatch):
    for name in list(extractors._known):
        extractors.register(name, lambda *_: None, lambda: "it is not installed: pip install it")
    x, out = images(4, 1, 8, 8), tmp_path / "out"
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    monkeypatch.undo()
    for name in ("inception", "efficientnet-lite0"):
        if extractors.available()[name] is None:
            continue
        with pytest.raises((ImportError, FileNotFoundError)) as raised:
            evaluate(tiny_unet(), x, out=out, extractor=name, progress=False)
        assert "\n" not in str(raised.value)
        assert not out.exists()


def test_without_any_extractor_the_rest_is_found_and_said(data):
    for name in list(extractors._known):
        extractors.register(name, lambda *_: None, lambda: "it is not installed")
    with pytest.warns(UserWarning, match=r"not compared with the data, .*toy: it is not installed"):
        found = evaluate(tiny_unet(), data, progress=False)
    assert found.distances == {}
    assert found.bits_per_dim["test"].n == 9


def test_results_do_not_go_among_the_images(tmp_path, nothing_runs):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k in range(3):
        figures.save_image(figures.to_pil(images(1, 8, 8, seed=k)), folder / f"{k}.png")
    with pytest.raises(ValueError, match=r"lies in the data .* give another folder"):
        evaluate(tiny_unet(), folder, out=folder / "out", **SHORT)


def test_pictures_of_another_size_are_resized_where_that_is_asked_for(tmp_path):
    for k in range(3):
        picture = figures.to_pil(images(3, 16, 12, seed=k))
        figures.save_image(picture, tmp_path / f"{k}.png")
    options = {"extractor": "none", "progress": False}
    with pytest.raises(ValueError, match=r"images of shape \(3, 16, 12\); the model takes \(1, 8"):
        evaluate(tiny_unet(), tmp_path, **options)
    found = evaluate(tiny_unet(), tmp_path, resize=True, **options)
    x = open_dataset(tmp_path, size=8, channels=1).images(range(3))
    own = bits_per_dim(tiny_unet(), x, progress=False).total
    assert found.bits_per_dim["test"].mean == pytest.approx(own.mean().item(), rel=1e-5)


def test_a_model_of_nan_is_an_error_that_names_image_and_step(data, tmp_path):
    network = tiny_unet()
    with torch.no_grad():
        weight = network.conv_out.weight
        weight.copy_(torch.randn(weight.shape).sign() * 3e38)  # inf - inf
        network.norm_out.weight.fill_(1e30)
    with pytest.raises(FloatingPointError, match=r"image \d.* at step t = \d"):
        evaluate(network, data, out=tmp_path / "out", **SHORT)


# ---- the command ---------------------------------------------------------------------------------


def test_the_command_ends_in_one_table(call, model, tmp_path, data):  # noqa: F811
    words = ("evaluate", "--model", model, "--data", data, "--train", "train.npz", "--images=5",
             "-n=6", "--extractor=toy", "--steps=4", "--seed=3", "--precision=fp32")  # fmt: skip
    report = call(*words, "--out=results", "--quiet")
    network = fastddpm.UNet.from_pretrained(model)
    own = evaluate(network, data, train=tmp_path / "train.npz", images=5, steps=4, seed=3,
                   precision="fp32", **SHORT)  # fmt: skip
    assert report.startswith(own.table())
    assert row(report, "chain") == "ddpm, 4 steps, seed 3"
    assert row(report, "wrote").startswith("results/evaluation.json, ")
    assert sorted(p.name for p in (tmp_path / "results").iterdir() if p.is_file()) == FILES
    written = snapshot(tmp_path / "results")
    assert call(*words, "--out=results").startswith(own.table())
    assert snapshot(tmp_path / "results") == written


def test_the_commands_test_images_are_the_test_split(call, model, tmp_path):  # noqa: F811
    for name, n in (("t10k", 4), ("train", 6)):
        (tmp_path / "d").mkdir(exist_ok=True)
        path = tmp_path / "d" / f"{name}-images-idx3-ubyte.gz"
        path.write_bytes(gzip.compress(idx(images(n, 1, 8, 8, seed=n)[:, 0].numpy())))
    report = call("evaluate", "--model", model, "--data=d", "--train=d", "--extractor=none",
                  "--out=o", "--quiet", "--steps=3")  # fmt: skip
    assert "4 and 6 images, all 3 terms" in report
    bounds = content(tmp_path / "o")["parts"]
    test, train = (
        Bound.from_json(bounds[f"bits_per_dim {s}"]["content"]) for s in ("test", "train")
    )
    assert (test.n, train.n) == (4, 6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data=gone.npz"], "gone.npz does not exist"),
        (["--data=test.npz", "--extractor=vgg"], "extractor must be one of"),
        (["--data=test.npz", "--terms=99"], "terms must be an integer in 1 .. 12; got 99"),
        (["--data=wide.npz"], "wide.npz has images of shape (1, 8, 9); the model takes (1, 8, 8)"),
        (["--data=one.npz"], "one.npz has 1: an evaluation needs at least 2 images"),
        (["--data=test.npz", "--out=test.npz"], "is not a folder"),
    ],
)
def test_a_mistake_is_one_line(refused, model, data, tmp_path, words, message):  # noqa: F811
    np.savez(tmp_path / "wide.npz", images=images(9, 1, 8, 9).numpy())
    np.savez(tmp_path / "one.npz", images=images(1, 1, 8, 8).numpy())
    assert message in refused("evaluate", "--model", model, *words)
    assert not (tmp_path / "evaluation").exists()


@pytest.mark.slow
def test_two_ranks_find_what_one_process_does(tmp_path, data):
    save_model(tiny_unet(), tmp_path / "model")
    words = [
        "-m", "fastddpm.cli", "evaluate", f"--model={tmp_path / 'model'}", f"--data={data}",
        "--extractor=none", "--precision=fp32", "--quiet", "--threads=1",
    ]  # fmt: skip
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    for command, out in ((run, "two"), ([sys.executable], "one")):
        done = subprocess.run(
            [*command, *words, f"--out={tmp_path / out}"], env=environment, capture_output=True,
            text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("bits/dim, at most") == 1
    two, one = content(tmp_path / "two"), content(tmp_path / "one")
    assert two["rate_distortion"] == one["rate_distortion"]
    assert [f["value"] for f in two["figures"]] == [f["value"] for f in one["figures"]]
    assert two[digest.KEY] == digest.of_json(two)
