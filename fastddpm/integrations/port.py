"""The network of the widely used PyTorch port of the paper's code (pesser/pytorch_diffusion). Its
key names are ours but for q, k and v; no other project's names.
"""

from __future__ import annotations

import os
import re
from typing import Any

import torch

from fastddpm.diffusion import Diffusion
from fastddpm.integrations.layouts import Keys, smallest_side
from fastddpm.schedule import Variance
from fastddpm.weights import Tensors

PROJECT = "the PyTorch port of DDPM"
ATTENTION_RESOLUTION = 16  # where every model of the paper has its attention
FIXED_SMALL_FROM = 256  # image_size: CelebA-HQ's and LSUN's variance; CIFAR-10's is fixed_large


def architecture(
    weights: Tensors, source: str | os.PathLike, given: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """UNet's options that the file says, and the paper's of those that it does not.

    image_size follows from the level of the attention, which the paper has at 16x16, and the
    variance from the size: fixed_small from 256x256 on (CelebA-HQ, LSUN), fixed_large below
    (CIFAR-10)."""
    keys = Keys(weights, source, PROJECT)
    levels = keys.count("down")
    channels, in_channels = keys.shape("conv_in.weight")[:2]
    out_channels = keys.shape("conv_out.weight")[0]
    widths = [keys.shape(f"down.{i}.block.0.conv1.weight")[0] for i in range(levels)]
    attention = [i for i in range(levels) if _attended(keys, i)]
    options = {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "channels": channels,
        "channel_mult": keys.multiples(widths, channels),
        "num_res_blocks": keys.count("down.0.block"),
        "attention_levels": attention,
    }
    size = ATTENTION_RESOLUTION << (attention[0] if attention else 1)
    large = smallest_side(given.get("image_size", size)) < FIXED_SMALL_FROM
    variance: Variance = "fixed_large" if large else "fixed_small"
    return options, {"image_size": size, "diffusion": Diffusion(variance=variance)}


def convert(weights: Tensors, source: str | os.PathLike, options: dict[str, Any]) -> Tensors:
    """The weights under our names, which are the port's but for q, k and v."""
    return join_qkv(weights, source)


def _attended(keys: Keys, level: int) -> bool:
    return any(f"down.{level}.attn.0.{part}.weight" in keys for part in ("q", "qkv"))


def join_qkv(
    weights: dict[str, torch.Tensor], source: str | os.PathLike
) -> dict[str, torch.Tensor]:
    """q, k and v, 1x1 convolutions or matrices, as our one qkv of rows q, k, v; that and the
    attention's projection as matrices. Raises ValueError for one that is missing or has another
    shape than the other two."""
    joined: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        part = re.fullmatch(r"(.+\.attn(?:\.\d+|_1))\.(q|k|v|qkv|proj_out)\.(weight|bias)", name)
        if part is None:
            joined[name] = tensor
            continue
        block, layer, kind = part.groups()
        if layer in ("qkv", "proj_out"):
            joined[name] = _matrix(name, tensor, source) if kind == "weight" else tensor
            continue
        names = [f"{block}.{each}.{kind}" for each in "qkv"]
        if missing := [each for each in names if each not in weights]:
            raise ValueError(f"{source} lacks the key {missing[0]}")
        if f"{block}.qkv.{kind}" in weights:
            raise ValueError(f"{source} has both {name} and {block}.qkv.{kind}, which are one here")
        parts = [weights[each] for each in names]
        if kind == "weight":
            parts = [_matrix(each, w, source) for each, w in zip(names, parts, strict=True)]
        if len({part.shape for part in parts}) > 1 or parts[0].dim() != (
            2 if kind == "weight" else 1
        ):
            shapes = ", ".join(str(tuple(part.shape)) for part in parts)
            raise ValueError(f"{source}: {', '.join(names)} must have one shape; got {shapes}")
        if layer == "q":
            joined[f"{block}.qkv.{kind}"] = torch.cat(parts)
    return joined


def _matrix(name: str, weight: torch.Tensor, source: str | os.PathLike) -> torch.Tensor:
    """(C, D) of a matrix or of a 1x1 convolution's (C, D, 1, 1)."""
    if weight.dim() < 2 or weight.dim() > 4 or any(side != 1 for side in weight.shape[2:]):
        raise ValueError(
            f"{source}: {name} must be a matrix or a 1x1 convolution; "
            f"got shape {tuple(weight.shape)}"
        )
    return weight.flatten(1)


def split_qkv(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `join_qkv`, all of them matrices."""
    parts: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        block, joint, kind = name.rpartition(".qkv.")
        if joint:
            parts |= {
                f"{block}.{each}.{kind}": part
                for each, part in zip("qkv", tensor.chunk(3), strict=True)
            }
        else:
            parts[name] = tensor
    return parts
