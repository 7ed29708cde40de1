"""The plan of a GPU without a GPU: its network against the model, and its recorded steps, replayed
from a tape as those of test_cuda_graph.py, against eager's."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter

import cuda_on_cpu
import pytest
import torch
from conftest import INTERPRETED, REQUIRED
from test_cuda_graph import Recorder
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from toy import SCHEDULE, generator, tiny_unet

import fastddpm
from fastddpm import Diffusion, Schedule, UNet, ops
from fastddpm.engine import cuda_graph
from fastddpm.engine.cuda_graph import CudaGraph
from fastddpm.engine.cuda_plan import CudaPlan
from fastddpm.engine.eager import Eager
from fastddpm.engine.gpu_network import Network
from fastddpm.ops import dispatch
from fastddpm.sampling import Chain, bar

CPU = torch.device("cpu")
SHORT = Diffusion(Schedule.linear(2, 0.1, 0.3))
NETWORKS = [
    {},
    {"downsample_padding": 1, "head_dim": 4, "freq_shift": 0, "flip_sin_to_cos": True},
    {"in_channels": 3, "channel_mult": (1, 2, 2), "num_res_blocks": 2, "attention_levels": (0, 2)},
    {"in_channels": 9, "channel_mult": (2, 1, 3), "attention_levels": ()},
    {"channel_mult": (1,), "image_size": (3, 5), "attention_levels": (0,)},
]


def inputs(model, n=3, seed=1):
    x = torch.randn(n, model.in_channels, *model.image_size, generator=generator(seed))
    return x, torch.full((n,), 7)


def network(model, dtype, T=12):
    return Network(model, torch.arange(T), dtype)


# ---- the network ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", NETWORKS, ids=str)
def test_the_network_says_what_the_model_says(options):
    """In float64, whose rounding hides no mistake of a weight or a bias."""
    model = tiny_unet(**options).double()
    x, t = inputs(model)
    got = network(model, torch.float64)(x, t[:1])
    with torch.no_grad():
        expected = model(x.double(), t)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_as_exact_as_eager(dtype):
    model = tiny_unet(in_channels=3, channel_mult=(1, 2, 2), num_res_blocks=2)
    x, t = inputs(model, 16)
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(x.double(), t)
        eager = copy.deepcopy(model).to(dtype)(x, t)
    got = network(model, dtype)(x, t[:1])
    assert got.dtype == dtype
    error, allowed = (got - truth).norm(), (eager - truth).norm()
    assert error < 1.25 * allowed


LAYERS = (
    *("conv_in", "mid.block_1.conv1", "mid.block_2.temb_proj", "down.0.downsample.conv"),
    *("up.1.upsample.conv", "up.0.block.0.conv2", "up.0.block.0.nin_shortcut"),
    *("mid.attn_1.qkv", "mid.attn_1.proj_out", "conv_out"),
)


@pytest.mark.parametrize("missing", LAYERS)
def test_a_layer_may_have_no_bias(missing):
    model = tiny_unet().double()
    model.get_submodule(missing).bias = None
    x, t = inputs(model)
    with torch.no_grad():
        expected = model(x.double(), t)
    got = network(model, torch.float64)(x, t[:1])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)


class Counts(TorchDispatchMode):
    """How often each op is dispatched."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket._qualified_op_name] += 1
        return func(*args, **(kwargs or {}))


VIEWS = {
    "aten::" + name
    for name in (
        *("view", "permute", "t", "transpose", "split_with_sizes", "slice", "select", "unbind"),
        *("expand", "detach", "_unsafe_view", "alias", "as_strided", "unsqueeze", "split"),
        *("_reshape_alias", "lift_fresh", "squeeze"),
    )
} | {"prim::device"}


def calls_of_a_step(model, n=2, dtype=torch.bfloat16):
    """What is dispatched for one step of the plan, once its weights are ready, but for views."""
    plan = CudaPlan(model, model.diffusion, device=next(model.parameters()).device)
    plan.precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    plan.follow()
    shape = (n, model.in_channels, *model.image_size)
    x = torch.empty(shape, device=plan.device)
    counts = Counts()

    def record(step, rewind, device):
        rewind()
        step()
        with counts:
            step()

    plan._record = record
    cuda_graph.Step(plan, x)
    return Counter({name: k for name, k in counts.calls.items() if name not in VIEWS})


def test_the_calls_of_a_step_of_the_papers_network():
    """Nothing but products, our ops, and what moves the counter and x_t: no concatenation, no sum
    of an embedding or a residual, no padding, no doubling and no copy but the cast of x_t."""
    model = UNet.cifar10(channels=32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        calls = calls_of_a_step(model, 256)
    blocks, attentions, shortcuts, halvings = 22, 6, 13, 3
    norms = calls.pop("fastddpm::group_norm_silu") + calls.pop("fastddpm::group_norm_silu_sum")
    assert norms == 2 * blocks + attentions + 1
    assert calls.pop("fastddpm::residual_sum") == 2 * halvings  # where a convolution comes next
    products = calls.pop("aten::mm") + calls.pop("aten::addmm_") + calls.pop("aten::addmm")
    assert products == (2 * shortcuts - 1) + 2 * attentions
    assert calls.pop("aten::convolution") == 2 * blocks + 2 * halvings + 2
    (attention,) = (name for name in calls if "scaled_dot_product" in name)
    assert calls.pop(attention) == attentions
    assert calls == {
        "aten::sub_": 1, "aten::index_select": 1, "aten::copy_": 1,
        "fastddpm::posterior_step_out": 1,
    }  # fmt: skip


@pytest.mark.parametrize("mode", [True, False])
def test_no_mode_of_the_model_drops_anything(mode):
    model = tiny_unet(dropout=0.5).double().eval()
    x, t = inputs(model)
    with torch.no_grad():
        expected = model(x.double(), t)
    got = network(model.train(mode), torch.float64)(x, t[:1])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)


# ---- the engine ----------------------------------------------------------------------------------


def engines(model, diffusion=None, record=None, **options):
    """(the plan on tapes, eager, the recorder)."""
    record = record or Recorder()
    options = {"device": CPU, "precision": "fp32", **options}
    diffusion = diffusion or model.diffusion
    plan = CudaPlan(model, diffusion, record=record, **options)
    return plan, Eager(model, diffusion, **options), record


def start(model, n=3, seed=5, first=0):
    index = torch.arange(first, first + n)
    shape = (n, model.in_channels, *model.image_size)
    x = ops.randn(shape, seed=seed, step=SCHEDULE.T, sample_index=index)
    return x, {"seed": seed, "sample_index": index}


def assert_close(got, expected, atol=2e-5):
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("steps", [None, 5, 1])
@pytest.mark.parametrize(
    "options", [{}, {"sampler": "ddim"}, {"sampler": "ddim", "eta": 0.5}, {"clip": False}], ids=str
)
@pytest.mark.parametrize(
    ("prediction", "variance"),
    [("eps", "fixed_large"), ("x0", "fixed_small"), ("mean", "fixed_small"), ("eps", "learned")],
)
def test_replays_take_the_steps_of_eager(prediction, variance, options, steps):
    loss = "vlb" if variance == "learned" else "simple"
    diffusion = Diffusion(SCHEDULE, prediction, variance, loss)
    model = tiny_unet(diffusion=diffusion, in_channels=3)
    plan, eager, record = engines(model, diffusion.respace(steps), **options)
    x, stream = start(model)
    before = x.clone()
    got, expected = plan.run(x, **stream), eager.run(x, **stream)
    assert_close(got, expected, 2e-5 * max(1, expected.abs().max().item()))
    assert torch.equal(x, before)
    assert (record.tapes, record.replays) == (1, steps or SCHEDULE.T)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_images_depend_on_their_index_alone(precision):
    """One recording for 7 images in batches of 3, for fewer, and for every seed and stretch."""
    model = tiny_unet(in_channels=3)
    plan, eager, record = engines(model, precision=precision)
    x, stream = start(model, 3)
    whole = plan.run(x, **stream)
    assert_close(whole, eager.run(x, **stream), 2e-5 if precision == "fp32" else 0.05)
    for n in (2, 1):
        small, few = start(model, n)
        assert torch.equal(plan.run(small, **few), whole[:n])
    other, its = start(model, 3, seed=2**64 - 3, first=2**40)
    drawn = plan.run(other, **its)
    assert not torch.equal(drawn, whole)
    assert_close(drawn, eager.run(other, **its), 2e-5 if precision == "fp32" else 0.05)
    half = plan.run(x, start=12, stop=5, **stream)
    assert torch.equal(plan.run(half, start=5, **stream), whole)
    assert torch.equal(plan.run(x, start=4, stop=4, **stream), x)
    assert record.tapes == 1
    larger, more = start(model, 5)
    assert_close(plan.run(larger, **more)[:3], whole, 2e-5 if precision == "fp32" else 0.05)
    assert record.tapes == 2
    assert len(plan._recorded) == 1


def test_what_on_step_sees():
    model = tiny_unet()
    plan, eager, _ = engines(model)
    plan.run(*start(model, 4)[:1], **start(model, 4)[1])
    x, stream = start(model)
    seen = {"plan": [], "eager": []}
    for name, engine in (("plan", plan), ("eager", eager)):
        engine.run(
            x, **stream,
            on_step=lambda i, x, x0, name=name: seen[name].append((i, x.clone(), x0())),
        )  # fmt: skip
    for (i, x, x0), (j, y, y0) in zip(seen["plan"], seen["eager"], strict=True):
        assert i == j
        assert x.shape == x0.shape == y.shape
        assert_close(x, y)
        assert_close(x0, y0, 2e-4)


def test_a_sample_records_once():
    """Of 7 images in batches of 3, by way of `sample`, whose bar needs no x0 prediction."""
    model, recorder = tiny_unet(), Recorder()
    expected = fastddpm.sample(model, 7, engine="eager", precision="fp32", progress=False)
    chain = Chain(model, precision="fp32", engine="eager")
    chain.engine = engines(model, record=recorder)[0]
    with bar(7, chain.T, True) as steps:
        parts = chain.draw(0, torch.arange(7), chain.batches(3), steps)
    assert_close(torch.cat(parts), expected)
    assert (recorder.tapes, recorder.replays) == (1, 3 * SCHEDULE.T)


@pytest.mark.parametrize("shape", [(2, 3, 7, 8), (2, 1, 8, 8)])
def test_images_that_do_not_fit_are_refused_as_eager_does(shape):
    model = tiny_unet(in_channels=3)
    for engine in engines(model)[:2]:
        with pytest.raises(ValueError, match=r"H and W must be|x must be \(N, 3, H, W\)"):
            engine.run(torch.zeros(shape), seed=1, sample_index=torch.arange(2))


# ---- a model that changes, and one that a plan can't run -----------------------------------------


def move(model):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.9)


def write_past_autograd(model):
    for p in model.parameters():
        p.data.mul_(1.1)


def replace_weights(model):
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(p.detach() * 0.8))


def replace_a_layer(model):
    model.mid.block_1.conv1 = nn.Conv2d(16, 16, 3, padding=1, bias=False)


def set_epsilons(model):
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.eps = 0.5


def set_groups(model):
    model.norm_out.num_groups = 2


def set_heads(model):
    model.mid.attn_1.num_heads = 4


def set_embedding(model):
    model.config["flip_sin_to_cos"] = True


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("change", [set_epsilons, set_groups, set_heads, set_embedding])
@pytest.mark.parametrize("engine", [CudaPlan, CudaGraph])
def test_a_run_takes_the_numbers_that_the_parts_have_when_it_begins(engine, change, precision):
    """Beside the weights: those that Python reads when a step is recorded."""
    model = tiny_unet()
    options = {"device": CPU, "precision": precision}
    recorder = Recorder()
    plan = engine(model, model.diffusion, record=recorder, **options)
    x, stream = start(model)
    before = plan.run(x, **stream)
    eager = Eager(model, model.diffusion, **options)
    eager.run(x, **stream)
    change(model)
    after, expected = plan.run(x, **stream), Eager(model, model.diffusion, **options)
    assert not torch.allclose(before, after, atol=1e-3)
    expected = expected.run(x, **stream)
    assert_close(after, expected, 2e-5 if precision == "fp32" else 0.05)
    assert torch.equal(eager.run(x, **stream), expected)
    plan.run(x, **stream)
    assert recorder.tapes == 2


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def set_class(model):
    model.conv_in.__class__ = Doubled


@pytest.mark.parametrize("change", [set_class, lambda model: hook(model)])
def test_a_recording_sees_what_a_part_has_become(change):
    model = tiny_unet()
    options = {"device": CPU, "precision": "fp32"}
    graph = CudaGraph(model, model.diffusion, record=Recorder(), **options)
    x, stream = start(model)
    before = graph.run(x, **stream)
    change(model)
    after, expected = graph.run(x, **stream), Eager(model, model.diffusion, **options)
    assert not torch.allclose(before, after, atol=1e-3)
    assert_close(after, expected.run(x, **stream))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("change", [move, write_past_autograd, replace_weights, replace_a_layer])
@pytest.mark.parametrize("engine", [CudaPlan, CudaGraph])
def test_a_run_takes_the_weights_that_the_model_has_when_it_begins(engine, change, precision):
    torch.manual_seed(3)
    model = tiny_unet()
    options = {"device": CPU, "precision": precision}
    plan = engine(model, model.diffusion, record=Recorder(), **options)
    x, stream = start(model)
    before = plan.run(x, **stream)
    change(model)
    after, expected = plan.run(x, **stream), Eager(model, model.diffusion, **options)
    assert not torch.allclose(before, after, atol=1e-3)
    assert_close(after, expected.run(x, **stream), 2e-5 if precision == "fp32" else 0.05)


def test_weights_that_stay_where_they_are_need_no_other_recording():
    model = tiny_unet()
    for engine in (CudaPlan, CudaGraph):
        recorder = Recorder()
        plan = engine(model, model.diffusion, device=CPU, precision="fp32", record=recorder)
        for change in (move, write_past_autograd):
            x, stream = start(model)
            plan.run(x, **stream)
            change(model)
        plan.run(x, **stream)
        assert recorder.tapes == 1


def test_a_plan_copies_weights_and_need_not_know_where_they_lie():
    model, recorder = tiny_unet(), Recorder()
    plan = CudaPlan(model, model.diffusion, device=CPU, precision="fp32", record=recorder)
    x, stream = start(model)
    plan.run(x, **stream)
    model.load_state_dict({k: 0.5 * p for k, p in model.state_dict().items()}, assign=True)
    expected = Eager(model, model.diffusion, device=CPU, precision="fp32").run(x, **stream)
    assert_close(plan.run(x, **stream), expected)
    assert recorder.tapes == 1


def hook(model):
    model.mid.attn_1.register_forward_hook(lambda module, args, out: 2 * out)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_that_is_plain_no_longer_goes_on_in_eager(monkeypatch, precision):
    monkeypatch.delenv("FASTDDPM_STRICT", raising=False)
    model = tiny_unet()
    plan, _, _ = engines(model, precision=precision)
    x, stream = start(model)
    plan.run(x, **stream)
    hook(model)
    why = "'eager', not 'cuda_plan': mid.attn_1 .* a forward hook"
    with pytest.warns(RuntimeWarning, match=why) as told:
        drawn = [plan.run(x, **stream) for _ in range(2)]
    assert len(told) == 1
    expected = Eager(model, model.diffusion, device=CPU, precision=precision).run(x, **stream)
    assert all(torch.equal(got, expected) for got in drawn)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (hook, r"mid.attn_1 \(AttentionBlock\) has a forward hook"),
        (lambda m: setattr(m.conv_in, "padding_mode", "circular"), "conv_in .* 'circular', not"),
        (
            lambda m: setattr(m.mid.block_1, "norm1", nn.GroupNorm(4, 16)),
            "norm1 .GroupNorm. is not",
        ),
        (
            lambda m: m.up[0].half(),
            r"up.0.block.0.norm1.weight is torch.float16, not torch.float32",
        ),
        (lambda m: m.to(torch.complex64), "conv_in.weight is torch.complex64"),
    ],
)
@pytest.mark.filterwarnings("ignore:Complex modules")
def test_what_a_plan_can_not_run_is_named(change, why):
    model = tiny_unet()
    change(model)
    with pytest.raises(ValueError, match=f"engine 'cuda_plan' can't run here: .*{why}"):
        CudaPlan(model, model.diffusion, device=CPU)


def test_memory_that_runs_out_gives_back_what_was_recorded():
    """A batch that is recorded and does not fit is not what smaller ones are filled up to."""
    model, recorder = tiny_unet(), Recorder()
    plan, eager, _ = engines(model, record=recorder)
    x, stream = start(model, 4)
    plan.run(x, **stream)

    def full(i, x, x0):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        plan.run(x, **stream, on_step=full)
    x, stream = start(model, 2)
    assert_close(plan.run(x, **stream), eager.run(x, **stream))
    assert recorder.tapes == 2
    assert [len(step.x) for step in plan._recorded.values()] == [2]


# ---- the kernels of a GPU ------------------------------------------------------------------------


@pytest.fixture(params=["cuda", "triton"])
def kernels(request):
    """The ops by the CUDA kernels, emulated, or by Triton's, interpreted."""
    with contextlib.ExitStack() as stack:
        if request.param == "cuda" and not torch.cuda.is_available():
            try:
                stack.enter_context(cuda_on_cpu.as_cuda_backend())
            except cuda_on_cpu.Unavailable as reason:
                (pytest.fail if "cuda" in REQUIRED else pytest.skip)(str(reason))
        elif not INTERPRETED:
            pytest.skip("beside a card, kernels take no tensors of the CPU")
        stack.enter_context(dispatch.use_backend(request.param))
        yield request.param


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_steps_by_the_kernels_of_a_gpu(kernels, precision):
    model = tiny_unet(in_channels=3, image_size=4, channel_mult=(1, 2), diffusion=SHORT)
    plan, _, record = engines(model, precision=precision)
    x, stream = start(model, 2, seed=2**63 + 9)
    got = plan.run(x, **stream)
    with dispatch.use_backend("cpu"):
        expected = engines(model, precision=precision)[0].run(x, **stream)
    assert_close(got, expected, 1e-5 if precision == "fp32" else 0.03)
    assert record.replays == SHORT.T
