"""The networks that benchmarks run, the products in them, how far results differ. No clock."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastddpm import UNet
from fastddpm.unet import AttentionBlock


def random_weights(model: UNet) -> UNet:
    """Every parameter random: a fresh model's last layers are all but zero, and hide errors."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 0.1 if p.dim() == 1 else p[0].numel() ** -0.5
            centre = float("norm" in name and name.endswith("weight"))
            p.copy_(torch.randn(p.shape, generator=random) * scale + centre)
    return model.eval()


def make_model(name: str, quick: bool) -> UNet:
    if name == "cifar10" and quick:
        small = {"channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "image_size": 8}
        return random_weights(UNet(**small))
    return random_weights(UNet.cifar10()) if name == "cifar10" else UNet.from_pretrained(name)


def with_dropout(model: UNet, p: float) -> UNet:
    """The same network with dropout p; ValueError for a p that is none."""
    own = UNet(**{**model.config, "dropout": p}, diffusion=model.diffusion)
    own.load_state_dict(model.state_dict())
    return own


def flop(model: UNet) -> int:
    """Of one image-step: 2 a multiply-add of every convolution and dense layer, upsampled images
    as they are; without attention's q k^T and P v."""
    x = torch.zeros(1, model.in_channels, *model.image_size, dtype=torch.float64)
    with torch.inference_mode():
        return products(model.double(), x, torch.zeros(1, dtype=torch.int64))


def products(model: nn.Module, *inputs: Tensor) -> int:
    """2 a multiply-add of every convolution and dense layer that computes model(*inputs), of one
    image.
    """
    total = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        places = output[0, 0].numel() if output.dim() == 4 else 1
        layers = [module.qkv, module.proj_out] if isinstance(module, AttentionBlock) else [module]
        total += sum(2 * places * layer.weight.numel() for layer in layers)

    kinds = (nn.Conv2d, nn.Linear, AttentionBlock)
    blocks = [m for m in model.modules() if isinstance(m, AttentionBlock)]
    counted_there = {layer for block in blocks for layer in (block.qkv, block.proj_out)}
    hooks = [
        m.register_forward_hook(count)
        for m in model.modules()
        if isinstance(m, kinds) and m not in counted_there
    ]
    model(*inputs)
    for hook in hooks:
        hook.remove()
    return total


def relative_error(eps: Tensor, truth: Tensor) -> float:
    """rms(eps - truth) / rms(truth), inf where eps has another shape."""
    if eps.shape != truth.shape:
        return math.inf
    return ((eps - truth).square().mean() / truth.square().mean()).sqrt().item()
