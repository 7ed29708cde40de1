"""The engine cuda_graph without a GPU: what it records is replayed here from a tape of the
operations and their very tensors, as a CUDA graph does, with no Python of the step in between."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from toy import PREDICTIONS, SCHEDULE, Optimal, tiny_unet, wave

import fastddpm
from fastddpm import Diffusion, Schedule, ops
from fastddpm.engine import choose, cuda_graph
from fastddpm.engine.cuda_graph import CudaGraph
from fastddpm.engine.cuda_plan import CudaPlan
from fastddpm.engine.eager import Eager

CPU = torch.device("cpu")
SHAPE = (2, 4, 4)


class Tape(TorchDispatchMode):
    """Records operations with their tensors; a call repeats them, into the same tensors.

    What a capture forbids is an error: reading a value on the host."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, out))
        return out

    def __call__(self) -> None:
        for func, args, kwargs, out in self.operations:
            again = func(*args, **kwargs)
            if func._schema.is_mutable:
                continue
            for old, new in zip(_tensors(out), _tensors(again), strict=True):
                if old.untyped_storage()._cdata != new.untyped_storage()._cdata:  # not a view
                    old.copy_(new.view_as(old))  # which squeeze_ may have come after


def _tensors(out) -> list[torch.Tensor]:
    items = out if isinstance(out, (tuple, list)) else [out]
    return [x for x in items if isinstance(x, torch.Tensor)]


class Recorder:
    """`cuda_graph.record` by tapes; counts them and their replays."""

    def __init__(self):
        self.tapes, self.replays = 0, 0

    def __call__(self, step, rewind, device):
        for _ in range(cuda_graph.WARM_UP):
            rewind()
            step()
        rewind()  # a tape's recording takes the step, a graph's does not
        tape = Tape()
        with tape:
            step()
        self.tapes += 1

        def replay():
            self.replays += 1
            tape()

        return replay


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
    for seed in (6, 2**64 - 1):
        x, stream = start(seed=seed)
        assert torch.equal(graph.run(x, **stream), eager.run(x, **stream))
    assert record.tapes == 2


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
    def full(step, rewind, device):
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


class Mark:
    """An event of a device that is as slow as can be: what was queued before it is done when it is
    waited for, and not before."""

    queued = done = 0

    def __init__(self, device):
        self.at = Mark.queued

    def synchronize(self):
        Mark.done = max(Mark.done, self.at)


def test_who_counts_steps_is_not_far_ahead_of_the_device(monkeypatch):
    monkeypatch.setattr(cuda_graph, "mark", Mark)
    monkeypatch.setattr(Mark, "queued", 0)
    monkeypatch.setattr(Mark, "done", 0)
    graph, _, _ = engines(wave, Diffusion(Schedule.linear(100)))
    ahead = []

    def tick(i, x, x0):
        ahead.append(Mark.queued - Mark.done)

    plain = graph._record

    def record(*arguments):
        replay = plain(*arguments)

        def counted():
            Mark.queued += 1
            replay()

        return counted

    graph._record = record
    x, stream = start()
    graph.run(x, **stream, on_step=tick)
    assert len(ahead) == 100
    assert cuda_graph.AHEAD <= max(ahead) <= 2 * cuda_graph.AHEAD
    ahead.clear()
    waited = Mark.done
    graph.run(x, **stream)
    assert Mark.done == waited  # nobody counts


# ---- when it is chosen ---------------------------------------------------------------------------


def test_auto_takes_it_for_a_unet_on_a_gpu():
    cuda, unet = torch.device("cuda"), tiny_unet()
    assert choose("auto", unet, cuda, "fp32") == (CudaPlan, "fp32")
    assert choose("cuda_plan", unet, cuda, "fp32") == (CudaPlan, "fp32")
    assert choose("cuda_graph", unet, cuda, "fp32") == (CudaGraph, "fp32")
    assert choose("auto", wave, cuda, "fp32") == (Eager, "fp32")
    assert choose("cuda_graph", wave, cuda, "fp32") == (CudaGraph, "fp32")
    assert choose("eager", unet, cuda, "fp32") == (Eager, "fp32")
    assert choose("auto", unet, CPU, "fp32")[0] is not CudaGraph


def test_a_cpu_has_none():
    with pytest.raises(ValueError, match="'cuda_graph' can't run here: CUDA graphs are for GPUs"):
        fastddpm.sample(tiny_unet(), 1, engine="cuda_graph", progress=False)
