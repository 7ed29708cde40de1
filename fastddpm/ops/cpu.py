"""The C++ backend: every op, and the gradients of group_norm_silu and attention_block.

The gradient of attention_block is that of its norm in C++ around torch's matrix products: products
of our own would have to beat those.
"""

from __future__ import annotations

import torch

from fastddpm import _native, reference
from fastddpm.ops.native import Native, unbuilt
from fastddpm.precision import has_fast_bf16


class _Cpu(Native):
    def call(self, name, x, *args):
        getattr(self.module, name)(*args, torch.get_num_threads())

    def unsupported(self, op, *tensors, **options):
        native = "group_norm_silu_backward" if op == "attention_block_backward" else op
        return super().unsupported(native, *tensors, **options)

    def attention_block_backward(
        self, grad, x, num_groups, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight,
        proj_bias, num_heads, eps,
    ):  # fmt: skip
        """(dx, dnorm_weight, dnorm_bias, dqkv_weight, dqkv_bias, dproj_weight, dproj_bias)."""
        parameters = [qkv_weight, qkv_bias, proj_weight, proj_bias]
        dtype = x.dtype
        if torch.float16 in (dtype, qkv_weight.dtype) or not has_fast_bf16(x.device):
            # Half-precision products without instructions of their own are far slower than float32.
            dtype = torch.float32
            parameters = [None if p is None else p.float() for p in parameters]
        y = self.group_norm_silu(x.to(dtype), num_groups, norm_weight, norm_bias, eps, silu=False)
        arguments = (grad, y, *parameters, num_heads)
        dy, *dparameters = reference.attention_backward(*arguments)
        dx, dnorm_weight, dnorm_bias, _, _ = self.group_norm_silu_backward(
            dy, x, num_groups, norm_weight, norm_bias, eps, None, None, False
        )
        return dx.add_(grad), dnorm_weight, dnorm_bias, *dparameters


_module = None if _native.C is None else _native.C.cpu
_cpu = _Cpu(_module, "cpu", unbuilt())

randn = _cpu.randn
noise = _cpu.noise
posterior_step = _cpu.posterior_step
group_norm_silu = _cpu.group_norm_silu
group_norm_silu_backward = _cpu.group_norm_silu_backward
attention_block = _cpu.attention_block
attention_block_backward = _cpu.attention_block_backward
discretized_log_likelihood = _cpu.discretized_log_likelihood
unsupported = _cpu.unsupported
