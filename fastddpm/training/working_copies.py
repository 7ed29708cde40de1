"""A network's weights in the type that its products run in, made once a step. No steps and no
optimiser: those see the float32 ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

# Of the layers that are called as they are. The other biases are added in float32, by ops.
BIASES = ("conv_in.", "conv_out.", "temb.dense.")


class WorkingCopies:
    """bfloat16 copies of the float32 weights that a U-Net multiplies by, which stand in their
    places while it computes.

    Under autocast each product makes such a copy of its weight, and each gradient is widened by
    itself: here all are made in one go, and the gradients of all widened in one go, with the same
    roundings (but that of a weight which is multiplied by twice, whose gradients are added up in
    bfloat16). The network computes under autocast still, which has nothing left to cast but small
    biases."""

    def __init__(self, network: nn.Module):
        self._places: list[tuple[dict, str, torch.Tensor, nn.Parameter]] = []
        copies: dict[torch.Tensor, nn.Parameter] = {}
        for prefix, module in network.named_modules():
            if type(module) not in (nn.Conv2d, nn.Linear):
                continue
            is_called = f"{prefix}.".startswith(BIASES) or prefix.endswith(".downsample.conv")
            for leaf, p in module._parameters.items():
                if p is None or p.dtype != torch.float32 or not (leaf == "weight" or is_called):
                    continue
                if p not in copies:
                    copy = torch.empty_like(p, dtype=torch.bfloat16)
                    copies[p] = nn.Parameter(copy, requires_grad=p.requires_grad)
                self._places.append((module._parameters, leaf, p, copies[p]))
        self._weights = list(copies)
        self._copies: list[torch.Tensor] = list(copies.values())

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The network computes with copies of its weights as they are now."""
        if self._copies:  # torch takes no empty list
            with torch.no_grad():
                torch._foreach_copy_(self._copies, self._weights)
        for weight, copy in zip(self._weights, self._copies, strict=True):
            copy.grad = None
            copy.requires_grad_(weight.requires_grad)
        try:
            for parameters, leaf, _, copy in self._places:
                parameters[leaf] = copy
            yield
        finally:
            for parameters, leaf, weight, _ in self._places:
                parameters[leaf] = weight  # type: ignore[assignment]

    def take_gradients(self) -> None:
        """The copies' gradients are added to those of the weights, float32."""
        widen(self._copies, self._weights)


@torch.no_grad()
def widen(narrow: list[torch.Tensor], wide: list[torch.Tensor]) -> None:
    """Gradients of rounded copies are added to those of the tensors that they are copies of, in
    their types; a copy keeps none."""
    gradients, widened, added, sums = [], [], [], []
    for p, w in zip(narrow, wide, strict=True):
        if p.grad is None:
            continue
        gradients.append(p.grad)
        widened.append(torch.empty_like(w))
        p.grad = None
        if w.grad is None:
            w.grad = widened[-1]
        else:
            added.append(widened[-1])
            sums.append(w.grad)
    if gradients:
        torch._foreach_copy_(widened, gradients)
    if sums:
        torch._foreach_add_(sums, added)
