"""The fused walk through a U-Net on a GPU, and which walk a forward takes. What stands between two
convolutions is one pass over memory.

Convolutions run without their bias; this, the time embedding and a residual are added by the
group_norm_silu that reads the result (`before`, `residual`), which writes the sum where something
else reads it, too. Skips are a second source of a norm (`x2`) and never concatenated: the 1x1
shortcut of two sources is two products. On a CPU see walk_cpu.py."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastddpm import ops
from fastddpm.ops import attention, dispatch
from fastddpm.unet.order import Order, Stream, dropout_stream, stream_of
from fastddpm.unet.parts import (
    AttentionBlock,
    Downsample,
    ResnetBlock,
    TimeEmbedding,
    Upsample,
    attend,
    image,
    resampled,
    tokens,
)
from fastddpm.unet.plain import foreign, unusual
from fastddpm.unet.walk_cpu import CpuWalk

if TYPE_CHECKING:
    from fastddpm.unet import UNet

__all__ = [
    "CpuWalk",
    "Image",
    "Walk",
    "dropout_stream",
    "is_taken",
    "stream_of",
    "takes_copies",
    "way",
]


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

    def copy(self) -> Image:
        """An image of the same parts, which is added up by itself."""
        return Image(self.x, self.residual, self.before)


class Walk(Order):
    """One pass through a U-Net. The methods are what its layers compute; an engine that has
    prepared their weights overrides these.

    silu_temb: (N, channels of the embedding), what TimeEmbedding returns"""

    def __init__(
        self, silu_temb: Tensor | None = None, stream: Stream | None = None, *, again: bool = False
    ):
        super().__init__(stream, again=again)
        self.silu_temb = silu_temb

    @staticmethod
    def embedded(temb: TimeEmbedding, sinusoids: Tensor, label: Tensor | None) -> Tensor:
        """What the blocks take of the steps' sinusoids and the classes' embeddings, (N,
        channels)."""
        return temb(sinusoids, label)

    def passed(self, compute: Callable[..., Image], *sources: Image, draws: bool = False) -> Image:
        """Order's. What is kept of an image that the first norm adds up is the sum."""
        kept: list[Image] = []

        def run() -> Image:
            again = [h.copy() for h in kept]
            result = compute(*(again or sources))
            if not kept:
                kept.extend(h.copy() for h in sources)
            return result

        return super().passed(run, draws=draws)

    # ---- blocks ---------------------------------------------------------------------------------

    def resnet(
        self,
        block: ResnetBlock,
        place: int,
        h: Image,
        skip_image: Image | None = None,
        *,
        whole: bool = False,
    ) -> Image:
        """ResnetBlock's of cat(h, skip). whole: a skip, whose sum the next norm is to write; else a
        shortcut is added to the convolution's own result."""
        skip = None if skip_image is None else skip_image.value()
        if block.resample and h.residual is None:
            h.value()  # is needed below: a norm that added it up, too, would keep what it is not
        y = self.normed(block.norm1, h, skip)
        if block.resample == "up":
            c = Image(self.doubled(block.conv1, y))
        else:
            c = Image(self.convolution(block.conv1, resampled(y, block.resample)))
        modulation = {}
        if block.scale_shift:
            c.before, modulation = self.bias(block.conv1), self.modulation(block, len(y))
        else:
            c.before = self.time(block)
        out = self.convolution(block.conv2, self.dropped(block, place, c, **modulation))
        if block.resample:  # of one source, with as many channels: see plain.py
            return Image(out, resampled(h.value(), block.resample), self.bias(block.conv2))
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

    def dropped(self, block: ResnetBlock, place: int, h: Image, **modulation: Tensor) -> Tensor:
        """dropout(norm2(h))."""
        if self.torchs_dropout(block):
            return block.dropout(self.normed(block.norm2, h, **modulation))
        return self.normed(block.norm2, h, **modulation, **self.dropout(block, place))

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

    def last(self, norm: Any, conv: nn.Conv2d, h: Image) -> Tensor:
        return self.end(conv, self.normed(norm, h))

    def end(self, conv: nn.Conv2d, y: Tensor) -> Tensor:
        return conv(y)

    def convolution(self, conv: Any, x: Tensor) -> Tensor:
        """Without the bias."""
        return conv._conv_forward(x, conv.weight, None)

    def downsample(self, part: Downsample, h: Image) -> Image:
        return Image(part(h.value()))

    def upsample(self, part: Upsample, h: Image) -> Image:
        return Image(self.doubled(part.conv, h.value()), None, self.bias(part.conv))

    def doubled(self, conv: Any, x: Tensor) -> Tensor:
        """The convolution, without its bias, of x with each pixel as 2x2."""
        return self.convolution(conv, resampled(x, "up"))

    def modulation(self, block: Any, n: int) -> dict[str, Tensor]:
        """What n images' norm2 is scaled and shifted by, of the time embedding."""
        layer = block.temb_proj
        scale, shift = F.linear(cast(Tensor, self.silu_temb), layer.weight, layer.bias).chunk(2, 1)
        return {"scale": scale, "shift": shift}

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


# ---- which way is taken --------------------------------------------------------------------------

WAYS: dict[str, type[Walk] | type[CpuWalk]] = {"cuda": Walk, "cpu": CpuWalk}  # by kind of device


def way(model: UNet, x: Tensor) -> type[Walk] | type[CpuWalk] | None:
    """The walk that forward takes for an x there, or None: one module after the other.

    A walk is taken on a device where it is the faster way, or for dropout by a stream, through
    plain parts, and with nothing that traces or transforms what runs."""
    if torch.compiler.is_compiling():
        return None
    draws = stream_of(model) is not None  # for a step of training, whose weights have no tangents
    found = WAYS.get(x.device.type)
    if (
        not (found or draws)
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or (forward_ad._current_level >= 0 and not draws and _has_tangents(model, x))
        or foreign(model) is not None
    ):
        return None
    if found is CpuWalk and unusual(model) is not None:
        found = None
    return found or (Walk if draws else None)


def _has_tangents(model: UNet, x: Tensor) -> bool:
    """Whether forward-mode AD has anything to do here."""
    tensors = (x, *model.parameters())
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def is_taken(model: UNet, x: Tensor) -> bool:
    """Whether forward takes a walk for an x there."""
    return way(model, x) is not None


def takes_copies(device: torch.device) -> bool:
    """Whether the walk there multiplies by bfloat16 copies of weights (working_copies.py): a CPU's
    ops round the weights themselves, and their gradients come in float32."""
    return WAYS.get(device.type) is not CpuWalk
