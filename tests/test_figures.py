"""Pictures to the pixel, and where samples may be written."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from toy import images, tiny_unet

from fastddpm import Trainer, reference
from fastddpm.data import open_dataset
from fastddpm.figures import (
    check_output,
    grid,
    labelled_grid,
    labels,
    loss_plot,
    read_image,
    save_image,
    save_samples,
    to_pil,
    to_uint8,
)
from fastddpm.training import fit


def test_to_uint8_is_the_inverse_of_the_training_datas_scaling():
    x = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(reference.to_unit(x)), x)
    assert to_uint8(x) is x


def test_to_uint8_rounds_to_the_nearest_and_clips():
    x = torch.tensor([10.4, 10.6, 0.4, 254.6, -7, 300, -0.6, 255.6]) / 127.5 - 1
    assert to_uint8(x).tolist() == [10, 11, 0, 255, 0, 255, 0, 255]
    assert to_uint8(x.double()).tolist() == to_uint8(x).tolist()
    infinite = torch.tensor([-torch.inf, torch.inf])
    assert to_uint8(infinite).tolist() == [0, 255]


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
def test_to_pil(channels, mode):
    x = images(channels, 3, 5)
    picture = to_pil(x)
    assert (picture.mode, picture.size) == (mode, (5, 3))
    expected = x.permute(1, 2, 0).numpy() if channels > 1 else x[0].numpy()
    assert np.array_equal(np.asarray(picture), expected)
    assert to_pil(reference.to_unit(x)).tobytes() == picture.tobytes()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_grid_layout(channels):
    x = images(5, channels, 3, 4)
    picture = np.asarray(grid(x, 3, padding=2, min_width=0))
    picture = picture.reshape(*picture.shape[:2], channels)
    expected = np.full((2 * (3 + 2) + 2, 3 * (4 + 2) + 2, channels), 255, np.uint8)
    for k in range(5):
        row, column = divmod(k, 3)
        top, left = 2 + 5 * row, 2 + 6 * column
        expected[top : top + 3, left : left + 4] = x[k].permute(1, 2, 0)
    assert np.array_equal(picture, expected)


@pytest.mark.parametrize(
    ("n", "columns", "size"),
    [(1, None, (1, 1)), (5, None, (3, 2)), (64, None, (8, 8)), (3, 9, (3, 1)), (4, 1, (1, 4))],
)
def test_grid_is_as_square_as_can_be_unless_told(n, columns, size):
    picture = grid(images(n, 1, 4, 4), columns, padding=0, min_width=0)
    assert picture.size == (4 * size[0], 4 * size[1])


def test_small_grids_are_enlarged_by_a_whole_factor():
    x = images(4, 1, 28, 28)
    small, large = (np.asarray(grid(x, 2, min_width=w)) for w in (0, 240))
    assert small.shape == (62, 62)
    assert np.array_equal(large, small.repeat(4, 0).repeat(4, 1))
    assert grid(images(1, 1, 4, 4)).width == 8 * 8  # by 8 at most


# ---- grids with labels ---------------------------------------------------------------------------

LABELS = {"rows": ["1000", "1"], "columns": ["0", "0.5", "1"], "corner": "t", "title": "a title"}


def changed(a: Image.Image, b: Image.Image) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of what differs between two pictures of one size and mode."""
    assert (a.size, a.mode) == (b.size, b.mode)
    pixels = np.asarray(a).reshape(a.height, a.width, -1) != np.asarray(b).reshape(
        b.height, b.width, -1
    )
    down, across = np.nonzero(pixels.any(axis=2))
    return across.min(), down.min(), across.max() + 1, down.max() + 1


def where(picture: Image.Image, image: torch.Tensor, factor: int) -> tuple[int, int]:
    """(x, y) of the one place where an image stands in a picture, enlarged by whole pixels."""
    pixels = np.asarray(picture).reshape(picture.height, picture.width, -1)
    cell = image.permute(1, 2, 0).numpy().repeat(factor, 0).repeat(factor, 1)
    first = (pixels == cell[0, 0]).all(axis=2)
    found = []
    for y, x in zip(*np.nonzero(first), strict=True):
        part = pixels[y : y + cell.shape[0], x : x + cell.shape[1]]
        if part.shape == cell.shape and np.array_equal(part, cell):
            found.append((x, y))
    assert len(found) == 1, f"{len(found)} places"
    return found[0]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_label_stands_over_its_column_and_beside_its_row(channels):
    x = images(6, channels, 12, 16)
    plain = labelled_grid(x, **LABELS, min_width=200)
    at = [where(plain, image, 4) for image in x]
    assert at[0][1] == at[1][1] < at[3][1]  # row by row
    assert at[0][0] == at[3][0] < at[1][0] < at[2][0]

    over = labelled_grid(x, **LABELS | {"columns": ["0", "0.7", "1"]}, min_width=200)
    left, top, right, bottom = changed(plain, over)
    assert at[1][0] <= left < right <= at[1][0] + 4 * 16  # over the second column alone,
    assert 0 < top < bottom <= at[1][1]  # and above its images

    beside = labelled_grid(x, **LABELS | {"rows": ["1000", "7"]}, min_width=200)
    left, top, right, bottom = changed(plain, beside)
    assert at[3][1] <= top < bottom <= at[3][1] + 4 * 12  # beside the second row alone,
    assert 0 < left < right <= at[3][0]  # and left of its images

    corner = labelled_grid(x, **LABELS | {"corner": "x"}, min_width=200)
    left, top, right, bottom = changed(plain, corner)
    assert right <= at[0][0]
    assert bottom <= at[0][1]

    title = labelled_grid(x, **LABELS | {"title": "b title"}, min_width=200)
    assert changed(plain, title)[3] <= changed(plain, over)[1]  # over the columns' labels
    for picture in (over, beside, corner, title):
        assert [where(picture, image, 4) for image in x] == at
    if channels in (2, 4):
        alpha = np.asarray(plain)[..., -1].copy()
        for left, top in at:
            alpha[top : top + 48, left : left + 64] = 255
        assert (alpha == 255).all()  # text and paper are opaque


def test_text_is_black_on_white_and_has_the_letters_it_is_given():
    x = images(2, 3, 8, 8)
    said = [np.asarray(labelled_grid(x, columns=["t", letter])) for letter in "λ?□"]
    assert said[0].min(axis=(0, 1)).max() < 60
    assert (said[0][0, 0] == 255).all()
    assert not np.array_equal(said[0], said[1])
    assert not np.array_equal(said[0], said[2])  # not the box of a letter that is missing


def test_wide_labels_widen_their_columns_and_long_titles_are_broken():
    x = images(4, 1, 6, 6)
    picture = labelled_grid(x, columns=["a label of many words", "b"], min_width=0)
    first, second = where(picture, x[0], 1), where(picture, x[1], 1)
    assert second[0] - first[0] > 100
    narrow = labelled_grid(x, columns=2, title="word", min_width=200)
    broken = labelled_grid(x, columns=2, title=" ".join(["word"] * 30), min_width=200)
    assert broken.width == narrow.width
    assert broken.height > narrow.height


def test_columns_that_are_apart():
    x = images(6, 1, 6, 6)
    near = labelled_grid(x, columns=3, min_width=0)
    apart = labelled_grid(x, columns=3, apart=(1,), min_width=0)
    gaps = [
        [where(p, x[k + 1], 1)[0] - where(p, x[k], 1)[0] for k in (0, 1)] for p in (near, apart)
    ]
    assert gaps[0] == [8, 8]
    assert gaps[1][0] > 16
    assert gaps[1][1] == 8


def test_without_labels_it_is_the_grid_of_the_same_pixels():
    x = images(5, 3, 8, 8)
    picture = labelled_grid(x, min_width=0)
    assert [where(picture, image, 1) for image in x] == [
        (2 + 10 * (k % 3), 2 + 10 * (k // 3)) for k in range(5)
    ]


@pytest.mark.parametrize(
    ("n", "options", "message"),
    [
        (5, {"columns": ["a", "b"]}, "5 images are no whole rows of 2 columns"),
        (4, {"columns": ["a", "b"], "rows": ["1"]}, "labels of 2 rows are needed; got 1"),
        (4, {"columns": 2, "rows": ["1", "2", "3"]}, "labels of 2 rows are needed; got 3"),
        (4, {"columns": 0}, "no whole rows of 0 columns"),
        (0, {}, "at least one image"),
    ],
)
def test_labels_that_do_not_fit(n, options, message):
    with pytest.raises(ValueError, match=message):
        labelled_grid(images(5, 1, 4, 4)[:n], **options)


def test_pillows_own_font_stands_in(monkeypatch):
    truetype = ImageFont.truetype

    def in_memory_alone(font, *arguments, **options):
        if isinstance(font, str):
            raise OSError("cannot open resource")
        return truetype(font, *arguments, **options)

    monkeypatch.setattr("PIL.ImageFont.truetype", in_memory_alone)
    labels._font.cache_clear()
    try:
        x = images(2, 1, 8, 8)
        greek, plain, other = (
            np.asarray(labelled_grid(x, columns=["t", label])) for label in ("λ", "lambda", "mu")
        )
        assert np.array_equal(greek, plain)
        assert not np.array_equal(greek, other)
    finally:
        labels._font.cache_clear()


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png_of_samples(tmp_path, channels):
    x = images(6, channels, 8, 8)
    path = save_samples(x, tmp_path / "new" / "x.PNG", columns=2)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert np.array_equal(np.asarray(picture), np.asarray(grid(x, 2)))


@pytest.mark.parametrize("channels", [5, 0, 6])
def test_a_png_of_other_channels_is_refused(tmp_path, channels):
    x = images(2, 6, 8, 8)[:, :channels]
    (tmp_path / "x.png").write_bytes(b"old")
    for call in (
        lambda: save_samples(x, tmp_path / "x.png"),
        lambda: check_output(tmp_path / "x.png", channels=channels),
        lambda: grid(x),
        lambda: to_pil(x[0]),
        lambda: read_image(tmp_path / "x.png", (8, 8), channels),
    ):
        with pytest.raises(ValueError, match=f"images of {channels} channels can't be a .png"):
            call()
    assert (tmp_path / "x.png").read_bytes() == b"old"
    check_output(tmp_path / "x.npz", channels=channels)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_pictures_are_read_back(tmp_path, channels):
    x = images(channels, 6, 5)
    save_image(to_pil(x), tmp_path / "x.png")
    assert torch.equal(read_image(tmp_path / "x.png", (6, 5), channels), x)


def test_reading_adds_and_keeps_alpha(tmp_path):
    x = images(4, 6, 5)
    save_image(to_pil(x[:3]), tmp_path / "rgb.png")
    opaque = torch.full((1, 6, 5), 255, dtype=torch.uint8)
    assert torch.equal(read_image(tmp_path / "rgb.png", (6, 5), 4), torch.cat((x[:3], opaque)))
    grey = read_image(tmp_path / "rgb.png", (6, 5), 2)
    assert torch.equal(grey[:1], read_image(tmp_path / "rgb.png", (6, 5), 1))
    assert torch.equal(grey[1:], opaque)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_npz_of_samples(tmp_path, channels):
    x = images(3, channels, 4, 5)
    path = save_samples(reference.to_unit(x), tmp_path / "x.npz")
    with np.load(path) as file:
        assert file.files == ["images"]
        assert file["images"].dtype == np.uint8
        assert np.array_equal(file["images"], x.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("name", ["x.png", "x.npz"])
def test_a_failed_write_leaves_the_old_file(tmp_path, name, monkeypatch):
    path = tmp_path / name
    path.write_bytes(b"old")

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("fastddpm.checkpoint.os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        save_samples(images(2, 1, 4, 4), path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["a.png", "a.npz", "a", "new/folders/a.png", "new/folders/a"])
def test_outputs_that_can_be_written(tmp_path, name):
    assert check_output(tmp_path / name) == tmp_path / name
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("a.jpg", ValueError, r"a\.jpg': give a \.png file .*\.npz file .*folder"),
        ("a.pt", ValueError, "give a .png"),
        ("file/a.png", NotADirectoryError, "file is not a folder"),
        ("file/new/a.npz", NotADirectoryError, "file is not a folder"),
        ("file", NotADirectoryError, "file is not a folder"),
    ],
)
def test_outputs_that_cannot(tmp_path, name, error, message):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(error, match=message):
        check_output(tmp_path / name)
    assert (tmp_path / "file").read_bytes() == b"old"


def test_outputs_of_one_kind(tmp_path):
    with pytest.raises(ValueError, match=r"x\.npz': give \.png$"):
        check_output(tmp_path / "x.npz", kinds=(".png",))
    with pytest.raises(ValueError, match=r"x': give \.png$"):
        check_output(tmp_path / "x", kinds=(".png",))
    # Where it has to be a folder, a dot in its name is no suffix.
    assert check_output(tmp_path / "run.v1", kinds=("",)) == tmp_path / "run.v1"


def test_a_folder_without_permission_is_refused(tmp_path, monkeypatch):
    # root may write anywhere
    monkeypatch.setattr("fastddpm.figures.output.os.access", lambda *_: False)
    with pytest.raises(PermissionError, match="can't be written to"):
        check_output(tmp_path / "a.png")


@pytest.mark.parametrize(
    "losses", [[0.5, 0.2, 0.1], [0.3], [1.0, 0.0], [-1.0, 2.0], [0.4, math.nan, 0.3, 0.2]]
)
def test_loss_plot_is_a_picture_of_the_losses(tmp_path, losses):
    path = tmp_path / "loss.png"
    loss_plot(path, range(50, 50 + len(losses)), losses, "bits/dim")
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[:2] == (540, 960)
    if len(losses) > 1:
        blue = (pixels[..., 2].astype(int) - pixels[..., 0]) > 100
        assert blue.sum() > 200  # the line is there
    assert [p.name for p in tmp_path.iterdir()] == ["loss.png"]


def test_read_image_takes_size_and_channels(tmp_path):
    x = images(3, 6, 6)
    path = tmp_path / "000000.png"
    save_image(to_pil(x), path)
    assert torch.equal(read_image(path, (6, 6), 3), x)
    assert read_image(path, (3, 2), 1).shape == (1, 3, 2)
    with pytest.raises(ValueError, match=r"no\.png can't be read"):
        read_image(tmp_path / "no.png", (6, 6), 3)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"text\.png"):
        read_image(tmp_path / "text.png", (6, 6), 3)


def test_a_run_whose_samples_are_no_pictures_is_refused_before_it_trains(tmp_path):
    trainer = Trainer(tiny_unet(in_channels=5))
    np.save(tmp_path / "x.npy", images(4, 1, 8, 8).numpy())
    dataset = open_dataset(tmp_path / "x.npy")
    with pytest.raises(ValueError, match=r"images of 5 channels can't be a \.png"):
        fit(trainer, dataset, tmp_path / "run", steps=1, sample_every=1, progress=False)
    assert trainer.step_count == 0
    assert not (tmp_path / "run").exists()
