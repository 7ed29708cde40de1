"""The fused walk through a U-Net: what stands between two convolutions is one pass over memory.

Convolutions run without their bias; this, the time embedding and a residual are added by the
group_norm_silu that reads the result (`before`, `residual`), which writes the sum where something
else reads it, too. Skips are a second source of a norm (`x2`) and never concatenated: the 1x1
shortcut of two sources is two products. UNet.forward goes this way where every part is plain."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastddpm import ops
from fastddpm.ops import attention, dispatch
from fastddpm.unet_parts import (
    AttentionBlock,
    Downsample,
    Level,
    ResnetBlock,
    Upsample,
    attend,
    image,
    tokens,
)
from fastddpm.unet_plain import foreign

if TYPE_CHECKING:
    from fastddpm.unet import UNet

DROPOUT_STEP = 2**32 - 2  # the RNG contract's step word of the first block's dropout, from there on
# Where forward goes this way. On a CPU convolutions add their bias themselves: little is gained in
# float32, nothing in bfloat16, and results would change in rounding.
DEVICES = ("cuda",)


class Image:
    """x + residual + before, before (C,) or (N, C): added up by the first norm that reads it, or on
    its own where something else is the first."""

    __slots__ = ("before", "residual", "x")

    def __init__(self, x: Tensor, residual: Tensor | None = None, before: Tensor | None = None):
        self.x, self.residual, self.before = x, residual, before

    def value(self) -> Tensor:
        """The sum."""
        if self.residual is not None or self.before is not None:
            self.set(ops.residual_sum(self.x, self.residual, self.before))
        return self.x

    def set(self, u: Tensor) -> None:
        self.x, self.residual, self.before = u, None, None


class Walk:
    """One pass through a U-Net. The methods are what its layers compute; an engine that has
    prepared their weights overrides these.

    silu_temb: (N, channels of the embedding), what TimeEmbedding returns"""

    def __init__(self, silu_temb: Tensor | None = None, stream: Stream | None = None):
        self.silu_temb, self._stream, self._block = silu_temb, stream, 0

    def walk(self, model: UNet, x: Tensor) -> Tensor:
        """conv_out's result for conv_in's input x."""
        h = self.first(model.conv_in, x)
        skips = [h]
        for level in model.down:
            for block, attn in _blocks(level):
                h = self.resnet(block, h, whole=attn is None)
                h = h if attn is None else self.attention(attn, h)
                skips.append(h)
            if level.downsample is not None:
                h = self.downsample(level.downsample, h.value())
                skips.append(h)

        mid = cast(Any, model.mid)
        h = self.attention(mid.attn_1, self.resnet(mid.block_1, h))
        h = self.resnet(mid.block_2, h)

        for level in reversed(model.up):
            for block, attn in _blocks(level):
                h = self.resnet(block, h, skips.pop().value())
                h = h if attn is None else self.attention(attn, h)
            if level.upsample is not None:
                h = self.upsample(level.upsample, h.value())
        return self.last(model.conv_out, self.normed(model.norm_out, h))

    # ---- blocks ---------------------------------------------------------------------------------

    def resnet(
        self, block: ResnetBlock, h: Image, skip: Tensor | None = None, *, whole: bool = False
    ) -> Image:
        """ResnetBlock's of cat(h, skip). whole: a skip, whose sum the next norm is to write; else a
        shortcut is added to the convolution's own result."""
        c = Image(self.convolution(block.conv1, self.normed(block.norm1, h, skip)))
        c.before = self.time(block)
        out = self.convolution(block.conv2, self.dropped(block, c))
        if "nin_shortcut" not in block._modules:
            return Image(out, h.x, self.bias(block.conv2, h.before))
        weight = self.pointwise(block.nin_shortcut)
        before = self.shortcut_bias(block, weight, h.before)
        sources = (h.x,) if skip is None else (h.x, skip)
        if whole:
            return Image(out, products(sources, weight, None), before)
        return Image(products(sources, weight, out), None, before)

    def attention(self, block: AttentionBlock, h: Image) -> Image:
        """AttentionBlock's of h."""
        if self.attends_at_once(block, h.x):
            return Image(
                ops.attention_block(
                    h.value(), block.norm.num_groups, *self.affine(block.norm),
                    *self.linear(block.qkv), *self.linear(block.proj_out),
                    num_heads=block.num_heads, eps=block.norm.eps,
                )
            )  # fmt: skip
        y = self.normed(block.norm, h, silu=False)
        qkv = F.linear(tokens(y), *self.linear(block.qkv))
        out = F.linear(attend(qkv, block.num_heads), self.linear(block.proj_out)[0])
        return Image(image(out, y), h.x, self.bias(block.proj_out, h.before))

    def dropped(self, block: ResnetBlock, h: Image) -> Tensor:
        """dropout(norm2(h))."""
        dropout, place = block.dropout, self._block
        self._block += 1
        if not (dropout.training and dropout.p):
            return self.normed(block.norm2, h)
        if self._stream is None or dropout.p >= 1:
            return dropout(self.normed(block.norm2, h))
        return self.normed(block.norm2, h, dropout=dropout.p, **self._stream.of(place))

    def normed(self, norm: Any, h: Image, x2: Tensor | None = None, **options: Any) -> Tensor:
        """group_norm_silu of cat(h, x2). A residual of h is added up from here on."""
        arguments = (h.x, norm.num_groups, *self.affine(norm), norm.eps)
        options |= {"before": h.before, "x2": x2}
        if h.residual is None:
            return ops.group_norm_silu(*arguments, **options)
        y, u = ops.group_norm_silu(*arguments, residual=h.residual, **options)
        h.set(u)
        return y

    # ---- layers ---------------------------------------------------------------------------------

    def affine(self, norm: Any) -> tuple[Tensor | None, Tensor | None]:
        return norm.weight, norm.bias

    def bias(self, layer: Any, before: Tensor | None = None) -> Tensor | None:
        """What is added to the layer's result where that is read: its bias and `before`."""
        return sum_of(layer.bias, before)

    def linear(self, layer: Any) -> tuple[Tensor, Tensor | None]:
        return layer.weight, layer.bias

    def first(self, conv: nn.Conv2d, x: Tensor) -> Image:
        return Image(conv(x))

    def last(self, conv: nn.Conv2d, y: Tensor) -> Tensor:
        return conv(y)

    def convolution(self, conv: Any, x: Tensor) -> Tensor:
        """Without the bias."""
        return conv._conv_forward(x, conv.weight, None)

    def downsample(self, part: Downsample, x: Tensor) -> Image:
        return Image(part(x))

    def upsample(self, part: Upsample, x: Tensor) -> Image:
        return Image(part.convolved(x, None), None, self.bias(part.conv))

    def time(self, block: Any) -> Tensor:
        """What is added to conv1's result: its bias and the time embedding."""
        layer = block.temb_proj
        return F.linear(
            cast(Tensor, self.silu_temb), layer.weight, sum_of(layer.bias, block.conv1.bias)
        )

    def pointwise(self, conv: Any) -> Tensor:
        return matrix(conv.weight)

    def shortcut_bias(self, block: Any, weight: Tensor, before: Tensor | None) -> Tensor | None:
        """What is added to conv2's result and the shortcut's products: their biases, and the
        shortcut of what is still to be added to its first source."""
        return shortcut_bias(block, weight, before)

    def attends_at_once(self, block: Any, x: Tensor) -> bool:
        """Whether the whole block is one op: on a CPU it is one kernel; on a GPU it is as many as
        its parts, which take in what stands before and after it, but where Triton's is better."""
        if not x.is_cuda or dispatch.forced() not in ("auto", "cuda"):
            return True
        gradient = torch.is_grad_enabled()
        order = attention.order(x, block.qkv.weight, block.num_heads, gradient=gradient)
        return order[0] == "triton"


def products(sources: tuple[Tensor, ...], weight: Tensor, onto: Tensor | None) -> Tensor:
    """onto + weight cat(sources) of each pixel; weight (O, C), images (N, .., H, W).

    Channels last, they are matrices of pixels. onto is written where no gradient is asked for."""
    parts = weight.split([x.shape[1] for x in sources], 1)
    images = sources if onto is None else (onto, *sources)
    if not all(x.is_contiguous(memory_format=torch.channels_last) for x in images):
        terms = [F.conv2d(x, w[:, :, None, None]) for x, w in zip(sources, parts, strict=True)]
        return functools.reduce(operator.add, terms if onto is None else [onto, *terms])
    n, _, *size = sources[0].shape
    total = None if onto is None else _pixels(onto)
    for x, w in zip(sources, parts, strict=True):
        a, b = _pixels(x), w.t()
        if total is None:
            total = a @ b
        elif torch.is_grad_enabled() or not total.dtype == a.dtype == b.dtype:  # under autocast
            total = torch.addmm(total, a, b)
        else:
            total = total.addmm_(a, b)
    return cast(Tensor, total).view(n, *size, -1).permute(0, 3, 1, 2)


def shortcut_bias(block: Any, weight: Tensor, before: Tensor | None) -> Tensor | None:
    """conv2's bias + the shortcut's + the shortcut, weight (O, C), of `before`, (C,) of its first
    channels."""
    moved = None
    if before is not None:
        moved = F.linear(before, weight[:, : len(before)].to(before.dtype))
    return sum_of(block.conv2.bias, block.nin_shortcut.bias, moved)


def _pixels(x: Tensor) -> Tensor:
    """(N, C, H, W), channels last -> (N H W, C), a view."""
    return x.permute(0, 2, 3, 1).view(-1, x.shape[1])


def matrix(weight: Tensor) -> Tensor:
    """(O, C, 1, 1) -> (O, C), a view. Its gradient is laid out as a channels-last weight is, which
    spares DistributedDataParallel a copy."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def sum_of(*terms: Tensor | None) -> Any:
    given = [x for x in terms if x is not None]
    return functools.reduce(operator.add, given) if given else None


def _blocks(level: Level) -> Iterator[tuple[Any, Any]]:
    for j, block in enumerate(level.block):
        yield block, level.attn[j] if level.attn else None


# ---- when it is taken, and with which dropout ----------------------------------------------------


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
    in a backward, take their dropout from the counter RNG where they take the fused walk, which
    they then do on a CPU as well. Where they can't (`foreign(model)` says why; torch.compile and
    torch.func, too) it stays torch's own.

    seed in [0, 2^64);  sample_index: (N,) int64 on the device of the batch, an index for each
    example"""
    blocks = 2 + sum(len(level.block) for level in (*model.down, *model.up))
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


def _stream_of(model: nn.Module) -> Stream | None:
    found = _stream.get()
    if found is None and torch._C._current_graph_task_id() >= 0:
        return _backwards.get(model)
    return found[1] if found is not None and found[0] is model else None


def is_taken(model: UNet, x: Tensor) -> bool:
    """Whether forward goes this way for x: on a device where it is the faster one, through plain
    parts, and with nothing that traces or transforms what runs."""
    if torch.compiler.is_compiling():
        return False
    draws = _stream_of(model) is not None  # for a step of training, whose weights have no tangents
    return (
        (x.device.type in DEVICES or draws)
        and torch._C._get_tracing_state() is None
        and not torch._C._are_functorch_transforms_active()
        and (forward_ad._current_level < 0 or draws)
        and foreign(model) is None
    )


def walk(model: UNet, x: Tensor, silu_temb: Tensor) -> Tensor:
    """forward's way from conv_in to conv_out: x is what conv_in takes."""
    return Walk(silu_temb, _stream_of(model)).walk(model, x)
