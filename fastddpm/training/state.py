"""What a trainer's state on disk is made of: weights, their average, Adam's moments, buffers, by
name. No settings, no files."""

from __future__ import annotations

from pathlib import Path

import torch

from fastddpm.training.master_weights import MasterWeights

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def tensors_of(weights: MasterWeights, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The state, by the names that it has on disk."""
    tensors = {f"buffer.{name}": b for name, b in weights.buffers().items()}
    for name, master in weights.masters.items():
        tensors[f"model.{name}"] = master.detach()
        tensors[f"ema.{name}"] = weights.average[name]
        for key, value in optimizer.state[master].items():
            tensors[f"adam.{key}.{name}"] = value
    return tensors


def check_tensors(path: Path, tensors: dict[str, torch.Tensor], weights: MasterWeights) -> None:
    """ValueError unless the tensors are those that `tensors_of` these weights would be."""
    expected = {f"buffer.{k}": b for k, b in weights.buffers().items()}
    step = torch.zeros((), dtype=torch.float32)
    for name, master in weights.masters.items():
        expected |= {f"model.{name}": master, f"ema.{name}": master}
        if f"adam.step.{name}" in tensors:  # one that never had a gradient has no moments
            moments = {"exp_avg": master, "exp_avg_sq": master, "step": step}
            expected |= {f"adam.{m}.{name}": like for m, like in moments.items()}
    passing = {f"buffer.{name}" for name in weights.passing()}
    for name in sorted((tensors.keys() | expected.keys()) - passing):
        a, b = tensors.get(name), expected.get(name)
        if a is None or b is None or a.shape != b.shape:
            raise ValueError(
                f"{path}: {name} has shape {None if a is None else a.shape}; expected "
                f"{None if b is None else b.shape}"
            )
        if a.dtype != b.dtype:
            raise ValueError(f"{path}: {name} is {a.dtype}; expected {b.dtype}")


@torch.no_grad()
def take(
    tensors: dict[str, torch.Tensor], weights: MasterWeights, optimizer: torch.optim.Optimizer
) -> None:
    """Take up what `check_tensors` has passed."""
    buffers = {k.removeprefix("buffer."): v for k, v in tensors.items() if k.startswith("buf")}
    weights.set_buffers(buffers)
    for name, master in weights.masters.items():
        master.copy_(tensors[f"model.{name}"])
        weights.average[name].copy_(tensors[f"ema.{name}"])
        optimizer.state[master] = {
            key: _laid_out(value, master)
            for key in MOMENTS
            if (value := tensors.get(f"adam.{key}.{name}")) is not None
        }
    weights.round()


def _laid_out(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """On the device of its parameter and, if it has its shape, in its layout."""
    if value.shape != like.shape:
        return value.to(like.device, copy=True)
    return torch.empty_like(like, dtype=value.dtype).copy_(value)
