"""Training: Algorithm 1 by hand, and resumed runs that are the uninterrupted one to the bit."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from killing import Killed, killed_after
from PIL import Image
from toy import SCHEDULE, generator, images, tiny_unet

from fastddpm import Diffusion, Schedule, UNet, checkpoint, cli, ops, reference
from fastddpm.checkpoint import read_tensors, write_tensors
from fastddpm.data import batch_indices, open_dataset
from fastddpm.figures import labelled_grid
from fastddpm.sampling import sample
from fastddpm.training import run as training
from fastddpm.training import run_log
from fastddpm.training.run import CHOICES_STEP, PRESETS, STATE, Trainer, fit
from fastddpm.training.run_log import read_log

DIFFUSION = Diffusion(SCHEDULE)


class Small(torch.nn.Module):
    """Two convolutions that see t; keeps what it was given."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.one, self.two = (torch.nn.Conv2d(a, b, 3, padding=1) for a, b in ((1, 6), (6, 1)))
        self.seen = []

    def forward(self, x, t):
        self.seen.append((x.detach(), t))
        h = self.one(x) + 0.1 * t[:, None, None, None]
        return self.two(torch.nn.functional.silu(h))


def trainer(model=None, **options) -> Trainer:
    defaults = {"diffusion": DIFFUSION, "precision": "fp32", "lr": 1e-2, "warmup": 4}
    return Trainer(Small() if model is None else model, **{**defaults, **options})


def batches(n: int, size: int = 8, shape=(1, 6, 5)) -> list[torch.Tensor]:
    return [images(size, *shape, seed=k) for k in range(n)]


def state(t: Trainer) -> dict[str, torch.Tensor]:
    """Everything that a later step depends on, copied."""
    tensors = {f"model.{k}": v for k, v in t.model.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in t.ema_weights().items()}
    for name, p in t.model.named_parameters():
        tensors |= {f"{key}.{name}": v for key, v in t.optimizer.state[p].items()}
    tensors["counts"] = torch.tensor([t.step_count, t.example_count])
    return {k: v.detach().clone() for k, v in tensors.items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} of {len(a)} tensors differ: {different[:3]}"


# ---- Algorithm 1 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [0.02, 1e9])
@pytest.mark.parametrize("flip", [False, True])
def test_steps_by_hand(flip, clip):
    lr, warmup, decay, seed = 1e-2, 4, 0.9, 5
    data = batches(6)
    run = trainer(flip=flip, grad_clip=clip, ema_decay=decay, seed=seed)

    model = Small()
    weights = [p.detach().double() for p in model.parameters()]
    ema = [w.clone() for w in weights]
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    norms = []
    for k, x0 in enumerate(data):
        index = torch.arange(8 * k, 8 * k + 8)
        words = reference.random_words(2, seed=seed, step=CHOICES_STEP, sample_index=index)
        t = words[:, 0] * SCHEDULE.T // 2**32
        mirrored = words[:, 1] % 2 == 1
        x0 = x0 / 127.5 - 1
        if flip:
            x0 = torch.where(mirrored[:, None, None, None], x0.flip(-1), x0)
        eps = ops.randn(x0.shape, seed=seed, step=t, sample_index=index)
        ab = torch.tensor(SCHEDULE.alphas_cumprod)[t][:, None, None, None]
        xt = (ab.sqrt() * x0 + (1 - ab).sqrt() * eps).float()
        loss = ((eps - model(xt, t)) ** 2).mean()
        gradients = [g.double() for g in torch.autograd.grad(loss, list(model.parameters()))]
        norm = sum((g**2).sum() for g in gradients).sqrt()
        norms.append(norm)
        for i, g in enumerate(gradients):
            g = g * min(1, clip / norm)
            first[i] = 0.9 * first[i] + 0.1 * g
            second[i] = 0.999 * second[i] + 0.001 * g**2
            step = (first[i] / (1 - 0.9 ** (k + 1))) / (
                (second[i] / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8
            )
            weights[i] = weights[i] - lr * min((k + 1) / warmup, 1) * step
            ema[i] = decay * ema[i] + (1 - decay) * weights[i]
        with torch.no_grad():
            for p, w in zip(model.parameters(), weights, strict=True):
                p.copy_(w)
        got = run.step(data[k])
        assert not got.requires_grad
        torch.testing.assert_close(got, loss.detach(), atol=1e-5, rtol=0)
    assert min(norms) > 0.02  # so that clipping, in one of the cases, is at work
    for p, e, w, expected in zip(
        run.model.parameters(), run.ema_weights().values(), weights, ema, strict=True
    ):
        torch.testing.assert_close(p.double(), w, atol=2e-5, rtol=0)
        torch.testing.assert_close(e.double(), expected, atol=2e-5, rtol=0)
    assert (run.step_count, run.example_count) == (6, 48)


@pytest.mark.parametrize("warm", [False, True])
def test_ema_is_a_float64_loop_over_the_weights(warm):
    run = trainer(ema_decay=0.95, ema_warmup=warm)
    expected = [p.detach().double() for p in run.model.parameters()]
    for k, x0 in enumerate(batches(50, size=2)):
        run.step(x0)
        decay = min(0.95, (1 + k) / (10 + k)) if warm else 0.95
        expected = [
            decay * e + (1 - decay) * p.detach().double()
            for e, p in zip(expected, run.model.parameters(), strict=True)
        ]
    for e, (name, value) in zip(expected, run.ema_weights().items(), strict=True):
        torch.testing.assert_close(value.double(), e, atol=1e-6, rtol=0, msg=name)
    averaged = run.ema_model()
    assert not averaged.training
    for (name, value), p in zip(run.ema_weights().items(), averaged.parameters(), strict=True):
        assert torch.equal(p, value), name
        assert not p.requires_grad
        assert p is not value


@pytest.mark.parametrize(
    ("warmup", "rates"), [(4, [0.25, 0.5, 0.75, 1, 1, 1]), (0, [1, 1, 1]), (1, [1, 1])]
)
def test_the_learning_rate_rises_linearly_over_the_warm_up(warmup, rates):
    run = trainer(lr=0.008, warmup=warmup)
    for rate, x0 in zip(rates, batches(len(rates), size=1), strict=True):
        run.step(x0)
        assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.008 * rate)


def choices(sizes: list[int], seed: int = 0, flip: bool = True):
    """(t, was it mirrored) of each example, of images whose left half is black."""
    model = Small()
    diffusion = Diffusion(Schedule.linear(16, 1e-6, 1e-5))  # x_t is all but x0
    run = trainer(model, diffusion=diffusion, flip=flip, seed=seed)
    x0 = torch.zeros(sum(sizes), 1, 1, 4, dtype=torch.uint8)
    x0[..., 2:] = 255
    for part in x0.split(sizes):
        run.step(part)
    x, t = (torch.cat(parts) for parts in zip(*model.seen, strict=True))
    return t, x[:, 0, 0, 0] > 0


def test_t_is_uniform_and_half_of_the_images_are_mirrored():
    n = 8000
    t, mirrored = choices([n])
    assert abs(mirrored.sum() - n / 2) < 4 * (n / 4) ** 0.5
    counts = torch.bincount(t, minlength=16)
    assert counts.shape == (16,)
    assert (counts - n / 16).abs().max() < 4.5 * (n / 16 * 15 / 16) ** 0.5
    # Independent of each other, too.
    assert abs(mirrored[t < 8].sum() - mirrored[t >= 8].sum()) < 4 * (n / 4) ** 0.5
    assert not choices([100], flip=False)[1].any()


def test_t_and_mirroring_are_a_function_of_seed_and_example():
    whole = choices([60])
    for a, b in zip(whole, choices([7, 1, 52]), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(whole, choices([60], seed=1), strict=True):
        assert not torch.equal(a, b)


def test_dropout_and_the_rest_are_a_function_of_the_seed_and_leave_torchs_state_alone():
    results = []
    for global_seed in (1, 2):
        run = trainer(tiny_unet(dropout=0.5))
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        losses = [run.step(x0) for x0 in batches(2, size=2, shape=(1, 8, 8))]
        assert torch.equal(torch.get_rng_state(), before)
        results.append((losses, state(run)))
    assert results[0][0] == results[1][0]
    assert_same(results[0][1], results[1][1])


def test_dropout_is_on_and_a_function_of_the_example():
    x0 = images(2, 1, 8, 8)
    run, none = (trainer(tiny_unet(dropout=p), lr=1e-12) for p in (0.5, 0.0))
    first, without = run.step(x0), none.step(x0)
    assert abs(first - without) > 1e-3
    run.example_count = 0  # the same t, eps and masks again
    assert abs(run.step(x0) - first) < 1e-6


def test_the_dropout_of_another_network_is_another_in_each_step():
    class Dropping(Small):
        def forward(self, x, t):
            return torch.nn.functional.dropout(super().forward(x, t), 0.5)

    run, x0 = trainer(Dropping(), lr=1e-12), images(2, 1, 8, 8)
    first = run.step(x0)
    run.example_count = 0  # the same t and eps again
    assert abs(run.step(x0) - first) > 1e-3
    run.example_count = run.step_count = 0
    assert abs(run.step(x0) - first) < 1e-6


def test_the_loss_falls():
    run = trainer(lr=5e-3, warmup=10)
    x0 = torch.full((16, 1, 6, 5), 255, dtype=torch.uint8)
    losses = [run.step(x0).item() for _ in range(150)]
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:20])


def test_the_unets_loss_falls_in_bf16():
    run = trainer(tiny_unet(), lr=5e-3, warmup=5, precision="bf16")
    assert run.precision == "bf16"
    x0 = torch.full((8, 1, 8, 8), 20, dtype=torch.uint8)
    losses = [run.step(x0).item() for _ in range(30)]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    assert all(p.dtype == torch.float32 for p in run.model.parameters())


@pytest.mark.filterwarnings("ignore:.* of the steps .* changed nothing")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_changes_nothing(bad):
    class Sick(Small):
        factor = 1.0

        def forward(self, x, t):
            return self.factor * super().forward(x, t)

    run, healthy = trainer(Sick()), trainer()
    first, second, third = batches(3)
    run.step(first)
    before = state(run)
    run.model.factor = bad
    assert not run.step(second).isfinite()
    before["counts"] += torch.tensor([1, 8])
    assert_same(state(run), before)
    run.model.factor = 1.0
    healthy.step(first)
    healthy.step_count, healthy.example_count = 2, 16
    for each in (run, healthy):  # the next examples, the rate and the average of the next step
        each.step(third)
    assert_same(state(run), state(healthy))
    assert (run.skipped, healthy.skipped) == (1, 0)


@pytest.mark.filterwarnings("ignore:.* of the steps .* changed nothing")
def test_a_gradient_that_is_not_finite_is_told_of():
    class Root(Small):
        def forward(self, x, t):
            return super().forward(x, t) + torch.sqrt(self.one.bias.sum() * 0)

    run = trainer(Root())
    for x0 in batches(9):
        assert run.step(x0).isfinite()
    with pytest.raises(FloatingPointError, match=r"step 9: loss \d.*, gradient norm nan"):
        run.step(x0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0}, "lr must be above 0; got 0"),
        ({"lr": float("nan")}, "lr must be"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\); got 1.0"),
        ({"grad_clip": 0}, "grad_clip must be"),
        ({"warmup": -1}, "warmup must be"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 2**63}, "seed must be"),
        ({"precision": "fp16"}, "precision must be one of"),
        ({"diffusion": SCHEDULE}, "diffusion must be a fastddpm.Diffusion"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        trainer(**options)


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="at least one image"):
        trainer().step(torch.zeros(0, 1, 4, 4, dtype=torch.uint8))


def test_parameters_that_get_no_gradient_and_buffers_that_are_not_saved(tmp_path):
    class Odd(Small):
        def __init__(self, seed=0):
            super().__init__(seed)
            self.frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
            self.unused = torch.nn.Parameter(torch.ones(3))
            self.register_buffer("passing", torch.ones(2), persistent=False)
            self.also_two = self.two  # a second name for the same weights

    run = trainer(Odd())
    for x0 in batches(2):
        run.step(x0)
    averaged = run.ema_model()
    assert torch.equal(averaged.two.weight, run.ema_weights()["two.weight"])
    assert averaged.also_two is averaged.two
    run.save(tmp_path)
    again = trainer(Odd(seed=1))
    again.load(tmp_path)
    for r in (run, again):
        r.step(batches(3)[2])
    assert_same(state(again), state(run))


# ---- presets -------------------------------------------------------------------------------------


def test_cifar10_is_appendix_b():
    preset = PRESETS["cifar10"]
    assert preset.model == {"image_size": 32, "dropout": 0.1}
    expected = {
        "lr": 2e-4, "batch_size": 128, "ema_decay": 0.9999, "ema_warmup": False, "flip": True,
        "grad_clip": 1.0, "warmup": 5000, "steps": 800_000,
    }  # fmt: skip
    assert {name: getattr(preset, name) for name in expected} == expected
    run = Trainer(Small())
    for name in ("lr", "ema_decay", "ema_warmup", "flip", "grad_clip", "warmup"):
        assert getattr(run, name) == expected[name], f"the Trainer's default {name}"
    (group,) = run.optimizer.param_groups
    assert (group["betas"], group["eps"]) == ((0.9, 0.999), 1e-8)
    assert (group["weight_decay"], group["amsgrad"]) == (0, False)
    process = run.diffusion
    assert (process.prediction, process.variance, process.objective) == (
        "eps", "fixed_large", "simple",
    )  # fmt: skip
    np.testing.assert_allclose(process.schedule.betas, np.linspace(1e-4, 0.02, 1000), rtol=1e-14)


@pytest.mark.parametrize(
    ("name", "steps", "flip", "channels"),
    [
        ("celebahq256", 500_000, True, 128),
        ("lsun-bedroom", 2_400_000, False, 128),
        ("lsun-church", 1_200_000, True, 128),
        ("lsun-cat", 1_800_000, True, 128),
        ("lsun-bedroom-large", 1_150_000, False, 192),
    ],
)
def test_the_256_presets_are_appendix_b_a_data_set_each(name, steps, flip, channels):
    preset = PRESETS[name]
    assert (preset.lr, preset.batch_size, preset.steps) == (2e-5, 64, steps)
    assert (preset.flip, preset.ema_decay, preset.warmup) == (flip, 0.9999, 5000)
    assert (preset.grad_clip, preset.ema_warmup) == (1.0, False)
    assert preset.variance == "fixed_small"  # the authors' 256x256 scripts; CIFAR-10's fixed_large
    assert preset.model.get("channels", 128) == channels
    assert preset.model["channel_mult"] == (1, 1, 2, 2, 4, 4)
    assert "dropout" not in preset.model  # none but on CIFAR-10
    assert PRESETS["cifar10"].variance == "fixed_large"


def test_presets_of_old_names_say_what_they_became():
    assert training.preset("lsun-cat") is PRESETS["lsun-cat"]
    with pytest.raises(ValueError, match="give lsun-bedroom or lsun-church or lsun-cat"):
        training.preset("lsun256")
    with pytest.raises(ValueError, match="give lsun-bedroom-large"):
        training.preset("lsun256-large")
    with pytest.raises(ValueError, match=r"must be one of 'celebahq256', 'cifar10', .*'imagenet'"):
        training.preset("imagenet")


# ---- save and load -------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("used", [False, True])
def test_a_loaded_trainer_takes_the_very_same_steps(tmp_path, precision, used):
    options = {"precision": precision, "ema_decay": 0.9, "seed": 2}
    data = batches(6, size=3, shape=(1, 8, 8))
    straight = trainer(tiny_unet(dropout=0.3), **options)
    for k, x0 in enumerate(data):
        straight.step(x0)
        if k == 2:
            straight.save(tmp_path)
    resumed = trainer(tiny_unet(dropout=0.3, seed=1), **options)
    if used:  # what it did before leaves no trace
        resumed.step(data[5])
    resumed.load(tmp_path)
    assert (resumed.step_count, resumed.example_count) == (3, 9)
    for x0 in data[3:]:
        resumed.step(x0)
    assert_same(state(resumed), state(straight))


def test_a_state_before_the_first_step(tmp_path):
    run, again = trainer(), trainer(Small(seed=1))
    run.save(tmp_path)
    again.step(batches(1)[0])
    again.load(tmp_path)
    assert_same(state(again), state(run))
    for x0 in batches(2):
        for r in (run, again):
            r.step(x0)
    assert_same(state(again), state(run))


def test_save_writes_the_averaged_unet(tmp_path):
    run = trainer(tiny_unet(), ema_decay=0.5)
    for x0 in batches(2, size=2, shape=(1, 8, 8)):
        run.step(x0)
    run.save(tmp_path)
    model = UNet.from_pretrained(str(tmp_path))
    for (name, p), value in zip(model.named_parameters(), run.ema_weights().values(), strict=True):
        assert torch.equal(p, value), name
    assert np.array_equal(model.diffusion.schedule.betas, SCHEDULE.betas)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json", "model.safetensors", STATE,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.5}, "lr is 0.01 there and 0.5 here"),
        ({"warmup": 5}, "warmup is 4 there"),
        ({"ema_decay": 0.5}, "ema_decay is 0.9999 there"),
        ({"ema_warmup": True}, "ema_warmup is False there"),
        ({"grad_clip": 2.0}, "grad_clip is 1.0 there"),
        ({"flip": False}, "flip is True there"),
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"precision": "bf16"}, "precision is 'fp32' there and 'bf16' here"),
        ({"diffusion": Diffusion(SCHEDULE, "x0")}, "diffusion is .*'eps'.* and .*'x0'.* here"),
        ({"diffusion": Diffusion(Schedule.linear(13))}, "diffusion is"),
    ],
)  # fmt: skip
def test_load_refuses_another_recipe(tmp_path, options, message):
    run = trainer()
    run.step(batches(1)[0])
    run.save(tmp_path)
    other = trainer(Small(seed=1), **options)
    other.step(batches(1)[0])
    before = state(other)
    with pytest.raises(ValueError, match=f"{STATE}: {message}"):
        other.load(tmp_path)
    assert_same(state(other), before)


def corrupt(name: str):
    """A function that does to the state file what `name` says."""

    def change(path: Path) -> None:
        tensors, metadata = read_tensors(path)
        if name == "cut":
            path.write_bytes(path.read_bytes()[:-100])
        elif name == "empty":
            path.write_bytes(b"")
        elif name == "text":
            path.write_text("not a checkpoint")
        elif name == "foreign":
            write_tensors(path, tensors)
        elif name == "shape":
            write_tensors(path, {**tensors, "model.one.bias": torch.zeros(7)}, metadata)
        elif name == "moment":
            del tensors["adam.exp_avg.one.bias"]
            write_tensors(path, tensors, metadata)
        elif name == "unknown":
            write_tensors(path, {**tensors, "model.three.bias": torch.zeros(7)}, metadata)
        elif name == "gone":
            path.unlink()

    return change


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        ("cut", ValueError, "is not a whole safetensors file"),
        ("empty", ValueError, "is not a whole safetensors file"),
        ("text", ValueError, "is not a whole safetensors file"),
        ("foreign", ValueError, "is not a trainer's state"),
        ("shape", ValueError, r"model.one.bias has shape .*7.* expected .*6"),
        ("moment", ValueError, "adam.exp_avg.one.bias has shape None"),
        ("unknown", ValueError, "model.three.bias has shape .* expected None"),
        ("gone", FileNotFoundError, "no such file"),
    ],
)
def test_load_refuses_what_is_not_this_trainers_whole_state(tmp_path, damage, error, message):
    run = trainer()
    run.step(batches(1)[0])
    run.save(tmp_path)
    corrupt(damage)(tmp_path / STATE)
    before = state(run)
    with pytest.raises(error, match=message):
        run.load(tmp_path)
    assert_same(state(run), before)


def test_load_refuses_another_architecture(tmp_path):
    trainer(tiny_unet()).save(tmp_path)
    other = trainer(tiny_unet(channels=16))
    before = state(other)
    with pytest.raises(ValueError, match="model: channels is 8 there and 16 here"):
        other.load(tmp_path)
    assert_same(state(other), before)


# ---- fit -----------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path):
    np.savez(tmp_path / "data.npz", images=images(20, 8, 8, 1).numpy())
    return open_dataset(tmp_path / "data.npz")


@pytest.fixture
def quick(monkeypatch):
    """No pictures, and a row of the log every two steps."""
    monkeypatch.setattr(run_log, "loss_plot", lambda *_: None)
    monkeypatch.setattr(training, "LOG_EVERY", 2)


def log(out: Path) -> list[tuple[int, str]]:
    """(step, loss) of each row."""
    with (out / "log.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header[:5] == ["step", "loss", "images_per_second", "waiting", "skipped"]
    return [(int(step), loss) for step, loss, *_ in rows]


SHORT = {"batch_size": 3, "save_every": 3, "sample_every": 0, "progress": False}


def test_fit_writes_all_that_it_promises(tmp_path, dataset):
    out = tmp_path / "run"
    run = trainer(tiny_unet())
    fit(
        run, dataset, out,
        **{**SHORT, "steps": 4, "sample_every": 3},
    )  # fmt: skip
    names = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    assert names == [
        "config.json", "log.csv", "loss.png", "model.safetensors",
        "samples/step_000003.png", "samples/step_000004.png", STATE,
    ]  # fmt: skip
    for name in ("loss.png", "samples/step_000004.png"):
        with Image.open(out / name) as picture:
            picture.load()
    assert [step for step, _ in log(out)] == [4]
    drawn = sample(run.ema_model(), 36, steps=SCHEDULE.T, sampler="ddim", progress=False)
    with Image.open(out / "samples" / "step_000004.png") as picture:
        expected = labelled_grid(drawn, title=f"step 4: DDIM, {SCHEDULE.T} steps")
        assert np.array_equal(np.asarray(picture), np.asarray(expected))


def test_fit_trains_on_the_examples_of_batch_indices(tmp_path, dataset, quick):
    run, got = trainer(seed=3), []
    step = run.step
    run.step = lambda x0: got.append(x0) or step(x0)
    fit(run, dataset, tmp_path / "run", **{**SHORT, "steps": 8})
    assert len(got) == 8
    for k, x0 in enumerate(got):  # 24 examples of 20: the second epoch has begun
        assert torch.equal(x0, dataset.images(batch_indices(20, 3, k, seed=3)))


def test_fit_resumes_to_the_bit_and_without_repeating_the_log(tmp_path, dataset, quick):
    straight = trainer(tiny_unet(dropout=0.2))
    fit(straight, dataset, tmp_path / "a", **{**SHORT, "steps": 9})

    class Stop(Exception):
        pass

    run = trainer(tiny_unet(dropout=0.2))
    step = run.step

    def until_the_eighth(x0):
        if run.step_count == 8:
            raise Stop
        return step(x0)

    run.step = until_the_eighth
    with pytest.raises(Stop):
        fit(run, dataset, tmp_path / "b", **{**SHORT, "steps": 9})
    assert log(tmp_path / "b") == log(tmp_path / "a")[:3]

    resumed = trainer(tiny_unet(dropout=0.2, seed=1))
    fit(resumed, dataset, tmp_path / "b", **{**SHORT, "steps": 9, "resume": True})
    assert_same(state(resumed), state(straight))
    assert log(tmp_path / "b") == log(tmp_path / "a")
    assert [step for step, _ in log(tmp_path / "b")] == [2, 4, 6, 8, 9]
    # A finished run resumed takes no step, one of fewer is refused, and a longer one goes on.
    before = (tmp_path / "b" / STATE).read_bytes()
    with pytest.raises(ValueError, match="steps must be at least 9, which the run in"):
        fit(resumed, dataset, tmp_path / "b", **{**SHORT, "steps": 8, "resume": True})
    fit(resumed, dataset, tmp_path / "b", **{**SHORT, "steps": 9, "resume": True})
    assert (tmp_path / "b" / STATE).read_bytes() == before
    fit(resumed, dataset, tmp_path / "b", **{**SHORT, "steps": 10, "resume": True})
    assert resumed.step_count == 10


@pytest.mark.parametrize("survived", range(8))
def test_whichever_write_is_the_last_the_run_can_go_on(
    tmp_path, dataset, quick, monkeypatch, survived
):
    """Two checkpoints are eight files renamed into place; the run ends before each of them."""
    options = {**SHORT, "steps": 4, "save_every": 2}
    straight = trainer(tiny_unet())
    fit(straight, dataset, tmp_path / "a", **options)

    with killed_after(survived, monkeypatch), pytest.raises(Killed):
        fit(trainer(tiny_unet()), dataset, tmp_path / "b", **options)
    resume = (tmp_path / "b" / STATE).exists()
    if resume:  # the command line builds the model from this file
        config = checkpoint.read_json(tmp_path / "b" / "config.json")
        model = checkpoint.build_model(config, "config.json")
    else:
        model = tiny_unet()
    resumed = trainer(model)
    fit(resumed, dataset, tmp_path / "b", **options, resume=resume)
    assert_same(state(resumed), state(straight))
    assert log(tmp_path / "b") == log(tmp_path / "a")


def test_files_of_a_write_that_was_cut_do_not_disturb(tmp_path, dataset, quick):
    straight, out = trainer(tiny_unet()), tmp_path / "b"
    fit(straight, dataset, tmp_path / "a", **{**SHORT, "steps": 6})
    fit(trainer(tiny_unet()), dataset, out, **{**SHORT, "steps": 3})
    half = (out / STATE).read_bytes()[:1000]
    for name in (STATE, "model.safetensors", "log.csv", "config.json"):
        (out / f".{name}.a1b2c3").write_bytes(half)
    resumed = trainer(tiny_unet())
    fit(resumed, dataset, out, **{**SHORT, "steps": 6, "resume": True})
    assert_same(state(resumed), state(straight))
    # A folder with nothing but such a file holds no run yet.
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / f".{STATE}.a1b2c3").write_bytes(half)
    fit(trainer(tiny_unet()), dataset, tmp_path / "c", **{**SHORT, "steps": 1})


def test_fit_refuses_to_mix_runs(tmp_path, dataset, quick):
    out = tmp_path / "run"
    with pytest.raises(FileNotFoundError, match=STATE):
        fit(trainer(), dataset, out, **{**SHORT, "steps": 2, "resume": True})
    fit(trainer(), dataset, out, **{**SHORT, "steps": 2})
    before = (out / STATE).read_bytes()
    with pytest.raises(FileExistsError, match="holds a run"):
        fit(trainer(), dataset, out, **{**SHORT, "steps": 2})
    with pytest.raises(ValueError, match="has batches of 3; got batch_size 4"):
        fit(trainer(), dataset, out, **{**SHORT, "steps": 4, "resume": True, "batch_size": 4})
    for name in ("steps", "batch_size", "save_every"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1; got 0"):
            fit(trainer(), dataset, out, **{**SHORT, "steps": 4, "resume": True, name: 0})
    with pytest.raises(ValueError, match="sample_every must be at least 0; got -1"):
        fit(trainer(), dataset, out, **{**SHORT, "steps": 4, "resume": True, "sample_every": -1})
    assert (out / STATE).read_bytes() == before


class Sick(Small):
    """Not finite in its forward passes of these numbers."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def forward(self, x, t):
        factor = torch.nan if len(self.seen) in self.at else 1.0
        return factor * super().forward(x, t)


@pytest.mark.filterwarnings("ignore:.* of the steps .* changed nothing")
def test_fit_goes_on_past_steps_that_are_not_finite(tmp_path, dataset, quick):
    run = trainer(Sick({1, 4, 5}))
    fit(run, dataset, tmp_path / "run", **{**SHORT, "steps": 6})
    rows = read_log(tmp_path / "run" / "log.csv")
    assert [row.skipped for row in rows] == [1, 1, 3]
    assert [np.isfinite(row.loss) for row in rows] == [True, True, False]  # none of them counts
    assert [0 <= row.waiting < 1 for row in rows] == [True] * 3
    assert (run.skipped, run.step_count, run.example_count) == (3, 6, 18)


@pytest.mark.filterwarnings("ignore:.* of the steps .* changed nothing")
def test_a_run_that_is_stopped_leaves_a_whole_checkpoint(tmp_path, dataset, quick):
    out = tmp_path / "run"
    with pytest.raises(FloatingPointError, match=r"step 12: loss nan, .*10th step in a row"):
        fit(trainer(Sick(range(3, 99))), dataset, out, **{**SHORT, "steps": 40})
    assert steps_done(out) == 12  # of which nine were skipped
    healthy = trainer(Sick(()))
    fit(healthy, dataset, tmp_path / "other", **{**SHORT, "steps": 3})
    a, b = (read_tensors(path / STATE)[0] for path in (out, tmp_path / "other"))
    assert_same(a, b)


def test_fit_passes_on_what_the_reader_raises(tmp_path, dataset, quick):
    def broken(_):
        raise OSError("the disk is gone")

    dataset.images = broken
    with pytest.raises(OSError, match="the disk is gone"):
        fit(trainer(), dataset, tmp_path / "run", **{**SHORT, "steps": 2})


# ---- kill -9 -------------------------------------------------------------------------------------

RECIPE = {"lr": 1e-2, "warmup": 10, "ema_decay": 0.9, "precision": "fp32"}


def start(out: Path) -> None:
    """A run's folder before its first step, with a smaller model than any preset's."""
    Trainer(tiny_unet(dropout=0.1), **RECIPE).save(out)


def command(data: Path, out: Path) -> list[str]:
    recipe = [f"--{name.replace('_', '-')}={value}" for name, value in RECIPE.items()]
    return [
        "train", f"--data={data}", f"--out={out}", "--resume", *recipe, "--steps=100",
        "--batch-size=4", "--save-every=5", "--sample-every=0", "--threads=1", "--quiet",
    ]  # fmt: skip


def steps_done(out: Path) -> int:
    try:
        _, metadata = read_tensors(out / STATE)
    except (ValueError, FileNotFoundError) as error:
        pytest.fail(f"a reader saw a checkpoint that is not whole: {error}")
    return checkpoint.json.loads(metadata["trainer"])["step_count"]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX")
def test_a_run_that_is_killed_twice_is_the_uninterrupted_run(tmp_path, monkeypatch):
    monkeypatch.setattr(run_log, "loss_plot", lambda *_: None)  # in the runs of this process
    data = tmp_path / "data.npz"
    np.savez(data, images=images(30, 1, 8, 8).numpy())
    start(tmp_path / "a")
    assert cli.main(command(data, tmp_path / "a")) == 0

    out = tmp_path / "b"
    start(out)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    for _ in range(2):
        before = steps_done(out)
        process = subprocess.Popen(
            [sys.executable, "-m", "fastddpm.cli", *command(data, out)],
            cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 120
            while steps_done(out) == before:
                assert process.poll() is None, process.stdout.read().decode()
                assert time.monotonic() < deadline, "no checkpoint within two minutes"
                time.sleep(0.01)
            time.sleep(0.03 * torch.rand(1, generator=generator(before)).item())
            assert process.poll() is None, "the run was over before it could be killed"
        finally:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert before < steps_done(out) < 100
    assert cli.main(command(data, out)) == 0

    (expected, ended), (got, resumed) = (read_tensors(tmp_path / run / STATE) for run in "ab")
    assert resumed == ended
    assert_same(got, expected)
    assert steps_done(out) == 100
    model, averaged = (read_tensors(tmp_path / run / "model.safetensors")[0] for run in "ab")
    assert_same(averaged, model)
    assert [step for step, _ in log(out)] == [50, 100]
