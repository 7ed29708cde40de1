"""What OpenAI's networks have and the paper's has not: scale and shift after a norm, heads by
number, resampling in residual blocks, classes. Each alone and all together, in every way that a
U-Net is computed."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from openai_unet import openai_unet
from test_cuda_graph import Recorder
from test_training import assert_same, batches, state, trainer
from torch import nn
from toy import SCHEDULE, generator, images, tiny_unet

from fastddpm import Diffusion, Schedule, UNet, _native, cli, ops, sample
from fastddpm.checkpoint import read_tensors, write_tensors
from fastddpm.engine import choose
from fastddpm.engine.cpu_plan import CpuPlan, build_plan
from fastddpm.engine.cuda_graph import CudaGraph
from fastddpm.engine.cuda_plan import CudaPlan
from fastddpm.engine.eager import Eager
from fastddpm.engine.gpu_network import Network
from fastddpm.training.recipe import read_recipe
from fastddpm.training.run_folder import STATE
from fastddpm.training.working_copies import WorkingCopies
from fastddpm.unet import walk as unet_walk
from fastddpm.unet.plain import foreign, unusual
from fastddpm.unet.walk import CpuWalk, Walk

CPU = torch.device("cpu")
SHORT = Diffusion(Schedule.linear(3, 0.1, 0.3))
ALL = {
    "scale_shift_norm": True, "num_heads": 4, "resblock_updown": True, "num_classes": 5,
}  # fmt: skip
LARGE = {"channel_mult": (1, 2, 3), "num_res_blocks": 2, "attention_levels": (0, 2)}
CASES = [{name: value} for name, value in ALL.items()] + [ALL, {**ALL, **LARGE, "in_channels": 3}]
IDS = [*ALL, "all", "all of a large one"]
WAYS = {"modules": None, "gpu": Walk, "cpu": CpuWalk}
planned = pytest.mark.skipif(_native.C is None, reason="plans need the native module")


def inputs(model, n=3, seed=1):
    """x, t and the classes, or none where the model has none."""
    x = torch.randn(n, model.in_channels, *model.image_size, generator=generator(seed))
    classes = model.config["num_classes"]
    return x, torch.tensor([7, 0, 11] * n)[:n], classes and torch.arange(4, 4 + n) % classes


def named(y) -> dict[str, torch.Tensor]:
    return {} if y is None else {"y": y}


@pytest.fixture(params=WAYS)
def walking(request, monkeypatch):
    """forward takes this way on a CPU."""
    way = WAYS[request.param]
    monkeypatch.setattr(unet_walk, "WAYS", {} if way is None else {"cpu": way})
    return way


def results(function, model, x, t, y):
    """The output and its gradient for x and every parameter."""
    x = x.clone().requires_grad_()
    out = function(x, t, y)
    grad = torch.randn(out.shape, generator=generator(9)).to(out.dtype)
    return [out, *torch.autograd.grad(out, [x, *model.parameters()], grad)]


# ---- the network ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [*CASES, ALL], ids=[*IDS, "all, computed again"])
def test_it_is_openais_formula(options, walking, request):
    """Output and all gradients, in float64; sinusoids are float32 in both."""
    again = "computed again" in request.node.name
    model = tiny_unet(**options).double().checkpoint_blocks(again)
    assert foreign(model) is None
    assert unusual(model) is None
    x, t, y = inputs(model)
    got = results(model, model, x.double(), t, y)
    truth = results(lambda *a: openai_unet(model, *a), model, x.double(), t, y)
    for a, b in zip(got, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("options", CASES[-1:] + CASES[:1], ids=["all of a large one", "scale"])
def test_it_is_as_exact_in_float32_and_under_autocast(options, walking):
    model = tiny_unet(**options)
    x, t, y = inputs(model)
    truth = copy.deepcopy(model).double()
    truth = results(lambda *a: openai_unet(truth, *a), truth, x.double(), t, y)
    size = torch.cat([b.flatten() for b in truth]).norm()

    def error(got):
        return sum((a - b).square().sum() for a, b in zip(got, truth, strict=True)).sqrt() / size

    assert error(results(model, model, x, t, y)) < 1e-5

    def rounded(*arguments):
        with torch.autocast("cpu", torch.bfloat16):
            return model(*arguments)

    assert error(results(rounded, model, x, t, y)) < 0.05
    with torch.no_grad():
        half = copy.deepcopy(model).bfloat16()(x, t, y)
    assert (half - truth[0]).norm() < 0.05 * truth[0].norm()


@pytest.mark.parametrize("options", CASES, ids=IDS)
def test_the_gpus_network_is_openais_formula(options):
    model = tiny_unet(**options).double()
    x, _, y = inputs(model)
    t = torch.full((3,), 7)
    network = Network(model, torch.arange(12), torch.float64)
    with torch.no_grad():
        truth = openai_unet(model, x.double(), t, y)
        torch.testing.assert_close(model(x.double(), t, y), truth, rtol=0, atol=1e-7)
    torch.testing.assert_close(network(x, t[:1], y), truth, rtol=0, atol=1e-7)
    for p in model.parameters():
        p.data.mul_(0.5)
    network.refresh()
    with torch.no_grad():
        torch.testing.assert_close(
            network(x, t[:1], y), openai_unet(model, x.double(), t, y), rtol=0, atol=1e-7
        )


@pytest.mark.parametrize("missing", ["conv1", "conv2", "temb_proj", "norm1", "norm2"])
@pytest.mark.parametrize("place", ["down.0.downsample", "up.1.upsample", "mid.block_1"])
def test_a_part_may_have_no_bias(missing, place, monkeypatch):
    model = tiny_unet(**ALL).double()
    getattr(model.get_submodule(place), missing).bias = None
    x, _, y = inputs(model)
    t = torch.full((3,), 7)
    got = []
    with torch.no_grad():
        for way in WAYS.values():
            monkeypatch.setattr(unet_walk, "WAYS", {} if way is None else {"cpu": way})
            got.append(model(x.double(), t, y))
    got.append(Network(model, torch.arange(12), torch.float64)(x, t[:1], y))
    for other in got[1:]:
        torch.testing.assert_close(other, got[0], rtol=0, atol=1e-12)


def test_only_bfloat16_products_get_copies():
    """A residual block's biases are added in float32, wherever the block is."""
    model = tiny_unet(**ALL)
    copies = WorkingCopies(model)
    names = dict(model.named_parameters())
    copied = {name for name, p in names.items() for _, _, q, _ in copies._places if p is q}
    assert "down.0.downsample.conv1.weight" in copied
    assert not {"down.0.downsample.conv1.bias", "label_emb.weight"} & copied
    plain = WorkingCopies(tiny := tiny_unet())
    assert any(q is tiny.down[0].downsample.conv.bias for _, _, q, _ in plain._places)


def test_heads_by_number_are_heads_by_channels():
    x, t, _ = inputs(model := tiny_unet(num_heads=4))
    other = tiny_unet(head_dim=4)  # of the one width of 16 that attends
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(x, t), other(x, t))


def test_options_that_are_off_change_nothing():
    off = {"scale_shift_norm": False, "num_heads": None, "resblock_updown": False}
    model, plain = tiny_unet(**off, num_classes=None), tiny_unet()
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert model.config == plain.config
    x, t, _ = inputs(model)
    with torch.no_grad():
        assert torch.equal(model(x, t), plain(x, t))
        assert torch.equal(plain(x, t, None), plain(x, t))


@pytest.mark.slow
def test_compiles_without_breaks():
    model = tiny_unet(**ALL)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    x, t, y = inputs(model)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, t, y), model(x, t, y))


def test_a_saved_model_is_the_same(tmp_path):
    model = tiny_unet(**ALL)
    model.save_pretrained(tmp_path)
    loaded = UNet.from_pretrained(tmp_path)
    assert {k: loaded.config[k] for k in ALL} == ALL
    x, t, y = inputs(model)
    with torch.no_grad():
        assert torch.equal(loaded(x, t, y), model(x, t, y))


def test_a_config_of_before_the_options_loads(tmp_path):
    tiny_unet().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config.pop("digest", None)
    config["unet"] = {k: v for k, v in config["unet"].items() if k not in ALL}
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text(
        json.dumps({k: config[k] for k in ("format", "unet", "diffusion")})
    )
    weights, _ = read_tensors(tmp_path / "model.safetensors")
    write_tensors(tmp_path / "old" / "model.safetensors", weights)
    assert UNet.from_pretrained(tmp_path / "old").config == tiny_unet().config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "num_heads must divide every attention width; 3 does not divide 16"),
        ({"num_heads": 0}, "num_heads must be a positive integer; got 0"),
        ({"num_heads": 2.0}, "num_heads must be a positive integer; got 2.0"),
        ({"num_heads": 2, "head_dim": 8}, "head_dim and num_heads .* one of them; got 8 and 2"),
        ({"num_classes": 0}, "num_classes must be a positive integer; got 0"),
        ({"num_classes": True}, "num_classes must be a positive integer; got True"),
        ({"num_classes": 2**40}, "num_classes must be at most"),
        ({"scale_shift_norm": 1}, "scale_shift_norm must be true or false; got 1"),
        ({"resblock_updown": "yes"}, "resblock_updown must be true or false; got 'yes'"),
    ],
    ids=str,
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_unet(**options)


BAD_LABELS = [
    (None, r"it needs y, \(3,\) int64 in 0 .. 4; got no y"),
    ([0, 1, 2], "got list"),
    (torch.tensor([0, 1]), r"got shape \(2,\)"),
    (torch.tensor([[0], [1], [2]]), r"got shape \(3, 1\)"),
    (torch.tensor([0, 1, 2], dtype=torch.int32), "torch.int32"),
    (torch.tensor([0.0, 1, 2]), "torch.float32"),
    (torch.tensor([0, 1, 5]), r"y must be in 0 .. 4; got 5"),
    (torch.tensor([0, -1, 4]), r"y must be in 0 .. 4; got -1"),
]


@pytest.mark.parametrize(("y", "message"), BAD_LABELS, ids=[m for _, m in BAD_LABELS])
def test_bad_labels_are_named_everywhere(y, message):
    model = tiny_unet(num_classes=5)
    x, t, _ = inputs(model)
    index, run = torch.arange(3), trainer(model)
    engines = [Eager, CpuPlan] if _native.C is not None else [Eager]
    for call in (
        lambda: model(x, t, y),
        lambda: run.step(images(3, 1, 8, 8), y),
        lambda: model.diffusion.loss(
            model, x, t=t, seed=0, sample_index=index, model_kwargs=named(y)
        ),
        *(
            lambda e=e: e(model, model.diffusion, device=CPU).run(
                x, seed=0, sample_index=index, model_kwargs=named(y)
            )
            for e in engines
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert run.step_count == 0


def test_labels_of_a_model_without_classes_are_named():
    model = tiny_unet()
    x, t, _ = inputs(model)
    y = torch.zeros(3, dtype=torch.int64)
    for call in (lambda: model(x, t, y), lambda: trainer(model).step(images(3, 1, 8, 8), y)):
        with pytest.raises(ValueError, match="y was given, and the model has no classes"):
            call()


# ---- engines -------------------------------------------------------------------------------------


@planned
@pytest.mark.parametrize("options", CASES, ids=IDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_native_plan_is_openais_formula(options, precision):
    model = tiny_unet(**options)
    plan = CpuPlan(model, model.diffusion, device=CPU, precision=precision)
    x, _, y = inputs(model, 9)
    t = torch.full((9,), 7)
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        truth = openai_unet(double, x.double(), t, y)
        eager = copy.deepcopy(model).bfloat16()(x, t, y) if precision == "bf16" else model(x, t, y)
    whole = plan.output(x, 7, t, **named(y))
    # Products by Winograd's F(4x4) err by up to 8 times the plain sum's error.
    factor = 1.5 if precision == "bf16" else 12
    assert (whole - truth).norm() < factor * (eager - truth).norm()
    for n in (1, 2, 5):
        part = plan.output(x[:n], 7, t[:n], **named(None if y is None else y[:n]))
        assert torch.equal(part, whole[:n]), "an image's bits depend on no other's"
    if y is not None:
        other = plan.output(x, 7, t, y=(y + 1) % 5)
        assert not torch.equal(other[0], whole[0])


@planned
def test_each_algorithm_of_a_plan_computes_the_options():
    model = tiny_unet(**ALL, channels=16, num_groups=8)
    x, _, _ = inputs(model)
    engine = CpuPlan(model, model.diffusion, device=CPU, precision="fp32")
    rows = engine._rows(7, torch.tensor([1, 2, 2]))
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(
            x.double(), torch.full((3,), 7), torch.tensor([1, 2, 2])
        )
    for algorithm in ("direct", "winograd_2", "winograd_4"):
        plan = build_plan(model, 8, 8, algorithm)
        for threads in (1, 2):
            out = torch.full_like(x, torch.nan)
            assert plan.forward(x, rows, out, threads)
            assert (out - truth).norm() < 1e-5 * truth.norm()


def run_of(engine, model, precision="fp32", n=3, **options):
    x, _, y = inputs(model, n)
    made = engine(model, SHORT, device=CPU, precision=precision, **options)
    stream = {"seed": 5, "sample_index": torch.arange(n)}
    return made, made.run(x, **stream, model_kwargs=named(y))


@pytest.mark.parametrize("options", CASES[2:5], ids=IDS[2:5])
def test_chains_of_all_engines_are_eagers(options):
    model = tiny_unet(**options)
    _, expected = run_of(Eager, model)
    engines = [(CudaGraph, {"record": Recorder()}), (CudaPlan, {"record": Recorder()})]
    if _native.C is not None:
        engines.append((CpuPlan, {}))
    for engine, more in engines:
        made, x = run_of(engine, model, **more)
        torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)
        if more:  # a smaller batch, of other classes, is served by the same recording
            x, _, y = inputs(model)
            stream = {"seed": 5, "sample_index": torch.arange(2)}
            y = None if y is None else y.flip(0)[:2]
            got = made.run(x[:2], **stream, model_kwargs=named(y))
            alone = Eager(model, SHORT, device=CPU, precision="fp32")
            want = alone.run(x[:2], **stream, model_kwargs=named(y))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
            assert more["record"].tapes == 1


def test_a_graph_of_another_model_takes_labels_too():
    def model(x, t, y):
        return torch.sin(x + y[:, None, None, None] * t[:, None, None, None])

    diffusion, x = Diffusion(SCHEDULE), torch.randn(3, 1, 4, 4, generator=generator())
    stream = {"seed": 5, "sample_index": torch.arange(3)}
    graph = CudaGraph(model, diffusion, device=CPU, record=Recorder())
    eager = Eager(model, diffusion, device=CPU)
    for y in (
        torch.tensor([0.5, 1.0, 2.0]),
        torch.tensor([3.0, 0.0, 1.0]),
        torch.tensor([1, 2, 0]),
    ):
        got, want = (e.run(x, **stream, model_kwargs={"y": y}) for e in (graph, eager))
        torch.testing.assert_close(got, want)
    with pytest.raises(ValueError, match="y must be a tensor of 3 rows here; got"):
        graph.run(x, **stream, model_kwargs={"y": torch.zeros(2)})
    with pytest.raises(
        ValueError, match="engine 'cuda_graph' takes no 'z' for the model, only 'y'"
    ):
        graph.run(x, **stream, model_kwargs={"y": y, "z": y})


@planned
def test_sample_takes_the_plan_with_labels():
    model = tiny_unet(**ALL)
    assert choose("auto", model, CPU, "fp32", (), ("y",))[0] is CpuPlan
    y = torch.arange(7) % 5
    options = {"precision": "fp32", "progress": False, "model_kwargs": {"y": y}}
    got = sample(model, 7, batch_size=3, **options)
    want = sample(model, 7, engine="eager", **options)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="got no y"):
        sample(model, 7, progress=False)


# ---- training ------------------------------------------------------------------------------------

TRAINED = {**ALL, "dropout": 0.3}
SHAPE = (1, 8, 8)


def labels(k: int, n: int = 4) -> torch.Tensor:
    return torch.arange(k, k + n) % 5


def test_a_step_is_the_gradient_of_the_loss_with_the_labels():
    model = tiny_unet(**ALL)
    run = trainer(copy.deepcopy(model), flip=False, lr=1e-9)
    (x0,), y = batches(1, size=4, shape=SHAPE), labels(2)
    t, _ = ops.choices(torch.arange(4), seed=0, step=2**32 - 1, levels=run.diffusion.T)
    loss = run.diffusion.loss(
        lambda x, t: openai_unet(model, x, t, y), x0, t=t, seed=0, sample_index=torch.arange(4)
    ).mean()
    torch.testing.assert_close(run.step(x0, y), loss.detach(), rtol=1e-4, atol=1e-5)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    for (name, p), g in zip(run.network.named_parameters(), expected, strict=True):
        moment = run.optimizer.state[p]["exp_avg"]  # 0.1 of the gradient, clipped to a norm of 1
        clipped = g / max(1.0, torch.stack([e.norm() for e in expected]).norm().item())
        torch.testing.assert_close(moment * 10, clipped, rtol=2e-3, atol=2e-6, msg=name)


@pytest.mark.parametrize("way", ["again", "accumulate", "gpu", "bf16 on a gpu"])
def test_steps_are_the_same_in_every_way(way, monkeypatch):
    """Dropout's masks, too: the blocks that resample have streams of their own."""
    data = batches(3, size=4, shape=SHAPE)
    model = tiny_unet(**TRAINED)
    if "gpu" in way:
        monkeypatch.delitem(unet_walk.WAYS, "cpu")
    precision = "bf16" if "bf16" in way else "fp32"
    plain = trainer(copy.deepcopy(model), precision=precision)
    before = [plain.step(x0, labels(k)).item() for k, x0 in enumerate(data)]
    if "gpu" in way:
        monkeypatch.setattr(unet_walk, "WAYS", {"cpu": CpuWalk})
    other = trainer(
        copy.deepcopy(model).checkpoint_blocks(way == "again"),
        accumulate=3 if way == "accumulate" else 1, precision=precision,
    )  # fmt: skip
    after = [other.step(x0, labels(k)).item() for k, x0 in enumerate(data)]
    if way == "again":
        assert before == after
        assert_same(state(plain), state(other))
    else:
        assert before == pytest.approx(after, rel=0.05 if precision == "bf16" else 1e-4)


def test_replays_take_the_very_steps():
    record = Recorder()
    run, straight = (trainer(tiny_unet(**TRAINED), record=r, read_every=4) for r in (record, None))
    for k, x0 in enumerate(batches(5, size=3, shape=SHAPE)):
        losses = run.step(x0, labels(k, 3)), straight.step(x0, labels(k, 3))
        assert torch.equal(*losses), k
    assert (record.tapes, record.replays) == (1, 3)  # the first two as they are
    assert_same(state(run), state(straight))


def test_it_learns_what_a_label_means():
    """Images are black or white by their class, and the prediction of noise is grey."""
    model = tiny_unet(num_classes=2, diffusion=Diffusion(SCHEDULE, "x0"))
    run = trainer(model, diffusion=model.diffusion, lr=1e-2, flip=False, ema_decay=0.0)
    y = torch.tensor([0, 1] * 8)
    x0 = (255 * y).to(torch.uint8)[:, None, None, None].expand(16, 1, 8, 8).contiguous()
    for _ in range(20):
        run.step(x0, y)
    x = torch.randn(2, 1, 8, 8, generator=generator())
    with torch.no_grad():
        both = [
            run.ema_model()(x, torch.tensor([11, 11]), torch.full((2,), k)).mean() for k in (0, 1)
        ]
    assert both[1] - both[0] > 1.0


def test_another_networks_step_takes_labels():
    class Labelled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.emb = nn.Conv2d(1, 1, 3, padding=1), nn.Linear(2, 1)

        def forward(self, x, t, y=None):
            self.seen = y
            return self.conv(x) if y is None else self.conv(x) + self.emb(y)[:, :, None, None]

    run, x0 = trainer(Labelled()), images(4, 1, 6, 5)
    y = torch.randn(4, 2, generator=generator())
    run.step(x0, y)
    assert torch.equal(run.network.seen, y)
    assert run.network.emb.weight.grad is None or run.optimizer.state[run.network.emb.weight]
    with pytest.raises(ValueError, match=r"y must be a tensor of 4 rows, one for each .* \(3, 2\)"):
        run.step(x0, y[:3])


def test_a_run_of_before_the_options_goes_on(tmp_path):
    run = trainer(tiny_unet())
    (x0,) = batches(1, size=2, shape=SHAPE)
    run.step(x0)
    run.save(tmp_path)
    tensors, metadata = read_tensors(tmp_path / STATE, ours=True)
    settings = json.loads(metadata["trainer"])
    settings["model"] = {k: v for k, v in settings["model"].items() if k not in ALL}
    write_tensors(tmp_path / STATE, tensors, {"trainer": json.dumps(settings)})
    other = trainer(tiny_unet(seed=3))
    other.load(tmp_path)
    assert_same(state(run), state(other))
    with pytest.raises(ValueError, match="model: scale_shift_norm is False there and True here"):
        trainer(tiny_unet(scale_shift_norm=True)).load(tmp_path)


# ---- the command line ----------------------------------------------------------------------------


def test_a_recipe_has_what_a_run_can_have(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[model]\nnum_heads = 2\nscale_shift_norm = true\nresblock_updown = true\n")
    assert read_recipe(recipe).values == {
        "model.num_heads": 2, "model.scale_shift_norm": True, "model.resblock_updown": True,
    }  # fmt: skip
    recipe.write_text("[model]\nnum_classes = 10\n")
    with pytest.raises(ValueError, match=r"no 'num_classes'; data have no labels here"):
        read_recipe(recipe)


def test_a_run_trains_with_the_options(tmp_path):
    import numpy as np

    np.save(tmp_path / "data.npy", images(8, 8, 8).numpy())
    out = tmp_path / "run"
    words = (
        f"train --data {tmp_path / 'data.npy'} --out {out} --model-channels 8 --channel-mult 1,2 "
        "--num-res-blocks 1 --num-groups 4 --attention-levels 1 --num-heads 2 --scale-shift-norm "
        "--resblock-updown --T 12 --beta-start 0.01 --beta-end 0.35 --steps 2 --batch-size 2 "
        "--sample-every 0 --device cpu --quiet"
    )
    assert not cli.main(words.split())
    config = UNet.from_pretrained(out).config
    assert (config["num_heads"], config["scale_shift_norm"], config["resblock_updown"]) == (
        *(2, True, True),
    )
    assert not cli.main([*words.replace("--steps 2", "--steps 3").split(), "--resume"])
