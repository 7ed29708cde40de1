"""Whether a plan can stand for a model: a U-Net as fastddpm.UNet builds it, and nothing around."""

from __future__ import annotations

from fastddpm.diffusion import Model
from fastddpm.unet import UNet
from fastddpm.unet.parts import changed
from fastddpm.unet.plain import foreign, unusual


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
    return unusual(model)
