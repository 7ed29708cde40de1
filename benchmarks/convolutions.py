"""Times the layers of cpu_plan, a row for each distinct shape, against torch's conv2d.

    python benchmarks/convolutions.py [--model cifar10|fashion-mnist|FOLDER] [--batch 16]
        [--precision fp32|bf16] [--algorithm auto|direct|winograd_2|winograd_4|bf16]
        [--backward] [--json FILE] [--quick]

First each shape shows that it computes the same: a plan of it alone, and torch's conv2d in the same
precision, against the sums in float64. One that computes something else is not timed, and the exit
code is 1. Then the whole plan and torch's conv2d of each shape take turns, all batch images on all
threads.

A layer's time is the median of the plan's profiles, and holds what the plan does with the layer:
GroupNorm, SiLU and upsampling on the way in, bias, time embedding, residual and the result's
statistics on the way out. torch's is conv2d with its bias alone, warm, channels_last, on an input
that is normalised, padded and upsampled already. "alone" is our convolution with its bias and
nothing else, from an input without its border, which it has to make first. FLOP are the layer's by
its definition, twice its multiply-adds: Winograd's algorithm needs fewer, and can pass the ceiling,
the rate of multiply-adds from registers. No numbers are kept here.

With --backward, instead: the gradients of x and of the weight of each shape, by ops.convolution and
by torch's convolution_backward, channels_last, checked against float64. Ours starts from x and
returns its gradient; torch's from what is upsampled and padded already.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # the checkout that this file is in
sys.path.insert(0, str(Path(__file__).parent))

import convolution_gradients
import torch
import torch.nn.functional as F
from machine import ceiling, environment
from networks import make_model, relative_error
from tabulate import tabulate
from torch import Tensor

from fastddpm import UNet, _native
from fastddpm.engine.cpu_plan import build_plan, time_rows, unsupported
from fastddpm.unet.network import Downsample, Upsample

CPU = torch.device("cpu")
# rms(error) / rms(y) at most: all may round as they like, but not compute something else
ALLOWED = {"fp32": 1e-4, "bf16": 1e-2}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LEAST = 2e-3  # seconds of a turn of conv2d


@dataclass(frozen=True)
class Shape:
    """What distinguishes layers: height and width are y's; stride and repeat (2: each pixel of x
    becomes 2x2 first) as in csrc/cpu/plan/plan.h; kernel 0: attention, no convolution."""

    algorithm: str
    kernel: int
    c_in: int
    c_out: int
    height: int
    width: int
    stride: int = 1
    repeat: int = 1

    def __str__(self) -> str:
        if not self.kernel:
            return "softmax(q k) v"
        change = {(2, 1): ", stride 2", (1, 2): ", upsampled"}.get((self.stride, self.repeat), "")
        return f"{self.kernel}x{self.kernel}{change}"


@dataclass
class Layers:
    """Of one shape. weight (c_out, c_in, k, k), bias: the first one's; border: of zeros, before
    and after; at: their places in the plan; seconds: of torch's conv2d, a turn each."""

    shape: Shape
    flop: float
    weight: Tensor | None
    bias: Tensor | None
    border: tuple[int, int]
    at: list[int] = field(default_factory=list)
    errors: tuple[float, float] | None = None  # the plan's, torch's
    seconds: list[float] = field(default_factory=list)
    alone: Any = None
    own: list[float] = field(default_factory=list)

    def input(self, batch: int) -> Tensor:
        """Random, as the layer's convolution reads it: upsampled, without its border."""
        s = self.shape
        random = torch.Generator().manual_seed(0)
        size = (s.height * s.stride // s.repeat, s.width * s.stride // s.repeat)
        x = torch.randn(batch, s.c_in, *size, generator=random)
        return x.contiguous(memory_format=torch.channels_last)

    def padded(self, x: Tensor) -> tuple[Tensor, int]:
        """conv2d's input and padding, for the layer's x."""
        before, after = self.border
        x = x.repeat_interleave(self.shape.repeat, 2).repeat_interleave(self.shape.repeat, 3)
        if before != after:
            x, before = F.pad(x, (before, after, before, after)), 0
        return x.contiguous(memory_format=torch.channels_last), before


def layers_of(model: UNet, plan: Any) -> list[Layers]:
    """The plan's layers, those of a shape together."""
    found: dict[Shape, Layers] = {}
    for i, (name, algorithm, c_in, c_out, height, width, kernel, flop) in enumerate(plan.layers()):
        module, owner = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
        shape = Shape(
            algorithm, kernel, c_in, c_out, height, width,
            stride=2 if isinstance(owner, Downsample) else 1,
            repeat=2 if isinstance(owner, Upsample) else 1,
        )  # fmt: skip
        if shape not in found:
            border, weight, bias = (kernel // 2, kernel // 2), None, None
            if shape.stride == 2:
                border = (model.config["downsample_padding"], 1)
            if kernel:
                weight = module.weight.detach().reshape(c_out, c_in, kernel, kernel)
                bias = module.bias.detach()
            found[shape] = Layers(shape, flop, weight, bias, border)
        found[shape].at.append(i)
    return list(found.values())


@torch.inference_mode()
def check(layers: Layers, algorithm: str, precision: str) -> tuple[float, float]:
    """The errors of the plan's convolution and of torch's, relative to the sums in float64."""
    shape, weight, bias = layers.shape, layers.weight, layers.bias
    assert weight is not None
    assert bias is not None
    x = layers.input(1)
    before, after = layers.border
    bf16 = precision == "bf16"
    plan = _native.C.cpu.Plan(x.shape[2], x.shape[3], shape.c_in, bf16=bf16)
    y = plan.convolution(
        "it", [0], weight.reshape(shape.c_out, -1).contiguous(), bias.tolist(), shape.kernel,
        stride=shape.stride, before=before, after=after, repeat=shape.repeat, algorithm=algorithm,
    )  # fmt: skip
    plan.finish(y)
    if plan.layers()[0][1] != shape.algorithm:
        raise RuntimeError(f"alone, {shape} runs as {plan.layers()[0][1]}, not {shape.algorithm}")
    layers.alone = plan
    ours = torch.empty(1, shape.c_out, shape.height, shape.width)
    plan.forward(x, torch.empty(0), ours, torch.get_num_threads())
    x, padding = layers.padded(x)
    truth = F.conv2d(x.double(), weight.double(), bias.double(), shape.stride, padding)
    x, weight, bias = (tensor.to(DTYPES[precision]) for tensor in (x, weight, bias))
    theirs = F.conv2d(x, weight, bias, shape.stride, padding)
    return relative_error(ours, truth), relative_error(theirs, truth)


class Alone:
    """The plan of a convolution and its bias, ready to be timed."""

    @torch.inference_mode()
    def __init__(self, layers: Layers, batch: int):
        shape = layers.shape
        y = torch.empty(batch, shape.c_out, shape.height, shape.width)
        y = y.contiguous(memory_format=torch.channels_last)
        self.plan = layers.alone
        self.arguments = (layers.input(batch), torch.empty(0), y, torch.get_num_threads())
        self.calls = 1
        self.calls = math.ceil(LEAST / self.seconds())

    @torch.inference_mode()
    def seconds(self) -> float:
        """Of a call, the mean of some after one that warms up, without its input's way in."""
        times = [self.plan.profile(*self.arguments)[0] for _ in range(self.calls + 1)]
        return statistics.mean(times[1:])


class Conv2d:
    """torch's, ready to be timed."""

    @torch.inference_mode()
    def __init__(self, layers: Layers, batch: int, dtype: torch.dtype):
        assert layers.weight is not None
        assert layers.bias is not None
        x, padding = layers.padded(layers.input(batch))
        weight = layers.weight.to(dtype, memory_format=torch.channels_last)
        bias = layers.bias.to(dtype)
        self.arguments = (x.to(dtype), weight, bias, layers.shape.stride, padding)
        self.calls = 1
        self.calls = math.ceil(LEAST / self.seconds())

    @torch.inference_mode()
    def seconds(self) -> float:
        """Of a call, the mean of some after one that warms up."""
        F.conv2d(*self.arguments)
        start = time.perf_counter()
        for _ in range(self.calls):
            F.conv2d(*self.arguments)
        return (time.perf_counter() - start) / self.calls


def measure(
    model: UNet, plan: Any, shapes: list[Layers], dtype: torch.dtype, batch: int, repeats: int
) -> tuple[list[float], list[float]]:
    """(median seconds of each layer of the plan, seconds of its whole forward in each turn)."""
    x = torch.randn(batch, model.in_channels, *model.image_size)
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty(batch, model.config["out_channels"], *model.image_size)
    out = out.contiguous(memory_format=torch.channels_last)
    row, threads = time_rows(model, torch.tensor([500]))[0], torch.get_num_threads()
    convolutions = [layers for layers in shapes if layers.shape.kernel]
    contestants = [
        (layers, Conv2d(layers, batch, dtype), Alone(layers, batch)) for layers in convolutions
    ]
    profiles: list[list[float]] = []
    whole: list[float] = []
    plan.profile(x, row, out, threads)
    plan.forward(x, row, out, threads)
    for _ in range(repeats):
        profiles.append(plan.profile(x, row, out, threads))
        start = time.perf_counter()
        plan.forward(x, row, out, threads)
        whole.append(time.perf_counter() - start)
        for layers, conv2d, alone in contestants:
            layers.seconds.append(conv2d.seconds())
            layers.own.append(alone.seconds())
    return [statistics.median(times) for times in zip(*profiles, strict=True)], whole


def rows_of(
    shapes: list[Layers], seconds: list[float], batch: int, ceiling: float | None
) -> list[dict[str, Any]]:
    """A row a shape, the longest first; times and rates of all its layers together."""
    rows = []
    for layers in shapes:
        shape, count = layers.shape, len(layers.at)
        ours = sum(seconds[i] for i in layers.at)
        row: dict[str, Any] = {
            **vars(shape), "layers": count, "ms": ours * 1e3, "share": ours / sum(seconds),
            "GFLOP/s": batch * count * layers.flop / ours / 1e9,
        }  # fmt: skip
        if ceiling:
            row["of ceiling"] = row["GFLOP/s"] * 1e9 / ceiling
        if layers.errors:
            theirs = statistics.median(layers.seconds) * count
            row |= {"torch ms": theirs * 1e3, "x torch": theirs / ours}
            row["alone x torch"] = theirs / (statistics.median(layers.own) * count)
            row["error"], row["torch error"] = layers.errors
        rows.append(row)
    return sorted(rows, key=lambda row: -row["ms"])


def table(rows: list[dict[str, Any]], shapes: list[Layers]) -> str:
    named = {tuple(vars(layers.shape).values()): str(layers.shape) for layers in shapes}
    formats = {
        "layers": "d", "ms": ".3g", "share": ".1%", "GFLOP/s": ".3g", "of ceiling": ".0%",
        "torch ms": ".3g", "x torch": ".2f", "alone x torch": ".2f", "error": ".1e",
        "torch error": ".1e",
    }  # fmt: skip
    return tabulate(
        [
            {
                "algorithm": row["algorithm"],
                "": named[tuple(row[key] for key in vars(shapes[0].shape))],
                "channels": f"{row['c_in']} -> {row['c_out']}",
                "size of y": f"{row['height']}x{row['width']}",
                **{key: f"{row[key]:{how}}" if key in row else "" for key, how in formats.items()},
            }
            for row in rows
        ],
        headers="keys", tablefmt="simple", disable_numparse=True,
    )  # fmt: skip


def backward(
    shapes: list[Layers], options: argparse.Namespace, facts: dict[str, Any], rate: float | None
) -> int:
    """main's, of the gradients."""
    dtype = DTYPES[options.precision]
    rows = convolution_gradients.rows_of(shapes, options.batch, dtype, options.repeats, rate)
    wrong = 0
    for row in rows:
        for who, error in (("ops.convolution", row["error"]), ("torch", row["torch error"])):
            if not error <= ALLOWED[options.precision]:
                wrong += 1
                print(f"{who} is off by {error:.2g} in {row}", file=sys.stderr)
    if wrong:
        return 1
    print(convolution_gradients.table(rows))
    totals = {
        f"{who} {kind}": sum(row[key] for row in rows if row["kind"] == kind) / options.batch
        for kind in convolution_gradients.KINDS
        for who, key in (("ours", "ms"), ("torch's", "torch ms"))
    }
    _report("ms an image", totals, rows, facts, rate, options.json)
    return 0


def _report(
    unit: str,
    totals: dict[str, float],
    rows: list[dict[str, Any]],
    facts: dict[str, Any],
    rate: float | None,
    path: Path | None,
) -> None:
    """The totals under a table, and all of it into a file, if there is to be one."""
    print(f"\n{unit}: " + ", ".join(f"{name} {ms:.3g}" for name, ms in totals.items()))
    if path is not None:
        ceiling = rate and rate / 1e9
        report = {"environment": facts, "ceiling GFLOP/s": ceiling, unit: totals, "rows": rows}
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--json", type=Path, help="write environment and rows to this file")
    parser.add_argument("--model", default="cifar10", help="cifar10, a bundled name or a folder")
    parser.add_argument("--batch", type=int, default=16, help="images, default 16")
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--algorithm", default="auto", help="of the 3x3 convolutions of stride 1")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7, help="turns, default 7")
    parser.add_argument("--backward", action="store_true", help="the gradients, not the plan")
    parser.add_argument("--quick", action="store_true", help="a tiny cifar10, to see that it runs")
    options = parser.parse_args(arguments)
    if min(options.batch, options.threads, options.repeats) < 1:
        parser.error("--batch, --threads and --repeats must be at least 1")
    torch.set_num_threads(options.threads)
    try:
        model = make_model(options.model, options.quick)
        if reason := unsupported(model, CPU):
            parser.error(reason)
        plan = build_plan(model, *model.image_size, options.algorithm, options.precision)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    facts = {**environment(), "model": options.model, "batch": options.batch}
    facts["precision"] = options.precision
    for name, value in facts.items():
        print(f"{name:<12} {value}")
    dtype = DTYPES[options.precision]
    rate, what = ceiling(dtype, CPU, options.threads, quick=options.quick)
    print(f"{'ceiling':<12} {rate / 1e9:.3g} GFLOP/s: {what}\n" if rate else f"no ceiling: {what}")

    shapes = layers_of(model, plan)
    if options.backward:
        return backward(shapes, options, facts, rate)
    wrong = 0
    for layers in shapes:
        if not layers.shape.kernel:
            continue
        layers.errors = check(layers, options.algorithm, options.precision)
        own = layers.shape.algorithm if layers.shape.algorithm == "bf16" else "fp32"
        for who, error, precision in zip(
            ("cpu_plan", "conv2d"), layers.errors, (own, options.precision), strict=True
        ):
            if not error <= ALLOWED[precision]:
                wrong += 1
                print(f"{who} is off by {error:.2g} in {layers.shape}", file=sys.stderr)
    if wrong:
        return 1
    seconds, whole = measure(model, plan, shapes, dtype, options.batch, options.repeats)
    rows = rows_of(shapes, seconds, options.batch, rate)
    print(table(rows, shapes))
    totals = {
        "layers one by one": sum(seconds) * 1e3 / options.batch,
        "whole plan": statistics.median(whole) * 1e3 / options.batch,
        "conv2d of all": sum(row.get("torch ms", 0.0) for row in rows) / options.batch,
    }
    _report("ms an image-step", totals, rows, facts, rate, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
