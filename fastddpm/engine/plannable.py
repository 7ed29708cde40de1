"""Whether a plan can stand for a model: a U-Net as fastddpm.UNet builds it, and nothing around."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastddpm.diffusion import Model
from fastddpm.unet import Downsample, UNet
from fastddpm.unet_parts import changed
from fastddpm.unet_plain import foreign


def unplannable(model: Model) -> str | None:
    """Why no plan can run this model, the part named, or None if one can."""
    if not isinstance(model, UNet):
        return f"{type(model).__name__} is not a fastddpm.UNet"
    where = f"the model ({type(model).__name__})"
    if type(model) is not UNet:
        return f"{where} is not a part that a plan knows"
    if what := changed(model):
        return f"{where} {what}"
    if what := foreign(model):
        return what
    padding = model.config["downsample_padding"]
    halving = {m.conv for m in model.modules() if isinstance(m, Downsample)}
    for name, conv in model.named_modules():
        if not isinstance(conv, nn.Conv2d) or name.endswith("nin_shortcut"):
            continue
        stride, around = (2, padding) if conv in halving else (1, 1)
        if what := _unlike(conv, stride, around):
            return f"{name} (Conv2d) has {what}"
    return None


def _unlike(conv: Any, stride: int, padding: int) -> str | None:
    """What differs from the 3x3 convolution of this stride and padding."""
    expected = {
        "kernel_size": (3, 3), "stride": (stride, stride), "padding": (padding, padding),
        "dilation": (1, 1), "groups": 1, "padding_mode": "zeros",
    }  # fmt: skip
    for name, value in expected.items():
        if getattr(conv, name) != value:
            return f"{name} {getattr(conv, name)!r}, not {value!r}"
    return None
