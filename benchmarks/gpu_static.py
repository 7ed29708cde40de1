"""What is known of the GPU kernels without a GPU: `python benchmarks/gpu_static.py [--arch 90]
[--step]`.

For each architecture, of every CUDA kernel (csrc/cuda, compiled by nvcc) and every Triton kernel
(kernels/, through tests/compile_triton.py where that is there): registers, spills, shared memory
and the occupancy that these allow. Then, for the ops at a U-Net's shapes, the bytes that the
kernels move against the least possible, and the time that this takes at the device's bandwidth,
beside the same count for eager torch's unfused sequence. These times are *modelled, not measured*.
--step goes on with the whole step of sampling and of training, which gpu_step.py counts.

Exit code 1 if a kernel spills registers. --json FILE writes everything.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ("-std=c++17", "-O3", "--fmad=false")  # those of CMakeLists.txt


@dataclass(frozen=True)
class Gpu:
    """Bytes/s of the vendor's data sheet; a multiprocessor's limits of the programming guide."""

    name: str
    bandwidth: float
    shared: int  # bytes of a multiprocessor for its blocks; each block takes 1 KB more
    registers: int = 65536
    threads: int = 2048
    blocks: int = 32


GPUS = {
    "80": Gpu("A100", 2.039e12, 164 << 10),
    "90": Gpu("H100", 3.35e12, 228 << 10),
    "100": Gpu("B200", 8.0e12, 228 << 10),
}


@dataclass
class Kernel:
    arch: str
    source: str  # cuda or triton
    name: str
    registers: int
    spills: int  # bytes stored
    stack: int
    static_shared: int
    threads: int = 256
    dynamic_shared: int = 0
    occupancy: float = 0.0


@dataclass(frozen=True)
class Case:
    """An op at one shape. Bytes are per element of the image, `eager` those of each torch call."""

    op: str
    kernel: str  # that carries it; with the template arguments
    what: str
    elements: int
    moved: float
    least: float
    eager: tuple[float, ...]
    shared: int = 0  # dynamic
    threads: int = 256


def resident(channels: int, plane: int, per_group: int, size: int, kept: int) -> tuple[int, int]:
    """(threads, dynamic shared bytes) of group_norm_cut.h for NHWC: make_cut, shared_bytes.

    channels: of a slab;  kept: tensors whose slab stays in shared memory
    """
    width = 16 // size
    columns = channels // width
    vectors = columns * plane
    threads = 128 if vectors <= 512 else 256
    entries = threads // 32
    groups = channels // per_group
    floats = 2 * channels * entries + 2 * channels + 5 * groups + 3 * channels
    return threads, kept * channels * plane * size + 4 * floats


def cases() -> list[Case]:
    """The ops of one denoising step: batch 128 at 32 x 32, and one that fits no shared memory."""
    images, features, large = 128 * 3 * 32 * 32, 128 * 128 * 32 * 32, 8 * 128 * 256 * 256
    # Reads and writes of each torch call, float32 (4) and bfloat16 (2).
    to_unit = (1 + 4, 4 + 4, 4 + 4)  # float(), / 127.5, - 1
    blend = (4, 4 + 4, 4 + 4, 8 + 4)  # randn, a x0, b eps, +
    x0 = (4 + 4, 4 + 4, 8 + 4, 4 + 4)  # two products, their difference, clamp
    mean = (4 + 4, 4 + 4, 8 + 4)
    norm, act = (2 + 2 + 2,), (2 + 2,)  # the statistics and the result; silu
    norm_gradient, act_gradient = (4 + 4 + 2,), (4 + 2,)
    threads, forward = resident(16, 1024, 4, 2, 1)
    back_threads, backward = resident(16, 1024, 4, 2, 2)
    return [
        Case("randn", "randn_tiles<float>", "float32 128x3x32x32", images, 4, 4, (4,)),
        Case(
            "noise", "noise_tiles<unsigned char, float, 3>",
            "uint8 -> float32, eps drawn, 128x3x32x32 NHWC",
            images, 9, 9, to_unit + blend,
        ),
        Case(
            "posterior_step", "posterior_step_tiles<float, float, 3>",
            "float32, z drawn, in place, 128x3x32x32 NHWC",
            images, 12, 12, x0 + mean + (4, 4 + 4, 8 + 4),
        ),
        Case(
            "group_norm_silu", "group_norm_silu_resident<BF16, pixels, false>",
            "bfloat16 128x128x32x32 NHWC, 32 groups",
            features, 4, 4, norm + act, forward, threads,
        ),
        Case(
            "group_norm_silu", "group_norm_silu_apply<BF16, pixels, false>",
            "bfloat16 8x128x256x256 NHWC, 32 groups, two passes",
            large, 6, 4, norm + act,
        ),
        Case(
            "group_norm_silu_backward", "group_norm_silu_backward_resident<BF16, pixels>",
            "bfloat16 128x128x32x32 NHWC, 32 groups",
            features, 6, 6, norm_gradient + act_gradient, backward, back_threads,
        ),
        Case(
            "discretized_log_likelihood", "discretized_log_likelihood_vectors<float>",
            "float32 128x3x32x32; bound by float64 arithmetic, not by memory",
            images, 16, 16, (12, 8, 8) + 2 * (8, 12, 8, 8, 8, 8) + (12, 8, 8) + 2 * (8, 8, 5, 13),
        ),
        Case(
            "vlb_term", "vlb_term_parts",
            "uint8, x_t and eps float32, 128x3x32x32 NCHW; bound by float64 arithmetic at t = 0",
            images, 9, 9,
            # both means, their squared difference over sigma^2, the decoder's term, a choice, a
            # mean; and of the mse a difference, its square and a mean
            to_unit + mean + x0 + mean + (12, 8, 8, 8, 8, 16, 13, 4) + (12, 8, 4),
        ),
    ]  # fmt: skip


# ---- what the compilers say ----------------------------------------------------------------------


def cuda_kernels(arch: str, sources: list[Path]) -> list[Kernel]:
    """Every kernel of these files, from what ptxas says of it."""
    with tempfile.TemporaryDirectory() as folder:
        text = ""
        for source in sources:
            command = [
                *("nvcc", *FLAGS, f"-arch=sm_{arch}", "-Xptxas", "-v", "-cubin"),
                *(str(source), "-o", f"{folder}/{source.stem}.cubin"),
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
            text += done.stderr + done.stdout
    return parse_ptxas(text, arch)


def parse_ptxas(text: str, arch: str) -> list[Kernel]:
    """The kernels in what `ptxas -v` printed."""
    parts = re.split(r"Compiling entry function '(\w+)' for '\w+'", text)[1:]
    names = readable(parts[::2])
    kernels = []
    for name, part in zip(names, parts[1::2], strict=True):
        numbers = {
            key: int(found[1]) if (found := re.search(pattern, part)) else 0
            for key, pattern in (
                ("registers", r"Used (\d+) registers"),
                ("spills", r"(\d+) bytes spill stores"),
                ("stack", r"(\d+) bytes stack frame"),
                ("static_shared", r"(\d+) bytes smem"),
            )
        }
        kernels.append(Kernel(arch, "cuda", name, **numbers))
    return kernels


def readable(symbols: list[str]) -> list[str]:
    """Kernel names with their template arguments, without namespaces and parameters."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        return symbols
    lines = subprocess.run([tool, *symbols], capture_output=True, text=True, check=True).stdout
    names = []
    for line in lines.splitlines():
        name = re.sub(
            r"\(anonymous namespace\)::|<unnamed>::|fastddpm::|_GLOBAL__N__\w+::", "", line
        )
        name = re.sub(r"\(int\)(?=\d)", "", name)  # one of the two tools writes it
        name = re.sub(r"\(Walk\)0", "pixels", name)
        name = re.sub(r"\(Walk\)1", "planes", name)
        found = re.match(r"(?:void )?(\w+(?:<.*?>)?)\(", name)
        names.append(found[1] if found else name)
    return names


def triton_kernels(arch: str) -> list[Kernel]:
    """Every Triton kernel that compile_triton.py launches, compiled for a GPU that is not there."""
    program = ROOT / "tests" / "compile_triton.py"
    if not program.is_file():
        return []
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)  # installed or not
    done = subprocess.run(
        [sys.executable, program, arch, "bfloat16"],
        capture_output=True, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{program.name} {arch} failed:\n{done.stderr}")
    kernels = {}
    for line in map(json.loads, done.stdout.splitlines()):
        # Triton spills to the stack, and its kernels have no other use for one.
        numbers = line["registers"], line["stack"], line["stack"], 0, 32 * line["warps"]
        kernel = Kernel(arch, "triton", line["kernel"], *numbers, line["shared"])
        known = kernels.setdefault(kernel.name, kernel)
        if (kernel.spills, kernel.registers) > (known.spills, known.registers):
            kernels[kernel.name] = kernel  # of its specialisations the one that needs most
    return list(kernels.values())


def occupancy(kernel: Kernel, gpu: Gpu) -> float:
    """The share of a multiprocessor's threads that can be resident."""
    warps = -(-kernel.threads // 32)
    registers = -(-kernel.registers * 32 // 256) * 256 * warps
    shared = kernel.static_shared + kernel.dynamic_shared + 1024
    blocks = min(
        gpu.blocks,
        gpu.threads // (32 * warps),
        gpu.registers // max(registers, 1),
        gpu.shared // shared,
    )
    return blocks * warps * 32 / gpu.threads


# ---- the tables ----------------------------------------------------------------------------------


def report(archs: list[str], sources: list[Path]) -> dict[str, list[dict]]:
    kernels = []
    for arch in archs:
        of_arch = cuda_kernels(arch, sources) + triton_kernels(arch)
        for kernel in of_arch:
            case = next((case for case in cases() if case.kernel == kernel.name), None)
            if case is not None:
                kernel.threads, kernel.dynamic_shared = case.threads, case.shared
            kernel.occupancy = occupancy(kernel, GPUS[arch])
        kernels += of_arch
    models = [
        {
            **asdict(case),
            "arch": arch,
            "gpu": GPUS[arch].name,
            "eager": sum(case.eager),
            "microseconds": 1e6 * case.elements * case.moved / GPUS[arch].bandwidth,
            "eager_microseconds": 1e6 * case.elements * sum(case.eager) / GPUS[arch].bandwidth,
        }
        for case in cases()
        for arch in archs
    ]
    return {"kernels": [asdict(kernel) for kernel in kernels], "modelled_not_measured": models}


def table(rows: list[list[object]], head: list[str]) -> str:
    cells = [head, *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(line.rstrip() for line in [lines[0], "-" * len(lines[0]), *lines[1:]])


def text(result: dict[str, list[dict]]) -> str:
    kernels = table(
        [
            [
                f"sm_{k['arch']}", k["source"], k["name"], k["registers"], k["spills"],
                k["static_shared"], k["dynamic_shared"], k["threads"], f"{k['occupancy']:.0%}",
            ]
            for k in result["kernels"]
        ],
        [
            "arch", "from", "kernel", "registers", "spills",
            "static", "dynamic", "threads", "occupancy",
        ],
    )  # fmt: skip
    models = table(
        [
            [
                m["gpu"], m["op"], m["what"],
                f"{m['moved']:g}", f"{m['least']:g}", f"{m['eager']:g}",
                f"{m['microseconds']:.1f}", f"{m['eager_microseconds']:.1f}",
            ]
            for m in result["modelled_not_measured"]
        ],
        ["GPU", "op", "case", "B/element", "least", "eager", "us", "eager us"],
    )  # fmt: skip
    return (
        f"{kernels}\n\nModelled, not measured: bytes over the data sheet's bandwidth, no launch "
        f"costs, no caches.\n{models}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", nargs="+", choices=GPUS, default=list(GPUS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--source", nargs="+", help="file stems of csrc/cuda; all by default")
    parser.add_argument(
        "--step", action="store_true", help="then run gpu_step.py, for some minutes"
    )
    options = parser.parse_args(arguments)
    if shutil.which("nvcc") is None:
        parser.error("nvcc is not on the PATH")
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    if options.source:
        sources = [source for source in sources if source.stem in options.source]
    result = report(options.arch, sources)
    print(text(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.step:  # in a process of its own, which must not have imported torch
        sys.stdout.flush()
        subprocess.run([sys.executable, Path(__file__).with_name("gpu_step.py")], check=True)
    spilling = [k["name"] for k in result["kernels"] if k["spills"]]
    if spilling:
        print(f"\nspills: {', '.join(spilling)}", file=sys.stderr)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
