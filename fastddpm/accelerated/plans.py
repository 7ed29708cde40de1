"""The plan that runs a known network's calls without gradients, and when there is one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from fastddpm import _native
from fastddpm.engine.cpu_plan import build_plan, unsupported
from fastddpm.engine.time_table import time_offsets
from fastddpm.unet import UNet

# Calls of the same weights, once those have been seen to change, before they are packed: making a
# plan takes as long as so many calls gain at batch 1.
CALLS = 8


class UNetPlan:
    """A U-Net in float32 on the CPU for images of one size, steps given image by image: its weights
    packed. Later changes of the U-Net are not seen; ValueError where a weight is not finite."""

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, unet: UNet, height: int, width: int):
        self.threads = torch.get_num_threads()
        self._plan = build_plan(unet, height, width, threads=self.threads)
        self._time = self._time_plan(unet)
        self._labels = None if unet.label_emb is None else unet.label_emb.weight.detach().clone()
        self._outputs = unet.config["out_channels"]
        labels = 0 if self._labels is None else 4 * self._labels.numel()
        self.bytes = self._plan.weight_bytes + self._time.weight_bytes + labels

    def _time_plan(self, unet: UNet) -> Any:
        """From sinusoids to what the blocks take of the time, in the order of `time_offsets`, each
        step as an image of one pixel; a class's embedding is added before the last SiLU."""
        native: Any = _native.C
        first, second = cast("tuple[Any, Any]", unet.temb.dense)
        blocks: list[Any] = [block.temb_proj for block in time_offsets(unet)]
        weight, bias = (torch.cat([getattr(x, k) for x in blocks]) for k in ("weight", "bias"))
        plan = native.cpu.Plan(1, 1, first.in_features)
        silu: Any = (0, 0.0, [], [], True)

        def layer(x: int, name: str, weight: Tensor, bias: Tensor, **options: Any) -> int:
            given = weight.contiguous(), bias.tolist()
            return int(plan.convolution(name, [x], *given, 1, threads=self.threads, **options))

        h = layer(0, "temb.dense.0", first.weight, first.bias)
        added = {} if unet.label_emb is None else {"time_offset": 0}
        h = layer(h, "temb.dense.1", second.weight, second.bias, norm=silu, **added)
        plan.finish(layer(h, "temb_proj", weight, bias, norm=silu))
        self._width = len(weight)
        return plan

    def __call__(self, x: Tensor, sinusoids: Tensor, y: Tensor | None) -> Tensor | None:
        """The output for x (N, C, H, W) at the steps of these sinusoids, of the classes y; None
        where it is not finite."""
        threads, n = torch.get_num_threads(), len(x)
        label = None if self._labels is None else self._labels[y]
        rows, out = x.new_empty((n, self._width)), x.new_empty((n, self._outputs, *x.shape[2:]))
        pixel = (..., None, None)
        self._time.forward(sinusoids[pixel], label, rows[pixel], threads)
        return out if self._plan.forward(x, rows, out, threads) else None


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
    except (MemoryError, ValueError):  # of weights that are not finite
        return None
