"""Engines: how the reverse chain is run for a model on a device. They know a model and ops, not
what is sampled.

An engine records what one step needs and replays it: `run` takes x at the start of the chain and
returns x at its end."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch

from fastddpm.diffusion import Diffusion, Model
from fastddpm.engine.eager import Eager
from fastddpm.schedule import Sampler, check_choice

EngineName = Literal["auto", "eager"]


def make_engine(
    name: str,
    model: Model,
    diffusion: Diffusion,
    *,
    device: torch.device,
    precision: str = "auto",
    sampler: Sampler = "ddpm",
    eta: float = 0.0,
    clip: bool = True,
) -> Eager:
    """The engine called `name`, or the fastest that can run this model; ValueError lists the
    choices.
    """
    check_choice("engine", name, get_args(EngineName))
    options: dict[str, Any] = {"sampler": sampler, "eta": eta, "clip": clip}
    return Eager(model, diffusion, device=device, precision=precision, **options)
