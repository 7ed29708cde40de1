"""Every option of a UNet has a type and a range, and is kept as what JSON can hold."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from toy import tiny_unet

from fastddpm import UNet
from fastddpm.unet import config as unet_config
from fastddpm.unet.network import timestep_embedding


def test_numpys_numbers_are_taken_and_kept_as_pythons(tmp_path):
    """np.int64 in config.json was a TypeError of json at the first save."""
    model = tiny_unet(
        image_size=np.int64(8),
        in_channels=np.int32(1),
        channels=np.int64(8),
        channel_mult=np.array([1, 2]),
        num_res_blocks=np.uint8(1),
        attention_levels=np.array([1, 1]),
        head_dim=np.int64(4),
        num_groups=np.int16(4),
        norm_eps=np.float32(1e-5),
        dropout=np.float64(0.1),
        downsample_padding=np.int64(1),
        freq_shift=np.int64(0),
        flip_sin_to_cos=np.bool_(True),
    )
    plain = tiny_unet(
        head_dim=4, norm_eps=float(np.float32(1e-5)), dropout=0.1, downsample_padding=1,
        freq_shift=0, flip_sin_to_cos=True,
    )  # fmt: skip
    assert model.config == plain.config
    assert json.loads(json.dumps(model.config)) == model.config
    assert type(model.in_channels) is int
    model.save_pretrained(tmp_path)
    assert UNet.from_pretrained(tmp_path).config == model.config


def test_sequences_of_any_kind_are_read_once():
    """A generator of attention_levels was used up by the check, and no level had attention."""
    model = tiny_unet(attention_levels=iter([1]), channel_mult=iter([1, 2]))
    assert len(model.down[1].attn) == 1
    assert model.config["channel_mult"] == [1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": torch.tensor(8)}, r"image_size must be a sequence .*; got tensor\(8\)"),
        ({"channel_mult": np.array(2)}, r"channel_mult must be a sequence .*; got array\(2\)"),
        ({"attention_levels": torch.tensor(0)}, "attention_levels must be a sequence of integers"),
        ({"channels": 2, "num_groups": 1}, "freq_shift must be below 1, half of 2 channels; got 1"),
        ({"channels": 3, "num_groups": 1}, r"channels must be at least 4 for it"),
        ({"freq_shift": 4}, "freq_shift must be below 4, half of 8 channels; got 4"),
        ({"freq_shift": "1"}, "freq_shift must be a number; got '1'"),
        ({"freq_shift": float("nan")}, "freq_shift must be a number; got nan"),
        ({"freq_shift": 10**400}, "freq_shift must be a number"),
        ({"freq_shift": True}, "freq_shift must be a number; got True"),
        ({"norm_eps": "1e-6"}, "norm_eps must be a number in"),
        ({"norm_eps": 0}, "norm_eps must be a number in"),
        ({"norm_eps": -1e-6}, "norm_eps must be a number in"),
        ({"norm_eps": float("inf")}, "norm_eps must be a number in"),
        ({"norm_eps": None}, "norm_eps must be a number in"),
        ({"dropout": "0"}, r"dropout must lie in \[0, 1\); got '0'"),
        ({"dropout": float("nan")}, r"dropout must lie in \[0, 1\); got nan"),
        ({"dropout": False}, r"dropout must lie in \[0, 1\); got False"),
        ({"head_dim": 0}, "head_dim must be a positive integer; got 0"),
        ({"head_dim": 2.0}, "head_dim must be a positive integer; got 2.0"),
        ({"head_dim": "4"}, "head_dim must be a positive integer; got '4'"),
        ({"out_channels": 0}, "out_channels must be a positive integer; got 0"),
        ({"in_channels": {}}, "in_channels must be a positive integer; got {}"),
        ({"in_channels": None}, "in_channels must be a positive integer; got None"),
        ({"image_size": 10**6}, "image_size must be at most 16384"),
        ({"image_size": "8"}, "image_size must be a sequence of integers; got '8'"),
        ({"image_size": 8.0}, "image_size must be a sequence of integers; got 8.0"),
        ({"image_size": None}, "image_size must be a sequence of integers; got None"),
        ({"image_size": (8, True)}, r"image_size must be positive integers; got True"),
        ({"channels": 10**9}, "channels must be at most 65536; got 1000000000"),
        ({"channel_mult": (1, 2**14)}, "channels times channel_mult must be at most 65536"),
        ({"channel_mult": 2}, "channel_mult must be a sequence of integers; got 2"),
        ({"channel_mult": {"1": 2}}, "channel_mult must be a sequence of integers"),
        ({"channel_mult": [1] * 11, "image_size": 1024}, "at most 10 levels; got 11"),
        ({"channel_mult": [1] * 10**5}, "at most 64 integers; got 100000"),
        ({"num_res_blocks": 10**6}, "num_res_blocks must be at most 32; got 1000000"),
        ({"attention_levels": ["1"]}, r"attention_levels must lie in 0 .. 1; got \['1'\]"),
        ({"attention_levels": [True]}, r"attention_levels must lie in 0 .. 1"),
        ({"attention_levels": 1}, "attention_levels must be a sequence of integers; got 1"),
        ({"downsample_padding": True}, "downsample_padding must be 0 or 1; got True"),
        ({"downsample_padding": 1.0}, "downsample_padding must be 0 or 1; got 1.0"),
        ({"flip_sin_to_cos": 1}, "flip_sin_to_cos must be true or false; got 1"),
        ({"flip_sin_to_cos": "false"}, "flip_sin_to_cos must be true or false; got 'false'"),
        ({"diffusion": "cosine"}, r"diffusion must be a fastddpm\.Diffusion; got str"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_option_of_another_type_or_size_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_unet(**options)


def test_a_model_larger_than_the_machines_memory_is_refused_before_it_is_made():
    options = {"channels": 2**16, "channel_mult": (1,), "attention_levels": ()}
    with pytest.raises(ValueError, match=r"this UNet in float32 takes .* GiB; this machine has"):
        UNet(**options)
    options = {"channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1}
    with torch.device("meta"):  # takes none, so it may be as large as one likes
        model = UNet(**{**options, "channels": 2**15})
    assert model.conv_in.weight.is_meta
    count = sum(p.numel() for p in UNet(**options).parameters())
    config = UNet(**options).config
    assert count / 4 < unet_config.fewest_parameters(config) < count


@pytest.mark.parametrize(("channels", "freq_shift"), [(2, 0), (4, 1), (6, 2.5), (4, -3), (5, 1)])
def test_time_embeddings_are_finite(channels, freq_shift):
    """i / (dim/2 - freq_shift) was 0 / 0 for channels=2 and the paper's shift of 1."""
    model = tiny_unet(channels=channels, num_groups=1, freq_shift=freq_shift)
    t = torch.tensor([0, 999])
    sinusoids = model.sinusoids(t)
    assert sinusoids.isfinite().all()
    half = channels // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / (half - freq_shift))
    expected = (t.double()[:, None] * frequencies).sin()
    torch.testing.assert_close(sinusoids[:, :half].double(), expected, rtol=0, atol=2e-4)
    with torch.no_grad():
        assert model(torch.zeros(2, 1, 8, 8), t).isfinite().all()


def test_the_embedding_itself_refuses():
    with pytest.raises(ValueError, match="freq_shift must be below 4, half of 8 channels; got 5"):
        timestep_embedding(torch.tensor([1]), 8, freq_shift=5)
