"""What a U-Net's residual blocks add for each step of a chain, all steps at once."""

from __future__ import annotations

from typing import Any

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
    """What every residual block adds to its channels at the steps t: (len(t), K), in the order of
    `time_offsets`; with conv_bias, conv1's bias in it. Summed in float64, whose products no setting
    of the host rounds."""
    weights = {name: p.double() for name, p in model.temb.named_parameters()}
    temb = torch.func.functional_call(model.temb, weights, model.sinusoids(t).double())

    def row(block: Any) -> torch.Tensor:
        layer = block.temb_proj
        row = F.linear(temb, layer.weight.double())
        for bias in (layer.bias, block.conv1.bias if conv_bias else None):
            row = row if bias is None else row + bias.double()
        return row

    return torch.cat([row(block) for block in time_offsets(model)], dim=1).to(dtype)


def time_offsets(model: UNet) -> dict[nn.Module, int]:
    """Where each residual block's channels begin in a row of `time_rows`."""
    offsets: dict[nn.Module, int] = {}
    at = 0
    for module in model.modules():
        if isinstance(module, ResnetBlock):
            offsets[module] = at
            at += module.temb_proj.weight.shape[0]
    return offsets
