"""A U-Net prepared for a GPU: its fused walk over weights that are made ready once, as a plain
function of tensors. What records and replays it is cuda_plan.py's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastddpm.engine.time_table import time_embeddings, time_layer, time_offsets, time_rows
from fastddpm.unet import UNet
from fastddpm.unet.parts import Downsample, regrouped
from fastddpm.unet.walk import Image, Walk, matrix, shortcut_bias

WIDTH = 8  # channels of an image's ends are padded to a multiple: what tensor cores take in NHWC


class Network(Walk):
    """`__call__(x, t, y)`: the U-Net's output for x (N, C, H, W) float32 at the chain index t, (1,)
    int64 on the device, of the model's times `model_t`, and of the classes y, (N,) int64 there; in
    the weights' dtype, without a host wait.

    Prepared are, in `dtype`, the weights of products; in float32 at least (`wide`), biases, norms
    and one row of all that the blocks take of the time for each step, so that a step reads its row
    by its counter; with classes it reads its embedding, and one product makes the images' rows. Two
     convolutions are regrouped: a doubling becomes a transposed one
    of stride 2 with the repeated pixels' weights summed (4/9 of the products, no doubled copy),
    and a halving that is padded at the end a 4x4 one whose first row and column are 0. conv_in's
    bias is the weight of one more input channel, which is 1."""

    def __init__(self, model: UNet, model_t: Tensor, dtype: torch.dtype):
        super().__init__()
        self.model, self.dtype, self.device = model, dtype, model_t.device
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self._model_t, self._offsets = model_t, time_offsets(model)
        self._made: dict[tuple[nn.Module, str], tuple[Tensor, Callable[[], Tensor]]] = {}
        self._row = torch.empty(0)
        self._input = torch.empty(0)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the model's weights as they are now, at the places where they are."""
        for place, make in self._made.values():
            place.copy_(make())

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self, x: Tensor, t: Tensor, y: Tensor | None = None
    ) -> Tensor:
        self.model.check_input(x, t.expand(len(x)))
        if self.model.label_emb is None:
            rows = self._kept(self.model, "rows", self.wide, lambda: self._rows())
            self._row = rows.index_select(0, t)[0]
        else:
            self._row = self._rows_of(t, cast(Tensor, y))
        return self.walk(self.model, self._padded(x))

    def _rows(self) -> Tensor:
        return time_rows(self.model, self._model_t, conv_bias=True, dtype=self.wide)

    def _rows_of(self, t: Tensor, y: Tensor) -> Tensor:
        """The rows of images of the classes y at one step, (N, K)."""
        model = self.model
        steps = self._kept(model, "steps", self.wide, lambda: time_embeddings(model, self._model_t))
        labels = self._kept(
            model, "labels", self.wide, lambda: cast(nn.Embedding, model.label_emb).weight
        )
        weight = self._kept(model, "rows' weight", self.wide, lambda: self._layer()[0])
        bias = self._kept(model, "rows' bias", self.wide, lambda: self._layer()[1])
        embedding = steps.index_select(0, t) + labels.index_select(0, y)
        return F.linear(F.silu(embedding), weight, bias)

    def _layer(self) -> tuple[Tensor, Tensor]:
        return time_layer(self.model, conv_bias=True)

    def _kept(
        self, owner: nn.Module, name: str, dtype: torch.dtype, make: Callable[[], Tensor]
    ) -> Tensor:
        """make() in `dtype`, channels last if it is an image: made at its first use."""
        if (owner, name) not in self._made:
            made = make().detach()
            order = torch.channels_last if made.dim() == 4 else torch.contiguous_format
            place = torch.empty(made.shape, dtype=dtype, device=self.device, memory_format=order)
            self._made[owner, name] = place.copy_(made), make
        return self._made[owner, name][0]

    def _weight(self, layer: Any, make: Callable[[], Tensor] | None = None) -> Tensor:
        return self._kept(layer, "weight", self.dtype, make or (lambda: layer.weight))

    def _padded(self, x: Tensor) -> Tensor:
        """The input's buffer: the channels of x, one of ones and zeros up to the width."""
        n, c, *size = x.shape
        shape = (n, _up(c + 1), *size)
        if self._input.shape != shape:
            buffer = torch.zeros(shape, dtype=self.dtype, device=self.device)
            buffer[:, c] = 1
            self._input = buffer.contiguous(memory_format=torch.channels_last)
        self._input[:, :c].copy_(x)
        return self._input

    def dropped(self, block: Any, place: int, h: Image, **modulation: Tensor) -> Tensor:
        return self.normed(block.norm2, h, **modulation)  # in whatever mode the model is

    # ---- layers ---------------------------------------------------------------------------------

    def affine(self, norm: Any) -> tuple[Tensor | None, Tensor | None]:
        return self._wide(norm, "weight"), self._wide(norm, "bias")

    def bias(self, layer: Any, before: Tensor | None = None) -> Tensor | None:
        own = self._wide(layer, "bias")
        if own is None or before is None:
            return before if own is None else own
        return self._kept(layer, "bias and before", self.wide, lambda: own + before)

    def _wide(self, layer: Any, name: str) -> Tensor | None:
        if getattr(layer, name) is None:
            return None
        return self._kept(layer, f"wide {name}", self.wide, lambda: getattr(layer, name))

    def first(self, conv: Any, x: Tensor) -> Image:
        def make() -> Tensor:
            weight = conv.weight.new_zeros(conv.out_channels, x.shape[1], *conv.kernel_size)
            weight[:, : conv.in_channels] = conv.weight
            if conv.bias is not None:
                centre = [size // 2 for size in conv.kernel_size]
                weight[:, conv.in_channels, centre[0], centre[1]] = conv.bias
            return weight

        return Image(F.conv2d(x, self._weight(conv, make), padding=conv.padding))

    def end(self, conv: Any, y: Tensor) -> Tensor:
        c = conv.out_channels
        more = _up(c) - c
        weight = self._weight(conv, lambda: F.pad(conv.weight, (0,) * 7 + (more,)))
        bias = None
        if conv.bias is not None:
            bias = self._kept(conv, "bias", self.dtype, lambda: F.pad(conv.bias, (0, more)))
        return F.conv2d(y, weight, bias, padding=conv.padding)[:, :c]

    def convolution(self, conv: Any, x: Tensor) -> Tensor:
        return F.conv2d(x, self._weight(conv), padding=conv.padding)

    def linear(self, layer: Any) -> tuple[Tensor, Tensor | None]:
        bias = layer.bias
        if bias is not None:
            bias = self._kept(layer, "bias", self.dtype, lambda: layer.bias)
        return self._weight(layer), bias

    def downsample(self, part: Downsample, h: Image) -> Image:
        conv: Any = part.conv
        weight = self._weight(
            conv,
            lambda: conv.weight if conv.padding == (1, 1) else F.pad(conv.weight, (1, 0, 1, 0)),
        )
        bias = None
        if conv.bias is not None:
            bias = self._kept(conv, "bias", self.dtype, lambda: conv.bias)
        return Image(F.conv2d(h.value(), weight, bias, stride=2, padding=1))

    def doubled(self, conv: Any, x: Tensor) -> Tensor:
        weight = self._weight(conv, lambda: regrouped(conv.weight))
        return F.conv_transpose2d(x, weight, None, stride=2, padding=1)

    def modulation(self, block: Any, n: int) -> dict[str, Tensor]:
        scale, shift = self.time(block).expand(n, -1).chunk(2, 1)
        return {"scale": scale, "shift": shift}

    def time(self, block: Any) -> Tensor:
        begin = self._offsets[block]
        return self._row[..., begin : begin + block.temb_proj.out_features]

    def pointwise(self, conv: Any) -> Tensor:
        return matrix(self._weight(conv))

    def shortcut_bias(self, block: Any, weight: Tensor, before: Tensor | None) -> Tensor | None:
        if before is None and block.conv2.bias is None and block.nin_shortcut.bias is None:
            return None

        def make() -> Tensor:
            exact = matrix(block.nin_shortcut.weight)
            return cast(Tensor, shortcut_bias(block, exact, before))

        return self._kept(block, "shortcut's bias", self.wide, make)

    def attends_at_once(self, block: Any, x: Tensor) -> bool:
        return x.is_cuda and super().attends_at_once(block, x)


def _up(channels: int) -> int:
    return -(-channels // WIDTH) * WIDTH
