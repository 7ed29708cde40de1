"""The walk through a U-Net on a CPU: every layer is one ops.convolution, which norms and activates
what it reads, takes a skip as a second source, doubles as it reads, drops by the counter RNG and
adds the embedding and the residual to what it writes. Between two of them nothing is computed, and
the way back keeps what goes into each of them and nothing besides."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastddpm import ops
from fastddpm.unet.order import Order, Stream
from fastddpm.unet.parts import (
    AttentionBlock,
    Downsample,
    ResnetBlock,
    TimeEmbedding,
    Upsample,
    resampled,
)


class CpuWalk(Order):
    """One pass through a U-Net whose parts are plain (`foreign`, `unusual`). An image is a tensor.

    Under autocast in bfloat16 images are kept in bfloat16, too, as torch's are. Beside float32
    images between bfloat16 products, a step of the CIFAR-10 network takes the same time, gradients
    err by the same (0.0038 of their norm, of which the products are to blame; torch's 0.0050), and
    its memory is 0.7 of it.

    temb: the embedding of the steps before its last SiLU, as the pixels of one image (1, C, N, 1):
    so that a step's bits depend on no other's"""

    def __init__(self, temb: Tensor, stream: Stream | None = None, *, again: bool = False):
        super().__init__(stream, again=again)
        self.temb = temb

    @staticmethod
    def embedded(temb: TimeEmbedding, sinusoids: Tensor, label: Tensor | None) -> Tensor:
        """What the blocks take of the steps' sinusoids and the classes' embeddings, (N,
        channels)."""
        rows = linear(temb.dense[0], pixels(sinusoids))
        residual = None if label is None else pixels(label)
        return linear(temb.dense[1], rows, silu=True, residual=residual)

    def first(self, conv: Any, x: Tensor) -> Tensor:
        if x.dtype == torch.float32 and asked_for_bf16():
            x = x.bfloat16()
        return convolution(conv, x)

    def last(self, norm: Any, conv: Any, h: Tensor) -> Tensor:
        return convolution(conv, h, norm)

    def resnet(
        self,
        block: ResnetBlock,
        place: int,
        h: Tensor,
        skip: Tensor | None = None,
        *,
        whole: bool = False,
    ) -> Tensor:
        """ResnetBlock's of cat(h, skip)."""
        rows = linear(block.temb_proj, self.temb, silu=True).permute(2, 1, 0, 3).flatten(1)
        time: Tensor | None = rows
        modulation: dict[str, Tensor] = {}
        if block.scale_shift:
            scale, shift = rows.chunk(2, dim=1)
            modulation, time = {"scale": scale, "shift": shift}, None
        c, residual = self.entered(block, h, skip, time), resampled(h, block.resample)
        if "nin_shortcut" in block._modules:
            residual = convolution(block.nin_shortcut, h, x2=skip, padding=0)
        dropout = self.dropout(block, place)
        if block.scale_shift or self.torchs_dropout(block):
            c = normed(block.norm2, c, **modulation, **dropout)
            if self.torchs_dropout(block):
                c = block.dropout(c)
            return convolution(block.conv2, c, residual=residual)
        return convolution(block.conv2, c, block.norm2, residual=residual, **dropout)

    def entered(
        self, block: ResnetBlock, h: Tensor, skip: Tensor | None, time: Tensor | None
    ) -> Tensor:
        """conv1 of the block, of its norm's result as it resamples it, and `time`."""
        if block.resample == "down":  # of one source: see plain.py
            return convolution(block.conv1, resampled(normed(block.norm1, h), "down"), shift=time)
        upsample = 2 if block.resample == "up" else 1
        return convolution(block.conv1, h, block.norm1, x2=skip, shift=time, upsample=upsample)

    def attention(self, block: AttentionBlock, h: Tensor) -> Tensor:
        """AttentionBlock's of h."""
        norm, qkv, out = block.norm, block.qkv, block.proj_out
        return ops.attention_block(
            h, norm.num_groups, norm.weight, norm.bias, qkv.weight, qkv.bias, out.weight, out.bias,
            num_heads=block.num_heads, eps=norm.eps,
        )  # fmt: skip

    def downsample(self, part: Downsample, h: Tensor) -> Tensor:
        return convolution(part.conv, h, stride=2, padding=(part.conv.padding[0], 1))

    def upsample(self, part: Upsample, h: Tensor) -> Tensor:
        return convolution(part.conv, h, upsample=2)


def asked_for_bf16() -> bool:
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16


def convolution(conv: Any, x: Tensor, norm: Any = None, **options: Any) -> Tensor:
    """The layer of x, which `norm` and SiLU go before; options: ops.convolution's."""
    if norm is not None:
        options |= {
            "num_groups": norm.num_groups, "norm_weight": norm.weight, "norm_bias": norm.bias,
            "eps": norm.eps, "silu": True,
        }  # fmt: skip
    return ops.convolution(x, conv.weight, conv.bias, **options)


def normed(norm: Any, x: Tensor, **options: Any) -> Tensor:
    """silu(norm(x)); options: ops.group_norm_silu's."""
    return ops.group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps, **options)


def pixels(rows: Tensor) -> Tensor:
    """(N, C) as the pixels of one image, (1, C, N, 1)."""
    return rows.t()[None, :, :, None]


def linear(layer: Any, x: Tensor, *, silu: bool = False, residual: Tensor | None = None) -> Tensor:
    """The layer of silu(x), for the channels of each pixel; and the residual."""
    return ops.convolution(x, layer.weight, layer.bias, padding=0, silu=silu, residual=residual)
