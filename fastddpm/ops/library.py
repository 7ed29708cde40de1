"""The ops as torch knows them: schema, what runs, shape without data, gradient.

An op is called here with checked arguments. Where nothing but its value is asked for it goes
straight to the backend, or for a gradient through an autograd.Function; torch.compile and all else
that traces take the registered op, whose kernel is the same function (`run`). Values that only a
host tensor can show are checked in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import library as torch_library
from torch.autograd import forward_ad
from torch.nn import Parameter

from fastddpm import reference
from fastddpm.ops import attention, dispatch, lists
from fastddpm.ops.checks import INDEX_END, STEP_END, is_lazy, values_in
from fastddpm.ops.dispatch import choose
from fastddpm.ops.overlap import check_written
from fastddpm.reference import with_channels

_library = torch_library.Library("fastddpm", "DEF")


class Op:
    """fastddpm::name. `run` is its kernel on every device, `fake` makes outputs without data.

    setup(ctx, inputs, output) and backward(ctx, *grads) are those of torch.autograd.Function.
    `run` takes beside the op's arguments what chooses the backend. Where it returns None among
    other tensors, `kernel` is what is registered: it may not. `recorded`
    runs in its place where a gradient is recorded.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        run: Callable,
        fake: Callable,
        setup: Callable | None = None,
        backward: Callable | None = None,
        kernel: Callable | None = None,
        recorded: Callable | None = None,
    ):
        tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
        _library.define(name + schema, tags=tags)
        _library.impl(name, kernel or run, "CompositeExplicitAutograd")
        torch_library.register_fake(f"fastddpm::{name}", fake, lib=_library)
        self.registered = getattr(torch.ops.fastddpm, name).default
        self.name, self.run = name, run
        self.differentiable = run
        if backward is not None:
            torch_library.register_autograd(
                f"fastddpm::{name}", backward, setup_context=setup, lib=_library
            )
            self.differentiable = _function(name, recorded or run, setup, backward)

    def __call__(self, *arguments: Any) -> Any:
        if (
            torch.compiler.is_compiling()
            or torch._C._len_torch_dispatch_stack()
            or torch._C._get_tracing_state()
        ):
            return self.registered(*arguments)
        if torch._C._are_functorch_transforms_active() or _has_tangent(arguments):
            return self.run(*arguments, choose=self._choose_reference)
        gradient = False
        for x in arguments:
            kind = type(x)
            if kind is Tensor or kind is Parameter:
                if x.is_meta:
                    return self.registered(*arguments)
                gradient = gradient or x.requires_grad
            elif isinstance(x, Tensor) or (kind is list and not _are_plain(x)):
                return self.registered(*arguments)
        try:
            return (self.differentiable if gradient and torch.is_grad_enabled() else self.run)(
                *arguments
            )
        except ValueError:
            # Kernels refuse what torch keeps lazily, which is rare and costs a call to ask for: the
            # registered op gets it made plain.
            if not any(isinstance(x, Tensor) and is_lazy(x) for x in arguments):
                raise
        return self.registered(*arguments)

    def _choose_reference(self, *_: Any, **__: Any) -> Any:
        """Plain torch, which torch.func and forward-mode AD can transform; a kernel they can't."""
        if dispatch.forced() not in ("auto", "reference"):
            raise ValueError(
                f"{self.name} under torch.func or forward-mode AD runs on the backend 'reference' "
                f"only; {dispatch.forced()!r} was forced"
            )
        return reference


def _are_plain(items: list) -> bool:
    """Whether no tensor among them is of a type of its own, or without values."""
    return not any(
        isinstance(x, Tensor) and (type(x) not in (Tensor, Parameter) or x.is_meta) for x in items
    )


def _has_tangent(arguments: tuple) -> bool:
    return forward_ad._current_level >= 0 and any(
        isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in arguments
    )


def _function(name: str, run: Callable, setup: Callable | None, backward: Callable) -> Callable:
    """`run` with the gradient of the registered op, at a third of its cost per call."""

    def forward(ctx, *arguments):
        output = run(*arguments)
        if setup is not None:
            setup(ctx, arguments, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), members).apply  # type: ignore[attr-defined]


def check_draw(t: Tensor | None, step: Tensor, sample_index: Tensor) -> None:
    if step is not t:
        values_in("step", step, STEP_END, "2^32 - 1")
    values_in("sample_index", sample_index, INDEX_END, "2^63 - 1")


def check_t(t: Tensor, table: Tensor) -> None:
    values_in("t", t, table.shape[0], str(table.shape[0] - 1))


# ---- randn ---------------------------------------------------------------------------------------


def _randn(shape, seed, step, sample_index, dtype, choose=choose):
    values_in("step", step, STEP_END, "2^32 - 1")
    values_in("sample_index", sample_index, INDEX_END, "2^63 - 1")
    backend = choose("randn", sample_index, dtype=dtype)
    return backend.randn(shape, seed=seed, step=step, sample_index=sample_index, dtype=dtype)


def _randn_fake(shape, seed, step, sample_index, dtype):
    return torch.empty(shape, dtype=dtype, device=sample_index.device)


randn = Op(
    "randn",
    "(SymInt[] shape, int seed, Tensor step, Tensor sample_index, ScalarType dtype) -> Tensor",
    _randn,
    _randn_fake,
)


# ---- choices -------------------------------------------------------------------------------------


def _choices(sample_index, seed, step, levels, choose=choose):
    values_in("sample_index", sample_index, INDEX_END, "2^63 - 1")
    backend = choose("choices", sample_index)
    return backend.choices(sample_index, seed=seed, step=step, levels=levels)


def _choices_fake(sample_index, seed, step, levels):
    shape = sample_index.shape
    return sample_index.new_empty(shape), sample_index.new_empty(shape, dtype=torch.bool)


choices = Op(
    "choices",
    "(Tensor sample_index, int seed, int step, int levels) -> (Tensor, Tensor)",
    _choices,
    _choices_fake,
)


# ---- noise ---------------------------------------------------------------------------------------


def _noise(x0, t, table, eps, flip, dtype, choose=choose):
    check_t(t, table)
    backend = choose("noise", x0, t, table, eps, flip, dtype=dtype)
    return backend.noise(x0, t, table, eps=eps, flip=flip, dtype=dtype)[0]


def _noise_fake(x0, t, table, eps, flip, dtype):
    return torch.empty_like(x0, dtype=dtype)


def _noise_setup(ctx, inputs, output):
    x0, t, table, eps, flip, _ = inputs
    ctx.save_for_backward(t, table, flip)
    ctx.dtypes = x0.dtype, eps.dtype


def _noise_backward(ctx, grad):
    dx0, deps = reference.noise_backward(grad, *ctx.saved_tensors)
    x0_dtype, eps_dtype = ctx.dtypes
    # Bytes have no gradient.
    dx0 = dx0.to(x0_dtype) if x0_dtype.is_floating_point else None
    return dx0, None, None, deps.to(eps_dtype), None, None


noise = Op(
    "noise",
    "(Tensor x0, Tensor t, Tensor table, Tensor eps, Tensor? flip, ScalarType dtype) -> Tensor",
    _noise,
    _noise_fake,
    _noise_setup,
    _noise_backward,
)


def _drawn_noise(
    x0, t, table, seed, step, sample_index, flip, dtype, choose=choose, keep_eps=True
):  # fmt: skip
    check_t(t, table)
    check_draw(t, step, sample_index)
    backend = choose("noise", x0, t, table, step, sample_index, flip, dtype=dtype)
    return backend.noise(
        x0, t, table, seed=seed, step=step, sample_index=sample_index, flip=flip, dtype=dtype,
        keep_eps=keep_eps,
    )  # fmt: skip


def _drawn_noise_fake(x0, t, table, seed, step, sample_index, flip, dtype):
    return torch.empty_like(x0, dtype=dtype), torch.empty_like(x0, dtype=dtype)


def _noised_setup(ctx, inputs, output):
    x0, t, table, *_, flip, _ = inputs
    ctx.save_for_backward(t, table, flip)
    ctx.dtype = x0.dtype


def _drawn_noise_setup(ctx, inputs, output):
    _noised_setup(ctx, inputs, output)
    ctx.mark_non_differentiable(output[1])


def _drawn_noise_backward(ctx, grad, _):
    dx0, _ = reference.noise_backward(grad, *ctx.saved_tensors)
    return dx0.to(ctx.dtype), None, None, None, None, None, None, None


drawn_noise = Op(
    "drawn_noise",
    "(Tensor x0, Tensor t, Tensor table, int seed, Tensor step, Tensor sample_index, "
    "Tensor? flip, ScalarType dtype) -> (Tensor, Tensor)",
    _drawn_noise,
    _drawn_noise_fake,
    _drawn_noise_setup,
    _drawn_noise_backward,
)


def _noised(x0, t, table, seed, step, sample_index, flip, dtype, choose=choose):
    return _drawn_noise(x0, t, table, seed, step, sample_index, flip, dtype, choose, False)[0]


def _noised_fake(x0, t, table, seed, step, sample_index, flip, dtype):
    return torch.empty_like(x0, dtype=dtype)


def _noised_backward(ctx, grad):
    return _drawn_noise_backward(ctx, grad, None)


noised = Op(
    "noised",
    "(Tensor x0, Tensor t, Tensor table, int seed, Tensor step, Tensor sample_index, "
    "Tensor? flip, ScalarType dtype) -> Tensor",
    _noised,
    _noised_fake,
    _noised_setup,
    _noised_backward,
)


# ---- posterior_step ------------------------------------------------------------------------------


def _posterior_step(
    xt, model_output, t, table, z, seed, step, sample_index, clip, prediction, log_variance,
    device_seed=None, learned_range=False, out=None, *, choose=choose,
):  # fmt: skip
    check_t(t, table)
    if z is None:
        check_draw(t, step, sample_index)
    backend = choose(
        "posterior_step", xt, model_output, t, table, z, step, sample_index, log_variance,
        device_seed,
    )  # fmt: skip
    return backend.posterior_step(
        xt, model_output, t, table, z=z, seed=seed if device_seed is None else device_seed,
        step=step, sample_index=sample_index,
        clip=clip, prediction=prediction, log_variance=log_variance,
        learned_range=learned_range, out=out,
    )  # fmt: skip


def _posterior_step_fake(xt, *_):
    return torch.empty_like(xt)


def _posterior_step_setup(ctx, inputs, output):
    xt, model_output, t, table, z, seed, step, sample_index, *options = inputs
    clip, prediction, log_variance, device_seed, ctx.learned_range = options
    ctx.save_for_backward(xt, model_output, t, table, z, step, sample_index, log_variance)
    seed = seed if device_seed is None else device_seed.item()
    ctx.seed, ctx.clip, ctx.prediction = seed, clip, prediction


def _posterior_step_backward(ctx, grad):
    xt, model_output, t, table, z, step, sample_index, log_variance = ctx.saved_tensors
    given = z is not None
    if log_variance is not None and not given:
        shape = list(xt.shape)
        z = torch.ops.fastddpm.randn(shape, ctx.seed, step, sample_index, torch.float32)
    dxt, dout, dz, dlog_variance = reference.posterior_step_backward(
        grad, xt, model_output, t, table,
        z=z, clip=ctx.clip, prediction=ctx.prediction, log_variance=log_variance,
        learned_range=ctx.learned_range,
    )  # fmt: skip
    return (
        dxt.to(xt.dtype),
        dout.to(model_output.dtype),
        None,
        None,
        dz.to(z.dtype) if given else None,
        None,
        None,
        None,
        None,
        None,
        None if dlog_variance is None else dlog_variance.to(log_variance.dtype),
        None,
        None,
    )


_POSTERIOR_STEP = (
    "(Tensor xt, Tensor model_output, Tensor t, Tensor table, Tensor? z, int? seed, Tensor? step, "
    "Tensor? sample_index, bool clip, str prediction, Tensor? log_variance"
)
posterior_step = Op(
    "posterior_step",
    _POSTERIOR_STEP + ", Tensor? device_seed=None, bool learned_range=False) -> Tensor",
    _posterior_step,
    _posterior_step_fake,
    _posterior_step_setup,
    _posterior_step_backward,
)


def _posterior_step_out(
    xt, model_output, t, table, z, seed, step, sample_index, clip, prediction, log_variance, out,
    device_seed=None, learned_range=False, choose=choose,
):  # fmt: skip
    if not torch._C._are_functorch_transforms_active():  # there it is plain torch that writes
        check_written(
            "out", out, xt=xt, model_output=model_output, t=t, table=table, z=z, step=step,
            sample_index=sample_index, log_variance=log_variance, seed=device_seed,
        )  # fmt: skip
    _posterior_step(
        xt, model_output, t, table, z, seed, step, sample_index, clip, prediction, log_variance,
        device_seed, learned_range, out, choose=choose,
    )  # fmt: skip
    if not out.is_inference():  # a gradient that saved what is overwritten then says so
        torch.autograd.graph.increment_version(out)


posterior_step_out = Op(
    "posterior_step_out",
    _POSTERIOR_STEP + ", Tensor(a!) out, Tensor? device_seed=None, bool learned_range=False) -> ()",
    _posterior_step_out,
    lambda *_: None,
)


# ---- group_norm_silu -----------------------------------------------------------------------------


# What the op and its gradient take after (x, num_groups, weight, bias, eps, scale, shift, silu).
_DROPOUT = "float dropout, int? seed, Tensor? step, Tensor? sample_index"
_NORM = (
    "SymInt num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? scale, Tensor? shift, "
    "bool silu"
)


def _norm_backend(name, choose, *tensors, before, residual, x2, dropout):
    fused = before is not None or residual is not None or x2 is not None or dropout > 0
    return choose(name, *tensors, before, residual, x2, **({"fused": True} if fused else {}))


def _group_norm_silu(
    x, num_groups, weight, bias, eps, scale, shift, silu,
    before=None, x2=None, dropout=0.0, seed=None, step=None, sample_index=None,
    *, residual=None, choose=choose,
):  # fmt: skip
    if dropout:
        check_draw(None, step, sample_index)
    backend = _norm_backend(
        "group_norm_silu", choose, x, weight, bias, scale, shift, step, sample_index,
        before=before, residual=residual, x2=x2, dropout=dropout,
    )  # fmt: skip
    return backend.group_norm_silu(
        x, num_groups, weight, bias, eps, scale=scale, shift=shift, silu=silu,
        before=before, residual=residual, x2=x2,
        dropout=dropout, seed=seed, step=step, sample_index=sample_index,
    )  # fmt: skip


def _like_sources(x, x2):
    return torch.empty_like(x) if x2 is None else with_channels(x, x.shape[1] + x2.shape[1])


def _group_norm_silu_fake(
    x, num_groups, weight, bias, eps, scale, shift, silu,
    before=None, x2=None, dropout=0.0, seed=None, step=None, sample_index=None,
):  # fmt: skip
    return _like_sources(x, x2)


def _group_norm_silu_setup(ctx, inputs, output):
    x, num_groups, weight, bias, eps, scale, shift, silu, *more = inputs
    before, x2, dropout, seed, step, sample_index = more or (None, None, 0.0, None, None, None)
    ctx.save_for_backward(x, weight, bias, scale, shift, before, x2, step, sample_index)
    ctx.options = num_groups, eps, silu, dropout, seed
    ctx.short = not more


def _norm_gradients(ctx, grad, grad_u=None):
    """The gradients of what `ctx` saved, None for what was not given."""
    x, weight, bias, scale, shift, before, x2, step, sample_index = ctx.saved_tensors
    num_groups, eps, silu, dropout, seed = ctx.options
    arguments = (
        grad, x, num_groups, weight, bias, eps, scale, shift, silu,
        before, x2, grad_u, dropout, seed, step, sample_index,
    )  # fmt: skip
    if torch.is_grad_enabled():  # create_graph=True: the formula itself can be differentiated
        grads = reference.group_norm_silu_backward(*arguments)
    else:
        grads = group_norm_silu_backward(*arguments)
    given = zip(grads, (x, weight, bias, scale, shift, before, x2), strict=True)
    return [None if y is None else g for g, y in given]


def _group_norm_silu_backward(ctx, grad):
    dx, dweight, dbias, dscale, dshift, dbefore, dx2 = _norm_gradients(ctx, grad)
    short = (dx, None, dweight, dbias, None, dscale, dshift, None)
    return short if ctx.short else (*short, dbefore, dx2, None, None, None, None)


group_norm_silu = Op(
    "group_norm_silu",
    f"(Tensor x, {_NORM}, Tensor? before=None, Tensor? x2=None, "
    "float dropout=0.0, int? seed=None, Tensor? step=None, Tensor? sample_index=None) -> Tensor",
    _group_norm_silu,
    _group_norm_silu_fake,
    _group_norm_silu_setup,
    _group_norm_silu_backward,
)


def _group_norm_silu_sum(x, residual, *arguments, choose=choose):
    return _group_norm_silu(x, *arguments, residual=residual, choose=choose)


def _group_norm_silu_sum_fake(x, residual, *arguments):
    return _like_sources(x, arguments[8]), torch.empty_like(x)


def _group_norm_silu_sum_setup(ctx, inputs, output):
    x, residual, num_groups, weight, bias, eps, scale, shift, silu, before, x2, *random = inputs
    dropout, seed, step, sample_index = random
    # The written sum stands for x, residual and before.
    ctx.save_for_backward(output[1], weight, bias, scale, shift, None, x2, step, sample_index)
    ctx.options = num_groups, eps, silu, dropout, seed
    ctx.before = before is not None and (before.dim(), before.dtype)
    ctx.dtypes = x.dtype, residual.dtype
    ctx.set_materialize_grads(False)


def _group_norm_silu_sum_backward(ctx, grad, grad_u):
    if grad is None:
        du, others = grad_u, [None] * 5
    else:
        du, *others, _, dx2 = _norm_gradients(ctx, grad, grad_u)
        others.append(dx2)
    dweight, dbias, dscale, dshift, dx2 = others
    dbefore = None
    if ctx.before and du is not None:
        dims, dtype = ctx.before
        dbefore = reference.sum_for_before(du, dims, dtype)
    x_dtype, residual_dtype = ctx.dtypes
    dx, dresidual = (None if du is None else du.to(d) for d in (x_dtype, residual_dtype))
    return (
        *(dx, dresidual, None, dweight, dbias, None, dscale, dshift, None, dbefore, dx2),
        *(None, None, None, None),
    )


group_norm_silu_sum = Op(
    "group_norm_silu_sum",
    f"(Tensor x, Tensor residual, {_NORM}, Tensor? before, Tensor? x2, {_DROPOUT}) "
    "-> (Tensor, Tensor)",
    _group_norm_silu_sum,
    _group_norm_silu_sum_fake,
    _group_norm_silu_sum_setup,
    _group_norm_silu_sum_backward,
)


def _group_norm_silu_gradients(
    grad, x, num_groups, weight, bias, eps, scale, shift, silu,
    before=None, x2=None, grad_u=None, dropout=0.0, seed=None, step=None, sample_index=None,
    *, choose=choose,
):  # fmt: skip
    """(dx, dweight, dbias, dscale, dshift, dbefore, dx2), each in the dtype of what it is of."""
    backend = _norm_backend(
        "group_norm_silu_backward", choose, x, grad, grad_u, weight, bias, scale, shift, step,
        sample_index, before=before, residual=grad_u, x2=x2, dropout=dropout,
    )  # fmt: skip
    grads = backend.group_norm_silu_backward(
        grad, x, num_groups, weight, bias, eps, scale, shift, silu,
        before, x2, grad_u, dropout, seed, step, sample_index,
    )  # fmt: skip
    return tuple(
        g if g is None or g.dtype == y.dtype else g.to(y.dtype)
        for g, y in zip(grads, (x, weight, bias, scale, shift, before, x2), strict=True)
    )


def _group_norm_silu_gradients_kernel(grad, x, *arguments):
    grads = _group_norm_silu_gradients(grad, x, *arguments)
    return tuple(x.new_empty(0) if g is None else g for g in grads)


def _group_norm_silu_gradients_fake(
    grad, x, num_groups, weight, bias, eps, scale, shift, silu, before=None, x2=None, *_
):
    parameters = (weight, bias, scale, shift, before)
    return (
        torch.empty_like(x),
        *(x.new_empty(0) if y is None else y.new_empty(y.shape) for y in parameters),
        x.new_empty(0) if x2 is None else torch.empty_like(x2),
    )


group_norm_silu_backward = Op(
    "group_norm_silu_backward",
    f"(Tensor grad, Tensor x, {_NORM}, Tensor? before=None, Tensor? x2=None, "
    "Tensor? grad_u=None, float dropout=0.0, int? seed=None, Tensor? step=None, "
    "Tensor? sample_index=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _group_norm_silu_gradients,
    _group_norm_silu_gradients_fake,
    kernel=_group_norm_silu_gradients_kernel,  # what was not given gets an empty gradient
)


# ---- residual_sum --------------------------------------------------------------------------------


def _residual_sum(x, residual, before, choose=choose):
    return choose("residual_sum", x, residual, before).residual_sum(x, residual, before)


def _residual_sum_setup(ctx, inputs, output):
    x, residual, before = inputs
    ctx.dtypes = x.dtype, None if residual is None else residual.dtype
    ctx.before = None if before is None else (before.dim(), before.dtype)


def _residual_sum_backward(ctx, grad):
    x_dtype, residual_dtype = ctx.dtypes
    return (
        grad.to(x_dtype),
        None if residual_dtype is None else grad.to(residual_dtype),
        None if ctx.before is None else reference.sum_for_before(grad, *ctx.before),
    )


residual_sum = Op(
    "residual_sum",
    "(Tensor x, Tensor? residual, Tensor? before) -> Tensor",
    _residual_sum,
    lambda x, *_: torch.empty_like(x),
    _residual_sum_setup,
    _residual_sum_backward,
)


# ---- attention_block -----------------------------------------------------------------------------


def _attention_block(
    x, num_groups, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias,
    num_heads, eps, *, choose=choose,
):  # fmt: skip
    parameters = (norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias)
    order = attention.order(x, qkv_weight, num_heads, gradient=False) if x.is_cuda else None
    backend = choose("attention_block", x, *parameters, order=order)
    return backend.attention_block(x, num_groups, *parameters, num_heads=num_heads, eps=eps)


def _attention_block_fake(x, *_):
    return torch.empty_like(x)


def _attention_block_setup(ctx, inputs, output):
    x, num_groups, *parameters, num_heads, eps = inputs
    ctx.save_for_backward(x, *parameters)
    ctx.options = num_groups, num_heads, eps


def _attention_block_backward(ctx, grad):
    x, *parameters = ctx.saved_tensors
    num_groups, num_heads, eps = ctx.options
    arguments = (grad, x, num_groups, *parameters, num_heads, eps)
    if torch.is_grad_enabled():  # create_graph=True: the formula itself can be differentiated
        grads = reference.attention_block_backward(*arguments)
    else:
        grads = attention_block_backward(*arguments)
    dx, *dparameters = grads
    given = zip(dparameters, parameters, strict=True)
    return dx, None, *(None if p is None else g for g, p in given), None, None


_ATTENTION_BLOCK = (
    "Tensor x, SymInt num_groups, Tensor? norm_weight, Tensor? norm_bias, Tensor qkv_weight, "
    "Tensor? qkv_bias, Tensor proj_weight, Tensor? proj_bias, SymInt num_heads, float eps"
)
attention_block = Op(
    "attention_block",
    f"({_ATTENTION_BLOCK}) -> Tensor",
    _attention_block,
    _attention_block_fake,
    _attention_block_setup,
    _attention_block_backward,
)


def _attention_block_gradients(grad, x, num_groups, *parameters_and_options, choose=choose):
    *parameters, num_heads, eps = parameters_and_options
    order = attention.order(x, parameters[2], num_heads, gradient=True) if x.is_cuda else None
    backend = choose("attention_block_backward", x, grad, *parameters, order=order)
    dx, *others = backend.attention_block_backward(grad, x, num_groups, *parameters, num_heads, eps)
    given = zip(others, parameters, strict=True)
    return dx, *(x.new_empty(0) if p is None else g.to(p.dtype) for g, p in given)


def _attention_block_gradients_fake(grad, x, num_groups, *parameters_and_options):
    *parameters, _, _ = parameters_and_options
    return torch.empty_like(x), *(
        x.new_empty(0) if p is None else p.new_empty(p.shape) for p in parameters
    )


attention_block_backward = Op(
    "attention_block_backward",  # what was not given gets an empty gradient
    f"(Tensor grad, {_ATTENTION_BLOCK}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _attention_block_gradients,
    _attention_block_gradients_fake,
)


# ---- discretized_log_likelihood ------------------------------------------------------------------


def _discretized_log_likelihood(x, mean, log_scale, choose=choose):
    backend = choose("discretized_log_likelihood", x, mean, log_scale)
    return backend.discretized_log_likelihood(x, mean, log_scale)


def _discretized_log_likelihood_fake(x, mean, log_scale):
    dtype = torch.promote_types(torch.promote_types(x.dtype, mean.dtype), log_scale.dtype)
    like, _, _ = torch.broadcast_tensors(x, mean, log_scale)
    return torch.empty_like(like, dtype=dtype)


def _discretized_log_likelihood_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _discretized_log_likelihood_backward(ctx, grad):
    x, mean, log_scale = ctx.saved_tensors
    dmean, dlog_scale = reference.discretized_log_likelihood_backward(grad, x, mean, log_scale)
    return (
        None,
        dmean.sum_to_size(mean.shape).to(mean.dtype),
        dlog_scale.sum_to_size(log_scale.shape).to(log_scale.dtype),
    )


discretized_log_likelihood = Op(
    "discretized_log_likelihood",
    "(Tensor x, Tensor mean, Tensor log_scale) -> Tensor",
    _discretized_log_likelihood,
    _discretized_log_likelihood_fake,
    _discretized_log_likelihood_setup,
    _discretized_log_likelihood_backward,
)


# ---- squared_error -------------------------------------------------------------------------------


def _squared_error(prediction, target, choose=choose):
    return choose("squared_error", prediction, target).squared_error(prediction, target)


def _squared_error_fake(prediction, target):
    double = prediction.dtype == torch.float64
    dtype = torch.float64 if double else torch.float32
    return prediction.new_empty(prediction.shape[:1], dtype=dtype)


def _squared_error_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _squared_error_backward(ctx, grad):
    prediction, target = ctx.saved_tensors
    # create_graph=True: the formula itself can be differentiated
    formula = (
        reference.squared_error_backward if torch.is_grad_enabled() else squared_error_backward
    )
    wanted = ctx.needs_input_grad
    return (
        formula(grad, prediction, target) if wanted[0] else None,
        formula(grad, target, prediction) if wanted[1] else None,
    )


squared_error = Op(
    "squared_error",
    "(Tensor prediction, Tensor target) -> Tensor",
    _squared_error,
    _squared_error_fake,
    _squared_error_setup,
    _squared_error_backward,
)


def _squared_error_gradient(grad, prediction, target, choose=choose):
    backend = choose("squared_error_backward", prediction, target, grad)
    return backend.squared_error_backward(grad, prediction, target)


squared_error_backward = Op(
    "squared_error_backward",
    "(Tensor grad, Tensor prediction, Tensor target) -> Tensor",
    _squared_error_gradient,
    lambda grad, prediction, target: torch.empty_like(prediction),
)


# ---- adam and grad_norm --------------------------------------------------------------------------


def _adam(
    params, grads, exp_avgs, exp_avg_sqs, steps, averages, copies, lr, share, norm, refused,
    beta1, beta2, eps, clip, grad_scale, choose=choose,
):  # fmt: skip
    if not params:
        return
    if not torch._C._are_functorch_transforms_active():  # there it is plain torch that writes
        numbers = {"lr": lr, "share": share, "norm": norm, "refused": refused}
        lists.apart(
            {
                "params": params, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "steps": steps,
                "averages": averages, "copies": copies,
            },
            {"grads": grads, **{k: [x] for k, x in numbers.items() if x is not None}},
        )  # fmt: skip
    kept = (params, exp_avgs, exp_avg_sqs, averages)
    why = lists.unwalkable(grads, copies, floats=[x for x in kept if x])
    backend = choose("adam", *steps, lr, share, norm, refused, lists=why)
    backend.adam(
        params, grads, exp_avgs, exp_avg_sqs, steps, averages, copies, lr=lr, share=share,
        norm=norm, refused=refused, beta1=beta1, beta2=beta2, eps=eps, clip=clip,
        grad_scale=grad_scale,
    )  # fmt: skip
    torch.autograd.graph.increment_version((*params, *exp_avgs, *exp_avg_sqs, *averages, *copies))


adam = Op(
    "adam",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] steps, Tensor(e!)[] averages, Tensor(f!)[] copies, Tensor lr, Tensor share, "
    "Tensor? norm, Tensor? refused, float beta1, float beta2, float eps, float clip, "
    "float grad_scale) -> ()",
    _adam,
    lambda *_: None,
)


def _grad_norm(grads, choose=choose):
    why = lists.unwalkable(grads)
    return choose("grad_norm", *grads, lists=why).grad_norm(grads)


def _grad_norm_fake(grads):
    double = any(x.dtype == torch.float64 for x in grads)
    return grads[0].new_empty((), dtype=torch.float64 if double else torch.float32)


grad_norm = Op("grad_norm", "(Tensor[] grads) -> Tensor", _grad_norm, _grad_norm_fake)
