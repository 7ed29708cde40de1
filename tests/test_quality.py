"""A run of benchmarks/quality.py."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from extracting import toy
from PIL import Image
from script import script
from toy import images, tiny_unet


@pytest.fixture
def quality():
    with script("quality") as module:
        yield module


def test_a_run_prints_real_images_beside_the_models(quality, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality, "extractor", lambda _: toy())
    model = tiny_unet(in_channels=3, out_channels=3)
    size = model.image_size
    model.save_pretrained(tmp_path / "model")
    for k, name in enumerate(("train", "test")):
        x = torch.stack([images(3, *size, seed=20 * k + i) for i in range(20)])
        np.savez(tmp_path / name, images=x.permute(0, 2, 3, 1).numpy())
    given = [
        f"--test={tmp_path / 'test.npz'}", "-n=4", "--bits=2", f"--train={tmp_path / 'train.npz'}",
        f"--nearest={tmp_path / 'near.png'}", f"--json={tmp_path / 'x.json'}", "--steps=4",
    ]  # fmt: skip
    assert quality.main([str(tmp_path / "model"), *given]) == 0
    rows = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))["rows"]
    assert [row["n"] for row in rows] == [4, 4]
    real, drawn = rows
    assert real["images"] == "training images"
    assert np.isfinite([real["FD"], real["KID"], drawn["FD"], drawn["KID"]]).all()
    assert drawn["bits/dim"] > 0
    printed = capsys.readouterr().out
    assert "toy, against 20 held-out images; bits/dim of 2 of them" in printed
    with Image.open(tmp_path / "near.png") as picture:
        assert picture.mode == "RGB"
    with pytest.raises(
        ValueError, match=r"fashion-mnist are \(1, 28, 28\); the held-out ones \(3, "
    ):
        quality.main(["fashion-mnist", *given])
