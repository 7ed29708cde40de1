"""diffusers' UNet2DModel of the google/ddpm-* family: its folders as ours, and our UNet as one.
diffusers itself is needed for the latter only.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from fastddpm.checkpoint import load_weights, read_json, read_weights
from fastddpm.diffusion import Diffusion
from fastddpm.integrations.port import join_qkv, split_qkv
from fastddpm.schedule import Schedule
from fastddpm.unet import UNet

WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
SCHEDULER = "scheduler_config.json"

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
    "attn_norm_num_groups": (None,),
    "resnet_time_scale_shift": ("default",),
    "add_attention": (True,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
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
    "downsample_padding": 1,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", *["AttnDownBlock2D"] * 3],
    "up_block_types": [*["AttnUpBlock2D"] * 3, "UpBlock2D"],
}
_LAYERS = {
    "time_embedding.linear_1": "temb.dense.0",
    "time_embedding.linear_2": "temb.dense.1",
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
    diffusion: Diffusion | None = None,
) -> UNet:
    """The UNet of a folder with config.json and diffusion_pytorch_model.safetensors.

    With allow_pickle=True a .bin will do. diffusion: by default what scheduler_config.json says,
    beside the model or in ../scheduler, else the paper's; its clip_sample is `sample(clip=...)`.
    Raises ValueError for a network outside the family, naming the option, and for a key that is
    missing, unknown or of another shape.
    """
    source = folder / "config.json"
    files = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not files:
        raise FileNotFoundError(f"{folder} holds neither {' nor '.join(WEIGHTS)}")
    if diffusion is None:
        diffusion = _diffusion(folder)
    model = UNet(**unet_options(config, source), diffusion=diffusion)
    levels = len(model.config["channel_mult"])
    weights = {
        _rename(name, levels): tensor
        for name, tensor in read_weights(files[0], allow_pickle=allow_pickle).items()
    }
    load_weights(model, join_qkv(weights, files[0]), files[0])
    return model


def to_diffusers(model: UNet) -> torch.nn.Module:
    """A diffusers UNet2DModel of the model's architecture with a copy of its weights, on its device
    and in its mode. ImportError where diffusers is not installed.
    """
    from diffusers import UNet2DModel

    c = model.config
    attention = [level in c["attention_levels"] for level in range(len(c["channel_mult"]))]
    net: Any = UNet2DModel(
        sample_size=tuple(c["image_size"]),
        block_out_channels=tuple(c["channels"] * m for m in c["channel_mult"]),
        layers_per_block=c["num_res_blocks"],
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        attention_head_dim=c["head_dim"],
        norm_num_groups=c["num_groups"],
        **{
            name: c[name]
            for name in (
                *("in_channels", "out_channels", "norm_eps", "dropout", "downsample_padding"),
                *("freq_shift", "flip_sin_to_cos"),
            )
        },
    )
    ours = split_qkv(model.state_dict())
    weights = {
        name: ours[_rename(name, len(attention))].reshape(tensor.shape)
        for name, tensor in net.state_dict().items()
    }
    net.load_state_dict(weights)
    parameter = next(model.parameters())
    return net.to(parameter.device, parameter.dtype).train(model.training)


def unet_options(config: dict[str, Any], source: object) -> dict[str, Any]:
    """UNet's options for a UNet2DModel's config; ValueError names what this UNet can't be."""
    if config.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise ValueError(f"{source}: only UNet2DModel is read; got {config['_class_name']!r}")
    for name, allowed in _FIXED.items():
        if (value := config.get(name, allowed[0])) not in allowed:
            raise ValueError(
                f"{source}: {name} must be {' or '.join(map(repr, allowed))} here; got {value!r}"
            )
    c = {name: config.get(name, default) for name, default in _DEFAULTS.items()}
    widths, down, up = c["block_out_channels"], c["down_block_types"], c["up_block_types"]
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
    if bad := [width for width in widths if width % widths[0]]:
        raise ValueError(
            f"{source}: block_out_channels must be multiples of the first; got {bad[0]} of "
            f"{widths[0]}"
        )
    size = config.get("sample_size") or 32
    return {
        "image_size": size if isinstance(size, int) else tuple(size),
        "in_channels": c["in_channels"],
        "out_channels": c["out_channels"],
        "channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "num_res_blocks": c["layers_per_block"],
        "attention_levels": [i for i, there in enumerate(attention) if there],
        "head_dim": c["attention_head_dim"],
        "num_groups": c["norm_num_groups"],
        "norm_eps": c["norm_eps"],
        "dropout": c["dropout"],
        "downsample_padding": c["downsample_padding"],
        "freq_shift": c["freq_shift"],
        "flip_sin_to_cos": c["flip_sin_to_cos"],
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
            r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)",
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


def _diffusion(folder: Path) -> Diffusion:
    """The process of a DDPM or DDIM scheduler's config; the paper's where there is none."""
    places = (folder / SCHEDULER, folder.parent / "scheduler" / SCHEDULER)
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        return Diffusion()
    config = read_json(path)

    def choice(name: str, default: str, choices: dict[str, str]) -> str:
        value = config.get(name) or default
        if value not in choices:
            raise ValueError(
                f"{path}: {name} must be one of {', '.join(map(repr, choices))}; got {value!r}"
            )
        return choices[value]

    T = config.get("num_train_timesteps", 1000)
    if (betas := config.get("trained_betas")) is not None:
        schedule = Schedule(betas)
    else:
        kind = choice(
            "beta_schedule", "linear",
            {"linear": "linear", "scaled_linear": "quadratic", "squaredcos_cap_v2": "cosine"},
        )  # fmt: skip
        ends = (config.get("beta_start", 1e-4), config.get("beta_end", 0.02))
        schedule = Schedule.cosine(T) if kind == "cosine" else getattr(Schedule, kind)(T, *ends)
    prediction = choice("prediction_type", "epsilon", {"epsilon": "eps", "sample": "x0"})
    variance = choice(
        "variance_type", "fixed_small",
        {
            "fixed_small": "fixed_small", "fixed_small_log": "fixed_small",
            "fixed_large": "fixed_large", "fixed_large_log": "fixed_large", "learned": "learned",
        },
    )  # fmt: skip
    loss = "vlb" if variance == "learned" else "simple"
    return Diffusion(schedule, prediction, variance, loss)  # type: ignore[arg-type]
