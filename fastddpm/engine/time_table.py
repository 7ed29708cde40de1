"""What a U-Net's residual blocks take of each step of a chain, all steps at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from fastddpm.unet import ResnetBlock, UNet


@torch.no_grad()
def time_rows(
    model: UNet,
    t: torch.Tensor,
    *,
    conv_bias: bool = False,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """What every residual block adds to its channels at the steps t, or scales and shifts them by:
    (len(t), K), in the order of `time_offsets`; with conv_bias, conv1's bias in what is added.
    Summed in float64, whose products no setting of the host rounds. Of a model without classes."""
    silu_temb = F.silu(time_embeddings(model, t))
    rows = [F.linear(silu_temb, *layer) for layer in _layers(model, conv_bias)]
    return torch.cat(rows, dim=1).to(dtype)


@torch.no_grad()
def time_embeddings(model: UNet, t: torch.Tensor) -> torch.Tensor:
    """The embeddings of the steps t, to which those of classes are added before their last SiLU:
    (len(t), 4 channels) float64."""
    first, second = model.temb.dense
    return F.linear(F.silu(F.linear(model.sinusoids(t).double(), *_wide(first))), *_wide(second))


@torch.no_grad()
def time_layer(model: UNet, *, conv_bias: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight (K, 4 channels) and the bias (K,), float64, that make of silu(an embedding) a row
    of `time_rows`."""
    weights, biases = zip(*_layers(model, conv_bias), strict=True)
    return torch.cat(weights), torch.cat(biases)


def _layers(model: UNet, conv_bias: bool) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for block in cast("dict[Any, int]", time_offsets(model)):
        weight, bias = _wide(block.temb_proj)
        if conv_bias and not block.scale_shift and block.conv1.bias is not None:
            bias = bias + block.conv1.bias.double()
        yield weight, bias


def _wide(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    weight = layer.weight.double()
    return weight, weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.double()


def time_offsets(model: UNet) -> dict[nn.Module, int]:
    """Where each residual block's channels begin in a row of `time_rows`."""
    offsets: dict[nn.Module, int] = {}
    at = 0
    for module in model.modules():
        if isinstance(module, ResnetBlock):
            offsets[module] = at
            at += module.temb_proj.weight.shape[0]
    return offsets
