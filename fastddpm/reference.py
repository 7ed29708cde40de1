"""Every op in plain PyTorch: the oracle of all tests, and the backend that always works.

No dispatch, no checks. Each function takes any float dtype (float64 gives the ground truth), any
memory format and any device, computes in float32 or better, and returns what the native backends
return: dtype and memory format of its first floating argument. `t` is 0-based.

The gradients stand here too, as formulas: the one derivative of each op for all its backends.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.grad import conv2d_input, conv2d_weight

# ---- random numbers --------------------------------------------------------------------------

PHILOX_M0, PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
MASK32 = 0xFFFFFFFF


def philox4x32(counter: Tensor, key: int) -> Tensor:
    """Philox4x32-10 (Salmon et al. 2011) of (..., 4) int64 words in [0, 2^32); returns the like."""
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key & MASK32, (key >> 32) & MASK32
    for _ in range(10):
        hi0, lo0 = _mulhilo(PHILOX_M0, c0)
        hi1, lo1 = _mulhilo(PHILOX_M1, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + PHILOX_W0) & MASK32, (k1 + PHILOX_W1) & MASK32
    return torch.stack((c0, c1, c2, c3), dim=-1)


def _mulhilo(m: int, c: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of m * c, by 16-bit halves: the full product overflows int64."""
    low, high = m * (c & 0xFFFF), m * (c >> 16)
    total = low + ((high & 0xFFFF) << 16)
    return (high >> 16) + (total >> 32), total & MASK32


def random_words(numel: int, *, seed: int, step: Tensor | int, sample_index: Tensor) -> Tensor:
    """(N, numel rounded up to a multiple of 4) words of the RNG contract, int64.

    step, an int or (N,), and sample_index (N,) are int64.
    """
    index = sample_index[:, None]
    step = torch.as_tensor(step, dtype=torch.int64, device=index.device).reshape(-1, 1)
    blocks = torch.arange((numel + 3) // 4, dtype=torch.int64, device=index.device)
    seed = int(seed)  # of a tensor, too
    words = (blocks & MASK32, step & MASK32, index & MASK32, (index >> 32) & MASK32)
    return philox4x32(torch.stack(torch.broadcast_tensors(*words), dim=-1), seed).flatten(1)


def choices(sample_index, *, seed, step, levels):
    """Algorithm 1's choices for each example: (t, flip), (N,) int64 in 0 .. levels - 1 and bool.

    t = floor(word_0 levels / 2^32), and flip is the lowest bit of word_1.
    """
    words = random_words(2, seed=seed, step=step, sample_index=sample_index)
    return (words[:, 0] * levels) >> 32, (words[:, 1] & 1).bool()


def randn(shape, *, seed, step, sample_index, dtype=torch.float32):
    """Standard normals of the RNG contract; (N, ...) in the order of a contiguous sample.

    Box-Muller on word pairs: z_0 = sqrt(-2 log u_0) cos(2 pi u_1), z_1 = sqrt(-2 log u_0)
    sin(2 pi u_1) with u = fl32(fl32(word) 2^-32 + 2^-33) in (0, 1].
    """
    numel = math.prod(shape[1:])
    words = random_words(numel, seed=seed, step=step, sample_index=sample_index)
    # Rounding the word and then the sum to float32 is part of the contract: near u = 1 it shows.
    u = (words.float().double() * 2.0**-32 + 2.0**-33).float().double()
    radius, angle = torch.sqrt(-2 * torch.log(u[:, 0::2])), 2 * math.pi * u[:, 1::2]
    z = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return z.flatten(1)[:, :numel].reshape(shape).to(dtype)


# ---- noise: q(x_t | x_0) -------------------------------------------------------------------------


def noise(
    x0, t, table, *,
    eps=None, seed=None, step=None, sample_index=None, flip=None, dtype=None, keep_eps=True,
):  # fmt: skip
    """(x_t, eps), x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps   (DDPM Eq. 4).

    uint8 x0 is scaled to [-1, 1] first. An eps that is not given is drawn, rounded to the dtype of
    x_t, then used; keep_eps is for backends that need not write it.
    """
    if dtype is None:
        floating = eps if x0.dtype == torch.uint8 else x0
        dtype = torch.float32 if floating is None else floating.dtype
    if eps is None:
        step = t if step is None else step
        eps = randn(x0.shape, seed=seed, step=step, sample_index=sample_index, dtype=dtype)
        eps = _as(x0, eps, dtype)
    compute = _compute(x0, eps)
    images = to_unit(x0, compute) if x0.dtype == torch.uint8 else x0.to(compute)
    if flip is not None:
        images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    sqrt_ab, sqrt_1m_ab, *_ = _coefficients(table, t, images)
    return _as(x0, sqrt_ab * images + sqrt_1m_ab * eps.to(compute), dtype), eps


def noise_backward(grad, t, table, flip):
    """(dx0, deps) of `noise` for float x0."""
    grad = grad.to(_compute(grad))
    sqrt_ab, sqrt_1m_ab, *_ = _coefficients(table, t, grad)
    dx0 = sqrt_ab * grad
    if flip is not None:
        dx0 = torch.where(flip[:, None, None, None], dx0.flip(-1), dx0)
    return dx0, sqrt_1m_ab * grad


def to_unit(x0: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 0 .. 255 -> [-1, 1]: x / 127.5 - 1."""
    return x0.to(dtype) / 127.5 - 1


# ---- posterior_step: p(x_{t-1} | x_t) ------------------------------------------------------------


def predict_x0(xt, model_output, t, table, *, prediction, clip):
    """x0 from the model's output: eps by Eq. 15, x0 as it is, v = sqrt(abar) eps - sqrt(1 - abar)
    x0 by x0 = sqrt(abar) x_t - sqrt(1 - abar) v, mean by Eq. 7 solved for x0.
    """
    compute = _compute(xt)
    xt, out = xt.to(compute), model_output.to(compute)
    coefficients = _coefficients(table, t, xt)
    sqrt_ab, sqrt_1m_ab, inv_sqrt_ab, sqrt_inv_ab_m1, mean_x0, mean_xt, *_ = coefficients
    if prediction == "eps":
        x0 = inv_sqrt_ab * xt - sqrt_inv_ab_m1 * out
    elif prediction == "v":
        x0 = sqrt_ab * xt - sqrt_1m_ab * out
    elif prediction == "x0":
        x0 = out
    else:
        x0 = (out - mean_xt * xt) / mean_x0
    return x0.clamp(-1, 1) if clip else x0


def posterior_step(
    xt, model_output, t, table, *,
    z=None, seed=None, step=None, sample_index=None,
    clip=True, prediction="eps", log_variance=None, learned_range=False, out=None,
):  # fmt: skip
    """x_{t-1} = mean + sigma_t z: Algorithm 2 through the x0 prediction (Eq. 15, clip, Eq. 7).

    prediction="mean": the mean is the model's output itself. log_variance: the learned diagonal,
    which replaces sigma_t wherever the table's sigma is not 0; with learned_range see `_deviation`.
    """
    compute = _compute(xt)
    if z is None:
        step = t if step is None else step
        z = randn(xt.shape, seed=seed, step=step, sample_index=sample_index, dtype=compute)
    *_, mean_x0, mean_xt, sigma, top = _coefficients(table, t, xt)
    if prediction == "mean":
        mean = model_output.to(compute)
    else:
        x0 = predict_x0(xt, model_output, t, table, prediction=prediction, clip=clip)
        mean = mean_x0 * x0 + mean_xt * xt.to(compute)
    noisy = sigma > 0
    if log_variance is not None:
        sigma, _ = _deviation(log_variance.to(compute), sigma, top, learned_range)
    # Not sigma z with sigma = 0: at the last step nothing of z may pass, be it inf or NaN.
    x = torch.where(noisy, mean + sigma * z.to(compute), mean)
    return _as(xt, x) if out is None else out.copy_(x)


def posterior_step_backward(
    grad, xt, model_output, t, table, *,
    z, clip, prediction, log_variance=None, learned_range=False,
):  # fmt: skip
    """(dxt, dmodel_output, dz, dlog_variance) of `posterior_step`."""
    compute = _compute(xt)
    grad = grad.to(compute)
    coefficients = _coefficients(table, t, xt)
    sqrt_ab, sqrt_1m_ab, inv_sqrt_ab, sqrt_inv_ab_m1, mean_x0, mean_xt, sigma, top = coefficients
    if prediction == "mean":
        dxt, dout = torch.zeros_like(grad), grad
    else:
        dx0 = mean_x0 * grad
        if clip:
            x0 = predict_x0(xt, model_output, t, table, prediction=prediction, clip=False)
            dx0 = dx0 * (x0.abs() <= 1)
        dxt, dout = mean_xt * grad, dx0
        if prediction == "eps":
            dxt, dout = dxt + inv_sqrt_ab * dx0, -sqrt_inv_ab_m1 * dx0
        elif prediction == "v":
            dxt, dout = dxt + sqrt_ab * dx0, -sqrt_1m_ab * dx0
    if log_variance is None:
        return dxt, dout, sigma * grad, None
    deviation, slope = _deviation(log_variance.to(compute), sigma, top, learned_range)
    dz = torch.where(sigma > 0, deviation * grad, 0)
    return dxt, dout, dz, torch.where(sigma > 0, slope * z.to(compute) * dz, 0)


def _deviation(word, sigma, top, learned_range):
    """(sigma of the model's word on it, d log sigma / d word) where the table's sigma is not 0.

    The word is log sigma^2; with learned_range, where it lies between the table's log sigma^2 (-1:
    log beta-tilde) and `top`, its log_variance (1: log beta): f top + (1 - f) log beta-tilde for
    f = (word + 1) / 2 (Nichol & Dhariwal 2021, Eq. 15).
    """
    if not learned_range:
        return torch.exp(0.5 * word), 0.5
    half_way = 0.5 * top - torch.log(torch.where(sigma > 0, sigma, 1))
    return sigma * torch.exp((0.5 * word + 0.5) * half_way), 0.5 * half_way


# ---- group_norm_silu -----------------------------------------------------------------------------


def group_norm_silu(
    x, num_groups, weight, bias, eps=1e-6, *,
    scale=None, shift=None, silu=True, before=None, residual=None, x2=None,
    dropout=0.0, seed=None, step=None, sample_index=None,
):  # fmt: skip
    """dropout(silu((1 + scale) (weight (h - mean) / sqrt(var + eps) + bias) + shift)) of
    h = cat(u, x2), u = x + residual + before; with a residual, (that, u).

    Mean and variance per sample and group; without `silu` the outer function is the identity. A u
    that is returned is rounded to the dtype of x before it is normalised.
    """
    h = u = residual_sum(x, residual, before) if residual is not None else _offset(x, before)
    if x2 is not None:
        h = torch.cat((u.to(_compute(x)), x2.to(_compute(x))), 1)
    y, _ = _normalise(h.to(_compute(x)), num_groups, eps)
    y = _modulate(_modulate(y, weight, bias), _gain(scale, y), shift)
    y = F.silu(y) if silu else y
    if dropout:
        y = y * dropout_factors(y, dropout, seed=seed, step=step, sample_index=sample_index)
    y = _as(x if x2 is None else with_channels(x, y.shape[1]), y)
    return y if residual is None else (y, u)


def group_norm_silu_backward(
    grad, x, num_groups, weight, bias, eps, scale, shift, silu, before=None, x2=None, grad_u=None,
    dropout=0.0, seed=None, step=None, sample_index=None,
):  # fmt: skip
    """(dx, dweight, dbias, dscale, dshift, dbefore, dx2) of `group_norm_silu`; None for what was
    not given.

    Where there was a residual, x is the u that was returned and `before` is None: dx, with the
    gradient grad_u of u in it, is the gradient of x and of the residual.
    """
    compute = _compute(x)
    h = _offset(x, before)
    if x2 is not None:
        h = torch.cat((h, x2.to(compute)), 1)
    xhat, rstd = _normalise(h, num_groups, eps)
    v = _modulate(xhat, weight, bias)
    gain = _gain(scale, v)
    dv = grad.to(compute)
    if dropout:
        dv = dv * dropout_factors(dv, dropout, seed=seed, step=step, sample_index=sample_index)
    if silu:
        out = _modulate(v, gain, shift)
        sigmoid = torch.sigmoid(out)
        dv = dv * sigmoid * (1 + out * (1 - sigmoid))
    du = _modulate(dv, gain, None)
    dxhat = _modulate(du, weight, None)
    groups = (h.shape[0], num_groups, math.prod(h.shape[1:]) // num_groups)
    d, g = dxhat.reshape(groups), xhat.reshape(groups)
    dh = d - d.mean(-1, keepdim=True) - g * (d * g).mean(-1, keepdim=True)
    dx, dx2 = (rstd * dh).reshape(h.shape), None
    if x2 is not None:
        dx, dx2 = dx.split((x.shape[1], x2.shape[1]), 1)
        dx2 = _as(x2, dx2)
    if grad_u is not None:
        dx = dx + grad_u.to(compute)

    pixels = tuple(range(2, x.dim()))
    batch = (0, *pixels)
    return (
        _as(x, dx),
        None if weight is None else (du * xhat).sum(batch).to(weight.dtype),
        None if bias is None else du.sum(batch).to(bias.dtype),
        None if scale is None else _sum(dv * v, pixels).to(scale.dtype),
        None if shift is None else _sum(dv, pixels).to(shift.dtype),
        None if before is None else sum_for_before(dx, before.dim(), before.dtype),
        dx2,
    )


def residual_sum(x, residual=None, before=None):
    """x + residual + before, the latter (C,) or (N, C) over the channels; rounded once."""
    u = _offset(x, before)
    return _as(x, u if residual is None else u + residual.to(u.dtype))


def dropout_factors(y, p: float, *, seed, step, sample_index) -> Tensor:
    """What dropout multiplies the elements of y (N, C, ...) with: 0, or 1 / (1 - p) where the word
    of the RNG contract is at least p 2^32. Elements count channels last: pixel * C + channel.
    """
    n, c, *sizes = y.shape
    numel = c * math.prod(sizes)
    words = random_words(numel, seed=seed, step=step, sample_index=sample_index)[:, :numel]
    words = words.reshape(n, math.prod(sizes), c).transpose(1, 2).reshape(y.shape)
    return (words >= int(p * 2**32)).to(y.dtype) * (1 / (1 - p))


def with_channels(
    x: Tensor, channels: int, dtype: torch.dtype | None = None, sizes: Sequence[int] | None = None
) -> Tensor:
    """An uninitialised tensor like x (N, C, ...), channels last where x is, but of so many.

    sizes: those after the channels, if they are not those of x
    """
    shape = (x.shape[0], channels, *(x.shape[2:] if sizes is None else sizes))
    last = x.dim() == 4 and x.stride(1) == 1 and x.stride(3) >= x.shape[1]
    order = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=order)


def sum_for_before(dx: Tensor, dims: int, dtype: torch.dtype) -> Tensor:
    """The gradient of a `before` of so many dimensions, given that of what it was added to."""
    pixels = tuple(range(2, dx.dim()))
    dx = dx.to(_compute(dx))
    return _sum(dx, pixels if dims == 2 else (0, *pixels)).to(dtype)


def _offset(x: Tensor, before: Tensor | None) -> Tensor:
    """x + before, in the dtype to compute in."""
    return _modulate(x.to(_compute(x)), None, before)


def _normalise(x: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """(x - mean) / sqrt(var + eps), and 1 / sqrt(var + eps) as (N, groups, 1)."""
    n, *sizes = x.shape
    centred = x.reshape(n, num_groups, math.prod(sizes) // num_groups)
    # Twice: the first mean is rounded to a float that lies up to half an ulp of x beside it.
    centred = centred - centred.mean(-1, keepdim=True)
    centred = centred - centred.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return (centred * rstd).reshape(x.shape), rstd


def _modulate(y: Tensor, gain: Tensor | None, offset: Tensor | None) -> Tensor:
    """gain y + offset, each (C,) or (N, C) over the channels of y."""
    axes = (1,) * (y.dim() - 2)
    if gain is not None:
        y = y * gain.to(y.dtype).reshape(*gain.shape, *axes)
    if offset is not None:
        y = y + offset.to(y.dtype).reshape(*offset.shape, *axes)
    return y


def _gain(scale: Tensor | None, y: Tensor) -> Tensor | None:
    """1 + scale, in the dtype of y: the storage type of scale would round it."""
    return None if scale is None else 1 + scale.to(y.dtype)


def _sum(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return x.sum(dims) if dims else x  # no dims would mean all of them


# ---- attention_block -----------------------------------------------------------------------------


def attention_block(
    x, num_groups, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, *,
    num_heads=1, eps=1e-6,
):  # fmt: skip
    """x + proj(softmax(q k^T / sqrt(d)) v) with q, k, v = split(qkv(GroupNorm(x))).

    qkv_weight (3C, C): rows q, then k, then v, each head by head; proj_weight (C, C). The norm and
    the softmax are float32 or better, the products run in the dtype of x, or in that of qkv_weight
    where this is a half precision: so autocast asks for its own.
    """
    y = group_norm_silu(x, num_groups, norm_weight, norm_bias, eps, silu=False)
    tokens = _tokens(y).to(_product_dtype(x, qkv_weight))
    q, k, v = _heads(_linear(tokens, qkv_weight, qkv_bias).chunk(3, -1), num_heads)
    # torch's fused kernels have no forward-mode derivative.
    differentiable = forward_ad._current_level >= 0
    with sdpa_kernel(SDPBackend.MATH) if differentiable else contextlib.nullcontext():
        mixed = _merge(F.scaled_dot_product_attention(q, k, v))
    return _as(x, x + _image(_linear(mixed, proj_weight, proj_bias), x))


def attention_block_backward(
    grad, x, num_groups, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias,
    num_heads, eps,
):  # fmt: skip
    """(dx, dnorm_weight, dnorm_bias, dqkv_weight, dqkv_bias, dproj_weight, dproj_bias) of
    `attention_block`; None for what was not given.
    """
    y = group_norm_silu(x, num_groups, norm_weight, norm_bias, eps, silu=False)
    dy, *dparameters = attention_backward(
        grad, y, qkv_weight, qkv_bias, proj_weight, proj_bias, num_heads
    )
    dx, dnorm_weight, dnorm_bias, *_ = group_norm_silu_backward(
        dy, x, num_groups, norm_weight, norm_bias, eps, None, None, False
    )
    return _as(x, grad + dx), dnorm_weight, dnorm_bias, *dparameters


def attention_backward(grad, y, qkv_weight, qkv_bias, proj_weight, proj_bias, num_heads):
    """(dy, dqkv_weight, dqkv_bias, dproj_weight, dproj_bias) of proj(softmax(q k^T / sqrt(d)) v)
    with q, k, v = split(qkv(y)).

    The scores S are computed again: with P = softmax(S) and dP = dO v^T,
    dS = P (dP - sum_j P dP).
    """
    compute, dtype = _compute(y), _product_dtype(y, qkv_weight)
    tokens, dout = _tokens(y).to(dtype), _tokens(grad).to(dtype)
    q, k, v = _heads(_linear(tokens, qkv_weight, qkv_bias).chunk(3, -1), num_heads)
    scale = q.shape[-1] ** -0.5
    p = torch.softmax((q @ k.mT).to(compute) * scale, -1)
    low_p = p.to(dtype)
    mixed = low_p @ v

    (dmixed,) = _heads((dout @ proj_weight.to(dtype),), num_heads)
    dp = (dmixed @ v.mT).to(compute)
    ds = (p * (dp - (p * dp).sum(-1, keepdim=True)) * scale).to(dtype)
    dqkv = torch.cat([_merge(d) for d in (ds @ k, ds.mT @ q, low_p.mT @ dmixed)], -1)
    dy = _image(dqkv @ qkv_weight.to(dtype), y)
    return (
        _as(y, dy),
        *_linear_backward(dqkv, tokens, qkv_weight, qkv_bias),
        *_linear_backward(dout, _merge(mixed), proj_weight, proj_bias),
    )


def _product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    half = weight.dtype in (torch.bfloat16, torch.float16)
    return weight.dtype if half and x.dtype != torch.float64 else x.dtype


def _tokens(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, HW, C)."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _image(tokens: Tensor, like: Tensor) -> Tensor:
    """(N, HW, C) -> (N, C, H, W)."""
    return tokens.transpose(1, 2).unflatten(2, like.shape[2:])


def _heads(tokens: Sequence[Tensor], num_heads: int) -> list[Tensor]:
    """Each (N, L, C) -> (N, heads, L, d)."""
    return [x.unflatten(2, (num_heads, -1)).transpose(1, 2) for x in tokens]


def _merge(heads: Tensor) -> Tensor:
    """(N, heads, L, d) -> (N, L, C)."""
    return heads.transpose(1, 2).flatten(2)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _linear_backward(grad, x, weight, bias) -> tuple[Tensor, Tensor | None]:
    """(dweight, dbias) of `_linear`."""
    grad, x = grad.flatten(0, 1), x.flatten(0, 1)
    dbias = None if bias is None else grad.sum(0, dtype=_compute(grad)).to(bias.dtype)
    return (grad.mT @ x).to(weight.dtype), dbias


# ---- convolution ---------------------------------------------------------------------------------


def convolution(
    x, weight, bias=None, *,
    x2=None, stride=1, padding=1, upsample=1,
    num_groups=None, norm_weight=None, norm_bias=None, eps=1e-6, silu=False,
    dropout=0.0, seed=None, step=None, sample_index=None,
    shift=None, residual=None, products=None,
):  # fmt: skip
    """conv(up(dropout(silu(GroupNorm(cat(x, x2)))))) + bias + shift + residual.

    padding: an int or (before, after), zeros around what the convolution reads, rows and columns
    alike. products: the dtype of the operands, by default that of weight: bfloat16 rounds them, in
    float32 sums; all else is storage.
    """
    random = {"seed": seed, "step": step, "sample_index": sample_index}
    h = _activated(x, x2, num_groups, norm_weight, norm_bias, eps, silu, dropout, random)
    h, filters = _operands(h, filters_of(weight), products)
    y = F.conv2d(_bordered(h, padding, upsample), filters, stride=stride)
    y = _modulate(_modulate(y, None, bias), None, shift)
    if residual is not None:
        y = y + residual.to(y.dtype)
    return _as(with_channels(x, y.shape[1], sizes=y.shape[2:]), y)


def convolution_backward(
    grad, x, weight, *,
    x2=None, stride=1, padding=1, upsample=1,
    num_groups=None, norm_weight=None, norm_bias=None, eps=1e-6, silu=False,
    dropout=0.0, seed=None, step=None, sample_index=None,
    products=None, needs=(True, True, True, True),
):  # fmt: skip
    """(dx, dx2, dnorm_weight, dnorm_bias, dweight, dbias, dshift) of `convolution`, dshift that of
    an (N, O) shift; None for what was not given or is not needed.

    needs: whether the first four, dweight, dbias and dshift are
    """
    random = {"seed": seed, "step": step, "sample_index": sample_index}
    dy = grad.to(_compute(x))
    dbias, dshift = (
        _sum(dy, dims) if needed else None
        for dims, needed in zip(((0, 2, 3), (2, 3)), needs[2:], strict=True)
    )
    h = _activated(x, x2, num_groups, norm_weight, norm_bias, eps, silu, dropout, random)
    h, filters = _operands(h, filters_of(weight), products)
    h = _bordered(h, padding, upsample)
    dweight = None
    if needs[1]:
        dweight = _as(weight, conv2d_weight(h, filters.shape, dy, stride).reshape(weight.shape))
    if not needs[0]:
        return None, None, None, None, dweight, dbias, dshift
    dh = conv2d_input(h.shape, filters, dy, stride)
    dx, dx2, *dnorm = activated_backward(
        unbordered(dh, x, padding, upsample),
        *(x, x2, num_groups, norm_weight, norm_bias, eps, silu, dropout, random),
    )
    return dx, dx2, *dnorm, dweight, dbias, dshift


def sides(padding) -> tuple[int, int]:
    """(before, after) of a padding."""
    return (padding, padding) if isinstance(padding, int) else tuple(padding)


def filters_of(weight: Tensor) -> Tensor:
    """(O, C, k, k) of a weight that may be (O, C)."""
    return weight if weight.dim() == 4 else weight[:, :, None, None]


def outputs_of(size, kernel: int, padding, upsample: int, stride: int):
    """Rows of the result for so many of the input, or columns; 0 or less where the kernel is
    larger than the image.
    """
    return (upsample * size + sum(sides(padding)) - kernel) // stride + 1


def convolved(x: Tensor, weight: Tensor, padding, upsample: int, stride: int) -> Tensor:
    """An uninitialised tensor for the result of a convolution of x."""
    kernel = filters_of(weight).shape[2]
    sizes = [outputs_of(size, kernel, padding, upsample, stride) for size in x.shape[2:]]
    return with_channels(x, weight.shape[0], sizes=sizes)


def _activated(x, x2, num_groups, norm_weight, norm_bias, eps, silu, dropout, random) -> Tensor:
    """dropout(silu(GroupNorm(cat(x, x2)))), in the dtype to compute in."""
    h = x.to(_compute(x))
    if x2 is not None:
        h = torch.cat((h, x2.to(h.dtype)), 1)
    if num_groups is not None:
        h, _ = _normalise(h, num_groups, eps)
        h = _modulate(h, norm_weight, norm_bias)
    h = F.silu(h) if silu else h
    return h * dropout_factors(h, dropout, **random) if dropout else h


def activated_backward(
    dh, x, x2, num_groups, norm_weight, norm_bias, eps, silu, dropout, random,
    norm_backward=None,
):  # fmt: skip
    """(dx, dx2, dnorm_weight, dnorm_bias) of what a convolution reads.

    norm_backward: a group_norm_silu_backward, by default that of this file
    """
    if num_groups is not None:
        dx, dweight, dbias, *_, dx2 = (norm_backward or group_norm_silu_backward)(
            dh, x, num_groups, norm_weight, norm_bias, eps, None, None, silu, None, x2, None,
            dropout, **random,
        )  # fmt: skip
        return dx, dx2, dweight, dbias
    if dropout:
        dh = dh * dropout_factors(dh, dropout, **random)
    if silu:
        h = x.to(dh.dtype) if x2 is None else torch.cat((x.to(dh.dtype), x2.to(dh.dtype)), 1)
        sigmoid = torch.sigmoid(h)
        dh = dh * sigmoid * (1 + h * (1 - sigmoid))
    if x2 is None:
        return _as(x, dh), None, None, None
    dx, dx2 = dh.split((x.shape[1], x2.shape[1]), 1)
    return _as(x, dx), _as(x2, dx2), None, None


def _operands(h: Tensor, weight: Tensor, products: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """What is multiplied, as it is rounded."""
    if (products or weight.dtype) != torch.bfloat16 or h.dtype == torch.float64:
        return h, weight.to(h.dtype)
    return h.bfloat16().to(h.dtype), weight.bfloat16().to(h.dtype)


def _bordered(h: Tensor, padding, upsample: int) -> Tensor:
    """h, each pixel repeated to a square, with its border of zeros."""
    if upsample > 1:
        n, c, height, width = h.shape
        h = h[:, :, :, None, :, None].expand(n, c, height, upsample, width, upsample)
        h = h.reshape(n, c, height * upsample, width * upsample)
    before, after = sides(padding)
    return F.pad(h, (before, after, before, after)) if before or after else h


def unbordered(dh: Tensor, x: Tensor, padding, upsample: int) -> Tensor:
    """The gradient of h, given that of what _bordered makes of it; x: of the size of h."""
    before, (height, width) = sides(padding)[0], x.shape[2:]
    dh = dh[:, :, before : before + height * upsample, before : before + width * upsample]
    if upsample == 1:
        return dh
    return dh.unflatten(3, (width, upsample)).unflatten(2, (height, upsample)).sum((3, 5))


# ---- discretized_log_likelihood ------------------------------------------------------------------


def discretized_log_likelihood(x, mean, log_scale):
    """log of the mass that N(mean, exp(log_scale)^2) puts on the pixel's bin   (DDPM Eq. 13).

    The bin is [x - 1/255, x + 1/255]; the first reaches to -inf and the last to +inf. Nats,
    elementwise, always float64 inside.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, mean.dtype), log_scale.dtype)
    like, _, _ = torch.broadcast_tensors(x, mean, log_scale)
    log_scale = log_scale.double()
    a, b, c, w, outer, narrow, _ = _bin(x.double(), mean.double(), log_scale)
    log_a, log_b = torch.special.log_ndtr(a), torch.special.log_ndtr(b)
    difference = torch.where(outer, -math.inf, log_a - log_b)
    wide = log_b + torch.where(
        difference > -1, torch.log(-torch.expm1(difference)), torch.log1p(-torch.exp(difference))
    )
    density = -0.5 * (c.square() + math.log(2 * math.pi)) + math.log(2 / 255) - log_scale
    return _as(like, torch.where(narrow, density + (c.square() - 1) * w.square() / 24, wide), dtype)


def discretized_log_likelihood_backward(grad, x, mean, log_scale):
    """(dmean, dlog_scale) of `discretized_log_likelihood`, in the shape of grad and float64."""
    a, b, c, w, outer, narrow, slope = _bin(x.double(), mean.double(), log_scale.double())
    # mass = exp(-low^2 / 2) m, where low is b on the left of the mean and 0 elsewhere: m and the
    # densities at a and b in units of the mass neither underflow nor cancel.
    low, root = b.clamp(max=0), math.sqrt(2)
    at_a = torch.where(b > 0, torch.exp(-0.5 * a.square()), torch.exp(w * c))
    at_a = torch.where(outer, 0, at_a)
    at_b = torch.exp(-0.5 * b.clamp(min=0).square())
    right = torch.erf(b / root) + torch.where(outer, 1, torch.erf(-a / root))
    left = torch.special.erfcx(-low / root) - at_a * torch.special.erfcx(-a / root)
    m = 0.5 * math.sqrt(2 * math.pi) * torch.where(b > 0, right, left)
    by_c = torch.where(narrow, -c * (1 - w.square() / 12), (at_b - at_a) / m)
    by_log_scale = torch.where(
        narrow, c.square() - 1 - (2 * c.square() - 1) * w.square() / 12, (a * at_a - b * at_b) / m
    )
    return grad * by_c * slope, grad * by_log_scale


def _bin(x, mean, log_scale):
    """(a, b, c, w, outer, narrow, dc/dmean): the bin [a, b], its centre c and its width w, in
    units of sigma around the mean.

    It is mirrored so that c <= 0 (the mass of (a, b) is that of (-b, -a)): on the left of the mean
    the log-CDFs do not cancel. The first and the last bin (`outer`) reach to -inf instead of a.
    `narrow`: the density is all but constant, and its series about c serves.
    """
    inverse = torch.exp(-log_scale.clamp(min=-300))  # smaller sigmas would give inf - inf
    c, w = (x - mean) * inverse, 2 / 255 * inverse
    first, last = x < -0.999, x > 0.999
    outer = first | last
    mirrored = torch.where(outer, last, c > 0)
    c = torch.where(mirrored, -c, c)
    narrow = (w * (1 + c.abs()) < 1e-3) & ~outer
    slope = torch.where(mirrored, inverse, -inverse)
    return c - 0.5 * w, c + 0.5 * w, c, w, outer, narrow, slope


# ---- vlb_term ------------------------------------------------------------------------------------


def vlb_term(
    x0, xt, model_output, t, table, log_ratio, *,
    seed=None, step=None, sample_index=None,
    clip=True, prediction="eps", log_variance=None, learned_range=False,
):  # fmt: skip
    """(L_t, or L_0 at t = 0, of each image in bits/dim, the mse of its x0 prediction)   (DDPM Eq.
    5, 13). Always float64 inside.

    The KL of two diagonal Gaussians whose means have the same part of x_t:
    (log sigma^2 - log beta-tilde + expm1(log beta-tilde - log sigma^2) + d^2 / sigma^2) / 2,
    d = mean_x0 (x0 - x0 prediction); prediction="mean" takes it unclipped, so that d is that of the
    means. log_ratio: the table's log_variance less log beta-tilde, exact where they are close.
    log_variance: log sigma^2, or in a learned range where it lies from log beta-tilde (-1) to the
    table's log_variance (1).
    """
    if xt is None:
        drawn = torch.float64 if x0.dtype == torch.float64 else torch.float32
        xt, _ = noise(x0, t, table, seed=seed, step=step, sample_index=sample_index, dtype=drawn)
    dtype = _compute(x0, model_output)
    xt, images = xt.double(), to_unit(x0, torch.float64) if x0.dtype == torch.uint8 else x0.double()
    *_, mean_x0, mean_xt, _, top = _coefficients(table, t, xt)
    (ratio,) = _coefficients(log_ratio[:, None], t, xt)
    lower = top - ratio
    if log_variance is None:
        apart = -ratio.expand_as(xt)
    elif learned_range:
        apart = -(0.5 * log_variance.double() + 0.5) * ratio
    else:
        apart = lower - log_variance.double()
    log_sigma2 = lower - apart
    predicted = predict_x0(xt, model_output, t, table, prediction=prediction, clip=False)
    clipped = predicted.clamp(-1, 1) if clip else predicted
    of_mean = predicted if prediction == "mean" else clipped
    kl = (
        torch.expm1(apart)
        - apart
        + (mean_x0 * (images - of_mean)).square() * torch.exp(-log_sigma2)
    )
    mean = mean_x0 * of_mean + mean_xt * xt
    nll = -discretized_log_likelihood(images, mean, 0.5 * log_sigma2)
    first = (t <= 0).reshape(-1, *[1] * (xt.dim() - 1))
    nats = torch.where(first, nll, 0.5 * kl).flatten(1).mean(1)
    error = (clipped - images).square().flatten(1).mean(1)
    return (nats / math.log(2)).to(dtype), error.to(dtype)


# ---- squared_error -------------------------------------------------------------------------------


def squared_error(prediction, target):
    """(N,): the mean of (prediction - target)^2 over a sample's elements, float32 or better."""
    compute = _compute(prediction, target)
    error = prediction.to(compute) - target.to(compute)
    return error.square().flatten(1).mean(1) if error.dim() > 1 else error.square()


def squared_error_backward(grad, prediction, target):
    """The gradient of prediction, like it; that of target is the one with the two swapped."""
    compute = _compute(prediction, target)
    slope = grad.to(compute) * (2 / max(prediction[:1].numel(), 1))
    slope = slope.reshape(-1, *[1] * (prediction.dim() - 1))
    return _as(prediction, slope * (prediction.to(compute) - target.to(compute)))


# ---- adam ----------------------------------------------------------------------------------------


@torch.no_grad()
def adam(
    params, grads, exp_avgs, exp_avg_sqs, steps, averages, copies, *,
    lr, share, norm, refused, beta1, beta2, eps, clip, grad_scale,
):  # fmt: skip
    """Adam (Kingma and Ba 2015, as torch's) and the moving average of the parameters, in place:

    g = grad / grad_scale, times clip / (norm + 1e-6) where that is below 1; m and v, averages of g
    and g^2; p - lr mhat / (sqrt(vhat) + eps); average + share (p - average); copy = p.

    A step that is refused, or whose norm is not finite, leaves all as it is.
    """
    counts, divisor = None, grad_scale
    if norm is not None:
        counts = norm.abs() <= torch.finfo(norm.dtype).max
        divisor = ((norm + 1e-6) / clip).clamp(min=1) * grad_scale
    if refused is not None:
        counts = refused == 0 if counts is None else counts & (refused == 0)

    def write(x, value):
        x.copy_(value if counts is None else torch.where(counts, value.to(x.dtype), x))

    for i, (p, m, v, step) in enumerate(zip(params, exp_avgs, exp_avg_sqs, steps, strict=True)):
        g = grads[i].to(p.dtype) / divisor
        taken = step.double() + 1
        size, root = lr / (1 - beta1**taken), (1 - beta2**taken).sqrt()
        m_now = m + (1 - beta1) * (g - m)
        v_now = beta2 * v + (1 - beta2) * g.square()
        away = v_now.sqrt() / root.to(p.dtype) + eps
        p_now = p - size.to(p.dtype) * m_now / away
        if averages:
            write(averages[i], averages[i] + share.to(p.dtype) * (p_now - averages[i]))
        if i < len(copies):
            write(copies[i], p_now)
        for x, value in ((m, m_now), (v, v_now), (p, p_now), (step, step + 1)):
            write(x, value)


def grad_norm(grads):
    """(): the norm of all elements in one, float32 or better. Squares are summed in float64."""
    squares = [x.double().square().sum() for x in grads]
    return torch.stack(squares).sum().sqrt().to(_compute(*grads))


# ---- helpers -------------------------------------------------------------------------------------


def _compute(*tensors: Tensor) -> torch.dtype:
    double = any(x.dtype == torch.float64 for x in tensors)
    return torch.float64 if double else torch.float32


def _coefficients(table: Tensor, t: Tensor, x: Tensor) -> list[Tensor]:
    """One (N, 1, 1, 1) tensor per column of `table` at t, in the dtype to compute with x in.

    A t outside takes the nearest row, as on a GPU, where torch's index would end the process.
    """
    rows = table[t.clamp(0, table.shape[0] - 1)].to(_compute(x))
    return [column.reshape(-1, *[1] * (x.dim() - 1)) for column in rows.unbind(1)]


def _as(x: Tensor, y: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """y with the memory format that torch.empty_like(x) has, in `dtype` (None: that of x)."""
    out = torch.empty_like(x, dtype=dtype)
    if y.stride() == out.stride():
        return y.to(out.dtype)
    # Made from y, as under vmap only that may have the batch's dimension.
    return y.new_empty_strided(out.shape, out.stride(), dtype=out.dtype).copy_(y)
