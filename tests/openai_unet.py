"""The U-Net of OpenAI's improved- and guided-diffusion as a plain formula over the parameters of a
fastddpm.UNet, written from their published architecture: no module of ours computes here."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def openai_unet(model, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
    """eps(x, t, y) in the dtype of the parameters."""
    config = model.config
    emb = _linear(model.temb.dense[1], F.silu(_linear(model.temb.dense[0], _sinusoids(model, t))))
    if y is not None:
        emb = emb + model.label_emb.weight[y]

    def res_block(block, x: Tensor, move=lambda x: x) -> Tensor:
        h = _conv(block.conv1, move(F.silu(_norm(config, block.norm1, x))))
        out = _linear(block.temb_proj, F.silu(emb))[:, :, None, None]
        if config["scale_shift_norm"]:
            scale, shift = out.chunk(2, dim=1)
            h = _norm(config, block.norm2, h) * (1 + scale) + shift
        else:
            h = _norm(config, block.norm2, h + out)
        x = move(x)
        return _conv(block.conv2, F.silu(h)) + (
            _conv(block.nin_shortcut, x) if x.shape[1] != h.shape[1] else x
        )

    def attention(block, x: Tensor) -> Tensor:
        n, c, *size = x.shape
        heads = config["num_heads"] or c // (config["head_dim"] or c)
        qkv = _linear(block.qkv, _norm(config, block.norm, x).flatten(2).mT)
        q, k, v = (part.view(n, -1, heads, c // heads) for part in qkv.chunk(3, dim=2))
        scores = torch.einsum("nihd,njhd->nhij", q, k) * (c // heads) ** -0.5
        mixed = torch.einsum("nhij,njhd->nihd", scores.softmax(dim=3), v).flatten(2)
        return x + _linear(block.proj_out, mixed).mT.reshape(n, c, *size)

    def blocks(level, j: int, h: Tensor) -> Tensor:
        h = res_block(level.block[j], h)
        return attention(level.attn[j], h) if len(level.attn) else h

    h = _conv(model.conv_in, x)
    skips = [h]
    for level in model.down:
        for j in range(config["num_res_blocks"]):
            h = blocks(level, j, h)
            skips.append(h)
        if level is not model.down[-1]:
            if config["resblock_updown"]:
                h = res_block(level.downsample, h, _halved)
            else:
                conv = level.downsample.conv
                before = config["downsample_padding"]
                h = F.conv2d(F.pad(h, (before, 1, before, 1)), conv.weight, conv.bias, stride=2)
            skips.append(h)
    h = res_block(model.mid.block_1, h)
    h = res_block(model.mid.block_2, attention(model.mid.attn_1, h))
    for i in reversed(range(len(model.up))):
        for j in range(config["num_res_blocks"] + 1):
            h = blocks(model.up[i], j, torch.cat((h, skips.pop()), dim=1))
        if i > 0:
            if config["resblock_updown"]:
                h = res_block(model.up[i].upsample, h, _doubled)
            else:
                h = _conv(model.up[i].upsample.conv, _doubled(h))
    return _conv(model.conv_out, F.silu(_norm(config, model.norm_out, h)))


def _sinusoids(model, t: Tensor) -> Tensor:
    """In float32, as they are."""
    half = model.config["channels"] // 2
    step = -torch.log(torch.tensor(10000.0)) / (half - model.config["freq_shift"])
    angles = t.float()[:, None] * torch.exp(step * torch.arange(half))
    parts = [angles.sin(), angles.cos()]
    if model.config["flip_sin_to_cos"]:
        parts.reverse()
    return torch.cat(parts, dim=1).to(model.conv_in.weight.dtype)


def _linear(layer, x: Tensor) -> Tensor:
    return x @ layer.weight.T + layer.bias


def _conv(layer, x: Tensor) -> Tensor:
    return F.conv2d(x, layer.weight, layer.bias, padding=layer.weight.shape[2] // 2)


def _norm(config, layer, x: Tensor) -> Tensor:
    groups = x.unflatten(1, (config["num_groups"], -1))
    centred = groups - groups.mean(dim=(2, 3, 4), keepdim=True)
    variance = centred.square().mean(dim=(2, 3, 4), keepdim=True)
    normal = (centred / (variance + config["norm_eps"]).sqrt()).flatten(1, 2)
    return normal * layer.weight[:, None, None] + layer.bias[:, None, None]


def _halved(x: Tensor) -> Tensor:
    return (x[..., ::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, ::2] + x[..., 1::2, 1::2]) / 4


def _doubled(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
