"""What other projects' processes take and ops do not: images of other numbers of dimensions, and
float32 beside float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def as_images(x: Tensor) -> Tensor:
    """(N, ...) as the four dimensions that ops take."""
    return x if x.dim() == 4 else x.reshape(len(x), 1, 1, x[:1].numel() if len(x) else 0)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """What is computed in: float64 where one is, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
