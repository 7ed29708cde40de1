"""The C++ backend: every op, and the gradients of group_norm_silu and attention_block."""

from __future__ import annotations

import torch

from fastddpm import _native
from fastddpm.ops.native import Native, unbuilt
from fastddpm.ops.packed import packed_weights as packed_weights
from fastddpm.reference import convolved, sides


class _Cpu(Native):
    def call(self, name, x, *args):
        getattr(self.module, name)(*args, torch.get_num_threads())

    def sum_over_samples(self, x):
        """In the order of the samples: the bits of torch's sum depend on the thread count."""
        return x.double().cumsum(0)[-1] if len(x) else x.sum(0)

    def attention_block_backward(
        self, grad, x, num_groups, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight,
        proj_bias, num_heads, eps,
    ):  # fmt: skip
        """(dx, dnorm_weight, dnorm_bias, dqkv_weight, dqkv_bias, dproj_weight, dproj_bias); None
        for what was not given, float32 but dx.
        """
        dx = torch.empty_like(x)
        parameters = (norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias)
        gradients = [
            None if p is None else x.new_zeros(p.shape, dtype=torch.float32) for p in parameters
        ]
        self.call(
            "attention_block_backward", x, grad, x, num_groups, *parameters, num_heads, eps,
            dx, *gradients,
        )  # fmt: skip
        return dx, *gradients

    def convolution(
        self, x, weight, bias=None, *,
        x2=None, stride=1, padding=1, upsample=1,
        num_groups=None, norm_weight=None, norm_bias=None, eps=1e-6, silu=False,
        dropout=0.0, seed=None, step=None, sample_index=None,
        shift=None, residual=None, products=None, packed=None,
    ):  # fmt: skip
        """packed: what packed_weights() keeps of weight from call to call"""
        before, after = sides(padding)
        y = convolved(x, weight, padding, upsample, stride)
        self.call(
            "convolution", x, x, weight, bias, x2, norm_weight, norm_bias, shift, residual, y,
            num_groups or 0, eps, silu, stride, before, after, upsample,
            (products or weight.dtype) == torch.bfloat16, dropout, seed, step, sample_index,
            packed,
        )  # fmt: skip
        return y

    def convolution_backward(
        self, grad, x, weight, *,
        x2=None, stride=1, padding=1, upsample=1,
        num_groups=None, norm_weight=None, norm_bias=None, eps=1e-6, silu=False,
        dropout=0.0, seed=None, step=None, sample_index=None,
        products=None, needs=(True, True, True, True),
    ):  # fmt: skip
        """(dx, dx2, dnorm_weight, dnorm_bias, dweight, dbias, dshift), float32 but the first two;
        None for what was not given or is not needed. dweight lies as weight does.
        """
        before, after = sides(padding)
        (n, outputs), (inputs, of_weight, bias, shift) = grad.shape[:2], needs

        def sums(needed, *shape):
            return x.new_empty(shape, dtype=torch.float32) if needed else None

        dx = torch.empty_like(x) if inputs else None
        dx2 = torch.empty_like(x2) if inputs and x2 is not None else None
        channels = weight.shape[1]
        results = (
            dx,
            dx2,
            sums(inputs and norm_weight is not None, channels),
            sums(inputs and norm_bias is not None, channels),
            torch.empty_like(weight, dtype=torch.float32) if of_weight else None,
            sums(bias, outputs),
            sums(shift, n, outputs),
        )
        self.call(
            "convolution_backward", x, grad, x, weight, x2, norm_weight, norm_bias,
            num_groups or 0, eps, silu, stride, before, after, upsample,
            (products or weight.dtype) == torch.bfloat16, dropout, seed, step, sample_index,
            *results,
        )  # fmt: skip
        return results


_module = None if _native.C is None else _native.C.cpu
_cpu = _Cpu(_module, "cpu", unbuilt())

randn = _cpu.randn
choices = _cpu.choices
noise = _cpu.noise
posterior_step = _cpu.posterior_step
group_norm_silu = _cpu.group_norm_silu
group_norm_silu_backward = _cpu.group_norm_silu_backward
residual_sum = _cpu.residual_sum
attention_block = _cpu.attention_block
convolution = _cpu.convolution
convolution_backward = _cpu.convolution_backward
attention_block_backward = _cpu.attention_block_backward
discretized_log_likelihood = _cpu.discretized_log_likelihood
vlb_term = _cpu.vlb_term
squared_error = _cpu.squared_error
squared_error_backward = _cpu.squared_error_backward
adam = _cpu.adam
grad_norm = _cpu.grad_norm
unsupported = _cpu.unsupported
