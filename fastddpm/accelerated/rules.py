"""Where our ops are the faster ones, by the shapes of a call. Measured on two cores of a CPU with
AVX-512, in float32 and NCHW, against torch's. What was not measured, a GPU above all, and autocast
but for whole networks, is left to torch.

Of the layers of any network only these are faster: 3x3 convolutions of stride 1, and those with the
GroupNorm and SiLU before them as one op. A norm alone, or with a SiLU and no convolution behind it,
takes 1.0 to 6 times as long as torch's there, a 1x1 convolution or one of stride 2 1.0 to 3
times."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastddpm import _native
from fastddpm.ops import dispatch

# Pixels of all images from which on a step of training a whole network is faster by ours, and one
# under autocast to bfloat16: below, the weights' gradients are the slower ones.
WHOLE_PIXELS, WHOLE_PIXELS_AUTOCAST = 2048, 16384
NARROWEST = 32  # channels, in and out: below, a convolution of ours is the slower one
PIXELS = 512  # of all images, for gradients: below, the weight's gradient is the slower one
# Multiply-adds of a convolution's call: below, what the call itself takes is more than is won.
PRODUCTS = 6_000_000
_PLAIN = (Tensor, nn.Parameter)


def runs(device: torch.device, *, measured: bool = False) -> bool:
    """Whether our native ops are what runs on the device, and not the reference or another backend.
    measured: with AVX-512, as where the shapes were measured"""
    isa = _native.isa()
    native = isa is not None and device.type == "cpu" and dispatch.forced() in ("auto", "cpu")
    return native and (not measured or str(isa).startswith(("avx512", "amx")))


def whole(x: Tensor, gradient: bool) -> bool:
    """Whether a whole network of the family is faster by our blocks for this x, (N, C, H, W).
    gradient: in a call that records one"""
    if not runs(x.device):
        return False
    autocast = torch.is_autocast_enabled("cpu")
    if autocast and torch.get_autocast_dtype("cpu") != torch.bfloat16:
        return False
    least = WHOLE_PIXELS_AUTOCAST if autocast else WHOLE_PIXELS
    return not gradient or x.numel() // x.shape[1] >= least


def large(x: Any, weight: Any) -> bool:
    """Whether a convolution of x has so many products that one of ours may be faster: what can be
    said of it first, at the least cost."""
    if type(x) not in _PLAIN or type(weight) not in _PLAIN or x.dim() != 4 or weight.dim() != 4:
        return False
    return x.numel() * weight.numel() >= PRODUCTS * max(1, x.shape[1])


def faster(x: Any, weight: Tensor, *others: Tensor | None) -> bool:
    """Whether a 3x3 convolution of stride 1 of x, with a norm of its own or without, is faster as
    ours. others: the bias and the norm's parameters."""
    if not large(x, weight):
        return False
    for tensor in (x, weight, *others):
        if tensor is not None and not (
            type(tensor) in _PLAIN and tensor.device.type == "cpu" and tensor.dtype == torch.float32
        ):
            return False
    if torch.is_autocast_enabled("cpu") or not runs(x.device, measured=True):
        return False
    if weight.dim() != 4 or weight.shape[2:] != (3, 3):
        return False
    n, c, height, width = x.shape
    narrowest, pixels = min(c, len(weight)), n * height * width
    if c != weight.shape[1] or narrowest < NARROWEST:
        return False
    gradient = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, weight, *others)
    )
    return not gradient or pixels >= PIXELS
