"""Bits back along the forward chain (Townsend et al. 2019; the order is Bit-Swap's, Kingma et al.
2019): a batch of images onto a stack of bits, and off it. No files, no batches of a set.

For t = 1 .. T: pop x_t ~ q(x_t | x_{t-1}), push x_{t-1} under p(x_{t-1} | x_t), x_0 under the 256
levels of Eq. 13; push x_T under N(0, 1). The stack grows by -log2 p(x_{0:T}) + log2 q(x_{1:T} |
x_0) bits, whose expectation is the bound of Eq. 5. Decoding undoes each call, the last first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastddpm.codec.grid import Grids
from fastddpm.reference import to_unit

Network = Callable[[torch.Tensor, int], torch.Tensor]  # (x_t, chain index) -> output
OnStep = Callable[[int], object]  # with the number of images


def encode(
    coder: Any, grids: Grids, network: Network, x0: torch.Tensor, on_step: OnStep = int
) -> None:
    """Push the images x0, (N, C, H, W) uint8, contiguous."""
    previous = x = to_unit(x0)
    for i in range(grids.T):
        x = torch.empty_like(previous)
        _values(coder.pop_gaussian, x, *grids.forward(previous, i), grids.exponents[i], False)
        mean, log_variance = grids.reverse(x, network(x, i), i)
        if i == 0:
            _levels(coder.push_levels, x0, mean, log_variance)
        else:
            exponent = grids.exponents[i - 1]
            _values(coder.push_gaussian, previous, mean, log_variance, exponent, True)
        previous = x
        on_step(len(x))
    _values(coder.push_gaussian, x, torch.zeros_like(x), 0.0, grids.exponents[-1], True)


def decode(
    coder: Any,
    grids: Grids,
    network: Network,
    shape: tuple[int, int, int, int],
    on_step: OnStep = int,
) -> torch.Tensor:
    """Pop the images (N, C, H, W) uint8 that `encode` pushed. ValueError where the stack can't be
    an encoder's."""
    x = torch.empty(shape, dtype=torch.float32, device="cpu")
    x0 = torch.empty(shape, dtype=torch.uint8, device="cpu")
    _values(coder.pop_gaussian, x, torch.zeros_like(x), 0.0, grids.exponents[-1], True, True)
    for i in reversed(range(grids.T)):
        mean, log_variance = grids.reverse(x, network(x, i), i)
        if i == 0:
            _levels(coder.pop_levels, x0, mean, log_variance, True)
            previous = to_unit(x0)
        else:
            previous = torch.empty_like(x)
            exponent = grids.exponents[i - 1]
            _values(coder.pop_gaussian, previous, mean, log_variance, exponent, True, True)
        forward = grids.forward(previous, i)
        _values(coder.push_gaussian, x, *forward, grids.exponents[i], False, True)
        x = previous
        on_step(len(x))
    return x0


def _values(
    call: Callable[..., None],
    values: torch.Tensor,
    mean: torch.Tensor,
    log_variance: torch.Tensor | float,
    exponent: int,
    outside: bool,
    backwards: bool = False,
) -> None:
    call(
        values.view(-1), _flat(mean), _flat(log_variance),
        exponent=exponent, outside=outside, backwards=backwards,
    )  # fmt: skip


def _levels(
    call: Callable[..., None],
    pixels: torch.Tensor,
    mean: torch.Tensor,
    log_variance: torch.Tensor | float,
    backwards: bool = False,
) -> None:
    call(pixels.view(-1), _flat(mean), _flat(log_variance), backwards=backwards)


def _flat(x: torch.Tensor | float) -> torch.Tensor | float:
    return x.contiguous().view(-1) if isinstance(x, torch.Tensor) else x
