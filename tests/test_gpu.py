"""What a card is for: samplers, training and the bound on it, beside the same on the CPU.

Each test is a function of the device. The CPU runs the bodies too, where its part is that of the
other side, so that they are known to run; `pytest -m gpu` runs them on a card. The ops' own tests
go there by their backend."""

from __future__ import annotations

import contextlib
import copy
import re
import warnings

import pytest
import torch
from compare import assert_exact
from image_files import everything
from on_ranks import gradients
from torch.utils._python_dispatch import TorchDispatchMode
from toy import SCHEDULE, images, tiny_unet, wave

import fastddpm
from fastddpm import Diffusion, bits_per_dim, ops
from fastddpm.data import open_dataset
from fastddpm.doctor import doctor
from fastddpm.engine import make_engine
from fastddpm.figures import to_uint8
from fastddpm.training import Trainer

CPU = torch.device("cpu")
ENGINES = {"cpu": ("cpu_plan", "eager"), "cuda": ("cuda_graph", "eager")}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _float32():
    """torch's products of float32 are such, and its sums have one order."""
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield


def unet(device, **options):
    return tiny_unet(dropout=0.1, **options).to(device)


def close(got, expected, atol):
    torch.testing.assert_close(got.cpu(), expected.cpu(), atol=atol, rtol=0)


# ---- samples -------------------------------------------------------------------------------------

A, B = images(2, 1, 8, 8)
SAMPLERS = {
    "sample": lambda model, **o: fastddpm.sample(model, 5, batch_size=3, **o),
    "ddim": lambda model, **o: fastddpm.sample(model, 3, sampler="ddim", steps=6, **o),
    "progressive": lambda model, **o: fastddpm.sample_progressive(model, 3, frames=4, **o)[1],
    "shared latent": lambda model, **o: fastddpm.sample_shared_latent(model, 3, t=(12, 5), **o),
    "interpolate": lambda model, **o: fastddpm.interpolate(model, A, B, n=3, t=(0, 7), **o),
}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_is_drawn_is_what_the_cpu_draws(device, sampler):
    options = {"precision": "fp32", "progress": False}
    got = SAMPLERS[sampler](unet(device), **options)
    assert got.device.type == device.type
    close(got, SAMPLERS[sampler](unet(CPU), engine="eager", **options), 2e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("batch", [3, 8])
def test_the_engines_draw_the_same(device, precision, batch):
    options = {"precision": precision, "progress": False, "batch_size": batch}
    drawn = [
        fastddpm.sample(unet(device), 8, engine=engine, **options)
        for engine in (*ENGINES[device.type], "auto")
    ]
    for other in drawn[1:]:
        close(drawn[0], other, 1e-5 if precision == "fp32" else 0.05)


def test_a_model_that_is_no_unet(device):
    options = {"shape": (2, 4, 4), "diffusion": Diffusion(SCHEDULE), "progress": False}
    got = fastddpm.sample(wave, 5, device=device, batch_size=2, **options)
    assert got.device.type == device.type
    close(got, fastddpm.sample(wave, 5, **options), 1e-4)


def test_a_folder_of_samples_goes_on_and_holds_them(device, tmp_path):
    options = {"precision": "fp32", "progress": False}
    for n, lacked in ((2, 2), (5, 3), (5, 0)):
        assert fastddpm.sample_to_folder(unet(device), tmp_path, n, **options) == lacked
    drawn = fastddpm.sample(unet(CPU), 5, engine="eager", **options)
    kept = everything(open_dataset(tmp_path)).int()
    assert (kept - to_uint8(drawn).int()).abs().max() <= 1


def test_the_bound(device):
    x, options = images(3, 1, 8, 8), {"progress": False, "seed": 3}
    got, expected = (bits_per_dim(unet(place), x, **options) for place in (device, CPU))
    assert got.total.device.type == device.type
    for name in ("total", "prior", "terms", "mse"):
        torch.testing.assert_close(
            getattr(got, name).cpu(), getattr(expected, name), atol=1e-4, rtol=1e-3, msg=name
        )


def test_fp32_is_float32(device):
    """And not TF32, whose products have three digits."""
    model = unet(device, image_size=16, channels=16)
    x, t = torch.randn(2, 1, 16, 16), torch.tensor([0, 11])
    with torch.no_grad():
        truth = copy.deepcopy(model).to(CPU).double()(x.double(), t)
        plain = copy.deepcopy(model).to(CPU)(x, t)
        assert_exact(model(x.to(device), t.to(device)), truth, plain, ulps=64)


# ---- training ------------------------------------------------------------------------------------

RECIPE = {"precision": "fp32", "lr": 1e-3, "warmup": 0, "ema_decay": 0.9, "grad_clip": 1e9}


def test_a_step_is_the_cpus(device):
    """Loss, gradient and average. Weights move by the signs of gradients, whatever their size."""
    batch, runs = images(4, 1, 8, 8), [Trainer(tiny_unet().to(d), **RECIPE) for d in (device, CPU)]
    losses = [run.step(batch) for run in runs]
    assert losses[0].device.type == device.type
    close(*losses, 1e-5)
    got, expected = map(gradients, runs)
    for name, g in expected.items():
        close(got[name], g, 1e-4 * max(g.abs().max().item(), 1e-3))
    for a, b in zip(*(run.ema_model().parameters() for run in runs), strict=True):
        close(a, b, 2.1e-4)  # two steps of Adam, and what is kept of them


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loss_falls(device, precision):
    model = tiny_unet(dropout=0.1).to(device)
    trainer = Trainer(model, **{**RECIPE, "precision": precision, "lr": 3e-3})
    batch = images(16, 1, 8, 8) // 4
    losses = [trainer.step(batch).item() for _ in range(30)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_a_resumed_run_takes_the_same_steps(device, tmp_path):
    def start():
        return Trainer(unet(device), **RECIPE)

    whole, first, second = start(), start(), start()
    for k in range(4):
        whole.step(images(4, 1, 8, 8, seed=k))
    for k in range(2):
        first.step(images(4, 1, 8, 8, seed=k))
    first.save(tmp_path)
    second.load(tmp_path)
    for k in range(2, 4):
        second.step(images(4, 1, 8, 8, seed=k))
    for a, b in zip(whole.network.parameters(), second.network.parameters(), strict=True):
        assert a.device == b.device
        close(a.detach(), b.detach(), 1e-5)


def test_torchs_random_state_is_left_alone(device):
    def states():
        cards = torch.cuda.get_rng_state_all() if device.type == "cuda" else []
        return [torch.get_rng_state(), *cards]

    model = unet(device)
    trainer = Trainer(copy.deepcopy(model), **RECIPE)
    before = states()
    trainer.step(images(4, 1, 8, 8))
    fastddpm.sample(model, 2, progress=False)
    assert all(map(torch.equal, before, states()))


# ---- the host waits for nothing ------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """The CPU's stand-in for set_sync_debug_mode: a value of a tensor is not read."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masked = func._opname == "index" and any(x.dtype == torch.bool for x in args[1])
        if masked or func._opname in self.WAITS:
            raise RuntimeError(f"the host waits for a value: {func}")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_wait(device):
    """An error where the host would wait for the device."""
    if device.type == "cpu":
        with Reads():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_waits_is_found(device):
    x = torch.ones(3, device=device)
    for wait in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: x[x > 0]):
        with pytest.raises(RuntimeError), no_wait(device):
            wait()


@pytest.mark.parametrize("engine", ["auto", "eager"])
def test_a_chain_waits_for_nothing(device, engine):
    model, index = unet(device), torch.arange(2, device=device)
    x = ops.randn((2, 1, 8, 8), seed=0, step=SCHEDULE.T, sample_index=index)
    chain = make_engine(engine, model, model.diffusion, device=device, precision="fp32")
    first = chain.run(x, seed=0, sample_index=index)  # compiles, records
    with no_wait(device):
        again = chain.run(x, seed=0, sample_index=index)
    close(again, first, 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_of_training_waits_for_nothing(precision):
    """Between two looks at whether all was finite, which are 50 steps apart on a GPU."""
    device = torch.device("cuda")
    trainer = Trainer(unet(device), **{**RECIPE, "precision": precision})
    batch = images(4, 1, 8, 8).to(device)
    for _ in range(3):  # compiles, records
        trainer.step(batch)
    with no_wait(device):
        for _ in range(3):
            loss = trainer.step(batch)
    assert loss.isfinite()


@pytest.mark.gpu
def test_steps_that_are_not_finite_are_left_out_and_found_at_the_next_look():
    trainer = Trainer(unet(torch.device("cuda")), **RECIPE)
    batch = images(4, 1, 8, 8)
    trainer.step(batch)
    weights = [p.detach().clone() for p in trainer.network.parameters()]
    broken = trainer.network.conv_out.weight.detach()
    whole = broken.clone()
    broken.fill_(torch.inf)
    for _ in range(2):
        trainer.step(batch)
    with pytest.raises(FloatingPointError, match=r"step 1: loss .* were left out"):
        trainer.check_finite()
    broken.copy_(whole)
    assert trainer.step_count == 1
    assert all(map(torch.equal, weights, trainer.network.parameters()))
    assert trainer.step(batch).isfinite()


# ---- too little memory, and two cards ------------------------------------------------------------


class Hungry:
    """A model that takes a quarter of the card's memory for each image."""

    def __init__(self, device):
        self.share = torch.cuda.mem_get_info(device)[0] // 4

    def __call__(self, x, t):
        scratch = torch.empty(len(x) * self.share, dtype=torch.uint8, device=x.device)
        return wave(x, t) + 0 * scratch[0]


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["eager", "cuda_graph"])
def test_a_batch_that_the_card_does_not_hold(engine):
    device = torch.device("cuda")
    torch.cuda.empty_cache()
    options = {"shape": (2, 4, 4), "diffusion": Diffusion(SCHEDULE), "progress": False}
    options |= {"device": device, "engine": engine}
    with pytest.warns(RuntimeWarning, match="memory is too small for batches of 8") as told:
        got = fastddpm.sample(Hungry(device), 8, batch_size=8, **options)
    assert len(told) == 1
    torch.cuda.empty_cache()
    with warnings.catch_warnings(action="error"):
        close(got, fastddpm.sample(wave, 8, **options), 1e-6)


@pytest.mark.gpu
def test_a_model_that_can_not_be_recorded():
    """And what runs after it is right: the recording's stream and its error are gone."""

    def looks(x, t):
        return wave(x, t) if t[0].item() >= 0 else x

    options = {"shape": (2, 4, 4), "diffusion": Diffusion(SCHEDULE), "progress": False}
    options |= {"device": "cuda"}
    stream = torch.cuda.current_stream()
    with pytest.warns(RuntimeWarning, match="'eager', not 'cuda_graph'"):
        got = fastddpm.sample(looks, 3, engine="cuda_graph", **options)
    assert torch.cuda.current_stream() == stream
    for engine in ("eager", "cuda_graph"):
        close(got, fastddpm.sample(wave, 3, engine=engine, **options), 1e-6)


@pytest.mark.gpu
def test_a_second_card():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one card")
    model = tiny_unet().to("cuda:1")
    got = fastddpm.sample(model, 2, precision="fp32", progress=False)
    assert got.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    close(
        got, fastddpm.sample(tiny_unet(), 2, engine="eager", precision="fp32", progress=False), 2e-3
    )
    with pytest.raises(ValueError, match="move the model first"):
        fastddpm.sample(model, 2, device="cuda:0", progress=False)


def test_the_doctor(device):
    name = torch.cuda.get_device_name() if device.type == "cuda" else "no CUDA|without CUDA|no dev"
    assert torch.cuda.is_available() == (device.type == "cuda")
    assert re.search(name, doctor())
