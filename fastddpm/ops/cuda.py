"""The CUDA backend, on torch's current stream. attention_block is its norm, cuBLAS and torch's
fused attention, convolution its norm and cuDNN.

No CUDA call happens at import.
"""

from __future__ import annotations

import functools

import torch

from fastddpm import _native
from fastddpm.ops import attention, composite
from fastddpm.ops.native import Native, unbuilt

# Whose kernels an op runs on that has none of its own.
_KERNELS_OF = {
    "attention_block": "group_norm_silu",
    "attention_block_backward": "group_norm_silu_backward",
    "convolution": "group_norm_silu",
    "convolution_backward": "group_norm_silu_backward",
}


class _Cuda(Native):
    def call(self, name, x, *args):
        with torch.cuda.device(x.device):
            getattr(self.module, name)(*args, torch.cuda.current_stream(x.device).cuda_stream)

    def workspace(self, x, num_groups, *, backward):
        assert self.module is not None
        size = self.module.group_norm_workspace(x.shape[0], x.shape[1], num_groups, backward)
        return torch.empty(size, dtype=torch.float32, device=x.device)

    def squares_workspace(self, x):
        assert self.module is not None
        chunks = self.module.squared_error_chunks(x[:1].numel())
        if chunks <= 1:
            return None
        return torch.empty(len(x) * chunks, dtype=torch.float64, device=x.device)

    def bound_workspace(self, x):
        assert self.module is not None
        chunks = -(-x[:1].numel() // self.module.VLB_TERM_CHUNK)
        if chunks <= 1:
            return None
        return torch.empty(2 * len(x) * chunks, dtype=torch.float64, device=x.device)

    def sweep_workspace(self, params):
        size = 2 * (len(params) + 1)
        return torch.empty(size, dtype=torch.float32, device=params[0].device)

    def norm_workspace(self, grads):
        assert self.module is not None
        chunk = self.module.GRAD_NORM_CHUNK
        chunks = sum(-(-x.numel() // chunk) for x in grads)
        return torch.empty(chunks, dtype=torch.float64, device=grads[0].device)

    def attention_block(
        self, x, num_groups, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias,
        *, num_heads=1, eps=1e-6,
    ):  # fmt: skip
        return attention.attention_block(
            self.group_norm_silu, x, num_groups, norm_weight, norm_bias,
            qkv_weight, qkv_bias, proj_weight, proj_bias, num_heads=num_heads, eps=eps,
        )  # fmt: skip

    def attention_block_backward(
        self, grad, x, num_groups, norm_weight, norm_bias, qkv_weight, qkv_bias,
        proj_weight, proj_bias, num_heads, eps,
    ):  # fmt: skip
        return attention.attention_block_backward(
            self.group_norm_silu, self.group_norm_silu_backward, grad, x, num_groups,
            norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, num_heads, eps,
        )  # fmt: skip

    def convolution(self, x, weight, bias=None, **options):
        return composite.convolution(
            self.group_norm_silu, self.residual_sum, x, weight, bias, **options
        )

    def convolution_backward(self, grad, x, weight, **options):
        return composite.convolution_backward(
            self.group_norm_silu, self.group_norm_silu_backward, grad, x, weight, **options
        )

    def unsupported(self, op, *tensors, **options):
        reason = super().unsupported(_KERNELS_OF.get(op, op), *tensors, **options)
        if reason is None and len({x.device for x in tensors if x is not None}) > 1:
            return "the tensors are on different devices"
        if reason is None:
            index = next((x.device.index for x in tensors if x is not None and x.is_cuda), None)
            return None if index is None else _without_kernels(index)
        return reason


@functools.cache
def _without_kernels(index: int) -> str | None:
    """Why this card runs none of the kernels that were built, or None."""
    capability = torch.cuda.get_device_capability(index)
    built = _native.build_info()["cuda_architectures"]
    if _native.runs_on(built, capability) is not None:
        return None
    return "its kernels were built for {}, the card has capability {}.{}".format(built, *capability)


if _native.C is None:
    _module, _missing = None, unbuilt()
else:
    _module = getattr(_native.C, "cuda", None)
    _missing = (
        "this build of fastddpm has no CUDA kernels: install it again where nvcc is on the PATH, "
        "with FASTDDPM_CUDA=ON to see what is missing"
    )
_cuda = _Cuda(_module, "cuda", _missing)

randn = _cuda.randn
choices = _cuda.choices
noise = _cuda.noise
posterior_step = _cuda.posterior_step
group_norm_silu = _cuda.group_norm_silu
group_norm_silu_backward = _cuda.group_norm_silu_backward
attention_block = _cuda.attention_block
attention_block_backward = _cuda.attention_block_backward
residual_sum = _cuda.residual_sum
convolution = _cuda.convolution
convolution_backward = _cuda.convolution_backward
discretized_log_likelihood = _cuda.discretized_log_likelihood
vlb_term = _cuda.vlb_term
squared_error = _cuda.squared_error
squared_error_backward = _cuda.squared_error_backward
adam = _cuda.adam
grad_norm = _cuda.grad_norm
unsupported = _cuda.unsupported
