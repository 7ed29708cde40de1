"""Checkpoints as other trainers save them: networks written from their published architecture
(peers.py), in their containers, read as ours with equal outputs; and all that can't be read, named.
"""

from __future__ import annotations

import argparse
import os
import re
import warnings
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from peers import W86, OpenAI, Tqch, as_port, randomised
from safetensors.torch import save_file
from toy import generator, tiny_unet

from fastddpm import Diffusion, Schedule, UNet, sample
from fastddpm.integrations.containers import find
from fastddpm.pretrained import read_model

DIFFUSION = Diffusion(Schedule.linear(20))


def read(path: Path, **options) -> UNet:
    """What `from_pretrained` reads, without its notes."""
    return read_model(path, allow_pickle=path.suffix != ".safetensors", **options)[0]


def assert_equal_outputs(model: UNet, theirs: torch.nn.Module, *, steps: int = 50) -> None:
    """To 1e-5 of the largest output, at several steps, for labels where there are some."""
    x = torch.randn(3, model.in_channels, 16, 16, generator=generator(5))
    t = torch.tensor([0, steps // 3, steps - 1])
    classes = model.config["num_classes"]
    labels = () if classes is None else (torch.tensor([0, classes - 1, 1]),)
    with torch.no_grad():
        expected = theirs(x, t, *labels)
        assert expected.std() > 1e-2
        assert (model(x, t, *labels) - expected).abs().max() <= 1e-5 * expected.abs().max()


def states(make, *, prefix: str = "") -> tuple:
    """Two networks of other weights, and their state dicts under a prefix."""
    nets = [randomised(make(), seed) for seed in (3, 4)]
    return *nets, *({prefix + k: v for k, v in net.state_dict().items()} for net in nets)


# ---- networks ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ch_mult": (1, 2, 2), "attn": (1, 2), "num_res_blocks": 2},
        {"ch_mult": (2, 1), "attn": (0,)},
        {"ch_mult": (1,), "attn": ()},
    ],
    ids=str,
)
def test_w86763777(tmp_path, options):
    theirs = randomised(W86(**options))
    path = tmp_path / "ckpt.pt"
    torch.save({"net_model": {}, "ema_model": theirs.state_dict(), "x_T": torch.zeros(1)}, path)
    model = read(path)
    assert_equal_outputs(model, theirs)
    assert not model.training
    assert (model.diffusion.T, model.diffusion.variance) == (50, "fixed_large")
    model.save_pretrained(tmp_path / "ours")
    assert_equal_outputs(UNet.from_pretrained(tmp_path / "ours"), theirs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ch_multipliers": (1, 2, 2), "apply_attn": (True, False, True), "num_res_blocks": 2},
        {"ch_multipliers": (1, 1), "apply_attn": (False, False), "in_channels": 1},
    ],
    ids=str,
)
def test_tqch(tmp_path, options):
    theirs = randomised(Tqch(**options))
    save_file(theirs.state_dict(), tmp_path / "x.safetensors")
    assert_equal_outputs(read(tmp_path / "x.safetensors"), theirs, steps=1000)


@pytest.mark.parametrize(
    ("image_size", "variance", "dropout"), [(32, "fixed_large", 0.1), (64, "fixed_small", 0.0)]
)
def test_tqchs_process_is_that_of_its_configurations(tmp_path, image_size, variance, dropout):
    level = {32: (False, True, False), 64: (False, False, True)}[image_size]
    save_file(
        Tqch(ch_multipliers=(1, 2, 2), apply_attn=level).state_dict(), tmp_path / "x.safetensors"
    )
    model = read(tmp_path / "x.safetensors")
    assert model.image_size == (image_size, image_size)
    assert (model.diffusion.variance, model.config["dropout"]) == (variance, dropout)


OPENAI = [
    {},
    {"use_scale_shift_norm": False, "num_heads": 1},
    {"resblock_updown": True, "num_head_channels": 32, "channel_mult": (1, 2, 2)},
    {"resblock_updown": True, "use_scale_shift_norm": False, "attention_resolutions": ()},
    {"use_new_attention_order": True, "num_classes": 7, "num_res_blocks": 2},
    {"channel_mult": (1, 2, 3), "attention_resolutions": (1, 4), "in_channels": 1,
     "out_channels": 1},
]  # fmt: skip


@pytest.mark.parametrize("options", OPENAI, ids=str)
def test_openai(tmp_path, options):
    theirs = randomised(OpenAI(**options))
    torch.save(theirs.state_dict(), tmp_path / "ema_0.9999_000100.pt")
    said = {"new_attention_order": options.get("use_new_attention_order")}
    if "num_head_channels" in options:
        said["head_dim"] = options["num_head_channels"]
    else:
        said["num_heads"] = options.get("num_heads")
    model = read(tmp_path / "ema_0.9999_000100.pt", **said)
    assert_equal_outputs(model, theirs, steps=1000)
    assert model.config["num_classes"] == options.get("num_classes")


def test_openais_heads_are_an_option_that_matters(tmp_path):
    theirs = randomised(OpenAI(num_heads=2))
    torch.save(theirs.state_dict(), tmp_path / "x.pt")
    for options in ({"num_heads": 2}, {"head_dim": 32}):
        assert_equal_outputs(read(tmp_path / "x.pt", **options), theirs, steps=1000)
    for options in ({}, {"num_heads": 2, "new_attention_order": True}):
        with pytest.raises(AssertionError):
            assert_equal_outputs(read(tmp_path / "x.pt", **options), theirs, steps=1000)


@pytest.mark.parametrize(
    ("mult", "size"), [((1, 2, 2, 2), 32), ((1, 2, 3, 4), 64), ((1, 1, 2, 2, 4, 4), 256)]
)
def test_openais_image_sizes_are_those_of_its_scripts(tmp_path, mult, size):
    save_file(OpenAI(channel_mult=mult).state_dict(), tmp_path / "x.safetensors")
    assert read(tmp_path / "x.safetensors").image_size == (size, size)


def test_openais_learned_variances_are_a_range(tmp_path):
    theirs = randomised(OpenAI(out_channels=6, num_classes=3))
    torch.save(theirs.state_dict(), tmp_path / "x.pt")
    model = read(tmp_path / "x.pt", num_heads=4)
    assert_equal_outputs(model, theirs, steps=1000)
    assert (model.diffusion.variance, model.diffusion.objective) == ("learned_range", "hybrid")
    x = sample(model, 2, shape=(3, 8, 8), steps=3, model_kwargs={"y": torch.tensor([0, 2])},
               progress=False)  # fmt: skip
    assert x.isfinite().all()
    model.save_pretrained(tmp_path / "ours")
    assert UNet.from_pretrained(tmp_path / "ours").diffusion.variance == "learned_range"


def test_the_process_is_an_option(tmp_path):
    torch.save(OpenAI(out_channels=6).state_dict(), tmp_path / "x.pt")
    options = {"timesteps": 4000, "schedule": "cosine", "rescale_timesteps": True}
    said = read(tmp_path / "x.pt", **options).diffusion
    own = Diffusion(Schedule.cosine(4000), variance="learned_range", loss="hybrid",
                    rescale_timesteps=True)  # fmt: skip
    assert said.to_config() == own.to_config()
    linear = read(tmp_path / "x.pt", timesteps=500, rescale_timesteps=False).diffusion.schedule
    assert linear.betas[[0, -1]] == pytest.approx([2e-4, 0.04])  # scaled, as their linear one is
    torch.save(W86().state_dict(), tmp_path / "w.pt")
    small = read(tmp_path / "w.pt", variance="fixed_small", prediction="x0").diffusion
    assert (small.T, small.prediction, small.variance) == (50, "x0", "fixed_small")


# ---- containers ----------------------------------------------------------------------------------


def w86_container(make) -> tuple:
    raw, ema, raw_state, ema_state = states(make)
    return raw, ema, {
        "net_model": raw_state, "ema_model": ema_state, "step": 5, "x_T": torch.zeros(2, 3),
        "sched": {"last_epoch": 5, "lr_lambdas": [None]},
        "optim": torch.optim.Adam(raw.parameters()).state_dict(),
    }  # fmt: skip


def shadow_container(make) -> tuple:
    raw, ema, raw_state, ema_state = states(make)
    return raw, ema, {
        "model": {f"module.{name}": tensor for name, tensor in raw_state.items()},
        "optimizer": torch.optim.Adam(raw.parameters()).state_dict(),
        "ema": {"decay": 0.9999, "shadow": ema_state, "num_updates": 7},
        "scheduler": None, "epoch": 3, "loss": 0.02,
    }  # fmt: skip


def lucidrains_container(make) -> tuple:
    """With one of our networks in the trainer's GaussianDiffusion, which holds its betas too."""
    raw, ema, raw_state, ema_state = states(make, prefix="model.")
    betas = {"betas": torch.linspace(1e-4, 0.02, 20)}
    averaged = {f"ema_model.{k}": v for k, v in {**betas, **ema_state}.items()}
    online = {f"online_model.{k}": v for k, v in {**betas, **raw_state}.items()}
    counts = {"initted": torch.tensor(True), "step": torch.tensor(7)}
    return raw, ema, {
        "step": 7, "model": {**betas, **raw_state}, "opt": {"state": {}, "param_groups": []},
        "ema": {**counts, **online, **averaged}, "scaler": None, "version": "2.3.4",
    }  # fmt: skip


def list_container(make) -> tuple:
    raw, ema, raw_state, ema_state = states(make)
    wrapped = {f"module.{name}": tensor for name, tensor in raw_state.items()}
    return raw, ema, [wrapped, {"state": {}, "param_groups": []}, 3, 100, ema_state]


@pytest.mark.parametrize(
    ("container", "make"),
    [
        (w86_container, W86),
        (shadow_container, Tqch),
        (lucidrains_container, OpenAI),
        (list_container, W86),
    ],
)
def test_ema_or_raw_of_a_training_checkpoint(tmp_path, container, make):
    raw, ema, content = container(make)
    torch.save(content, tmp_path / "x.pt")
    options = {"diffusion": DIFFUSION, "allow_pickle": True}
    if make is OpenAI:
        options["num_heads"] = 4
    with pytest.warns(UserWarning, match="of its sets of weights, EMA weights .* are taken"):
        assert_equal_outputs(UNet.from_pretrained(tmp_path / "x.pt", **options), ema, steps=20)
    for weights, theirs in (("ema", ema), ("raw", raw)):
        model, origin = read_model(tmp_path / "x.pt", weights=weights, **options)
        assert_equal_outputs(model, theirs, steps=20)
        assert origin.weights.startswith(f"{'EMA' if weights == 'ema' else 'raw'} weights (")
    with pytest.raises(ValueError, match="weights must be one of 'ema', 'raw'; got 'EMA'"):
        read(tmp_path / "x.pt", weights="EMA")


def test_a_state_dict_alone_and_inside_of_others(tmp_path):
    theirs, _, state, _ = states(Tqch)
    options = {"image_size": 32, "dropout": 0.0, "diffusion": DIFFUSION}
    contents = {
        "plain": state,
        "state_dict": {"state_dict": OrderedDict(state), "epoch": 1},
        "lightning": {"state_dict": {f"model._orig_mod.{k}": v for k, v in state.items()}},
        "raw": {"model": {"state_dict": state}, "ema": None},
        "ema": {"model_ema": state},
    }
    for name, content in contents.items():
        torch.save(content, tmp_path / f"{name}.pt")
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing was chosen, and all was said
            model = UNet.from_pretrained(tmp_path / f"{name}.pt", allow_pickle=True, **options)
        assert_equal_outputs(model, theirs, steps=1000)
    for weights in ("ema", "raw"):  # a plain one may be either
        assert_equal_outputs(read(tmp_path / "plain.pt", weights=weights), theirs, steps=1000)
    with pytest.raises(ValueError, match=r"holds no EMA weights, only model\.state_dict"):
        read(tmp_path / "raw.pt", weights="ema")
    with pytest.raises(ValueError, match="holds EMA weights alone, model_ema"):
        read(tmp_path / "ema.pt", weights="raw")


def test_prefixes_in_a_safetensors_file_are_told_apart(tmp_path):
    raw, ema, raw_state, ema_state = states(W86)
    both = {f"net_model.{k}": v for k, v in raw_state.items()}
    both |= {f"ema_model.{k}": v for k, v in ema_state.items()}
    save_file({k: v.clone() for k, v in both.items()}, tmp_path / "x.safetensors")
    assert_equal_outputs(read(tmp_path / "x.safetensors"), ema)
    assert_equal_outputs(read(tmp_path / "x.safetensors", weights="raw"), raw)


def test_the_port_is_read_from_containers_too(tmp_path):
    model = tiny_unet(num_groups=32, channels=32)
    torch.save({"model": as_port(tiny_unet(num_groups=32, channels=32, seed=1)),
                "ema": {"shadow": as_port(model)}}, tmp_path / "x.pt")  # fmt: skip
    loaded = read(tmp_path / "x.pt", image_size=8)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_the_names_of_openais_files_say_which_weights_they_hold(tmp_path):
    for name, role, said in (
        ("ema_0.9999_000100.pt", "ema", "EMA"),
        ("model000100.pt", "raw", "raw"),
    ):
        torch.save(A, tmp_path / name)
        assert read_model(tmp_path / name, allow_pickle=True)[1].weights == f"{said} weights"
        other = {"ema": "raw", "raw": "ema"}[role]
        with pytest.raises(ValueError, match=f"holds the {role} weights, as its name says"):
            read(tmp_path / name, weights=other)


def test_what_the_file_does_not_say_is_said(tmp_path):
    torch.save(OpenAI().state_dict(), tmp_path / "x.pt")
    with pytest.warns(UserWarning, match="is read as a model of OpenAI's UNetModel") as caught:
        UNet.from_pretrained(tmp_path / "x.pt", allow_pickle=True, dropout=0.3)
    assert str(caught[0].message) == (
        f"{tmp_path / 'x.pt'} is read as a model of OpenAI's UNetModel; what it does not say is "
        "its project's default: image_size=32, num_heads=4, new_attention_order=False, "
        "diffusion=linear schedule of 1000 steps, eps, fixed_large"
    )
    assert caught[0].filename == __file__


# ---- what can't be read --------------------------------------------------------------------------


def without(state: dict, pattern: str) -> dict:
    """The state dict less the keys that begin so."""
    return {name: tensor for name, tensor in state.items() if not re.match(pattern, name)}


W, Q, A = W86().state_dict(), Tqch().state_dict(), OpenAI().state_dict()
BIAS = torch.zeros(32)
ATTENTION = "middleblocks.0.attn"
TABLE = "time_embedding.timembedding.0.weight"
LUCIDRAINS = {
    "model.init_conv.weight": torch.zeros(8, 3, 7, 7),
    "model.time_mlp.1.weight": torch.zeros(8, 8),
    "betas": torch.zeros(9),
}
OTHERS = {
    "lucidrains": (
        {"model": LUCIDRAINS, "ema": {f"ema_model.{k}": v for k, v in LUCIDRAINS.items()}},
        "is the Unet of lucidrains' denoising-diffusion-pytorch, which is another",
    ),
    "edm": ({"ema": {"model.map_layer0.weight": BIAS}}, "is a network of NVlabs' edm"),
    "diffusers": ({"time_embedding.linear_1.weight": BIAS}, "give their folder"),
    "unknown": ({"a": BIAS}, r"is no model of .*; its keys are 'a', \.\.\."),
    "no tensors": ({"optimizer": {"a": 1}, "epoch": 3}, "its parts are 'optimizer', 'epoch'"),
    "EMA as a list": (
        {"model": Q, "ema": {"shadow_params": [BIAS]}},
        r"its EMA, ema\.shadow_params, holds no network .* pass weights='raw'",
    ),
    "EMA of nothing": ({"model": Q, "ema": {"decay": BIAS}}, "its EMA, ema, holds no network"),
    "two networks": ({"model": Q, "unet": W}, "holds several networks, model, unet"),
    "a process beside": (
        {"model": {"betas": BIAS, **{f"m.{k}": v for k, v in Q.items()}}},
        r"holds a process beside the network \(betas\).*or diffusion=",
    ),
    "pixels shuffled": ({f"_model.{k}": v for k, v in Q.items()}, "behind a PixelUnshuffle"),
}
W86_DAMAGED = {
    "table": ({**W, TABLE: W[TABLE].roll(1, 1)}, r"does not hold the sinusoids of .* 0 \.\. 49"),
    "table's shape": ({**W, TABLE: BIAS}, r"embedding\.0\.weight must be a matrix; got"),
    "end": (without(W, r"tail\.2\.weight"), r"lacks the key tail\.2\.weight"),
    "bias": (without(W, r"head\.bias"), r"lacks 1 of \d+ keys, the first: conv_in\.bias"),
    "key": ({**W, "downblocks.0.alien": BIAS}, r"the first: downblocks\.0\.alien"),
    "block": (without(W, r"downblocks\.1\."), r"the key downblocks\.2\.\*, but its 2"),
    "level": ({**W, "downblocks.0.main.weight": BIAS}, "a level without residual blocks"),
    "qkv": (without(W, f"{ATTENTION}.proj_k.bias"), r"lacks the key mid\.attn_1\.k"),
}
TQCH_DAMAGED = {
    "resampling": (without(Q, r"downsamples\.level_0\.1"), "resample_with_conv=False"),
    "end": (without(Q, r"in_conv\.weight"), r"lacks the key in_conv\.weight"),
    "shape": (
        {**Q, "middle.1.project_in.weight": torch.zeros(9, 9)},
        r"mid\.attn_1\.qkv\.weight has",
    ),
    "NaN": ({**Q, "in_conv.bias": BIAS * torch.nan}, "conv_in.bias holds values that are NaN"),
}
OPENAI_DAMAGED = {
    "classifier": (without(A, "output"), "as classifiers have none"),
    "super-resolution": (OpenAI(in_channels=6).state_dict(), "as super-resolution has"),
    "outputs": (OpenAI(out_channels=4).state_dict(), "3 channels in and 4 out"),
    "no convolutions": (without(A, r".+\.(op|[12]\.conv)\."), "conv_resample"),
    "no convolutions up": (without(A, r".+\.[12]\.conv\."), "conv_resample"),
    "latent": ({**A, "input_blocks.1.1.transformer_blocks.0.x": BIAS}, "attends to a text"),
    "widths": ({**A, "time_embed.0.weight": torch.zeros(256, 64)}, "has 32 channels and its time"),
    "end": (without(A, r"out\.2\.weight"), r"lacks the key out\.2\.weight"),
    "key": ({**A, "middle_block.0.z": BIAS}, r"the first: middle_block\.0\.z"),
    "infinite": ({**A, "out.2.bias": BIAS[:3] + torch.inf}, "holds values that are NaN or infin"),
    "integers": ({**A, "out.2.bias": BIAS[:3].int()}, r"out\.2\.bias has the type torch\.int32"),
}
REFUSED = [*OTHERS.items(), *W86_DAMAGED.items(), *TQCH_DAMAGED.items(), *OPENAI_DAMAGED.items()]


@pytest.mark.parametrize(
    ("content", "message"), [case for _, case in REFUSED], ids=[name for name, _ in REFUSED]
)
def test_what_is_another_or_damaged_is_named(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path / "x.pt")
    assert str(tmp_path / "x.pt") in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "num_heads must divide every attention width"),
        ({"num_heads": "4"}, "num_heads must be a positive integer"),
        ({"num_heads": 4, "head_dim": 8}, "num_heads"),
        ({"new_attention_order": 1}, "new_attention_order must be True or False; got 1"),
        ({"timesteps": 500}, "rescale_timesteps must be given: True is improved-diffusion's"),
        ({"timesteps": 0}, "timesteps must be an integer of at least 1; got 0"),
        ({"schedule": "jsd"}, "schedule must be one of 'linear', 'quadratic', 'cosine'"),
        ({"variance": "big"}, "variance must be one of"),
        ({"timesteps": 9, "diffusion": DIFFUSION}, "give timesteps or diffusion, one of the two"),
        ({"heads": 4}, "heads is no option of OpenAI's UNetModel"),
        ({"channels": 64}, "this model's is"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_named(tmp_path, options, message):
    torch.save(A, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "x.pt", **options)


def test_an_object_in_a_checkpoint_is_named(tmp_path):
    torch.save({"model": Q, "args": argparse.Namespace(lr=1)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"it holds a argparse\.Namespace beside tensors"):
        read(tmp_path / "x.pt")
    with pytest.raises(ValueError, match="is a pickle, which is not loaded unasked"):
        UNet.from_pretrained(tmp_path / "x.pt")


def test_a_checkpoint_that_was_cut_is_named(tmp_path):
    torch.save({"model": Q}, tmp_path / "x.pt")
    content = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"x\.pt can't be read as a state dict"):
        read(tmp_path / "x.pt")


def test_a_checkpoint_that_names_itself_or_others_often_is_looked_into_once():
    """Each of these was as many looks as a power of its names."""
    content: dict = {}
    content["model"] = content
    with pytest.raises(ValueError, match="holds no state dict of tensors"):
        find(content, "x.pt")
    for _ in range(4):
        content = {f"model_{i}": content for i in range(1000)}
    with pytest.raises(ValueError, match="holds no state dict of tensors"):
        find(content, "x.pt")
    with pytest.raises(ValueError, match="holds 65 state dicts; 64 are the most"):
        find({f"model_{i}": Q for i in range(65)}, "x.pt")


# ---- more names, counters and types --------------------------------------------------------------


def role_of(tmp_path, content, suffix="pt", **options) -> str:
    """Which of two sets was read, R or E."""
    path = tmp_path / f"x.{suffix}"
    save_file(content, path) if suffix == "safetensors" else torch.save(content, path)
    model = read(path, **options)
    return "raw" if torch.equal(model.conv_in.bias, R["in_conv.bias"]) else "ema"


R, E = randomised(Tqch(), 1).state_dict(), randomised(Tqch(), 2).state_dict()


@pytest.mark.parametrize(
    ("raw", "ema"),
    [
        ("model", "EMA"), ("net", "modelEMA"), ("model", "emaModel"), ("Model", "Ema"),
        ("model", "ema-model"), ("model", "model_avg"), ("state_dict", "swa_state_dict"),
    ],
)  # fmt: skip
def test_an_average_by_any_of_its_names_is_read(tmp_path, raw, ema):
    assert role_of(tmp_path, {raw: R, ema: E}) == "ema"
    assert role_of(tmp_path, {raw: R, ema: E}, weights="raw") == "raw"


def test_what_is_said_of_an_average_is_none(tmp_path):
    for about in ({"ema_config": {"decay": 0.9}}, {"avg_losses": [1.0, 2.0]}, {"ema": {}}):
        assert role_of(tmp_path, {"model": R, **about}) == "raw"


def test_an_average_under_names_without_dots_is_not_passed_over(tmp_path):
    """As latent-diffusion's LitEma keeps it within the model's own state dict."""
    average = {f"model_ema.{name.replace('.', '')}": tensor for name, tensor in E.items()}
    state = {f"model.{name}": tensor for name, tensor in R.items()}
    content = {"state_dict": {**state, **average, "model_ema.decay": torch.tensor(0.9)}}
    with pytest.raises(ValueError, match=r"its EMA, model_ema\..* pass weights='raw'"):
        role_of(tmp_path, content)
    assert role_of(tmp_path, content, weights="raw") == "raw"


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_counters_beside_weights_are_no_weights(tmp_path, suffix):
    """torch's AveragedModel has one, ema_pytorch's EMA two."""
    averaged = {"n_averaged": torch.tensor(3), **{f"module.{k}": v for k, v in E.items()}}
    assert role_of(tmp_path, averaged, suffix) == "ema"
    both = {f"{name}.{k}": v for name, w in (("online_model", R), ("ema_model", E))
            for k, v in w.items()}  # fmt: skip
    both |= {"initted": torch.tensor(True), "step": torch.tensor(7)}
    assert role_of(tmp_path, both, suffix) == "ema"
    assert role_of(tmp_path, both, suffix, weights="raw") == "raw"


def test_a_table_of_sinusoids_in_bfloat16_is_one(tmp_path):
    theirs = randomised(W86()).bfloat16()
    torch.save(theirs.state_dict(), tmp_path / "x.pt")
    model = read(tmp_path / "x.pt")
    theirs.float().time_embedding.timembedding[0] = W86().time_embedding.timembedding[0]
    assert_equal_outputs(model, theirs)


def test_files_that_are_no_weights_are_named_in_a_line(tmp_path):
    class Shell:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in R.items()}
    for content, message in (
        ({"model": R, "x": Shell()}, "it holds a posix.system beside tensors"),
        (meta, "has no values: it was saved from the meta device"),
    ):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(ValueError, match=message) as caught:
            read(tmp_path / "x.pt")
        assert "\n" not in str(caught.value)
    (tmp_path / "x.pt").write_bytes(b"\2" + bytes(7) + b"{}")  # a safetensors file
    with pytest.raises(ValueError, match=r"no file of torch\.save, or is damaged: Unsupp"):
        read(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()
