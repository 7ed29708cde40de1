"""The gradients of single convolutions: ops.convolution's beside torch's, checked, then timed."""

from __future__ import annotations

import math
import statistics
import time
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from networks import relative_error
from tabulate import tabulate
from torch import Tensor

from fastddpm import ops

if TYPE_CHECKING:
    from convolutions import Layers

KINDS = ("data", "weight")
LEAST = 2e-3  # seconds of a turn


def padded(layers: Layers, x: Tensor) -> Tensor:
    """The layer's x as torch's convolution reads it, in steps that have a gradient."""
    if layers.shape.repeat > 1:
        x = F.interpolate(x, scale_factor=layers.shape.repeat, mode="nearest")
    before, after = layers.border
    return F.pad(x, (before, after, before, after))


class Gradients:
    """Of one shape: both gradients by both, ready to be timed. grad: y's, random."""

    def __init__(self, layers: Layers, batch: int, dtype: torch.dtype):
        self.layers = layers
        assert layers.weight is not None
        last = {"memory_format": torch.channels_last}
        self.x = layers.input(batch).to(dtype)
        self.weight = layers.weight.to(dtype).contiguous(**last)
        self.y = {kind: self.forward(kind) for kind in KINDS}
        random = torch.Generator().manual_seed(1)
        self.grad = (
            torch.randn(self.y["data"][0].shape, generator=random).to(dtype).contiguous(**last)
        )
        self.read = padded(layers, self.x).contiguous(**last)

    def forward(self, kind: str) -> tuple[Tensor, Tensor]:
        """y, and the one tensor that has a gradient: an op computes all that are asked for."""
        x, weight = self.x.detach(), self.weight.detach()
        of = (x if kind == "data" else weight).requires_grad_()
        shape = self.layers.shape
        y = ops.convolution(
            x, weight, stride=shape.stride, padding=self.layers.border, upsample=shape.repeat
        )
        return y, of

    def ours(self, kind: str) -> Tensor:
        y, of = self.y[kind]
        return torch.autograd.grad(y, of, self.grad, retain_graph=True)[0]

    def theirs(self, kind: str) -> Tensor:
        """Of what is upsampled and padded already."""
        stride, mask = [self.layers.shape.stride] * 2, [kind == "data", kind == "weight", False]
        found = torch.ops.aten.convolution_backward(
            self.grad, self.read, self.weight, None, stride, [0, 0], [1, 1], False, [0, 0], 1, mask
        )
        return found[0 if kind == "data" else 1]

    def errors(self, kind: str) -> tuple[float, float]:
        """Ours and torch's, relative to the gradient in float64."""
        x = self.x.double().requires_grad_()
        weight = self.weight.double().requires_grad_()
        read = padded(self.layers, x)
        y = F.conv2d(read, weight, stride=self.layers.shape.stride)
        of = [x, read] if kind == "data" else [weight, weight]
        truths = torch.autograd.grad(y, of, self.grad.double())
        found = self.ours(kind), self.theirs(kind)
        ours, theirs = (relative_error(a, b) for a, b in zip(found, truths, strict=True))
        return ours, theirs

    def seconds(self, function: Any, kind: str, calls: int) -> float:
        """Of a call, the mean of some after one that warms up."""
        function(kind)
        start = time.perf_counter()
        for _ in range(calls):
            function(kind)
        return (time.perf_counter() - start) / calls


def rows_of(
    shapes: list[Layers], batch: int, dtype: torch.dtype, repeats: int, ceiling: float | None
) -> list[dict[str, Any]]:
    """A row a shape and kind, the longest first; times and rates of all its layers together."""
    rows = []
    for layers in shapes:
        if not layers.shape.kernel:
            continue
        few, gradients = Gradients(layers, 1, dtype), Gradients(layers, batch, dtype)
        for kind in KINDS:
            contestants = (gradients.ours, gradients.theirs)
            once = [gradients.seconds(function, kind, 1) for function in contestants]
            calls = [math.ceil(LEAST / seconds) for seconds in once]
            turns = [
                [
                    gradients.seconds(function, kind, n)
                    for function, n in zip(contestants, calls, strict=True)
                ]
                for _ in range(repeats)
            ]
            ours, theirs = (
                statistics.median(times) * len(layers.at) for times in zip(*turns, strict=True)
            )
            row = {
                **vars(layers.shape), "kind": kind, "layers": len(layers.at), "ms": ours * 1e3,
                "GFLOP/s": batch * len(layers.at) * layers.flop / ours / 1e9,
            }  # fmt: skip
            del row["algorithm"]  # the plan's, of the forward
            if ceiling:
                row["of ceiling"] = row["GFLOP/s"] * 1e9 / ceiling
            row |= {"torch ms": theirs * 1e3, "x torch": theirs / ours}
            row["error"], row["torch error"] = few.errors(kind)
            rows.append(row)
    return sorted(rows, key=lambda row: -row["ms"])


def table(rows: list[dict[str, Any]]) -> str:
    formats = {
        "layers": "d", "ms": ".3g", "GFLOP/s": ".3g", "of ceiling": ".0%", "torch ms": ".3g",
        "x torch": ".2f", "error": ".1e", "torch error": ".1e",
    }  # fmt: skip
    changes = {(2, 1): ", stride 2", (1, 2): ", upsampled"}
    return tabulate(
        [
            {
                "gradient of": row["kind"],
                "": f"{row['kernel']}x{row['kernel']}"
                + changes.get((row["stride"], row["repeat"]), ""),
                "channels": f"{row['c_in']} -> {row['c_out']}",
                "size of y": f"{row['height']}x{row['width']}",
                **{key: f"{row[key]:{how}}" if key in row else "" for key, how in formats.items()},
            }
            for row in rows
        ],
        headers="keys", tablefmt="simple", disable_numparse=True,
    )  # fmt: skip
