"""The C++ backend: every op but attention_block, with gradients of group_norm_silu."""

from __future__ import annotations

import torch

from fastddpm import _native
from fastddpm.ops.native import Native, unbuilt


class _Cpu(Native):
    def call(self, name, x, *args):
        getattr(self.module, name)(*args, torch.get_num_threads())


_module = None if _native.C is None else _native.C.cpu
_cpu = _Cpu(_module, "cpu", unbuilt())

randn = _cpu.randn
noise = _cpu.noise
posterior_step = _cpu.posterior_step
group_norm_silu = _cpu.group_norm_silu
group_norm_silu_backward = _cpu.group_norm_silu_backward
discretized_log_likelihood = _cpu.discretized_log_likelihood
unsupported = _cpu.unsupported
