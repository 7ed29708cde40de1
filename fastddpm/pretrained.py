"""Models by name and on disk: the bundled ones, our own folders and other projects' files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from fastddpm.checkpoint import load_weights, read_json, read_tensors, write_json, write_tensors
from fastddpm.diffusion import Diffusion
from fastddpm.integrations.diffusers import load_folder
from fastddpm.integrations.port import load_file
from fastddpm.unet import UNet

CONFIG, WEIGHTS = "config.json", "model.safetensors"
BUNDLED = Path(__file__).parent / "checkpoints"


def save_model(
    model: UNet, folder: str | os.PathLike, weights: dict[str, torch.Tensor] | None = None
) -> None:
    """Write the model's config.json and model.safetensors (or `weights` in its place) into
    `folder`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, model.state_dict() if weights is None else weights)
    save_config(model, folder)


def save_config(model: UNet, folder: str | os.PathLike) -> None:
    """Write the model's config.json alone."""
    write_json(
        Path(folder) / CONFIG,
        {"format": "fastddpm", "unet": model.config, "diffusion": model.diffusion.to_config()},
    )


def build_model(config: dict[str, Any], source: str | os.PathLike) -> UNet:
    """The UNet of a config.json's content, with fresh weights."""
    for name in ("unet", "diffusion"):
        if not isinstance(config.get(name), dict):
            raise ValueError(f"{source}: the object {name!r} is missing")
    try:
        return UNet(**config["unet"], diffusion=Diffusion.from_config(config["diffusion"]))
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from None


def bundled_models() -> list[str]:
    """The names that come with the package."""
    return sorted(path.parent.name for path in BUNDLED.glob(f"*/{CONFIG}"))


def load_model(source: str | os.PathLike, **options: Any) -> UNet:
    """A UNet in eval mode from a bundled name, a folder of `save_model`, a diffusers folder, or a
    weights file of the PyTorch port of the paper's code.

    options go to the loaders of `fastddpm.integrations`; our own folders take none. Raises
    FileNotFoundError or ValueError, naming what is wrong.
    """
    if str(source) in bundled_models():
        source = BUNDLED / source
    path = Path(source)
    if path.is_file():
        return load_file(path, **options).eval()
    if (path / "model_index.json").is_file() and (path / "unet" / CONFIG).is_file():
        path = path / "unet"  # a pipeline of diffusers
    if not (path / CONFIG).is_file():
        what = f"no {CONFIG} in it" if path.is_dir() else "no such file or folder"
        raise FileNotFoundError(
            f"model {str(source)!r}: {what}; give a folder with {CONFIG} and {WEIGHTS}, or one of "
            f"the bundled names: {', '.join(bundled_models()) or 'none'}"
        )
    config = read_json(path / CONFIG)
    if config.get("format") != "fastddpm":
        return load_folder(path, config, **options).eval()
    if options:
        raise ValueError(f"a fastddpm folder takes no options; got {', '.join(sorted(options))}")
    model = build_model(config, path / CONFIG)
    load_weights(model, read_tensors(path / WEIGHTS)[0], path / WEIGHTS)
    return model.eval()
