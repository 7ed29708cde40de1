"""Times every op on the CPU against eager torch and against torch.compile of the reference.

    python benchmarks/ops.py [--json FILE] [--quick] [--only NAME] [--peers eager,compile]

Each case first shows that all contestants compute the same thing: the largest error against the
reference in float64, relative to the largest value. If an op errs more than twice as much as eager
torch plus 16 ulp, or a peer computes something else, nothing is timed and the exit code is 1.

Then all contestants take turns, warm, on the same tensors: median and range of the repeats. GB/s
counts the bytes that must move at least, each operand once; the share is of a plain copy's
bandwidth, measured at the start with tensors past the caches. No numbers are kept here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the checkout that this file is in
sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.nn.functional as F
from machine import environment, milliseconds
from tabulate import tabulate
from torch import Tensor

from fastddpm import Schedule, ops, reference
from fastddpm.ops import dispatch

GROUPS = 32
T = 1000
EQUAL = (
    "All contestants of a row get the same tensors, dtypes and memory format (NHWC), the same "
    "threads, and allocate their results. Backward rows time the gradients alone: eager keeps "
    "the forward pass's statistics, fastddpm and the compiled formula compute them again. Where "
    "noise is drawn the peers draw with torch.randn instead of the reproducible Philox stream, so "
    "only fastddpm's values are checked. Eager torch has no discretized_log_likelihood that is "
    "exact in float32: its row is the reference itself, in float64 inside."
)


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


# ---- the cases -----------------------------------------------------------------------------------


def images(shape, dtype) -> Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def noise_case(shape, dtype, drawn: bool) -> Case:
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    eps, t, index = images(shape, dtype), torch.randint(0, T, shape[:1]), torch.arange(shape[0])
    table = Schedule.linear().table()
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


def posterior_case(shape, dtype, drawn: bool) -> Case:
    xt, out, z = (images(shape, dtype) for _ in range(3))
    t, index = torch.randint(1, T, shape[:1]), torch.arange(shape[0])
    table = Schedule.linear().table()
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


def norm_case(shape, dtype, backward: bool) -> Case:
    x, grad = images(shape, dtype), images(shape, dtype)
    weight, bias = torch.randn(shape[1]).to(dtype), torch.randn(shape[1]).to(dtype)

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


def fused_case(shape, dtype, sources: bool) -> Case:
    """The norm with what stands before it: a bias and a residual, their sum written too; or two
    sources of `shape` each.
    """
    n, c = shape[:2]
    x, other = images(shape, dtype), images(shape, dtype)
    before = torch.randn(n, c).to(dtype)
    channels = 2 * c if sources else c
    weight, bias = torch.randn(channels).to(dtype), torch.randn(channels).to(dtype)
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


def attention_case(shape, dtype, backward: bool) -> Case:
    n, c, h, w = shape
    x, grad = images(shape, dtype), images(shape, dtype)
    sizes = ((c,), (c,), (3 * c, c), (3 * c,), (c, c), (c,))
    parameters = [(torch.randn(size) * c**-0.5).to(dtype) for size in sizes]

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


def likelihood_case(shape, dtype) -> Case:
    x = (torch.randint(0, 256, shape) / 127.5 - 1).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    mean = (x + 0.05 * images(shape, torch.float32)).to(dtype)
    log_scale = (images(shape, torch.float32) - 3).to(dtype)
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


def cases(quick: bool) -> Iterator[Callable[[], Case]]:
    """The CIFAR-10 U-Net's shapes at batch 1 and 16, then sizes past the caches: tensors of 25 MB,
    the most that glibc's malloc recycles. Larger results would time the kernel's page faults.
    """
    batches, large = ((2,), ()) if quick else ((1, 16), (2048, 48))
    dtypes = (torch.float32, torch.bfloat16)
    pixels = [(n, 3, 32, 32) for n in (*batches, *large[:1])]
    feature_maps = [
        (n, c, size, size)
        for n in batches
        for c, size in (((32, 4),) if quick else ((128, 32), (256, 16), (256, 8), (256, 4)))
    ]
    feature_maps += [(n, 128, 32, 32) for n in large[1:]]
    attention_maps = [(n, 32, 4, 4) if quick else (n, 256, 16, 16) for n in batches]
    for dtype in dtypes:
        for drawn in (False, True):
            for shape in pixels:
                yield lambda s=shape, d=dtype, r=drawn: noise_case(s, d, r)
            for shape in pixels:
                yield lambda s=shape, d=dtype, r=drawn: posterior_case(s, d, r)
        for backward in (False, True):
            for shape in feature_maps:
                yield lambda s=shape, d=dtype, b=backward: norm_case(s, d, b)
            for shape in attention_maps:
                yield lambda s=shape, d=dtype, b=backward: attention_case(s, d, b)
        for sources in (False, True):
            for shape in feature_maps:
                yield lambda s=shape, d=dtype, two=sources: fused_case(s, d, two)
        for shape in pixels:
            yield lambda s=shape, d=dtype: likelihood_case(s, d)


# ---- check, then time ----------------------------------------------------------------------------


def first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def check(case: Case) -> str | None:
    """Fill in case.errors; what is wrong with the values, or None."""
    truth = first(case.truth())
    size = truth.abs().max().item()
    for name, function in case.contestants.items():
        if name in case.checked:
            case.errors[name] = (first(function()).double() - truth).abs().max().item() / size
    ulps = 16 * torch.finfo(case.dtype).eps
    # Peers may round as they like, but not compute something else: bfloat16 in eager steps errs
    # by several percent.
    allowed = {name: ulps + 0.1 * torch.finfo(case.dtype).eps ** 0.5 for name in case.errors}
    allowed["fastddpm"] = ulps + 2 * case.errors.get("eager", 0.0)
    for name, error in case.errors.items():
        if not error <= allowed[name]:
            return f"{name} is off by {error:.2g} of the largest value, allowed {allowed[name]:.2g}"
    return None


def timed(functions: dict[str, Callable], repeats: int, least: float) -> dict[str, list[float]]:
    """Seconds per call; the contestants take turns, each for at least `least` seconds."""
    calls = {}
    for name, function in functions.items():
        function()
        start = time.perf_counter()
        function()
        calls[name] = max(1, int(least / (time.perf_counter() - start)))
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            function()  # the heap that the contestant before gave back is fetched again
            start = time.perf_counter()
            for _ in range(calls[name]):
                function()
            seconds[name].append((time.perf_counter() - start) / calls[name])
    return seconds


def copy_bandwidth(quick: bool, repeats: int, least: float) -> float:
    """Bytes per second, read and written, of a copy past the caches."""
    source = torch.ones((1 if quick else 64) * 1024 * 1024)
    target = torch.empty_like(source)
    seconds = timed({"copy": lambda: target.copy_(source)}, repeats, least)["copy"]
    return 2 * source.numel() * source.itemsize / statistics.median(seconds)


def line(case: Case, bandwidth: float, peers: list[str]) -> dict:
    middle = {name: statistics.median(seconds) for name, seconds in case.seconds.items()}
    rate = case.bytes / middle["fastddpm"]
    return {
        "op": case.op,
        "shape": "x".join(map(str, case.shape)),
        "dtype": str(case.dtype).removeprefix("torch."),
        "error": f"{case.errors['fastddpm']:.1e}",
        "ms": milliseconds(case.seconds["fastddpm"]),
        "GB/s": f"{rate / 1e9:.2f}",
        "of copy": f"{rate / bandwidth:.0%}",
        **{
            key: value
            for peer in peers
            for key, value in (
                (f"{peer} error", f"{case.errors[peer]:.1e}" if peer in case.errors else "-"),
                (f"{peer} ms", milliseconds(case.seconds[peer])),
                (f"x {peer}", f"{middle[peer] / middle['fastddpm']:.2f}"),
            )
        },
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write environment and rows to this file")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that it runs")
    parser.add_argument("--only", default="", help="rows whose op starts with this")
    parser.add_argument("--peers", default="eager,compile", help="default: eager,compile")
    parser.add_argument("--repeats", type=int, default=7, help="per contestant, default 7")
    parser.add_argument("--threads", type=int, help="default: torch's")
    options = parser.parse_args(arguments)
    peers = options.peers.split(",")
    if unknown := set(peers) - {"eager", "compile"}:
        parser.error(f"--peers must be of eager, compile; got {', '.join(sorted(unknown))}")
    if missing := dispatch.load("cpu").missing:
        print(f"there is nothing to time: {missing}", file=sys.stderr)
        return 1
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    least = 1e-4 if options.quick else 0.01
    for name, value in environment().items():
        print(f"{name:<10} {value}")
    bandwidth = copy_bandwidth(options.quick, options.repeats, least)
    print(f"{'copy':<10} {bandwidth / 1e9:.1f} GB/s read and written\n\n{EQUAL}\n")

    rows = []
    for make in cases(options.quick):
        case = make()
        if not case.op.startswith(options.only):
            continue
        functions = {n: f for n, f in case.contestants.items() if n in ("fastddpm", *peers)}
        if "compile" in functions:
            torch.compiler.reset()
            functions["compile"] = torch.compile(functions["compile"], dynamic=False)
        case.contestants = functions
        if wrong := check(case):
            print(f"{case.op} {case.shape} {case.dtype}: {wrong}; not timed", file=sys.stderr)
            return 1
        parity = ", ".join(f"{name} {error:.1e}" for name, error in case.errors.items())
        print(f"{case.op} {tuple(case.shape)} {case.dtype}: errors {parity}", flush=True)
        case.seconds = timed(functions, options.repeats, least)
        times = ", ".join(f"{name} {milliseconds(s)}" for name, s in case.seconds.items())
        print(f"  milliseconds {times}", flush=True)
        rows.append(line(case, bandwidth, peers))
    print("\n" + tabulate(rows, headers="keys", tablefmt="simple", disable_numparse=True))
    if options.json:
        report = {
            "environment": environment(), "copy GB/s": bandwidth / 1e9, "equal": EQUAL, "rows": rows
        }  # fmt: skip
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
