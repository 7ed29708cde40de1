"""Terms of the bound on engines that record, without a GPU: replayed from a tape as in
test_cuda_graph.py."""

from __future__ import annotations

import pytest
import torch
from test_cuda_graph import Recorder
from toy import PREDICTIONS, SCHEDULE, images, tiny_unet, wave

import fastddpm
from fastddpm import Diffusion
from fastddpm.engine.cuda_graph import CudaGraph
from fastddpm.engine.cuda_plan import CudaPlan
from fastddpm.engine.eager import Eager
from fastddpm.engine.terms import Terms

CPU = torch.device("cpu")
X0 = images(5, 1, 8, 8)


def both(model, diffusion, engine=CudaGraph, *, seed=3, **options):
    """(the terms of a recording engine, those of eager, the recorder)."""
    record = Recorder()
    made = engine(model, diffusion, device=CPU, precision="fp32", record=record, **options)
    eager = Eager(model, diffusion, device=CPU, precision="fp32", **options)
    return Terms(made, seed), Terms(eager, seed), record


def assert_same(recorded, eager, x0, first=0, steps=None, kwargs=None, **close):
    index = torch.arange(first, first + len(x0))
    steps = range(eager.engine.diffusion.T) if steps is None else steps
    got, expected = (terms(x0, index, steps, kwargs or {}) for terms in (recorded, eager))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **{"rtol": 1e-5, "atol": 1e-5, **close})


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_recording_finds_the_terms_of_eager(prediction, clip):
    process = Diffusion(SCHEDULE, prediction)
    recorded, eager, record = both(wave, process, clip=clip)
    x0 = images(3, 2, 3, 4)
    assert_same(recorded, eager, x0, rtol=0, atol=0)
    assert (record.tapes, record.replays) == (1, SCHEDULE.T)
    assert_same(recorded, eager, x0.flip(0), first=9, rtol=0, atol=0)
    assert record.tapes == 1
    recorded, eager, _ = both(wave, process.respace(4), clip=clip)
    assert_same(recorded, eager, x0)


@pytest.mark.parametrize("variance", ["fixed_small", "learned", "learned_range"])
@pytest.mark.parametrize("engine", [CudaGraph, CudaPlan])
def test_a_unets_smaller_batches_take_the_recording_that_there_is(engine, variance):
    loss = "vlb" if variance.startswith("learned") else "simple"
    model = tiny_unet(diffusion=Diffusion(SCHEDULE, variance=variance, loss=loss))
    recorded, eager, record = both(model, model.diffusion, engine)
    assert_same(recorded, eager, X0)
    assert_same(recorded, eager, X0[3:], first=3)
    assert record.tapes == 1
    assert_same(recorded, eager, torch.cat((X0, X0)))
    assert record.tapes == 2


def test_each_image_may_have_a_step_of_its_own():
    model = tiny_unet()
    recorded, eager, _ = both(model, model.diffusion)
    steps = [0, torch.tensor([3, 0, 11, 7, 2]), 5]
    assert_same(recorded, eager, X0, steps=steps)
    index = torch.arange(5)
    mixed = recorded(X0, index, steps, {})[0]
    alone = recorded(X0, index, [3, 0, 11, 7, 2], {})[0]
    torch.testing.assert_close(mixed[:, 1], alone.diagonal(), rtol=1e-5, atol=1e-6)
    # And on the plan of a CPU.
    plan = fastddpm.bits_per_dim(model, X0, terms=5, engine="cpu_plan", progress=False)
    slow = fastddpm.bits_per_dim(model, X0, terms=5, engine="eager", progress=False)
    torch.testing.assert_close(plan.total, slow.total, rtol=1e-4, atol=1e-4)


def test_classes_go_with_their_images():
    model = tiny_unet(num_classes=4)
    y = torch.tensor([0, 3, 1, 2, 2])
    for engine in (CudaGraph, CudaPlan):
        recorded, eager, _ = both(model, model.diffusion, engine)
        assert_same(recorded, eager, X0, kwargs={"y": y})
        assert_same(recorded, eager, X0[1:3], kwargs={"y": y[1:3]})


def test_what_can_not_be_recorded_runs_in_eager(monkeypatch):
    monkeypatch.delenv("FASTDDPM_STRICT", raising=False)

    def looks(x, t):
        return wave(x, t) if t[0].item() >= 0 else x

    recorded, eager, record = both(looks, Diffusion(SCHEDULE))
    x0 = images(3, 2, 3, 4)
    with pytest.warns(RuntimeWarning, match="'eager', not 'cuda_graph': operation not") as told:
        assert_same(recorded, eager, x0, rtol=0, atol=0)
    assert len(told) == 1
    assert_same(recorded, eager, x0[:2], rtol=0, atol=0)
    assert record.replays == 0


def test_out_of_memory_is_for_the_caller_who_splits_the_batch():
    def full(step, rewind, device):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    engine = CudaGraph(wave, Diffusion(SCHEDULE), device=CPU, precision="fp32", record=full)
    with pytest.raises(torch.OutOfMemoryError):
        Terms(engine, 0)(images(3, 2, 3, 4), torch.arange(3), [0], {})
