"""The native engine of the CPU: a `UNet` as a list of native calls, replayed for every step.

Here stands what a U-Net becomes; lifetimes and the arena are csrc/cpu/plan/plan.h's."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from fastddpm import _native, ops
from fastddpm.diffusion import Diffusion, Model
from fastddpm.engine.eager import Eager
from fastddpm.engine.plannable import unplannable
from fastddpm.engine.time_table import time_embeddings, time_layer, time_offsets, time_rows
from fastddpm.ops import checks, dispatch
from fastddpm.precision import resolve_precision
from fastddpm.unet import AttentionBlock, Level, ResnetBlock, UNet
from fastddpm.unet.walk_cpu import pixels


def unsupported(model: Model, device: torch.device) -> str | None:
    """Why a plan can't run this model, the module named, or None if it can."""
    if _native.C is None:
        return f"{_native.reason}"
    if device.type != "cpu":
        return f"plans are for the CPU, not {device.type}"
    if dispatch.forced() not in ("auto", "cpu"):
        return f"the backend {dispatch.forced()!r} is forced"
    if reason := unplannable(model):
        return reason
    assert isinstance(model, UNet)
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            return f"{name} is {parameter.dtype}, not float32"
    return None


def best_precision() -> str:
    """ "bf16" where the instruction set in use multiplies bfloat16, else "fp32"."""
    return "bf16" if _native.C is not None and _native.C.cpu.multiplies_bf16() else "fp32"


class CpuPlan(Eager):
    """Algorithm 2 with the model as one native call a step.

    precision "bf16": the operands of products are rounded to bfloat16, but those of 3x3
    convolutions that Winograd's algorithm makes faster in float32; sums, statistics, what is added
    to them and x_t stay float32. "auto" is bf16 where the instruction set has such products.

    The weights are copied when the engine is made: later changes of the model are not seen. The
    bits of an image do not depend on the batch or the number of threads."""

    name = "cpu_plan"
    takes = ("y",)

    def __init__(
        self,
        model: Model,
        diffusion: Diffusion,
        *,
        device: torch.device,
        precision: str = "auto",
        **options: Any,
    ):
        if reason := unsupported(model, device):
            raise ValueError(f"engine 'cpu_plan' can't run here: {reason}")
        assert isinstance(model, UNet)
        super().__init__(model, diffusion, device=device, precision="fp32", **options)
        if precision == "auto":
            precision = best_precision()
        self.precision = resolve_precision(precision, device)
        self._unet = model
        chain = torch.arange(diffusion.T, device=device)
        self._steps, times = diffusion.model_t(chain), diffusion.model_time(chain)
        self._labels: torch.Tensor | None = None
        if model.label_emb is None:
            self._time = time_rows(model, times)
        else:
            steps = time_embeddings(model, times).float()
            weight, bias = (p.float() for p in time_layer(model))
            self._labels = model.label_emb.weight.detach().float().clone()
            self._embeddings = steps, weight, bias
        self._table = diffusion.table(
            device, sampler=self.step_options["sampler"], eta=self.step_options["eta"]
        )
        self._plans: dict[tuple[int, int], Any] = {}

    def output(
        self, xt: torch.Tensor, i: int | torch.Tensor, t: torch.Tensor, /, **model_kwargs: Any
    ) -> torch.Tensor:
        plan, out, time = self._plan(xt, t), self._empty_output(xt), self._rows(i, **model_kwargs)
        if not plan.forward(xt, time, out, torch.get_num_threads()):
            raise self._not_finite(plan, xt, time, i)
        return out

    def step(
        self,
        xt: torch.Tensor,
        i: int,
        t: torch.Tensor,
        seed: int,
        sample_index: torch.Tensor,
        /,
        **model_kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As Eager's, in one native call: each image takes its step where its eps was computed."""
        sampler, prediction = self.step_options["sampler"], self.diffusion.prediction
        if not self.diffusion.takes_output(sampler):
            return super().step(xt, i, t, seed, sample_index, **model_kwargs)
        time = self._rows(i, **model_kwargs)
        checks.values_in("sample_index", sample_index, checks.INDEX_END, "2^63 - 1")
        plan, out, x = self._plan(xt, t), self._empty_output(xt), torch.empty_like(xt)
        model_output, log_variance = self.diffusion.split(out)
        finite = plan.step(
            xt,
            time,
            out,
            torch.get_num_threads(),
            model_output=model_output,
            log_variance=None if sampler == "ddim" else log_variance,
            x=x,
            seed=seed,
            step=self._steps[i : i + 1].expand_as(t),
            sample_index=sample_index,
            t=t,
            table=self._table,
            prediction=prediction,
            clip=self.step_options["clip"],
            learned_range=self.diffusion.learned_range and sampler != "ddim",
        )
        if not finite:
            raise self._not_finite(plan, xt, time, i)
        return x, out

    def described(self, xt: torch.Tensor) -> tuple[str, list[tuple], torch.Tensor]:
        """What the bits of an output depend on beside weights and x_t: the instruction set of the
        kernels, each layer with its algorithm, and what the blocks take of the time at each step.
        Of a model without classes."""
        plan = self._plan(xt, torch.zeros(len(xt), dtype=torch.int64, device=xt.device))
        return plan.isa, plan.layers(), self._time

    def _rows(self, i: int | torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        """What the blocks take of the time at chain index i, (K,), or with classes y or of several
        steps (N, K)."""
        if self._labels is None:
            return self._time[i]
        steps, weight, bias = self._embeddings
        rows = pixels(steps[i] + self._labels[y])
        with torch.autocast("cpu", enabled=False):
            rows = ops.convolution(rows, weight, bias, padding=0, silu=True)
        return rows[0, :, :, 0].t().contiguous()

    def _plan(self, xt: torch.Tensor, t: torch.Tensor) -> Any:
        size = (xt.shape[2], xt.shape[3])
        if size not in self._plans:
            self._unet.check_input(xt, t)
            self._plans[size] = build_plan(self._unet, *size, precision=self.precision)
        return self._plans[size]

    def _empty_output(self, xt: torch.Tensor) -> torch.Tensor:
        return xt.new_empty((xt.shape[0], self._unet.config["out_channels"], *xt.shape[2:]))

    def _not_finite(
        self, plan: Any, xt: torch.Tensor, time: torch.Tensor, i: int | torch.Tensor
    ) -> FloatingPointError:
        layer = plan.not_finite(xt, time, torch.get_num_threads()) or "the input"
        steps = self._steps[i].reshape(-1).unique().tolist()
        return FloatingPointError(
            f"not a number or infinite at step t = {', '.join(map(str, steps))}, first in {layer}"
        )


@torch.no_grad()
def build_plan(
    model: UNet,
    height: int,
    width: int,
    algorithm: str = "auto",
    precision: str = "fp32",
    *,
    threads: int = 1,
) -> Any:
    """The plan of a U-Net for images of one size.

    algorithm: of the 3x3 convolutions of stride 1: "auto", the fastest by a count of the work, or
    in fp32 "direct", "winograd_2" or "winograd_4", in bf16 "bf16";  precision: "fp32" or "bf16";
    threads: that pack the weights"""
    native: Any = _native.C
    plan = native.cpu.Plan(height, width, model.in_channels, bf16=precision == "bf16")
    names = {module: name for name, module in model.named_modules()}
    offsets = time_offsets(model)

    def norm_of(norm: Any, silu: bool) -> tuple:
        weight, bias = norm.weight.tolist(), norm.bias.tolist()
        return norm.num_groups, norm.eps, weight, bias, silu

    def conv(sources: list[int], layer: Any, **options: Any) -> int:
        kernel = layer.kernel_size[0] if isinstance(layer, nn.Conv2d) else 1
        weight = layer.weight.reshape(layer.weight.shape[0], -1).contiguous()
        options.setdefault("before", kernel // 2)
        options.setdefault("after", kernel // 2)
        return plan.convolution(
            names[layer],
            sources,
            weight,
            layer.bias.tolist(),
            kernel,
            algorithm=algorithm,
            threads=threads,
            **options,
        )

    def resnet(block: ResnetBlock, sources: list[int]) -> int:
        offset, how = offsets[block], block.resample
        within: dict[str, Any] = {}
        if how is not None:
            within = {"halve": True} if how == "down" else {"repeat": 2}
        added = {} if block.scale_shift else {"time_offset": offset}
        h = conv(sources, block.conv1, norm=norm_of(block.norm1, True), **added, **within)
        shortcut = getattr(block, "nin_shortcut", None)
        residual = conv(sources, shortcut) if shortcut is not None else sources[0]
        if how is not None:
            residual = plan.resample(names[block], sources[0], how == "up")
        modulated = {"modulation_offset": offset} if block.scale_shift else {}
        return conv(
            [h], block.conv2, norm=norm_of(block.norm2, True), residual=residual, **modulated
        )

    def attention(block: AttentionBlock, x: int) -> int:
        qkv = conv([x], block.qkv, norm=norm_of(block.norm, False))
        mixed = plan.attention(names[block], qkv, block.num_heads)
        return conv([mixed], block.proj_out, residual=x)

    def level_block(level: Level, j: int, sources: list[int]) -> int:
        h = resnet(cast(ResnetBlock, level.block[j]), sources)
        return attention(cast(AttentionBlock, level.attn[j]), h) if level.attn else h

    h = conv([0], model.conv_in)
    skips = [h]
    for level in model.down:
        for j in range(len(level.block)):
            h = level_block(level, j, [h])
            skips.append(h)
        if isinstance(level.downsample, ResnetBlock):
            h = resnet(level.downsample, [h])
            skips.append(h)
        elif level.downsample is not None:
            layer = cast(Any, level.downsample.conv)
            h = conv([h], layer, stride=2, before=layer.padding[0], after=1)
            skips.append(h)
    h = resnet(model.mid.block_1, [h])
    h = attention(model.mid.attn_1, h)
    h = resnet(model.mid.block_2, [h])
    for level in reversed(model.up):
        for j in range(len(level.block)):
            h = level_block(level, j, [h, skips.pop()])
        if isinstance(level.upsample, ResnetBlock):
            h = resnet(level.upsample, [h])
        elif level.upsample is not None:
            h = conv([h], level.upsample.conv, repeat=2)
    plan.finish(conv([h], model.conv_out, norm=norm_of(model.norm_out, True)))
    return plan
