"""The order of a U-Net's parts, for all ways in which they are computed, what of a forward is
computed again in its backward, and where dropout's masks come from. Nothing is computed here."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastddpm.unet.parts import AttentionBlock, Level, ResnetBlock

if TYPE_CHECKING:
    from fastddpm.unet import UNet

DROPOUT_STEP = 2**32 - 2  # the RNG contract's step word of the first block's dropout, from there on


class Order:
    """One pass through a U-Net; an image between two parts is of any type. The methods that are
    missing here are what the parts compute:

    first(conv_in, x), last(norm_out, conv_out, h), downsample(part, h), upsample(part, h) by a
    convolution, resnet(block, place, h, skip, whole=) of cat(h, skip), attention(block, h),

    again: each residual block is computed again in the backward, with the attention after it, and
    so is a doubling: kept is what they get"""

    first: Any
    last: Any
    downsample: Any
    upsample: Any
    resnet: Any
    attention: Any

    def __init__(self, stream: Stream | None = None, *, again: bool = False):
        self.stream, self.again = stream, again

    def walk(self, model: UNet, x: Tensor) -> Tensor:
        """conv_out's result for conv_in's input x."""
        places = itertools.count()
        h = self.first(model.conv_in, x)
        skips = [h]
        for level in model.down:
            for block, attn in _blocks(level):
                h = self.unit(block, attn, next(places), h, whole=attn is None)
                skips.append(h)
            if isinstance(level.downsample, ResnetBlock):
                h = self.unit(level.downsample, None, next(places), h, whole=True)
                skips.append(h)
            elif level.downsample is not None:
                h = self.downsample(level.downsample, h)
                skips.append(h)

        mid: Any = model.mid
        h = self.unit(mid.block_1, mid.attn_1, next(places), h)
        h = self.unit(mid.block_2, None, next(places), h)

        for level in reversed(model.up):
            for block, attn in _blocks(level):
                h = self.unit(block, attn, next(places), h, skips.pop())
            if isinstance(level.upsample, ResnetBlock):
                h = self.unit(level.upsample, None, next(places), h)
            elif level.upsample is not None:
                h = self.passed(functools.partial(self.upsample, level.upsample), h)
        return self.last(model.norm_out, model.conv_out, h)

    def unit(
        self,
        block: ResnetBlock,
        attn: AttentionBlock | None,
        place: int,
        h: Any,
        skip: Any = None,
        *,
        whole: bool = False,
    ) -> Any:
        """A residual block and the attention after it. whole: the result is a skip, too."""

        def compute(h: Any, skip: Any = None) -> Any:
            h = self.resnet(block, place, h, skip, whole=whole)
            return h if attn is None else self.attention(attn, h)

        sources = (h,) if skip is None else (h, skip)
        return self.passed(compute, *sources, draws=self.torchs_dropout(block))

    def passed(self, compute: Callable[..., Any], *sources: Any, draws: bool = False) -> Any:
        """compute(*sources), of which a backward keeps the sources and computes the rest again,
        where it does so. draws: of torch's random numbers"""
        if not (self.again and torch.is_grad_enabled()):
            return compute(*sources)
        return recomputed(compute, *sources, draws=draws)

    def torchs_dropout(self, block: ResnetBlock) -> bool:
        """Whether the block drops by torch's generators, and not by the stream or not at all."""
        dropout = block.dropout
        return bool(dropout.training and dropout.p and (self.stream is None or dropout.p >= 1))

    def dropout(self, block: ResnetBlock, place: int) -> dict[str, Any]:
        """group_norm_silu's options of the block's dropout by the stream; empty without."""
        p = block.dropout.p
        if not (block.dropout.training and p) or self.stream is None or p >= 1:
            return {}
        return {"dropout": p, **self.stream.of(place)}


def recomputed(compute: Callable[..., Any], *sources: Any, draws: bool = True) -> Any:
    """compute(*sources), of which a backward keeps the sources and computes the rest again. draws:
    of torch's random numbers, which are the same then"""
    return checkpoint(compute, *sources, use_reentrant=False, preserve_rng_state=draws)


def _blocks(level: Level) -> Iterator[tuple[Any, Any]]:
    for j, block in enumerate(level.block):
        yield block, level.attn[j] if level.attn else None


# ---- dropout's masks -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Stream:
    """Where dropout's masks come from: block k's of sample n are words of (seed, DROPOUT_STEP - k,
    sample_index[n]) of the RNG contract, blocks in the order of the walk."""

    seed: int
    sample_index: Tensor
    steps: Tensor

    def of(self, place: int) -> dict[str, Any]:
        index = self.sample_index
        return {
            "seed": self.seed,
            "step": self.steps[place].expand_as(index),
            "sample_index": index,
        }


_stream: ContextVar[tuple[nn.Module, Stream] | None] = ContextVar("_stream", default=None)
_backwards: dict[nn.Module, Stream] = {}  # for a forward that a backward repeats, in its own thread


@contextlib.contextmanager
def dropout_stream(model: UNet, *, seed: int, sample_index: Tensor) -> Iterator[None]:
    """Within, the forwards of this very network in this thread, and those that a checkpoint repeats
    in a backward, take their dropout from the counter RNG where they take a walk. Where they can't
    (`foreign(model)` says why; torch.compile and torch.func, too) it stays torch's own.

    seed in [0, 2^64);  sample_index: (N,) int64 on the device of the batch, an index for each
    example"""
    blocks = sum(isinstance(part, ResnetBlock) for part in model.modules())
    steps = DROPOUT_STEP - torch.arange(blocks, device=sample_index.device)
    stream, before = Stream(seed, sample_index, steps), _backwards.get(model)
    token = _stream.set((model, stream))
    _backwards[model] = stream
    try:
        yield
    finally:
        _stream.reset(token)
        if before is None:
            del _backwards[model]
        else:
            _backwards[model] = before


def stream_of(model: nn.Module) -> Stream | None:
    found = _stream.get()
    if found is None and torch._C._current_graph_task_id() >= 0:
        return _backwards.get(model)
    return found[1] if found is not None and found[0] is model else None
