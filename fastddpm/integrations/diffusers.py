"""diffusers' UNet2DModel of the google/ddpm-* family: its folders as ours, and our UNet as one.
diffusers itself is needed for the latter only, and for `DDPMScheduler` and `PipelineUNet`, which
are imported from here when they are asked for.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
from pathlib import Path
from typing import Any

import torch

from fastddpm.checkpoint import read_json, write_json
from fastddpm.diffusion import Diffusion
from fastddpm.integrations.port import join_qkv, split_qkv
from fastddpm.integrations.schedulers import SCHEDULER, load_process, scheduler_config
from fastddpm.unet import UNet
from fastddpm.unet.config import MAX_VALUES
from fastddpm.weights import load, rename

PROJECT = "diffusers"
STEM = "diffusion_pytorch_model"
# STEM[.variant].safetensors, and STEM.safetensors.index[.variant].json beside its shards.
_WEIGHTS_NAME = STEM + r"(\.(\w+))?\.(safetensors|bin)(\.index(?:\.(\w+))?\.json)?"

# What the family has; anything else is another network, and an error.
_FIXED = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "add_attention": (True,),
    "class_embed_type": (None,),
}
# What has no part in the network's function; the second line is of an EMA's bookkeeping.
_OTHER = (
    "sample_size", "num_train_timesteps",
    "decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma",
    "power",
)  # fmt: skip
# Their names of options that mean the same here.
_SAME = {
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "layers_per_block": "num_res_blocks",
    "attention_head_dim": "head_dim",
    "norm_num_groups": "num_groups",
    "norm_eps": "norm_eps",
    "dropout": "dropout",
    "num_class_embeds": "num_classes",
    "downsample_padding": "downsample_padding",
    "freq_shift": "freq_shift",
    "flip_sin_to_cos": "flip_sin_to_cos",
}
# diffusers' own defaults, for configurations that leave them out.
_DEFAULTS = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "dropout": 0.0,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "attn_norm_num_groups": None,
    "downsample_padding": 1,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", *["AttnDownBlock2D"] * 3],
    "up_block_types": [*["AttnUpBlock2D"] * 3, "UpBlock2D"],
}
_LAYERS = {
    "time_embedding.linear_1": "temb.dense.0",
    "time_embedding.linear_2": "temb.dense.1",
    "class_embedding": "label_emb",
    "conv_norm_out": "norm_out",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
}
_INNER = {
    "time_emb_proj": "temb_proj",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    # The names of the files on the hub, which diffusers renames as it loads them.
    "query": "q",
    "key": "k",
    "value": "v",
    "proj_attn": "proj_out",
}


def load_folder(
    folder: Path,
    config: dict[str, Any],
    *,
    allow_pickle: bool = False,
    variant: str | None = None,
    diffusion: Diffusion | None = None,
) -> UNet:
    """The UNet of a folder with config.json and diffusion_pytorch_model.safetensors, in one file or
    in shards with an index.

    With allow_pickle=True a .bin will do. variant: "fp16" for *.fp16.safetensors, ...; by default
    the plain files, or the only variant there is. Weights become float32. diffusion: by default
    what scheduler_config.json says, beside the model or in ../scheduler, else the paper's; see
    `fastddpm.integrations.schedulers`. Raises ValueError for a network outside the family or a
    process that is not ours, naming the option, and for a key that is missing, unknown or of
    another shape.
    """
    source = folder / "config.json"
    _check_pipeline(folder)
    files = weight_files(folder, variant)
    if diffusion is None:
        diffusion = load_process(folder)
    options = unet_options(config, source)

    def of_file(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return convert(weights, files[0], options)

    def make(shapes: dict[str, torch.Tensor]) -> UNet:
        try:
            return UNet(**options, diffusion=diffusion)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    return load(make, files, convert=of_file, allow_pickle=allow_pickle, source=files[0])


def convert(
    weights: dict[str, torch.Tensor], source: str | os.PathLike, options: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """The weights of a UNet2DModel under our names, q, k and v as the matrix that they are."""
    levels = len(options["channel_mult"])
    return join_qkv(rename(weights, lambda name: _rename(name, levels), source), source)


def check_options(folder: Path, options: dict[str, Any]) -> None:
    """ValueError names the first that `load_folder` does not take."""
    allowed = ("allow_pickle", "variant", "diffusion")
    if unknown := sorted(options.keys() - set(allowed)):
        raise ValueError(
            f"{folder}: {unknown[0]} is no option of a diffusers folder, whose config.json says "
            f"what its network is; it takes {', '.join(allowed)}"
        )


def _check_pipeline(folder: Path) -> None:
    """A network that is one part of a pipeline draws images only if it is its one network."""
    index = folder.parent / "model_index.json"
    if folder.name != "unet" or not index.is_file():
        return
    parts = [name for name, part in read_json(index).items() if name[:1] != "_" and part]
    if others := sorted(set(parts) - {"unet", "scheduler"}):
        raise ValueError(
            f"{index}: the pipeline has a {others[0]} beside its unet, so the unet alone does not "
            "draw its images; only pipelines of a unet and a scheduler are read"
        )


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The files of a model's weights: one, or the shards that an index names.

    Of several ones safetensors come before pickles. Without a variant, the plain files, and where
    there are none the only variant; FileNotFoundError and ValueError name what else there is.
    """
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob(f"{STEM}*")):
        name = re.fullmatch(_WEIGHTS_NAME, path.name)
        if name is not None and path.is_file():
            found.setdefault(name[2] or name[5] or "", []).append(path)
    if not found:
        raise FileNotFoundError(
            f"{folder} holds neither {STEM}.safetensors nor {STEM}.bin, nor a variant or an index "
            "of shards of them"
        )
    names = ", ".join(sorted(found.keys() - {""}))
    if variant is None:
        if "" not in found and len(found) > 1:
            raise ValueError(f"{folder} holds several variants: choose one of {names} as variant=")
        variant = "" if "" in found else next(iter(found))
    elif variant not in found or variant == "":
        raise ValueError(
            f"{folder} has no variant {variant!r} of its weights; it has {names or 'none'}"
        )
    paths = sorted(found[variant], key=lambda p: (".bin" in p.name, p.name.endswith(".json")))
    return _shards(paths[0]) if paths[0].suffix == ".json" else paths[:1]


def _shards(index: Path) -> list[Path]:
    """The files that an index of shards names, each in its folder."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index}: the object 'weight_map' is missing")
    names = set()
    for name in places.values():
        if not isinstance(name, str) or Path(name).name != name or not name.startswith(STEM):
            raise ValueError(f"{index}: weight_map names no file of weights beside it: {name!r}")
        names.add(name)
    for name in sorted(names):
        if not (index.parent / name).is_file():
            raise FileNotFoundError(
                f"{index.parent} lacks the file {name}, which {index.name} names"
            )
    return [index.parent / name for name in sorted(names)]


def to_diffusers(model: UNet) -> torch.nn.Module:
    """A diffusers UNet2DModel of the model's architecture with a copy of its weights, on its device
    and in its mode. ImportError where diffusers is not installed, ValueError where it has no such
    network.

    Its save_pretrained writes the model's process too, as the scheduler_config.json of a
    DDPMScheduler that `UNet.from_pretrained` and diffusers read; where there is no such scheduler
    it raises the ValueError that says why, before a file is touched.
    """
    from diffusers import UNet2DModel

    c = {**model.config, "head_dim": _head_dim(model.config)}
    if c["resblock_updown"]:
        raise ValueError(
            "a model whose residual blocks resample (resblock_updown) is not written as a "
            "UNet2DModel, which resamples between them"
        )
    scaled = c["scale_shift_norm"]
    attention = [level in c["attention_levels"] for level in range(len(c["channel_mult"]))]
    net: Any = UNet2DModel(
        sample_size=tuple(c["image_size"]),
        block_out_channels=tuple(c["channels"] * m for m in c["channel_mult"]),
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        resnet_time_scale_shift="scale_shift" if scaled else "default",
        attn_norm_num_groups=c["num_groups"] if scaled else None,
        **{theirs: c[ours] for theirs, ours in _SAME.items()},
    )
    ours = split_qkv(model.state_dict())
    weights = {
        name: ours[_rename(name, len(attention))].reshape(tensor.shape)
        for name, tensor in net.state_dict().items()
    }
    net.load_state_dict(weights)
    net.save_pretrained = functools.partial(_save_pretrained, net, model.diffusion)
    parameter = next(model.parameters())
    # Not by its own `to`, which warns of parts to be kept in float32 where there are none.
    return torch.nn.Module.to(net, parameter.device, parameter.dtype).train(model.training)


def _head_dim(config: dict[str, Any]) -> int | None:
    """Channels a head, as UNet2DModel has them; ValueError where they differ by level."""
    if not config["num_heads"]:
        return config["head_dim"]
    widths = [config["channels"] * m for m in config["channel_mult"]]
    sizes = {
        widths[level] // config["num_heads"]
        for level in (*config["attention_levels"], len(widths) - 1)
    }
    if len(sizes) > 1:
        raise ValueError(
            f"num_heads={config['num_heads']} are heads of {sorted(sizes)} channels here; those "
            "of a UNet2DModel have the same size at every level (head_dim)"
        )
    return sizes.pop()


def _save_pretrained(
    net: Any, diffusion: Diffusion, save_directory: str | os.PathLike, *args: Any, **options: Any
) -> None:
    config = scheduler_config(diffusion)
    type(net).save_pretrained(net, save_directory, *args, **options)
    write_json(Path(save_directory) / SCHEDULER, config)


def unet_options(config: dict[str, Any], source: object) -> dict[str, Any]:
    """UNet's options for a UNet2DModel's config; ValueError names what this UNet can't be."""
    if config.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise ValueError(f"{source}: only UNet2DModel is read; got {config['_class_name']!r}")
    for name, allowed in _FIXED.items():
        if (value := config.get(name, allowed[0])) not in allowed:
            raise ValueError(
                f"{source}: {name} must be {' or '.join(map(repr, allowed))} here; got {value!r}"
            )
    for name, value in config.items():
        known = name.startswith("_") or name in _FIXED or name in _DEFAULTS or name in _OTHER
        if not known and value is not None and value is not False:
            raise ValueError(f"{source}: the option {name} is not known; got {value!r}")
    c = {name: config.get(name, default) for name, default in _DEFAULTS.items()}

    def sequence(name: str, kind: type) -> list[Any]:
        value = c[name]
        if (
            not isinstance(value, (list, tuple))
            or not 1 <= len(value) <= MAX_VALUES
            or any(type(each) is not kind for each in value)
        ):
            what = {int: "integers", str: "names"}[kind]
            raise ValueError(f"{source}: {name} must be a list of {what}; got {value!r:.80}")
        return list(value)

    widths = sequence("block_out_channels", int)
    down, up = sequence("down_block_types", str), sequence("up_block_types", str)
    kinds = {"DownBlock2D": False, "AttnDownBlock2D": True, "UpBlock2D": False,
             "AttnUpBlock2D": True}  # fmt: skip
    if unknown := [kind for kind in (*down, *up) if kind not in kinds]:
        raise ValueError(
            f"{source}: block types must be among {', '.join(kinds)}; got {unknown[0]!r}"
        )
    attention = [kinds[kind] for kind in down]
    if not len(widths) == len(down) == len(up) or attention != [kinds[k] for k in reversed(up)]:
        raise ValueError(
            f"{source}: up_block_types must mirror down_block_types, one for each of "
            f"block_out_channels; got {down}, {up} and {widths}"
        )
    if bad := [width for width in widths if width < 1 or width % widths[0]]:
        raise ValueError(
            f"{source}: block_out_channels must be multiples of the first; got {bad[0]} of "
            f"{widths[0]}"
        )
    # The middle's attention has a norm of as many groups by default, but none beside a scale.
    scaled = c["resnet_time_scale_shift"] == "scale_shift"
    groups = [c["norm_num_groups"], *([] if scaled else [None])]
    if c["attn_norm_num_groups"] not in groups:
        raise ValueError(
            f"{source}: attn_norm_num_groups must be norm_num_groups ({c['norm_num_groups']}) "
            f"here; got {c['attn_norm_num_groups']!r}"
        )
    size = config.get("sample_size")
    return {
        "image_size": 32 if size is None else size,
        "channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "attention_levels": [i for i, there in enumerate(attention) if there],
        "scale_shift_norm": scaled,
        **{ours: c[theirs] for theirs, ours in _SAME.items()},
    }


def _rename(name: str, levels: int) -> str:
    """A key of UNet2DModel as the port's key; one that it can't be stays as it is."""
    layer, _, kind = name.rpartition(".")
    for theirs, ours in _LAYERS.items():
        if layer == theirs or layer.startswith(theirs + "."):
            layer = ours + layer[len(theirs) :]
            break
    else:
        part = re.fullmatch(
            r"(down|up)_blocks\.([0-9]{1,3})\.(resnets|attentions|downsamplers|upsamplers)\.([0-9]+)\.(.+)",
            layer,
        )
        if part:
            way, i, what, j, rest = part.groups()
            level = int(i) if way == "down" else levels - 1 - int(i)
            inner = {
                "resnets": f"block.{j}",
                "attentions": f"attn.{j}",
                "downsamplers": "downsample",
                "upsamplers": "upsample",
            }[what]
            layer = f"{way}.{level}.{inner}.{rest}"
    for theirs, ours in _INNER.items():
        if layer.endswith("." + theirs):
            layer = layer[: -len(theirs)] + ours
            break
    return f"{layer}.{kind}"


_NEED_DIFFUSERS = {
    "DDPMScheduler": "fastddpm.integrations.diffusers_scheduler",
    "PipelineUNet": "fastddpm.integrations.diffusers_unet",
}


def __getattr__(name: str) -> Any:
    """The classes whose modules import diffusers, when they are asked for."""
    if name not in _NEED_DIFFUSERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_NEED_DIFFUSERS[name]), name)
    except ModuleNotFoundError as error:
        if error.name != "diffusers":
            raise
        raise ImportError(f"{name} needs diffusers: pip install 'fastddpm[diffusers]'") from error
