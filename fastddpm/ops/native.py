"""What the C++ and the CUDA backend share: the functions of `reference` over `fastddpm._C`.

Thin adapters: they allocate the outputs, which keep the memory format, and call. The public ops
check what the user passed; `_C` checks again what protects memory (device, dtype and shape) and
raises ValueError.
"""

from __future__ import annotations

import operator
from types import ModuleType

import torch

from fastddpm import _native
from fastddpm.reference import with_channels

STORAGE = (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64, torch.bool)


class Native:
    """The ops of one device type. `module` is _C.cpu or _C.cuda, None if it was not built."""

    def __init__(self, module: ModuleType | None, device_type: str, missing: str):
        self.module = module
        self.is_here = operator.attrgetter(f"is_{device_type}")  # a third of x.device.type's cost
        self.missing = missing

    def call(self, name: str, x: torch.Tensor, *args) -> None:
        """Run op `name` on the device of x. Raises what the native code throws."""
        raise NotImplementedError

    def workspace(self, x: torch.Tensor, num_groups: int, *, backward: bool) -> torch.Tensor | None:
        """What group_norm_silu needs beside its outputs: nothing on the CPU."""
        return None

    def squares_workspace(self, x: torch.Tensor) -> torch.Tensor | None:
        """What squared_error needs for samples like those of x: nothing on the CPU."""
        return None

    def bound_workspace(self, x: torch.Tensor) -> torch.Tensor | None:
        """What vlb_term needs for images like those of x: nothing on the CPU."""
        return None

    def sweep_workspace(self, params: list[torch.Tensor]) -> torch.Tensor | None:
        """What adam needs: nothing on the CPU."""
        return None

    def norm_workspace(self, grads: list[torch.Tensor]) -> torch.Tensor | None:
        """What grad_norm needs: nothing on the CPU."""
        return None

    def sum_over_samples(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C) -> (C,)."""
        return x.sum(0)

    def unsupported(self, op: str, *tensors: torch.Tensor | None, **options) -> str | None:
        """Why this backend can't run `op` on these tensors, or None if it can."""
        if self.module is None:
            return self.missing
        if not hasattr(self.module, op):
            return f"{op} has no such version"
        for x in tensors:
            if x is None:
                continue
            if x.dtype not in STORAGE:
                return _unsupported_dtype(x.dtype)
            if not self.is_here(x):
                return f"a tensor is on {x.device.type}"
            if x.dim() > 4 and "lists" not in options:
                return f"{x.dim()} dimensions are more than 4"
        if options.get("lists") is not None:  # what stands against a walk over them
            return options["lists"]
        dtype = options.get("dtype")
        if dtype is not None and dtype not in STORAGE:
            return _unsupported_dtype(dtype)
        return None

    def randn(self, shape, *, seed, step, sample_index, dtype=torch.float32):
        out = torch.empty(shape, dtype=dtype, device=sample_index.device)
        self.call("randn", out, out, seed, _step(step, sample_index), sample_index)
        return out

    def choices(self, sample_index, *, seed, step, levels):
        """(t, flip), (N,) int64 and (N,) bool."""
        t = torch.empty(sample_index.shape, dtype=torch.int64, device=sample_index.device)
        flip = torch.empty_like(t, dtype=torch.bool)
        self.call("choices", sample_index, sample_index, seed, step, levels, t, flip)
        return t, flip

    def noise(
        self, x0, t, table, *,
        eps=None, seed=None, step=None, sample_index=None, flip=None, dtype=None, keep_eps=True,
    ):  # fmt: skip
        """(x_t, eps). An eps that is not given is drawn, rounded to the dtype of x_t, then used;
        None for one that is not kept.
        """
        if dtype is None:
            floating = eps if x0.dtype == torch.uint8 else x0
            dtype = torch.float32 if floating is None else floating.dtype
        if eps is None:
            step = t if step is None else _step(step, sample_index)
            eps = torch.empty_like(x0, dtype=dtype) if keep_eps else None
        else:
            seed = None
        xt = torch.empty_like(x0, dtype=dtype)
        self.call("noise", x0, x0, eps, xt, seed, step, sample_index, t, flip, table)
        return xt, eps

    def posterior_step(
        self, xt, model_output, t, table, *,
        z=None, seed=None, step=None, sample_index=None,
        clip=True, prediction="eps", log_variance=None, learned_range=False, out=None,
    ):  # fmt: skip
        """x_{t-1}. A z that is not given is drawn in float32, step t by default. out may be xt."""
        if z is None:
            step = t if step is None else _step(step, sample_index)
        else:
            seed = None
        if out is None:
            out = torch.empty_like(xt)
        self.call(
            "posterior_step", xt,
            xt, model_output, z, log_variance, out, seed, step, sample_index, t, table,
            prediction, clip, learned_range,
        )  # fmt: skip
        return out

    def group_norm_silu(
        self, x, num_groups, weight, bias, eps=1e-6, *,
        scale=None, shift=None, silu=True, before=None, residual=None, x2=None,
        dropout=0.0, seed=None, step=None, sample_index=None,
    ):  # fmt: skip
        """y, or (y, u) with a residual."""
        y = torch.empty_like(x) if x2 is None else with_channels(x, x.shape[1] + x2.shape[1])
        u = None if residual is None else torch.empty_like(x)
        self.call(
            "group_norm_silu", x,
            x, y, num_groups, weight, bias, eps, scale, shift, silu, before, residual, u, x2,
            dropout, seed, step, sample_index, None, None,
            self.workspace(y, num_groups, backward=False),
        )  # fmt: skip
        return y if residual is None else (y, u)

    def group_norm_silu_backward(
        self, grad, x, num_groups, weight, bias, eps, scale, shift, silu,
        before=None, x2=None, grad_u=None, dropout=0.0, seed=None, step=None, sample_index=None,
    ):  # fmt: skip
        """(dx, dweight, dbias, dscale, dshift, dbefore, dx2); None for what was not given.

        dweight and dbias are float32, the others have the dtype of what they are the gradient of.
        """
        dx = torch.empty_like(x)
        dx2 = None if x2 is None else torch.empty_like(x2)
        dweight, dbias, dscale, dshift = (
            None
            if y is None
            else torch.empty_like(y, dtype=torch.float32, memory_format=torch.contiguous_format)
            for y in (weight, bias, scale, shift)
        )
        dbefore = None if before is None else x.new_empty(x.shape[:2], dtype=torch.float32)
        self.call(
            "group_norm_silu_backward", x,
            grad, x, num_groups, weight, bias, eps, scale, shift, silu, before, x2, grad_u,
            dropout, seed, step, sample_index,
            dx, dweight, dbias, dscale, dshift, dbefore, dx2,
            self.workspace(grad, num_groups, backward=True),
        )  # fmt: skip
        if dbefore is not None:
            total = dbefore if before.dim() == 2 else self.sum_over_samples(dbefore)
            dbefore = total.to(before.dtype)
        return (
            dx,
            dweight,
            dbias,
            None if dscale is None else dscale.to(scale.dtype),
            None if dshift is None else dshift.to(shift.dtype),
            dbefore,
            dx2,
        )

    def residual_sum(self, x, residual=None, before=None):
        u = torch.empty_like(x)
        self.call("residual_sum", x, x, residual, before, u)
        return u

    def attention_block(
        self, x, num_groups, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias,
        *, num_heads=1, eps=1e-6,
    ):  # fmt: skip
        y = torch.empty_like(x)
        self.call(
            "attention_block", x, x, y, num_groups, norm_weight, norm_bias,
            qkv_weight, qkv_bias, proj_weight, proj_bias, num_heads, eps,
        )  # fmt: skip
        return y

    def discretized_log_likelihood(self, x, mean, log_scale):
        dtype = torch.promote_types(torch.promote_types(x.dtype, mean.dtype), log_scale.dtype)
        x, mean, log_scale = torch.broadcast_tensors(x, mean, log_scale)
        out = torch.empty_like(x, dtype=dtype)
        self.call("discretized_log_likelihood", x, x, mean, log_scale, out)
        return out

    def vlb_term(
        self, x0, xt, model_output, t, table, log_ratio, *,
        seed=None, step=None, sample_index=None,
        clip=True, prediction="eps", log_variance=None, learned_range=False,
    ):  # fmt: skip
        """(bits/dim, mse). An x_t that is not given is drawn, step t by default."""
        if xt is None:
            step = t if step is None else _step(step, sample_index)
        else:
            seed = None
        term, mse = (torch.empty(len(x0), dtype=torch.float32, device=x0.device) for _ in range(2))
        self.call(
            "vlb_term", x0,
            x0, xt, model_output, log_variance, term, mse, seed, step, sample_index, t, table,
            log_ratio, prediction, clip, learned_range, self.bound_workspace(x0),
        )  # fmt: skip
        return term, mse

    def squared_error(self, prediction, target):
        out = torch.empty(len(prediction), dtype=torch.float32, device=prediction.device)
        work = self.squares_workspace(prediction)
        self.call("squared_error", prediction, prediction, target, out, work)
        return out

    def squared_error_backward(self, grad, prediction, target):
        dprediction = torch.empty_like(prediction)
        self.call("squared_error_backward", grad, grad, prediction, target, dprediction)
        return dprediction

    def adam(
        self, params, grads, exp_avgs, exp_avg_sqs, steps, averages, copies, *,
        lr, share, norm, refused, beta1, beta2, eps, clip, grad_scale,
    ):  # fmt: skip
        work = self.sweep_workspace(params)
        self.call(
            "adam", lr, params, grads, exp_avgs, exp_avg_sqs, steps, averages, copies,
            lr, share, norm, refused, beta1, beta2, eps, clip, grad_scale, work,
        )  # fmt: skip

    def grad_norm(self, grads):
        out = torch.empty((), dtype=torch.float32, device=grads[0].device)
        self.call("grad_norm", out, grads, out, self.norm_workspace(grads))
        return out


def _unsupported_dtype(dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} is not supported"


def unbuilt() -> str:
    """The reason to give where _C is missing."""
    return f"requires _C: {_native.reason}"


def _step(step, sample_index):
    """(N,) int64 of an int or a tensor."""
    if isinstance(step, torch.Tensor):
        return step
    return torch.full((1,), step, dtype=torch.int64, device=sample_index.device).expand_as(
        sample_index
    )
