"""Whether float32 stays float32 on a GPU: torch's switches of TF32, set in any order and in both of
their kinds, what is asked of them, and that they are as they were afterwards.

No GPU is needed: what is tested is what torch is told."""

from __future__ import annotations

import functools
import itertools
import threading

import pytest
import torch
from toy import SCHEDULE, images, tiny_unet

from fastddpm import Diffusion, Trainer, ops
from fastddpm.engine.eager import Eager
from fastddpm.evaluation import bits
from fastddpm.precision import convolutions_take_tf32, float32_kept, tf32_asked

GPU = torch.device("cuda")
NEWER = hasattr(torch.backends.cuda.matmul, "fp32_precision")
SETTINGS = [
    ("cuda.matmul.allow_tf32", True),
    ("cuda.matmul.allow_tf32", False),
    ("cudnn.allow_tf32", True),
    ("cudnn.allow_tf32", False),
]
if NEWER:
    SETTINGS += [
        *(("cuda.matmul.fp32_precision", value) for value in ("tf32", "ieee", "none")),
        *(("cudnn.conv.fp32_precision", value) for value in ("tf32", "ieee", "none")),
        *(("cudnn.fp32_precision", value) for value in ("tf32", "ieee")),
        *(("fp32_precision", value) for value in ("tf32", "ieee", "bf16")),
    ]


def place(name):
    *path, last = name.split(".")
    return functools.reduce(getattr, path, torch.backends), last


def told(*settings):
    for name, value in settings:
        setattr(*place(name), value)


def state():
    """What every switch says, or that torch finds it contradicts another."""
    return {name: said(*place(name)) for name in dict.fromkeys(name for name, _ in SETTINGS)}


def said(where, name):
    try:
        return getattr(where, name)
    except RuntimeError:
        return "contradiction"


def put_back():
    """The switches as torch is imported with."""
    torch.set_float32_matmul_precision("highest")
    told(("cudnn.allow_tf32", True))
    if NEWER:
        told(
            *((n, "none") for n, _ in SETTINGS if n.endswith("fp32_precision") and "conv" not in n)
        )
        told(("cudnn.conv.fp32_precision", "tf32"))


@pytest.fixture(autouse=True)
def switches():
    put_back()  # other tests may have set them
    before = state()
    yield
    put_back()
    assert state() == before


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_float32_is_kept_and_every_switch_put_back(count):
    for settings in itertools.product(SETTINGS, repeat=count):
        told(*settings)
        asked, before = tf32_asked(), state()
        taken = convolutions_take_tf32()
        with float32_kept("fp32", GPU):
            assert convolutions_take_tf32() == (taken and asked), settings
            assert tf32_asked() == asked, settings
            if before["cudnn.allow_tf32"] != "contradiction":
                torch.backends.cudnn.allow_tf32  # noqa: B018  a model of the user's may read it
        after = state()
        assert after == before, settings


def test_only_float32_on_a_gpu_is_touched():
    for precision, device in (("bf16", GPU), ("fp32", torch.device("cpu"))):
        with float32_kept(precision, device):
            assert convolutions_take_tf32()


def test_blocks_within_blocks_and_an_error():
    def fail():
        with float32_kept("fp32", GPU):
            with float32_kept("fp32", GPU):
                assert not convolutions_take_tf32()
            assert not convolutions_take_tf32()
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail()
    assert convolutions_take_tf32()


def test_the_last_of_several_threads_puts_back():
    inside, leave = threading.Event(), threading.Event()

    def other():
        with float32_kept("fp32", GPU):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with float32_kept("fp32", GPU):
        thread.start()
        assert inside.wait(10)
    assert not convolutions_take_tf32()
    leave.set()
    thread.join()
    assert convolutions_take_tf32()


def test_switches_that_users_may_no_longer_set():
    """torch.backends.disable_global_flags() holds for a whole process, so in a fresh one."""
    import subprocess
    import sys

    code = """
import torch
from fastddpm.precision import convolutions_take_tf32, float32_kept
torch.backends.disable_global_flags()
with float32_kept("fp32", torch.device("cuda")):
    assert not convolutions_take_tf32()
assert convolutions_take_tf32()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


class Asking(torch.nn.Module):
    """A model that notes, in both directions, whether its convolutions would take TF32."""

    def __init__(self):
        super().__init__()
        self.weight, self.said = torch.nn.Parameter(torch.zeros(())), []

    def forward(self, x, t):
        y = x * self.weight
        if y.requires_grad:
            y.register_hook(lambda grad: self.said.append(convolutions_take_tf32()))
        self.said.append(convolutions_take_tf32())
        return y


def as_on_a_gpu(monkeypatch):
    """float32_kept takes every device for one."""
    real = float32_kept
    for module in (
        "fastddpm.engine.eager",
        "fastddpm.training.trainer",
        "fastddpm.evaluation.bits",
    ):
        monkeypatch.setattr(f"{module}.float32_kept", lambda p, device: real(p, GPU))


@pytest.mark.parametrize("asked", [False, True])
def test_engines_training_and_evaluation_keep_it(monkeypatch, asked):
    as_on_a_gpu(monkeypatch)
    torch.backends.cuda.matmul.allow_tf32 = asked
    model, diffusion = Asking(), Diffusion(SCHEDULE)
    engine = Eager(model, diffusion, device=torch.device("cpu"), precision="fp32")
    engine.run(torch.zeros(1, 1, 4, 4), seed=0, sample_index=torch.zeros(1, dtype=torch.int64))
    assert model.said == [asked] * diffusion.T
    model.said.clear()
    Trainer(model, diffusion=diffusion, precision="fp32").step(images(2, 1, 4, 4))
    assert model.said == [asked] * 2
    model.said.clear()
    bits.bits_per_dim(model, images(2, 1, 4, 4), diffusion=diffusion, steps=2)
    assert set(model.said) == {asked}
    assert convolutions_take_tf32()


@pytest.mark.skipif(not NEWER, reason="this torch has the older switches only")
def test_no_setting_breaks_a_model():
    """A forward and a backward pass of the U-Net, whatever the switches say."""
    model = tiny_unet()
    x, t = torch.randn(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64)
    with ops.use_backend("reference"):
        expected = model(x, t)
        for settings in (*zip(SETTINGS), *zip(SETTINGS, reversed(SETTINGS), strict=True)):
            told(*settings)
            y = model(x, t)
            assert torch.equal(y, expected) or settings[-1] == ("fp32_precision", "bf16")
            y.sum().backward()
