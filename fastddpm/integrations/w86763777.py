"""The network of w86763777/pytorch-ddpm: the paper's with GroupNorm's eps 1e-5, padding on both
sides of a stride-2 convolution, and a time embedding whose sines and cosines alternate.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from fastddpm.diffusion import Diffusion
from fastddpm.integrations.layouts import Keys, renamed
from fastddpm.integrations.port import join_qkv
from fastddpm.schedule import Schedule
from fastddpm.unet.parts import timestep_embedding
from fastddpm.weights import Tensors

PROJECT = "w86763777/pytorch-ddpm"
TABLE = "time_embedding.timembedding.0.weight"  # (T, channels): the sinusoids of every step
FIRST = "time_embedding.timembedding.1.weight"  # of the layer that reads them
# Of the averaged table: a million roundings of its constants are below 2e-4. Beside the rounding of
# a file in bfloat16.
DRIFT = 1e-3

_FIXED = {"norm_eps": 1e-5, "downsample_padding": 1, "freq_shift": 0, "num_groups": 32}
_ENDS = {
    "time_embedding.timembedding.1": "temb.dense.0",
    "time_embedding.timembedding.3": "temb.dense.1",
    "head": "conv_in",
    "tail.0": "norm_out",
    "tail.2": "conv_out",
}
_BLOCK = {
    "block1.0": "norm1",
    "block1.2": "conv1",
    "temb_proj.1": "temb_proj",
    "block2.0": "norm2",
    "block2.3": "conv2",
    "shortcut": "nin_shortcut",
}
_ATTENTION = {
    "group_norm": "norm",
    "proj_q": "q",
    "proj_k": "k",
    "proj_v": "v",
    "proj": "proj_out",
}


def architecture(
    weights: Tensors, source: str | os.PathLike, given: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """UNet's options that the file says, and its project's defaults of those that it does not:
    32x32 images, dropout 0.1, and the paper's process of as many steps as the table has rows, with
    variance fixed_large."""
    keys = Keys(weights, source, PROJECT)
    levels = _levels(keys, "downblocks")
    channels, in_channels = keys.shape("head.weight")[:2]
    per_level = [len(blocks) for blocks in levels]
    widths = [keys.shape(f"downblocks.{blocks[0]}.block1.2.weight")[0] for blocks in levels]
    options = {
        **_FIXED,
        "in_channels": in_channels,
        "out_channels": keys.shape("tail.2.weight")[0],
        "channels": channels,
        "channel_mult": keys.multiples(widths, channels),
        "num_res_blocks": keys.same("residual blocks", per_level),
        "attention_levels": [
            level
            for level, blocks in enumerate(levels)
            if f"downblocks.{blocks[0]}.attn.proj_q.weight" in keys
        ],
    }
    unsaid: dict[str, Any] = {"image_size": 32, "dropout": 0.1}
    T = 1000
    if TABLE in keys:
        T = keys.shape(TABLE, 2)[0]
    unsaid["diffusion"] = Diffusion(Schedule.linear(T), variance="fixed_large")
    return options, unsaid


def convert(weights: Tensors, source: str | os.PathLike, options: dict[str, Any]) -> Tensors:
    """The weights under our names; the table of sinusoids is checked against ours and left out, and
    the columns of the layer behind it brought into our order, all sines before all cosines."""
    weights = dict(weights)
    table = weights.pop(TABLE, None)
    if table is not None:
        _check_table(table, source)
    keys = Keys(weights, source, PROJECT)
    layers = dict(_ENDS)
    for theirs, ours in (("downblocks", "down"), ("upblocks", "up")):
        levels = _levels(keys, theirs)
        for at, blocks in enumerate(levels):
            level = at if ours == "down" else len(levels) - 1 - at
            for j, i in enumerate(blocks):
                layers[f"{theirs}.{i}"] = f"{ours}.{level}.block.{j}"
                layers[f"{theirs}.{i}.attn"] = f"{ours}.{level}.attn.{j}"
            layers[f"{theirs}.{blocks[-1] + 1}.main"] = f"{ours}.{level}.{ours}sample.conv"
    for i in (0, 1):
        layers[f"middleblocks.{i}"] = f"mid.block_{i + 1}"
        layers[f"middleblocks.{i}.attn"] = f"mid.attn_{i + 1}"
    weights = renamed(weights, layers, {**_BLOCK, **_ATTENTION}, source)
    first = weights.get("temb.dense.0.weight")
    if first is not None and first.dim() == 2:
        weights["temb.dense.0.weight"] = torch.cat((first[:, 0::2], first[:, 1::2]), dim=1)
    return join_qkv(weights, source)


def _levels(keys: Keys, way: str) -> list[list[int]]:
    """The numbers of each level's residual blocks; between the levels stands a resampling."""
    levels: list[list[int]] = [[]]
    for i in range(keys.count(way)):
        if f"{way}.{i}.main.weight" in keys:
            levels.append([])
        else:
            levels[-1].append(i)
    if not all(levels):
        raise keys.wrong(f"its {way}.* have a level without residual blocks")
    return levels


def _check_table(table: torch.Tensor, source: str | os.PathLike) -> None:
    """ValueError unless it holds the sinusoids of the steps 0 .. T - 1; on the meta device, unless
    it is a matrix."""
    if table.dim() != 2 or table.shape[1] < 2:
        raise ValueError(f"{source}: {TABLE} must be (T, channels); got {tuple(table.shape)}")
    if table.is_meta:
        return
    T, channels = table.shape
    steps = torch.arange(T, device=table.device)
    halves = timestep_embedding(steps, channels // 2 * 2, freq_shift=0).chunk(2, dim=1)
    own = torch.stack(halves, dim=2).flatten(1)
    most = DRIFT + torch.finfo(table.dtype).eps / 2
    if own.shape != table.shape or not bool(((table.float() - own).abs() <= most).all()):
        raise ValueError(
            f"{source}: {TABLE} does not hold the sinusoids of the steps 0 .. {T - 1}, which every "
            f"model of {PROJECT} has: its time embedding is another"
        )
