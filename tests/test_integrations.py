"""Other projects' models, read and run: outputs equal theirs, and what we can't be is named."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from peers import as_port
from safetensors.torch import load_file, save_file
from toy import generator, tiny_unet

import fastddpm
from fastddpm import UNet
from fastddpm.integrations.diffusers import to_diffusers, unet_options

diffusers = pytest.importorskip("diffusers")
EMAModel = pytest.importorskip("diffusers.training_utils").EMAModel

# The options of google/ddpm-cifar10-32 and its family, at a size that a test can run.
FAMILY = {
    "sample_size": 16,
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
    "attention_head_dim": None,
    "act_fn": "silu",
}


def peer(**options) -> torch.nn.Module:
    """A UNet2DModel whose every parameter is random, norms and biases too."""
    model = diffusers.UNet2DModel(**{**FAMILY, **options})
    random = generator(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 0.2 if p.dim() == 1 else p[0].numel() ** -0.5
            p.copy_(torch.randn(p.shape, generator=random) * scale + float("norm" in name) * 0.7)
    return model.eval()


def assert_equal_outputs(model: UNet, theirs: torch.nn.Module) -> None:
    """To 1e-5 of the largest output, in float32, at several steps."""
    x = torch.randn(3, model.in_channels, *model.image_size, generator=generator(5))
    t = torch.tensor([0, 371, 999])
    classes = model.config["num_classes"]
    y = () if classes is None else (torch.tensor([0, classes - 1, 1]),)
    with torch.no_grad():
        expected = theirs(x, t, *y).sample
        assert (model(x, t, *y) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"in_channels": 1, "out_channels": 1, "sample_size": (8, 20)},
        # UNet2DModel's own defaults, as its users have them.
        {"downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-5},
        {"attention_head_dim": 8, "norm_num_groups": 16},
        {"layers_per_block": 1, "dropout": 0.1},
        {
            "resnet_time_scale_shift": "scale_shift",
            "attn_norm_num_groups": 32,
            "num_class_embeds": 5,
        },
    ],
    ids=str,
)
def test_a_diffusers_folder_computes_what_diffusers_computes(tmp_path, options):
    theirs = peer(**options)
    theirs.save_pretrained(tmp_path)
    model = UNet.from_pretrained(tmp_path)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in theirs.parameters())
    assert_equal_outputs(model, theirs)
    # And from a folder of ours once it was saved as one.
    model.save_pretrained(tmp_path / "ours")
    assert_equal_outputs(UNet.from_pretrained(tmp_path / "ours"), theirs)
    # And back, to the bit.
    back = to_diffusers(model)
    assert not back.training
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    assert_equal_outputs(model, back)


def test_defaults_that_a_config_leaves_out_are_diffusers_own(tmp_path):
    theirs = diffusers.UNet2DModel()
    config = {k: v for k, v in theirs.config.items() if v is not None and not k.startswith("_")}
    assert unet_options({}, "") == unet_options({**config, "sample_size": None}, "")


def test_attention_names_of_the_hubs_files_are_read(tmp_path):
    """The google/ddpm-* files say query, key, value and proj_attn."""
    theirs = peer()
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in load_file(path).items():
        for new, former in old.items():
            name = name.replace(f".{new}.", f".{former}.")
        tensors[name] = tensor
    save_file(tensors, path)
    assert_equal_outputs(UNet.from_pretrained(tmp_path), theirs)


def test_a_pipelines_folder_is_read_with_its_process(tmp_path):
    theirs = peer()
    scheduler = diffusers.DDPMScheduler(
        num_train_timesteps=50, beta_schedule="scaled_linear", variance_type="fixed_large"
    )
    diffusers.DDPMPipeline(unet=theirs, scheduler=scheduler).save_pretrained(tmp_path)
    model = UNet.from_pretrained(tmp_path)
    assert_equal_outputs(model, theirs)
    assert model.diffusion.variance == "fixed_large"
    betas = torch.tensor(model.diffusion.schedule.betas)
    torch.testing.assert_close(betas.float(), scheduler.betas, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_schedules_are_diffusers(tmp_path, kind):
    peer().save_pretrained(tmp_path)
    scheduler = diffusers.DDPMScheduler(beta_schedule=kind, prediction_type="sample")
    scheduler.save_pretrained(tmp_path)
    diffusion = UNet.from_pretrained(tmp_path).diffusion
    assert (diffusion.prediction, diffusion.variance) == ("x0", "fixed_small")
    betas = torch.tensor(diffusion.schedule.betas).float()
    torch.testing.assert_close(betas, scheduler.betas, rtol=1e-5, atol=1e-7)


def test_trained_betas_and_what_is_given_take_precedence(tmp_path):
    peer().save_pretrained(tmp_path)
    diffusers.DDPMScheduler(trained_betas=[0.1, 0.2]).save_pretrained(tmp_path)
    assert UNet.from_pretrained(tmp_path).diffusion.schedule.betas.tolist() == [0.1, 0.2]
    own = fastddpm.Diffusion(fastddpm.Schedule.cosine(7))
    assert UNet.from_pretrained(tmp_path, diffusion=own).diffusion is own


def test_a_diffusers_model_is_sampled_as_it_is():
    """UNet2DModel returns an object with .sample; Algorithm 2 takes it."""
    theirs = peer(block_out_channels=(32,), down_block_types=("DownBlock2D",),
                  up_block_types=("UpBlock2D",), layers_per_block=1)  # fmt: skip
    x = fastddpm.sample(theirs, 2, shape=(3, 16, 16), steps=3, progress=False)
    assert x.shape == (2, 3, 16, 16)
    assert x.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn must be 'silu' or 'swish' here; got 'gelu'"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift must be 'default' or"),
        (
            {"resnet_time_scale_shift": "scale_shift"},
            r"attn_norm_num_groups must be norm_num_groups \(32",
        ),
        ({"attn_norm_num_groups": [32]}, r"attn_norm_num_groups must be norm_num_groups \(32\)"),
        ({"class_embed_type": "timestep"}, "class_embed_type must be None here"),
        ({"down_block_types": ["SkipDownBlock2D"]}, "got 'SkipDownBlock2D'"),
        ({"up_block_types": ["UpBlock2D"] * 3}, "up_block_types must mirror down_block_types"),
        ({"block_out_channels": [32, 48, 64]}, "must be multiples of the first; got 48 of 32"),
        ({"_class_name": "UNet2DConditionModel"}, "only UNet2DModel is read"),
        ({"norm_num_groups": 5}, "num_groups must divide every width"),
    ],
    ids=str,
)
def test_another_network_is_refused_by_name(tmp_path, options, message):
    peer().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))
    with pytest.raises(ValueError, match=message):
        UNet.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta_schedule": "laplace"}, "beta_schedule must be one of 'linear', 'scaled_linear'"),
        ({"prediction_type": "flow"}, "prediction_type must be one of 'epsilon', 'sample', 'v_pr"),
        ({"variance_type": "learned"}, "variance_type must be one of"),
    ],
    ids=str,
)
def test_another_process_is_refused_by_name(tmp_path, options, message):
    peer().save_pretrained(tmp_path)
    (tmp_path / "scheduler_config.json").write_text(json.dumps(options))
    with pytest.raises(ValueError, match=message):
        UNet.from_pretrained(tmp_path)


def test_damaged_diffusers_folders(tmp_path):
    peer().save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    name = "mid_block.attentions.0.to_k.weight"
    key = tensors.pop(name)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"lacks the key mid\.attn_1\.k\.weight"):
        UNet.from_pretrained(tmp_path)
    save_file({**tensors, name: key, "alien": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="unknown keys, the first: "):
        UNet.from_pretrained(tmp_path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        UNet.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds neither diffusion_pytorch_model\.safet"):
        UNet.from_pretrained(tmp_path)
    torch.save({**tensors, name: key}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="is a pickle, which is not loaded unasked"):
        UNet.from_pretrained(tmp_path)
    assert UNet.from_pretrained(tmp_path, allow_pickle=True).in_channels == 3


SMALL = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
         "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
         "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}  # fmt: skip
STEM = "diffusion_pytorch_model"


def test_the_only_variant_is_read_and_one_of_several_is_asked_for(tmp_path):
    """*.fp16.safetensors alone was "holds neither ..."."""
    theirs = peer(**SMALL)
    theirs.half().save_pretrained(tmp_path, variant="fp16")
    model = UNet.from_pretrained(tmp_path)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert_equal_outputs(model, theirs.float())
    other = peer(**SMALL)
    with torch.no_grad():
        other.conv_out.bias += 1
    other.save_pretrained(tmp_path, variant="non_ema")
    with pytest.raises(ValueError, match="several variants: choose one of fp16, non_ema as varian"):
        UNet.from_pretrained(tmp_path)
    assert_equal_outputs(UNet.from_pretrained(tmp_path, variant="non_ema"), other)
    other.save_pretrained(tmp_path)  # a plain one comes first
    assert_equal_outputs(UNet.from_pretrained(tmp_path), other)
    assert_equal_outputs(UNet.from_pretrained(tmp_path, variant="fp16"), theirs)
    with pytest.raises(ValueError, match="has no variant 'bf16' of its weights; it has fp16, non_"):
        UNet.from_pretrained(tmp_path, variant="bf16")


def test_the_ema_of_a_training_checkpoint_has_a_folder_of_its_own(tmp_path):
    """As diffusers' training script has accelerate save it; the EMA's config has its counts."""
    raw, ema = peer(**SMALL), peer(**SMALL)
    with torch.no_grad():
        ema.conv_out.bias += 1
    raw.save_pretrained(tmp_path / "unet")
    average = EMAModel(ema.parameters(), model_cls=type(ema), model_config=ema.config)
    average.save_pretrained(tmp_path / "unet_ema")
    with pytest.warns(UserWarning, match=r"EMA weights \(unet_ema\) are taken"):
        assert_equal_outputs(UNet.from_pretrained(tmp_path), ema)
    assert_equal_outputs(UNet.from_pretrained(tmp_path, weights="ema"), ema)
    assert_equal_outputs(UNet.from_pretrained(tmp_path, weights="raw"), raw)
    with pytest.raises(ValueError, match="weights must be one of 'ema', 'raw'; got 'both'"):
        UNet.from_pretrained(tmp_path, weights="both")
    shutil.rmtree(tmp_path / "unet")
    assert_equal_outputs(UNet.from_pretrained(tmp_path), ema)
    with pytest.raises(ValueError, match="has no unet, where weights='raw' would be; it has unet_"):
        UNet.from_pretrained(tmp_path, weights="raw")


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("safe", [True, False])
def test_shards_are_read(tmp_path, variant, safe):
    theirs = peer(**SMALL)
    theirs.save_pretrained(
        tmp_path, max_shard_size="30KB", variant=variant, safe_serialization=safe
    )
    assert len(list(tmp_path.glob(f"{STEM}*-of-*"))) > 2
    model = UNet.from_pretrained(tmp_path, **({} if safe else {"allow_pickle": True}))
    assert_equal_outputs(model, theirs)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda m: m.update({"conv_in.bias": "../x.safetensors"}),
            ValueError,
            "no file of weights",
        ),
        (lambda m: m.update({"conv_in.bias": 3}), ValueError, "names no file of weights beside it"),
        (lambda m: m.update({"conv_in.bias": f"{STEM}-9.safetensors"}), FileNotFoundError, "lacks"),
        (lambda m: m.clear(), ValueError, "the object 'weight_map' is missing"),
    ],
    ids=["a path", "no name", "no file", "empty"],
)
def test_a_bad_index_is_named(tmp_path, change, error, message):
    peer(**SMALL).save_pretrained(tmp_path, max_shard_size="30KB")
    index = tmp_path / f"{STEM}.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))
    with pytest.raises(error, match=message):
        UNet.from_pretrained(tmp_path)


def test_a_shard_that_overlaps_or_lacks_is_named(tmp_path):
    peer(**SMALL).save_pretrained(tmp_path, max_shard_size="30KB")
    first, second = sorted(tmp_path.glob(f"{STEM}-0000[12]*"))
    name, tensor = next(iter(load_file(first).items()))
    own = load_file(second)
    save_file({**own, name: tensor}, second)
    with pytest.raises(ValueError, match=f"has the key {name}, which another file has too"):
        UNet.from_pretrained(tmp_path)
    own.popitem()
    save_file(own, second)
    with pytest.raises(ValueError, match="lacks "):
        UNet.from_pretrained(tmp_path)


def test_two_names_of_one_weight_are_refused(tmp_path):
    """to_q of today and query of the hub's files: one of them was dropped silently."""
    peer(**SMALL).save_pretrained(tmp_path)
    path = tmp_path / f"{STEM}.safetensors"
    tensors = load_file(path)
    new = "mid_block.attentions.0.to_q.weight"
    save_file({**tensors, new.replace("to_q", "query"): tensors[new] + 1}, path)
    with pytest.raises(ValueError, match=r"has both .*(query|to_q).* and .*, which are one here"):
        UNet.from_pretrained(tmp_path)


def test_a_pipeline_with_another_network_is_refused(tmp_path):
    """The unet of a latent diffusion draws latents, no images."""
    index = {
        "_class_name": "LDMPipeline",
        "vqvae": ["diffusers", "VQModel"],
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": None,
    }
    peer(**SMALL).save_pretrained(tmp_path / "unet")
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for folder in (tmp_path, tmp_path / "unet"):
        with pytest.raises(ValueError, match="the pipeline has a vqvae beside its unet"):
            UNet.from_pretrained(folder)
    del index["vqvae"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.warns(
        UserWarning, match="names a scheduler, but there is no scheduler_config.json"
    ):
        assert UNet.from_pretrained(tmp_path).in_channels == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"downsample_padding": True}, "downsample_padding must be 0 or 1; got True"),
        ({"sample_size": 0}, "image_size must be positive integers; got 0"),
        ({"block_out_channels": [0, 0]}, "must be multiples of the first; got 0 of 0"),
        ({"block_out_channels": 8}, "block_out_channels must be a list of integers; got 8"),
        ({"block_out_channels": []}, "block_out_channels must be a list of integers"),
        ({"block_out_channels": [8, 16.0]}, "block_out_channels must be a list of integers"),
        ({"down_block_types": "DownBlock2D"}, "down_block_types must be a list of names"),
        ({"down_block_types": [["DownBlock2D"], 1]}, "down_block_types must be a list of names"),
        ({"layers_per_block": [1, 2]}, "num_res_blocks must be a positive integer"),
        ({"norm_num_groups": None}, "num_groups must be a positive integer; got None"),
        ({"freq_shift": 4}, "freq_shift must be below 4, half of 8 channels"),
        ({"new_attention": "linear"}, "the option new_attention is not known; got 'linear'"),
        ({"_class_name": ["UNet2DModel"]}, "only UNet2DModel is read"),
    ],
    ids=str,
)
def test_an_option_of_another_type_is_named(tmp_path, options, message):
    peer(**SMALL).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))
    with pytest.raises(ValueError, match=message) as caught:
        UNet.from_pretrained(tmp_path)
    assert str(path) in str(caught.value)


# ---- the PyTorch port of the paper's code --------------------------------------------------------


PORT = {"image_size": 32, "in_channels": 3, "channels": 32, "num_groups": 32}


@pytest.mark.parametrize(
    "options",
    [
        {"channel_mult": (1, 2, 2, 2), "num_res_blocks": 2, "attention_levels": (1,)},
        {"image_size": 64, "channel_mult": (1, 1, 2), "attention_levels": (2,)},
    ],
    ids=str,
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_ports_files_are_read_and_their_architecture_inferred(tmp_path, options, prefix):
    model = tiny_unet(**{**PORT, **options, "diffusion": None})
    save_file({prefix + k: v for k, v in as_port(model).items()}, tmp_path / "x.safetensors")
    loaded = UNet.from_pretrained(tmp_path / "x.safetensors")
    assert loaded.config == model.config
    assert not loaded.training
    x, t = torch.randn(2, 3, *model.image_size), torch.tensor([0, 999])
    with torch.no_grad():
        assert torch.equal(loaded(x, t), model(x, t))


def test_the_ports_key_names_are_those_of_its_checkpoints():
    """Some of the names in its CIFAR-10 file, written down from the port's own code."""
    with torch.device("meta"):
        names = as_port(UNet.cifar10()).keys()
    for name in (
        "temb.dense.0.weight", "temb.dense.1.bias", "conv_in.weight",
        "down.0.block.0.norm1.weight", "down.0.block.1.conv2.bias", "down.0.downsample.conv.weight",
        "down.1.block.0.nin_shortcut.weight", "down.1.block.0.temb_proj.bias",
        "down.1.attn.0.norm.weight", "down.1.attn.1.q.weight", "down.1.attn.1.proj_out.bias",
        "mid.block_1.norm1.weight", "mid.attn_1.k.bias", "mid.block_2.conv1.weight",
        "up.0.block.2.conv1.weight", "up.1.attn.2.v.weight", "up.3.upsample.conv.bias",
        "norm_out.weight", "conv_out.bias",
    ):  # fmt: skip
        assert name in names, name


def test_options_of_the_port_take_precedence(tmp_path):
    model = tiny_unet(num_groups=8, image_size=16, in_channels=3, num_res_blocks=2)
    torch.save([{}, as_port(model)], tmp_path / "x.ckpt")
    own = fastddpm.Diffusion(fastddpm.Schedule.cosine(9))
    loaded = UNet.from_pretrained(
        tmp_path / "x.ckpt", allow_pickle=True, num_groups=8, image_size=16, diffusion=own
    )
    assert (loaded.image_size, loaded.diffusion) == ((16, 16), own)


@pytest.mark.parametrize(
    ("options", "variance"),
    [
        ({"channel_mult": (1, 2, 2, 2), "attention_levels": (1,)}, "fixed_large"),  # CIFAR-10's
        ({"image_size": 256, "channel_mult": (1, 1, 2, 2, 4, 4), "attention_levels": (4,)},
         "fixed_small"),  # CelebA-HQ's and LSUN's
    ],
)  # fmt: skip
def test_a_port_file_has_the_papers_variance(tmp_path, options, variance):
    model = tiny_unet(**{**PORT, **options, "diffusion": None})
    path = tmp_path / "x.safetensors"
    save_file(as_port(model), path)
    for given in ({}, {"diffusion": None}):
        diffusion = UNet.from_pretrained(path, **given).diffusion
        assert (diffusion.prediction, diffusion.variance) == ("eps", variance)
        assert diffusion.schedule.to_config() == fastddpm.Schedule.linear().to_config()
    own = fastddpm.Diffusion(variance="fixed_large")
    assert UNet.from_pretrained(path, diffusion=own).diffusion is own
    assert UNet.from_pretrained(path, image_size=512).diffusion.variance == "fixed_small"


def test_damaged_port_files(tmp_path):
    path = tmp_path / "x.safetensors"
    weights = as_port(tiny_unet(**PORT))

    def refused(message: str, **change) -> None:
        save_file({k: v for k, v in {**weights, **change}.items() if v is not None}, path)
        with pytest.raises(ValueError, match=message):
            UNet.from_pretrained(path)

    refused(r"lacks the key mid\.attn_1\.v\.weight", **{"mid.attn_1.v.weight": None})
    refused(r"lacks the key mid\.attn_1\.q\.bias", **{"mid.attn_1.q.bias": None})
    refused(r"lacks 1 of \d+ keys, the first: norm_out\.bias", **{"norm_out.bias": None})
    refused(r"unknown keys, the first: alien", alien=torch.zeros(1))
    refused(r"lacks the key conv_in\.weight", **{"conv_in.weight": None})
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"no model of the PyTorch port of DDPM.*down\.\*"):
        UNet.from_pretrained(path)


@pytest.mark.parametrize(
    ("names", "shapes", "message"),
    [
        ("qkv", ((64, 32), (16, 32), (16, 32)), "must have one shape; got"),
        ("qkv", ((32, 32, 3, 3),) * 3, "must be a matrix or a 1x1 convolution; got shape"),
        ("q", ((32,),), "must be a matrix or a 1x1 convolution"),
        ("k", ((16, 32, 1, 1),), "must have one shape; got"),
        ("qkv", ((32, 16),) * 3, "this model's is"),
        (("proj_out",), ((32, 8, 4, 1),), "proj_out.weight must be a matrix or a 1x1 convolution"),
    ],
    ids=str,
)
def test_attention_of_another_shape_is_refused(tmp_path, names, shapes, message):
    """Parts whose rows add up were joined, each with rows of another's."""
    weights = as_port(tiny_unet(**PORT, channel_mult=(1, 1)))
    for name, shape in zip(names, shapes, strict=True):
        weights[f"mid.attn_1.{name}.weight"] = torch.zeros(shape)
    save_file(weights, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message):
        UNet.from_pretrained(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("down.99999999999.block.0.conv1.weight", r"the key down\.99999999999\.\*.*from 0 to 2"),
        ("down.0.block.77.conv1.weight", r"down\.0\.block\.77\.\*"),
        ("down.01.block.0.conv1.weight", r"down\.01\."),
        ("module.conv_in.bias", r"has both .*conv_in\.bias.*which are one here"),
        ("mid.attn_1.qkv.weight", r"has both mid\.attn_1\.[qkv]\.weight and mid\.attn_1\.qkv"),
    ],
)
def test_keys_that_a_port_file_cannot_have(tmp_path, key, message):
    weights = as_port(tiny_unet(**PORT))
    save_file({**weights, key: torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message):
        UNet.from_pretrained(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int64, torch.complex64, torch.float8_e4m3fn],
    ids=str,
)
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_weights_that_are_no_floats_are_refused_by_type(tmp_path, dtype, suffix):
    weights = as_port(tiny_unet(**PORT))
    weights["conv_in.weight"] = weights["conv_in.weight"].to(dtype)
    path = tmp_path / f"x.{suffix}"
    save_file(weights, path) if suffix == "safetensors" else torch.save(weights, path)
    with pytest.raises(
        ValueError, match=r"conv_in\.weight has the type .*; weights are torch\.flo"
    ):
        UNet.from_pretrained(path, allow_pickle=suffix == "pt")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_weights_of_other_float_types_become_float32(tmp_path, dtype):
    model = tiny_unet(**PORT)
    save_file({k: v.to(dtype) for k, v in as_port(model).items()}, tmp_path / "x.safetensors")
    loaded = UNet.from_pretrained(tmp_path / "x.safetensors", diffusion=model.diffusion)
    for name, tensor in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == torch.float32
        assert torch.equal(loaded.state_dict()[name], tensor.to(dtype).float()), name


def test_no_peer_is_imported():
    """Reading their files needs no package of theirs."""
    import subprocess
    import sys

    code = (
        "import sys, fastddpm, fastddpm.integrations.diffusers, fastddpm.integrations.port; "
        "assert 'diffusers' not in sys.modules"
    )
    with warnings.catch_warnings():
        subprocess.run([sys.executable, "-c", code], check=True)
