"""throughput.py --train checks every gradient and the optimiser before it times, and writes what it
prints."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from script import script

import fastddpm
from fastddpm.precision import autocast

RACE = (
    "--train", "--quick", "--repeats=2", "--least=0.001", "--threads=1", "--batches=4",
    "--precisions=fp32",
)  # fmt: skip
NHWC = "diffusers channels_last"


@pytest.fixture
def throughput():
    with script("throughput") as module:
        yield module


@pytest.fixture
def in_process(throughput, monkeypatch):
    """Contestants in this process, for tests that replace one."""

    class Local(sys.modules["training_runner"].TrainingRunner):
        def __init__(self, job, patience):
            super().__init__(job)

        def close(self):
            pass

    monkeypatch.setattr(throughput.training_race, "TrainingRemote", Local)
    return throughput


@pytest.fixture
def contestants(throughput):
    return sys.modules["training_contestants"]


def test_training(throughput, tmp_path, capsys):
    pytest.importorskip("diffusers")
    files = (f"--json={tmp_path / 'x.json'}", f"--plot={tmp_path / 'x.png'}")
    only = f"--only=fastddpm,{NHWC}"
    assert throughput.main([*RACE, *files, only, "--dropout=0.1", "--profile"]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in report["rows"]}
    assert rows.keys() == {"fastddpm Trainer", NHWC}
    allowed = throughput.training_race.ALLOWED["fp32"]
    network = fastddpm.UNet(channels=32, channel_mult=(1, 2), num_res_blocks=1, image_size=8)
    for name, row in rows.items():
        assert (row["precision"], row["batch"]) == ("fp32", 4)
        assert row["errors"].keys() == allowed.keys()
        assert all(0 <= row["errors"][what] < allowed[what] for what in allowed)
        assert 0 < row["error"] == row["errors"]["gradient"]
        assert len(row["seconds"]) == 2
        assert min(row["seconds"]) > 0
        assert row["images/s"] * row["ms"] == pytest.approx(1e3)
        assert row["TFLOP/s"] * row["ms"] * 1e9 == pytest.approx(3 * throughput.flop(network))
        assert row["peak bytes"] > 1e6
        assert printed.index(f"{name} fp32, batch 4: error") < printed.index("ms an image ")
    ours = rows["fastddpm Trainer"]
    assert ours["x best peer"] == pytest.approx(rows[NHWC]["ms"] / ours["ms"])
    assert ours["x its memory"] == pytest.approx(ours["peak bytes"] / rows[NHWC]["peak bytes"])
    assert report["GFLOP an image"] == pytest.approx(3 * throughput.flop(network) / 1e9)
    with Image.open(tmp_path / "x.png") as image:
        assert image.width > image.height > 100
    for row in rows.values():
        whole, swept = row["parts"]["step"], row["parts"]["sweep"]
        assert len(whole) == len(swept) == 2
        assert all(0 < part < step for part, step in zip(swept, whole, strict=True))
    assert 0 < report["fit"]["waited"] < report["fit"]["seconds"]
    assert f"a copy moves {report['copy GB/s']:.3g} GB/s" in printed
    profile = printed[printed.index("ms after the gradients") :]
    assert "fit, fp32, batch 4: waited for images" in profile
    assert all(name in profile for name in rows)


def wrong_gradient(contestant):
    """Of the smallest tensor alone, a tenth more."""
    least = min(contestant.parameters, key=torch.Tensor.numel)
    least.register_hook(lambda g: g * 1.1)


def wrong_loss(contestant):
    step = contestant.step
    contestant.step = lambda *given: step(*given) * 1.001


def no_clipping(contestant):
    for group in contestant.optimizer.param_groups:
        group["betas"] = (0.8, 0.999)  # so its gradients look twice as large


def another_rate(contestant):
    contestant.optimizer.param_groups[0]["lr"] = 1e-4


def no_average(contestant):
    contestant.average = [a.clone() for a in contestant.average]
    step, kept = contestant.step, contestant.average
    contestant.state_of = contestant.state

    def state():
        tensors = contestant.state_of()
        starts = {f"average.{n}": s for (n, _), s in zip(names, before, strict=True)}
        return tensors | starts

    names = list(contestant.network.named_parameters())
    before = [a.clone() for a in kept]
    contestant.step, contestant.state = step, state


def nothing_is_mirrored(contestant):
    step = contestant.step

    def unmirrored(x0, draws=None):
        if draws is not None:
            draws = dataclasses.replace(draws, flip=torch.zeros_like(draws.flip))
        return step(x0, draws)

    contestant.step = unmirrored


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (wrong_gradient, "of the gradient, allowed 0.0001"),
        (wrong_loss, "of the loss, allowed 1e-05"),
        (no_clipping, "of the gradient, allowed 0.0001"),
        (another_rate, "of the weight, allowed 0.02"),
        (no_average, "of the average, allowed 0.05"),
        (nothing_is_mirrored, "of the loss, allowed 1e-05"),
    ],
)
def test_a_step_that_computes_something_else_is_not_timed(
    in_process, contestants, monkeypatch, capsys, change, what
):
    pytest.importorskip("diffusers")

    def build(job):
        contestant = contestants.eager_nhwc(job)
        change(contestant)
        return contestant

    monkeypatch.setitem(contestants.PEERS, NHWC, contestants.Peer(build))
    assert in_process.main([*RACE, f"--only={NHWC}"]) == 1
    captured = capsys.readouterr()
    assert f"{NHWC} fp32, batch 4 is off by" in captured.err
    assert what in captured.err
    assert "ms an image " not in captured.out


def test_a_trainer_that_computes_something_else_is_not_timed(in_process, monkeypatch, capsys):
    monkeypatch.setattr(fastddpm.Trainer, "step", lambda self, x0: torch.tensor(1.0))
    assert in_process.main([*RACE, "--only=fastddpm"]) == 1
    said = capsys.readouterr().err
    assert "fastddpm Trainer fp32, batch 4 is off by" in said
    assert "inf of the gradient" in said


def test_bf16_is_measured_by_torchs_own_gradients(in_process, contestants, monkeypatch, tmp_path):
    pytest.importorskip("diffusers")

    def coarse(job):
        """Twice the error: activations in bf16, and the gradients off by a tenth."""
        contestant = contestants.eager_nchw(job)
        for p in contestant.parameters:
            p.register_hook(lambda g: g * (1 + 0.3 * torch.randn_like(g)))
        return contestant

    monkeypatch.setitem(contestants.PEERS, "diffusers NCHW", contestants.Peer(coarse))
    file = tmp_path / "x.json"
    options = ("--only=fastddpm,diffusers", f"--json={file}", "--precisions=bf16")
    assert in_process.main([*RACE, *options]) == 1
    rows = {r["name"]: r for r in json.loads(file.read_text(encoding="utf-8"))["rows"]}
    assert {name for name, row in rows.items() if "seconds" in row} == {"fastddpm Trainer", NHWC}
    for row in rows.values():
        assert 2e-3 < row["allowed"] < 0.3
        times = 2 * row["error"] / row["allowed"]
        assert row["of PyTorch's error"] == pytest.approx(times)


def test_what_takes_part_on_a_gpu(contestants):
    pytest.importorskip("diffusers")
    for precision in ("fp32", "bf16"):
        assert contestants.missing("torch.compile max-autotune", precision, "cuda") is None
        assert contestants.missing("torch.compile", precision, "cuda") is None
    here = contestants.missing("torch.compile max-autotune", "fp32", "cpu")
    assert here == "set up here for cuda only"


def test_a_recorded_step_has_no_parts(throughput):
    """No backward pass is seen in a replay; a step is timed whole."""
    profile = sys.modules["training_profile"]
    device = torch.device("cpu")
    found = profile.parts(lambda: None, 3, device)
    assert len(found["step"]) == 3
    assert found["sweep"] == []
    backward = torch.autograd.backward
    x = torch.ones((), requires_grad=True)
    with pytest.raises(RuntimeError):
        profile.parts(lambda: (x.detach() * 2).backward(), 1, device)
    assert torch.autograd.backward is backward
    row = {"batch": 1, "name": "ours", "precision": "fp32", "parts": found}
    assert "ours" in profile.table([row, {"name": "refused"}], 10, 1e9)


def test_bytes_of_a_sweep(throughput):
    """1e6 parameters in 10 ms move 4 GB/s: half of a copy's 8."""
    profile = sys.modules["training_profile"]
    parts = {"step": [0.1], "sweep": [0.01]}
    row = {"batch": 1, "name": "ours", "precision": "fp32", "parts": parts}
    words = profile.table([row], 10**6, 8e9).splitlines()[-1].split()
    assert words[-3:] == ["10%", "4", "50%"]


def test_who_is_missing_in_training_is_named(in_process, monkeypatch, capsys):
    found, gone = importlib.util.find_spec, ("accelerate", "einops")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in gone else found(name)
    )
    assert in_process.main([*RACE, "--only=fastddpm,lucidrains"]) == 0
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.startswith("not here: lucidrains fp32"))
    assert "accelerate, einops" in line
    assert line.endswith("not installed")


def test_another_architecture_is_nobodys_best_peer(in_process, contestants, monkeypatch, tmp_path):
    """It is checked against its own network in float64, and counts its own products."""

    class Own:
        def __init__(self, job):
            torch.manual_seed(0)
            self.network = torch.nn.Conv2d(3, 3, 3, padding=1)
            self.call = self.network.forward
            self.network.forward = lambda x, t: self.call(x)
            self.before = [p.detach().double().clone() for p in self.network.parameters()]
            self.optimizer = torch.optim.Adam(self.network.parameters(), lr=contestants.LR)

        def loss(self, network, x0, dtype):
            return network(x0.to(dtype) / 127.5 - 1).square().mean()

        def step(self, x0, draws=None):
            self.optimizer.zero_grad()
            loss = self.loss(self.call, x0, torch.float32)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), contestants.CLIP)
            self.optimizer.step()
            return loss.detach()

        def state(self):
            state = self.optimizer.state
            named = list(self.network.named_parameters())
            gradients = {f"gradient.{n}": state[p]["exp_avg"] / 0.1 for n, p in named}
            return gradients | {f"weight.{n}": p.detach() for n, p in named}

        def exact(self, x0, draws):
            weights = [p.clone().requires_grad_() for p in self.before]
            conv = lambda x: torch.nn.functional.conv2d(x, *weights, padding=1)  # noqa: E731
            loss = self.loss(conv, x0, torch.float64)
            loss.backward()
            names = [name for name, _ in self.network.named_parameters()]
            gradients = contestants.clipped([w.grad for w in weights], contestants.CLIP)
            return {
                "loss": loss.detach(),
                **{f"start.{n}": w for n, w in zip(names, self.before, strict=True)},
                **{f"gradient.{n}": g for n, g in zip(names, gradients, strict=True)},
            }

    peer = contestants.Peer(Own, needs=(), same=False, libraries=())
    monkeypatch.setitem(contestants.PEERS, "lucidrains", peer)
    file = tmp_path / "x.json"
    assert in_process.main([*RACE, "--only=fastddpm,lucidrains", f"--json={file}"]) == 0
    rows = {r["name"]: r for r in json.loads(file.read_text(encoding="utf-8"))["rows"]}
    assert rows["lucidrains"]["FLOP"] == 2 * 8 * 8 * 3 * 3 * 9
    assert rows["lucidrains"]["errors"].keys() == {"loss", "gradient", "weight"}
    assert "x best peer" not in rows["fastddpm Trainer"]
    # And one whose gradient is not that of its own network.
    monkeypatch.setattr(Own, "loss", lambda self, net, x0, dtype: (
        net(x0.to(dtype) / 127.5 - 1).square().mean() * (1.01 if dtype == torch.float32 else 1)
    ))  # fmt: skip
    assert in_process.main([*RACE, "--only=lucidrains"]) == 1


def test_lucidrains_trains_its_own_network(throughput, contestants, tmp_path):
    """Where its packages are: its loss and gradients are those of its float64 network."""
    reason = contestants.missing("lucidrains", "fp32", "cpu")
    if reason:
        pytest.skip(reason)
    assert throughput.main([*RACE, "--batches=16", "--only=lucidrains"]) == 0


def test_the_check_of_an_optimiser(throughput, contestants):
    """Adam's first step and the decay, by hand, and what is not them."""
    check = throughput.training_race.optimiser_errors
    random = torch.Generator().manual_seed(0)
    w, g = (torch.randn(1000, generator=random, dtype=torch.float64) * s for s in (0.02, 1e-3))
    rate, share = contestants.LR, 1 - contestants.EMA_DECAY
    after = w - rate * g / (g.abs() + contestants.ADAM_EPS)
    average = (w + share * (after - w)).float()
    right = {"gradient.w": g.float(), "weight.w": after.float(), "average.w": average}
    found = check(right, {"start.w": w})
    assert found["weight"] < 1e-3
    assert found["average"] < 1e-2
    assert check({**right, "weight.w": w.float()}, {"start.w": w})["weight"] == pytest.approx(
        1, abs=1e-3
    )
    assert check({**right, "weight.w": w * torch.nan}, {"start.w": w})["weight"] == float("inf")
    assert check({**right, "average.w": w.float()}, {"start.w": w})["average"] > 0.9


def test_the_truth_is_pytorchs_autograd_of_the_loss(throughput):
    """In float64, whole and not in chunks, through Diffusion.loss."""
    race = throughput.training_race
    model = throughput.make_model("cifar10", True)
    x0, draws = race.first_batch(model, 5, (3, 8, 8))
    truth = race.torch_step(model, x0, draws, torch.float64, "fp32")
    with fastddpm.ops.use_backend("reference"), autocast("fp32", x0.device):
        loss = model.diffusion.loss(
            lambda x, t: model.double()(x.double(), t), x0, t=draws.t, flip=draws.flip,
            eps=draws.eps,
        ).mean()  # fmt: skip
    loss.backward()
    assert truth["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert norm > 1  # so that clipping is seen
    expected = {f"gradient.{n}": p.grad / norm for n, p in model.named_parameters()}
    assert race.errors({"loss": loss, **expected}, truth)["gradient"] < 1e-5


# ---- loss curves ---------------------------------------------------------------------------------


def test_loss_curves(tmp_path, capsys):
    """Both precisions take the steps that a Trainer takes alone, on the same batches."""
    from fastddpm.data import batch_indices
    from fastddpm.training.presets import preset

    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (10, 28, 28), dtype=torch.uint8, generator=random)
    np.save(tmp_path / "images.npy", images.numpy())
    file = tmp_path / "curves.png"
    with script("loss_curves") as module:
        options = (f"--data={tmp_path / 'images.npy'}", "--steps=3", "--batch-size=4", "--seed=5")
        assert module.main([str(file), *options]) == 0
    report = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
    found, recipe = report["loss"], preset("fashion-mnist")
    torch.manual_seed(5)
    trainer = fastddpm.Trainer(
        fastddpm.UNet(**recipe.model), precision="fp32", lr=recipe.lr, warmup=recipe.warmup,
        ema_decay=recipe.ema_decay, ema_warmup=True, flip=False, seed=5,
    )  # fmt: skip
    alone = [
        trainer.step(images[batch_indices(10, 4, step, seed=5)][:, None]).item()
        for step in range(3)
    ]
    assert found["fp32"] == pytest.approx(alone, rel=1e-6)
    assert found["bf16"] == pytest.approx(alone, rel=1e-2)
    assert found["bf16"] != found["fp32"]
    assert "bf16 over fp32" in capsys.readouterr().out
    with Image.open(file) as image:
        assert image.width > image.height > 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["x.jpg"], "the plot must be a .png file; got x.jpg"),
        (["x.png", "--steps=0"], "--steps must be at least 1; got 0"),
        (["x.png", "--data=nowhere.npy"], "nowhere.npy"),
        (["x.png", "--preset=mnist"], "preset must be one of"),
    ],
)
def test_bad_loss_curves(capsys, options, message):
    with script("loss_curves") as module, pytest.raises(SystemExit):
        module.main(options)
    assert message in capsys.readouterr().err
