"""The examples run on real images: handwritten digits or what is at hand, around the networks of
peers.py where the trainer's own package is none of an index; each says in one line what it misses.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import trainers_plain
from PIL import Image

import fastddpm
from fastddpm import examples
from fastddpm.accelerate import report
from fastddpm.examples import common

FASHION = Path("/usr/share/datasets/fashion-mnist")
NAMES = {m.name for m in pkgutil.iter_modules(examples.__path__)} - {"common"}
PACKAGES = {"diffusers_pipeline": "diffusers", "diffusers_training": "diffusers",
            "lucidrains": "denoising_diffusion_pytorch"}  # fmt: skip
QUICK = ("--steps=2", "--batch=2", "--timesteps=3", "--size=16", "--images=2")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Real images: Fashion-MNIST's test images, or else scikit-learn's digits."""
    if FASHION.is_dir():
        return FASHION / "t10k-images-idx3-ubyte.gz"
    if importlib.util.find_spec("sklearn") is None:
        pytest.skip("neither Fashion-MNIST nor scikit-learn's digits are here")
    from sklearn.datasets import load_digits

    path = tmp_path_factory.mktemp("digits") / "digits.npy"
    np.save(path, (load_digits().images * (255 / 16)).astype(np.uint8))
    return path


@pytest.fixture
def accelerated(monkeypatch):
    """What accelerate was given, in the order of the calls."""
    given = []

    def call(model):
        given.append(accelerate(model))
        return given[-1]

    accelerate = fastddpm.accelerate
    monkeypatch.setattr(fastddpm, "accelerate", call)
    return given


def run(name: str, *options: str) -> int:
    module = importlib.import_module(f"fastddpm.examples.{name}")
    return common.main(module.example, module.PROJECT, list(options))


@pytest.mark.filterwarnings("ignore:abar_T is")  # of chains of three steps
@pytest.mark.parametrize("name", sorted(NAMES))
def test_example(name, data, accelerated, monkeypatch, tmp_path, capsys):
    if name in PACKAGES:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            pytest.skip(f"{PACKAGES[name]} is not installed")
    else:
        for module, names in getattr(trainers_plain, name)().items():
            monkeypatch.setitem(sys.modules, module, names)
    size = ("--size=32",) if name == "diffusers_pipeline" else ()
    width = ("--width=64",) if name == "edm" else ()  # of which a convolution is ours
    picture = tmp_path / "x.png"
    options = (*QUICK, *size, *width, f"--data={data}", f"--out={picture}")
    assert run(name, *options) == 0
    said = capsys.readouterr()
    assert f"{picture}: images of {data} above, drawn ones below" in said.out
    shown = np.asarray(Image.open(picture).convert("L"), dtype=float)
    assert shown[: len(shown) // 2].std() > 10
    (model,) = accelerated
    assert report(model).replaced
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("name", sorted(NAMES - PACKAGES.keys()))
def test_without_the_project(name, data, monkeypatch, capsys):
    for module in getattr(trainers_plain, name)():
        monkeypatch.setitem(sys.modules, module, None)  # whose import fails
    assert run(name, f"--data={data}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{name}: error: git clone https://github.com/")
    assert "import of" in line


@pytest.mark.parametrize("name", sorted(PACKAGES))
def test_without_the_package(name, data, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    assert run(name, f"--data={data}", "--images=1") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{name}: error: ")
    assert "pip install" in line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--size=12",), "--size must be a multiple of 8, which is halved thrice; got 12"),
        (("--width=40",), "--width must be a multiple of 32; got 40"),
        (("--steps=0",), "--steps must be"),
        (("--out=x.txt",), "x.txt"),
        (("--data=/nowhere",), "/nowhere does not exist"),
        (("--code=/nowhere",), "--code /nowhere is no folder"),
    ],
)
def test_wrong_options(options, said, data, capsys):
    assert run("w86763777", f"--data={data}", *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("w86763777: error: ")
    assert said in line


def test_each_is_short():
    for name in NAMES:
        source = Path(importlib.import_module(f"fastddpm.examples.{name}").__file__)
        assert len(source.read_text(encoding="utf-8").splitlines()) < 40
