"""adam and grad_norm: one launch a tensor, every element read and written once."""

import torch
import triton
import triton.language as tl

from fastddpm.kernels.storage import INTERPRETED, load, store
from fastddpm.kernels.tiles import power_of_two

BLOCK = 512  # elements of a program
SQUARES = 8192  # of one that only reads

LARGEST = torch.finfo(torch.float32).max


@triton.jit(do_not_specialize=["i"])
def _adam_kernel(
    param, grad, exp_avg, exp_avg_sq, average, copy, step, rates, share, i, size,
    rest1, beta2, rest2, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    # step: (scale, whether it counts); rates: (step size, root) of each tensor
    if tl.load(step + 1) != 0.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        g = load(grad + at, inside) * tl.load(step)
        p, m, v = (
            load(param + at, inside),
            load(exp_avg + at, inside),
            load(exp_avg_sq + at, inside),
        )
        m += rest1 * (g - m)
        v = beta2 * v + rest2 * g * g
        root = tl.sqrt_rn(v) * tl.load(rates + 2 * i + 1) + eps
        p -= tl.load(rates + 2 * i) * tl.div_rn(m, root)
        store(exp_avg + at, m, inside)
        store(exp_avg_sq + at, v, inside)
        store(param + at, p, inside)
        if average is not None:
            mean = load(average + at, inside)
            store(average + at, mean + tl.load(share) * (p - mean), inside)
        if copy is not None:
            store(copy + at, p, inside)


@triton.jit
def _squares_kernel(x, sums, size, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    at = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = load(x + at, at < size).to(tl.float64)
    tl.store(sums + program, tl.sum(values * values, 0))


def _block(size, block):
    """Elements of a program: the interpreter takes its time by the program."""
    return max(block, power_of_two(size) // 4) if INTERPRETED.value else block


def adam(
    params, grads, exp_avgs, exp_avg_sqs, steps, averages, copies, *,
    lr, share, norm, refused, beta1, beta2, eps, clip, grad_scale,
):  # fmt: skip
    counts, scale = torch.ones_like(lr), torch.ones_like(lr)
    if norm is not None:
        counts = (norm.abs() <= LARGEST).float()
        scale = ((norm + 1e-6) / clip).clamp(min=1).reciprocal()
    if refused is not None:
        counts = counts * (refused == 0)
    step = torch.stack((scale / grad_scale, counts))
    taken = torch.stack(steps).double() + 1
    rates = (lr.double() / (1 - beta1**taken), (1 - beta2**taken).rsqrt())
    rates = torch.stack(rates, 1).float()
    torch._foreach_add_(steps, counts)
    for i, p in enumerate(params):
        if size := p.numel():
            block = _block(size, BLOCK)
            _adam_kernel[(triton.cdiv(size, block),)](
                p, grads[i], exp_avgs[i], exp_avg_sqs[i],
                averages[i] if averages else None, copies[i] if i < len(copies) else None,
                step, rates, share, i, size, 1 - beta1, beta2, 1 - beta2, eps, BLOCK=block,
            )  # fmt: skip


def grad_norm(grads):
    """() float32."""
    blocks = [_block(x.numel(), SQUARES) for x in grads]
    counts = [triton.cdiv(x.numel(), block) for x, block in zip(grads, blocks, strict=True)]
    sums = torch.zeros(max(sum(counts), 1), dtype=torch.float64, device=grads[0].device)
    first = 0
    for x, block, count in zip(grads, blocks, counts, strict=True):
        if count:
            _squares_kernel[(count,)](x, sums[first:], x.numel(), BLOCK=block)
            first += count
    return sums.sum().sqrt().float()
