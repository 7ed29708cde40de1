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
        t = timestep.item() if isinstance(timestep, torch.Tensor) else timestep
        if not isinstance(t, (bool, np.bool_)):
            return operator.index(t)  # type: ignore[arg-type]
    except (TypeError, RuntimeError):
        pass
    raise ValueError(f"timestep must be one integer; got {shown(timestep)}")


def several_steps(timesteps: Any, device: torch.device) -> torch.Tensor:
    """Integers for samples on this device, (N,) int64."""
    t = torch.as_tensor(timesteps, device=device)
    if t.dtype != torch.int64:
        if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
            raise TypeError(f"timesteps must be integers; got {t.dtype}")
        t = t.to(torch.int64)
    return t if t.dim() == 1 else t.flatten()


def generators(given: Any, n: int) -> Any:
    """None, a torch.Generator, or a list of one for each of n samples, as randn_tensor takes it."""
    each = list(given) if isinstance(given, (list, tuple)) else [given] * (given is not None)
    for one in each:
        if not isinstance(one, torch.Generator):
            raise ValueError(
                "generator must be a torch.Generator or a list of one for each sample; got "
                f"{type(one).__name__}"
            )
    if not isinstance(given, (list, tuple)):
        return given
    if len(each) not in (1, n):
        raise ValueError(
            f"generator must be one torch.Generator or a list of {n}, one for each sample; got a "
            f"list of {len(each)}"
        )
    return each


def common_shape(first: torch.Tensor, second: torch.Tensor, t: torch.Tensor) -> torch.Size:
    """That of samples and noise, broadcast against each other and the timesteps of the first."""
    try:
        return torch.broadcast_shapes(first.shape, second.shape, (len(t), *[1] * (first.dim() - 1)))
    except RuntimeError:
        raise ValueError(
            "samples and noise must be of one shape, with a timestep for each sample or one for "
            f"all; got {tuple(first.shape)}, {tuple(second.shape)} and {len(t)} timesteps"
        ) from None


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
