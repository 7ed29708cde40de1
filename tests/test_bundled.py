"""The model that comes with the package: what a stranger's first command draws from."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from PIL import Image

import fastddpm
from fastddpm import UNet
from fastddpm.pretrained import BUNDLED, bundled_models
from fastddpm.training import PRESETS

FOLDER = BUNDLED / "fashion-mnist"


def test_it_is_the_presets_model():
    assert bundled_models() == ["fashion-mnist"]
    model = UNet.from_pretrained("fashion-mnist")
    preset = PRESETS["fashion-mnist"]
    with torch.device("meta"):
        expected = UNet(**preset.model)
    assert model.config == expected.config
    assert model.diffusion.to_config() == fastddpm.Diffusion().to_config()
    assert all(p.isfinite().all() for p in model.parameters())
    assert asdict(preset)["flip"] is False, "shoes and sleeves have a side"


def test_it_fits_the_wheel_and_has_its_card():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 16 * 2**20
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for part in ("Zalando SE", "MIT", "fastddpm train --data", "bits/dim", "samples.png"):
        assert part in card, part
    with Image.open(FOLDER / "samples.png") as picture:
        assert min(picture.size) > 200


@pytest.fixture(scope="module")
def garments() -> torch.Tensor:
    model = UNet.from_pretrained("fashion-mnist")
    return fastddpm.sample(model, 32, seed=1, steps=50, sampler="ddim", progress=False)[:, 0]


def test_its_samples_have_the_datas_statistics(garments):
    """Of the 60,000 training images: mean -0.43, standard deviation 0.71; corners black; the
    middle 8x8 pixels 0.14 on average, |difference| of horizontal neighbours 0.18. Noise, blank
    and saturated images are far from these.
    """
    assert garments.mean().item() == pytest.approx(-0.43, abs=0.15)
    assert garments.std().item() == pytest.approx(0.71, abs=0.12)
    assert garments[:, 10:18, 10:18].mean().item() == pytest.approx(0.14, abs=0.3)
    corners = garments[:, [0, 0, -1, -1], [0, -1, 0, -1]].mean(dim=1)
    assert (corners < -0.9).float().mean() > 0.9
    assert garments.diff(dim=2).abs().mean().item() == pytest.approx(0.18, abs=0.06)


def test_its_samples_differ(garments):
    distances = torch.cdist(garments.flatten(1), garments.flatten(1)) + 100 * torch.eye(32)
    assert distances.min() > 2, "two samples are all but the same image"


def test_it_tells_noise_from_image():
    """The error of eps lies well below 1, the error of a model that has learned nothing."""
    model = UNet.from_pretrained("fashion-mnist")
    x = torch.full((8, 1, 28, 28), -1.0)
    x[:, :, 4:24, 9:19] = 0.5  # a plain rectangle, as much of a garment as a test needs
    t = torch.full((8,), 300)
    with torch.no_grad():
        loss = model.diffusion.loss(model, x, t=t, seed=0, sample_index=torch.arange(8))
    assert loss.mean() < 0.15
