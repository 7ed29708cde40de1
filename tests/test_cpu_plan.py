"""The native engine of the CPU: each layer of a plan against float64, whole U-Nets, its bits."""

from __future__ import annotations

import copy
import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from compare import assert_exact
from sanitized import BF16, EMULATED, FLAGS, KERNELS, Compiler, needs_compiler, run_checks
from torch import nn
from toy import SCHEDULE, generator, tiny_unet

import fastddpm
from fastddpm import Diffusion, UNet, _native
from fastddpm.engine import choose, cpu_plan, make_engine
from fastddpm.engine.cpu_plan import CpuPlan, build_plan, time_rows, unsupported
from fastddpm.engine.eager import Eager

pytestmark = pytest.mark.skipif(_native.C is None, reason="plans need the native module")

CPU = torch.device("cpu")
# How much more than the sum as it is written the algorithms err at most: see layers/winograd.h.
FACTOR = {"direct": 1, "winograd_2": 1, "winograd_4": 8}


@pytest.fixture(params=_native.isas_available())
def isa(request):
    before = _native.isa()
    _native.use_isa(request.param)
    yield request.param
    _native.use_isa(before)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed))


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Values that bfloat16 holds: a plan in bfloat16 hands them on as they are."""
    return x.bfloat16().float()


class Layer:
    """One convolution of a plan, from inputs that a first 1x1 convolution of identity hands on."""

    def __init__(
        self,
        c_in,
        c_out,
        kernel,
        *,
        size=(5, 7),
        n=3,
        norm=0,
        residual=False,
        time=False,
        **options,
    ):
        self.options = {"before": kernel // 2, "after": kernel // 2, **options}
        self.sizes = c_in if isinstance(c_in, tuple) else (c_in,)
        self.size, self.n, self.kernel, self.norm, self.time = size, n, kernel, norm, time
        c = sum(self.sizes)
        self.x = rounded(3 + 2 * random(n, c, *size, seed=1))
        self.weight = random(c_out, c, kernel, kernel, seed=2) / (c * kernel**2) ** 0.5
        self.bias, self.gamma, self.beta = (random(k, seed=3 + k) for k in (c_out, c, c))
        self.row = random(c_out + 2, seed=6) if time else random(0, seed=6)
        self.residual = None
        if residual:
            self.residual = rounded(random(*self.expected(torch.float32).shape, seed=7))

    def expected(self, dtype) -> torch.Tensor:
        x, weight, bias = self.x.to(dtype), self.weight.to(dtype), self.bias.to(dtype)
        if self.norm:
            x = F.silu(F.group_norm(x, self.norm, self.gamma.to(dtype), self.beta.to(dtype), 1e-6))
        if self.options.get("repeat", 1) == 2:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        before, after = self.options["before"], self.options["after"]
        x = F.pad(x, (before, after, before, after))
        y = F.conv2d(x, weight, bias, stride=self.options.get("stride", 1))
        if self.time:
            y = y + self.row[2:].to(dtype)[:, None, None]
        return y if self.residual is None else y + self.residual.to(dtype)

    def actual(self, algorithm: str, threads=1) -> torch.Tensor:
        """The plan's input is the sources and the residual side by side."""
        x, sources = self.x, []
        expected = self.expected(torch.float32)
        if self.residual is not None:
            assert self.residual.shape[2:] == self.x.shape[2:]
            x = torch.cat((x, self.residual), dim=1)
        bf16 = algorithm == "bf16"
        plan = _native.C.cpu.Plan(*self.size, x.shape[1], bf16=bf16)
        first = 0
        for c in (*self.sizes, *([] if self.residual is None else [expected.shape[1]])):
            pick = torch.zeros(c, x.shape[1])
            pick[range(c), range(first, first + c)] = 1
            sources.append(plan.convolution("pick", [0], pick, [0.0] * c, 1))
            first += c
        options = dict(self.options)
        if self.residual is not None:
            options["residual"] = sources.pop()
        if self.norm:
            options["norm"] = (self.norm, 1e-6, self.gamma.tolist(), self.beta.tolist(), True)
        if self.time:
            options["time_offset"] = 2
        weight = self.weight.reshape(len(self.weight), -1)
        bias = self.bias.tolist()
        plan.finish(
            plan.convolution(
                "layer", sources, weight, bias, self.kernel, algorithm=algorithm, **options
            )
        )
        out = torch.full_like(expected, torch.nan)
        plan.forward(x, self.row, out, threads)
        return out

    def check(self, algorithm: str, **options) -> None:
        truth, eager = self.expected(torch.float64), self.expected(torch.float32)
        if algorithm == "bf16":
            assert_exact(self.actual(algorithm, **options), truth, self.expected(torch.bfloat16))
            return
        factor = FACTOR[algorithm]
        spread = eager.double() + (factor - 1) * (
            eager.double() - truth
        )  # eager's error, times factor
        assert_exact(self.actual(algorithm, **options), truth, spread, ulps=4 * factor)


ALGORITHMS = ("direct", "winograd_2", "winograd_4")
LAYERS = (*ALGORITHMS, "bf16")


@pytest.mark.parametrize("algorithm", LAYERS)
@pytest.mark.parametrize(("c_in", "c_out"), [(1, 1), (3, 7), (5, 16), (16, 33), (40, 3), (48, 64)])
def test_convolution_of_any_channel_count(isa, algorithm, c_in, c_out):
    Layer(c_in, c_out, 3).check(algorithm)


@pytest.mark.parametrize("algorithm", LAYERS)
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 4), (9, 6), (13, 1), (3, 32)], ids=str)
def test_convolution_of_any_size(isa, algorithm, size):
    Layer(6, 20, 3, size=size).check(algorithm)


@pytest.mark.parametrize("algorithm", LAYERS)
def test_convolution_with_everything(isa, algorithm):
    options = {"norm": 3, "residual": True, "time": True}
    Layer((5, 13), 10, 3, size=(6, 5), n=2, **options).check(algorithm, threads=2)


@pytest.mark.parametrize("n", [1, 2, 7, 33])
@pytest.mark.parametrize("algorithm", LAYERS)
def test_batches(algorithm, n):
    Layer(8, 24, 3, size=(3, 5), n=n, norm=4).check(algorithm, threads=2)


@pytest.mark.parametrize("size", [(1, 1), (3, 4), (2, 16)], ids=str)
@pytest.mark.parametrize("algorithm", LAYERS)
def test_upsampling(isa, algorithm, size):
    Layer(9, 35, 3, size=size, repeat=2).check(algorithm)


@pytest.mark.parametrize("algorithm", ["direct", "bf16"])
@pytest.mark.parametrize(("before", "after"), [(0, 1), (1, 1), (0, 0), (1, 0)])
@pytest.mark.parametrize("size", [(6, 8), (4, 32), (5, 33)], ids=str)
def test_stride_two(isa, size, before, after, algorithm):
    Layer(9, 18, 3, size=size, stride=2, before=before, after=after).check(algorithm)


@pytest.mark.parametrize("c_in", [4, (4, 3), (16, 16)], ids=str)
@pytest.mark.parametrize("norm", [0, 1])
@pytest.mark.parametrize("algorithm", ["direct", "bf16"])
def test_one_by_one(isa, c_in, norm, algorithm):
    Layer(c_in, 21, 1, norm=norm, residual=True).check(algorithm)


def test_a_group_lies_across_two_sources(isa):
    Layer((5, 7), 4, 3, norm=2).check("direct")  # groups of 6: the first ends in the second source


def test_norm_of_a_large_mean_with_a_small_spread(isa):
    layer = Layer(8, 8, 1, size=(31, 17), norm=2)
    layer.x = 1000 + 0.1 * random(3, 8, 31, 17, seed=11)
    layer.check("direct")


@pytest.mark.parametrize("y", [0, 3, 30])
def test_norm_of_a_pixel_that_stands_out(isa, y):
    layer = Layer(8, 8, 1, size=(31, 64), norm=8)
    layer.x[:, :, y, 0] += 300
    layer.check("direct")


@pytest.mark.parametrize(("heads", "pixels"), [(1, (1, 1)), (2, (7, 7)), (3, (9, 11))], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention(isa, heads, pixels, dtype):
    n, c = 3, 24
    qkv = random(n, 3 * c, *pixels, seed=5)
    plan = _native.C.cpu.Plan(*pixels, 3 * c, bf16=dtype == torch.bfloat16)
    plan.finish(plan.attention("attention", 0, heads))
    out = torch.full((n, c, *pixels), torch.nan)
    plan.forward(qkv, None, out, 2)

    def formula(dtype):
        q, k, v = (
            qkv.to(dtype).flatten(2).view(n, 3, heads, c // heads, -1).transpose(-1, -2).unbind(1)
        )
        y = torch.softmax(q @ k.transpose(-1, -2) / (c // heads) ** 0.5, dim=-1) @ v
        return y.transpose(-1, -2).reshape(n, c, *pixels)

    assert_exact(out, formula(torch.float64), formula(dtype), ulps=8)


# ---- whole networks ------------------------------------------------------------------------------

NETWORKS = {
    "tiny": {},
    "heads, two blocks": {
        "image_size": (12, 20), "channels": 24, "num_groups": 6, "num_res_blocks": 2,
        "attention_levels": (0, 1), "head_dim": 12, "in_channels": 3,
    },
    "three levels, no attention": {"channel_mult": (1, 1, 3), "attention_levels": ()},
    "diffusers' options": {
        "downsample_padding": 1, "freq_shift": 0, "flip_sin_to_cos": True, "norm_eps": 1e-3,
    },
    "learned variance": {"diffusion": Diffusion(SCHEDULE, variance="learned", loss="vlb")},
    "odd sizes": {"image_size": (14, 6), "channels": 12},
}  # fmt: skip


def forward(model: UNet, x, t: int, *, threads=2, group=0, **options) -> torch.Tensor:
    plan = build_plan(model, *x.shape[2:], **options)
    out = x.new_full((len(x), model.config["out_channels"], *x.shape[2:]), torch.nan)
    plan.forward(x, time_rows(model, torch.tensor([t]))[0], out, threads, group)
    return out


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_unet(name, algorithm):
    model = tiny_unet(**NETWORKS[name]).eval()
    x = random(3, model.in_channels, *model.image_size, seed=1)
    actual = forward(model, x, 7, algorithm=algorithm)
    t = torch.full((3,), 7)
    eager = model(x, t)
    truth = model.double()(x.double(), t)
    spread = eager.double() + (FACTOR[algorithm] - 1) * (eager.double() - truth)
    assert_exact(actual, truth, spread, ulps=16 * FACTOR[algorithm])


@pytest.mark.parametrize("algorithm", ["auto", "bf16"])
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_unet_in_bfloat16_errs_no_more_than_torch(name, algorithm):
    model = tiny_unet(**NETWORKS[name]).eval()
    x, t = random(3, model.in_channels, *model.image_size, seed=1), torch.full((3,), 7)
    actual = forward(model, x, 7, precision="bf16", algorithm=algorithm)
    truth = copy.deepcopy(model).double()(x.double(), t)
    torchs = model.bfloat16()(x.bfloat16(), t).double()
    error, allowed = ((y - truth).square().mean().sqrt() for y in (actual.double(), torchs))
    assert 0 < error <= allowed


def test_layers_of_a_bfloat16_plan():
    """Those are rounded that are faster so: all but wide 3x3 sums of large images on a processor
    whose bfloat16 products are twice as fast, and all where they are 16 times as fast."""
    sizes = {"channels": 128, "channel_mult": (1, 2), "num_groups": 32, "image_size": 32}
    model = UNet(**sizes).eval()

    def algorithms(algorithm: str) -> dict[str, set[str]]:
        plan = build_plan(model, 32, 32, algorithm, "bf16")
        return {name: rest[0] for name, *rest in plan.layers()}

    chosen, rounded = algorithms("auto"), algorithms("bf16")
    assert set(rounded.values()) == {"bf16", "attention"}
    all_rounded = _native.isa() == "amx_bf16"
    assert (chosen["down.0.block.0.conv1"] == "bf16") == all_rounded
    for layer in ("mid.attn_1.qkv", "down.0.downsample.conv", "up.1.upsample.conv"):
        assert chosen[layer] == "bf16"
    assert chosen["down.0.block.0.conv1"] in ("bf16", "winograd_4")
    assert chosen["mid.attn_1"] == "attention"


@pytest.mark.parametrize(
    ("precision", "algorithm"), [("fp32", "auto"), ("bf16", "auto"), ("bf16", "bf16")]
)
@torch.no_grad()
def test_bits_do_not_depend_on_batch_threads_or_group(isa, precision, algorithm):
    model = tiny_unet(image_size=12).eval()
    x = random(9, 1, 12, 12, seed=2)
    plan, row = (
        build_plan(model, 12, 12, algorithm, precision),
        time_rows(model, torch.tensor([3]))[0],
    )
    expected = torch.empty_like(x)
    plan.forward(x, row, expected, 1)
    for n, threads, group in itertools.product((1, 2, 9), (1, 2, 3), (0, 1, 4)):
        out = torch.empty_like(x[:n])
        plan.forward(x[:n], row, out, threads, group)
        assert torch.equal(out, expected[:n]), (n, threads, group)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@torch.no_grad()
def test_segments_of_a_network_whose_weights_no_cache_holds(precision):
    model = tiny_unet(image_size=16, channels=32, channel_mult=(1, 1, 20), num_groups=32).eval()
    x = random(5, 1, 16, 16, seed=2)
    plan, row = (
        build_plan(model, 16, 16, precision=precision),
        time_rows(model, torch.tensor([3]))[0],
    )
    segments = plan.segments()
    assert [by_image for _, _, by_image in segments] == [True, False, True]
    bounds = [0, *(last for _, last, _ in segments)]
    assert bounds == [*(first for first, _, _ in segments), len(plan.layers())]
    expected = torch.empty_like(x)
    plan.forward(x, row, expected, 1)
    for n, threads, group in ((1, 2, 0), (2, 3, 0), (5, 2, 0), (5, 3, 2)):
        out = torch.full_like(x[:n], torch.nan)
        plan.forward(x[:n], row, out, threads, group)
        assert torch.equal(out, expected[:n]), (n, threads, group)
    eager = model(x, torch.full((5,), 3))
    assert (expected - eager).norm() < {"fp32": 1e-5, "bf16": 2e-2}[precision] * eager.norm()


def test_memory_is_shared_and_reported():
    model = tiny_unet()
    plan = build_plan(model, 8, 8)
    layers = plan.layers()
    everything = 4 * sum(layer[3] * layer[4] * layer[5] for layer in layers)
    assert plan.weight_bytes >= 4 * sum(p.numel() for p in model.parameters() if p.dim() == 4)
    assert 4 * 64 * 8 < plan.image_bytes < 2 * everything
    before, x = plan.peak_bytes, random(4, 1, 8, 8, seed=1)
    plan.forward(x, time_rows(model, torch.tensor([0]))[0], torch.empty_like(x), 1)
    assert plan.peak_bytes >= before + plan.image_bytes


def test_layers_count_their_work():
    model = tiny_unet()
    convolutions = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    inside = (
        len(convolutions) - 2 - sum(1 for n, _ in model.named_modules() if n.endswith("temb_proj"))
    )
    layers = build_plan(model, 8, 8).layers()
    assert sum(layer[1] != "attention" for layer in layers) == inside
    name, _, c_in, c_out, height, width, kernel, flop = layers[0]
    assert (name, c_in, c_out, height, width, kernel) == ("conv_in", 1, 8, 8, 8, 3)
    assert flop == 2 * 64 * 1 * 8 * 9


# ---- the engine ----------------------------------------------------------------------------------


def test_auto_takes_the_plan_and_draws_what_eager_draws():
    model = tiny_unet()
    assert choose("auto", model, CPU, "fp32")[0].name == "cpu_plan"
    options = {"seed": 5, "precision": "fp32", "progress": False}
    plan = fastddpm.sample(model, 5, **options)
    eager = fastddpm.sample(model, 5, engine="eager", **options)
    assert (plan - eager).abs().max() < 1e-4
    short = fastddpm.sample(model, 3, steps=5, sampler="ddim", engine="cpu_plan", **options)
    same = fastddpm.sample(model, 3, steps=5, sampler="ddim", engine="eager", **options)
    assert (short - same).abs().max() < 1e-4


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    ("prediction", "variance", "loss"),
    [
        ("eps", "fixed_large", "simple"),
        ("x0", "fixed_small", "simple"),
        ("mean", "fixed_small", "vlb"),
        ("eps", "learned", "vlb"),
    ],
)
def test_a_step_within_the_plan_is_the_ops(prediction, variance, loss, memory, sampler):
    diffusion = Diffusion(SCHEDULE, prediction, variance, loss).respace(5)
    model = tiny_unet(in_channels=3, diffusion=diffusion).eval()
    options = {"sampler": sampler, "eta": 0.5 * (sampler == "ddim"), "precision": "fp32"}
    engine = make_engine("cpu_plan", model, diffusion, device=CPU, **options)
    xt = random(5, 3, *model.image_size, seed=2).contiguous(memory_format=memory)
    index = torch.tensor([7, 0, 3, 2**40, 1])
    for i in (4, 1, 0):
        arguments = (xt, i, torch.full((5,), i), 2**63 + 5, index)
        x, output = engine.step(*arguments)
        expected, expected_output = Eager.step(engine, *arguments)
        torch.testing.assert_close(output, expected_output, rtol=0, atol=0)
        torch.testing.assert_close(x, expected, rtol=0, atol=0)
        assert x.stride() == xt.stride()
    with pytest.raises(ValueError, match="sample_index must be in 0"):
        engine.step(xt, 0, torch.zeros(5, dtype=torch.int64), 1, index - 1)


def test_bf16_is_the_plans_where_it_is_asked_for_or_fast(monkeypatch):
    model = tiny_unet()
    assert choose("auto", model, CPU, "bf16") == (CpuPlan, "bf16")
    for precision in ("fp32", "bf16"):
        monkeypatch.setattr(cpu_plan, "best_precision", lambda p=precision: p)
        assert choose("auto", model, CPU, "auto") == (CpuPlan, precision)
    options = {"seed": 5, "progress": False}
    exact = fastddpm.sample(model, 5, precision="fp32", **options)
    close = fastddpm.sample(model, 5, precision="bf16", **options)
    assert 0 < (close - exact).abs().max() < 0.1


def test_other_models_run_in_eager():
    model = tiny_unet()
    assert choose("auto", lambda x, t: x, CPU, "auto")[0].name == "eager"
    with fastddpm.use_backend("reference"):
        assert choose("auto", model, CPU, "fp32")[0].name == "eager"


class Wrapped(nn.Conv2d):
    """A convolution that a plan does not know."""


def foreign() -> UNet:
    model = tiny_unet()
    old = model.mid.block_1.conv1
    model.mid.block_1.conv1 = Wrapped(old.in_channels, old.out_channels, 3, padding=1)
    return model


def hooked() -> UNet:
    model = tiny_unet()
    model.mid.attn_1.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    ("model", "precision", "reason"),
    [
        (foreign, "fp32", r"mid.block_1.conv1 \(Wrapped\) is not a part"),
        (hooked, "fp32", r"mid.attn_1 \(AttentionBlock\) has a forward hook"),
        (lambda: tiny_unet().double(), "fp32", "is torch.float64, not float32"),
        (lambda: tiny_unet().bfloat16(), "bf16", "is torch.bfloat16, not float32"),
        (lambda: nn.Identity(), "fp32", "Identity is not a fastddpm.UNet"),
    ],
)  # fmt: skip
def test_what_a_plan_can_not_run_is_named(model, precision, reason):
    model = model()
    assert re.search(reason, unsupported(model, CPU))
    with pytest.raises(ValueError, match=f"engine 'cpu_plan' can't run here: .*{reason}"):
        make_engine("cpu_plan", model, Diffusion(SCHEDULE), device=CPU, precision=precision)


def test_a_fallback_is_said_once(monkeypatch):
    fastddpm.engine._report_fallback.cache_clear()
    with pytest.warns(RuntimeWarning, match="'eager', not 'cpu_plan': mid.block_1.conv1"):
        assert choose("auto", foreign(), CPU, "fp32")[0].name == "eager"
    fastddpm.engine._report_fallback.cache_clear()
    monkeypatch.setenv("FASTDDPM_STRICT", "1")
    with pytest.raises(RuntimeError, match="FASTDDPM_STRICT=1 makes this an error"):
        choose("auto", foreign(), CPU, "fp32")
    fastddpm.engine._report_fallback.cache_clear()


def test_weights_that_are_no_numbers_are_named():
    model = tiny_unet()
    model.up[0].block[1].conv2.weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"up.0.block.1.conv2: its weights hold a NaN"):
        fastddpm.sample(model, 1, precision="fp32", progress=False)


def test_a_step_that_overflows_is_named():
    model = tiny_unet()
    model.mid.block_2.conv2.weight.data.mul_(3e38)
    with pytest.raises(FloatingPointError, match=r"step t = 11, first in mid.block_2.conv2"):
        fastddpm.sample(model, 2, precision="fp32", progress=False)


def test_the_border_refuses_what_does_not_fit():
    plan = _native.C.cpu.Plan(4, 4, 2)
    weight, bias = torch.zeros(3, 2), [0.0] * 3
    with pytest.raises(ValueError, match="there is no activation 5"):
        plan.convolution("c", [5], weight, bias, 1)
    with pytest.raises(ValueError, match=r"weight must have shape \(3, 18\)"):
        plan.convolution("c", [0], weight, bias, 3)
    with pytest.raises(ValueError, match="c: num_groups must divide the 2 channels"):
        plan.convolution("c", [0], weight, bias, 1, norm=(3, 1e-6, [1.0] * 2, [0.0] * 2, True))
    with pytest.raises(ValueError, match="algorithm must be"):
        plan.convolution("c", [0], weight, bias, 1, algorithm="fft")
    with pytest.raises(ValueError, match="not finished"):
        plan.forward(torch.zeros(1, 2, 4, 4), None, torch.zeros(1, 3, 4, 4), 1)
    plan.finish(plan.convolution("c", [0], weight, bias, 1))
    with pytest.raises(ValueError, match="the plan is finished"):
        plan.convolution("d", [0], weight, bias, 1)
    with pytest.raises(ValueError, match=r"x must have shape \(N, 2, 4, 4\)"):
        plan.forward(torch.zeros(1, 2, 4, 5), None, torch.zeros(1, 3, 4, 4), 1)
    with pytest.raises(ValueError, match=r"out must have shape \(1, 3, 4, 4\)"):
        plan.forward(torch.zeros(1, 2, 4, 4), None, torch.zeros(1, 2, 4, 4), 1)
    with pytest.raises(ValueError, match="threads must be at least 1"):
        plan.forward(torch.zeros(1, 2, 4, 4), None, torch.zeros(1, 3, 4, 4), 0)


def test_no_images():
    plan = build_plan(tiny_unet(), 8, 8)
    out = torch.empty(0, 1, 8, 8)
    plan.forward(torch.empty(0, 1, 8, 8), time_rows(tiny_unet(), torch.tensor([0]))[0], out, 2)


# ---- memory --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return Compiler(tmp_path_factory.mktemp("objects"))


COMMON = ("plan_check", "plan/plan", "plan/run", *KERNELS)


@needs_compiler
@pytest.mark.parametrize("isa", sorted({"plain", _native.isa() or "plain"} & FLAGS.keys()))
def test_nothing_is_read_that_was_not_written(isa, compiled, tmp_path):
    """Under AddressSanitizer and UndefinedBehaviorSanitizer, in memory full of NaN."""
    objects = [compiled(stem, *FLAGS[isa]) for stem in (*COMMON, *BF16)]
    printed = run_checks(tmp_path, objects, "direct", "winograd_2", "winograd_4", "bf16")
    assert "0 of the plans are wrong" in printed


@needs_compiler
@pytest.mark.parametrize("isa", EMULATED)
def test_bf16_instructions(isa, compiled, tmp_path):
    """The same for kernels of bfloat16 instructions, which run on any processor here."""
    objects = [compiled(stem) for stem in COMMON]
    objects += [compiled(stem, *EMULATED[isa]) for stem in BF16]
    assert "0 of the plans are wrong" in run_checks(tmp_path, objects, "bf16")
