"""The trainer's weights: float32 masters and averages of half-precision ones, tied names, buffers
that are reassigned or share memory, and what is no weight at all."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from test_training import Small, assert_same, batches, state, trainer
from torch import nn
from toy import SCHEDULE, tiny_unet

from fastddpm import Diffusion, UNet
from fastddpm.checkpoint import read_tensors
from fastddpm.training.run import STATE, Trainer

HALVES = (torch.bfloat16, torch.float16)


class Halved(Small):
    """In half precision, also where the images are not."""

    def forward(self, x, t):
        return super().forward(x.to(self.one.weight.dtype), t.to(self.one.weight.dtype)).float()


@pytest.mark.parametrize("dtype", HALVES)
def test_small_steps_of_half_precision_weights_add_up(dtype):
    """lr is far below the spacing of the weights: without masters none would ever move."""
    model = Halved().to(dtype)
    with torch.no_grad():
        model.two.bias.fill_(1.0)
    run = trainer(model, lr=4e-5, warmup=0, ema_decay=0.99)
    for x0 in batches(150, size=2):
        run.step(torch.full_like(x0, 255))
    bias = run.ema_weights()["two.bias"]
    assert bias.dtype == torch.float32
    assert 0.99 < bias.item() < 0.9985  # eps has mean 0: down by nearly lr a step
    assert model.two.bias.dtype == dtype
    master = run.weights.masters["two.bias"].detach()
    assert master.item() < bias.item()
    assert torch.equal(model.two.bias.detach(), master.to(dtype))


@pytest.mark.parametrize("dtype", HALVES)
def test_the_average_of_half_precision_weights_is_that_of_float32(dtype):
    run = trainer(Halved().to(dtype), ema_decay=0.999)
    with torch.no_grad():
        run.weights.masters["two.bias"].fill_(0.5)
        run.weights.average["two.bias"].fill_(0.0)
    for _ in range(1000):
        run.weights.move_average(1 - 0.999)
    assert run.ema_weights()["two.bias"].item() == pytest.approx(0.5 * (1 - 0.999**1000), abs=1e-5)


def test_half_precision_follows_float32_and_its_state_resumes_to_the_bit(tmp_path):
    data = batches(20, size=4, shape=(1, 8, 8))
    exact = trainer(tiny_unet(), ema_decay=0.9)
    runs = [trainer(tiny_unet().to(dtype), ema_decay=0.9) for dtype in HALVES]
    for k, x0 in enumerate(data):
        exact.step(x0)
        for run in runs:
            run.step(x0)
        if k == 9:
            for n, run in enumerate(runs):
                run.save(tmp_path / str(n))
    for n, (run, dtype) in enumerate(zip(runs, HALVES, strict=True)):
        moved, off = (
            sum((v - other[name]).square().sum() for name, v in exact.ema_weights().items())
            for other in (tiny_unet().state_dict(), run.ema_weights())
        )
        assert off < 0.2**2 * moved, dtype
        again = trainer(tiny_unet(seed=1).to(dtype), ema_decay=0.9)
        again.load(tmp_path / str(n))
        for x0 in data[10:]:
            again.step(x0)
        assert_same(again.ema_weights(), run.ema_weights())
        assert_same(again.weights.masters, run.weights.masters)
        saved, _ = read_tensors(tmp_path / str(n) / STATE)
        assert {t.dtype for t in saved.values()} == {torch.float32}
        loaded = UNet.from_pretrained(tmp_path / str(n))  # the float32 average
        assert loaded.conv_in.weight.dtype == torch.float32
        assert run.ema_model().conv_in.weight.dtype == dtype
    with pytest.raises(ValueError, match=r"dtypes: .* is None there and 'torch.bfloat16' here"):
        trainer(tiny_unet().bfloat16(), ema_decay=0.9).load(start(tmp_path / "fp32", exact))


def start(folder, run):
    run.save(folder)
    return folder


def test_half_precision_weights_that_are_loaded_after_the_trainer_was_made_count():
    run = trainer(Halved().bfloat16())
    with torch.no_grad():
        run.model.two.bias.fill_(3.0)
    run.step(batches(1)[0])
    assert abs(run.model.two.bias.item() - 3) < 0.02


class Odd(Small):
    """Everything that a module may hold: tied and frozen parameters, and buffers of all kinds."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self.also_two = self.two
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("pair", torch.zeros(2, 2))
        self.register_buffer("view", self.pair[0])  # shares storage
        self.register_buffer("same", self.pair)
        self.register_buffer("spread", torch.ones(1).expand(4), persistent=False)
        self.register_buffer("alias", self.one.bias.detach())  # of a parameter
        self.register_buffer("passing", torch.zeros(2), persistent=False)
        self.register_buffer("cache", None, persistent=False)

    def forward(self, x, t):
        self.steps = self.steps + 1  # reassigned
        self.passing = self.passing + 2
        self.pair += 1
        if self.cache is None:
            self.cache = torch.zeros(len(x))
        return super().forward(x, t)


def test_tied_names_and_buffers_are_saved_as_they_are_now(tmp_path):
    run = trainer(Odd(), ema_decay=0.5)
    data = batches(4)
    for x0 in data[:2]:
        run.step(x0)
    averaged = run.ema_weights()
    fresh = Odd(seed=1)
    fresh.load_state_dict(averaged, strict=True)
    assert averaged.keys() == run.model.state_dict().keys()
    assert averaged["also_two.weight"] is averaged["two.weight"]
    assert (averaged["steps"].item(), averaged["view"].tolist()) == (2, [2, 2])
    assert not torch.equal(averaged["two.weight"], run.model.two.weight)

    run.save(tmp_path)
    again = trainer(Odd(seed=1), ema_decay=0.5)
    again.load(tmp_path)
    assert again.model.same is again.model.pair  # in place: what shared memory still does
    assert again.model.passing.tolist() == [4, 4]
    assert again.model.cache.shape == (8,)
    for r in (run, again):
        for x0 in data[2:]:
            r.step(x0)
    assert_same(state(again), state(run))
    assert (again.model.steps.item(), again.model.passing.tolist()) == (4, [8, 8])
    used = trainer(Odd(seed=1), ema_decay=0.5)
    used.step(batches(1, size=3)[0])  # its cache has another shape
    used.load(tmp_path)
    assert used.model.cache.shape == (8,)


def test_parameters_that_share_memory_are_saved_and_resumed(tmp_path):
    class Sharing(Small):
        def __init__(self, seed=0):
            super().__init__(seed)
            base = torch.zeros(6)
            self.same = nn.Parameter(self.one.bias.data)
            self.left, self.right = nn.Parameter(base[:4]), nn.Parameter(base[2:])

        def forward(self, x, t):
            return super().forward(x, t) + self.same.sum() + self.left.sum() + self.right.sum()

    run, again = trainer(Sharing()), trainer(Sharing(seed=1))
    first, second = batches(2)
    run.step(first)
    run.save(tmp_path)
    again.load(tmp_path)
    for r in (run, again):
        r.step(second)
    assert_same(state(again), state(run))


def test_a_persistent_buffer_of_another_shape_is_another_model(tmp_path):
    trainer(Odd()).save(tmp_path)
    other = Odd()
    other.pair = torch.zeros(3, 3)
    with pytest.raises(ValueError, match=r"buffer.pair has shape .*2, 2.* expected .*3, 3"):
        trainer(other).load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "two", nn.Conv2d(6, 1, 3, padding=1)),
        lambda m: setattr(m.one, "bias", nn.Parameter(torch.zeros(6))),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("meta"),
        lambda m: m.register_parameter("more", nn.Parameter(torch.zeros(1))),
        lambda m: delattr(m, "two"),
    ],
)
def test_a_model_that_is_changed_after_the_trainer_was_made_is_refused(tmp_path, change):
    run = trainer()
    change(run.model)
    for use in (lambda: run.step(batches(1)[0]), lambda: run.save(tmp_path / "x"), run.ema_weights):
        with pytest.raises(ValueError, match=r"is not the parameter that it was when the Trainer"):
            use()
    assert not (tmp_path / "x").exists()


def test_what_can_not_be_trained_is_named():
    class Extra(Small):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, _):
            pass

    with pytest.raises(ValueError, match=r"_extra_state.* is dict"):
        trainer(Extra())
    with pytest.raises(ValueError, match="Identity has no parameters"):
        trainer(nn.Identity())
    with pytest.raises(ValueError, match=r"torch.complex64 .*parameters must be dense and float64"):
        trainer(nn.Linear(1, 1, dtype=torch.complex64))
    with pytest.raises(ValueError, match="model must be a"):
        trainer(lambda x, t: x)


def test_a_loss_that_depends_on_no_weight_is_named():
    """torch says that element 0 of tensors does not require grad."""

    class Detached(Small):
        @torch.no_grad()
        def forward(self, x, t):
            return super().forward(x, t)

    for model in (Small(), Halved().bfloat16(), Detached()):
        model.requires_grad_(isinstance(model, Detached))
        run = trainer(model)
        with pytest.raises(ValueError, match=r"every parameter is frozen .*or the model comp"):
            run.step(batches(1)[0])
        assert run.step_count == 0


# ---- options and batches -------------------------------------------------------------------------


def test_numpys_numbers_are_converted_once(tmp_path):
    run = trainer(
        lr=np.float32(1e-4), warmup=np.int64(7), ema_decay=np.float64(0.5), grad_clip=np.int32(2),
        flip=np.bool_(True), ema_warmup=np.bool_(False), seed=np.uint64(5),
    )  # fmt: skip
    run.step(batches(1)[0])
    run.save(tmp_path)
    _, metadata = read_tensors(tmp_path / STATE)
    saved = json.loads(metadata["trainer"])
    assert (saved["warmup"], saved["seed"], saved["flip"]) == (7, 5, True)
    again = trainer(
        lr=float(np.float32(1e-4)), warmup=7, ema_decay=0.5, grad_clip=2.0, flip=True, seed=5
    )
    again.load(tmp_path)


@pytest.mark.parametrize("name", ["lr", "ema_decay", "grad_clip", "warmup", "seed"])
@pytest.mark.parametrize("value", [True, "1e-4", None, float("nan"), -1, 1j, [1e-4], 10**400])
def test_nonsense_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} must be "):
        trainer(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", float("inf")), ("warmup", 5.0), ("seed", 1.5), ("flip", 1), ("ema_warmup", "no")],
)
def test_more_nonsense(name, value):
    with pytest.raises(ValueError, match=f"{name} must be "):
        trainer(**{name: value})


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.full((2, 1, 6, 5), 200.0), r"must lie in \[-1, 1\]; got 200 .. 200: of 0 .. 255"),
        (torch.full((2, 1, 6, 5), -1.1), r"must lie in \[-1, 1\]; got -1.1"),
        (torch.full((2, 1, 6, 5), float("nan")), r"must lie in \[-1, 1\]; got nan"),
        (torch.full((2, 1, 6, 5), float("inf")), r"must lie in \[-1, 1\]; got inf"),
        (torch.full((2, 1, 6, 5), 200), r"must be uint8, or float in \[-1, 1\]; got torch.int64"),
        (torch.zeros(2, 1, 6, 5, dtype=torch.int8), "got torch.int8"),
        (torch.zeros(2, 1, 6, 5, dtype=torch.bool), "got torch.bool"),
        (torch.zeros(2, 1, 6, 5, dtype=torch.complex64), "got torch.complex64"),
        (torch.zeros(1, 6, 5), r"must be a tensor of \(N, C, H, W\) images; got \(1, 6, 5\)"),
        (np.zeros((2, 1, 6, 5), np.uint8), "got ndarray"),
        (torch.zeros(2, 0, 6, 5), "at least one image"),
        (
            torch.zeros(2, 1, 6, 5, device="meta"),
            "must be a dense tensor with values; got one on the device .meta",
        ),
        (
            torch.zeros(2, 1, 6, 5).to_sparse(),
            "must be a dense tensor with values; got one torch.sparse_coo",
        ),
        (torch.zeros(2, 1, 6, 5, dtype=torch.float8_e4m3fn), "got torch.float8_e4m3fn"),
    ],
)
def test_a_batch_that_is_not_of_images_changes_nothing(batch, message):
    run = trainer()
    run.step(batches(1)[0])
    before = state(run)
    with pytest.raises(ValueError, match=message):
        run.step(batch)
    assert_same(state(run), before)


def test_floats_of_0_to_1_are_told_of_once(recwarn):
    run = trainer()
    run.step(torch.rand(2, 1, 6, 5) * 2 - 1)
    assert not recwarn.list
    run = trainer()
    with pytest.warns(UserWarning, match=r"no pixel below 0: .*give 2 x - 1"):
        run.step(torch.rand(2, 1, 6, 5))


@pytest.mark.parametrize("host", ["no_grad", "inference_mode", "float64"])
def test_what_the_host_has_set_changes_no_step(host):
    data = batches(2, size=2, shape=(1, 8, 8))
    plain, hosted = trainer(tiny_unet(dropout=0.5)), trainer(tiny_unet(dropout=0.5))
    for x0 in data:
        plain.step(x0)
    if host == "float64":
        torch.set_default_dtype(torch.float64)
        try:
            for x0 in data:
                hosted.step(x0)
        finally:
            torch.set_default_dtype(torch.float32)
    else:
        with getattr(torch, host)():
            for x0 in data:
                hosted.step(x0.clone())
    assert_same(state(hosted), state(plain))


def test_a_trainer_takes_no_process_from_a_schedule_alone():
    assert Trainer(Small(), diffusion=Diffusion(SCHEDULE)).diffusion.schedule is SCHEDULE
