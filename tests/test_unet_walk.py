"""The walks through a U-Net, a GPU's and a CPU's: what they compute is what its modules compute one
by one, and what is not plain is left to them."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import io
import pickle
import re
from collections import Counter

import pytest
import torch
from compare import assert_same_for_any_thread_count
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from toy import generator, tiny_unet

from fastddpm import UNet, ops, reference, sample
from fastddpm.ops import dispatch
from fastddpm.unet import walk as unet_walk
from fastddpm.unet.parts import AttentionBlock, ResnetBlock
from fastddpm.unet.plain import foreign, unusual
from fastddpm.unet.walk import CpuWalk, Walk, dropout_stream, is_taken, stream_of, way

NETWORKS = [
    {},
    {"downsample_padding": 1, "head_dim": 4, "freq_shift": 0, "flip_sin_to_cos": True},
    {"in_channels": 3, "channel_mult": (1, 2, 2), "num_res_blocks": 2, "attention_levels": (0, 2)},
    {"in_channels": 9, "channel_mult": (2, 1, 3), "attention_levels": (), "out_channels": 18},
    {"channel_mult": (1,), "image_size": (3, 5), "attention_levels": (0,)},
]


KINDS = {"gpu": Walk, "cpu": CpuWalk}


@pytest.fixture(params=KINDS)
def walking(request, monkeypatch):
    """forward takes this walk on a CPU."""
    monkeypatch.setattr(unet_walk, "WAYS", {"cpu": KINDS[request.param]})
    return KINDS[request.param]


@pytest.fixture(params=["gpu", "gpu, attention in parts", "cpu"])
def attending(request, monkeypatch):
    """`walking`, and how a GPU's attention is computed: as one op, or as norm, products and torch's
    attention."""
    kind, _, parts = request.param.partition(", ")
    monkeypatch.setattr(unet_walk, "WAYS", {"cpu": KINDS[kind]})
    monkeypatch.setattr(Walk, "attends_at_once", lambda *_: not parts)
    return KINDS[kind]


def inputs(model, n=3, seed=1):
    x = torch.randn(n, model.in_channels, *model.image_size, generator=generator(seed))
    return x, torch.tensor([7, 0, 11])[:n]


@contextlib.contextmanager
def one_by_one():
    before, unet_walk.WAYS = unet_walk.WAYS, {}
    try:
        yield
    finally:
        unet_walk.WAYS = before


def results(model, x, t, **options):
    """The output and its gradient for x and every parameter."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, **options) if options else contextlib.nullcontext():
        y = model(x, t)
    grad = torch.randn(y.shape, generator=generator(9)).to(y.dtype)
    return [y, *torch.autograd.grad(y, [x, *model.parameters()], grad)]


def assert_as_exact(got, expected, truth, factor=1.5):
    """The distance to the truth is at most `factor` times that of what is expected, and a few
    roundings of it."""
    for a, b, c in zip(got, expected, truth, strict=True):
        eps = torch.finfo(b.dtype).eps
        error, allowed = (a - c).norm(), (b - c).norm()
        assert error <= factor * allowed + 8 * eps * c.norm()


@pytest.mark.parametrize("options", NETWORKS, ids=str)
def test_it_says_what_the_modules_say(options, attending):
    """Output and all gradients, in float64, whose rounding hides no mistake."""
    model = tiny_unet(**options).double()
    x, t = inputs(model)
    got = results(model, x.double(), t)
    assert is_taken(model, x)
    with one_by_one():
        expected = results(model, x.double(), t)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    with torch.no_grad():  # products are added up in place
        torch.testing.assert_close(model(x.double(), t), expected[0], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("options", NETWORKS[1:3], ids=str)
def test_it_is_as_exact_as_the_modules(options, kind, attending):
    model = tiny_unet(**options)
    x, t = inputs(model)
    truth = results(copy.deepcopy(model).double(), x.double(), t)
    if kind == "bfloat16":
        model = model.bfloat16()
    own = {"enabled": True} if kind == "autocast" else {}
    got = results(model, x, t, **own)
    with one_by_one():
        expected = results(model, x, t, **own)
    assert [y.dtype for y in got] == [y.dtype for y in expected]
    if kind == "float32":
        # A layer of F(4x4) errs by 8 times the plain sum, forward and backward.
        factor = 12 if attending is CpuWalk else 3
        assert_as_exact(got, expected, truth, factor=factor)
        return
    whole = [torch.cat([y.detach().double().flatten() for y in r]) for r in (got, expected, truth)]
    # Two orders of rounding to bfloat16, neither of which is the better one.
    assert (whole[0] - whole[2]).norm() <= 1.25 * (whole[1] - whole[2]).norm()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        torch.testing.assert_close(model(x, t), got[0].detach(), atol=0.02, rtol=0.02)


def test_images_in_the_other_layout(walking):
    """A network whose weights were made contiguous computes NCHW images."""
    model = tiny_unet(in_channels=3).double()
    x, t = inputs(model)
    expected = results(model, x.double(), t)
    got = results(model.to(memory_format=torch.contiguous_format), x.double(), t)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_parts_may_have_no_bias_and_norms_no_weights(attending):
    model = tiny_unet().double()
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.bias = None
        elif isinstance(module, nn.GroupNorm):
            module.weight = module.bias = None
    x, t = inputs(model)
    got = results(model, x.double(), t)
    with one_by_one():
        expected = results(model, x.double(), t)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_gradients_are_laid_out_as_the_weights(walking):
    """Else DistributedDataParallel copies them, and says so."""
    model = tiny_unet(attention_levels=())
    x, t = inputs(model)
    model(x, t).sum().backward()
    for name, p in model.named_parameters():
        assert p.grad.stride() == p.stride(), name


class Images(TorchDispatchMode):
    """The ops that make an image, or a sum of images, by name."""

    def __init__(self, pixels):
        super().__init__()
        self.calls, self.pixels = Counter(), pixels

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, (tuple, list)) else out
        if isinstance(first, torch.Tensor) and first.numel() >= self.pixels:
            self.calls[func.overloadpacket.__name__] += 1
        return out


def test_nothing_stands_between_convolutions_but_norms_and_sums(walking):
    model = tiny_unet(image_size=16, attention_levels=())
    x, t = torch.randn(4, 1, 16, 16), torch.arange(4)
    with torch.no_grad(), Images(4 * 8 * 8 * 8) as seen:
        model(x, t)
    passes = {"cat", "add", "add_", "silu", "clone", "copy_", "mul"}
    assert passes & seen.calls.keys() == set()
    with one_by_one(), torch.no_grad(), Images(4 * 8 * 8 * 8) as seen:
        model(x, t)
    assert {"cat", "add"} <= seen.calls.keys()


def test_a_cpu_takes_a_step_in_convolutions_and_blocks_of_attention():
    """Forward and backward; where an image goes to several places, autograd adds its gradients."""
    model = tiny_unet(image_size=16, dropout=0.1).train()
    x, t, index = torch.randn(4, 1, 16, 16), torch.arange(4), torch.arange(4)
    with dropout_stream(model, seed=1, sample_index=index), Images(4 * 8 * 8 * 8) as seen:
        y = model(x, t)
    convolutions = seen.calls.pop("convolution")
    assert convolutions + 1 == sum(isinstance(m, nn.Conv2d) for m in model.modules())  # conv_out
    assert seen.calls == {"attention_block": 4}
    with Images(4 * 8 * 8 * 8) as seen:
        torch.autograd.grad(y.sum(), list(model.parameters()))
    assert seen.calls.pop("convolution_backward") == convolutions
    assert seen.calls.keys() <= {"attention_block_backward", "add", "add_"}


# ---- what a backward keeps -----------------------------------------------------------------------


class Kept:
    """The images that autograd keeps, by their memory."""

    def __init__(self, pixels):
        self.pixels, self.memory = pixels, set()
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda x: x)

    def pack(self, x):
        if x.numel() >= self.pixels and x.dim() == 4 and not isinstance(x, nn.Parameter):
            self.memory.add(x.untyped_storage().data_ptr())
        return x


def images_kept(model, x, t, pixels):
    kept = Kept(pixels)
    with kept.hooks:
        y = model(x, t)
    assert y.requires_grad
    return len(kept.memory)


def test_a_block_keeps_what_goes_into_its_convolutions(walking):
    """Of a CPU's block its input and the image inside, of a checkpoint's its input alone."""
    model = tiny_unet(channel_mult=(1,), attention_levels=(), num_res_blocks=3).train()
    x, t = inputs(model)
    blocks, one = 3 + 2 + 4, 3 * 8 * 8 * 8
    kept = images_kept(model, x, t, one)
    with one_by_one():
        by_modules = images_kept(model, x, t, one)
    of_checkpoints = images_kept(model.checkpoint_blocks(), x, t, one)
    if walking is CpuWalk:  # beside the blocks' what the attention and conv_out get
        assert kept == 2 * blocks + 2 < by_modules / 1.5
    # What comes out of the last block, and on a GPU its norm, is conv_out's.
    assert of_checkpoints <= blocks + 2 + (walking is Walk)


@pytest.mark.parametrize("drops", ["not", "by the stream", "by torch"])
@pytest.mark.parametrize("kind", ["float32", "autocast"])
@pytest.mark.parametrize("options", NETWORKS[1:3], ids=str)
def test_blocks_that_are_computed_again_are_the_same_bits(options, kind, drops, attending):
    model = tiny_unet(**options, dropout=0.0 if drops == "not" else 0.3).train()
    assert_checkpoint_is_the_same(model, kind, drops)


@pytest.mark.parametrize("drops", ["not", "by torch"])
def test_so_are_those_of_modules(drops):
    model = tiny_unet(dropout=0.0 if drops == "not" else 0.3).train()
    with one_by_one():
        assert_checkpoint_is_the_same(model, "float32", drops)


def assert_checkpoint_is_the_same(model, kind, drops):
    x, t = inputs(model)
    found = []
    for on in (False, True):
        assert model.checkpoint_blocks(on) is model
        own = {"enabled": True} if kind == "autocast" else {}
        torch.manual_seed(3)
        with contextlib.ExitStack() as stack:
            if drops == "by the stream":
                index = torch.tensor([5, 2**40, 7])
                stack.enter_context(dropout_stream(model, seed=4, sample_index=index))
            found.append(results(model, x, t, **own))
    assert all(map(torch.equal, *found))


def test_a_checkpoint_is_no_part_of_the_architecture(tmp_path):
    model = tiny_unet()
    before = dict(model.config)
    model.checkpoint_blocks()
    assert copy.deepcopy(model).checkpointing
    model.save_pretrained(tmp_path)
    loaded = UNet.from_pretrained(tmp_path)
    assert loaded.config == model.config == before
    assert not loaded.checkpointing
    with pytest.raises(ValueError, match="on must be True or False; got 2"):
        model.checkpoint_blocks(2)


# ---- what is not plain ---------------------------------------------------------------------------


class Adapted(nn.Module):
    """A layer with a low-rank term beside it, as adapters are; `weight` is the layer's own."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        out, into = layer.weight.shape[:2]
        self.a, self.b = nn.Parameter(torch.randn(2, into)), nn.Parameter(torch.randn(out, 2) / 9)

    @property
    def weight(self):
        return self.layer.weight

    @property
    def bias(self):
        return self.layer.bias

    def forward(self, x):
        if x.dim() == 4 and isinstance(self.layer, nn.Conv2d):
            low = torch.einsum("oi,nihw->nohw", self.b @ self.a, x)
            return self.layer(x) + low
        return self.layer(x) + x @ (self.b @ self.a).mT


class Halved(ResnetBlock):
    def forward(self, x, silu_temb):
        return super().forward(x, silu_temb) / 2


def replace(name, make):
    def change(model):
        parent, _, leaf = name.rpartition(".")
        part = model.get_submodule(name)
        setattr(model.get_submodule(parent), leaf, make(part))

    return change


def set_class(model):
    model.mid.block_1.__class__ = Halved


def set_forward(model):
    part = model.mid.block_2
    plain = part.forward
    part.forward = lambda *a: 2 * plain(*a)


def set_method(name, method, factor=2):
    """On the part alone, not on its class."""

    def change(model):
        part = model.get_submodule(name)
        plain = getattr(part, method)
        setattr(part, method, lambda *a: factor * plain(*a))

    return change


def on(name, register):
    return lambda model: getattr(model.get_submodule(name), register)(lambda m, a, *out: None)


CHANGES = {
    "adapted convolution": replace("down.0.block.0.conv2", Adapted),
    "adapted product": replace("mid.attn_1.qkv", Adapted),
    "adapted embedding": replace("mid.block_1.temb_proj", Adapted),
    "another block": set_class,
    "another forward": set_forward,
    "another run": set_method("down.0", "run"),
    "another convolution": set_method("mid.block_1.conv1", "_conv_forward"),
    "forward hook": on("up.0.block.0.conv1", "register_forward_hook"),
    "hook before": on("mid.attn_1", "register_forward_pre_hook"),
    "backward hook": on("up.1", "register_full_backward_hook"),
    "norm without silu": replace("mid.block_1.norm2", lambda n: nn.GroupNorm(4, 16)),
    "other dropout": replace("mid.block_1.dropout", lambda d: nn.Dropout2d(0.5).eval()),
    "wide shortcut": replace("up.0.block.0.nin_shortcut", lambda s: nn.Conv2d(24, 8, 3, padding=1)),
    "parametrized": lambda m: parametrizations.weight_norm(m.mid.block_1.conv1),
    "no such list": replace("down", lambda down: nn.Sequential(*down)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_not_plain_goes_module_by_module(change, walking):
    model = tiny_unet(dropout=0.5)
    x, t = inputs(model)
    assert is_taken(model, x)
    change(model)
    assert foreign(model)
    assert not is_taken(model, x)
    with one_by_one(), torch.no_grad():
        expected = model(x, t)
    with torch.no_grad():
        assert torch.equal(model(x, t), expected)


def test_what_is_for_all_of_a_class_is_seen(monkeypatch):
    model = tiny_unet()
    assert foreign(model) is None
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert foreign(model) == "the model (UNet) has hooks that are every module's"
    handle.remove()
    plain = nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: plain(self, x))
    assert foreign(model) == "the model (UNet) has parts whose Conv2d.forward was replaced"


def test_an_adapter_in_an_attention_has_a_say():
    """The block reads the weights of its layers, but only of those that are nothing else."""
    block = AttentionBlock(8, 4, 1e-6, 2).double()
    for p in block.parameters():
        nn.init.normal_(p, std=0.5)
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64)
    before = block(x)
    adapted = copy.deepcopy(block)
    adapted.qkv = Adapted(adapted.qkv).double()
    nn.init.zeros_(adapted.qkv.b)
    torch.testing.assert_close(adapted(x), before)
    nn.init.ones_(adapted.qkv.b)
    merged = copy.deepcopy(block)
    with torch.no_grad():
        merged.qkv.weight += adapted.qkv.b @ adapted.qkv.a
    torch.testing.assert_close(adapted(x), merged(x))


def test_convolutions_keep_their_own_way_around_the_border(walking):
    model = tiny_unet().double()
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.padding_mode = "circular"
    x, t = inputs(model)
    assert is_taken(model, x) == (walking is Walk)  # ops.convolution has zeros around it
    got = results(model, x.double(), t)
    with one_by_one():
        expected = results(model, x.double(), t)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


ODD = {
    "padding": ("conv_in", (0, 0)),
    "stride": ("down.0.block.0.conv2", (2, 2)),
    "dilation": ("up.1.block.1.conv1", (2, 2)),
    "kernel_size": ("mid.block_2.conv1", (5, 5)),
    "groups": ("conv_out", 2),
    "padding_mode": ("down.0.downsample.conv", "reflect"),
}


@pytest.mark.parametrize("name", ODD)
def test_a_convolution_that_is_not_the_papers_is_named(name):
    model = tiny_unet()
    assert unusual(model) is None
    assert way(model, torch.zeros(())) is CpuWalk
    where, value = ODD[name]
    setattr(model.get_submodule(where), name, value)
    assert re.match(rf"{where} \(Conv2d\) has {name} .*{value}.*, not ", unusual(model))
    assert way(model, torch.zeros(())) is None
    with dropout_stream(model, seed=1, sample_index=torch.zeros(3, dtype=torch.int64)):
        assert way(model, torch.zeros(())) is Walk


# ---- bits ----------------------------------------------------------------------------------------

native = pytest.mark.skipif(
    dispatch.load("cpu").missing is not None, reason=str(dispatch.load("cpu").missing)
)


@native
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("options", [NETWORKS[1], NETWORKS[2]], ids=str)
def test_an_images_bits_depend_on_no_others_and_no_threads(options, kind):
    model = tiny_unet(**options)
    x, t = inputs(model)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast")
    if kind == "bfloat16":
        model = model.bfloat16()
    with torch.no_grad(), autocast:
        whole = model(x, t)
        for rows in ([0], [1, 2], [2, 1, 0]):
            assert torch.equal(model(x[rows], t[rows]), whole[rows])
        assert_same_for_any_thread_count(lambda: model(x, t))


@native
@pytest.mark.parametrize("kind", ["float32", "autocast"])
def test_gradients_have_the_same_bits_with_any_number_of_threads(kind):
    model = tiny_unet(**NETWORKS[2], dropout=0.1).train()
    x, t = inputs(model)
    own = {"enabled": True} if kind == "autocast" else {}

    def flat():
        with dropout_stream(model, seed=4, sample_index=torch.tensor([5, 2**40, 7])):
            return torch.cat([y.detach().flatten() for y in results(model, x, t, **own)])

    assert_same_for_any_thread_count(flat)


@native
@pytest.mark.parametrize("options", [NETWORKS[1], NETWORKS[2]], ids=str)
def test_eager_sampling_is_the_plans_to_rounding(options):
    model = tiny_unet(**options)
    run = {"n": 3, "seed": 3, "progress": False, "precision": "fp32"}
    plan, eager, twos = (
        sample(model, **run, engine=engine, batch_size=size)
        for engine, size in (("cpu_plan", 3), ("eager", 3), ("eager", 2))
    )
    torch.testing.assert_close(eager, plan, atol=2e-5, rtol=0)
    assert torch.equal(eager, twos)


# ---- around it -----------------------------------------------------------------------------------


def test_copies_pickles_and_other_weights(walking):
    model = tiny_unet()
    x, t = inputs(model)
    with torch.no_grad():
        expected = model(x, t)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(x, t), expected)
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        fresh = UNet(**{**model.config, "diffusion": model.diffusion}).eval()
        fresh.load_state_dict(torch.load(io.BytesIO(buffer.getvalue())))
        assert torch.equal(fresh(x, t), expected)
        other = {name: p * 0.9 for name, p in model.named_parameters()}
        got = torch.func.functional_call(model, other, (x, t))
        assert not torch.allclose(got, expected, atol=1e-3)
        for p in model.parameters():
            p.mul_(0.9)
        assert torch.equal(model(x, t), got)


def test_what_traces_or_transforms_goes_module_by_module(walking):
    model = tiny_unet()
    x, t = inputs(model)
    with torch.no_grad():
        expected = model(x, t)
        compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
        torch.testing.assert_close(compiled(x, t), expected)
    model.checkpoint_blocks()
    again = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    got, expected = (
        torch.autograd.grad(f(x, t).square().sum(), list(model.parameters()))
        for f in (again, model)
    )
    by_func = torch.func.grad(
        lambda p: torch.func.functional_call(model, p, (x, t)).square().sum()
    )(dict(model.named_parameters()))
    for a, b, c in zip(got, expected, by_func.values(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(c, b, atol=2e-5, rtol=1e-4)
    tangent = torch.randn_like(x)
    double = copy.deepcopy(model).double()
    _, slope = torch.func.jvp(lambda a: double(a, t), (x.double(),), (tangent.double(),))
    step = 1e-6 * tangent.double()
    with torch.no_grad():
        difference = (double(x.double() + step, t) - double(x.double() - step, t)) / 2e-6
    torch.testing.assert_close(slope, difference, atol=1e-6, rtol=1e-6)


# ---- dropout -------------------------------------------------------------------------------------


def test_torchs_dropout_without_a_stream(walking):
    model = tiny_unet(dropout=0.5).train()
    x, t = inputs(model)
    torch.manual_seed(5)
    got = model(x, t)
    with one_by_one():
        torch.manual_seed(5)
        torch.testing.assert_close(got, model(x, t), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(x, t), got)


def test_dropout_of_a_stream_is_a_function_of_seed_and_index():
    model = tiny_unet(dropout=0.3).double().train()
    x, t = (y.double() if y.is_floating_point() else y for y in inputs(model))

    def draw(rows, seed=4, index=(5, 2**40, 7)):
        with dropout_stream(model, seed=seed, sample_index=torch.tensor(index)[rows]):
            return model(x[rows], t[rows])

    everything = torch.arange(3)
    whole = draw(everything)
    assert torch.equal(draw(everything), whole)
    torch.testing.assert_close(draw(torch.tensor([2, 0])), whole[[2, 0]])
    for other in (draw(everything, seed=5), draw(everything, index=(5, 2**40, 8))):
        assert not torch.allclose(other[2], whole[2])
    model.eval()
    evaluated = draw(everything)
    assert torch.equal(evaluated, draw(everything, seed=5))
    assert not torch.allclose(evaluated, whole)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_draws_the_same_masks_again(reentrant):
    """In whichever thread a backward computes: a GPU's is not the caller's."""
    model = tiny_unet(dropout=0.5).double().train()
    x, t = inputs(model)
    x = x.double().requires_grad_()

    class Elsewhere(nn.Module):
        def forward(self, x, t):
            return contextvars.Context().run(model, x, t) if self.again else model(x, t)

    gradients, around = [], Elsewhere()
    for checkpointed in (True, False):
        around.again = False
        with dropout_stream(model, seed=4, sample_index=torch.tensor([5, 2**40, 7])):
            if checkpointed:
                y = checkpoint(around, x, t, use_reentrant=reentrant)
            else:
                y = around(x, t)
            around.again = checkpointed
            gradients.append(torch.autograd.grad(y.sum(), [x]) if not reentrant else backward(y, x))
        assert stream_of(model) is None
    torch.testing.assert_close(*gradients)


def backward(y, x):
    x.grad = None
    y.sum().backward()
    return [x.grad]


def test_each_block_has_a_mask_of_its_own(monkeypatch):
    """Block k's is that of the step word 2^32 - 2 - k, in the order of the walk."""
    model = tiny_unet(dropout=0.5).train()
    x, t = inputs(model)
    seen = []
    plain = ops.convolution

    def convolution(h, weight, *arguments, **options):
        if options.get("dropout"):
            weight_of = next(name for name, p in model.named_parameters() if p is weight)
            seen.append((weight_of, options["step"].tolist(), options["sample_index"].tolist()))
            assert (options["dropout"], options["seed"]) == (0.5, 9)
        return plain(h, weight, *arguments, **options)

    monkeypatch.setattr(ops, "convolution", convolution)
    with dropout_stream(model, seed=9, sample_index=torch.tensor([3, 1, 2])):
        model(x, t)
    blocks = [f"{w}.{i}.block.{j}" for w, i, j in (("down", 0, 0), ("down", 1, 0))]
    blocks += ["mid.block_1", "mid.block_2"]
    blocks += [f"up.{i}.block.{j}" for i in (1, 0) for j in (0, 1)]
    expected = [(f"{b}.conv2.weight", [2**32 - 2 - k] * 3, [3, 1, 2]) for k, b in enumerate(blocks)]
    assert seen == expected


def test_masks_are_the_same_on_a_gpu(monkeypatch):
    """As a network whose dropout is those masks computes it, too."""
    model = tiny_unet(dropout=0.3).double().train()
    x, t = inputs(model)
    index = torch.tensor([5, 2**40, 7])
    found = []
    for kind in (*KINDS.values(), None):
        monkeypatch.setattr(unet_walk, "WAYS", {} if kind is None else {"cpu": kind})
        with contextlib.ExitStack() as stack:
            if kind is None:
                monkeypatch.setattr(unet_walk, "way", lambda *_: None)
                place_masks(model, 4, index)
            stream = dropout_stream(model, seed=4, sample_index=index)
            stack.enter_context(stream)
            found.append(results(model, x.double(), t))
    for gpu, cpu, modules in zip(*found, strict=True):
        torch.testing.assert_close(gpu, modules, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(cpu, modules, rtol=1e-11, atol=1e-12)


def place_masks(model, seed, index):
    """In the place of each dropout, the masks that the contract says, of p = 0.3."""
    order = [b for level in model.down for b in level.block]
    order += [model.mid.block_1, model.mid.block_2]
    order += [b for level in reversed(model.up) for b in level.block]
    for k, block in enumerate(order):

        def masked(y, step=2**32 - 2 - k):
            return y * reference.dropout_factors(y, 0.3, seed=seed, step=step, sample_index=index)

        block.dropout.forward = masked


def test_a_stream_is_for_its_network_and_its_block_of_code():
    model, other = tiny_unet(dropout=0.5).train(), tiny_unet(dropout=0.5).train()
    x, t = inputs(model)
    with dropout_stream(model, seed=1, sample_index=torch.arange(3)):
        assert stream_of(model) is not None
        assert stream_of(other) is None
        assert torch.equal(model(x, t), model(x, t))
        assert not torch.equal(other(x, t), other(x, t))
    assert stream_of(model) is None
