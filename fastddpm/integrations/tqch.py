"""The network of tqch/ddpm-torch: the paper's under other names."""

from __future__ import annotations

import os
from typing import Any

from fastddpm.diffusion import Diffusion
from fastddpm.integrations.layouts import Keys, renamed, smallest_side
from fastddpm.integrations.port import ATTENTION_RESOLUTION, join_qkv
from fastddpm.weights import Tensors

PROJECT = "tqch/ddpm-torch"
FIXED_SMALL_FROM = 64  # image_size: CelebA's and CelebA-HQ's variance; CIFAR-10's is fixed_large

_FIXED = {"norm_eps": 1e-6, "downsample_padding": 0, "freq_shift": 1, "num_groups": 32}
_ENDS = {
    "embed.0": "temb.dense.0",
    "embed.2": "temb.dense.1",
    "in_conv": "conv_in",
    "middle.0": "mid.block_1",
    "middle.1": "mid.attn_1",
    "middle.2": "mid.block_2",
    "out_conv.0": "norm_out",
    "out_conv.2": "conv_out",
}
_INNER = {
    "norm1": "norm1",
    "conv1": "conv1",
    "fc": "temb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "skip": "nin_shortcut",
    "norm": "norm",
    "project_in": "qkv",
    "project_out": "proj_out",
}


def architecture(
    weights: Tensors, source: str | os.PathLike, given: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """UNet's options that the file says, and its project's defaults of those that it does not:
    images with attention at 16x16, no dropout (0.1 for 32x32), and the paper's process, its
    variance fixed_small from 64x64 on and fixed_large below."""
    keys = Keys(weights, source, PROJECT)
    levels = _levels(keys)
    attention = [level for level in range(levels) if _attended(keys, "downsamples", level)]
    channels, in_channels = keys.shape("in_conv.weight")[:2]
    blocks, widths = [], []
    for level in range(levels):
        count = keys.count(f"downsamples.level_{level}")
        resampled = level < levels - 1
        blocks.append(count - resampled)
        name = f"downsamples.level_{level}.{count - 1}.1.weight"
        if resampled and name not in keys:
            raise keys.wrong(
                f"it lacks the key {name} (without convolutions that resample, "
                "resample_with_conv=False, it is another network)"
            )
        inner = ".0" if level in attention else ""
        widths.append(keys.shape(f"downsamples.level_{level}.0{inner}.conv1.weight")[0])
    options = {
        **_FIXED,
        "in_channels": in_channels,
        "out_channels": keys.shape("out_conv.2.weight")[0],
        "channels": channels,
        "channel_mult": keys.multiples(widths, channels),
        "num_res_blocks": keys.same("residual blocks", blocks),
        "attention_levels": attention,
    }
    size = ATTENTION_RESOLUTION << (attention[0] if attention else 1)
    small = smallest_side(given.get("image_size", size)) >= FIXED_SMALL_FROM
    return options, {
        "image_size": size,
        "dropout": 0.0 if small else 0.1,
        "diffusion": Diffusion(variance="fixed_small" if small else "fixed_large"),
    }


def convert(weights: Tensors, source: str | os.PathLike, options: dict[str, Any]) -> Tensors:
    """The weights under our names, q, k and v as the matrix that they are."""
    keys = Keys(weights, source, PROJECT)
    layers, blocks = dict(_ENDS), options["num_res_blocks"]
    ways = (("downsamples", "down", blocks), ("upsamples", "up", blocks + 1))
    for level in range(_levels(keys)):
        for theirs, ours, many in ways:
            block = f"{theirs}.level_{level}"
            attended = _attended(keys, theirs, level)
            for j in range(many):
                layers[f"{block}.{j}{'.0' if attended else ''}"] = f"{ours}.{level}.block.{j}"
                if attended:
                    layers[f"{block}.{j}.1"] = f"{ours}.{level}.attn.{j}"
            layers[f"{block}.{many}.1"] = f"{ours}.{level}.{ours}sample.conv"
    return join_qkv(renamed(weights, layers, _INNER, source), source)


def _levels(keys: Keys) -> int:
    return keys.count("downsamples", "level_")


def _attended(keys: Keys, way: str, level: int) -> bool:
    return f"{way}.level_{level}.0.1.project_in.weight" in keys
