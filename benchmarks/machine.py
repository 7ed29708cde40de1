"""What a benchmark says about the machine that it ran on, and the rate that it could reach."""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import time
from pathlib import Path

import torch

from fastddpm import _native


def environment() -> dict:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load": [round(load, 2) for load in os.getloadavg()],
        "isa": _native.isa(),
        "torch": torch.__version__,
        "torch isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }


def milliseconds(seconds: list[float]) -> str:
    low, middle, high = (x * 1e3 for x in (min(seconds), statistics.median(seconds), max(seconds)))
    return f"{middle:.3g} ({low:.3g}-{high:.3g})"


def ceiling(
    dtype: torch.dtype, device: torch.device, threads: int, *, quick: bool = False
) -> tuple[float | None, str]:
    """(FLOP/s that a product can reach in dtype, what that is; or None, why it is not known):
    multiply-adds from registers on a CPU's cores, `threads` or all, bfloat16 products from the
    first cache, torch's matrix products elsewhere."""
    if device.type != "cpu":
        return gemm_ceiling(dtype, device, quick=quick), "torch's matrix product"
    if _native.C is None:
        return None, f"{_native.reason}"
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    try:
        cores = min(threads, os.cpu_count() or threads)
        rate = _native.C.cpu.peak_flops(cores, 0.02 if quick else 0.5, precision)
    except ValueError as error:
        return None, str(error)
    what = "multiply-adds from registers" if precision == "fp32" else "products from the L1 cache"
    return rate, f"{what}, {_native.isa()}"


def gemm_ceiling(dtype: torch.dtype, device: torch.device, *, quick: bool = False) -> float:
    """FLOP/s: the largest rate at which torch multiplies two square matrices, on all threads."""
    sizes = (128,) if quick else (1024, 2048, 4096, 8192)
    best = 0.0
    for n in sizes:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        torch.mm(a, b)
        for _ in range(5):
            synchronize(device)
            start = time.perf_counter()
            torch.mm(a, b)
            synchronize(device)
            best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_memory(device: torch.device) -> None:
    """Forget the peak so far, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch's allocator held on a GPU; the process's largest resident set on a
    CPU.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if (peak := _status("VmHWM")) is not None:
        return peak
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_memory(device: torch.device) -> int:
    """Bytes now: what torch's allocator holds on a GPU; the process's resident set on a CPU, 0
    where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS") or 0


def _status(name: str) -> int | None:
    """Bytes of a line of /proc/self/status."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        line = next(line for line in status.splitlines() if line.startswith(f"{name}:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return None
