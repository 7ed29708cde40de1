"""Batches on their way to a GPU, which neither they nor the host wait for."""

from __future__ import annotations

import torch


def staged(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """x, or where it is in ordinary memory and `device` is a GPU a copy of it in pinned memory,
    which a GPU reads on its own."""
    if device.type != "cuda" or x.device.type != "cpu" or x.is_pinned():
        return x
    return pinned(x)


def uploaded(x: torch.Tensor, device: torch.device, *, ours: bool = False) -> torch.Tensor:
    """x on `device`. From the CPU to a GPU it is queued only: a copy of ours in pinned memory is
    what goes, as whose memory x is may write to it at once.

    ours: x came from `staged` and is written to no more"""
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    # Pinned memory is given out anew only when the copies that read it are done: torch sees to it.
    return (x if ours and x.is_pinned() else pinned(x)).to(device, non_blocking=True)


def pinned(x: torch.Tensor) -> torch.Tensor:
    """A copy of x in pinned memory."""
    return torch.empty_like(x, pin_memory=True).copy_(x)
