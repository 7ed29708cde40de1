"""The term of the variational bound as one op, with its checks, and the op as torch knows it."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastddpm.ops import checks
from fastddpm.ops.dispatch import choose
from fastddpm.ops.library import Op, check_draw, check_t
from fastddpm.options import check_flag
from fastddpm.schedule import check_choice

Prediction = Literal["eps", "x0", "mean", "v"]


def vlb_term(
    x0: Tensor,
    xt: Tensor | None,
    model_output: Tensor,
    t: Tensor,
    table: Tensor,
    log_ratio: Tensor,
    *,
    seed: int | None = None,
    sample_index: Tensor | None = None,
    step: int | Tensor | None = None,
    clip: bool = True,
    prediction: Prediction = "eps",
    log_variance: Tensor | None = None,
    learned_range: bool = False,
) -> tuple[Tensor, Tensor]:
    """L_t = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), or L_0 = -log p(x_0 | x_1) at t = 0, of
    each image   (DDPM Eq. 5, 13), and the mean squared error of its x0 prediction.

    x0:           (N, C, H, W) uint8 0 .. 255, or float in [-1, 1] with 256 levels
    xt:           (N, C, H, W) float; or None, and instead the stream that `noise` drew it from in
                  float32: seed in [0, 2^64), sample_index (N,) int64, step (t unless given)
    model_output: (N, C, H, W) float;  prediction: what it is, see posterior_step. "mean" is the
                  mean of p itself, which clip does not touch but in the mse
    t:            (N,) int64 in 0 .. T-1;  table: (T, 8) from Schedule.table()
    log_ratio:    (T,) of the table's dtype, its log_variance less log beta-tilde, which float32
                  logarithms don't know: Schedule.log_variance_ratio()
    log_variance, learned_range: the model's, as in posterior_step; None: p has the table's
                  log_variance
    returns (term, mse), (N,) float32 each, float64 for float64: bits/dim, and of images in [-1, 1]

    One pass over memory. Differences and sums are float64, in an order of the image's shape alone:
    the bits of an image do not depend on the batch, the threads or, but for Triton, the layout. No
    gradients: ValueError where one is asked for, which Diffusion.vlb_term has.
    """
    checks.images("x0", x0, bytes_too=True)
    n, device = x0.shape[0], x0.device
    checks.operand("model_output", model_output, "x0", x0)
    checks.per_sample("t", t, n, device)
    checks.schedule_table(table, device)
    _check_ratio(log_ratio, table)
    if xt is not None:
        checks.operand("xt", xt, "model_output", model_output)
    stream = checks.draw("xt", xt, seed, sample_index, step, t)
    if prediction not in get_args(Prediction):
        check_choice("prediction", prediction, get_args(Prediction))
    learned_range = check_flag("learned_range", learned_range)
    if log_variance is not None:
        checks.operand("log_variance", log_variance, "model_output", model_output)
    elif learned_range:
        raise ValueError("learned_range is how log_variance is read; got no log_variance")
    _no_gradient(x0=x0, xt=xt, model_output=model_output, log_variance=log_variance)
    return op(
        x0, xt, model_output, t, table.contiguous(), log_ratio.contiguous(),
        *(stream or (None, None, None)), check_flag("clip", clip), prediction, log_variance,
        learned_range,
    )  # fmt: skip


def _check_ratio(values: Any, table: Tensor) -> None:
    checks.parameter("log_ratio", values, (table.shape[0],), table.device)
    if values is None or values.dtype != table.dtype:
        got = "None" if values is None else str(values.dtype).removeprefix("torch.")
        raise TypeError(
            "log_ratio must be (T,) of the table's dtype, "
            f"{str(table.dtype).removeprefix('torch.')}; got {got}"
        )


def _no_gradient(**tensors: Tensor | None) -> None:
    enabled, dual = torch.is_grad_enabled(), forward_ad._current_level >= 0
    for name, x in tensors.items():
        if x is None:
            continue
        tangent = dual and forward_ad.unpack_dual(x).tangent is not None
        if tangent or (enabled and x.requires_grad):
            raise ValueError(
                f"vlb_term has no gradient, which {name} asks for: use Diffusion.vlb_term, or "
                "torch.no_grad()"
            )


def _vlb_term(
    x0, xt, model_output, t, table, log_ratio, seed, step, sample_index, clip,
    prediction, log_variance, learned_range, choose=choose,
):  # fmt: skip
    check_t(t, table)
    if xt is None:
        check_draw(t, step, sample_index)
    backend = choose(
        "vlb_term", x0, xt, model_output, t, table, log_ratio, step, sample_index,
        log_variance,
    )  # fmt: skip
    return backend.vlb_term(
        x0, xt, model_output, t, table, log_ratio, seed=seed, step=step,
        sample_index=sample_index, clip=clip, prediction=prediction, log_variance=log_variance,
        learned_range=learned_range,
    )  # fmt: skip


def _vlb_term_fake(x0, xt, model_output, *_):
    double = torch.float64 in (x0.dtype, model_output.dtype)
    dtype = torch.float64 if double else torch.float32
    return tuple(model_output.new_empty(x0.shape[:1], dtype=dtype) for _ in range(2))


op = Op(
    "vlb_term",
    "(Tensor x0, Tensor? xt, Tensor model_output, Tensor t, Tensor table, "
    "Tensor log_ratio, int? seed, Tensor? step, Tensor? sample_index, bool clip, "
    "str prediction, Tensor? log_variance, bool learned_range) -> (Tensor, Tensor)",
    _vlb_term,
    _vlb_term_fake,
)
