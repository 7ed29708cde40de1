"""Times every op against eager torch and against torch.compile of the reference, on the CPU or a
GPU.

    python benchmarks/ops.py [--device cuda] [--json FILE] [--quick] [--only NAME]
        [--peers eager,compile]

Each case first shows that all contestants compute the same thing: the largest error against the
reference in float64, relative to the largest value. If an op errs more than twice as much as eager
torch plus 16 ulp, or a peer computes something else, nothing is timed and the exit code is 1.

Then all contestants take turns on the same tensors: median and range of the repeats. GB/s counts
the bytes that must move at least, each operand once; the share is of a plain copy's bandwidth,
measured at the start on the same device with tensors past the caches. On the CPU calls follow each
other, warm, by the wall clock. On a GPU each call lies between two events, after a write past the
L2 cache: tensors are cold, and the host is ahead of the device. No numbers are kept here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the checkout that this file is in
sys.path.insert(0, str(Path(__file__).parent))

import torch
from clocks import Clock, EventClock, WallClock
from machine import environment, milliseconds
from op_cases import Case, cases
from tabulate import tabulate
from torch import Tensor

from fastddpm.ops import dispatch

EQUAL = (
    "All contestants of a row get the same tensors, dtypes and memory format (NHWC), the same "
    "threads and the same clock, and allocate their results. torch.compile is max-autotune on a "
    "GPU. Backward rows time the gradients alone: eager keeps "
    "the forward pass's statistics, fastddpm and the compiled formula compute them again. Where "
    "noise is drawn the peers draw with torch.randn instead of the reproducible Philox stream, so "
    "only fastddpm's values are checked. Eager torch has no discretized_log_likelihood that is "
    "exact in float32: its row is the reference itself, in float64 inside. Adam's peers clip the "
    "gradients in place, take torch's fused step and move the average by foreach."
)


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


def timed(
    functions: dict[str, Callable], repeats: int, least: float, clock: Clock
) -> dict[str, list[float]]:
    """Seconds per call; the contestants take turns, each for at least `least` seconds."""
    calls = {}
    for name, function in functions.items():
        function()
        calls[name] = max(1, int(least / max(clock(function, 1), 1e-9)))
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            function()  # the heap that the contestant before gave back is fetched again
            seconds[name].append(clock(function, calls[name]) / calls[name])
    return seconds


def copy_bandwidth(
    device: torch.device, quick: bool, repeats: int, least: float, clock: Clock
) -> float:
    """Bytes per second, read and written, of a copy past the caches."""
    megabytes = 1 if quick else 1024 if device.type == "cuda" else 256
    source = torch.ones(megabytes << 18, device=device)
    target = torch.empty_like(source)
    seconds = timed({"copy": lambda: target.copy_(source)}, repeats, least, clock)["copy"]
    return 2 * source.numel() * source.itemsize / statistics.median(seconds)


def nothing_to_time(device: torch.device) -> str | None:
    """Why no op of ours runs on this device, or None."""
    if device.type == "cpu":
        return dispatch.load("cpu").missing
    if not torch.cuda.is_available():
        return "--device cuda: torch finds no CUDA device here"
    reasons = [dispatch.load(name).missing for name in ("cuda", "triton")]
    return None if None in reasons else f"cuda: {reasons[0]}; triton: {reasons[1]}"


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
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
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
    device = torch.device(options.device)
    if missing := nothing_to_time(device):
        print(f"there is nothing to time: {missing}", file=sys.stderr)
        return 1
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    least = 1e-4 if options.quick else 0.01
    on_gpu = device.type == "cuda"
    clock = EventClock.on(device) if on_gpu else WallClock()
    facts = {**environment(), "device": options.device, "clock": clock.what}
    if on_gpu:
        facts["device"] = torch.cuda.get_device_name(device)
    for name, value in facts.items():
        print(f"{name:<10} {value}")
    bandwidth = copy_bandwidth(device, options.quick, options.repeats, least, clock)
    print(f"{'copy':<10} {bandwidth / 1e9:.1f} GB/s read and written\n\n{EQUAL}\n")

    rows = []
    for make in cases(options.quick, device):
        case = make()
        if not case.op.startswith(options.only):
            continue
        functions = {n: f for n, f in case.contestants.items() if n in ("fastddpm", *peers)}
        if "compile" in functions:
            torch.compiler.reset()
            mode = "max-autotune-no-cudagraphs" if on_gpu else None
            functions["compile"] = torch.compile(functions["compile"], dynamic=False, mode=mode)
        case.contestants = functions
        if wrong := check(case):
            print(f"{case.op} {case.shape} {case.dtype}: {wrong}; not timed", file=sys.stderr)
            return 1
        parity = ", ".join(f"{name} {error:.1e}" for name, error in case.errors.items())
        print(f"{case.op} {tuple(case.shape)} {case.dtype}: errors {parity}", flush=True)
        case.seconds = timed(functions, options.repeats, least, clock)
        times = ", ".join(f"{name} {milliseconds(s)}" for name, s in case.seconds.items())
        print(f"  milliseconds {times}", flush=True)
        rows.append(line(case, bandwidth, peers))
    print("\n" + tabulate(rows, headers="keys", tablefmt="simple", disable_numparse=True))
    if options.json:
        report = {
            "environment": facts, "copy GB/s": bandwidth / 1e9, "equal": EQUAL, "rows": rows
        }  # fmt: skip
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
