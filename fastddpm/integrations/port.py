"""The weights of the widely used PyTorch port of the paper's code (pesser/pytorch_diffusion), read
from one file. Its key names are ours but for q, k and v; no other project's names.
"""

from __future__ import annotations

import os
import re
from typing import Any

import torch

from fastddpm.diffusion import Diffusion
from fastddpm.unet import UNet
from fastddpm.weights import load, rename

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

    def convert(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        plain = rename(weights, lambda name: name.removeprefix("module."), path)  # DataParallel's
        return join_qkv(plain, path)

    def make(shapes: dict[str, torch.Tensor]) -> UNet:
        return UNet(**{**_architecture(shapes, path), **options})

    model = load(make, [path], convert=convert, allow_pickle=allow_pickle, source=path)
    if options.get("diffusion") is None:
        large = min(model.image_size) < FIXED_SMALL_FROM
        model.diffusion = Diffusion(variance="fixed_large" if large else "fixed_small")
    return model


def join_qkv(
    weights: dict[str, torch.Tensor], source: str | os.PathLike
) -> dict[str, torch.Tensor]:
    """The port's q, k and v, 1x1 convolutions or matrices, as our one qkv of rows q, k, v; the
    attention's projection as a matrix. Raises ValueError for one that is missing or has another
    shape than the other two."""
    joined: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        part = re.fullmatch(r"(.+\.attn(?:\.\d+|_1))\.(q|k|v|proj_out)\.(weight|bias)", name)
        if part is None:
            joined[name] = tensor
            continue
        block, layer, kind = part.groups()
        if layer == "proj_out":
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


def _architecture(weights: dict[str, torch.Tensor], source: str | os.PathLike) -> dict[str, Any]:
    """UNet's options, from the keys; ValueError when they are no such model's."""

    def count(prefix: str) -> int:
        """How many numbers follow the prefix in the keys: 0, 1, ... without a gap."""
        pattern = re.compile(re.escape(prefix) + r"\.([0-9]+)\.")
        found = {m[1] for name in weights if (m := pattern.match(name))}
        if odd := sorted(found - {str(i) for i in range(len(found))}):
            raise ValueError(
                f"{source} is no model of the PyTorch port of DDPM: it has the key "
                f"{prefix}.{odd[0][:40]}.*, but its {len(found)} of {prefix}.* must be numbered "
                f"from 0 to {len(found) - 1}"
            )
        return len(found)

    def shape(name: str) -> torch.Size:
        if name not in weights:
            raise ValueError(
                f"{source} is no model of the PyTorch port of DDPM: it lacks the key {name}"
            )
        if weights[name].dim() != 4:
            raise ValueError(
                f"{source}: {name} must be a convolution's; got shape {tuple(weights[name].shape)}"
            )
        return weights[name].shape

    levels = count("down")
    if levels == 0:
        raise ValueError(
            f"{source} is no model of the PyTorch port of DDPM: it lacks the key down.*"
        )
    channels, in_channels = shape("conv_in.weight")[:2]
    out_channels = shape("conv_out.weight")[0]
    widths = [shape(f"down.{i}.block.0.conv1.weight")[0] for i in range(levels)]
    if bad := [width for width in widths if width % channels]:
        raise ValueError(f"{source}: width {bad[0]} is no multiple of the first, {channels}")
    attention = [i for i in range(levels) if f"down.{i}.attn.0.qkv.weight" in weights]
    return {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "channels": channels,
        "channel_mult": [width // channels for width in widths],
        "num_res_blocks": count("down.0.block"),
        "attention_levels": attention,
        "image_size": ATTENTION_RESOLUTION << (attention[0] if attention else 1),
    }
