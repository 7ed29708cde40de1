"""What other projects' processes take and ops do not: images of other numbers of dimensions, and
float32 beside float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def as_images(x: Tensor) -> Tensor:
    """(N, ...) as the four dimensions that ops take."""
    return x if x.dim() == 4 else x.reshape(len(x), 1, 1, x[:1].numel() if len(x) else 0)


def laid_out_as(x: Tensor, like: Tensor) -> Tensor:
    """x in the memory order of `like`, of its shape. Sums of tensors have that of the first, and
    torch.randn_like draws in it: whoever adds up in another order has another's random numbers.
    """
    if x.stride() == like.stride():
        return x
    order = torch.empty_like(like, dtype=x.dtype)  # dense, where `like` is not
    return x if x.stride() == order.stride() else order.copy_(x)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """What is computed in: float64 where one is, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
