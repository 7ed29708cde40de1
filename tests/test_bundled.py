"""The models that come with the package: what a stranger's first commands draw from."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

import fastddpm
from fastddpm import UNet
from fastddpm.pretrained import BUNDLED, bundled_models
from fastddpm.training.run import PRESETS

NAMES = ["emoji", "fashion-mnist"]
CHAINS = {  # short ones that keep to the data's statistics
    "emoji": {"steps": 100},
    "fashion-mnist": {"steps": 50, "sampler": "ddim"},
}


def test_these_come_with_the_package():
    assert bundled_models() == NAMES
    assert sum(path.stat().st_size for path in BUNDLED.rglob("*")) < 32 * 2**20  # of a wheel


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_presets_model(name):
    model, preset = UNet.from_pretrained(name), PRESETS[name]
    with torch.device("meta"):
        expected = UNet(**preset.model)
    assert model.config == expected.config
    assert model.diffusion.to_config() == fastddpm.Diffusion().to_config()
    assert all(p.isfinite().all() for p in model.parameters())
    assert preset.flip is (name == "emoji"), "shoes and sleeves have a side"


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("fashion-mnist", ("Zalando SE", "MIT")),
        ("emoji", ("Google", "SIL Open Font License", "make_data.py")),
    ],
)
def test_it_has_its_card(name, parts):
    card = (BUNDLED / name / "README.md").read_text(encoding="utf-8")
    for part in (*parts, "fastddpm train --data", "bits/dim", "EfficientNet-Lite0", "samples.png"):
        assert part in card, part
    with Image.open(BUNDLED / name / "samples.png") as picture:
        assert min(picture.size) > 200


@pytest.fixture(scope="module")
def drawn():
    """A function of the name: 24 samples of a short chain, drawn once."""
    kept: dict[str, torch.Tensor] = {}

    def draw(name: str) -> torch.Tensor:
        if name not in kept:
            model = UNet.from_pretrained(name)
            kept[name] = fastddpm.sample(model, 24, seed=1, progress=False, **CHAINS[name])
        return kept[name]

    return draw


def test_garments_have_the_datas_statistics(drawn):
    """Of the 60,000 training images: mean -0.43, standard deviation 0.71; corners black; the
    middle 8x8 pixels 0.14 on average, |difference| of horizontal neighbours 0.18. Noise, blank
    and saturated images are far from these.
    """
    garments = drawn("fashion-mnist")[:, 0]
    assert garments.mean().item() == pytest.approx(-0.43, abs=0.15)
    assert garments.std().item() == pytest.approx(0.71, abs=0.12)
    assert garments[:, 10:18, 10:18].mean().item() == pytest.approx(0.14, abs=0.3)
    corners = garments[:, [0, 0, -1, -1], [0, -1, 0, -1]].mean(dim=1)
    assert (corners < -0.9).float().mean() > 0.9
    assert garments.diff(dim=2).abs().mean().item() == pytest.approx(0.18, abs=0.06)


def test_emoji_have_the_datas_statistics(drawn):
    """Of the 1,248 training images: mean 0.57, standard deviation 0.58; corners white; the channels
    differ by 0.46 on average, horizontal neighbours by 0.11.
    """
    emoji = drawn("emoji")
    assert emoji.mean().item() == pytest.approx(0.57, abs=0.25)
    assert emoji.std().item() == pytest.approx(0.58, abs=0.15)
    corners = emoji[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].mean(dim=(1, 2))
    assert (corners > 0.8).float().mean() > 0.7
    colour = (emoji.amax(dim=1) - emoji.amin(dim=1)).mean().item()
    assert colour == pytest.approx(0.46, abs=0.25)
    assert emoji.diff(dim=3).abs().mean().item() == pytest.approx(0.11, abs=0.07)


@pytest.mark.parametrize("name", NAMES)
def test_its_samples_differ(drawn, name):
    flat = drawn(name).flatten(1)
    distances = torch.cdist(flat, flat) + 100 * torch.eye(len(flat))
    assert distances.min() > 2, "two samples are all but the same image"


@pytest.mark.parametrize(("name", "ground"), [("fashion-mnist", -1.0), ("emoji", 1.0)])
def test_it_tells_noise_from_image(name, ground):
    """The error of eps lies well below 1, the error of a model that has learned nothing."""
    model = UNet.from_pretrained(name)
    x = torch.full((8, model.in_channels, *model.image_size), ground)
    x[:, :, 4:24, 9:19] = 0.5  # a plain rectangle, as much of a picture as a test needs
    t = torch.full((8,), 300)
    with torch.no_grad():
        loss = model.diffusion.loss(model, x, t=t, seed=0, sample_index=torch.arange(8))
    assert loss.mean() < 0.15
