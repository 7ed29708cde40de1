"""The bundled data set of emoji: how a glyph becomes an image, and what the font gives."""

from __future__ import annotations

import importlib.util
import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastddpm
from fastddpm.data import open_dataset

SCRIPT = Path(fastddpm.__file__).parent / "checkpoints" / "emoji" / "make_data.py"


@pytest.fixture(scope="module")
def script():
    pytest.importorskip("fontTools", reason="needs fontTools, which comes with matplotlib")
    spec = importlib.util.spec_from_file_location("make_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_pixel_is_the_mean_of_sixteen_on_white(script):
    random = np.random.default_rng(0)
    glyph = random.integers(0, 256, (128, 136, 4), dtype=np.uint8)
    glyph[:, :4, 3] = glyph[:, -4:, 3] = 0
    file = io.BytesIO()
    Image.fromarray(glyph).save(file, format="PNG")
    got = script.small(file.getvalue())
    assert (got.shape, got.dtype) == ((32, 32, 3), np.uint8)
    for row, column in ((0, 0), (5, 17), (31, 31)):
        tile = glyph[4 * row : 4 * row + 4, 4 + 4 * column : 8 + 4 * column].astype(float)
        share = tile[..., 3:] / 255
        mean = (tile[..., :3] * share + 255 * (1 - share)).mean(axis=(0, 1))
        assert np.abs(got[row, column] - mean).max() <= 0.5 + 1e-9
    clear = Image.new("RGBA", (136, 128), (9, 9, 9, 0))
    clear.save(file := io.BytesIO(), format="PNG")
    assert (script.small(file.getvalue()) == 255).all()
    clear.resize((64, 64)).save(file := io.BytesIO(), format="PNG")
    with pytest.raises(ValueError, match="a glyph of"):
        script.small(file.getvalue())


def test_the_font_gives_two_sets_that_share_no_image(script, tmp_path, monkeypatch):
    if not os.path.exists(script.FONT):
        pytest.skip("needs the font: apt-get install fonts-noto-color-emoji")
    monkeypatch.setattr("sys.argv", ["make_data.py", str(tmp_path)])
    script.main()
    sets = {name: open_dataset(tmp_path / f"{name}.npz") for name in ("train", "test")}
    assert all(dataset.shape == (3, 32, 32) for dataset in sets.values())
    points = {name: np.load(tmp_path / f"{name}.npz")["code_points"] for name in sets}
    for name, dataset in sets.items():
        assert len(points[name]) == len(dataset)
    every = np.sort(np.concatenate(list(points.values())))
    assert np.array_equal(every[9::10], points["test"])
    assert 0x1F600 in every  # a face; no digits, joiners or letters of flags
    assert not {0x31, 0x200D, 0x1F1E9} & set(every.tolist())
    pictures = {image.tobytes() for d in sets.values() for image in d.images(range(len(d))).numpy()}
    assert len(pictures) == len(every)
