"""Nearest neighbours against all distances in float64, with ties, few images and bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toy import images

from fastddpm import reference
from fastddpm.data import open_dataset
from fastddpm.evaluation.images import Images
from fastddpm.figures import nearest, neighbours

QUIET = {"progress": False}


def all_distances(a, b):
    """Of every pair, by differences in float64; (n, N)."""
    a, b = (np.asarray(x, np.float64).reshape(len(x), 1, -1) for x in (a, b))
    return np.sqrt(((a - b.transpose(1, 0, 2)) ** 2).sum(-1))


def in_order(distances, k):
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(distances, order, 1)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("many", [1, 7, 1000])
def test_pixels_against_all_distances(channels, many, monkeypatch):
    a, b = images(5, channels, 6, 4), images(30, channels, 6, 4, seed=1)
    monkeypatch.setattr(neighbours, "BYTES", 8 * channels * 24 * many)  # images a chunk
    indices, distances = nearest(a, b, k=9, **QUIET)
    order, expected = in_order(all_distances(a, b), 9)
    assert indices.tolist() == order.tolist()
    assert np.array_equal(distances.numpy(), expected)  # sums of whole numbers are exact
    assert (indices.dtype, distances.dtype) == (torch.int64, torch.float64)
    assert torch.equal(nearest(reference.to_unit(a), b, k=9, **QUIET)[0], indices)


def test_ties_go_to_the_lower_index(monkeypatch):
    b = images(4, 1, 5, 5).repeat(5, 1, 1, 1)  # each five times: 0, 4, 8, 12, 16 are alike
    monkeypatch.setattr(neighbours, "BYTES", 8 * 25 * 3)
    indices, distances = nearest(b[2:3], b, k=7, **QUIET)
    assert indices[0, :5].tolist() == [2, 6, 10, 14, 18]
    assert distances[0, :5].tolist() == [0.0] * 5
    assert indices[0, 5] < indices[0, 6]


def test_nearly_equal_features_keep_their_order():
    """By |a|^2 + |b|^2 - 2 ab these differences would be lost beside the length of the features."""
    offsets = torch.tensor([3e-7, 1e-7, 2e-7, 0.0])

    def features(x):
        return 1e6 + offsets[x[:, 0, 0, 0].long() % 4, None].double().expand(-1, 64) * 1e4

    x = torch.arange(4, dtype=torch.uint8)[:, None, None, None]
    indices, distances = nearest(x[3:], x, k=4, features=features, **QUIET)
    assert indices.tolist() == [[3, 1, 2, 0]]
    assert torch.allclose(distances[0, 1:] / distances[0, 1], torch.tensor([1.0, 2, 3]).double(),
                          rtol=1e-4)  # fmt: skip


@pytest.mark.parametrize("kind", ["tensor", "array"])
def test_features_against_all_distances(kind, monkeypatch):
    weights = torch.randn(3 * 5 * 4, 11, generator=torch.Generator().manual_seed(0))
    seen = []

    def features(x):
        assert x.dtype == torch.uint8
        seen.append(len(x))
        found = x.flatten(1).float() @ weights
        return found if kind == "tensor" else found.numpy()

    monkeypatch.setattr(neighbours, "MOST", 8)
    a, b = images(10, 3, 5, 4), images(21, 3, 5, 4, seed=1)
    indices, distances = nearest(a, b, k=3, features=features, **QUIET)
    order, expected = in_order(all_distances(features(a), features(b)), 3)
    assert indices.tolist() == order.tolist()
    assert np.allclose(distances, expected, rtol=1e-12, atol=0)
    assert seen[:-2] == [8, 2, 8, 8, 5]  # a few at a time


def test_data_sets_and_parts_of_them(tmp_path):
    x = images(12, 1, 6, 6)
    np.save(tmp_path / "x.npy", x.numpy())
    data = open_dataset(tmp_path / "x.npy")
    expected = nearest(x[:2], x, k=3, **QUIET)
    for each in (data, Images(data), Images(x)):
        got = nearest(x[:2], each, k=3, **QUIET)
        assert torch.equal(got[0], expected[0])
    assert nearest(x[4:5], Images(data, 3), k=1, **QUIET)[0].tolist() == [[1]]  # of 0, 4 and 8


def test_one_image():
    x = images(1, 3, 4, 4)
    indices, distances = nearest(x, x, k=1, **QUIET)
    assert (indices.tolist(), distances.tolist()) == ([[0]], [[0.0]])


A = images(2, 1, 4, 4)


@pytest.mark.parametrize(
    ("samples", "data", "options", "message"),
    [
        (A, A, {"k": 3}, "k must be at most the 2 images of data; got 3"),
        (A, A[:1], {"k": 2}, "k must be at most the 1 image of data; got 2"),
        (A, A, {"k": 0}, "k must be an integer of at least 1; got 0"),
        (A, images(2, 3, 4, 4), {}, r"of one shape; got \(1, 4, 4\) and \(3, 4, 4\)"),
        (A, images(2, 1, 4, 5), {}, r"of one shape; got \(1, 4, 4\) and \(1, 4, 5\)"),
        (A, A[:0], {}, "data must have at least one image; got none"),
        (A[:0], A, {}, r"samples must be a tensor \(n, C, H, W\), n >= 1; got \(0, 1, 4, 4\)"),
        (A[0], A, {}, "samples must be a tensor"),
        (A, A.float(), {}, "data must be a Dataset, or a tensor .* uint8; got .* torch.float32"),
        (A, "data", {}, "data must be a Dataset"),
        (A, A, {"k": 1, "features": lambda x: x.flatten(1)[:-1]}, r"must be \(n, width\); got"),
        (A, A, {"k": 1, "features": lambda x: x[:, 0]}, r"must be \(n, width\); got \(2, 4, 4\)"),
    ],
)  # fmt: skip
def test_mistakes(samples, data, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        nearest(samples, data, **options, **QUIET)
    assert "\n" not in str(caught.value)


def test_features_that_are_not_finite_name_the_image(monkeypatch):
    monkeypatch.setattr(neighbours, "MOST", 4)
    b = images(10, 1, 4, 4)

    def features(x):
        found = x.flatten(1).float()
        found[(x == b[6]).all(3).all(2).all(1)] = torch.nan
        return found

    with pytest.raises(ValueError, match="the features of image 6 are not finite"):
        nearest(b[:2], b, k=1, features=features, **QUIET)
    with pytest.raises(ValueError, match="the features of sample 5 are not finite"):
        nearest(b[1:8], b[:2], k=1, features=features, **QUIET)
