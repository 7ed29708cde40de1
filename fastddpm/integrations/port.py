"""The weights of the widely used PyTorch port of the paper's code (pesser/pytorch_diffusion), read
from one file. Its key names are ours but for q, k and v; no other project's names.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from fastddpm.checkpoint import load_weights, read_weights
from fastddpm.diffusion import Diffusion
from fastddpm.unet import UNet

ATTENTION_RESOLUTION = 16  # where every model of the paper has its attention
FIXED_SMALL_FROM = 256  # image_size: CelebA-HQ's and LSUN's variance; CIFAR-10's is fixed_large


def load_file(path: str | os.PathLike, *, allow_pickle: bool = False, **options: Any) -> UNet:
    """The UNet in a .safetensors file, or with allow_pickle=True in a .ckpt, .pt, .pth or .bin.

    The architecture is read off the keys and shapes, and image_size from the level of the
    attention, which the paper has at 16x16. The process is the paper's, with its variance:
    fixed_small from 256x256 on (CelebA-HQ, LSUN), fixed_large below (CIFAR-10). options
    (image_size, num_groups, dropout, diffusion, ...) are those of UNet and take precedence. Raises
    ValueError naming the first key that is missing, unknown or of another shape.
    """
    weights = {
        name.removeprefix("module."): tensor  # of DataParallel
        for name, tensor in read_weights(Path(path), allow_pickle=allow_pickle).items()
    }
    weights = join_qkv(weights, path)
    model = UNet(**{**_architecture(weights, path), **options})
    if options.get("diffusion") is None:
        large = min(model.image_size) < FIXED_SMALL_FROM
        model.diffusion = Diffusion(variance="fixed_large" if large else "fixed_small")
    load_weights(model, weights, path)
    return model


def join_qkv(
    weights: dict[str, torch.Tensor], source: str | os.PathLike
) -> dict[str, torch.Tensor]:
    """The port's q, k and v, 1x1 convolutions or matrices, as our one qkv of rows q, k, v; the
    attention's projection as a matrix."""
    joined: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        part = re.fullmatch(r"(.+\.attn(?:\.\d+|_1))\.(q|k|v|proj_out)\.(weight|bias)", name)
        if part is None:
            joined[name] = tensor
            continue
        block, layer, kind = part.groups()
        if layer == "proj_out":
            joined[name] = tensor.flatten(1) if kind == "weight" else tensor
        elif layer == "q":
            names = [f"{block}.{each}.{kind}" for each in "qkv"]
            if missing := [each for each in names if each not in weights]:
                raise ValueError(f"{source} lacks the key {missing[0]}")
            tensors = [weights[each].flatten(1) if kind == "weight" else weights[each]
                       for each in names]  # fmt: skip
            joined[f"{block}.qkv.{kind}"] = torch.cat(tensors)
        elif f"{block}.q.{kind}" not in weights:
            raise ValueError(f"{source} lacks the key {block}.q.{kind}")
    return joined


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


def _architecture(weights: dict[str, torch.Tensor], source: str | os.PathLike) -> dict[str, Any]:
    """UNet's options, from the keys; ValueError when they are no such model's."""
    levels = 1 + max((int(m[1]) for name in weights if (m := re.match(r"down\.(\d+)\.", name))),
                     default=-1)  # fmt: skip
    needed = ("conv_in.weight", "conv_out.weight", *(
        f"down.{i}.block.0.conv1.weight" for i in range(levels)
    ))  # fmt: skip
    if levels == 0 or (missing := [name for name in needed if name not in weights]):
        lacking = "down.*" if levels == 0 else missing[0]
        raise ValueError(
            f"{source} is no model of the PyTorch port of DDPM: it lacks the key {lacking}"
        )
    channels, in_channels = weights["conv_in.weight"].shape[:2]
    widths = [weights[name].shape[0] for name in needed[2:]]
    if bad := [width for width in widths if width % channels]:
        raise ValueError(f"{source}: width {bad[0]} is no multiple of the first, {channels}")
    blocks = {name.split(".")[3] for name in weights if name.startswith("down.0.block.")}
    attention = [i for i in range(levels) if f"down.{i}.attn.0.qkv.weight" in weights]
    return {
        "in_channels": in_channels,
        "out_channels": weights["conv_out.weight"].shape[0],
        "channels": channels,
        "channel_mult": [width // channels for width in widths],
        "num_res_blocks": len(blocks),
        "attention_levels": attention,
        "image_size": ATTENTION_RESOLUTION << (attention[0] if attention else 1),
    }
