"""The engine cuda_graph without a GPU: what it records is replayed here from a tape."""

from __future__ import annotations

import contextlib

import pytest
import torch
from tape import Recorder
from toy import PREDICTIONS, SCHEDULE, Optimal, generator, tiny_unet, wave

import fastddpm
from fastddpm import Diffusion, Schedule, ops
from fastddpm.engine import choose, cuda_graph
from fastddpm.engine.cuda_graph import CudaGraph
from fastddpm.engine.eager import Eager

CPU = torch.device("cpu")
SHAPE = (2, 4, 4)


def engines(model, diffusion=None, record=None, **options):
    """(cuda_graph on tapes, eager, the recorder)."""
    record = record or Recorder()
    options = {"device": CPU, "precision": "fp32", **options}
    diffusion = diffusion or Diffusion(SCHEDULE)
    graph = CudaGraph(model, diffusion, record=record, **options)
    return graph, Eager(model, diffusion, **options), record


def start(n=3, seed=5, shape=SHAPE, first=0):
    index = torch.arange(first, first + n)
    x = ops.randn((n, *shape), seed=seed, step=SCHEDULE.T, sample_index=index)
    return x, {"seed": seed, "sample_index": index}


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    "options",
    [{}, {"sampler": "ddim"}, {"sampler": "ddim", "eta": 0.5}, {"clip": False}],
    ids=str,
)
def test_replays_take_the_steps_of_eager(prediction, options):
    graph, eager, record = engines(wave, Diffusion(SCHEDULE, prediction), **options)
    x, stream = start()
    before = x.clone()
    assert torch.equal(graph.run(x, **stream), eager.run(x, **stream))
    assert torch.equal(x, before)
    assert (record.tapes, record.replays) == (1, SCHEDULE.T)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_shorter_chain_shows_the_model_its_own_steps(steps):
    graph, eager, record = engines(wave, Diffusion(SCHEDULE).respace(steps))
    x, stream = start()
    assert torch.equal(graph.run(x, **stream), eager.run(x, **stream))
    assert record.replays == steps


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize(
    ("prediction", "variance"),
    [("mean", "fixed_small"), ("mean", "learned"), ("eps", "learned")],
)
def test_a_shorter_chain_of_what_speaks_of_a_step_of_the_full_one(prediction, variance, sampler):
    """Recorded, Gaussian data keep their spread in 50 steps: see test_respacing.py."""
    loss = "vlb" if variance == "learned" else "simple"
    full = Diffusion(Schedule.linear(), prediction, variance, loss)
    model = Optimal(full, 0.5)
    graph, eager, record = engines(model, full.respace(50), sampler=sampler)
    x, stream = start(n=64)
    got = graph.run(x, **stream)
    torch.testing.assert_close(got, eager.run(x, **stream), atol=1e-5, rtol=0)
    assert record.replays == 50
    fixed = Diffusion(Schedule.linear(), "eps", "fixed_small")
    known = 0.5
    if variance == "fixed_small" or sampler == "ddim":  # 0.44 and 0.46: the chain's own error
        known = engines(Optimal(fixed, 0.5), fixed.respace(50), sampler=sampler)[1]
        known = known.run(x, **stream).std().item()
    assert got.std().item() == pytest.approx(known, rel=0.05)


@pytest.mark.parametrize("variance", ["fixed_small", "learned"])
def test_a_unet_and_each_variance(variance):
    model = tiny_unet(diffusion=Diffusion(SCHEDULE, variance=variance, loss="vlb"))
    graph, eager, _ = engines(model, model.diffusion)
    x, stream = start(shape=(1, 8, 8))
    torch.testing.assert_close(graph.run(x, **stream), eager.run(x, **stream), atol=1e-5, rtol=0)


def test_one_recording_serves_every_batch_of_its_shape():
    graph, eager, record = engines(wave)
    for first in (0, 3, 2**40):
        x, stream = start(first=first)
        assert torch.equal(graph.run(x, **stream), eager.run(x, **stream))
    assert record.tapes == 1
    x, stream = start(n=2)
    assert torch.equal(graph.run(x, **stream), eager.run(x, **stream))
    assert record.tapes == 2
    graph.run(*start()[:1], **start()[1])
    assert record.tapes == 2
    x, stream = start(seed=6)
    assert torch.equal(graph.run(x, **stream), eager.run(x, **stream))
    assert record.tapes == 3
    assert len(graph._recorded) == 1  # another seed is another set


def test_parts_of_the_chain():
    graph, eager, _ = engines(wave)
    x, stream = start()
    half = graph.run(x, start=12, stop=5, **stream)
    assert torch.equal(half, eager.run(x, start=12, stop=5, **stream))
    assert torch.equal(graph.run(half, start=5, **stream), eager.run(x, **stream))
    assert torch.equal(graph.run(x, start=4, stop=4, **stream), x)


def test_what_on_step_sees():
    graph, eager, _ = engines(wave)
    x, stream = start()
    seen = {"graph": [], "eager": []}
    for name, engine in (("graph", graph), ("eager", eager)):
        engine.run(
            x, **stream,
            on_step=lambda i, x, x0, name=name: seen[name].append((i, x.clone(), x0())),
        )  # fmt: skip
    for (i, x, x0), (j, y, y0) in zip(seen["graph"], seen["eager"], strict=True):
        assert i == j
        assert torch.equal(x, y)
        assert torch.equal(x0, y0)


def test_the_layout_of_x_is_kept():
    graph, _, _ = engines(wave)
    x, stream = start()
    nhwc = x.contiguous(memory_format=torch.channels_last)
    assert graph.run(x, **stream).is_contiguous()
    assert graph.run(nhwc, **stream).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(graph.run(x, **stream), graph.run(nhwc, **stream))


def test_a_model_is_left_in_its_mode():
    model = tiny_unet(dropout=0.5).train()
    graph, _, _ = engines(model, model.diffusion)
    x, stream = start(shape=(1, 8, 8))
    assert torch.equal(graph.run(x, **stream), graph.run(x, **stream))  # without dropout
    assert model.training


# ---- what can't be recorded ----------------------------------------------------------------------


def looks(x, t):
    """A model that reads t on the host."""
    return wave(x, t) if t[0].item() >= 0 else x


def test_a_model_that_can_not_be_recorded_runs_in_eager_and_is_named_once(monkeypatch):
    monkeypatch.delenv("FASTDDPM_STRICT", raising=False)
    graph, eager, record = engines(looks)
    x, stream = start()
    with pytest.warns(RuntimeWarning, match="'eager', not 'cuda_graph': operation not") as told:
        drawn = [graph.run(x, **stream) for _ in range(2)]
    assert len(told) == 1
    assert all(torch.equal(y, eager.run(x, **stream)) for y in drawn)
    assert record.replays == 0


def test_strictly_it_is_an_error(monkeypatch):
    monkeypatch.setenv("FASTDDPM_STRICT", "1")
    graph, _, _ = engines(looks)
    x, stream = start()
    with pytest.raises(RuntimeError, match="FASTDDPM_STRICT=1 makes this an error"):
        graph.run(x, **stream)


def test_out_of_memory_is_for_the_caller_who_splits_the_batch():
    def full(step, device):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    graph, _, _ = engines(wave, record=full)
    x, stream = start()
    with pytest.raises(torch.OutOfMemoryError):
        graph.run(x, **stream)


def test_the_tape_is_a_fair_stand_in():
    """A step that makes decisions in Python is not seen by a tape, as by a graph."""
    calls = []

    def counting(x, t):
        calls.append(1)
        return x * len(calls)

    graph, eager, _ = engines(counting)
    x, stream = start()
    drawn = graph.run(x, **stream)
    assert len(calls) == cuda_graph.WARM_UP + 1
    assert not torch.equal(drawn, eager.run(x, **stream))


# ---- every op -----------------------------------------------------------------------------------


def image(k, c=4):
    return torch.randn(2, c, 3, 5, generator=generator(k))


def per_sample(k, end):
    return torch.randint(0, end, (2,), generator=generator(k))


TABLE = SCHEDULE.table()
# op -> (a function of tensors, those tensors for the k-th time)
RECORDED = {
    "randn": (
        lambda index, step: ops.randn((2, 4, 3, 5), seed=3, step=step, sample_index=index),
        lambda k: (per_sample(k, 99), per_sample(k + 9, 12)),
    ),
    "noise": (
        lambda x, t, table, index: ops.noise(x, t, table, seed=3, sample_index=index)[0],
        lambda k: (image(k), per_sample(k, 12), TABLE, per_sample(k + 9, 99)),
    ),
    "posterior_step": (
        lambda x, y, t, table, index: ops.posterior_step(
            x, y, t, table, seed=3, sample_index=index
        ),
        lambda k: (image(k), image(k + 5), per_sample(k, 12), TABLE, per_sample(k + 9, 99)),
    ),
    "posterior_step, of a seed on the device": (
        lambda x, t, table, index, seed: ops.posterior_step(
            x, x, t, table, seed=seed, sample_index=index
        ),
        lambda k: (
            *(image(k), per_sample(k, 12), TABLE, per_sample(k + 9, 99)),
            torch.tensor([(-1) ** k * (k + 2**40)]),
        ),
    ),
    "group_norm_silu": (
        lambda x, w, b: ops.group_norm_silu(x, 2, w, b),
        lambda k: (image(k), image(k + 1)[0, :, 0, 0], image(k + 2)[0, :, 0, 0]),
    ),
    "group_norm_silu, of a sum": (
        lambda x, r, b: torch.cat(
            ops.group_norm_silu(x, 2, None, None, residual=r, before=b)
        ),
        lambda k: (image(k), image(k + 1), image(k + 2)[:, :, 0, 0]),
    ),
    "group_norm_silu, of two sources, with dropout": (
        lambda x, x2, index, step: ops.group_norm_silu(
            x, 2, None, None, x2=x2, dropout=0.5, seed=3, step=step, sample_index=index
        ),
        lambda k: (image(k), image(k + 1, 2), per_sample(k, 99), per_sample(k, 12)),
    ),
    "residual_sum": (ops.residual_sum, lambda k: (image(k), image(k + 1), image(k)[0, :, 0, 0])),
    "attention_block": (
        lambda x, qkv, proj: ops.attention_block(x, 2, None, None, qkv, None, proj, None),
        lambda k: (image(k), image(k, 24)[0, :12, 0, :4], image(k + 1)[0, :, 0, :4]),
    ),
    "discretized_log_likelihood": (
        ops.discretized_log_likelihood,
        lambda k: (image(k).sign(), image(k + 1) * 0.1, image(k + 2) - 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDED)
def test_an_op_is_recorded_and_replayed_on_other_values(backend, device, name):
    function, make = RECORDED[name]
    record = cuda_graph.record if device.type == "cuda" else Recorder()
    first, second = ([x.to(device).contiguous() for x in make(k)] for k in (0, 1))
    with torch.no_grad():
        try:
            expected = [function(*values) for values in (first, second)]
        except ValueError as refused:
            if "can't run on the backend" not in str(refused):
                raise
            pytest.skip(str(refused))
        static = [x.clone() for x in first]
        result = torch.empty_like(expected[0])
        replay = record(lambda: result.copy_(function(*static)), device)
        for values, y in zip((second, first), reversed(expected), strict=True):
            for x, value in zip(static, values, strict=True):
                x.copy_(value)
            replay()
            torch.testing.assert_close(result, y, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)


# ---- weights that change ------------------------------------------------------------------------


def write(model):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.9)


def assign(model):
    state = {name: value * 0.9 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def replace_data(model):
    model.conv_out.weight.data = model.conv_out.weight.data * 0.5


def replace_a_layer(model):
    model.temb = tiny_unet(seed=1).temb


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: lambda x, t: m(x, t)], ids=["", "lambda"])
@pytest.mark.parametrize(
    ("change", "tapes"), [(write, 1), (assign, 2), (replace_data, 2), (replace_a_layer, 2)]
)
def test_weights_that_changed_are_those_of_the_next_run(change, tapes, wrap):
    """A graph reads memory: what is written there is seen, what is replaced leaves it to anyone."""
    model = tiny_unet()
    graph, eager, record = engines(wrap(model), model.diffusion)
    x, stream = start(shape=(1, 8, 8))
    before = graph.run(x, **stream)
    change(model)
    got = graph.run(x, **stream)
    torch.testing.assert_close(got, eager.run(x, **stream), atol=1e-5, rtol=0)
    assert not torch.allclose(got, before, atol=1e-3)
    assert torch.equal(graph.run(x, **stream), got)
    assert record.tapes == tapes


# ---- a recording that fails ----------------------------------------------------------------------


class Streams:
    """torch.cuda's streams and graphs as far as `record` knows them. As torch's own, the end of a
    recording that has failed raises in its turn, and leaves the recording's stream in place."""

    def __init__(self, monkeypatch):
        self.current, self.raised = "the host's", False
        for name in ("device", "Stream", "stream", "current_stream", "CUDAGraph", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    @staticmethod
    def device(device):
        return contextlib.nullcontext()

    def Stream(self):
        return Side()

    CUDAGraph = Stream

    def current_stream(self, device=None):
        return Side(self.current)

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream.name
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(self, graph):
        before, self.current = self.current, "the recording's"
        try:
            yield
        except Exception:
            raise RuntimeError("operation failed due to a previous error during capture") from None
        self.current = before


class Side:
    def __init__(self, name="another"):
        self.name = name

    def wait_stream(self, stream):
        pass

    def replay(self):
        pass


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("operation not permitted")],
    ids=lambda e: type(e).__name__,
)
def test_the_first_error_of_a_recording_is_the_one_that_is_told(monkeypatch, error):
    streams, calls = Streams(monkeypatch), []

    def step():
        calls.append(streams.current)
        if streams.current == "the recording's":
            raise error

    with pytest.raises(type(error), match=str(error)):
        cuda_graph.record(step, torch.device("cuda", 0))
    assert streams.current == "the host's"
    assert calls == ["another"] * cuda_graph.WARM_UP + ["the recording's"]
    replay = cuda_graph.record(lambda: None, torch.device("cuda", 0))
    assert replay() is None
    assert streams.current == "the host's"


# ---- when it is chosen ---------------------------------------------------------------------------


def test_auto_takes_it_for_a_unet_on_a_gpu():
    cuda, unet = torch.device("cuda"), tiny_unet()
    assert choose("auto", unet, cuda, "fp32") == (CudaGraph, "fp32")
    assert choose("auto", wave, cuda, "fp32") == (Eager, "fp32")
    assert choose("cuda_graph", wave, cuda, "fp32") == (CudaGraph, "fp32")
    assert choose("eager", unet, cuda, "fp32") == (Eager, "fp32")
    assert choose("auto", unet, CPU, "fp32")[0] is not CudaGraph


def test_a_cpu_has_none():
    with pytest.raises(ValueError, match="'cuda_graph' can't run here: CUDA graphs are for GPUs"):
        fastddpm.sample(tiny_unet(), 1, engine="cuda_graph", progress=False)
