"""accelerate: networks of other projects (peers.py) by our blocks, others layer by layer, with
equal outputs and gradients; what was changed since, or only looks alike, stays what it is."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from peers import W86, OpenAI, Tqch, randomised
from port_plain import Port
from torch import Tensor, nn
from torch.nn.utils import parametrize
from toy import SCHEDULE, generator, images, tiny_unet

import fastddpm
from fastddpm import Diffusion, ops
from fastddpm.accelerate import report, undo
from fastddpm.accelerated import rules
from fastddpm.accelerated.layers import Convolution
from fastddpm.accelerated.sources import traced
from fastddpm.accelerated.whole import WholeNetwork

DIFFUSION = Diffusion(SCHEDULE)


@pytest.fixture(autouse=True)
def small_steps_too(monkeypatch):
    """Steps of training by our blocks, however few pixels they have, and small convolutions, as no
    result may depend on a rule."""
    monkeypatch.setattr(rules, "WHOLE_PIXELS", 1)
    monkeypatch.setattr(rules, "WHOLE_PIXELS_AUTOCAST", 1)
    monkeypatch.setattr(rules, "PRODUCTS", 1)


class Diffusers(nn.Module):
    """diffusers' UNet2DModel under the same calls as the others."""

    def __new__(cls, **options):
        unet = pytest.importorskip("diffusers").UNet2DModel
        return unet(
            sample_size=16, block_out_channels=(32, 64), layers_per_block=1, dropout=0.1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"), **options,
        )  # fmt: skip


NETWORKS = {
    "w86763777": W86,
    "tqch": Tqch,
    "port": Port,
    "openai": OpenAI,
    "openai, added": lambda: OpenAI(use_scale_shift_norm=False, num_classes=5),
    "openai, updown": lambda: OpenAI(resblock_updown=True, num_head_channels=16),
    "openai, new order": lambda: OpenAI(use_new_attention_order=True),
    "diffusers": Diffusers,
}


def call(model, x: Tensor, t: Tensor) -> Tensor:
    labels = {"y": torch.tensor([1, 2])} if hasattr(model, "label_emb") else {}
    out = model(x, t, **labels)
    return getattr(out, "sample", out)


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 16, 16, generator=generator(1)), torch.tensor([3, 49])


def results(model, x: Tensor, *rest) -> list[Tensor]:
    """The output, and the gradients of its squares' sum: of x and of all parameters."""
    x = x.clone().requires_grad_()
    y = call(model, x, *rest) if rest else model(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, *trained))]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    """Outputs to 1e-5 of the largest, gradients to 2e-5 of their own or of the mean parameter's
    largest: those of biases before a norm are zeros of sums that cancel."""
    for k, (a, b) in enumerate(zip(found, expected, strict=True)):
        largest = b.abs().max()
        if k:
            largest = max(largest, torch.stack([g.abs().max() for g in expected[1:]]).mean())
        assert (a - b).abs().max() <= (2e-5 if k else 1e-5) * largest
        assert a.dtype == b.dtype
        assert a.shape == b.shape


def calls_of(stands: WholeNetwork) -> bool:
    """Whether the network's call was ours."""
    return stands._unet is not None


def accelerated(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return fastddpm.accelerate(model)


# ---- whole networks ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_known_networks(name):
    torch.manual_seed(0)
    model = randomised(NETWORKS[name]())
    x, t = batch()
    expected = results(model, x, t)
    own = {key: id(p) for key, p in model.named_parameters()}, list(model.state_dict())
    state = torch.get_rng_state()
    assert accelerated(model) is model
    assert torch.equal(state, torch.get_rng_state())
    assert own == ({key: id(p) for key, p in model.named_parameters()}, list(model.state_dict()))
    assert list(model.report().replaced) == [""]
    assert_close(results(model, x, t), expected)
    assert calls_of(model.forward)

    with torch.no_grad():
        expected = call(model, x, t)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(call(other, x, t), expected)
            assert calls_of(other.forward)
            assert other.forward.module is other
            randomised(other, seed=9)  # weights are read in every call, and are its own
            assert not torch.allclose(call(other, x, t), expected, rtol=0.1)
            other.undo()
            assert "forward" not in other.__dict__
            assert not hasattr(other, "report")
        assert torch.equal(call(model, x, t), expected)
        model.undo()
        assert not any(isinstance(m.__dict__.get("forward"), WholeNetwork) for m in model.modules())
        assert torch.allclose(call(model, x, t), expected, atol=1e-4)


def test_dropout_is_where_theirs_is():
    torch.manual_seed(0)
    model = accelerated(randomised(W86()).train())
    x, t = batch()
    ours = model.forward
    unet = ours.unet()
    assert unet.down[0].block[0].dropout is model.downblocks[0].block2[2]
    assert unet.up[1].block[1].dropout is model.upblocks[1].block2[2]
    with torch.no_grad():
        torch.manual_seed(1)
        a = model(x, t)
        b = model(x, t)
        assert calls_of(ours)
        assert not torch.equal(a, b)
        for block in model.upblocks:
            if hasattr(block, "block2"):
                block.block2[2] = nn.Dropout(0.1)  # the model's mode is its parts', new ones' too
        model.eval()
        assert torch.equal(model(x, t), model(x, t))
        assert torch.allclose(model(x, t), type(model).forward(model, x, t), atol=1e-3)


def test_sampling_takes_the_plan():
    torch.manual_seed(0)
    model = randomised(W86(T=12))
    options = {"seed": 3, "shape": (3, 16, 16), "diffusion": DIFFUSION, "progress": False}
    expected = fastddpm.sample(model, 2, **options)
    accelerated(model)
    engine = fastddpm.engine.make_engine(
        "auto", fastddpm.engine.runnable(model), DIFFUSION, device=torch.device("cpu")
    )
    assert (engine.name, engine.precision) == ("cpu_plan", "fp32")
    assert (fastddpm.sample(model, 2, **options) - expected).abs().max() <= 1e-4
    model.tail[2].register_forward_hook(lambda *_: None)
    assert fastddpm.engine.runnable(model) is model


@pytest.mark.parametrize("steps", [5, pytest.param(200, marks=pytest.mark.slow)])
def test_training_steps_stay_together(steps):
    torch.manual_seed(0)
    theirs = randomised(Tqch()).train()
    ours = accelerated(copy.deepcopy(theirs))
    optimisers = [torch.optim.Adam(model.parameters(), lr=2e-4) for model in (theirs, ours)]
    random, first = generator(1), None
    for _ in range(steps):
        x, eps = torch.randn(2, 4, 3, 8, 8, generator=random)
        t = torch.randint(0, 50, (4,), generator=random)
        losses = []
        for model, optimiser in zip((theirs, ours), optimisers, strict=True):
            optimiser.zero_grad()
            loss = (model(x, t) - eps).square().mean()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
        first = first or losses[0]
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert calls_of(ours.forward)
    assert losses[0] < 0.9 * first


def test_our_trainer_trains_it():
    torch.manual_seed(0)
    theirs = randomised(Tqch())
    losses = []
    for model in (copy.deepcopy(theirs), accelerated(copy.deepcopy(theirs))):
        trainer = fastddpm.Trainer(model, diffusion=DIFFUSION, precision="fp32")
        losses.append([float(trainer.step(images(2, 3, 16, 16, seed=k))) for k in range(2)])
    assert calls_of(model.forward)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_in_a_pipeline_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = randomised(Diffusers())
    pipeline = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(num_train_timesteps=20))
    pipeline.set_progress_bar_config(disable=True)
    options = {"batch_size": 2, "num_inference_steps": 3, "output_type": "np"}

    def draw():
        return pipeline(generator=generator(1), **options).images

    expected = draw()
    accelerated(pipeline.unet)
    assert abs(draw() - expected).max() <= 1e-5
    assert calls_of(unet.forward)
    with pytest.raises(ValueError, match=r"pipeline .* \.unet"):
        fastddpm.accelerate(pipeline)


@pytest.mark.parametrize(
    "change", ["hook", "parametrisation", "layer", "setting", "forward", "class"]
)
def test_a_changed_network_is_itself(monkeypatch, change):
    torch.manual_seed(0)
    model = accelerated(randomised(W86()))
    conv = model.middleblocks[0].block1[2]
    if change == "hook":
        conv.register_forward_hook(lambda module, args, y: 2 * y)
    elif change == "parametrisation":
        parametrize.register_parametrization(conv, "weight", Twice())
    elif change == "layer":
        model.middleblocks[0].block1[1] = nn.ReLU()
    elif change == "setting":
        model.middleblocks[0].block1[0].eps = 0.5
    elif change == "class":
        own = type(model.downblocks[0]).forward
        monkeypatch.setattr(type(model.downblocks[0]), "forward", lambda *a: 2 * own(*a))
    else:
        conv.forward = lambda x: 2 * type(conv).forward(conv, x)
    x, t = batch()
    with torch.no_grad():
        found = model(x, t)
        expected = type(model).forward(model, x, t)
        assert torch.equal(found, expected)
        again = copy.deepcopy(model) if change == "layer" else model
        assert torch.equal(again(x, t), expected)
    fastddpm.accelerate(model)
    if change in ("setting", "class", "layer"):
        assert "" in model.report().left
    else:
        assert "middleblocks.0.block1.2" in model.report().left[""]
    with torch.no_grad():
        assert torch.allclose(model(x, t), expected, atol=1e-4)


class Twice(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


class Louder(W86):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return 1.01 * super().forward(x, t)


class Drops(Tqch):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.1, self.training), t)


class Clamps(W86):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t).clamp(-10, 10)


class OtherEpsilon(Tqch):
    def __init__(self):
        super().__init__()
        self.middle[0].norm1.eps = 1e-5


@pytest.mark.parametrize("kind", [Louder, Drops, Clamps, OtherEpsilon])
def test_what_only_looks_like_a_known_network_is_not_taken_for_it(kind):
    torch.manual_seed(0)
    model = randomised(kind())
    x, t = batch()
    expected = results(model, x, t)
    fastddpm.accelerate(model)
    why = "has (eps, num_groups)" if kind is OtherEpsilon else "computes something else"
    assert why in model.report().left[""]
    assert "" not in model.report().replaced
    assert_close(results(model, x, t), expected)


def test_one_out_of_a_pickle_is_tried_again(monkeypatch):
    torch.manual_seed(0)
    model = accelerated(randomised(W86()))
    kept = pickle.dumps(model)
    own = W86.forward
    monkeypatch.setattr(W86, "forward", lambda *args: 2 * own(*args))  # as another version's
    x, t = batch()
    with torch.no_grad():
        assert torch.equal(pickle.loads(kept)(x, t), W86.forward(model, x, t))


def test_wrapped_and_replicated():
    """As Hugging Face's accelerate wraps a forward, and DataParallel copies a module."""
    torch.manual_seed(0)
    for model, inputs in (
        (randomised(W86()), batch()),
        (randomised(in_sequence()), (torch.randn(2, 3, 16, 16),)),
    ):
        with torch.no_grad():
            expected = model(*inputs)
            stands = accelerated(model).__dict__.get("forward") or model[5].forward
            replica = model._replicate_for_data_parallel()
            assert "forward" not in replica.__dict__
            model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)
            assert not torch.allclose(model(*inputs).float(), expected, atol=1e-5)
            model.undo()
            assert not stands.active
            own = torch.autocast("cpu", dtype=torch.bfloat16)(type(model).forward)
            assert torch.equal(model(*inputs), own(model, *inputs))


def test_calls_that_ours_does_not_take_are_its_own():
    torch.manual_seed(0)
    model = accelerated(randomised(W86()))
    x, t = batch()
    with pytest.raises(RuntimeError, match="channels"):
        model(x[:, :2], t)
    with pytest.raises(IndexError):
        model(x, t + 50)
    with pytest.raises(TypeError):
        model(x)
    y = model(x.bfloat16().float(), t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = model(x, t), type(model).forward(model, x, t)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert (found.float() - y).abs().max() <= 2 * (expected.float() - y).abs().max()
    exported = torch.func.functional_call(
        model, {name: 0.5 * p for name, p in model.named_parameters()}, (x, t)
    )
    halved = copy.deepcopy(model).undo()
    with torch.no_grad():
        for p in halved.parameters():
            p.mul_(0.5)
        assert torch.allclose(exported, halved(x, t), atol=1e-4 * float(exported.abs().max()))


# ---- any other network ---------------------------------------------------------------------------


class GroupNorm32(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type(x.dtype)


class AlmostNorm(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 if self.training else 1.001)


class OwnGroupNorm(nn.Module):
    def __init__(self, groups: int, channels: int):
        super().__init__()
        self.num_groups, self.num_channels, self.eps = groups, channels, 1e-5
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), None

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, 2 * self.weight, self.bias, self.eps)


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class Straight(nn.Module):
    """norm, silu, convolution as calls."""

    def __init__(self, norm=nn.GroupNorm):
        super().__init__()
        self.norm1, self.conv1 = norm(8, 64), nn.Conv2d(64, 64, 3, padding=1)
        self.norm2, self.conv2 = norm(8, 64), nn.Conv2d(64, 64, 3, padding=1)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(self.dropout(F.silu(self.norm2(h))))


class Branches(Straight):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        if self.training:
            h = h + 1
        return self.conv2(self.norm2(self.conv1(F.silu(h))))


class Peeks(nn.Sequential):
    """Its parts in another order than a Sequential's."""

    def forward(self, x: Tensor) -> Tensor:
        return self[2](self[1](self[0](x) * 2))


def in_sequence(norm=nn.GroupNorm, silu=nn.SiLU):
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), norm(8, 64), silu(), nn.Dropout(0.5),
        nn.Conv2d(64, 64, 3, padding=1), Straight(norm), nn.Conv2d(64, 64, 1),
    )  # fmt: skip


def count(monkeypatch) -> list[bool]:
    """Filled with whether each of our convolutions has a norm."""
    seen: list[bool] = []
    own = ops.convolution

    def convolution(*args, **options):
        seen.append("num_groups" in options)
        return own(*args, **options)

    monkeypatch.setattr(ops, "convolution", convolution)
    return seen


@pytest.mark.parametrize("norm", [nn.GroupNorm, GroupNorm32])
@pytest.mark.parametrize("silu", [nn.SiLU, Swish])
def test_chains(monkeypatch, norm, silu):
    torch.manual_seed(0)
    model = randomised(in_sequence(norm, silu))
    x = torch.randn(2, 3, 16, 16, generator=generator(2))
    expected = results(model, x)
    accelerated(model)
    seen = count(monkeypatch)
    assert_close(results(model, x), expected)
    assert seen == [True, True, True]
    assert "channels" in model.report().left["0"]
    assert "kernel_size" in model.report().left["6"]
    seen.clear()
    results(model.train(), x)  # dropouts are at work: of two chains the norms are theirs
    assert seen == [False, True, False]
    other = pickle.loads(pickle.dumps(copy.deepcopy(model.eval())))
    seen.clear()
    assert_close(results(other, x), expected)
    assert seen == [True, True, True]
    model.undo()
    seen.clear()
    assert torch.equal(model(x), expected[0])
    assert not seen


@pytest.mark.parametrize("kind", [AlmostNorm, OwnGroupNorm])
def test_a_norm_that_only_looks_like_one(monkeypatch, kind):
    torch.manual_seed(0)
    model = randomised(in_sequence(kind))
    x = torch.randn(2, 3, 16, 16, generator=generator(2))
    expected = results(model, x)
    accelerated(model)
    seen = count(monkeypatch)
    assert_close(results(model, x), expected)
    assert seen
    assert not any(seen)
    for name in ("1", "5.norm1", "5.norm2"):
        assert "only looks like" in model.report().left[name]


class OwnConv(nn.Module):
    """As of networks that bring their own layers: a convolution, or one behind a doubling."""

    def __init__(self, up: bool = False, c: int = 64):
        super().__init__()
        self.up = up
        self.weight, self.bias = nn.Parameter(torch.randn(c, c, 3, 3)), nn.Parameter(torch.randn(c))
        self.register_buffer("filter", None)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2) if self.up else x
        return F.conv2d(x, self.weight, padding=1) + self.bias[:, None, None]


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight / self.weight.std(), self.bias, padding=1)


def test_convolutions_of_other_classes(monkeypatch):
    torch.manual_seed(0)
    own = nn.Sequential(OwnConv(), OwnConv(up=True), Standardised(64, 64, 3, padding=1))
    model = randomised(nn.Sequential(own, nn.ConvTranspose2d(64, 64, 3, padding=1)))
    x = torch.randn(2, 64, 16, 16, generator=generator(2))
    expected = results(model, x)
    accelerated(model)
    assert list(model.report().replaced) == ["0.0"]
    assert sorted(model.report().left) == ["0.1", "0.2", "1"]
    seen = count(monkeypatch)
    for other in (model, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert_close(results(other, x), expected)
    assert len(seen) == 3
    model[0][0].up = True
    assert model(x).shape[2] == 64
    monkeypatch.setattr(OwnConv, "forward", lambda self, x: x)
    assert other(x).shape[2] == 16
    assert len(seen) == 3


def test_hooks_and_parametrisations_are_kept(monkeypatch):
    torch.manual_seed(0)
    model = randomised(in_sequence())
    x = torch.randn(2, 3, 16, 16, generator=generator(2))
    model[4].register_forward_hook(lambda module, args, y: 2 * y)
    parametrize.register_parametrization(model[5].conv2, "weight", Twice())
    expected = results(model, x)
    accelerated(model)
    left = model.report().left
    assert "hook" in left["4"]
    assert "parametrisation" in left["5.conv2"]
    seen = count(monkeypatch)
    assert_close(results(model, x), expected)
    assert seen == [True]
    model[5].norm1.register_forward_hook(lambda module, args, y: y + 1)  # after the fact
    shifted = results(model, x)
    assert_close(shifted, results(copy.deepcopy(model).undo(), x))
    assert not torch.allclose(shifted[0], expected[0])


def test_what_is_no_chain_is_none(monkeypatch):
    """A forward that branches is not traced, one of a Sequential's own is not taken for its."""
    torch.manual_seed(0)
    peeks = Peeks(nn.GroupNorm(8, 64), nn.SiLU(), nn.Conv2d(64, 64, 3, padding=1))
    model = randomised(nn.Sequential(Branches(), peeks))
    x = torch.randn(2, 64, 16, 16, generator=generator(2))
    for training in (False, True):
        undo(model)
        expected = results(model.train(training), x)
        accelerated(model)
        seen = count(monkeypatch)
        assert_close(results(model, x), expected)
        assert seen == [False, False, False]
        monkeypatch.undo()
    assert "uses training" in model.report().left["0.norm1"]


def test_small_steps_of_training_are_left(monkeypatch):
    monkeypatch.undo()
    torch.manual_seed(0)
    model = accelerated(randomised(W86()))
    x, t = batch()
    model(x, t).sum().backward()
    assert not calls_of(model.forward)
    with torch.no_grad():
        model(x, t)
    assert calls_of(model.forward)


def test_slower_shapes_are_left(monkeypatch):
    model = accelerated(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1)))
    seen = count(monkeypatch)
    x = torch.randn(1, 64, 4, 4)
    model(x)
    assert not seen
    with torch.no_grad():
        model(x)
        assert seen == [False]
        model.double()(x.double())
        assert seen == [False]


def test_the_wrapper_and_the_process_around_a_network():
    class Process(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = W86()

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.model(x, t)

    torch.manual_seed(0)
    model = accelerated(randomised(Process()))
    assert list(model.report().replaced) == ["model"]
    x, t = batch()
    model(x, t)
    assert calls_of(model.model.forward)


def test_nothing_to_replace():
    with pytest.warns(UserWarning, match="nothing in a Linear"):
        model = fastddpm.accelerate(nn.Linear(2, 2))
    assert not model.report().replaced
    with pytest.warns(UserWarning, match=r"fastddpm\.UNet already"):
        fastddpm.accelerate(tiny_unet())
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        fastddpm.accelerate(lambda x, t: x)
    with pytest.raises(ValueError, match="not called"):
        report(nn.Linear(2, 2))


def test_a_model_with_a_report_of_its_own():
    class Own(nn.Sequential):
        def report(self):
            return "mine"

    model = accelerated(Own(nn.Conv2d(64, 64, 3, padding=1)))
    assert model.report() == "mine"
    assert "0" in report(model).replaced
    assert "convolution" in str(report(model))
    assert isinstance(model[0].forward, Convolution)
    model.undo()
    assert "forward" not in model[0].__dict__


def test_sources_follow_every_element():
    weights = {
        "a.weight": torch.randn(6, 4, 1, 1), "b.weight": torch.randn(6, 4), "c": torch.randn(5),
        "d": torch.randn(2, 3, 3, 3),
    }  # fmt: skip

    def convert(w):
        return {
            "joined": torch.cat((w["b.weight"], w["a.weight"].flatten(1))),
            "rows": w["a.weight"].flatten(1)[[5, 0, 3]],
            "columns": w["b.weight"][:, [3, 1]],
            "same": w["c"], "image": w["d"], "flat": w["a.weight"].flatten(1),
        }  # fmt: skip

    found = traced(weights, convert)
    for name, expected in convert(weights).items():
        source = found[name]
        assert torch.equal(source.of([weights[each] for each in source.names]), expected)
    assert found["same"].of([weights["c"]]) is weights["c"]
    with pytest.raises(ValueError, match="twice"):
        traced(weights, lambda w: {"twice": 2.0 * w["c"]})


def test_under_distributed_data_parallel():
    torch.manual_seed(0)
    model = randomised(OpenAI())
    x, t = batch()
    expected = results(model, x, t)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(accelerated(model))
        wrapped(x, t).square().sum().backward()
        assert calls_of(model.forward)
        assert_close([p.grad for p in model.parameters()], expected[2:])
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("flag", ["use_checkpoint", "gradient_checkpointing"])
def test_blocks_are_computed_again_where_theirs_are(flag):
    torch.manual_seed(0)
    model = randomised(OpenAI())
    x, t = batch()
    expected = results(model, x, t)
    setattr(model, flag, True)
    stands = accelerated(model).forward
    made: list[bool] = []
    empty = stands._empty
    stands._empty = lambda: made.append(True) or empty()
    for _ in range(2):
        assert_close(results(model, x, t), expected)
    assert len(made) == 2  # each call's own, as the backward reads its weights


@pytest.mark.slow
def test_compiled():
    torch.manual_seed(0)
    for model, inputs in (
        (randomised(W86()), batch()),
        (randomised(in_sequence()), (torch.randn(2, 3, 16, 16),)),
    ):
        expected = model(*inputs)
        compiled = torch.compile(accelerated(model), backend="eager", fullgraph=True)
        assert torch.allclose(compiled(*inputs), expected, atol=1e-4)
