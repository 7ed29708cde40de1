"""OpenAI's UNetModel (improved-diffusion, guided-diffusion): the paper's network with GroupNorm's
eps 1e-5, padding on both sides of a stride-2 convolution and cosines before sines, and with the
options num_heads or head_dim, scale_shift_norm, resblock_updown and num_classes.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from fastddpm.diffusion import Diffusion
from fastddpm.integrations.layouts import Keys, renamed
from fastddpm.integrations.port import ATTENTION_RESOLUTION, join_qkv
from fastddpm.weights import Tensors

PROJECT = "OpenAI's UNetModel"
OWN = {"new_attention_order": False}  # the reader's options beside UNet's

# The image sizes of their scripts, which follow from nothing else in a file.
_SIZES = {(1, 2, 2, 2): 32, (1, 2, 3, 4): 64, (1, 1, 2, 3, 4): 128, (1, 1, 2, 2, 4, 4): 256}
_FIXED = {
    "norm_eps": 1e-5, "downsample_padding": 1, "freq_shift": 0, "flip_sin_to_cos": True,
    "num_groups": 32,
}  # fmt: skip
_LEARNED: dict[str, Any] = {"variance": "learned_range", "loss": "hybrid"}
_ENDS = {
    "time_embed.0": "temb.dense.0",
    "time_embed.2": "temb.dense.1",
    "label_emb": "label_emb",
    "input_blocks.0.0": "conv_in",
    "middle_block.0": "mid.block_1",
    "middle_block.1": "mid.attn_1",
    "middle_block.2": "mid.block_2",
    "out.0": "norm_out",
    "out.2": "conv_out",
}
_INNER = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "temb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "nin_shortcut",
    "norm": "norm",
    "qkv": "qkv",
    "proj_out": "proj_out",
}


def architecture(
    weights: Tensors, source: str | os.PathLike, given: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """UNet's options that the file says, and its project's defaults of those that it does not: four
    heads, q, k and v head by head, no dropout, the image size of their scripts for this
    channel_mult, and the paper's process, its variance learned_range where the network has two
    outputs a channel and fixed_large where it has one."""
    keys = Keys(weights, source, PROJECT)
    if not any(name.startswith("output_blocks.") for name in weights):
        raise keys.wrong("it has no output_blocks.*, as classifiers have none")
    if any(".transformer_blocks." in name for name in weights):
        raise keys.wrong("it attends to a text (transformer_blocks), as latent diffusion's does")
    levels, blocks = _levels(keys)
    first, in_channels = keys.shape("input_blocks.0.0.weight")[:2]
    channels = keys.shape("time_embed.0.weight", 2)[1]
    if first != channels:
        raise keys.wrong(
            f"its first level has {first} channels and its time embedding {channels}, which are "
            "the same number here"
        )
    inputs = [1 + level * (blocks + 1) for level in range(levels)]  # each level's first block
    widths = [keys.shape(f"input_blocks.{i}.0.in_layers.2.weight")[0] for i in inputs]
    mult = keys.multiples(widths, channels)
    out_channels = keys.shape("out.2.weight")[0]
    if in_channels == 6 and out_channels in (3, 6):
        raise keys.wrong("it has 6 channels in, as super-resolution has, whose half is an image")
    learned = out_channels == 2 * in_channels
    if not learned and out_channels != in_channels:
        raise keys.wrong(
            f"it has {in_channels} channels in and {out_channels} out; the same, or twice as many "
            "with learned variances, are allowed"
        )
    embedding = keys.shape("input_blocks.1.0.emb_layers.1.weight", 2)[0]
    options: dict[str, Any] = {
        **_FIXED,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "channels": channels,
        "channel_mult": mult,
        "num_res_blocks": blocks,
        "attention_levels": [
            level for level, i in enumerate(inputs) if f"input_blocks.{i}.1.qkv.weight" in keys
        ],
        "scale_shift_norm": embedding == 2 * widths[0],
        "resblock_updown": f"input_blocks.{blocks + 1}.0.in_layers.0.weight" in keys,
    }
    if "label_emb.weight" in keys:
        options["num_classes"] = keys.shape("label_emb.weight", 2)[0]
    attention = options["attention_levels"]
    size = _SIZES.get(tuple(mult), ATTENTION_RESOLUTION << (attention[0] if attention else 1))
    unsaid: dict[str, Any] = {"image_size": size, "dropout": 0.0}
    if "head_dim" not in given:
        unsaid["num_heads"] = 4
    unsaid |= OWN
    unsaid["diffusion"] = Diffusion(**(_LEARNED if learned else {"variance": "fixed_large"}))
    return options, unsaid


def convert(weights: Tensors, source: str | os.PathLike, options: dict[str, Any]) -> Tensors:
    """The weights under our names. The rows of q, k and v, which are head by head unless
    new_attention_order is true, become those of all q, all k and all v."""
    keys = Keys(weights, source, PROJECT)
    levels, blocks = _levels(keys)
    layers = dict(_ENDS)
    for level in range(levels):
        for j in range(blocks):
            i = 1 + level * (blocks + 1) + j
            layers[f"input_blocks.{i}.0"] = f"down.{level}.block.{j}"
            layers[f"input_blocks.{i}.1"] = f"down.{level}.attn.{j}"
        i = (level + 1) * (blocks + 1)
        layers[f"input_blocks.{i}.0"] = f"down.{level}.downsample"
        for j in range(blocks + 1):
            i = (levels - 1 - level) * (blocks + 1) + j
            layers[f"output_blocks.{i}.0"] = f"up.{level}.block.{j}"
            layers[f"output_blocks.{i}.1"] = f"up.{level}.attn.{j}"
        for at in (1, 2):  # behind an attention or not
            if at == 2 or f"output_blocks.{i}.1.qkv.weight" not in keys:
                layers[f"output_blocks.{i}.{at}"] = f"up.{level}.upsample"
    inner = {**_INNER, "op": "conv", "conv": "conv"}
    weights = join_qkv(renamed(weights, layers, inner, source), source)
    if options["new_attention_order"]:
        return weights
    return {
        name: _by_part(tensor, options) if ".qkv." in name else tensor
        for name, tensor in weights.items()
    }


def _levels(keys: Keys) -> tuple[int, int]:
    """How many levels, and residual blocks in each: the outputs' last blocks of all levels but one
    have a layer that doubles the image."""
    outputs = keys.count("output_blocks")
    last = [
        any(
            f"output_blocks.{i}.{at}.{layer}" in keys
            for at in (1, 2)
            for layer in ("conv.weight", "in_layers.0.weight")
        )
        for i in range(outputs)
    ]
    levels = 1 + sum(last)
    blocks = outputs // levels
    ends = [(i + 1) % blocks == 0 and i < outputs - 1 for i in range(outputs)]
    inputs = keys.numbers("input_blocks")
    down = sum(f"input_blocks.{i}.0.op.weight" in keys for i in inputs)
    if (
        blocks < 2
        or blocks * levels != outputs
        or last != ends
        or len(inputs) != outputs
        or down not in (0, levels - 1)
    ):
        raise keys.wrong(
            f"of its {outputs} output blocks {levels - 1} double the image; every level must have "
            "as many blocks, and all but one a layer with weights that resamples (conv_resample)"
        )
    return levels, blocks - 1


def _by_part(rows: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """(3C, ...) rows (head, part, channel) as (part, head, channel); unchanged where the heads do
    not divide them, which UNet refuses by name."""
    heads, head_dim = options.get("num_heads"), options.get("head_dim")
    width = rows.shape[0] // 3
    if type(head_dim) is int and head_dim > 0:
        heads = width // head_dim
    if type(heads) is not int or heads < 1 or width % heads or rows.shape[0] % 3:
        return rows
    return rows.unflatten(0, (heads, 3, width // heads)).transpose(0, 1).flatten(0, 2)
