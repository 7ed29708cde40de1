"""What a user gives a scheduler, checked: betas, timesteps, a step's tensors. ValueError and
TypeError name the argument."""

from __future__ import annotations

import itertools
import operator
from typing import Any

import numpy as np
import torch

from fastddpm.diffusion import LEARNED
from fastddpm.options import shown


def trained_betas(given: Any, dtype: torch.dtype) -> torch.Tensor:
    """trained_betas as a (T,) tensor."""
    try:
        betas = torch.as_tensor(given, device="cpu").detach().to(dtype, copy=True)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"trained_betas must be a list of numbers: {error}") from None
    if betas.dim() != 1 or betas.numel() == 0 or not betas.isfinite().all():
        raise ValueError(f"trained_betas must be a list of finite numbers; got {shown(given)}")
    return betas


def custom_timesteps(timesteps: Any, T: int) -> list[int]:
    """A chain that was given: integers that descend within 0 .. T - 1."""
    given = timesteps.tolist() if isinstance(timesteps, (torch.Tensor, np.ndarray)) else timesteps
    try:
        chain = [operator.index(t) for t in given]
    except TypeError:
        raise ValueError(f"timesteps must be a list of integers; got {shown(timesteps)}") from None
    if not chain or any(after >= t for t, after in itertools.pairwise(chain)):
        raise ValueError(
            f"timesteps must be in descending order, at least one; got {shown(timesteps)}"
        )
    if chain[0] >= T or chain[-1] < 0:
        raise ValueError(
            f"timesteps must be in 0 .. {T - 1}, num_train_timesteps being {T}; got "
            f"{shown(timesteps)}"
        )
    return chain


def step_number(timestep: Any) -> int:
    """An integer, Python's, NumPy's or a tensor's one element."""
    try:
        if isinstance(timestep, torch.Tensor):
            return operator.index(timestep.item())  # type: ignore[arg-type]
        return operator.index(timestep)
    except (TypeError, RuntimeError):
        raise ValueError(f"timestep must be one integer; got {shown(timestep)}") from None


def split_output(
    model_output: Any, sample: Any, variance: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(x_t, the model's output, what it says of the variance or None), the first two alike."""
    for name, x in (("sample", sample), ("model_output", model_output)):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
            raise TypeError(f"{name} must be a float tensor; got {got}")
        if x.dim() < 2:
            raise ValueError(f"{name} must be (N, C, ...); got {tuple(x.shape)}")
    channels, spread = sample.shape[1], None
    if model_output.shape[1] == 2 * channels:
        if variance not in LEARNED:
            raise ValueError(
                f"model_output has twice the sample's {channels} channels, but variance_type is "
                f"{variance!r}: a learned variance is one of {', '.join(map(repr, LEARNED))}"
            )
        model_output, spread = model_output.split(channels, dim=1)
    if model_output.shape != sample.shape:
        raise ValueError(
            f"model_output must have the shape of sample, {tuple(sample.shape)}, or twice the "
            f"channels; got {tuple(model_output.shape)}"
        )
    return sample, model_output, spread


def table_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def writes(x: torch.Tensor) -> int | None:
    """How often x was written to in place, where that is counted."""
    return None if x.is_inference() else x._version
