"""Whatever the process that hosts us has set: the same bits, and its state as it was."""

from __future__ import annotations

import contextlib
import functools
import threading

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from toy import SCHEDULE, images, tiny_unet, wave

import fastddpm
from fastddpm import Diffusion, Trainer, figures, host
from fastddpm.data import open_dataset
from fastddpm.training import fit

QUIET = {"progress": False}


@contextlib.contextmanager
def setting(set_value, value, before):
    set_value(value)
    try:
        yield
    finally:
        set_value(before)


class PassingFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class PassingDispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def dtype(value):
    return lambda: setting(torch.set_default_dtype, value, torch.float32)


STATES = {
    "float64": dtype(torch.float64),
    "bfloat16": dtype(torch.bfloat16),
    "default device": lambda: setting(torch.set_default_device, "meta", None),
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": lambda: setting(torch.use_deterministic_algorithms, True, False),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "three threads": lambda: setting(torch.set_num_threads, 3, 1),
    "no denormals": lambda: setting(torch.set_flush_denormal, True, False),
    "matmul": lambda: setting(torch.set_float32_matmul_precision, "medium", "highest"),
    "functions": PassingFunctions,
    "dispatch": PassingDispatch,
    "forward mode": forward_ad.dual_level,
}


def everything(tmp_path) -> dict[str, torch.Tensor]:
    return {**drawn(tmp_path), **trained(tmp_path)}


def drawn(tmp_path) -> dict[str, torch.Tensor]:
    model, (a, b) = MODEL, PAIR
    process = {"diffusion": Diffusion(SCHEDULE), "shape": (1, 8, 8), **QUIET}
    samples, x0, _ = fastddpm.sample_progressive(wave, 2, frames=2, **process)
    bits = fastddpm.bits_per_dim(model, PAIR, steps=3, **QUIET)
    made = {
        **{
            f"{engine} in {precision}": fastddpm.sample(
                model, 2, engine=engine, precision=precision, steps=3, **QUIET
            )
            for engine, precision in ENGINES
        },
        "callable": fastddpm.sample(wave, 2, seed=3, **process),
        "samples": samples,
        "x0": x0,
        "shared": fastddpm.sample_shared_latent(wave, 2, t=(5, 12), **process),
        "mixed": fastddpm.interpolate(wave, a, b, n=3, t=5, **process),
        "mixed floats": fastddpm.interpolate(wave, UNIT[0], UNIT[1], n=3, t=5, **process),
        **{name: getattr(bits, name) for name in ("total", "prior", "terms", "mse")},
    }
    fastddpm.sample_to_folder(model, tmp_path / "set", 2, shard_size=2, steps=2, **QUIET)
    made["folder"] = open_dataset(tmp_path / "set" / "00000000-00000002.npz").images([0, 1])
    return made


def trained(tmp_path) -> dict[str, torch.Tensor]:
    made = {}
    for name, process in {"eps": Diffusion(SCHEDULE), "x0": Diffusion(SCHEDULE, "x0")}.items():
        NETWORKS[name].load_state_dict(MODEL.state_dict())
        trainer = Trainer(NETWORKS[name], diffusion=process, precision="bf16", warmup=0, lr=1e-2)
        losses = [trainer.step(x0) for x0 in (PAIR, UNIT)]
        made[f"losses of {name}"] = torch.stack(losses)
        for key, value in trainer.ema_model().state_dict().items():
            made[f"{name}.{key}"] = value
        trainer.save(tmp_path / name)
        trainer.load(tmp_path / name)
    return made


def fitted(tmp_path) -> dict[str, torch.Tensor]:
    NETWORKS["eps"].load_state_dict(MODEL.state_dict())
    trainer = Trainer(NETWORKS["eps"], warmup=0)
    data = open_dataset(DATA[0])
    fit(trainer, data, tmp_path / "run", steps=2, batch_size=2, sample_every=2, progress=False)
    picture = figures.read_image(tmp_path / "run" / "samples" / "step_000002.png", (74, 74), 1)
    return {**trainer.ema_model().state_dict(), "picture": picture}


MODEL = tiny_unet(dropout=0.5)
ENGINES = (("cpu_plan", "fp32"), ("eager", "fp32"), ("eager", "bf16"))
NETWORKS = {name: tiny_unet(dropout=0.5) for name in ("eps", "x0")}
PAIR = images(2, 1, 8, 8)
UNIT = PAIR.float() / 127.5 - 1
DATA = []


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory) -> None:
    DATA.append(tmp_path_factory.mktemp("data") / "data.npy")
    np.save(DATA[0], images(4, 1, 8, 8, seed=1).numpy())


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, torch.Tensor]:
    return everything(tmp_path_factory.mktemp("expected"))


def assert_same(got, expected, *, but=()) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        assert got[name].device == value.device, name
        if not name.startswith(tuple(but)):
            assert torch.equal(got[name], value), name


# Sums of torch's own: by thread, and from products that it is told to round.
TORCHS = ("eager", "eps", "x0", "losses", "total", "terms", "mse")
ROUNDED = {"three threads": TORCHS, "matmul": TORCHS}


@pytest.mark.parametrize("name", STATES)
def test_results_are_the_same_bits_in_every_state(name, expected, tmp_path):
    modes = [m.training for m in MODEL.modules()]
    with STATES[name]():
        before = facts()
        got = everything(tmp_path)
        assert facts() == before
    assert_same(got, expected, but=ROUNDED.get(name, ()))
    made_by_us = [key for key in got if key != "folder" and "losses" not in key]
    assert not any(got[key].is_inference() for key in made_by_us)
    assert [m.training for m in MODEL.modules()] == modes


def test_a_whole_training_is_the_same_in_all_of_them(tmp_path):
    expected = fitted(tmp_path / "a")
    with contextlib.ExitStack() as stack:
        for name in STATES.keys() - ROUNDED.keys() - {"bfloat16"}:
            stack.enter_context(STATES[name]())
        got = fitted(tmp_path / "b")
    assert_same(got, expected)


def facts() -> tuple:
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_num_threads(),
        torch.get_rng_state().tolist(),
    )


def test_a_mode_without_values_is_named():
    for mode in (FakeTensorMode(), FakeTensorMode(allow_non_fake_inputs=True)):
        with mode, pytest.raises(ValueError, match="type FakeTensor, which has no values"):
            fastddpm.sample(wave, 1, shape=(1, 8, 8), **QUIET)


def test_transforms_are_left_first():
    """Of a transform's tensors there are no values either."""
    with pytest.raises(ValueError, match=r"a transform of torch.func \(vmap, grad"):
        torch.func.vmap(lambda x: fastddpm.interpolate(MODEL, x, x, n=2, t=3, **QUIET))(UNIT)
    with pytest.raises(ValueError, match=r"a transform of torch.func \(vmap, grad"):
        torch.func.grad(lambda a: (a * fastddpm.sample(MODEL, 1, steps=2, **QUIET)).sum())(
            torch.tensor(2.0)
        )


def test_pixels_without_values_are_named():
    x = UNIT[:, :1]
    for strange, message in (
        (x.to("meta"), "must be a dense tensor with values; got one on the device 'meta'"),
        (x.to_sparse(), "must be a dense tensor with values; got one torch.sparse_coo"),
        (x.to(torch.float8_e4m3fn), "must be one of .*; got torch.float8_e4m3fn"),
    ):
        with pytest.raises(ValueError, match=f"a {message}"):
            fastddpm.interpolate(MODEL, strange[0], strange[0], n=2, t=3, **QUIET)
        with pytest.raises(ValueError, match=f"a batch {message}"):
            Trainer(tiny_unet()).step(strange)
    with pytest.raises(ValueError, match="x0 must be a dense tensor with values"):
        fastddpm.bits_per_dim(MODEL, PAIR.to("meta"), steps=2, **QUIET)


def test_imaginary_parts_are_not_dropped():
    process = {"diffusion": Diffusion(SCHEDULE), "shape": (1, 8, 8), **QUIET}
    with pytest.raises(ValueError, match=r"must return real numbers; got torch\.complex64"):
        fastddpm.sample(lambda x, t: x.to(torch.complex64), 1, **process)


def test_models_on_meta_are_named():
    model = tiny_unet().to("meta")
    for call in (fastddpm.sample, fastddpm.sample_progressive, fastddpm.bits_per_dim):
        with pytest.raises(ValueError, match="model is on the device 'meta'"):
            call(model, PAIR if call is fastddpm.bits_per_dim else 1, **QUIET)


def test_threads_that_the_system_does_not_have_are_named(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 20_000)
    with pytest.raises(ValueError, match=r"set_num_threads must be at most \d+ here; got 20000"):
        fastddpm.sample(wave, 1, shape=(1, 8, 8), **QUIET)


def test_warnings_point_at_the_line_that_called():
    short = Diffusion(fastddpm.Schedule.linear(100))
    with pytest.warns(UserWarning, match="abar_T is") as told:
        fastddpm.sample(wave, 1, shape=(1, 2, 2), diffusion=short, **QUIET)
    with pytest.warns(UserWarning, match="no pixel below 0") as more:
        Trainer(tiny_unet()).step(UNIT.abs())
    assert {w.filename for w in (*told, *more)} == {__file__}


def test_weights_of_inference_mode_are_sampled_and_not_trained():
    with torch.inference_mode():
        model = tiny_unet()
    options = {"engine": "eager", "precision": "fp32", "steps": 2, **QUIET}
    assert torch.equal(fastddpm.sample(model, 1, **options), fastddpm.sample(MODEL, 1, **options))
    with pytest.raises(ValueError, match=r"weights were made under torch\.inference_mode"):
        Trainer(model)


def test_images_of_inference_mode_are_trained_on(expected):
    with torch.inference_mode():
        x0 = UNIT.clone()
    Trainer(tiny_unet(), diffusion=Diffusion(SCHEDULE, "x0"), precision="fp32").step(x0)


def test_no_rounded_copy_of_old_weights_is_left_in_the_hosts_autocast():
    """autocast keeps copies of weights until its outermost block ends: a step within must not take
    those of before the step before, nor leave such to the host."""
    runs = []
    for context in (contextlib.nullcontext, STATES["autocast"]):
        model, x0 = tiny_unet(), PAIR
        trainer = Trainer(model, precision="bf16", warmup=0, lr=0.1)
        with context():
            losses = [trainer.step(x0).item() for _ in range(3)]
        runs.append(losses)
    assert runs[0] == runs[1]

    layer = torch.nn.Conv2d(1, 1, 3, padding=1)
    layer.forward = lambda x, t, forward=layer.forward: forward(x)
    trainer = Trainer(layer, precision="fp32", warmup=0, lr=0.1)
    with STATES["autocast"]():
        before = layer(UNIT, None)
        trainer.step(PAIR)
        after = layer(UNIT, None)
        torch.clear_autocast_cache()
        assert torch.equal(after, layer(UNIT, None))
        assert not torch.equal(after, before)


# ---- threads that share a model ------------------------------------------------------------------


class Meeting(torch.nn.Module):
    """A model with dropout whose calls wait for one another at some steps, in all threads."""

    def __init__(self, threads: int):
        super().__init__()
        self.dropout = torch.nn.Dropout(0.5)
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.barrier = threading.Barrier(threads, timeout=60)
        self.modes: list[bool] = []

    def forward(self, x, t):
        self.modes.append(self.training)
        return self.dropout(wave(x, t)) * self.weight


def in_threads(*calls) -> list:
    results: list = [None] * len(calls)

    def run(k):
        try:
            results[k] = calls[k]()
        except Exception as error:
            results[k] = error

    threads = [threading.Thread(target=run, args=(k,)) for k in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_threads_that_sample_one_model_at_different_times_get_no_dropout():
    """The first ends in the middle of the second, which once left it in training mode."""
    model = Meeting(2).train()
    model.dropout.eval()
    modes = [m.training for m in model.modules()]
    options = {"shape": (1, 8, 8), "diffusion": Diffusion(SCHEDULE), **QUIET}
    first_is_in, first_is_out = threading.Event(), threading.Event()

    def first():
        def noted(x, t):
            return model(x, t)

        with host.evaluating(model):
            first_is_in.set()
            model.barrier.wait()  # the second is in
        first_is_out.set()
        return noted

    def second():
        first_is_in.wait(60)
        with host.evaluating(model):
            model.barrier.wait()
            first_is_out.wait(60)
            return fastddpm.sample(model, 2, **options)

    _, images_of_second = in_threads(first, second)
    assert torch.equal(images_of_second, fastddpm.sample(wave, 2, **options))
    assert not any(model.modes)
    assert [m.training for m in model.modules()] == modes
    assert not host._held


@pytest.mark.parametrize("kind", ["function", "partial", "method", "object"])
def test_a_module_that_a_callable_calls_is_evaluated_too(kind):
    model = tiny_unet(dropout=0.5).train()
    model.mid.eval()
    modes = [m.training for m in model.modules()]

    class Object:
        network = None

        def __call__(self, x, t):
            return self.network(x, t)

    holder = Object()
    holder.network = model
    call = {
        "function": lambda x, t: model(x, t),
        "partial": functools.partial(lambda network, x, t: network(x, t), model),
        "method": model.forward,
        "object": holder,
    }[kind]
    options = {"shape": (1, 8, 8), "diffusion": model.diffusion, "steps": 2, **QUIET}
    options |= {"engine": "eager", "precision": "fp32"}
    evaluated = tiny_unet()
    expected = fastddpm.sample(lambda x, t: evaluated(x, t), 2, **options)
    assert torch.equal(fastddpm.sample(call, 2, **options), expected)
    assert [m.training for m in model.modules()] == modes


def test_many_threads_sample_one_model():
    model = tiny_unet(dropout=0.5).train()
    options = {"engine": "eager", "precision": "fp32", "steps": 4, **QUIET}
    expected = fastddpm.sample(model, 2, **options)
    drawn = in_threads(*[lambda: fastddpm.sample(model, 2, **options)] * 6)
    for x in drawn:
        assert torch.equal(x, expected)
    assert all(m.training for m in model.modules())


def test_a_model_that_is_sampled_is_not_trained():
    model = Meeting(1)
    trainer = Trainer(model, precision="fp32")

    class Sampled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x, t):
            trainer.step(PAIR)

    with pytest.raises(RuntimeError, match="the model is being sampled or evaluated"):
        fastddpm.sample(Sampled(), 1, shape=(1, 8, 8), **QUIET)
    assert trainer.step_count == 0
    trainer.step(PAIR)
    assert model.training


def test_sampling_waits_for_the_step_of_another_thread():
    model = Meeting(1)
    options = {"shape": (1, 8, 8), "diffusion": Diffusion(SCHEDULE), **QUIET}
    with host.training(model):
        drawn: list = []
        thread = threading.Thread(target=lambda: drawn.append(fastddpm.sample(model, 1, **options)))
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        assert model.training
    thread.join(60)
    assert torch.equal(drawn[0], fastddpm.sample(wave, 1, **options))
    assert not any(model.modes)
    assert not host._trained


def test_trainers_in_threads_draw_their_own_dropout():
    def train(model, seed):
        trainer = Trainer(model, precision="fp32", seed=seed)
        return torch.stack([trainer.step(PAIR) for _ in range(3)])

    models = [tiny_unet(dropout=0.5) for _ in range(6)]
    state = torch.get_rng_state()
    apart = [train(models.pop(), seed) for seed in range(3)]
    assert torch.equal(torch.get_rng_state(), state)
    together = in_threads(*(functools.partial(train, models.pop(), seed) for seed in range(3)))
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(apart, together, strict=True):
        assert torch.equal(a, b)
