"""attention_block on a GPU out of its libraries: our norm, cuBLAS's products with their bias,
torch's fused attention, and a sum. Which of that and Triton's own block is taken stands here, too.

The tokens of an image in NHWC are a view; one in NCHW is turned around once. Scores are never in
memory where torch has fused attention. Nothing here is a kernel: the norm is a parameter, so that
the same composition runs, and is tested, on any device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import (
    SDPAParams,
    can_use_efficient_attention,
    can_use_flash_attention,
    flash_sdp_enabled,
    mem_efficient_sdp_enabled,
)

from fastddpm import reference

aten = torch.ops.aten
HALF = (torch.bfloat16, torch.float16)
WIDEST = 256  # channels of a head in torch's flash attention
MOST_HEADS = 65535  # of all samples together, in one launch of torch's fused attention

Fused = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]


def attention_block(
    norm, x, num_groups, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, *,
    num_heads=1, eps=1e-6,
):  # fmt: skip
    """`reference.attention_block` with this `norm`, a group_norm_silu.

    Five launches in NHWC: norm, product, attention, product, sum with x.
    """
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    y = norm(x, num_groups, norm_weight, norm_bias, eps, silu=False)
    qkv = reference._linear(_tokens(y, x, qkv_weight), qkv_weight, qkv_bias)
    q, k, v = _heads(qkv, x, num_heads)
    mixed = _merged(F.scaled_dot_product_attention(q, k, v))
    y = _image(reference._linear(mixed, proj_weight, proj_bias), x)
    fits = y.dtype == x.dtype and y.stride() == out.stride()
    return torch.add(x, y, out=y if fits else out)


def attention_block_backward(
    norm, norm_backward, grad, x, num_groups, norm_weight, norm_bias, qkv_weight, qkv_bias,
    proj_weight, proj_bias, num_heads, eps,
):  # fmt: skip
    """`reference.attention_block_backward` with this norm and its gradient.

    Kept from the forward pass are x and the parameters: the norm, q, k, v and the attention are
    computed again, and of the latter only the log sum of each row of scores is in memory.
    """
    parameters = (norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias)
    if x.numel() == 0:
        zeros = (None if p is None else torch.zeros_like(p) for p in parameters)
        return torch.empty_like(x), *zeros
    y = norm(x, num_groups, norm_weight, norm_bias, eps, silu=False)
    tokens = _tokens(y, x, qkv_weight)
    q, k, v = _heads(reference._linear(tokens, qkv_weight, qkv_bias), x, num_heads)
    fused = fused_gradient(q, k, v)
    if fused is None:
        dy, *others = reference.attention_backward(grad, y, *parameters[2:], num_heads)
    else:
        dout = _tokens(grad, x, qkv_weight)
        (dmixed,) = _heads(dout @ proj_weight.to(dout.dtype), x, num_heads, parts=1)
        mixed, *dheads = fused(q, k, v, dmixed)
        del q, k, v, dmixed
        dproj = _product_backward(dout, _merged(mixed), proj_weight, proj_bias)
        dqkv = torch.cat([_merged(d) for d in dheads], 1)
        del mixed, dheads
        dy = _image(dqkv @ qkv_weight.to(dqkv.dtype), x).to(x.dtype)
        others = *_product_backward(dqkv, tokens, qkv_weight, qkv_bias), *dproj
    dx, dnorm_weight, dnorm_bias, *_ = norm_backward(
        dy, x, num_groups, norm_weight, norm_bias, eps, None, None, False, grad_u=grad
    )
    return dx, dnorm_weight, dnorm_bias, *others


def _tokens(x: Tensor, like: Tensor, weight: Tensor) -> Tensor:
    """(N, C, H, W) -> (N H W, C) in the dtype of the products with `like`: a view in NHWC."""
    tokens = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    return tokens.to(reference._product_dtype(like, weight))


def _image(tokens: Tensor, like: Tensor) -> Tensor:
    """(N H W, C) -> (N, C, H, W), a view."""
    n, c, h, w = like.shape
    return tokens.view(n, h, w, c).permute(0, 3, 1, 2)


def _heads(tokens: Tensor, like: Tensor, num_heads: int, parts: int = 3) -> tuple[Tensor, ...]:
    """(N L, parts C) -> (N, heads, L, d) of each part, views."""
    n, c, h, w = like.shape
    split = tokens.view(n, h * w, parts, num_heads, c // num_heads)
    return split.permute(2, 0, 3, 1, 4).unbind(0)


def _merged(heads: Tensor) -> Tensor:
    """(N, heads, L, d) -> (N L, C): a view of what fused attention returns."""
    n, num_heads, length, d = heads.shape
    return heads.transpose(1, 2).reshape(n * length, num_heads * d)


def _product_backward(grad, x, weight, bias):
    """(dweight, dbias) of a product of tokens."""
    return reference._linear_backward(grad.unsqueeze(0), x.unsqueeze(0), weight, bias)


# ---- the gradient of fused attention -------------------------------------------------------------
# As torch's autograd calls it. Autograd itself can't be asked: under torch.compile an op's kernel
# runs below it, and nothing would be recorded.


def fused_gradient(q: Tensor, k: Tensor, v: Tensor) -> Fused | None:
    """(q, k, v, dmixed) -> (mixed, dq, dk, dv) by the fused attention that torch would choose for
    these, or None where it has none with a gradient.
    """
    if not q.is_cuda:
        return None
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        parameters: Any = SDPAParams(*leaves, None, 0.0, False, False)  # type: ignore[call-arg, arg-type]
        if q.shape[-1] % 8 == 0 and can_use_flash_attention(parameters):
            return _flash
        return _efficient if can_use_efficient_attention(parameters) else None


def _flash(q, k, v, dmixed):
    scale = q.shape[-1] ** -0.5
    mixed, log_sum, *state, _ = aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
    cut, random = state[:4], state[4:]
    return mixed, *aten._scaled_dot_product_flash_attention_backward(
        dmixed, q, k, v, mixed, log_sum, *cut, 0.0, False, *random, scale=scale
    )


def _efficient(q, k, v, dmixed):
    scale = q.shape[-1] ** -0.5
    mixed, log_sum, *random = aten._scaled_dot_product_efficient_attention(
        q, k, v, None, True, scale=scale
    )
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        dmixed, q, k, v, None, mixed, log_sum, *random, 0.0, (True, True, True, False), scale=scale
    )
    return mixed, dq, dk, dv


# ---- which of the two ----------------------------------------------------------------------------


def order(x: Tensor, qkv_weight: Tensor, num_heads: int, *, gradient: bool) -> tuple[str, ...]:
    """The backends of a GPU for this block, the one to prefer first.

    Modelled, not measured: both routes take four or five launches and about the same bytes, and
    cuBLAS and flash attention come closer to a GPU's rate than Triton's products do. So the
    libraries are first, but where

    - torch has no fused attention for the dtype, the width of a head, the card and the switches, or
      not in one launch, and the scores that would be written, L^2 a head, are more than q, k, v;
    - a gradient is to be deterministic (torch.use_deterministic_algorithms): Triton's sums have a
      fixed order, while a fused gradient adds atomically, slower or not at all without.
    """
    libraries, own = ("cuda", "triton"), ("triton", "cuda")
    if gradient and torch.are_deterministic_algorithms_enabled():
        return own
    width, length = x.shape[1] // num_heads, x.shape[2] * x.shape[3]
    capability = torch.cuda.get_device_capability(x.device)
    dtype = reference._product_dtype(x, qkv_weight)
    one_launch = x.shape[0] * num_heads <= MOST_HEADS
    if one_launch and has_fused(dtype, width, capability):
        return libraries
    return own if length > 3 * width else libraries


def has_fused(dtype: torch.dtype, width: int, capability: tuple[int, int]) -> bool:
    """Whether torch has fused attention for heads of this width on a card of this capability."""
    if dtype in HALF and capability >= (8, 0) and width <= WIDEST and flash_sdp_enabled():
        return True
    known = dtype != torch.bfloat16 or capability >= (8, 0)
    aligned = width % (8 if dtype in HALF else 4) == 0
    return known and aligned and mem_efficient_sdp_enabled()
