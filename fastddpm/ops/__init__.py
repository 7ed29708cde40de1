"""The public ops: check the arguments, choose a backend, one gradient for all backends.

Images are (N, C, H, W) in any memory format; results have that of the first image. float32,
bfloat16 and float16 are storage types: they may be mixed, and arithmetic is float32. float64
runs in float64, on the reference. Every op raises TypeError or ValueError, in one line that names
the argument, for what it can't take.

`t` is 0-based. On a GPU, where reading it would synchronise, a t outside the table takes the
nearest row; with FASTDDPM_STRICT=1 it is read, and an error as on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastddpm.ops import checks, library
from fastddpm.ops.bound import vlb_term
from fastddpm.ops.convolve import convolution
from fastddpm.ops.dispatch import use_backend
from fastddpm.ops.sweep import adam, grad_norm
from fastddpm.options import check_flag, shown
from fastddpm.schedule import check_choice

__all__ = [
    "adam",
    "attention_block",
    "choices",
    "convolution",
    "discretized_log_likelihood",
    "grad_norm",
    "group_norm_silu",
    "noise",
    "posterior_step",
    "randn",
    "residual_sum",
    "squared_error",
    "use_backend",
    "vlb_term",
]

Prediction = Literal["eps", "x0", "mean", "v"]
_PREDICTIONS = get_args(Prediction)


def randn(
    shape: Sequence[int],
    *,
    seed: int,
    step: int | Tensor,
    first_index: int = 0,
    sample_index: Tensor | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normals of the RNG contract: sample n is a function of (seed, step, its index).

    shape:  (N, ...); a sample's elements come in the order of a contiguous tensor
    seed:   in [0, 2^64);  step: in [0, 2^32), an int or (N,) int64
    sample_index: (N,) int64, not negative; by default first_index, first_index + 1, ...
    returns shape, `dtype`, contiguous, on `device` (by default that of sample_index, or the CPU)

    Philox4x32-10 and Box-Muller. The integers are the same on every backend and device; the
    normals agree to a few float32 ulp, and to the bit for any batch size and thread count.
    """
    shape = tuple(map(checks.whole, shape))
    if not shape or any(not isinstance(s, (int, torch.SymInt)) or s < 0 for s in shape):
        raise ValueError(f"shape must be (N, ...), integers of at least 0; got {shown(shape)}")
    if all(type(s) is int for s in shape) and math.prod(shape) >= checks.ELEMENTS_END:
        raise ValueError(f"shape must be of less than 2^48 elements; got {shape}")
    if dtype not in checks.FLOATS:
        raise TypeError(f"dtype must be a float dtype; got {shown(dtype)}")
    n = shape[0]
    if sample_index is None:
        first = checks.integer("first_index", first_index, checks.INDEX_END - n, "2^63 - N")
        # Not torch's default device: without one of its own an op's results are on the CPU.
        place = "cpu" if device is None else checks.usable_device(device)
        sample_index = torch.arange(first, first + n, dtype=torch.int64, device=place)
    elif first_index != 0 or device is not None:
        raise ValueError("sample_index takes the place of first_index and device; got both")
    checks.tensor("sample_index", sample_index)
    checks.per_sample("sample_index", sample_index, n, sample_index.device)
    step = checks.step_word(step, n, sample_index.device)
    return library.randn(shape, checks.seed_word(seed), step, sample_index, dtype)


def choices(sample_index: Tensor, *, seed: int, step: int, levels: int) -> tuple[Tensor, Tensor]:
    """Draw what Algorithm 1 chooses for each example of a batch: its t, and whether it is mirrored.

    sample_index: (N,) int64, not negative;  seed: in [0, 2^64);  step: in [0, 2^32)
    levels: T, in 1 .. 2^31 - 1
    returns t, (N,) int64 uniform in 0 .. levels - 1, and flip, (N,) bool, true for half

    Of the RNG contract's first block of the stream (seed, step, sample index): t is
    floor(word_0 levels / 2^32) and flip the lowest bit of word_1, the same on every backend.
    """
    checks.tensor("sample_index", sample_index)
    checks.per_sample("sample_index", sample_index, sample_index.numel(), sample_index.device)
    step = checks.integer("step", step, checks.STEP_END, "2^32")
    levels = checks.integer("levels", levels, 1 << 31, "2^31")
    if levels == 0:
        raise ValueError("levels must be at least 1; got 0")
    return library.choices(sample_index, checks.seed_word(seed), step, levels)


def noise(
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    *,
    eps: Tensor | None = None,
    seed: int | None = None,
    sample_index: Tensor | None = None,
    step: int | Tensor | None = None,
    flip: Tensor | None = None,
    dtype: torch.dtype | None = None,
    keep_eps: bool = True,
) -> tuple[Tensor, Any]:
    """Draw x_t ~ q(x_t | x_0): x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps   (DDPM Eq. 4).

    x0:    (N, C, H, W) uint8 0 .. 255, scaled to [-1, 1] first, or float
    t:     (N,) int64 in 0 .. T-1;  table: (T, 8) float32 from Schedule.table()
    eps:   (N, C, H, W) float, or instead the stream to draw it from:
           seed in [0, 2^64), sample_index (N,) int64, step (t unless given)
    flip:  (N,) bool: mirror this image along W, before the noise
    dtype: of x_t and of a drawn eps; by default that of x0, or of eps, or float32 for uint8
    keep_eps: False: a drawn eps is not written anywhere, and None is returned in its place
    returns (x_t, eps), the eps that was used

    Gradients for float x0 and eps. A drawn eps is rounded to its dtype before it is used.
    """
    checks.images("x0", x0, bytes_too=True)
    n, device = x0.shape[0], x0.device
    checks.per_sample("t", t, n, device)
    checks.schedule_table(table, device)
    if eps is not None:
        checks.operand("eps", eps, "x0", x0)
    stream = checks.draw("eps", eps, seed, sample_index, step, t)
    if flip is not None:
        checks.per_sample("flip", flip, n, device, torch.bool)
        flip = flip.contiguous()
    if dtype is None:
        floating = eps if x0.dtype == torch.uint8 else x0
        dtype = torch.float32 if floating is None else floating.dtype
    elif dtype not in checks.FLOATS:
        raise TypeError(f"dtype must be a float dtype; got {shown(dtype)}")
    table = table.contiguous()
    if stream is not None:
        if not check_flag("keep_eps", keep_eps):
            return library.noised(x0, t, table, *stream, flip, dtype), None
        return library.drawn_noise(x0, t, table, *stream, flip, dtype)
    assert eps is not None
    return library.noise(x0, t, table, eps, flip, dtype), eps


def posterior_step(
    xt: Tensor,
    model_output: Tensor,
    t: Tensor,
    table: Tensor,
    *,
    z: Tensor | None = None,
    seed: int | Tensor | None = None,
    sample_index: Tensor | None = None,
    step: int | Tensor | None = None,
    clip: bool = True,
    prediction: Prediction = "eps",
    log_variance: Tensor | None = None,
    learned_range: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Draw x_{t-1} ~ p(x_{t-1} | x_t): x0 by Eq. 15, clipped, mean by Eq. 7, plus sigma_t z.

    That is line 4 of DDPM Algorithm 2, or of DDIM if the table is.

    xt, model_output: (N, C, H, W) float;  prediction: what the model's output is. "mean" is the
                  mean of p itself, of the table's own chain, which clip does not touch; "v" is
                  sqrt(abar_t) eps - sqrt(1 - abar_t) x0
    t:            (N,) int64 in 0 .. T-1;  table: (T, 8) float32 from Schedule.table()
    z:            (N, C, H, W) float, or instead the stream to draw it from:
                  seed in [0, 2^64), sample_index (N,) int64, step (t unless given). A seed may be
                  (1,) int64 of the same bits, which a GPU reads when it runs: a recorded graph
                  then serves every seed
    log_variance: (N, C, H, W) float, log sigma^2 where the model gives it; the table's sigma still
                  says at which steps there is noise at all
    learned_range: log_variance is no log sigma^2 but where that lies between log beta-tilde (-1)
                  and log beta (1), as improved-diffusion's models say it; the table is then
                  Schedule.table("learned_range")
    out:          where to write the result; may be xt itself. No gradients then

    Gradients for xt, model_output, z and log_variance. A drawn z is float32 whatever xt is.
    """
    checks.images("xt", xt)
    n, device = xt.shape[0], xt.device
    checks.operand("model_output", model_output, "xt", xt)
    checks.per_sample("t", t, n, device)
    checks.schedule_table(table, device)
    if z is not None:
        checks.operand("z", z, "xt", xt)
    device_seed = checks.device_seed(seed, device)
    stream = checks.draw("z", z, seed if device_seed is None else 0, sample_index, step, t)
    if prediction not in _PREDICTIONS:
        check_choice("prediction", prediction, _PREDICTIONS)
    learned_range = check_flag("learned_range", learned_range)
    if log_variance is not None:
        checks.operand("log_variance", log_variance, "xt", xt)
    elif learned_range:
        raise ValueError("learned_range is how log_variance is read; got no log_variance")
    arguments = (
        *(xt, model_output, t, table.contiguous(), z, *(stream or (None, None, None))),
        *(check_flag("clip", clip), prediction, log_variance),
    )
    if out is None:
        return library.posterior_step(*arguments, device_seed, learned_range)
    checks.output(out, "xt", xt)
    checks.no_gradient(xt=xt, model_output=model_output, z=z, log_variance=log_variance, out=out)
    library.posterior_step_out(*arguments, out, device_seed, learned_range)
    return out


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-6,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
    before: Tensor | None = None,
    residual: Tensor | None = None,
    x2: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    step: int | Tensor | None = None,
    sample_index: Tensor | None = None,
) -> Any:
    """dropout(silu((1 + scale) (weight (h - mean) / sqrt(var + eps) + bias) + shift)) of
    h = cat(u, x2), u = x + residual + before   (DDPM App. B).

    Mean and variance are those of a sample's group of channels; silu=False leaves the SiLU out.

    x:            (N, C1, ...) float;  residual: like x
    before:       (C1,) or (N, C1) float, added to all pixels: a convolution's bias, an embedding
    x2:           (N, C2, ...) float, the channels after those of u; without it C2 = 0
    num_groups divides C = C1 + C2
    weight, bias: (C,) float or None;  scale, shift: (N, C) float or None
    dropout:      p in [0, 1): an element is kept where its word of the RNG contract is at least
                  floor(p 2^32), and divided by 1 - p; then seed in [0, 2^64), step in [0, 2^32), an
                  int or (N,) int64, and sample_index (N,) int64 must be given. Elements count
                  channels last (pixel * C + channel)
    returns y, (N, C, ...) of the dtype and memory format of x; with a residual (y, u), u like x

    Gradients for all tensors, and theirs. Statistics are float32 and centred: a mean of 1000 with a
    spread of 0.1 is fine. A u that is returned is rounded to the dtype of x before it is
    normalised. Parameters may have another dtype than x, as under autocast.
    """
    checks.floating("x", x)
    if x.dim() < 2:
        raise ValueError(f"x must be (N, C, ...); got {tuple(x.shape)}")
    device, (n, c1) = x.device, x.shape[:2]
    c = c1
    if x2 is not None:
        c += checks.second_source(x2, x)
    num_groups, eps = checks.groups(num_groups, x, eps, c)
    checks.parameter("weight", weight, (c,), device)
    checks.parameter("bias", bias, (c,), device)
    checks.parameter("scale", scale, (n, c), device)
    checks.parameter("shift", shift, (n, c), device)
    norm = (num_groups, weight, bias, eps, scale, shift, check_flag("silu", silu))
    plain = before is None and x2 is None and residual is None
    if plain and isinstance(dropout, float) and dropout == 0.0:
        return library.group_norm_silu(x, *norm)
    checks.per_channel("before", before, n, c1, device)
    stream = checks.dropout_stream(dropout, seed, step, sample_index, n, device)
    if residual is None:
        return library.group_norm_silu(x, *norm, before, x2, *stream)
    checks.operand("residual", residual, "x", x)
    return library.group_norm_silu_sum(x, residual, *norm, before, x2, *stream)


def residual_sum(x: Tensor, residual: Tensor | None = None, before: Tensor | None = None) -> Tensor:
    """u = x + residual + before, of float32 sums rounded once: what group_norm_silu adds before its
    norm, where no norm comes next.

    x: (N, C, ...) float;  residual: like x;  before: (C,) or (N, C) float
    returns the shape, dtype and memory format of x

    Gradients for all three.
    """
    checks.floating("x", x)
    if x.dim() < 2:
        raise ValueError(f"x must be (N, C, ...); got {tuple(x.shape)}")
    if residual is not None:
        checks.operand("residual", residual, "x", x)
    checks.per_channel("before", before, x.shape[0], x.shape[1], x.device)
    return library.residual_sum(x, residual, before)


def attention_block(
    x: Tensor,
    num_groups: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    num_heads: int = 1,
    eps: float = 1e-6,
) -> Tensor:
    """x + proj(softmax(q k^T / sqrt(d)) v), q, k, v = split(qkv(GroupNorm(x)))   (DDPM App. B).

    x:           (N, C, H, W) float; num_groups and num_heads divide C
    norm_weight, norm_bias: (C,) or None
    qkv_weight:  (3C, C), the rows of q, then k, then v, each head by head;  qkv_bias: (3C,) or None
    proj_weight: (C, C);  proj_bias: (C,) or None
    returns the shape and dtype of x

    Gradients for all tensors. The norm and the softmax are float32, the products run in the dtype
    of x, or in that of qkv_weight where this is a half precision (under autocast, in autocast's).
    """
    checks.images("x", x)
    c, device = x.shape[1], x.device
    num_groups, eps = checks.groups(num_groups, x, eps, c)
    num_heads = checks.divisor("num_heads", num_heads, c)
    checks.tensor("qkv_weight", qkv_weight)
    checks.tensor("proj_weight", proj_weight)
    checks.parameter("norm_weight", norm_weight, (c,), device)
    checks.parameter("norm_bias", norm_bias, (c,), device)
    checks.parameter("qkv_weight", qkv_weight, (3 * c, c), device)
    checks.parameter("qkv_bias", qkv_bias, (3 * c,), device)
    checks.parameter("proj_weight", proj_weight, (c, c), device)
    checks.parameter("proj_bias", proj_bias, (c,), device)
    kind = device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        qkv_weight, proj_weight = qkv_weight.to(dtype), proj_weight.to(dtype)
    return library.attention_block(
        x, num_groups, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias,
        num_heads, eps,
    )  # fmt: skip


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log of the mass that N(mean, exp(log_scale)^2) puts on the pixel's bin   (DDPM Eq. 13).

    x:    float in [-1, 1] with 256 levels; its bin is [x - 1/255, x + 1/255], and the first and
          the last one have no outer end
    mean, log_scale: float; the three are broadcast and their dtypes promoted, as torch does
    returns nats, elementwise

    Gradients for mean and log_scale; x is data and gets none. float64 inside, without cancellation
    for any distance or scale.
    """
    for name, value in (("x", x), ("mean", mean), ("log_scale", log_scale)):
        checks.floating(name, value)
        checks.on_device(name, value, x.device)
    if not x.shape == mean.shape == log_scale.shape:
        checks.broadcastable(x=x, mean=mean, log_scale=log_scale)
    return library.discretized_log_likelihood(x, mean, log_scale)


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """The mean of (prediction - target)^2 over each sample's elements: the simple loss of every
    image (DDPM Eq. 14).

    prediction: (N, ...) float;  target: like prediction, of any other float dtype but float64
    returns (N,) float32, float64 for float64; NaN for samples without elements, as torch's mean

    Gradients for both, and theirs: 2 grad (prediction - target) / elements in one pass over what
    the op was given, which is all that is kept. Differences are float32, a sample's sum float64 in
    an order of its shape and layout alone.
    """
    checks.floating("prediction", prediction)
    if prediction.dim() == 0:
        raise ValueError("prediction must be (N, ...); got ()")
    checks.operand("target", target, "prediction", prediction)
    return library.squared_error(prediction, target)
