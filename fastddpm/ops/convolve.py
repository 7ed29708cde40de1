"""The convolution of a U-Net as one op, with what stands before and after it: its checks, and the
op as torch knows it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastddpm import reference
from fastddpm.ops import checks
from fastddpm.ops.dispatch import choose
from fastddpm.ops.library import Op, check_draw
from fastddpm.options import check_flag, shown


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    x2: Tensor | None = None,
    stride: int = 1,
    padding: int | tuple[int, int] = 1,
    upsample: int = 1,
    num_groups: int | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    silu: bool = False,
    dropout: float = 0.0,
    seed: int | None = None,
    step: int | Tensor | None = None,
    sample_index: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """conv(up(dropout(silu(GroupNorm(cat(x, x2)))))) + bias + shift + residual   (DDPM App. B).

    x:          (N, C1, H, W) float;  x2: (N, C2, H, W), the channels after those of x, or None
    weight:     (O, C1 + C2, k, k) float, k = 1 or 3, or (O, C1 + C2) for a k of 1, a linear
                layer's;  bias: (O,) or None
    stride:     1 or 2
    padding:    0 or 1, or (before, after), each 0 or 1: rows and columns of zeros, as many of each,
                around what is convolved, after its norm; (0, 1) is the SAME of a stride of 2
    upsample:   1, or 2 for each pixel repeated to a square of 2x2, after the norm and SiLU
    num_groups: of a GroupNorm of the input, which divides C1 + C2, or None for no norm;
                norm_weight, norm_bias: (C1 + C2,) or None;  eps: added to the variance
    silu, dropout, seed, step, sample_index: as group_norm_silu takes them, with a norm or without
    shift:      (O,) or (N, O) float, added to all pixels: an embedding;  residual: like y
    returns y, (N, O, H', W') of the dtype and memory format of x,
            H' = floor((upsample H + before + after - k) / stride) + 1

    Gradients for all tensors, and theirs. Sums are float32. Operands may be rounded to bfloat16
    where weight is bfloat16 or autocast asks for it (a CPU keeps float32 where that is the faster
    way), else they are float32; on a GPU they have the dtype of weight or autocast's. Only inputs
    are kept for a gradient: what is normalised, activated and dropped is computed again. Parameters
    may have another dtype than x.
    """
    checks.images("x", x)
    device, (n, c, height, width) = x.device, x.shape
    if x2 is not None:
        c += checks.second_source(x2, x)
    if c == 0 or height == 0 or width == 0:
        raise ValueError(f"x must have at least 1 channel, row and column; got {tuple(x.shape)}")
    checks.operand_dtype("weight", weight, "x", x)
    outputs, kernel = _filters(weight, c)
    checks.on_device("weight", weight, device)
    stride, upsample = _one_or_two("stride", stride), _one_or_two("upsample", upsample)
    before, after = _sides(padding)
    rows, columns = (
        reference.outputs_of(size, kernel, (before, after), upsample, stride)
        for size in (height, width)
    )
    if rows < 1 or columns < 1:
        raise ValueError(
            f"a kernel of {kernel} is larger than x of {height}x{width} with upsample {upsample} "
            f"and padding ({before}, {after})"
        )
    if num_groups is None:
        for name, parameter in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
            if parameter is not None:
                raise ValueError(f"{name} needs num_groups; got None")
    else:
        num_groups, eps = checks.groups(num_groups, x, eps, c)
        checks.parameter("norm_weight", norm_weight, (c,), device)
        checks.parameter("norm_bias", norm_bias, (c,), device)
    checks.parameter("bias", bias, (outputs,), device)
    checks.per_channel("shift", shift, n, outputs, device)
    if residual is not None:
        _check_residual(residual, x, (n, outputs, rows, columns))
    return op(
        x, weight, bias, x2, norm_weight, norm_bias, shift, residual,
        num_groups or 0, float(eps), check_flag("silu", silu), stride, before, after, upsample,
        _products(x, weight), *checks.dropout_stream(dropout, seed, step, sample_index, n, device),
    )  # fmt: skip


def _products(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of what is multiplied."""
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return weight.dtype


def _filters(weight: Tensor, channels: Any) -> tuple[Any, Any]:
    """(O, k) of a weight (O, C, k, k) or (O, C)."""
    shape = tuple(weight.shape)
    known = len(shape) > 1 and shape[1] == channels and shape[2:] in ((), (1, 1), (3, 3))
    if not known or not shape[0]:
        raise ValueError(
            f"weight must be (O, {channels}, k, k), k = 1 or 3, O at least 1, or (O, {channels}); "
            f"got {shape}"
        )
    return shape[0], shape[2] if len(shape) == 4 else 1


def _one_or_two(name: str, value: Any) -> int:
    number = checks.whole(value)
    if isinstance(value, (bool, float)) or number not in (1, 2):
        raise ValueError(f"{name} must be 1 or 2; got {shown(value)}")
    return int(number)


def _sides(padding: Any) -> tuple[int, int]:
    pair = padding if isinstance(padding, (tuple, list)) else (padding, padding)
    numbers = [checks.whole(side) for side in pair]
    if len(pair) != 2 or any(isinstance(p, (bool, float)) for p in pair) or set(numbers) - {0, 1}:
        raise ValueError(
            f"padding must be 0 or 1, or (before, after) of these; got {shown(padding)}"
        )
    return int(numbers[0]), int(numbers[1])


def _check_residual(residual: Any, x: Tensor, shape: tuple) -> None:
    checks.operand_dtype("residual", residual, "x", x)
    if residual.shape != shape:
        raise ValueError(
            f"residual must have the shape of the result, {tuple(shape)}; "
            f"got {tuple(residual.shape)}"
        )
    checks.on_device("residual", residual, x.device)


# ---- the op --------------------------------------------------------------------------------------


def _options(num_groups, norm_weight, norm_bias, eps, silu, stride, before, after, upsample,
             products, dropout, seed, step, sample_index):  # fmt: skip
    """As the functions of a backend take them."""
    return {
        "num_groups": num_groups or None, "norm_weight": norm_weight, "norm_bias": norm_bias,
        "eps": eps, "silu": silu, "stride": stride, "padding": (before, after),
        "upsample": upsample, "products": products, "dropout": dropout, "seed": seed, "step": step,
        "sample_index": sample_index,
    }  # fmt: skip


def _convolution(
    x, weight, bias, x2, norm_weight, norm_bias, shift, residual, num_groups, *options,
    choose=choose, lasting=False,
):  # fmt: skip
    """lasting: the weight will be met again with the same values, though a gradient of it may be
    wanted elsewhere.
    """
    *_, dropout, _, step, sample_index = options
    if dropout:
        check_draw(None, step, sample_index)
    backend = choose(
        "convolution", x, weight, bias, x2, norm_weight, norm_bias, shift, residual, step,
        sample_index,
    )  # fmt: skip
    arguments = _options(num_groups, norm_weight, norm_bias, *options)
    keep = getattr(backend, "packed_weights", None)
    if keep is not None and (lasting or not weight.requires_grad):
        arguments["packed"] = keep(weight)
    return backend.convolution(
        x, weight, bias, x2=x2, shift=shift, residual=residual, **arguments
    )  # fmt: skip


def _convolution_fake(
    x, weight, bias, x2, norm_weight, norm_bias, shift, residual, num_groups, eps, silu, stride,
    before, after, upsample, *_,
):  # fmt: skip
    return reference.convolved(x, weight, (before, after), upsample, stride)


def _convolution_setup(ctx, inputs, output):
    x, weight, bias, x2, norm_weight, norm_bias, shift, residual, *options = inputs
    *options, step, sample_index = options
    ctx.save_for_backward(x, weight, x2, norm_weight, norm_bias, step, sample_index)
    ctx.options = options
    ctx.dims = None if shift is None else shift.dim()
    ctx.dtypes = [None if y is None else y.dtype for y in (bias, shift, residual)]


def _convolution_backward(ctx, grad):
    needed = ctx.needs_input_grad
    x, weight, x2, norm_weight, norm_bias, step, sample_index = ctx.saved_tensors
    bias_dtype, shift_dtype, residual_dtype = ctx.dtypes
    own, shared = ctx.dims == 2 and needed[6], ctx.dims == 1 and needed[6]
    needs = (needed[0] or any(needed[3:6]), needed[1], needed[2] or shared, own)
    grads: Any = (None,) * 7
    if any(needs):
        arguments = (
            grad, x, weight, x2, norm_weight, norm_bias, *ctx.options, step, sample_index,
            list(needs),
        )  # fmt: skip
        grads = (
            _gradients(*arguments, choose=lambda *_: reference)
            if torch.is_grad_enabled()  # create_graph=True: the formula can be differentiated
            else backward_op(*arguments)
        )
    dx, dx2, dnorm_weight, dnorm_bias, dweight, dbias, dshift = grads
    dshift = dbias if shared else dshift
    return (
        dx if needed[0] else None,
        dweight if needed[1] else None,
        dbias.to(bias_dtype) if needed[2] else None,
        dx2 if needed[3] else None,
        dnorm_weight if needed[4] else None,
        dnorm_bias if needed[5] else None,
        dshift.to(shift_dtype) if needed[6] else None,
        grad.to(residual_dtype) if needed[7] else None,
        *(None,) * 12,
    )


_NORM = "Tensor? norm_weight, Tensor? norm_bias"
_OPTIONS = (
    "SymInt num_groups, float eps, bool silu, int stride, int before, int after, int upsample, "
    "ScalarType products, float dropout, int? seed, Tensor? step, Tensor? sample_index"
)
op = Op(
    "convolution",
    f"(Tensor x, Tensor weight, Tensor? bias, Tensor? x2, {_NORM}, Tensor? shift, "
    f"Tensor? residual, {_OPTIONS}) -> Tensor",
    functools.partial(_convolution, lasting=True),
    _convolution_fake,
    _convolution_setup,
    _convolution_backward,
    kernel=_convolution,
    recorded=_convolution,
)


def _gradients(
    grad, x, weight, x2, norm_weight, norm_bias, num_groups, *options, choose=choose
):  # fmt: skip
    """(dx, dx2, dnorm_weight, dnorm_bias, dweight, dbias, dshift), None for what is not needed,
    each but the last two in the dtype of what it is of.
    """
    *others, needs = options
    backend = choose(
        "convolution_backward", x, grad, weight, x2, norm_weight, norm_bias, *others[-2:]
    )
    grads = backend.convolution_backward(
        grad, x, weight, x2=x2, needs=needs,
        **_options(num_groups, norm_weight, norm_bias, *others),
    )  # fmt: skip
    return tuple(
        g if g is None or y is None or g.dtype == y.dtype else g.to(y.dtype)
        for g, y in zip(grads, (x, x2, norm_weight, norm_bias, weight, None, None), strict=True)
    )


def _gradients_kernel(grad, x, *arguments):
    return tuple(x.new_empty(0) if g is None else g for g in _gradients(grad, x, *arguments))


def _gradients_fake(grad, x, weight, x2, norm_weight, norm_bias, *options):
    inputs, of_weight, bias, shift = options[-1]

    def like(y, needed):
        return torch.empty_like(y) if needed and y is not None else x.new_empty(0)

    def sums(needed, shape):
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return x.new_empty(shape, dtype=dtype) if needed else x.new_empty(0)

    return (
        like(x, inputs),
        like(x2, inputs),
        *(
            x.new_empty(0) if y is None or not inputs else y.new_empty(y.shape)
            for y in (norm_weight, norm_bias)
        ),
        torch.empty_like(weight) if of_weight else x.new_empty(0),
        sums(bias, grad.shape[1:2]),
        sums(shift, grad.shape[:2]),
    )


backward_op = Op(
    "convolution_backward",  # what is not needed gets an empty gradient
    f"(Tensor grad, Tensor x, Tensor weight, Tensor? x2, {_NORM}, {_OPTIONS}, bool[] needs) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _gradients,
    _gradients_fake,
    kernel=_gradients_kernel,
)
