"""The PyTorch port of the paper's code, pesser/pytorch_diffusion, as a network: our names with q, k
and v apart, and its forward in plain torch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy import tiny_unet


class Port(nn.Module):
    """options: of the UNet whose parts it has."""

    def __init__(self, channels: int = 32, **options):
        super().__init__()
        self.channels = channels
        own = tiny_unet(in_channels=3, channels=channels, num_groups=32, **options)
        for name, part in own.named_children():
            self.add_module(name, part)
        for module in list(self.modules()):
            if hasattr(module, "qkv"):
                c = module.qkv.in_features
                del module.qkv
                module.q, module.k, module.v, module.proj_out = (nn.Conv2d(c, c, 1) for _ in "qkvo")

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        half = self.channels // 2
        rates = torch.exp(torch.arange(half) * -(math.log(10000) / (half - 1)))
        angles = t.float()[:, None] * rates
        first, second = self.temb.dense
        temb = second(F.silu(first(torch.cat((angles.sin(), angles.cos()), dim=1))))

        def block(part, h):
            e = part.temb_proj(F.silu(temb))[:, :, None, None]
            c = part.conv1(F.silu(self.norm(part.norm1, h))) + e
            c = part.conv2(part.dropout(F.silu(self.norm(part.norm2, c))))
            return c + (part.nin_shortcut(h) if hasattr(part, "nin_shortcut") else h)

        def attention(part, h):
            y = self.norm(part.norm, h)
            q, k, v = (layer(y).flatten(2) for layer in (part.q, part.k, part.v))
            weights = torch.softmax(q.mT @ k / math.sqrt(q.shape[1]), dim=-1)
            return h + part.proj_out((v @ weights.mT).view_as(h))

        h = self.conv_in(x)
        skips = [h]
        for level in self.down:
            for j, part in enumerate(level.block):
                h = block(part, h)
                h = attention(level.attn[j], h) if len(level.attn) else h
                skips.append(h)
            if level.downsample is not None:
                h = level.downsample.conv(F.pad(h, (0, 1, 0, 1)))
                skips.append(h)
        h = block(self.mid.block_2, attention(self.mid.attn_1, block(self.mid.block_1, h)))
        for level in reversed(self.up):
            for j, part in enumerate(level.block):
                h = block(part, torch.cat((h, skips.pop()), dim=1))
                h = attention(level.attn[j], h) if len(level.attn) else h
            if level.upsample is not None:
                h = level.upsample.conv(F.interpolate(h, scale_factor=2))
        return self.conv_out(F.silu(self.norm(self.norm_out, h)))

    def norm(self, layer, x: Tensor) -> Tensor:
        return F.group_norm(x, layer.num_groups, layer.weight, layer.bias, layer.eps)
