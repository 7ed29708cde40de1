"""One file of weights as a UNet: which project's network it holds, its options, and what the file
does not say. A module a project says the rest.
"""

from __future__ import annotations

import inspect
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastddpm.checkpoint import read_weights
from fastddpm.diffusion import Diffusion
from fastddpm.integrations import openai_unet, port, tqch, w86763777
from fastddpm.integrations.containers import Found, Weights, find
from fastddpm.options import check_flag
from fastddpm.schedule import Schedule, check_choice, check_count
from fastddpm.unet import UNet
from fastddpm.weights import Tensors, load

# What the process is made of where no diffusion= is given, of the project's own where it is not.
PROCESS = ("timesteps", "schedule", "prediction", "variance", "rescale_timesteps")
SCHEDULES = ("linear", "quadratic", "cosine")

READERS = {"port": port, "w86763777": w86763777, "tqch": tqch, "openai": openai_unet}
# Networks that are known by their keys and can't be a UNet of ours.
OTHERS = {
    "diffusers": "a file of diffusers' UNet2DModel, whose options are in the config.json beside "
    "it: give their folder",
    "lucidrains": "the Unet of lucidrains' denoising-diffusion-pytorch, which is another network "
    "(a 7x7 convolution first, RMSNorm, linear attention): fastddpm.sample runs it as it is, "
    "around any eps(x, t)",
    "edm": "a network of NVlabs' edm (SongUNet or DhariwalUNet), which is another one: "
    "fastddpm.sample runs it as it is, around any eps(x, t)",
}


@dataclass(frozen=True)
class Origin:
    """Where a model came from, for people."""

    project: str
    weights: str  # what was taken
    unsaid: dict[str, Any]  # options that neither the file nor the caller says
    chosen: bool = False  # whether the file had other weights and nobody said which

    def __str__(self) -> str:
        return f"{self.project}, {self.weights}"

    def assumed(self) -> str:
        """The options that nobody gave, as name=value."""
        return ", ".join(f"{name}={_value(value)}" for name, value in self.unsaid.items())


def load_file(
    path: str | os.PathLike,
    *,
    allow_pickle: bool = False,
    weights: Weights | None = None,
    **options: Any,
) -> tuple[UNet, Origin]:
    """The UNet in a .safetensors file, or with allow_pickle=True in a .ckpt, .pt, .pth or .bin, and
    where it came from.

    The file is a state dict, or a training checkpoint of several; weights ("ema" or "raw") says
    which of them is read, by default the EMA's where there are some. The architecture is read off
    the keys and shapes. options are those of UNet and of the project's reader, and PROCESS's of
    the project's process; they take precedence, and what they and the file leave open is the
    project's default. Raises ValueError naming
    the first key that is missing, unknown or of another shape, a network that is another one, and
    weights that are not finite."""

    found: Found | None = None

    def pick(content: Any) -> Tensors:
        nonlocal found
        found = find(content, path, weights)
        if found.project not in READERS:
            raise ValueError(f"{path} is {OTHERS[found.project]}")
        return found.weights

    shapes = read_weights(path, allow_pickle=allow_pickle, shapes_only=True, pick=pick)
    assert found is not None
    found = _named(found, path, weights)
    reader: Any = READERS[found.project]
    given = {name: value for name, value in options.items() if value is not None}
    own = getattr(reader, "OWN", {})
    _check_names(given, own, path, reader.PROJECT)
    process = {name: given.pop(name) for name in PROCESS if name in given}
    _check_alone(found, {**process, **given}, path)
    told, unsaid = reader.architecture(shapes, path, given)
    if process:
        given["diffusion"] = _process(reader, unsaid["diffusion"], process, given, path)
    unsaid = {name: value for name, value in unsaid.items() if name not in given}
    full = {**told, **unsaid, **given}

    def make(_: Tensors) -> UNet:
        try:
            return UNet(**{name: value for name, value in full.items() if name not in own})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def convert(tensors: Tensors) -> Tensors:
        return reader.convert(tensors, path, full)

    model = load(make, [path], convert=convert, allow_pickle=allow_pickle, source=path, pick=pick)
    check_finite(model, path)
    origin = Origin(reader.PROJECT, found.said, unsaid, found.one_of > 1 and weights is None)
    return model, origin


def _named(found: Found, path: str | os.PathLike, weights: Weights | None) -> Found:
    """Of a file of nothing but a network, what OpenAI's trainers say by its name."""
    if found.where or found.project != "openai":
        return found
    kinds: dict[Weights, str] = {"ema": r"ema_[0-9.]+_[0-9]+\.\w+", "raw": r"model[0-9]+\.\w+"}
    role = next((role for role, name in kinds.items() if re.fullmatch(name, Path(path).name)), None)
    if None not in (role, weights) and role != weights:
        raise ValueError(
            f"{path} holds the {role} weights, as its name says: give the file that has "
            f"weights={weights!r}"
        )
    return replace(found, role=role)


def check_finite(model: torch.nn.Module, source: str | os.PathLike) -> None:
    """ValueError names the first weight that is NaN or infinite."""
    for name, tensor in model.state_dict().items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(
                f"{source}: {name} holds values that are NaN or infinite: the training diverged, "
                "or the file is damaged"
            )


def _check_names(
    given: dict[str, Any], own: dict[str, Any], path: str | os.PathLike, project: str
) -> None:
    allowed = {*inspect.signature(UNet).parameters, *PROCESS, *own}
    if unknown := sorted(given.keys() - allowed):
        raise ValueError(f"{path}: {unknown[0]} is no option of {project}")
    for name, value in own.items():
        if name in given and type(given[name]) is not type(value):
            raise ValueError(f"{path}: {name} must be True or False; got {given[name]!r:.80}")


def _check_alone(found: Found, given: dict[str, Any], path: str | os.PathLike) -> None:
    """ValueError for what stands around a network and decides what it means."""
    if "_model" in found.where.split("."):
        raise ValueError(
            f"{path}: the network is inside of a ModelWrapper, behind a PixelUnshuffle "
            "(block_size > 1): what it reads is no image"
        )
    betas = [name for name in found.beside if name.split(".")[-1] == "betas"]
    said = "diffusion" in given or {"timesteps", "schedule", "prediction"} <= given.keys()
    if betas and not said:
        raise ValueError(
            f"{path} holds a process beside the network ({betas[0]}), whose kind it does not say: "
            "pass timesteps, schedule and prediction, or diffusion=fastddpm.Diffusion(...), of the "
            "one it was trained for"
        )


def _process(
    reader: Any,
    default: Diffusion,
    process: dict[str, Any],
    given: dict[str, Any],
    path: str | os.PathLike,
) -> Diffusion:
    """The project's process with what was said of it in its place."""
    if "diffusion" in given:
        raise ValueError(f"{path}: give {sorted(process)[0]} or diffusion, one of the two")
    options = {
        "prediction": process.get("prediction", default.prediction),
        "variance": process.get("variance", default.variance),
        "loss": default.objective,
    }
    try:
        T = check_count("timesteps", process.get("timesteps", default.T))
        kind = process.get("schedule", "linear")
        check_choice("schedule", kind, SCHEDULES)
        rescaled = check_flag("rescale_timesteps", process.get("rescale_timesteps", False))
        if reader is openai_unet and T != 1000 and "rescale_timesteps" not in process:
            raise ValueError(
                f"with {T} steps rescale_timesteps must be given: True is improved-diffusion's "
                "default, False guided-diffusion's"
            )
        scaled = {"scaled": True} if reader is openai_unet and kind == "linear" else {}
        schedule = getattr(Schedule, kind)(T, **scaled)
        return Diffusion(schedule, **options, rescale_timesteps=rescaled)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _value(value: Any) -> str:
    return process_said(value) if isinstance(value, Diffusion) else repr(value)


def process_said(diffusion: Diffusion) -> str:
    """A process in a few words."""
    schedule = diffusion.schedule
    kind = (schedule.recipe or {}).get("kind", "given")
    rescaled = ", rescaled timesteps" * diffusion.rescale_timesteps
    return (
        f"{kind} schedule of {schedule.T} steps, {diffusion.prediction}, {diffusion.variance}"
        + rescaled
    )
