"""The paper's U-Net (Appendix B): its parts put together, presets and nothing about diffusion
beyond `forward(x, t, y)`. The parts are parts.py's."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from fastddpm.diffusion import Diffusion
from fastddpm.memory import check_fits
from fastddpm.ops import checks
from fastddpm.options import check_flag
from fastddpm.schedule import Variance
from fastddpm.unet import walk as unet_walk
from fastddpm.unet.config import check_config, fewest_parameters
from fastddpm.unet.order import recomputed
from fastddpm.unet.parts import (
    AttentionBlock,
    Downsample,
    GroupNorm,
    Level,
    Middle,
    ResnetBlock,
    TimeEmbedding,
    Upsample,
    convolution,
    timestep_embedding,
)

__all__ = [
    "AttentionBlock",
    "Downsample",
    "GroupNorm",
    "Level",
    "Middle",
    "ResnetBlock",
    "TimeEmbedding",
    "UNet",
    "Upsample",
    "timestep_embedding",
]


class UNet(nn.Module):
    """The U-Net of DDPM, Appendix B: eps(x_t, t) for (N, in_channels, H, W) x and (N,) t; with
    num_classes eps(x_t, t, y), y (N,) int64 in 0 .. num_classes - 1.

    Any H and W that len(channel_mult) - 1 halvings divide. Returns (N, out_channels, H, W) in x's
    dtype. Raises ValueError for an option or an input that does not fit, naming it and what is
    allowed. `diffusion` is the process the weights were trained for; `fastddpm.sample` uses it
    unless told otherwise."""

    checkpointing = False  # see checkpoint_blocks

    def __init__(
        self,
        *,
        image_size: int | Sequence[int] = 32,         # H = W, or (H, W): what `sample` draws
        in_channels: int = 3,                         # channels of x
        out_channels: int | None = None,              # None: in_channels, twice if sigma is learned
        channels: int = 128,                          # channels of the first level
        channel_mult: Sequence[int] = (1, 2, 2, 2),   # channels of each level, times `channels`
        num_res_blocks: int = 2,                      # residual blocks a level
        attention_levels: Sequence[int] = (1,),       # levels with attention, 0 the widest
        head_dim: int | None = None,                  # channels an attention head, or
        num_heads: int | None = None,                 # heads of every attention; None: one head
        num_groups: int = 32,                         # groups of every GroupNorm
        norm_eps: float = 1e-6,                       # epsilon of every GroupNorm
        dropout: float = 0.0,                         # before each block's second convolution
        downsample_padding: int = 0,                  # 0: at the end only (the paper); 1: both
        freq_shift: float = 1,                        # of the time embedding: 1 (the paper) or 0
        flip_sin_to_cos: bool = False,                # its order: [cos | sin], not [sin | cos]
        scale_shift_norm: bool = False,               # t scales and shifts norm2's result
        resblock_updown: bool = False,                # residual blocks halve and double
        num_classes: int | None = None,               # of the images; None: they have no labels
        diffusion: Diffusion | None = None,           # what it is trained for; None: Diffusion()
    ):  # fmt: skip
        super().__init__()
        if not isinstance(diffusion, (Diffusion, type(None))):
            raise ValueError(
                f"diffusion must be a fastddpm.Diffusion; got {type(diffusion).__name__}"
            )
        self.diffusion = Diffusion() if diffusion is None else diffusion
        self.config: dict[str, Any] = check_config(
            {
                "image_size": image_size,
                "in_channels": in_channels,
                "out_channels": out_channels,
                "channels": channels,
                "channel_mult": channel_mult,
                "num_res_blocks": num_res_blocks,
                "attention_levels": attention_levels,
                "head_dim": head_dim,
                "num_heads": num_heads,
                "num_groups": num_groups,
                "norm_eps": norm_eps,
                "dropout": dropout,
                "downsample_padding": downsample_padding,
                "freq_shift": freq_shift,
                "flip_sin_to_cos": flip_sin_to_cos,
                "scale_shift_norm": scale_shift_norm,
                "resblock_updown": resblock_updown,
                "num_classes": num_classes,
            },
            outputs=2 if self.diffusion.learns_variance else 1,
        )
        if torch.empty(0).device.type == "cpu":
            check_fits("this UNet in float32", 4 * fewest_parameters(self.config))
        config = self.config  # from here on, the checked options
        in_channels, channels, channel_mult = (
            config["in_channels"], config["channels"], config["channel_mult"],
        )  # fmt: skip
        num_res_blocks, attention_levels = config["num_res_blocks"], config["attention_levels"]
        num_groups, norm_eps, dropout = config["num_groups"], config["norm_eps"], config["dropout"]
        head_dim, num_heads = config["head_dim"], config["num_heads"]
        padding, classes = config["downsample_padding"], config["num_classes"]
        self.in_channels, self.image_size = in_channels, tuple(config["image_size"])
        widths = [channels * m for m in channel_mult]
        temb = 4 * channels

        def resnet(c_in: int, c_out: int, resample: Any = None) -> ResnetBlock:
            return ResnetBlock(
                c_in, c_out, temb, num_groups, norm_eps, dropout,
                scale_shift=config["scale_shift_norm"], resample=resample,
            )  # fmt: skip

        def attention(c: int) -> AttentionBlock:
            return AttentionBlock(c, num_groups, norm_eps, num_heads or c // (head_dim or c))

        within = config["resblock_updown"]
        self.temb = TimeEmbedding(channels, temb)
        self.label_emb = None if classes is None else nn.Embedding(classes, temb)
        self.conv_in = convolution(in_channels, channels)

        skips, c = [channels], channels
        down = [Level() for _ in widths]
        for i, (level, width) in enumerate(zip(down, widths, strict=True)):
            for _ in range(num_res_blocks):
                level.append(resnet(c, width), attention(width) if i in attention_levels else None)
                c = width
                skips.append(c)
            if i < len(widths) - 1:
                level.downsample = resnet(c, c, "down") if within else Downsample(c, padding)
                skips.append(c)

        mid = Middle(resnet(c, c), attention(c), resnet(c, c))

        up = [Level() for _ in widths]
        for i, width in reversed(list(enumerate(widths))):
            for _ in range(num_res_blocks + 1):
                block = resnet(c + skips.pop(), width)
                up[i].append(block, attention(width) if i in attention_levels else None)
                c = width
            if i > 0:
                up[i].upsample = resnet(c, c, "up") if within else Upsample(c)

        self.down = cast(Sequence[Level], nn.ModuleList(down))
        self.mid = mid
        self.up = cast(Sequence[Level], nn.ModuleList(up))
        self.norm_out = GroupNorm(num_groups, c, norm_eps)
        self.conv_out = convolution(c, self.config["out_channels"], scale=0.0)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The model's output for x_t (N, C, H, W) at the 0-based steps t (N,), of the classes y
        (N,) int64, which a model with classes needs and no other takes."""
        self.check_input(x, t)
        self.check_labels(y, len(x))
        self._check_devices(x, t, y)
        dtype = self.conv_in.weight.dtype
        sinusoids = self.sinusoids(t).to(dtype)
        label = None if self.label_emb is None else self.label_emb(y)
        h = x.to(dtype, memory_format=torch.channels_last)
        if (way := unet_walk.way(self, h)) is not None:
            temb = way.embedded(self.temb, sinusoids, label)
            walk = way(temb, unet_walk.stream_of(self), again=self.checkpointing)
            return walk.walk(self, h).to(x.dtype)

        temb = self.temb(sinusoids, label)
        h = self.conv_in(h)
        skips = [h]
        for level in self.down:
            for j in range(len(level.block)):
                h = self._kept(_block, level, j, temb, h)
                skips.append(h)
            if level.downsample is not None:
                keeping = isinstance(level.downsample, ResnetBlock)
                move = functools.partial(self._kept, Level.moved) if keeping else Level.moved
                h = move(level.downsample, h, temb)
                skips.append(h)

        h = self._kept(self.mid, h, temb)

        for level in reversed(self.up):
            for j in range(len(level.block)):
                h = self._kept(_block, level, j, temb, h, skips.pop())
            if level.upsample is not None:
                h = self._kept(Level.moved, level.upsample, h, temb)
        return self.conv_out(self.norm_out(h)).to(x.dtype)

    def checkpoint_blocks(self, on: bool = True) -> UNet:
        """Compute each residual block and its attention again in the backward, where only what they
        get was kept: less memory for a longer step. Results and gradients are the same bits;
        returns the model. Neither in its config nor saved."""
        self.checkpointing = check_flag("on", on)
        return self

    def _kept(self, compute: Any, *arguments: Any) -> torch.Tensor:
        """compute(*arguments), computed again in a backward where blocks are."""
        transformed = not torch.compiler.is_compiling() and (
            torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
        )
        if not self.checkpointing or not torch.is_grad_enabled() or transformed:
            return compute(*arguments)
        return recomputed(compute, *arguments)

    def sinusoids(self, t: torch.Tensor) -> torch.Tensor:
        """The time embedding's input at the steps t, whole or not, (N, channels) float32."""
        return timestep_embedding(
            t,
            self.config["channels"],
            freq_shift=self.config["freq_shift"],
            flip_sin_to_cos=self.config["flip_sin_to_cos"],
        )

    def check_input(self, x: torch.Tensor, t: torch.Tensor) -> None:
        halvings = 2 ** (len(self.config["channel_mult"]) - 1)
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must be (N, {self.in_channels}, H, W); got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"x must be a float tensor; got {x.dtype}")
        if x.shape[2] % halvings or x.shape[3] % halvings:
            raise ValueError(
                f"H and W must be multiples of {halvings} here; got {x.shape[2]}x{x.shape[3]}"
            )
        if t.shape != x.shape[:1]:
            raise ValueError(
                f"t must be ({x.shape[0]},), a step for each image; got shape {tuple(t.shape)}"
            )

    def check_labels(self, y: Any, n: int, *, wait: bool = False) -> None:
        """ValueError for what are not the classes of n images. On a GPU their values are read with
        wait=True or FASTDDPM_STRICT=1 only, or one out of range is torch's own failure there."""
        classes = self.config["num_classes"]
        if classes is None:
            if y is not None:
                raise ValueError("y was given, and the model has no classes (num_classes is None)")
            return
        needed = f"the model has {classes} classes: it needs y, ({n},) int64 in 0 .. {classes - 1}"
        if not isinstance(y, torch.Tensor):
            raise ValueError(f"{needed}; got {'no y' if y is None else type(y).__name__}")
        if y.dtype != torch.int64 or y.shape != (n,):
            raise ValueError(f"{needed}; got shape {tuple(y.shape)} {y.dtype}")
        if not torch.compiler.is_compiling() and not isinstance(y, FakeTensor):
            checks.values_in("y", y.cpu() if wait else y, classes, str(classes - 1))

    def _check_devices(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None) -> None:
        own = self.conv_in.weight.device
        for name, tensor in (("x", x), ("t", t), ("y", y)):
            if tensor is not None and tensor.device != own:
                raise ValueError(f"{name} must be on {own} like the model; got {tensor.device}")

    # ---- the paper's models ---------------------------------------------------------------------

    @classmethod
    def cifar10(cls, **options: Any) -> UNet:
        """CIFAR-10, 32x32: 35,746,307 parameters; variance fixed_large, as in the paper's run."""
        options = _with_variance("fixed_large", options)
        return cls(**{"image_size": 32, "dropout": 0.1, **options})

    @classmethod
    def celebahq256(cls, **options: Any) -> UNet:
        """CelebA-HQ and LSUN, 256x256: 113,673,219 parameters; variance fixed_small, as in the
        paper's runs.
        """
        options = _with_variance("fixed_small", options)
        mult = (1, 1, 2, 2, 4, 4)
        return cls(**{"image_size": 256, "channel_mult": mult, "attention_levels": (4,), **options})

    lsun256 = celebahq256

    @classmethod
    def lsun256_large(cls, **options: Any) -> UNet:
        """The large LSUN Bedroom model, 256x256: the same with 192 channels, 255,677,955
        parameters.
        """
        return cls.celebahq256(**{"channels": 192, **options})

    # ---- files ----------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, **options: Any) -> UNet:
        """A model by name ("fashion-mnist", bundled), from a folder of `save_pretrained`, a
        diffusers folder of the google/ddpm-* family, or a file of weights or a training checkpoint
        of the PyTorch port of the paper's code, w86763777/pytorch-ddpm, tqch/ddpm-torch or OpenAI's
        improved- or guided-diffusion.

        Returned in eval mode, float32, channels_last, on the CPU. options (weights="ema" or "raw",
        allow_pickle, num_heads, timesteps, ...): see `fastddpm.integrations`. A warning says what
        was taken where neither the file nor an option does. Raises FileNotFoundError or
        ValueError, naming what is wrong.
        """
        from fastddpm.pretrained import load_model

        return load_model(source, **options)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write config.json and model.safetensors into `folder`, each atomically."""
        from fastddpm.pretrained import save_model

        save_model(self, folder)


def _block(
    level: Level, j: int, temb: torch.Tensor, h: torch.Tensor, skip: torch.Tensor | None = None
) -> torch.Tensor:
    """Block j of cat(h, skip) and the attention after it."""
    return level.run(j, h if skip is None else torch.cat((h, skip), dim=1), temb)


def _with_variance(variance: Variance, options: dict[str, Any]) -> dict[str, Any]:
    """The options with the paper's process of this variance, unless they name one."""
    given = options.get("diffusion")
    return {**options, "diffusion": Diffusion(variance=variance) if given is None else given}
