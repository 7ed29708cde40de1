"""A training step as a GPU gets it: nothing that the host waits for, what is not finite skipped on
the device, and the whole of it recorded and replayed. A CPU stands in for the device: its values
are read where a GPU's would be, every so many steps, and what is recorded is a tape."""

from __future__ import annotations

import collections
import sys
import types
import warnings

import pytest
import torch
from test_cuda_graph import Recorder
from test_training import Small, assert_same, batches, state, trainer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from toy import tiny_unet

from fastddpm import host
from fastddpm.ops import library
from fastddpm.training import Trainer, upload
from fastddpm.training import graph as training_graph
from fastddpm.training import step as training_step
from fastddpm.training.guard import Guard
from fastddpm.unet import walk as unet_walk
from fastddpm.unet.parts import AttentionBlock

SHAPE = (1, 8, 8)
READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")


class Passing(torch.nn.Module):
    """Around a network, which then computes under plain autocast."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *arguments):
        return self.module(*arguments)


class Operations(TorchDispatchMode):
    """Counts the operations by name; reading a value on the host is an error."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        assert name != "_local_scalar_dense"
        self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Operations whose values the host does not read: it would wait for them."""

    def reads(*_):
        raise AssertionError("a value was read on the host")

    def operations():
        monkeypatch.setattr(library, "values_in", lambda *_: None)  # as on a GPU
        for name in READS:
            monkeypatch.setattr(torch.Tensor, name, reads)
        return Operations()

    yield operations
    monkeypatch.undo()


@pytest.fixture
def as_elsewhere(monkeypatch):
    """A CPU's own walk is not taken: a UNet computes by its modules, or for dropout as on a GPU."""
    monkeypatch.delitem(unet_walk.WAYS, "cpu")


# ---- no waiting ----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("floats", [False, True])
def test_a_step_reads_nothing_of_the_device(as_on_a_gpu, precision, dropout, floats):
    run = trainer(tiny_unet(dropout=dropout), precision=precision, read_every=100)
    data = batches(4, size=2, shape=SHAPE)
    if floats:
        data = [x / 127.5 - 1 for x in data]
    run.step(data[0])  # the first looks at the floats' range
    with as_on_a_gpu() as operations:
        losses = [run.step(x0) for x0 in data[1:]]
    assert operations.counts["choices"] == 3
    assert operations.counts["random_"] == operations.counts["bernoulli_"] == 0
    assert operations.counts["adam"] == operations.counts["grad_norm"] == 3
    assert all(loss.shape == () for loss in losses)


@pytest.mark.parametrize("model", [Small, lambda: tiny_unet().bfloat16(), lambda: Passing(Small())])
def test_nor_does_one_of_another_network(as_on_a_gpu, model):
    run = trainer(model(), read_every=100)
    first, second = batches(2, size=2, shape=SHAPE)
    run.step(first)
    with as_on_a_gpu():
        run.step(second)


def kernels(run, x0, monkeypatch) -> collections.Counter:
    """The operations of a step that are more than another view of memory."""
    run.step(x0)
    with monkeypatch.context() as patch, Operations() as operations:
        patch.setattr(library, "values_in", lambda *_: None)
        run.step(x0)
    views = (
        *("detach", "t", "view", "unsqueeze", "squeeze", "split", "slice", "permute", "select"),
        *(
            "transpose",
            "unbind",
            "expand",
            "as_strided",
            "alias",
            "_unsafe_view",
            "split_with_sizes",
        ),
        *("empty_like", "new_empty", "new_empty_strided", "empty"),
    )
    return collections.Counter({k: v for k, v in operations.counts.items() if k not in views})


def test_how_many_operations_a_step_is(monkeypatch, as_elsewhere):
    """Before there was an op for t and flips and one copy of all weights, 268 operations drew t and
    flips, and autocast cast each weight and each gradient by itself."""
    options = {"precision": "bf16", "read_every": 10}
    x0 = batches(1, size=2, shape=SHAPE)[0]
    cast = kernels(trainer(Passing(tiny_unet()), **options), x0, monkeypatch)
    own = kernels(trainer(tiny_unet(), **options), x0, monkeypatch)
    parameters = len(list(tiny_unet().parameters()))
    weights = sum(p.dim() > 1 for p in tiny_unet().parameters())
    assert cast["_to_copy"] - own["_to_copy"] >= 2 * weights
    assert cast["choices"] == own["choices"] == 1
    assert own["bitwise_and"] == own["__rshift__"] == own["bitwise_xor"] == 0
    few = ("_foreach_copy_", "grad_norm", "adam", "_fused_adam_", "_fused_sgd_")
    assert {name: own[name] for name in few} == dict(zip(few, (2, 1, 1, 0, 0), strict=True))
    outside = (
        "convolution",
        "convolution_backward",
        "mm",
        "addmm",
        "add",
        "sum",
        "mul",
        "_to_copy",
    )
    rest = sum(v for name, v in own.items() if name not in outside)
    assert rest < parameters, own  # nothing is done parameter by parameter


def test_a_cpus_step_is_the_convolutions_of_the_network(monkeypatch):
    """x_t and eps are one pass over the bytes, the loss one and its gradient another."""
    model = tiny_unet(in_channels=3, dropout=0.3)
    own = kernels(
        trainer(model, read_every=10), batches(1, size=2, shape=(3, 8, 8))[0], monkeypatch
    )
    ours = [m for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    attentions = [m for m in model.modules() if isinstance(m, AttentionBlock)]
    for name, count in {
        "convolution": len(ours) - 2 * len(attentions),
        "attention_block": len(attentions),
        "squared_error": 1,
    }.items():
        assert own[name] == own[f"{name}_backward"] == count, name
    assert (own["drawn_noise"], own["choices"], own["clone"]) == (1, 1, 1)  # the bytes' layout
    torchs = ("cat", "silu", "mm", "addmm", "group_norm_silu", "residual_sum", "sub", "pow", "flip")
    assert not [name for name in torchs if own[name] > 2], own


# ---- what is not finite --------------------------------------------------------------------------


class Sick(Small):
    """Its output is what `factor` makes of it."""

    factor = 1.0

    def forward(self, x, t):
        return self.factor * super().forward(x, t)


def passed_over(run, n: int = 8) -> None:
    """A step whose examples are used up, and which changes nothing else."""
    run.step_count, run.example_count = run.step_count + 1, run.example_count + n


TOLD = pytest.mark.filterwarnings("ignore:.* of the steps .* changed nothing")


@TOLD
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [{0}, {2}, {4}, {0, 1, 3, 4}])
@pytest.mark.parametrize("read_every", [1, 3, 50])
def test_a_step_that_is_not_finite_is_skipped_and_counted(bad, at, read_every):
    run, healthy = trainer(Sick(), read_every=read_every), trainer()
    for k, x0 in enumerate(batches(7)):
        run.model.factor = bad if k in at else 1.0
        loss = run.step(x0)
        assert loss.isfinite() == (k not in at)
        passed_over(healthy) if k in at else healthy.step(x0)
        assert all(torch.equal(v, raw(healthy)[name]) for name, v in raw(run).items()), k
        if read_every == 1:
            assert run.skipped == len(at & set(range(k + 1)))
    assert_same(state(run), state(healthy))
    assert (run.step_count, run.example_count, run.skipped) == (7, 56, len(at))


@TOLD
@pytest.mark.parametrize("read_every", [1, 4, 50])
def test_ten_in_a_row_stop_the_run(read_every):
    run, healthy = trainer(Sick(), read_every=read_every), trainer()
    bad, message = {1, *range(3, 13)}, None
    for k, x0 in enumerate(batches(16)):
        run.model.factor = float("nan") if k in bad else 1.0
        try:
            run.step(x0)
        except FloatingPointError as error:
            message = str(error)
            break
    if read_every == 50:
        with pytest.raises(FloatingPointError) as caught:
            run.check_finite()
        message = str(caught.value)
    assert message.startswith("step 12: loss nan, gradient norm nan: it is the 10th step in a row")
    left = "; steps 13 .. 15 were left out, too" if read_every > 1 else ""
    assert message.endswith(f"before step 3{left}")
    for k, x0 in enumerate(batches(13)):
        passed_over(healthy) if k in bad else healthy.step(x0)
    assert_same(state(run), state(healthy))
    assert (run.step_count, run.skipped) == (13, 11)
    run.model.factor = 1.0
    for x0 in batches(2):  # who goes on all the same may
        run.step(x0)
        healthy.step(x0)
    assert_same(state(run), state(healthy))


@TOLD
@pytest.mark.parametrize("read_every", [1, 7])
def test_nine_in_a_row_do_not(read_every):
    run = trainer(Sick(), read_every=read_every)
    for k, x0 in enumerate(batches(30, size=1)):
        run.model.factor = 1.0 if k % 10 == 9 else float("inf")
        run.step(x0)
    run.check_finite()
    assert (run.skipped, run.skipped_in_a_row, run.step_count) == (27, 0, 30)


@TOLD
def test_a_resumed_run_stops_at_the_tenth_too(tmp_path):
    run = trainer(Sick())
    data = batches(12, size=1)
    run.step(data[0])
    run.model.factor = float("nan")
    for x0 in data[1:8]:
        run.step(x0)
    run.save(tmp_path)
    again = trainer(Sick())
    again.load(tmp_path)
    assert (again.skipped, again.skipped_in_a_row) == (7, 7)
    assert_same(state(again), state(run))
    for each in (run, again):
        each.model.factor = float("nan")
        each.step(data[8])
        each.step(data[9])
        with pytest.raises(FloatingPointError, match="step 10: loss nan"):
            each.step(data[10])
        assert each.skipped == 10


def test_the_first_that_is_skipped_is_told_of():
    run = trainer(Sick())
    first, second, third = batches(3)
    run.step(first)
    run.model.factor = float("nan")
    with pytest.warns(UserWarning, match=r"1 of the steps 1 .. 1 had .* not finite.* 10 in a row"):
        run.step(second)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.step(third)
    assert run.skipped == 2


def raw(run) -> dict[str, torch.Tensor]:
    """Weights and averages as they are, without a look at the guard."""
    masters = {f"m.{k}": v.detach() for k, v in run.weights.masters.items()}
    return masters | {f"a.{k}": v for k, v in run.weights.average.items()}


@TOLD
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_skips_as_well(dtype):
    run = trainer(tiny_unet().to(dtype), read_every=2)
    first, second = batches(2, size=2, shape=SHAPE)
    run.step(first)
    run.check_finite()
    before, weights = raw(run), [p.detach().clone() for p in run.model.parameters()]
    before = {k: v.clone() for k, v in before.items()}
    handle = run.model.conv_out.register_forward_hook(lambda *a: a[2] * float("nan"))
    run.step(second)
    handle.remove()
    run.check_finite()
    assert run.skipped == 1
    assert_same(raw(run), before)
    assert all(torch.equal(p, w) for p, w in zip(run.model.parameters(), weights, strict=True))


@pytest.mark.parametrize("use", ["save", "ema_model", "ema_weights", "check_finite"])
def test_whoever_asks_for_the_state_hears_of_what_stopped_the_run(tmp_path, use):
    run = trainer(Sick(), read_every=50)
    first, second = batches(2)
    run.step(first)
    run.model.factor = float("nan")
    for _ in range(11):
        run.step(second)
    with pytest.raises(FloatingPointError, match="step 10: loss nan"):
        getattr(run, use)(*([tmp_path / "run"] if use == "save" else []))
    assert not (tmp_path / "run").exists()
    getattr(run, use)(*([tmp_path / "run"] if use == "save" else []))


def test_a_loaded_state_leaves_no_trace_of_what_was_not_finite(tmp_path):
    run, healthy = trainer(Sick(), read_every=50), trainer()
    first, second = batches(2)
    run.step(first)
    run.save(tmp_path)
    run.model.factor = float("nan")
    run.step(second)
    run.model.factor = 1.0
    run.load(tmp_path)
    for x0 in (first, second):
        healthy.step(x0)
    run.step(second)
    assert_same(state(run), state(healthy))


@pytest.mark.parametrize("wrong", [200.0, -1.1, float("nan"), float("inf")])
def test_floats_out_of_range_are_left_out_and_named_later(wrong):
    run, healthy = trainer(read_every=3), trainer(read_every=3)
    data = [x / 127.5 - 1 for x in batches(5)]
    for x0 in data[:2]:
        run.step(x0)
        healthy.step(x0)
    run.check_finite()
    run.step(torch.full_like(data[2], wrong))
    run.step(data[3])
    with pytest.raises(ValueError, match=r"\[-1, 1\]; got .*step 2"):  # NaN is a loss's, too
        run.step(data[4])
    assert_same(state(run), state(healthy))


def test_a_guard_looks_at_all_four_values():
    unit = torch.tensor([-1.0, 1.0]).reshape(1, 1, 1, 2)
    for loss, norm, images, good in (
        (1.0, 1.0, unit, True),
        (0.0, 3e38, unit, True),
        (1.0, 1.0, unit * 1.0009, True),
        (1.0, 1.0, unit * 1.01, False),
        (1.0, 1.0, unit.abs() * 1.01, False),
        (float("nan"), 1.0, unit, False),
        (1.0, float("inf"), unit, False),
        (-float("inf"), 1.0, unit, False),
        (1.0, 1.0, (unit * 300).to(torch.uint8), True),
    ):
        guard = Guard(torch.device("cpu"))
        pixels, unlike = guard.range_of(images), torch.zeros(1)
        guard.look(torch.tensor(loss), torch.tensor(norm), pixels, unlike)
        assert (guard.refused.item() == 0) == good, (loss, norm, images)
        seen = guard.read()
        stops = not (pixels.abs() < 1.001).all()
        assert (seen.stop is not None) == stops
        assert seen.skipped == seen.in_a_row == int(not good and not stops)
        assert guard.read() == (0, seen.in_a_row, None)
    guard.look(torch.tensor(1.0), torch.tensor(1.0), pixels, torch.ones(1))
    assert guard.read().stop.unlike == 1


def test_a_state_of_steps_that_were_taken_in_another_way_says_so(tmp_path, monkeypatch):
    module, first = sys.modules[Trainer.__module__], trainer()
    first.step(batches(1)[0])
    with monkeypatch.context() as patch:
        patch.setattr(module, "WAY", 1)
        first.save(tmp_path)
    run = trainer()
    with pytest.warns(UserWarning, match="not bit for bit .*way of taking steps was 1 and is"):
        run.load(tmp_path)
    assert_same(state(run), state(first))


# ---- working copies ------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_copies_of_all_weights_are_autocasts(dropout, as_elsewhere):
    """To the bit, but for a weight that the fused walk multiplies by twice: its two gradients are
    added up in bfloat16."""
    runs = [
        trainer(wrap(tiny_unet(dropout=dropout)), precision="bf16", ema_decay=0.9, grad_clip=1e9)
        for wrap in (lambda m: m, Passing)
    ]
    for k, x0 in enumerate(batches(1 if dropout else 4, size=3, shape=SHAPE)):
        losses = [run.step(x0) for run in runs]
        assert torch.equal(*losses), k
    for (name, a), b in zip(
        runs[0].network.named_parameters(), runs[1].network.parameters(), strict=True
    ):
        if dropout and "nin_shortcut.weight" in name:
            torch.testing.assert_close(a.grad, b.grad, atol=2e-3 * b.grad.abs().max(), rtol=2**-7)
        else:
            assert torch.equal(a.grad, b.grad), name
    if not dropout:
        assert_same(raw(runs[0]), raw(runs[1]))
    for p in runs[0].network.parameters():
        assert p.dtype == torch.float32
        assert type(p) is torch.nn.Parameter
        assert p.grad.dtype == torch.float32
    assert runs[0].network.state_dict().keys() == tiny_unet().state_dict().keys()


def test_a_cpu_needs_no_copies():
    """Its ops round the weights, and return the weights' gradients in float32."""
    runs = [
        trainer(wrap(tiny_unet(dropout=0.3)), precision="bf16") for wrap in (lambda m: m, Passing)
    ]
    assert runs[0].copies is None
    for x0 in batches(3, size=2, shape=SHAPE):
        assert torch.equal(*[run.step(x0) for run in runs])
    assert_same(raw(runs[0]), raw(runs[1]))
    gradient = runs[0].network.mid.block_1.conv1.weight.grad
    assert not torch.equal(gradient, gradient.bfloat16().float())


def test_copies_are_gone_after_a_forward_that_fails(as_elsewhere):
    run = trainer(tiny_unet(), precision="bf16")
    before = list(run.network.parameters())
    with pytest.raises(ValueError, match="7"):
        run.step(batches(1, size=2, shape=(1, 7, 7))[0])
    assert all(a is b for a, b in zip(run.network.parameters(), before, strict=True))
    run.step(batches(1, size=2, shape=SHAPE)[0])


def test_weights_that_are_frozen_or_written_between_steps(as_elsewhere):
    runs = [trainer(wrap(tiny_unet()), precision="bf16") for wrap in (lambda m: m, Passing)]
    for k, x0 in enumerate(batches(3, size=2, shape=SHAPE)):
        for run in runs:
            conv = run.network.mid.block_1.conv1
            conv.requires_grad_(k != 1)
            with torch.no_grad():
                conv.weight.mul_(1.5)
            run.step(x0)
    assert_same(raw(runs[0]), raw(runs[1]))


# ---- recorded ------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_replays_take_the_very_steps(tmp_path, precision, dropout):
    options = {"precision": precision, "ema_decay": 0.9, "ema_warmup": True, "seed": 2}
    record = Recorder()
    run = trainer(tiny_unet(dropout=dropout), record=record, read_every=4, **options)
    straight = trainer(tiny_unet(dropout=dropout), **options)
    data = batches(9, size=3, shape=SHAPE)
    data[5] = data[5][:2]
    for k, x0 in enumerate(data):
        losses = run.step(x0), straight.step(x0)
        assert torch.equal(*losses), k
        assert losses[0].item() > 0
        if k == 3:
            run.save(tmp_path)
    # The first and the odd one as they are, after which the one of before is recorded still.
    assert (record.tapes, record.replays) == (1, 6)
    assert_same(state(run), state(straight))
    run.load(tmp_path)
    for x0 in data[4:]:
        run.step(x0)
    assert_same(state(run), state(straight))
    assert record.tapes == 2


def test_a_recording_is_not_used_when_its_weights_have_gone():
    record = Recorder()
    runs = [trainer(tiny_unet(), record=r) for r in (record, None)]
    for k, x0 in enumerate(batches(9, size=2, shape=SHAPE)):
        for run in runs:
            p = run.network.conv_out.weight
            if k == 3:  # another memory
                p.data = p.data.clone() * 2
            if k == 5:
                run.grad_clip = 0.01
            if k == 7:
                run.network.conv_out.weight.requires_grad_(False)
            run.step(x0)
    assert_same(raw(runs[0]), raw(runs[1]))
    assert record.tapes == 4


CHANGES = {
    "epsilon": lambda run: setattr(run.network.norm_out, "eps", 0.3),
    "heads": lambda run: setattr(run.network.mid.attn_1, "num_heads", 2),
    "border": lambda run: setattr(run.network.conv_out, "padding_mode", "circular"),
    "embedding": lambda run: run.network.config.update(freq_shift=0),
    "dropout": lambda run: setattr(run.network.mid.block_1.dropout, "p", 0.5),
    "betas": lambda run: run.optimizer.param_groups[0].update(betas=(0.5, 0.5)),
    "decay": lambda run: run.optimizer.param_groups[0].update(weight_decay=0.5),
    "precision": lambda run: setattr(run, "precision", "bf16"),
    "hook": lambda run: run.network.register_forward_hook(lambda m, a, y: 2 * y),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_recording_is_not_used_when_what_python_read_has_changed(change):
    runs = [trainer(tiny_unet(), record=r) for r in (Recorder(), None, None)]
    for k, x0 in enumerate(batches(6, size=2, shape=SHAPE)):
        for run in runs:
            if k == 3 and run is not runs[2]:
                change(run)
            run.step(x0)
    assert_same(raw(runs[0]), raw(runs[1]))
    assert any(not torch.equal(v, raw(runs[2])[name]) for name, v in raw(runs[1]).items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_of_a_weight_are_called_by_every_step(register, precision):
    """Where copies would stand in its place, or a recording would run no Python."""
    run, seen = trainer(tiny_unet(), precision=precision, record=Recorder()), []
    data = batches(6, size=2, shape=SHAPE)
    for x0 in data[:3]:
        run.step(x0)
    weight = run.network.mid.block_1.conv1.weight
    handle = getattr(weight, register)(lambda _: seen.append(1))
    for x0 in data[3:5]:
        run.step(x0)
    assert len(seen) == 2
    handle.remove()
    run.step(data[5])
    assert len(seen) == 2


def test_a_replay_is_a_write_that_torch_sees():
    run = trainer(tiny_unet(), record=Recorder())
    x0 = batches(1, size=2, shape=SHAPE)[0]
    for _ in range(3):
        run.step(x0)
    y = (run.network.conv_out.weight**2).sum()
    run.step(x0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_a_step_that_is_not_finite_in_a_replay():
    run, healthy = trainer(tiny_unet(), record=Recorder(), read_every=4), trainer(tiny_unet())
    data = [x / 127.5 - 1 for x in batches(8, size=2, shape=SHAPE)]
    for k, x0 in enumerate(data[:8]):
        if k < 5:
            healthy.step(x0)
        if k == 7:
            with pytest.raises(ValueError, match=r"got 9 .. 9: .*step 5: .*; steps 6 .. 7 were"):
                run.step(x0)
        else:
            run.step(torch.full_like(x0, 9) if k == 5 else x0)
    assert_same(state(run), state(healthy))
    for x0 in data[5:]:
        run.step(x0)
        healthy.step(x0)
    assert_same(state(run), state(healthy))


def test_what_can_not_be_recorded_runs_as_it_is_and_is_named_once(monkeypatch):
    monkeypatch.delenv("FASTDDPM_STRICT", raising=False)

    def fails(step, rewind, device):
        step()
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore of it")

    run, straight = trainer(tiny_unet(), record=fails), trainer(tiny_unet())
    data = batches(5, size=2, shape=SHAPE)
    for x0 in data[:2]:
        run.step(x0)
    with pytest.warns(
        RuntimeWarning, match="step by step, not by a CUDA graph: CUDA out of memory.$"
    ):
        run.step(data[2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x0 in data[3:]:
            run.step(x0)
    for x0 in data:
        straight.step(x0)
    assert_same(state(run), state(straight))


@pytest.mark.parametrize(
    "model", [Small, lambda: Passing(tiny_unet()), lambda: hooked(tiny_unet())]
)
def test_only_a_plain_unet_is_recorded(model):
    record = Recorder()
    run = trainer(model(), record=record)
    for x0 in batches(3, size=2, shape=SHAPE):
        run.step(x0)
    assert record.tapes == 0


def hooked(model):
    model.mid.register_forward_hook(lambda *_: None)
    return model


def test_a_cpu_records_nothing_by_itself(monkeypatch):
    monkeypatch.setattr(training_graph, "_Step", None)
    run = trainer(tiny_unet())
    for x0 in batches(4, size=2, shape=SHAPE):
        run.step(x0)
    assert run.step_count == 4


# ---- dropout -------------------------------------------------------------------------------------


def test_dropout_is_of_the_example_and_torchs_generators_are_left_alone(monkeypatch):
    """So for any cut of the examples into batches, and with what else draws in the process."""
    x0 = batches(1, size=6, shape=SHAPE)[0]
    monkeypatch.setattr(training_step, "seeded", None)
    losses = []
    for size in (6, 2):
        run = trainer(tiny_unet(dropout=0.5), lr=1e-12)
        parts = [run.step(part) for part in x0.split(size)]
        losses.append(torch.stack(parts).mean())
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    run.example_count = 6
    run.lr = 1e-12
    other = run.step(x0)
    assert abs(other - losses[0]) > 1e-4


class Checkpointed(Passing):
    """Computes the network once more in the backward."""

    def forward(self, *arguments):
        return checkpoint(self.module, *arguments, use_reentrant=False)


def test_a_checkpoint_around_a_network_changes_nothing():
    runs = [trainer(wrap(tiny_unet(dropout=0.5))) for wrap in (lambda m: m, Checkpointed)]
    for x0 in batches(2, size=2, shape=SHAPE):
        for run in runs:
            run.step(x0)
    assert_same(raw(runs[0]), raw(runs[1]))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_nor_do_checkpoints_of_blocks(precision, kind, monkeypatch):
    if kind == "gpu":
        monkeypatch.setattr(unet_walk, "WAYS", {"cpu": unet_walk.Walk})
    model = tiny_unet(dropout=0.5)
    runs = [trainer(m, precision=precision) for m in (model, tiny_unet(dropout=0.5))]
    model.checkpoint_blocks()
    for x0 in batches(2, size=2, shape=SHAPE):
        assert torch.equal(*[run.step(x0) for run in runs])
    assert_same(raw(runs[0]), raw(runs[1]))


class FakeGenerators:
    def __init__(self, n):
        self.each = [torch.Generator().manual_seed(k) for k in range(n)]

    def __getitem__(self, index):
        return self.each[index]


def test_generators_of_other_gpus_are_not_touched(monkeypatch):
    fakes = FakeGenerators(4)
    monkeypatch.setattr(torch.cuda, "default_generators", fakes.each, raising=False)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    before = [g.get_state() for g in fakes.each]
    here = torch.get_rng_state()
    with host.seeded(7, torch.device("cuda"), torch.device("cuda", 0), torch.device("cpu")):
        seeds = [g.initial_seed() for g in (torch.default_generator, *fakes.each)]
        assert seeds == [7, 7, 1, 7, 3]
        for g in fakes.each[:3:2]:
            torch.rand(3, generator=g)
    assert torch.equal(torch.get_rng_state(), here)
    for g, state_before in zip(fakes.each, before, strict=True):
        assert torch.equal(g.get_state(), state_before)


# ---- uploads -------------------------------------------------------------------------------------


class HostTensor:
    """Stands for a batch in the host's memory."""

    def __init__(self, pinned=False):
        self.device, self.pinned, self.sent = torch.device("cpu"), pinned, []

    def is_pinned(self):
        return self.pinned

    def to(self, device, non_blocking=False):
        self.sent.append((device, non_blocking))
        return self


def test_what_goes_to_a_gpu_goes_from_pinned_memory_of_ours(monkeypatch):
    made = []

    def pinned(x):
        made.append(HostTensor(pinned=True))
        return made[-1]

    monkeypatch.setattr(upload, "pinned", pinned)
    gpu = torch.device("cuda", 1)
    plain, theirs = HostTensor(), HostTensor(pinned=True)
    for x in (plain, theirs):  # whose memory it is may write to it at once
        sent = upload.uploaded(x, gpu)
        assert sent is made[-1]
        assert sent.sent == [(gpu, True)]
        assert x.sent == []
    staged = upload.staged(plain, gpu)
    assert staged is made[-1]
    assert upload.uploaded(staged, gpu, ours=True) is staged
    assert staged.sent == [(gpu, True)]
    assert len(made) == 3


def test_on_a_cpu_nothing_is_copied():
    x = torch.zeros(2, 1, 4, 4)
    cpu = torch.device("cpu")
    assert upload.staged(x, cpu) is x
    assert upload.uploaded(x, cpu) is x
    on_gpu = types.SimpleNamespace(device=torch.device("cuda"))
    assert upload.staged(on_gpu, torch.device("cuda")) is on_gpu


# ---- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_gpus_steps_wait_for_nothing_and_are_the_cpus(precision, dropout):
    options = {"precision": precision, "lr": 1e-3, "ema_decay": 0.9}
    recorded = trainer(tiny_unet(dropout=dropout).cuda(), **options)
    eager = trainer(tiny_unet(dropout=dropout).cuda(), record=None, **options)
    own = trainer(tiny_unet(dropout=dropout), **options)
    data = batches(12, size=4, shape=SHAPE)
    losses: list[list[torch.Tensor]] = []
    for k, x0 in enumerate(data):
        if k == 5:  # all is recorded, and libraries have chosen their kernels
            assert recorded.recordings._step is not None
            torch.cuda.set_sync_debug_mode("error")
        try:
            losses.append([run.step(x0) for run in (recorded, eager)])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        losses[-1].append(own.step(x0))
    tolerance = 1e-4 if precision == "fp32" else 3e-2
    for a, b, c in losses:
        torch.testing.assert_close(a.cpu(), c, rtol=tolerance, atol=0)
        torch.testing.assert_close(b.cpu(), c, rtol=tolerance, atol=0)
    for run in (recorded, eager):
        run.check_finite()
        assert (run.step_count, run.example_count) == (12, 48)


@pytest.mark.gpu
def test_a_gpu_names_the_step_that_stopped_it():
    run = trainer(tiny_unet().cuda(), read_every=4)
    data = [x.cuda() / 127.5 - 1 for x in batches(8, size=2, shape=SHAPE)]
    for x0 in data[:5]:
        run.step(x0)
    run.check_finite()
    before = {name: v.clone() for name, v in raw(run).items()}
    run.step(data[5] * 9)
    run.step(data[6])
    with pytest.raises(ValueError, match=r"step 5: .*; steps 6 .. 6 were"):
        run.check_finite()
    assert_same(raw(run), before)
    run.step(data[5])
    run.check_finite()
    assert run.step_count == 6


@pytest.mark.gpu
@TOLD
@pytest.mark.parametrize("recorded", [False, True])
def test_a_gpu_skips_what_is_not_finite_and_stops_at_the_tenth(recorded):
    options = {} if recorded else {"record": None}
    run = trainer(tiny_unet().cuda(), read_every=50, **options)
    data = [x.cuda() for x in batches(20, size=2, shape=SHAPE)]
    for x0 in data[:5]:
        run.step(x0)
    assert (run.recordings._step is not None) == recorded
    run.check_finite()
    before = {name: v.clone() for name, v in raw(run).items()}
    bias = run.network.conv_out.bias
    with torch.no_grad():
        bias.fill_(float("inf"))  # without which no step counts
    for x0 in data[5:17]:
        run.step(x0)
    with pytest.raises(FloatingPointError, match=r"step 14: .*10th .* steps 15 .. 16 were left"):
        run.check_finite()
    assert (run.step_count, run.skipped) == (15, 10)
    with torch.no_grad():
        bias.copy_(before["m.conv_out.bias"])
    assert_same(raw(run), before)
