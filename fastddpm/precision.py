"""Which storage type a model runs in, and what the machine multiplies natively. Nothing else."""

from __future__ import annotations

import contextlib
from typing import Literal, get_args

import torch

from fastddpm.schedule import check_choice

Precision = Literal["auto", "fp32", "bf16"]


def has_fast_bf16(device: torch.device) -> bool:
    """True where bfloat16 products have instructions of their own: elsewhere they are slower than
    float32.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and any(
        getattr(torch.cpu, probe, lambda: False)()
        for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )


def resolve_precision(precision: str, device: torch.device) -> str:
    """ "auto" as "bf16" or "fp32"; the others as they are. ValueError lists the choices."""
    check_choice("precision", precision, get_args(Precision))
    if precision == "auto":
        return "bf16" if has_fast_bf16(device) else "fp32"
    return precision


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """Matrix products in `precision`, weights and reductions in float32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)
