"""The U-Net of Appendix B: its sizes, its shapes, its parts against torch, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toy import generator, tiny_unet

from fastddpm import Diffusion, Schedule, UNet
from fastddpm.unet.network import Downsample, ResnetBlock, Upsample, timestep_embedding


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("build", "parameters", "size"),
    [
        (UNet.cifar10, 35_746_307, (32, 32)),
        (UNet.celebahq256, 113_673_219, (256, 256)),
        (UNet.lsun256, 113_673_219, (256, 256)),
        (UNet.lsun256_large, 255_677_955, (256, 256)),
    ],
)
def test_the_papers_models(build, parameters, size):
    with torch.device("meta"):
        model = build()
    assert count(model) == parameters
    assert model.image_size == size


@pytest.mark.parametrize(
    ("build", "variance"),
    [
        (UNet.cifar10, "fixed_large"),
        (UNet.celebahq256, "fixed_small"),
        (UNet.lsun256, "fixed_small"),
        (UNet.lsun256_large, "fixed_small"),
    ],
)
def test_the_papers_variances(build, variance):
    """diffusion_utils_2.py of the authors' CIFAR-10 run, diffusion_utils.py of their 256x256
    ones.
    """
    with torch.device("meta"):
        for given in ({}, {"diffusion": None}):
            diffusion = build(**given).diffusion
            assert (diffusion.prediction, diffusion.variance) == ("eps", variance)
            assert diffusion.schedule.to_config() == Schedule.linear().to_config()
        own = Diffusion(Schedule.cosine(9))
        assert build(diffusion=own).diffusion is own


def test_the_papers_attention_is_at_16x16():
    with torch.device("meta"):
        models = UNet.cifar10(), UNet.celebahq256()
    for model in models:
        for way in (model.down, model.up):
            sizes = [model.image_size[0] >> i for i, level in enumerate(way) if level.attn]
            assert sizes == [16]
        assert model.mid.attn_1.num_heads == 1


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (2, 1, 8, 8)),
        ({"image_size": (6, 10)}, (3, 1, 6, 10)),
        ({"image_size": (2, 4)}, (1, 1, 2, 4)),
        ({"in_channels": 5}, (2, 5, 8, 8)),
        (
            {"channel_mult": (1, 1, 3), "num_res_blocks": 2, "attention_levels": (0, 2)},
            (2, 1, 8, 8),
        ),
        ({"head_dim": 4, "num_groups": 8}, (2, 1, 8, 8)),
        ({"downsample_padding": 1, "freq_shift": 0, "flip_sin_to_cos": True}, (2, 1, 8, 8)),
        ({"channels": 12, "num_groups": 3}, (2, 1, 8, 8)),
    ],
    ids=str,
)
def test_shapes(options, shape):
    model = tiny_unet(**options)
    x = torch.randn(shape, generator=generator())
    t = torch.arange(shape[0])
    y = model(x, t)
    assert y.shape == shape
    assert y.dtype == torch.float32
    assert y.isfinite().all()
    assert not torch.equal(y, model(x, t + 5)), "t has a say"
    if shape[2] * shape[3] > 8:
        assert torch.equal(y, model(x.contiguous(memory_format=torch.channels_last), t))


def test_another_size_than_its_own_is_taken():
    assert tiny_unet()(torch.randn(1, 1, 12, 4), torch.zeros(1, dtype=torch.int64)).shape[2:] == (
        12,
        4,
    )


def test_a_learned_variance_doubles_the_channels():
    model = tiny_unet(in_channels=3, diffusion=Diffusion(variance="learned", loss="vlb"))
    assert model(torch.randn(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)).shape == (2, 6, 8, 8)


def test_a_fresh_model_predicts_all_but_nothing():
    model = UNet(image_size=8, channels=32, channel_mult=(1, 2), num_res_blocks=1)
    y = model(torch.randn(2, 3, 8, 8), torch.tensor([0, 999]))
    assert 0 < y.abs().max() < 1e-4


def test_weights_are_drawn_as_the_papers():
    """Uniform with variance 2 / (fan in + fan out); nothing but biases is 0."""
    torch.manual_seed(0)
    block = ResnetBlock(64, 64, 128, 32, 1e-6, 0.0)
    weight = block.conv1.weight
    bound = math.sqrt(3 * 2 / (9 * 64 + 9 * 64))
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert block.conv1.bias.eq(0).all()
    assert 0 < block.conv2.weight.abs().max() < 1e-5
    qkv = UNet(image_size=8, channels=64, channel_mult=(1, 1)).mid.attn_1.qkv.weight
    for part in qkv.chunk(3):  # each drawn as a matrix of its own
        assert part.abs().max() <= math.sqrt(3 * 2 / 128)
        assert part.std().item() == pytest.approx(math.sqrt(2 / 128), rel=0.05)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift", [0, 1])
def test_timestep_embedding(shift, flip):
    t = torch.tensor([0, 1, 500, 999])
    got = timestep_embedding(t, 8, freq_shift=shift, flip_sin_to_cos=flip)
    for row, step in zip(got.tolist(), t.tolist(), strict=True):
        angles = [step * 10000 ** (-i / (4 - shift)) for i in range(4)]
        sin, cos = [math.sin(a) for a in angles], [math.cos(a) for a in angles]
        assert row == pytest.approx(cos + sin if flip else sin + cos, abs=1e-4)
    assert timestep_embedding(t, 5).shape == (4, 5)


def test_resnet_block_is_its_formula():
    torch.manual_seed(1)
    block = ResnetBlock(8, 16, 12, 4, 1e-6, 0.0).double()
    for p in block.parameters():
        nn.init.normal_(p, std=0.3)
    x, temb = torch.randn(2, 8, 5, 7).double(), torch.randn(2, 12).double()
    h = F.silu(F.group_norm(x, 4, block.norm1.weight, block.norm1.bias, 1e-6))
    h = F.conv2d(h, block.conv1.weight, block.conv1.bias, padding=1)
    h = h + F.linear(temb, block.temb_proj.weight, block.temb_proj.bias)[:, :, None, None]
    h = F.silu(F.group_norm(h, 4, block.norm2.weight, block.norm2.bias, 1e-6))
    h = F.conv2d(h, block.conv2.weight, block.conv2.bias, padding=1)
    expected = h + F.conv2d(x, block.nin_shortcut.weight, block.nin_shortcut.bias)
    torch.testing.assert_close(block(x, temb), expected)


def test_downsampling_pads_like_the_papers_code():
    """TF's SAME: an even size is padded at the end only, so the taps start at pixel 0."""
    down = Downsample(1, 0)
    nn.init.zeros_(down.conv.weight)
    down.conv.weight.data[0, 0, 0, 0] = 1  # the upper left tap
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert torch.equal(down(x)[0, 0], torch.tensor([[0.0, 2], [8, 10]]))
    both = Downsample(1, 1)
    both.load_state_dict(down.state_dict())
    assert torch.equal(both(x)[0, 0], torch.tensor([[0.0, 0], [0, 5]]))


def test_upsampling_repeats_pixels():
    up = Upsample(1)
    nn.init.zeros_(up.conv.weight)
    up.conv.weight.data[0, 0, 1, 1] = 1
    x = torch.arange(4.0).view(1, 1, 2, 2)
    assert torch.equal(up(x)[0, 0, :2, :2], torch.zeros(2, 2))
    assert up(x).shape == (1, 1, 4, 4)
    assert up(x)[0, 0, 3].tolist() == [2, 2, 3, 3]


def test_dropout_is_on_in_training_only():
    model = tiny_unet(dropout=0.5)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 4])
    assert torch.equal(model(x, t), model(x, t))
    model.train()
    assert not torch.equal(model(x, t), model(x, t))


def test_every_parameter_gets_a_gradient():
    model = tiny_unet()
    model(torch.randn(2, 1, 8, 8), torch.tensor([3, 4])).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name


def test_compiles_without_breaks():
    model = tiny_unet()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        for t in (torch.tensor([0, 11]), torch.tensor([5, 6])):
            torch.testing.assert_close(compiled(x, t), model(x, t))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 0}, "channels must be a positive integer; got 0"),
        ({"in_channels": 1.5}, "in_channels must be a positive integer; got 1.5"),
        ({"num_res_blocks": True}, "num_res_blocks must be a positive integer; got True"),
        ({"channel_mult": ()}, "channel_mult must be positive integers"),
        ({"channel_mult": (1, 0)}, "channel_mult must be positive integers"),
        ({"image_size": 7}, "image_size must be a multiple of 2 for 2 levels"),
        ({"image_size": (8, 8, 8)}, "image_size must be an integer or"),
        ({"attention_levels": (2,)}, r"attention_levels must lie in 0 \.\. 1; got \[2\]"),
        ({"num_groups": 3}, "num_groups must divide every width; 3 does not divide"),
        ({"head_dim": 3}, "head_dim must divide every attention width; 3 does not divide"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\); got 1.0"),
        ({"downsample_padding": 2}, "downsample_padding must be 0 or 1; got 2"),
    ],
    ids=str,
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_unet(**options)


@pytest.mark.parametrize(
    ("x", "t", "message"),
    [
        (torch.zeros(2, 3, 8, 8), torch.zeros(2), r"x must be \(N, 1, H, W\)"),
        (torch.zeros(1, 8, 8), torch.zeros(1), r"x must be \(N, 1, H, W\)"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(2), "got torch.uint8"),
        (torch.zeros(2, 1, 7, 8), torch.zeros(2), "multiples of 2 here; got 7x8"),
        (torch.zeros(2, 1, 8, 8), torch.zeros(3), r"t must be \(2,\), a step for each image"),
        (torch.zeros(2, 1, 8, 8), torch.tensor(3), r"t must be \(2,\)"),
    ],
)  # fmt: skip
def test_bad_inputs_are_named(x, t, message):
    with pytest.raises(ValueError, match=message):
        tiny_unet()(x, t)
