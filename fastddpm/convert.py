"""A model of any kind that is read, written as another: above pretrained.py and integrations/."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, get_args

from fastddpm.checkpoint import atomic_folder, check_free, check_place, named, write_json
from fastddpm.integrations.diffusers import to_diffusers
from fastddpm.integrations.files import Origin, check_finite
from fastddpm.integrations.schedulers import INDEX
from fastddpm.pretrained import read_model, save_model
from fastddpm.schedule import check_choice
from fastddpm.unet import UNet

Format = Literal["fastddpm", "diffusers"]
ORIGIN = "origin"  # in the metadata of the weights: the project and the set that they are of


def convert(
    source: str | os.PathLike, folder: str | os.PathLike, *, to: Format = "fastddpm", **options: Any
) -> tuple[UNet, Origin]:
    """Read the model at `source` as `UNet.from_pretrained` does, options among it, and write it
    into the new `folder`, whole or not at all; returns the model and where it came from.

    to: "fastddpm", a folder of `UNet.save_pretrained`; or "diffusers", one of a UNet2DModel with
        its scheduler, which is a DDPMPipeline too unless the model has classes

    Raises FileExistsError where `folder` is there, ValueError for weights that are not finite and
    for a network or a process that the other project does not have."""
    check_choice("to", to, get_args(Format))
    folder = named(folder)
    check_free(folder)
    check_place(folder)
    model, origin = read_model(source, **options)
    check_finite(model, source)
    with atomic_folder(folder) as temporary:
        if to == "fastddpm":
            save_model(model, temporary, metadata={ORIGIN: str(origin)})
        else:
            _save_diffusers(model, temporary)
    return model, origin


def _save_diffusers(model: UNet, folder: Path) -> None:
    import diffusers

    to_diffusers(model).save_pretrained(folder)  # type: ignore[operator]
    if model.config["num_classes"] is None:
        write_json(
            folder / INDEX,
            {
                "_class_name": "DDPMPipeline",
                "_diffusers_version": diffusers.__version__,
                "scheduler": ["diffusers", "DDPMScheduler"],
                "unet": ["diffusers", "UNet2DModel"],
            },
        )
