"""Distances of two sets of features: against their formulas, torch-fidelity's numbers, and sets of
which they are known. Features: from every form of images, and from the folder that keeps them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import scipy.linalg
import torch
from extracting import means, needed, torch_fidelity, toy
from toy import images

from fastddpm.data import open_dataset
from fastddpm.evaluation import distances, extractors
from fastddpm.evaluation.distances import Figure, compare, features
from fastddpm.evaluation.feature_cache import user_cache


def normal(n, width, *, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).normal(size=(n, width)).astype(dtype)


def wide(width, classifier=None):
    return toy(width=width, classifier=classifier)


# ---- the Fréchet distance ------------------------------------------------------------------------


def test_frechet_distance_is_its_formula():
    a, b = normal(60, 5), normal(40, 5, seed=1) @ normal(5, 5, seed=2) + 1
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cross = scipy.linalg.sqrtm(s @ t).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * cross)
    assert distances.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert distances.frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n", [2, 3, 30, 300])
def test_frechet_distance_of_more_features_than_images(n):
    """Known in closed form of any rank: of a set and itself moved by m and spread r times as far it
    is |m + (r - 1) mean|^2 + (r - 1)^2 tr S."""
    a = normal(n, 40, dtype=np.float32)
    assert distances.frechet_distance(a, a) == 0
    exact = a.astype(np.float64)
    trace = exact.var(axis=0, ddof=1).sum()
    moved = ((exact.mean(axis=0) + 3) ** 2).sum() + trace
    assert distances.frechet_distance(a, 2 * exact + 3) == pytest.approx(moved, rel=1e-9)
    ratio = np.sqrt((2 * n - 2) / (2 * n - 1))  # twice the same images: by n - 1 or 2 n - 1
    twice = distances.frechet_distance(a, np.concatenate([a, a]))
    assert twice == pytest.approx((1 - ratio) ** 2 * trace, rel=1e-5)


def test_frechet_distance_loses_nothing_far_from_zero():
    """A large mean with small spread, at which products of features lose all digits."""
    a, b = normal(200, 6), normal(200, 6, seed=1)
    near = distances.frechet_distance(a, b)
    assert distances.frechet_distance(a + 2.0**20, b + 2.0**20) == pytest.approx(near, rel=1e-6)


# ---- KID, IS, precision and recall ---------------------------------------------------------------


def test_kernel_distance_is_unbiased():
    """0 on average between sets of one kind, and the difference of the kernel's means between
    others."""
    one, other, far = (normal(400, 2, seed=k) + shift for k, shift in ((1, 0), (2, 0), (3, 2)))
    mean, deviation = distances.kernel_distance(one, other, size=200)
    assert abs(mean) < deviation < 0.3
    assert distances.kernel_distance(one, far, size=200)[0] > 20 * deviation
    flat = np.ones((4, 2)), np.zeros((4, 2))  # k(1, 1) = 8, k(0, .) = 1
    assert distances.kernel_distance(*flat, size=2) == (8 + 1 - 2, 0)


def test_kernel_distance_is_a_function_of_the_seed():
    a, b = normal(40, 3), normal(40, 3, seed=1)
    first = distances.kernel_distance(a, b, size=20, seed=2**40 + 1)
    assert distances.kernel_distance(a, b, size=20, seed=2**40 + 1) == first
    assert distances.kernel_distance(a, b, size=20, seed=1) != first


def test_inception_score_is_between_1_and_the_classes():
    assert distances.inception_score(np.zeros((40, 7))) == (pytest.approx(1), 0)
    sure = 1000 * np.eye(4)[np.arange(400) % 4]
    mean, deviation = distances.inception_score(sure)
    assert 3.8 < mean <= 4
    assert deviation > 0  # the parts of the shuffled set have each class not quite equally
    assert distances.inception_score(sure[:2])[0] == pytest.approx(2)  # one part of both


def test_precision_and_recall_of_known_sets():
    real = np.concatenate([normal(50, 4), normal(50, 4, seed=1) + 100])
    assert distances.precision_recall(real, real) == (1, 1)
    assert distances.precision_recall(real + 1000, real) == (0, 0)
    half = normal(60, 4, seed=2) * 0.1  # one of two modes, and its middle alone
    precision, recall = distances.precision_recall(half, real)
    assert precision == 1
    assert recall < 0.1
    assert distances.precision_recall(real, half) == (recall, precision)
    same = np.repeat(normal(5, 4) + 2.0**10, 4, axis=0)  # balls without a radius
    assert distances.precision_recall(same, same) == (1, 1)


# ---- torch-fidelity ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_torch_fidelity_has_the_same_figures_of_the_same_features(dtype):
    """To rounding in float64. From float32 features it computes means, kernels and distances in
    float32."""
    torch_fidelity()
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    exact = dtype == np.float64
    a = normal(300, 12, dtype=dtype)
    b = (normal(250, 12, seed=1) @ normal(12, 12, seed=2) / 3 + 0.3).astype(dtype)
    x, y = torch.from_numpy(a), torch.from_numpy(b)
    fid = fid_statistics_to_metric(*map(fid_features_to_statistics, (x, y)), verbose=False)
    options = {"kid_subset_size": 100, "kid_subsets": 20, "rng_seed": 5, "verbose": False}
    kid, prc = kid_features_to_metric(x, y, **options), prc_features_to_metric(x, y, **options)
    isc = isc_features_to_metric(x, rng_seed=5)

    given = wide(12, classifier=lambda f: f)
    found = compare(a, b, given, kid_subsets=20, kid_subset_size=100, seed=5, progress=False)
    by_name = {figure.name: figure for figure in found}
    assert list(by_name) == ["FD-toy", "KID-toy", "IS-toy", "precision-toy", "recall-toy"]
    close = 1e-10 if exact else 1e-5
    assert by_name["FD-toy"].value == pytest.approx(fid["frechet_inception_distance"], rel=close)
    got = by_name["KID-toy"]
    assert got.value == pytest.approx(kid["kernel_inception_distance_mean"], rel=close)
    assert got.spread == pytest.approx(kid["kernel_inception_distance_std"], rel=close)
    got = by_name["precision-toy"], by_name["recall-toy"]
    slack = 0 if exact else 1 / 250  # an image at a ball's border
    assert got[0].value == pytest.approx(prc["precision"], abs=slack + 1e-7)
    assert got[1].value == pytest.approx(prc["recall"], abs=slack + 1e-7)
    assert 0 < got[0].value < 1
    # The classifier passes the extractor's float32.
    assert by_name["IS-toy"].value == pytest.approx(isc["inception_score_mean"], rel=1e-6)
    assert by_name["IS-toy"].spread == pytest.approx(isc["inception_score_std"], rel=1e-4)


@pytest.mark.parametrize(
    "name",
    ["toy", pytest.param(extractors.EFFICIENTNET, marks=pytest.mark.slow)],  # 1280 eigenvalues
)
def test_torch_fidelity_has_the_same_figures_of_the_same_images(name):
    """With an extractor of ours registered there: a whole run of it, from images to figures."""
    fidelity = torch_fidelity()
    given = toy(classifier=lambda f: f[:, :5])
    if name != "toy":
        needed(*extractors.EFFICIENTNET_PACKAGES)
        given = extractors.extractor(name)

    class Ours(fidelity.FeatureExtractorBase):
        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)

        def forward(self, x):
            found = given(x)
            by_name = {"features": found, "logits": given.logits(found)}
            return tuple(by_name[name] for name in self.features_list)

        @staticmethod
        def get_provided_features_list():
            return "features", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "logits" if metric == "isc" else "features"

    fidelity.register_feature_extractor("ours", Ours)
    try:
        sets = [images(36, 3, 8, 8, seed=1), images(40, 3, 8, 8, seed=2) // 2 + 40]
        wanted = fidelity.calculate_metrics(
            **{f"input{k + 1}": Set(x) for k, x in enumerate(sets)},
            feature_extractor="ours", fid=True, kid=True, isc=True, prc=True, cuda=False,
            kid_subset_size=18, rng_seed=7, batch_size=32, save_cpu_ram=True, cache=False,
            verbose=False,
        )  # fmt: skip
    finally:
        del fidelity.registry.FEATURE_EXTRACTORS_REGISTRY["ours"]
    found = [features(x, given, progress=False) for x in sets]
    ours = {
        figure.name.removesuffix(given.suffix): figure.value
        for figure in compare(*found, given, seed=7, progress=False)
    }
    # It takes the means, the kernels and the distances of float32 features in float32.
    assert ours["FD"] == pytest.approx(wanted["frechet_inception_distance"], rel=1e-5)
    assert ours["KID"] == pytest.approx(wanted["kernel_inception_distance_mean"], rel=1e-5)
    assert ours["IS"] == pytest.approx(wanted["inception_score_mean"], rel=1e-6)
    assert ours["precision"] == pytest.approx(wanted["precision"], abs=1e-6)
    assert ours["recall"] == pytest.approx(wanted["recall"], abs=1e-6)


class Set(torch.utils.data.Dataset):
    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, k):
        return self.x[k]


# ---- compare -------------------------------------------------------------------------------------


def test_figures_say_of_how_many_images_they_are():
    found = compare(normal(3, 12), normal(30, 12, seed=1), wide(12), progress=False)
    assert [f.name for f in found] == ["FD-toy", "KID-toy"]  # no classes; no third neighbour
    assert all((f.n_generated, f.n_real) == (3, 30) for f in found)
    assert found[0].note == "3 images do not determine the covariance of 12 features: it has rank 2"
    assert found[0].spread is None
    assert found[1].note == "100 subsets of 2"
    many = compare(normal(30, 12), normal(30, 12), wide(12), progress=False)
    assert many[0] == Figure("FD-toy", 0.0, None, 30, 30)
    assert json.dumps(vars(many[1]))


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        (normal(1, 12), ValueError, "generated has 1 image: how a set is spread is seen from 2 on"),
        (normal(0, 12), ValueError, "generated has 0 images: "),
        (normal(5, 11), ValueError, "generated has 11 features of each image; toy has 12"),
        (
            normal(5, 12)[0],
            ValueError,
            r"generated must be features, \(n, 12\) .* got \(12,\) float",
        ),
        (images(5, 1, 4, 4), ValueError, r"distances.features gives .* got \(5, 1, 4, 4\) uint8"),
        ([1.0], ValueError, "got None list"),
        (
            np.where(normal(5, 12) > 1.5, np.nan, 1),
            FloatingPointError,
            r"of generated image \d are",
        ),
    ],
)
def test_features_that_can_not_be_compared_are_named(given, error, said):
    with pytest.raises(error, match=said):
        compare(given, normal(9, 12), wide(12), progress=False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kid_subsets": 0}, "kid_subsets must be an integer of at least 1; got 0"),
        ({"kid_subset_size": 10}, "kid_subset_size must be an integer in 1 .. 9; got 10"),
        ({"kid_subset_size": 1}, "kid_subset_size must be at least 2; got 1"),
        ({"seed": -1}, "seed must be in 0 .. 2\\^64 - 1; got -1"),
    ],
)
def test_options_out_of_range_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        compare(normal(9, 12), normal(9, 12), wide(12), progress=False, **options)


# ---- features of images --------------------------------------------------------------------------


class Slices:
    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, part):
        assert isinstance(part, slice)
        return self.x[part]


def test_features_of_every_form_of_images(tmp_path):
    n = distances.CHUNK + 50
    x = images(n, 3, 4, 4)
    np.save(tmp_path / "x.npy", x.numpy())
    wanted = toy()(x).numpy()
    parts = x.split([1, 31, 200, distances.CHUNK - 230, 48])
    for given in (x, Slices(x), open_dataset(tmp_path / "x.npy", channels=3), parts, iter(parts)):
        found = features(given, toy(), progress=False)
        assert found.dtype == np.float32
        assert np.array_equal(found, wanted)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([images(2, 3, 4, 4), images(2, 3, 4, 5)], "images of 3x4x5 follow such of 3x4x4"),
        ([images(2, 3, 4, 4), images(2, 1, 4, 4)], "images of 1x4x4 follow such of 3x4x4"),
        ([], "there are no images"),
        (images(2, 4, 4, 4), "got 4"),
        (torch.zeros(3, 1, 4, 4), "uint8"),
        ("a/path", "got str"),
        (images(3, 1, 4, 4).numpy(), "got ndarray"),
        (None, "got NoneType"),
    ],
)
def test_images_that_no_features_are_of(given, said):
    with pytest.raises(ValueError, match=said):
        features(given, toy(), progress=False)


def test_features_that_are_not_finite_name_their_image():
    x = images(100, 1, 4, 4)
    x[77] = 255

    def network(x):
        return means(x).masked_fill(x.flatten(1).min(dim=1).values[:, None] == 255, torch.nan)

    with pytest.raises(FloatingPointError, match="features of image 77 by toy are not finite"):
        features(x, toy(network), progress=False)


class Counting:
    """A network that counts its images and ends at the `stop`-th."""

    def __init__(self, stop=10**9):
        self.n, self.stop = 0, stop

    def __call__(self, x):
        if self.n >= self.stop:
            raise KeyboardInterrupt
        self.n += len(x)
        return means(x)


def test_what_is_kept_is_not_computed_again(tmp_path):
    """Whoever asks: the same images in other sets, an interrupted call. And not of another
    network."""
    x, chunk = images(2 * distances.CHUNK + 10, 1, 4, 4), distances.CHUNK
    wanted = toy()(x).numpy()

    def of(x, stop=10**9, **options):
        network = Counting(stop)
        found = features(x, toy(network, **options), cache=tmp_path, progress=False)
        return found, network.n

    with pytest.raises(KeyboardInterrupt):
        of(x, stop=chunk + 64)
    found, computed = of(x)
    assert np.array_equal(found, wanted)
    assert computed == chunk + extractors.BATCH  # the rest, the last batch filled up
    found, computed = of(x.expand(-1, 3, -1, -1))
    assert np.array_equal(found, wanted)
    assert computed == 0
    assert of(x[: chunk + 10])[1] == extractors.BATCH
    assert of(x, name="another")[1] > chunk


def test_a_damaged_file_is_computed_again_and_said(tmp_path):
    x, other = images(40, 1, 4, 4), images(40, 1, 4, 4, seed=1)
    wanted = features(x, toy(), cache=tmp_path, progress=False)
    (path,) = tmp_path.rglob("*.safetensors")
    whole = path.read_bytes()
    features(other, toy(), cache=tmp_path, progress=False)
    (another,) = set(tmp_path.rglob("*.safetensors")) - {path}
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    for content, said in (
        (whole[:-9], "not a whole safetensors file"),
        (b"", "not a whole safetensors file"),
        (bytes(flipped), "is damaged"),
        (another.read_bytes(), "holds no features of these images"),
    ):
        path.write_bytes(content)
        with pytest.warns(RuntimeWarning, match=f"{said}.*: they are computed again$"):
            found = features(x, toy(), cache=tmp_path, progress=False)
        assert np.array_equal(found, wanted)
        network = Counting()  # and it is there again
        found = features(x, toy(network), cache=tmp_path, progress=False)
        assert np.array_equal(found, wanted)
        assert network.n == 0


def test_a_folder_that_takes_no_files_is_said_once(tmp_path):
    (tmp_path / "file").write_text("")
    x = images(2 * distances.CHUNK, 1, 4, 4)
    with pytest.warns(RuntimeWarning, match="features are not kept for the next time") as warned:
        found = features(x, toy(), cache=tmp_path / "file", progress=False)
    assert len(warned) == 1
    assert np.array_equal(found, toy()(x).numpy())
    with pytest.raises(ValueError, match="output ''"):
        features(x, toy(), cache="", progress=False)


def test_the_users_own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDDPM_CACHE", str(tmp_path / "own"))
    x = images(5, 1, 4, 4)
    features(x, toy(), cache=True, progress=False)
    assert len(list((tmp_path / "own").rglob("*.safetensors"))) == 1
    shutil.rmtree(tmp_path / "own")
    features(x, toy(), cache=False, progress=False)
    assert not (tmp_path / "own").exists()
    monkeypatch.delenv("FASTDDPM_CACHE")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert user_cache() == tmp_path / "xdg" / "fastddpm"
