"""The modules that a U-Net is made of, and nothing of how they hang together: that is network.py's.

Module names follow the widely used PyTorch port of the paper's code (down.0.block.1.conv1,
mid.attn_1, ...), except that q, k and v are one `qkv`."""

from __future__ import annotations

import itertools
import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from fastddpm import ops
from fastddpm.unet.config import check_freq_shift


def timestep_embedding(
    t: torch.Tensor, dim: int, *, freq_shift: float = 1, flip_sin_to_cos: bool = False
) -> torch.Tensor:
    """(N,) -> (N, dim) float32 sinusoids [sin | cos] of t / 10000^(i / (dim/2 - freq_shift)), i <
    dim/2. ValueError for freq_shift >= dim/2, where these are none.
    """
    check_freq_shift(freq_shift, dim)
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / (half - freq_shift)
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * exponent)
    parts = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return F.pad(torch.cat(parts, dim=1), (0, dim % 2))


def initialised(layer: Any, scale: float = 1.0) -> Any:
    """The paper's initialiser: uniform, variance scaling by fan average; biases 0. scale = 0 means
    1e-10.
    """
    nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(scale or 1e-10))
    nn.init.zeros_(layer.bias)
    return layer


def convolution(
    c_in: int, c_out: int, size: int = 3, *, stride: int = 1, padding: int | None = None, scale=1.0
):
    padding = size // 2 if padding is None else padding
    return initialised(nn.Conv2d(c_in, c_out, size, stride=stride, padding=padding), scale)


class GroupNorm(nn.GroupNorm):
    """silu(GroupNorm(x) (1 + scale) + shift) as one op; scale and shift (N, C), or none."""

    def forward(
        self,
        x: torch.Tensor,
        scale: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return ops.group_norm_silu(
            x, self.num_groups, self.weight, self.bias, self.eps, scale=scale, shift=shift
        )


class ResnetBlock(nn.Module):
    """x -> shortcut(r(x)) + conv2(dropout(silu(modulated(conv1(r(silu(norm1(x)))))))).

    With e = temb_proj(silu(temb)): modulated(h) = norm2(h + e), or with scale_shift
    norm2(h) (1 + scale) + shift of (scale, shift) = e. r is `resample`: None, "down" (the mean of
    each 2x2 pixels) or "up" (each pixel as 2x2)."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        temb_channels: int,
        num_groups: int,
        eps: float,
        dropout: float,
        *,
        scale_shift: bool = False,
        resample: Literal["down", "up"] | None = None,
    ):
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.norm1 = GroupNorm(num_groups, c_in, eps)
        self.conv1 = convolution(c_in, c_out)
        self.temb_proj = initialised(nn.Linear(temb_channels, (1 + scale_shift) * c_out))
        self.norm2 = GroupNorm(num_groups, c_out, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = convolution(c_out, c_out, scale=0.0)
        if c_in != c_out:
            self.nin_shortcut = convolution(c_in, c_out, 1)

    def forward(self, x: torch.Tensor, silu_temb: torch.Tensor) -> torch.Tensor:
        h = self.conv1(resampled(self.norm1(x), self.resample))
        e = self.temb_proj(silu_temb)
        if self.scale_shift:
            h = self.norm2(h, *e.chunk(2, dim=1))
        else:
            h = self.norm2(h + e[:, :, None, None])
        h = self.conv2(self.dropout(h))
        x = resampled(x, self.resample)
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


def resampled(x: torch.Tensor, how: str | None) -> torch.Tensor:
    """The means of 2x2 pixels ("down"), each pixel as 2x2 ("up"), or x itself (None)."""
    if how is None:
        return x
    return F.avg_pool2d(x, 2) if how == "down" else F.interpolate(x, scale_factor=2.0)


class AttentionBlock(nn.Module):
    """x + proj_out(softmax(q k^T / sqrt(d)) v) over all positions, q, k, v from GroupNorm(x)."""

    def __init__(self, channels: int, num_groups: int, eps: float, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.GroupNorm(num_groups, channels, eps)
        self.qkv = nn.Linear(channels, 3 * channels)
        for part in self.qkv.weight.detach().chunk(3):
            nn.init.xavier_uniform_(part)
        nn.init.zeros_(self.qkv.bias)
        self.proj_out = initialised(nn.Linear(channels, channels), scale=0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = isinstance(self.norm, nn.GroupNorm) and all(map(is_linear, (self.qkv, self.proj_out)))
        if not own or changed(self.norm):  # an adapter's layers, say, do more than their weights
            mixed = attend(self.qkv(tokens(self.norm(x))), self.num_heads)
            return x + image(self.proj_out(mixed), x)
        return ops.attention_block(
            x,
            self.norm.num_groups,
            self.norm.weight,
            self.norm.bias,
            self.qkv.weight,
            self.qkv.bias,
            self.proj_out.weight,
            self.proj_out.bias,
            num_heads=self.num_heads,
            eps=self.norm.eps,
        )


def attend(qkv: torch.Tensor, num_heads: int) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v of (N, L, 3C): q, then k, then v, each head by head; (N, L, C)."""
    q, k, v = qkv.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def tokens(x: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) -> (N, H W, C)."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def image(tokens: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(N, H W, C) -> (N, C, H, W)."""
    return tokens.mT.unflatten(2, like.shape[2:])


def is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear and changed(module) is None


OWN = frozenset(("forward", "run", "_conv_forward", "_call_impl", "_wrapped_call_impl"))


def changed(module: nn.Module) -> str | None:
    """What makes a call of the module more than its class's forward, or None."""
    for name in OWN & module.__dict__.keys():  # as accelerate and others replace a forward
        return f"has a {name} that is not its class's"
    if module._forward_hooks or module._forward_pre_hooks:
        return "has a forward hook"
    if module._backward_hooks or module._backward_pre_hooks:
        return "has a backward hook"
    return None


class Downsample(nn.Module):
    """Halve by a stride-2 3x3 convolution; padding 0 means one row and column after the end only
    (TF's SAME).
    """

    def __init__(self, channels: int, padding: int):
        super().__init__()
        self.conv = convolution(channels, channels, stride=2, padding=padding)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.conv.padding == (0, 0) else x)


class Upsample(nn.Module):
    """Double by nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = convolution(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def regrouped(weight: torch.Tensor) -> torch.Tensor:
    """Of a 3x3 convolution of repeated pixels: the weight (C_in, C_out, 4, 4) of the transposed
    convolution of stride 2 and padding 1 that is the same sums."""
    taps, pairs = weight.flip(2, 3), weight.new_zeros(*weight.shape[:2], 4, 4)
    for i, j in itertools.product((0, 1), (0, 1)):
        pairs[:, :, i : i + 3, j : j + 3] += taps
    return pairs.transpose(0, 1)


class Level(nn.Module):
    """The blocks of one resolution, an attention after each or none, and the way to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.attn = nn.ModuleList(), nn.ModuleList()
        self.downsample: Downsample | ResnetBlock | None = None
        self.upsample: Upsample | ResnetBlock | None = None

    def append(self, block: ResnetBlock, attention: AttentionBlock | None) -> None:
        self.block.append(block)
        if attention is not None:
            self.attn.append(attention)

    def run(self, j: int, x: torch.Tensor, silu_temb: torch.Tensor) -> torch.Tensor:
        """Block j and the attention after it."""
        x = self.block[j](x, silu_temb)
        return self.attn[j](x) if self.attn else x

    @staticmethod
    def moved(way: Any, x: torch.Tensor, silu_temb: torch.Tensor) -> torch.Tensor:
        """x on its way to the next level: by `downsample` or `upsample`."""
        return way(x, silu_temb) if isinstance(way, ResnetBlock) else way(x)


class Middle(nn.Module):
    """Between the two ways: block, attention, block."""

    def __init__(self, block_1: ResnetBlock, attn_1: AttentionBlock, block_2: ResnetBlock):
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = block_1, attn_1, block_2

    def forward(self, x: torch.Tensor, silu_temb: torch.Tensor) -> torch.Tensor:
        return self.block_2(self.attn_1(self.block_1(x, silu_temb)), silu_temb)


class TimeEmbedding(nn.Module):
    """Two dense layers with SiLU between and after, as all that reads it wants silu(temb). label,
    (N, temb_channels): that of each image's class, added before the last SiLU."""

    def __init__(self, channels: int, temb_channels: int):
        super().__init__()
        layers = (nn.Linear(channels, temb_channels), nn.Linear(temb_channels, temb_channels))
        self.dense = nn.ModuleList([initialised(layer) for layer in layers])

    def forward(self, sinusoids: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
        temb = self.dense[1](F.silu(self.dense[0](sinusoids)))
        return F.silu(temb if label is None else temb + label)
