"""A Trainer's step by ops.adam against the same trainer's by torch's own, which hooks, and options
that ops.adam does not have, ask for."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from test_training import Small, batches, trainer
from toy import tiny_unet

from fastddpm import ops
from fastddpm.ops import plain_sweep
from fastddpm.training import adam_step

OPTIONS = {"ema_decay": 0.7, "grad_clip": 0.3}


def watched(*arguments, **options):
    """A trainer whose optimiser has a hook, and takes its own step."""
    run = trainer(*arguments, **{**OPTIONS, **options})
    run.optimizer.register_step_post_hook(lambda *_: None)
    return run


def kept(run) -> dict[str, torch.Tensor]:
    tensors = {f"model.{k}": v for k, v in run.network.state_dict().items()}
    for name, master in run.weights.masters.items():
        tensors |= {f"master.{name}": master, f"ema.{name}": run.weights.average[name]}
        tensors |= {f"{key}.{name}": v for key, v in run.optimizer.state[master].items()}
    return {name: x.detach().clone() for name, x in tensors.items()}


def assert_close(a, b, rtol=1e-5, but=None):
    a, b = kept(a), kept(b)
    assert a.keys() == b.keys()
    for name, x in a.items():
        if but is not None and but in name:
            continue
        if x.dtype in (torch.bfloat16, torch.float16):
            rtol = max(rtol, 2 * torch.finfo(x.dtype).eps)
        size = b[name].abs().max().item()
        torch.testing.assert_close(x, b[name], rtol=0, atol=rtol * size + 1e-9, msg=name)


def both(runs, data, change=lambda run, k: None):
    """The steps of both: how many of the first's were ops.adam's, or its in one native call."""
    calls = []
    for run in runs:
        taken = []

        def at_once(*lists, taken=taken, adam=plain_sweep.adam, **options):
            taken.append(adam(*lists, **options))
            return taken[-1]

        with (
            mock.patch.object(ops, "adam", wraps=ops.adam) as adam,
            mock.patch.object(plain_sweep, "adam", at_once),
        ):
            for k, x0 in enumerate(data):
                change(run, k)
                run.step(x0)
        calls.append(adam.call_count + sum(taken))
    assert calls[1] == 0
    return calls[0]


def test_a_sweep_is_torchs_step():
    """Weights, moments and averages."""
    runs = [make(Small()) for make in (lambda m: trainer(m, **OPTIONS), watched)]
    assert both(runs, batches(6)) == 6
    assert_close(*runs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_unets_sweep_is_torchs_step(dtype):
    """The rounded copies of half-precision weights, too."""
    runs = [make(tiny_unet().to(dtype)) for make in (lambda m: trainer(m, **OPTIONS), watched)]
    assert both(runs, batches(2, size=2, shape=(1, 8, 8))) == 2
    # But keys' biases, whose gradients are rounding: softmax does not see them. Half precision
    # that a last place sends the other way leads to other gradients.
    assert_close(*runs, rtol=1e-4 if dtype == torch.float32 else 0.05, but="qkv.bias")
    for run in runs:
        for name, p in run.weights.rounded.items():
            assert torch.equal(p, run.weights.masters[name].to(dtype))
        run.weights.check()


@pytest.mark.parametrize(
    "option",
    [{"weight_decay": 0.1}, {"amsgrad": True}, {"maximize": True},
     {"decoupled_weight_decay": True, "weight_decay": 0.1}],
    ids=str,
)  # fmt: skip
def test_options_that_only_torch_has_are_torchs(option):
    """Set from the start, they are not left out."""
    runs = [make(Small()) for make in (lambda m: trainer(m, **OPTIONS), watched)]
    plain = trainer(Small(), **OPTIONS)
    for run in runs:
        run.optimizer.param_groups[0].update(option)
    data = batches(3)
    assert both(runs, data) == 0
    for x0 in data:
        plain.step(x0)
    a, b = kept(runs[0]), kept(runs[1])
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["model.one.weight"], kept(plain)["model.one.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_steps_that_know_of_no_scale(dtype):
    """Torch's other Adams get clipped gradients of the loss, in steps that aren't refused."""
    data = batches(5, size=2, shape=(1, 8, 8))
    runs = [trainer(tiny_unet().to(dtype), **OPTIONS, read_every=100) for _ in range(2)]
    for run in runs:
        run.step(data[0])
    runs[0].optimizer.param_groups[0].update(fused=False)
    assert not adam_step.is_plain(runs[0].optimizer)
    for run in runs:
        for x0 in data[1:3]:
            run.step(x0)
        with run.guard.refusing():
            run.step(data[3])
        run.step(data[4])
    rtol = 1e-4 if dtype == torch.float32 else 0.05
    assert_close(*runs, rtol=rtol, but="qkv.bias")


def test_another_optimisers_gradients_are_clipped_and_not_of_the_scaled_loss():
    moved = []
    for dtype in (torch.float32, torch.float16):
        run = trainer(tiny_unet().to(dtype), **OPTIONS)
        masters = list(run.weights.masters.values())
        before = [m.detach().clone() for m in masters]
        run.optimizer = torch.optim.SGD(masters, lr=1.0)
        run.step(batches(1, size=2, shape=(1, 8, 8))[0])
        rate = run.optimizer.param_groups[0]["lr"]
        steps = [(b - m.detach()).flatten() for b, m in zip(before, masters, strict=True)]
        moved.append(torch.cat(steps).norm() / rate)
    torch.testing.assert_close(moved[0], moved[1], rtol=0.02, atol=0)
    assert moved[0] <= OPTIONS["grad_clip"] * 1.001


def test_betas_that_are_set_are_taken():
    runs = [make(Small()) for make in (lambda m: trainer(m, **OPTIONS), watched)]
    for run in runs:
        run.optimizer.param_groups[0].update(betas=(0.3, 0.6), eps=1e-3)
    assert both(runs, batches(4)) == 4
    assert_close(*runs)


def test_groups_of_their_own_options():
    runs = [make(Small()) for make in (lambda m: trainer(m, **OPTIONS), watched)]
    for run in runs:
        (group,) = run.optimizer.param_groups
        moved = [group["params"].pop() for _ in range(2)]
        run.optimizer.add_param_group({"params": moved, "betas": (0.5, 0.9)})
    assert both(runs, batches(4)) == 8
    assert_close(*runs)


def test_what_is_frozen_or_left_out_still_has_an_average():
    """A weight that gets no gradient stays, and its average moves towards it, once a step."""
    runs = [make(Small()) for make in (lambda m: trainer(m, **OPTIONS), watched)]

    def change(run, k):
        run.network.one.weight.requires_grad_(k % 2 == 0)
        if k == 3:
            with torch.no_grad():
                run.network.one.bias.add_(1)
                run.network.two.weight.requires_grad_(False).add_(1)

    assert both(runs, batches(6), change) == 6
    assert_close(*runs)
    steps = {name: runs[0].optimizer.state[p]["step"].item()
             for name, p in runs[0].network.named_parameters()}  # fmt: skip
    assert steps == {"one.weight": 3, "one.bias": 6, "two.weight": 3, "two.bias": 6}


def test_a_parameter_that_is_not_dense():
    """A view of columns is the reference's, in a call of its own, and takes the same steps."""
    model = Small()
    wide = torch.full((6, 1, 3, 5), 7.0)
    wide[..., 1:4] = model.one.weight.detach()
    model.one.weight = torch.nn.Parameter(wide[..., 1:4])
    run, plain = (trainer(m, **OPTIONS) for m in (model, Small()))
    for x0 in batches(3):
        run.step(x0)
        plain.step(x0)
    assert_close(run, plain)
    assert wide[..., ::4].eq(7).all()


def test_weights_whose_layout_changes():
    """Moments and averages follow them, and the numbers stay."""
    runs = [make(Small()) for make in (lambda m: trainer(m, **OPTIONS), watched)]
    data = batches(5)
    assert both(runs, data[:2]) == 2
    for run in runs:
        run.network.to(memory_format=torch.channels_last)
    assert both(runs, data[2:]) == 3
    assert_close(*runs)
    for run in runs:
        state = run.optimizer.state[run.network.two.weight]
        assert state["exp_avg"].is_contiguous(memory_format=torch.channels_last)


def test_a_state_of_any_layout_is_loaded_in_that_of_the_weight(tmp_path):
    """A transposed weight's, too: dense, but in no order that has a name."""

    def make():
        model = Small()
        order = model.one.weight.detach().permute(3, 0, 2, 1).contiguous()
        model.one.weight = torch.nn.Parameter(order.permute(1, 3, 2, 0))
        return trainer(model, **OPTIONS)

    straight, first, second = make(), make(), make()
    data = batches(4)
    for x0 in data[:2]:
        first.step(x0)
    first.save(tmp_path)
    second.load(tmp_path)
    for name, master in second.weights.masters.items():
        for x in (second.optimizer.state[master]["exp_avg"], second.weights.average[name]):
            assert x.stride() == master.stride()
    for x0 in data:
        straight.step(x0)
    for x0 in data[2:]:
        second.step(x0)
    a, b = kept(second), kept(straight)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_refused_step_leaves_all_as_it_is():
    run = trainer(Small(), **OPTIONS, read_every=100)
    data = batches(2)
    run.step(data[0])
    before = kept(run)
    with run.guard.refusing():
        run.step(data[1])
    assert all(torch.equal(x, before[name]) for name, x in kept(run).items())
