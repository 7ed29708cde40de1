"""Models inside wrappers: the process, the engines, the trainer and its files are the network's."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import AveragedModel
from toy import SCHEDULE, images, tiny_unet

import fastddpm
from fastddpm import Diffusion, Schedule, UNet, bits_per_dim
from fastddpm.checkpoint import read_tensors
from fastddpm.training.run import STATE, Trainer
from fastddpm.wrapped import unwrap

PROCESS = Diffusion(Schedule.cosine(12), "x0")  # neither of it is the paper's


class Foreign(nn.Module):
    """As other projects wrap a model: everything is passed on."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *inputs, **options):
        return self.module(*inputs, **options)


class Twice(Foreign):
    """A wrapper with an output of its own."""

    def forward(self, x, t):
        return 2 * self.module(x, t)


class Adapted(Foreign):
    """A wrapper with parameters of its own."""

    def __init__(self, module):
        super().__init__(module)
        self.gain = nn.Parameter(torch.ones(()))


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def distributed(model):
    return nn.parallel.DistributedDataParallel(model)


WRAPPERS = {
    "DistributedDataParallel": distributed,
    "DataParallel": nn.DataParallel,
    "torch.compile": compiled,
    "model.compile": compiled_in_place,
    "foreign": Foreign,
    "nested": lambda model: compiled(nn.DataParallel(Foreign(model))),
    "nested the other way": lambda model: distributed(compiled(model)),
}


@pytest.fixture(params=WRAPPERS)
def wrap(request, tmp_path):
    if "istributed" not in request.param and "other way" not in request.param:
        yield WRAPPERS[request.param]
        return
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        yield WRAPPERS[request.param]
    finally:
        dist.destroy_process_group()


def test_a_wrapped_unet_is_sampled_trained_saved_and_resumed_as_itself(wrap, tmp_path):
    plain, wrapped = tiny_unet(diffusion=PROCESS), wrap(tiny_unet(diffusion=PROCESS))
    assert isinstance(unwrap(wrapped), UNet)
    assert torch.equal(
        fastddpm.sample(wrapped, 2, progress=False), fastddpm.sample(plain, 2, progress=False)
    )
    options = {"precision": "fp32", "lr": 1e-2, "warmup": 2, "ema_decay": 0.9}
    runs = [Trainer(model, **options) for model in (plain, wrapped)]
    batch = images(2, 1, 8, 8)
    for run in runs:
        run.step(batch)
        run.save(tmp_path / str(run is runs[1]))
    # Compiled, the sums may be taken in another order.
    (own, _), (others, _) = (read_tensors(tmp_path / k / STATE) for k in ("False", "True"))
    assert own.keys() == others.keys()
    for name in own:
        torch.testing.assert_close(others[name], own[name], atol=1e-4, rtol=1e-3, msg=name)
    # What one has saved, the other goes on with, and anyone samples from.
    other = Trainer(tiny_unet(diffusion=PROCESS, seed=1), **options)
    other.load(tmp_path / "True")
    runs[1].load(tmp_path / "False")
    assert UNet.from_pretrained(tmp_path / "True").diffusion.prediction == "x0"
    averaged = runs[1].ema_model()
    assert type(averaged) is UNet
    for value, p in zip(runs[0].ema_weights().values(), averaged.parameters(), strict=True):
        assert torch.equal(p, value)


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, compiled])
def test_the_process_that_a_trainer_is_given_is_the_models_from_then_on(tmp_path, wrap):
    """Its files said the process that the model was made with, and were sampled by that."""
    model = tiny_unet()
    run = Trainer(wrap(model), diffusion=PROCESS, precision="fp32", warmup=0)
    run.step(images(2, 1, 8, 8))
    run.save(tmp_path)
    for trained in (model, run.ema_model(), UNet.from_pretrained(tmp_path)):
        assert trained.diffusion.to_config() == PROCESS.to_config()
    learned = Diffusion(SCHEDULE, variance="learned", loss="vlb")
    for options, message in (({"lr": 0}, "lr must"), ({"diffusion": learned}, "it needs 2")):
        with pytest.raises(ValueError, match=message):
            Trainer(wrap(other := tiny_unet()), **{"diffusion": PROCESS, **options})
        assert other.diffusion.schedule is SCHEDULE, "one that was not made changes nothing"
    model.diffusion = other.diffusion
    for use in (lambda: run.step(images(2, 1, 8, 8)), lambda: run.save(tmp_path), run.ema_model):
        with pytest.raises(ValueError, match="diffusion is not the one that it had when"):
            use()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: m.forward,
        lambda m: m.__call__,
        functools.partial,
        AveragedModel,
        lambda m: functools.partial(Foreign(m).forward),
    ],
)
def test_other_ways_to_pass_a_unet_on(wrap):
    model = tiny_unet(diffusion=PROCESS)
    expected = fastddpm.sample(model, 2, progress=False)
    assert torch.equal(fastddpm.sample(wrap(model), 2, progress=False), expected)


def test_what_may_change_the_output_is_not_unwrapped():
    model = tiny_unet(diffusion=PROCESS)
    holder = type("Holder", (), {"__call__": lambda self, x, t: self.net(x, t)})()
    holder.net = model
    for wrapped in (
        Twice(model),
        Adapted(model),
        Foreign(Twice(model)),
        lambda x, t: model(x, t),
        functools.partial(lambda net, x, t: net(x, t), model),
        holder,
        nn.Sequential(model),
    ):
        with pytest.raises(ValueError, match=r"has a process of its own, .*pass diffusion="):
            fastddpm.sample(wrapped, 1, shape=(1, 8, 8), progress=False)
    with pytest.raises(ValueError, match="has a process of its own"):
        Trainer(Twice(model))
    with pytest.raises(ValueError, match="has a process of its own"):
        bits_per_dim(Twice(model), images(1, 1, 8, 8), progress=False)
    # With a process it runs, and what it makes of the output counts.
    options = {"shape": (1, 8, 8), "diffusion": PROCESS, "progress": False, "clip": False}
    twice = fastddpm.sample(Twice(model), 1, **options)
    assert not torch.allclose(twice, fastddpm.sample(model, 1, **options))
    assert torch.allclose(twice, fastddpm.sample(lambda x, t: 2 * model(x, t), 1, **options))
    # Of the paper's own process there is nothing to lose.
    paper = tiny_unet(diffusion=Diffusion())
    assert Diffusion.of(lambda x, t: paper(x, t)).prediction == "eps"


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_traced_model_has_lost_its_process():
    model = tiny_unet(diffusion=PROCESS)
    inputs = torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64)
    traced = torch.jit.trace(model, inputs, check_trace=False)
    with pytest.raises(ValueError, match=r"does not hold the process .*pass diffusion="):
        Diffusion.of(traced)
    assert Diffusion.of(traced, PROCESS) is PROCESS


def test_bits_per_dim_and_folders_of_a_wrapped_unet(tmp_path):
    model, x = tiny_unet(diffusion=PROCESS), images(2, 1, 8, 8)
    got, expected = (bits_per_dim(m, x, progress=False) for m in (nn.DataParallel(model), model))
    assert torch.equal(got.total, expected.total)
    options = {"shard_size": 0, "progress": False}
    fastddpm.sample_to_folder(nn.DataParallel(model), tmp_path, 1, **options)
    assert fastddpm.sample_to_folder(model, tmp_path, 2, **options) == 1  # the same set


@pytest.mark.filterwarnings("ignore:.*samples with the engine 'eager'")
def test_a_unet_with_a_forward_of_its_own_is_not_run_as_a_plan():
    model = tiny_unet(diffusion=Diffusion(SCHEDULE))
    forward = model.forward
    model.forward = lambda x, t: 0.5 * forward(x, t)
    got, expected = (
        fastddpm.sample(model, 1, engine=engine, precision="fp32", progress=False)
        for engine in ("auto", "eager")
    )
    assert torch.equal(got, expected)
    with pytest.raises(ValueError, match="has a forward that is not its class's"):
        fastddpm.sample(model, 1, engine="cpu_plan", progress=False)


def test_sharded_parameters_are_refused():
    class FullyShardedDataParallel(Foreign):  # torch's goes by its name
        pass

    with pytest.raises(ValueError, match="sharded parameters"):
        Trainer(FullyShardedDataParallel(tiny_unet()), diffusion=PROCESS)
