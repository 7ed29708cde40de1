"""The cases of benchmarks/ops.py: each op at its shapes beside eager torch and the formula that
torch.compile gets. No clock and no table."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from fastddpm import Schedule, ops, reference

GROUPS = 32
T = 1000


@dataclass
class Case:
    """One row: functions without arguments that compute the same, and how to judge them.

    truth: the float64 result;  bytes: what has to move at least
    Of several results, the gradients of one op, the first is judged: that of the images.
    checked: the contestants whose values have to be those of `truth`
    """

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    contestants: dict[str, Callable]
    truth: Callable[[], Tensor | tuple[Tensor, ...]]
    bytes: int
    checked: tuple[str, ...] = ("fastddpm", "eager", "compile")
    errors: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)


def images(shape, dtype, device) -> Tensor:
    return torch.randn(shape, device=device).to(dtype).contiguous(memory_format=torch.channels_last)


def per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def noise_case(shape, dtype, device, drawn: bool) -> Case:
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    eps, table = images(shape, dtype, device), Schedule.linear().table(device=device)
    t = torch.randint(0, T, shape[:1], device=device)
    index = torch.arange(shape[0], device=device)
    sqrt_ab, sqrt_1m_ab = table[:, 0].to(dtype), table[:, 1].to(dtype)

    def eager():
        z = torch.randn_like(eps) if drawn else eps
        x0 = pixels.to(dtype) / 127.5 - 1
        return per_image(sqrt_ab[t]) * x0 + per_image(sqrt_1m_ab[t]) * z

    def plain():
        z = torch.randn_like(eps) if drawn else eps
        return reference.noise(pixels, t, table, eps=z, dtype=dtype)[0]

    stream = {"seed": 0, "sample_index": index, "dtype": dtype} if drawn else {"eps": eps}

    def fused():
        return ops.noise(pixels, t, table, **stream)[0]

    def truth():
        z = ops.noise(pixels, t, table, **stream)[1] if drawn else eps
        return reference.noise(pixels, t, table.double(), eps=z.double())[0]

    return Case(
        "noise, drawn" if drawn else "noise", shape, dtype,
        {"fastddpm": fused, "eager": eager, "compile": plain}, truth,
        pixels.numel() * (1 + 2 * dtype.itemsize),
        checked=("fastddpm",) if drawn else ("fastddpm", "eager", "compile"),
    )  # fmt: skip


def posterior_case(shape, dtype, device, drawn: bool) -> Case:
    xt, out, z = (images(shape, dtype, device) for _ in range(3))
    t = torch.randint(1, T, shape[:1], device=device)
    index = torch.arange(shape[0], device=device)
    table = Schedule.linear().table(device=device)
    columns = [column.to(dtype) for column in table.unbind(1)]

    def eager():
        _, _, inv_sqrt_ab, sqrt_inv_ab_m1, mean_x0, mean_xt, sigma, _ = (
            per_image(column[t]) for column in columns
        )
        x0 = (inv_sqrt_ab * xt - sqrt_inv_ab_m1 * out).clamp(-1, 1)
        normals = torch.randn_like(z) if drawn else z
        return mean_x0 * x0 + mean_xt * xt + sigma * normals

    def plain():
        normals = torch.randn_like(z) if drawn else z
        return reference.posterior_step(xt, out, t, table, z=normals)

    stream = {"seed": 0, "sample_index": index} if drawn else {"z": z}

    def truth():
        normals = ops.randn(shape, step=t, **stream) if drawn else z
        tensors = (x.double() for x in (xt, out))
        return reference.posterior_step(*tensors, t, table.double(), z=normals.double())

    return Case(
        "posterior_step, drawn" if drawn else "posterior_step", shape, dtype,
        {
            "fastddpm": lambda: ops.posterior_step(xt, out, t, table, **stream),
            "eager": eager,
            "compile": plain,
        },
        truth, xt.numel() * (3 if drawn else 4) * dtype.itemsize,
        checked=("fastddpm",) if drawn else ("fastddpm", "eager", "compile"),
    )  # fmt: skip


def gradient(function: Callable, inputs: list[Tensor], grad: Tensor) -> Callable:
    """A function that gives the gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = function(*leaves)
    return lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True)


def norm_case(shape, dtype, device, backward: bool) -> Case:
    x, grad = images(shape, dtype, device), images(shape, dtype, device)
    weight, bias = (torch.randn(shape[1], device=device).to(dtype) for _ in range(2))

    def fused(x, weight, bias):
        return ops.group_norm_silu(x, GROUPS, weight, bias)

    def eager(x, weight, bias):
        return F.silu(F.group_norm(x, GROUPS, weight, bias, 1e-6))

    def formula(grad=grad, x=x, weight=weight, bias=bias):
        # All of them: a compiler leaves out what is not returned.
        return reference.group_norm_silu_backward(
            grad, x, GROUPS, weight, bias, 1e-6, None, None, True
        )[:3]

    exact = [y.double() for y in (x, weight, bias)]
    if backward:
        contestants = {
            "fastddpm": gradient(fused, [x, weight, bias], grad),
            "eager": gradient(eager, [x, weight, bias], grad),
            "compile": formula,
        }
    else:
        contestants = {
            "fastddpm": lambda: fused(x, weight, bias),
            "eager": lambda: eager(x, weight, bias),
            "compile": lambda: reference.group_norm_silu(x, GROUPS, weight, bias),
        }
    return Case(
        "group_norm_silu" + ", backward" * backward, shape, dtype, contestants,
        (lambda: formula(grad.double(), *exact))
        if backward
        else (lambda: reference.group_norm_silu(exact[0], GROUPS, *exact[1:])),
        x.numel() * (3 if backward else 2) * dtype.itemsize,
    )  # fmt: skip


def fused_case(shape, dtype, device, sources: bool) -> Case:
    """The norm with what stands before it: a bias and a residual, their sum written too; or two
    sources of `shape` each.
    """
    n, c = shape[:2]
    x, other = images(shape, dtype, device), images(shape, dtype, device)
    before = torch.randn(n, c, device=device).to(dtype)
    channels = 2 * c if sources else c
    weight, bias = (torch.randn(channels, device=device).to(dtype) for _ in range(2))
    given = {"x2": other} if sources else {"before": before, "residual": other}

    def fused():
        return ops.group_norm_silu(x, GROUPS, weight, bias, **given)

    def eager():
        if sources:
            h = torch.cat((x, other), 1)
        else:
            h = x + before[:, :, None, None] + other
        y = F.silu(F.group_norm(h, GROUPS, weight, bias, 1e-6))
        return y if sources else (y, h)

    def formula(x=x, weight=weight, bias=bias, given=given):
        return reference.group_norm_silu(x, GROUPS, weight, bias, **given)

    def truth():
        exact = {name: value.double() for name, value in given.items()}
        return formula(x.double(), weight.double(), bias.double(), exact)

    return Case(
        "group_norm_silu, " + ("two sources" if sources else "bias and residual"), shape, dtype,
        {"fastddpm": fused, "eager": eager, "compile": formula}, truth,
        x.numel() * 4 * dtype.itemsize,
    )  # fmt: skip


def sum_case(shape, dtype, device) -> Case:
    x, residual = (images(shape, dtype, device) for _ in range(2))
    before = torch.randn(shape[1], device=device).to(dtype)

    def plain(x=x, residual=residual, before=before):
        return x + residual + before[:, None, None]

    return Case(
        "residual_sum", shape, dtype,
        {
            "fastddpm": lambda: ops.residual_sum(x, residual, before),
            "eager": plain,
            "compile": lambda: reference.residual_sum(x, residual, before),
        },
        lambda: plain(*(y.double() for y in (x, residual, before))),
        x.numel() * 3 * dtype.itemsize,
    )  # fmt: skip


def attention_case(shape, dtype, device, backward: bool) -> Case:
    n, c, h, w = shape
    x, grad = images(shape, dtype, device), images(shape, dtype, device)
    sizes = ((c,), (c,), (3 * c, c), (3 * c,), (c, c), (c,))
    parameters = [(torch.randn(size, device=device) * c**-0.5).to(dtype) for size in sizes]

    def fused(x, *p):
        return ops.attention_block(x, GROUPS, *p)

    def eager(x, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias):
        y = F.group_norm(x, GROUPS, norm_weight, norm_bias, 1e-6)
        tokens = F.linear(y.permute(0, 2, 3, 1).reshape(n, 1, h * w, c), qkv_weight, qkv_bias)
        mixed = F.scaled_dot_product_attention(*tokens.chunk(3, -1))
        projected = F.linear(mixed, proj_weight, proj_bias)
        return x + projected.reshape(n, h, w, c).permute(0, 3, 1, 2)

    def formula(grad=grad, x=x, p=parameters):
        return reference.attention_block_backward(grad, x, GROUPS, *p, 1, 1e-6)

    exact = [y.double() for y in (x, *parameters)]
    if backward:
        contestants = {
            "fastddpm": gradient(fused, [x, *parameters], grad),
            "eager": gradient(eager, [x, *parameters], grad),
            "compile": formula,
        }
    else:
        contestants = {
            "fastddpm": lambda: fused(x, *parameters),
            "eager": lambda: eager(x, *parameters),
            "compile": lambda: reference.attention_block(x, GROUPS, *parameters),
        }
    weights = sum(p.numel() for p in parameters)
    return Case(
        "attention_block" + ", backward" * backward, shape, dtype, contestants,
        (lambda: formula(grad.double(), exact[0], exact[1:]))
        if backward
        else (lambda: reference.attention_block(exact[0], GROUPS, *exact[1:])),
        (x.numel() * (3 if backward else 2) + weights * (1 + backward)) * dtype.itemsize,
    )  # fmt: skip


def likelihood_case(shape, dtype, device) -> Case:
    x = (torch.randint(0, 256, shape, device=device) / 127.5 - 1).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    mean = (x + 0.05 * images(shape, torch.float32, device)).to(dtype)
    log_scale = (images(shape, torch.float32, device) - 3).to(dtype)
    arguments = (x, mean, log_scale)

    def plain():
        return reference.discretized_log_likelihood(*arguments)

    return Case(
        "discretized_log_likelihood", shape, dtype,
        {
            "fastddpm": lambda: ops.discretized_log_likelihood(*arguments),
            "eager": plain,
            "compile": plain,
        },
        lambda: reference.discretized_log_likelihood(*(y.double() for y in arguments)),
        x.numel() * 4 * dtype.itemsize,
    )  # fmt: skip


def term_case(shape, dtype, device) -> Case:
    """Terms of the bound at t >= 1, beside the formula as others compute it: two Gaussians' means,
    and their divergence in float32, which loses digits late in the chain and so is not checked."""
    x0 = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    x0 = x0.contiguous(memory_format=torch.channels_last)
    xt, out = (images(shape, dtype, device) for _ in range(2))
    t = torch.randint(1, T, shape[:1], device=device)
    schedule = Schedule.linear()
    table = schedule.table(device=device)
    ratio = torch.as_tensor(schedule.log_variance_ratio(), dtype=torch.float32, device=device)
    log_true = torch.as_tensor(schedule.posterior_log_variance, device=device).float()

    def plain():
        _, _, inv_sqrt_ab, sqrt_inv_ab_m1, mean_x0, mean_xt, _, log_variance = (
            per_image(column[t]) for column in table.unbind(1)
        )
        image = x0.float() / 127.5 - 1
        predicted = (inv_sqrt_ab * xt - sqrt_inv_ab_m1 * out).clamp(-1, 1)
        true, mean = (mean_x0 * x + mean_xt * xt for x in (image, predicted))
        apart = log_variance - per_image(log_true[t])
        kl = 0.5 * (apart - 1 + torch.exp(-apart) + (true - mean) ** 2 * torch.exp(-log_variance))
        return kl.mean(dim=(1, 2, 3)) / math.log(2), (predicted - image).square().mean((1, 2, 3))

    def truth():
        doubles = (x.double() for x in (xt, out))
        return reference.vlb_term(x0, *doubles, t, table.double(), ratio.double())

    return Case(
        "vlb_term", shape, dtype,
        {
            "fastddpm": lambda: ops.vlb_term(x0, xt, out, t, table, ratio),
            "eager": plain,
            "compile": plain,
        },
        truth, xt.numel() * (1 + 2 * dtype.itemsize), checked=("fastddpm",),
    )  # fmt: skip


def squared_case(shape, dtype, device, backward: bool) -> Case:
    prediction, target = images(shape, dtype, device), images(shape, dtype, device)
    grad = torch.full((), 1 / shape[0], device=device).expand(shape[0])  # of a mean over the batch

    def plain(prediction, target):
        return (prediction - target).square().mean(dim=(1, 2, 3), dtype=torch.float32)

    functions = {"fastddpm": ops.squared_error, "eager": plain, "compile": reference.squared_error}
    exact = [x.double() for x in (prediction, target)]
    if not backward:
        return Case(
            "squared_error", shape, dtype,
            {
                name: functools.partial(function, prediction, target)
                for name, function in functions.items()
            },
            lambda: plain(*exact), prediction.numel() * 2 * dtype.itemsize,
        )  # fmt: skip

    def backward_of(function):
        return gradient(lambda x: function(x, target), [prediction], grad)

    return Case(
        "squared_error backward", shape, dtype,
        {
            "fastddpm": backward_of(ops.squared_error),
            "eager": backward_of(plain),
            "compile": lambda: reference.squared_error_backward(grad, prediction, target),
        },
        lambda: reference.squared_error_backward(grad.double(), *exact),
        prediction.numel() * 3 * dtype.itemsize,
    )  # fmt: skip


def sweep_tensors(elements: int, device) -> dict[str, list[Tensor]]:
    """What Adam keeps of 300 parameters of a U-Net's sizes, so many elements in all."""
    sizes = torch.logspace(0, 2.5, 300)
    sizes = (sizes * (elements / sizes.sum())).long().clamp(min=1).tolist()
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "averages")
    kept = {name: [torch.randn(n, device=device) for n in sizes] for name in names}
    kept["exp_avg_sqs"] = [v.square() for v in kept["exp_avg_sqs"]]
    kept["steps"] = [torch.zeros((), device=device) for _ in sizes]
    return kept


def norm_of_case(shape, dtype, device) -> Case:
    grads = [g.to(dtype) for g in sweep_tensors(shape[0], device)["grads"]]
    flat = torch.cat(grads)

    def eager():
        return torch.nn.utils.get_total_norm(grads)

    return Case(
        "grad_norm", shape, dtype,
        {
            "fastddpm": lambda: ops.grad_norm(grads),
            "eager": eager,
            "compile": lambda: flat.square().sum().sqrt(),
        },
        lambda: torch.cat([g.double() for g in grads]).norm(), shape[0] * dtype.itemsize,
    )  # fmt: skip


def adam_case(shape, dtype, device) -> Case:
    """Clipping by a norm that is known, Adam and the average. Each contestant has its own state,
    whose first parameter is judged after the first step of it."""
    lr, share, clip = 1e-3, 1e-2, 1.0

    def torchs(kept):
        params = [p.requires_grad_() for p in kept["params"]]
        for p, g in zip(params, kept["grads"], strict=True):
            p.grad = g
        adam = torch.optim.Adam(params, lr=lr, fused=True)

        @torch.no_grad()
        def step():
            torch.nn.utils.clip_grads_with_norm_(params, clip, norm)
            adam.step()
            torch._foreach_lerp_(kept["averages"], params, share)
            return params[0]

        return step

    def ours(kept):
        lists = [kept[k] for k in ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps")]
        for moments in lists[2:4]:
            torch._foreach_zero_(moments)

        def step():
            ops.adam(*lists, kept["averages"], lr=lr, share=share, clip=clip, norm=norm)
            return kept["params"][0]

        return step

    def formula(kept):
        """As one tensor each, the best that a compiler can get."""
        p, g, m, v, average = (
            torch.cat(kept[k]) for k in ("params", "grads", "exp_avgs", "exp_avg_sqs", "averages")
        )

        def step():
            scaled = g * (clip / (norm + 1e-6)).clamp(max=1)
            m.lerp_(scaled, 0.1)
            v.mul_(0.999).addcmul_(scaled, scaled, value=0.001)
            p.sub_(lr * m / (v.sqrt() + 1e-8))
            average.lerp_(p, share)
            return p

        return step

    def made():
        torch.manual_seed(1)
        return sweep_tensors(shape[0], device)

    norm = torch.full((), 0.5, device=device)  # clipped gradients would shrink with every call
    double = {name: [x.double() for x in tensors] for name, tensors in made().items()}
    double["steps"] = [step.float() for step in double["steps"]]

    def truth():
        zeros = [[torch.zeros_like(p) for p in double["params"]] for _ in range(2)]
        reference.adam(
            double["params"], double["grads"], *zeros, double["steps"], [], [],
            lr=torch.tensor(lr).double(), share=None, norm=norm.double(), refused=None,
            beta1=0.9, beta2=0.999, eps=1e-8, clip=clip, grad_scale=1.0,
        )  # fmt: skip
        return double["params"][0]

    return Case(
        "adam", shape, dtype,
        {"fastddpm": ours(made()), "eager": torchs(made()), "compile": formula(made())},
        truth, shape[0] * 9 * dtype.itemsize, checked=("fastddpm", "eager"),
    )  # fmt: skip


def cases(quick: bool, device: torch.device) -> Iterator[Callable[[], Case]]:
    """The CIFAR-10 U-Net's shapes at batch 1 and 16, on a GPU at 16 and 256, then sizes past the
    caches: on a CPU tensors of 25 MB, the most that glibc's malloc recycles (larger results would
    time the kernel's page faults), on a GPU of 200 MB.
    """
    if device.type == "cuda":
        batches, large = (16, 256), (16384, 768)
    else:
        batches, large = (1, 16), (2048, 48)
    if quick:
        batches, large = (2,), ()
    for elements in (10_000,) if quick else (1_000_000, 35_700_000):
        yield functools.partial(norm_of_case, (elements,), torch.float32, device)
        yield functools.partial(adam_case, (elements,), torch.float32, device)
    dtypes = (torch.float32, torch.bfloat16)
    pixels = [(n, 3, 32, 32) for n in (*batches, *large[:1])]
    feature_maps = [
        (n, c, size, size)
        for n in batches
        for c, size in (((32, 4),) if quick else ((128, 32), (256, 16), (256, 8), (256, 4)))
    ]
    feature_maps += [(n, 128, 32, 32) for n in large[1:]]
    attention_maps = [(n, 32, 4, 4) if quick else (n, 256, 16, 16) for n in batches]
    if device.type == "cuda":
        attention_maps += [(n, 256, 16, 16) for n in large[1:]]
    for dtype in dtypes:
        for drawn in (False, True):
            for shape in pixels:
                yield functools.partial(noise_case, shape, dtype, device, drawn)
            for shape in pixels:
                yield functools.partial(posterior_case, shape, dtype, device, drawn)
        for backward in (False, True):
            for shape in feature_maps:
                yield functools.partial(norm_case, shape, dtype, device, backward)
            for shape in attention_maps:
                yield functools.partial(attention_case, shape, dtype, device, backward)
        for sources in (False, True):
            for shape in feature_maps:
                yield functools.partial(fused_case, shape, dtype, device, sources)
        for shape in feature_maps:
            yield functools.partial(sum_case, shape, dtype, device)
        for shape in pixels:
            yield functools.partial(likelihood_case, shape, dtype, device)
            yield functools.partial(term_case, shape, dtype, device)
        for backward in (False, True):
            for shape in pixels:
                yield functools.partial(squared_case, shape, dtype, device, backward)
