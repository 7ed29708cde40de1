"""A model's samples, for who judges them: `sample`'s, drawn once where a folder keeps them."""

from __future__ import annotations

import pytest
import torch
from toy import SCHEDULE, tiny_unet, wave

import fastddpm
from fastddpm import Diffusion, figures, shards
from fastddpm.evaluation import samples as module
from fastddpm.evaluation.samples import samples


@pytest.fixture(scope="module")
def model():
    return tiny_unet()


def drawn(model, n, **options):
    return figures.to_uint8(fastddpm.sample(model, n, progress=False, **options))


@pytest.mark.parametrize("shard_size", [0, 4])
def test_a_folders_samples_are_drawn_once(model, tmp_path, monkeypatch, shard_size):
    """Also when the first call asked for fewer, and for those from within a file on."""
    options = {"folder": tmp_path / "x", "steps": 3, "progress": False, "shard_size": shard_size}
    wanted = drawn(model, 11, steps=3)
    assert torch.equal(torch.cat(list(samples(model, 5, **options))), wanted[:5])
    asked = []
    draw = shards.Chain.draw
    monkeypatch.setattr(
        shards.Chain,
        "draw",
        lambda self, seed, index, *a, **k: asked.extend(index) or draw(self, seed, index, *a, **k),
    )
    found = samples(model, 11, **options)
    assert sorted(map(int, asked)) == list(range(5, 11))
    assert (len(found), found.shape) == (11, (1, 8, 8))
    for _ in range(2):
        parts = list(found)
        assert all(part.dtype == torch.uint8 for part in parts)
        assert torch.equal(torch.cat(parts), wanted)
    asked.clear()
    some = samples(model, 5, first_index=6, **options)
    assert torch.equal(torch.cat(list(some)), wanted[6:])
    assert asked == []


def test_a_folder_of_another_set_is_refused_and_left(model, tmp_path):
    folder = tmp_path / "x"
    samples(model, 2, folder=folder, steps=2, progress=False)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for other, options, said in (
        (tiny_unet(seed=1), {"steps": 2}, "its model is"),
        (model, {"steps": 3}, "its steps is 2 and here 3"),
        (model, {"steps": 2, "seed": 1}, "its seed is 0 and here 1"),
    ):
        with pytest.raises(ValueError, match=f"is a sample of another set: {said}"):
            samples(other, 3, folder=folder, progress=False, **options)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_files_that_are_gone_or_damaged_since_are_named(model, tmp_path):
    found = samples(model, 3, folder=tmp_path, steps=2, progress=False)
    (tmp_path / "000001.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"sample 1 is not in .*: .*000001.png is damaged"):
        list(found)
    (tmp_path / "000001.png").unlink()
    with pytest.raises(ValueError, match=f"sample 1 is not in {tmp_path}$"):
        list(found)


def test_a_damaged_file_hides_none_that_is_whole(model, tmp_path):
    """Its samples are drawn again, in files of other names where others are asked for."""
    options = {"folder": tmp_path, "steps": 2, "progress": False}
    samples(model, 8, shard_size=8, **options)
    (tmp_path / "00000000-00000008.npz").write_bytes(b"no shard")
    found = torch.cat(list(samples(model, 8, shard_size=3, **options)))
    assert torch.equal(found, drawn(model, 8, steps=2))


def test_without_a_folder_they_are_drawn_piece_by_piece(model, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 4 * 64 * 3)
    found = samples(model, 7, seed=3, first_index=2, steps=3, progress=False)
    parts = list(found)
    assert [len(part) for part in parts] == [3, 3, 1]
    assert torch.equal(torch.cat(parts), drawn(model, 7, seed=3, first_index=2, steps=3))


def test_classes_go_with_their_samples(tmp_path, monkeypatch):
    model = tiny_unet(num_classes=3)
    y = torch.tensor([0, 1, 2, 2, 1])
    options = {"steps": 2, "model_kwargs": {"y": y}}
    wanted = drawn(model, 5, **options)
    monkeypatch.setattr(module, "PIECE", 4 * 64 * 2)
    for folder in (None, tmp_path / "x"):
        found = torch.cat(list(samples(model, 5, folder=folder, progress=False, **options)))
        assert torch.equal(found, wanted)


def test_a_callable_has_no_folder(tmp_path):
    options = {"shape": (1, 4, 4), "diffusion": Diffusion(SCHEDULE), "progress": False}
    found = torch.cat(list(samples(wave, 3, **options)))
    assert torch.equal(found, drawn(wave, 3, shape=(1, 4, 4), diffusion=Diffusion(SCHEDULE)))
    with pytest.raises(ValueError, match=r"model must be a fastddpm.UNet; got function"):
        samples(wave, 3, folder=tmp_path / "x", **options)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n": 0}, "n must be"),
        ({"seed": -1}, "seed must be"),
        ({"steps": 0}, "steps"),
        ({"start": 3}, "samples takes no start"),
        ({"batch_size": 0}, "batch_size"),
        ({"sampler": "euler"}, "sampler must be one of"),
        ({"model_kwargs": {"y": torch.zeros(2, dtype=torch.int64)}}, "y"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_drawn(model, options, said):
    with pytest.raises(ValueError, match=said):
        samples(model, **{"n": 2, "progress": False, **options})
