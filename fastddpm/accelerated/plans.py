"""The plan that runs a known network's calls without gradients, and when there is one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastddpm import _native
from fastddpm.engine.cpu_plan import build_plan, unsupported
from fastddpm.engine.time_table import time_offsets
from fastddpm.unet import UNet
from fastddpm.unet.walk_cpu import CpuWalk, linear

# Calls of the same weights, once those have been seen to change, before they are packed: making a
# plan takes as long as so many calls gain at batch 1.
CALLS = 8


class UNetPlan:
    """A U-Net in float32 on the CPU for images of one size, steps given image by image: its weights
    packed, and those of its embeddings as they are. Later changes of the U-Net are not seen."""

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, unet: UNet, height: int, width: int):
        self.plan = build_plan(unet, height, width, threads=torch.get_num_threads())
        first, second = unet.temb.dense
        self._embedding: Any = SimpleNamespace(dense=(_copy(first), _copy(second)))
        layers: list[Any] = [block.temb_proj for block in time_offsets(unet)]
        self._rows = SimpleNamespace(
            weight=torch.cat([layer.weight for layer in layers]),
            bias=torch.cat([layer.bias for layer in layers]),
        )
        self._labels = None if unet.label_emb is None else unet.label_emb.weight.detach().clone()
        self._outputs = unet.config["out_channels"]
        own = (*self._embedding.dense, self._rows)
        copies = [p for layer in own for p in (layer.weight, layer.bias)]
        copies += [] if self._labels is None else [self._labels]
        self.bytes = self.plan.weight_bytes + sum(p.numel() * p.element_size() for p in copies)

    def __call__(self, x: Tensor, sinusoids: Tensor, y: Tensor | None) -> Tensor | None:
        """The output for x (N, C, H, W) at the steps of these sinusoids, of the classes y; None
        where it is not finite."""
        label = None if self._labels is None else self._labels[y]
        temb = CpuWalk.embedded(self._embedding, sinusoids, label)
        rows = linear(self._rows, temb, silu=True)[0, :, :, 0].t().contiguous()
        out = x.new_empty((len(x), self._outputs, *x.shape[2:]))
        return out if self.plan.forward(x, rows, out, torch.get_num_threads()) else None


def _copy(layer: Any) -> Any:
    return SimpleNamespace(weight=layer.weight.detach().clone(), bias=layer.bias.detach().clone())


@dataclass(frozen=True)
class _Seen:
    """key: the weights, the size and the kernels of a call;  calls: how many were alike until now;
    made: whether a plan was tried to be made of them;  plan: that, or None where there is none"""

    key: tuple[Any, ...]
    calls: int
    made: bool = False
    plan: UNetPlan | None = None


class Plans:
    """One plan at most: of the weights as they are now, which a digest of all their values says in
    every call.

    The first weights get theirs at once. When they or the size of the images have changed, or a
    step of training was taken, those that stay for CALLS calls do: what is being trained is not
    packed for a few images. Threads may share it."""

    def __init__(self, steady: bool = True):
        self._seen: _Seen | None = None
        self.steady = steady  # nothing was seen to change yet

    @property
    def plan(self) -> UNetPlan | None:
        """That of the last call's weights."""
        seen = self._seen
        return None if seen is None else seen.plan

    def forget(self) -> None:
        """As of weights that are about to change."""
        self._seen, self.steady = None, False

    def of(
        self, tensors: Sequence[Tensor], size: tuple[int, int], unet: Callable[[], UNet | None]
    ) -> UNetPlan | None:
        """The plan of these weights for images of a size, which unet() makes a U-Net of; None where
        there is none (yet)."""
        native: Any = _native.C
        try:
            digest = native.cpu.digest(tensors, torch.get_num_threads())
        except ValueError:  # of one that is not dense, say
            self.forget()
            return None
        key = digest, [(p.shape, p.stride()) for p in tensors], size, native.isa()
        seen = self._seen  # read once: others may put theirs there
        if seen is not None and seen.key != key:
            seen, self.steady = None, False
        if seen is not None and seen.made:
            return seen.plan
        calls = 1 if seen is None else seen.calls + 1
        if not self.steady and calls < CALLS:
            self._seen = _Seen(key, calls)  # and no plan of others
            return None
        self._seen = None  # its memory is free before more is taken
        made = _plan_of(unet(), size)
        self._seen = _Seen(key, calls, True, made)
        return made


def _plan_of(unet: UNet | None, size: tuple[int, int]) -> UNetPlan | None:
    if unet is None or unsupported(unet, torch.device("cpu")) is not None:
        return None
    try:
        return UNetPlan(unet, *size)
    except MemoryError:
        return None
