"""The C++ backend: every op, and the gradients of group_norm_silu and attention_block."""

from __future__ import annotations

import torch

from fastddpm import _native
from fastddpm.ops.native import Native, unbuilt


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
attention_block_backward = _cpu.attention_block_backward
discretized_log_likelihood = _cpu.discretized_log_likelihood
squared_error = _cpu.squared_error
squared_error_backward = _cpu.squared_error_backward
adam = _cpu.adam
grad_norm = _cpu.grad_norm
unsupported = _cpu.unsupported
