"""The model of a GPU that gpu_step.py applies to every contestant alike: what is assumed, and the
time of a kernel from its bytes and operations. Modelled, not measured. No torch here.

time of a step = sum over its kernels of max(bytes / bandwidth, operations / rate, least)
                 + launches x gap, or the host's time to launch them where that is longer
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import ClassVar

KINDS = (
    "convolution", "bias", "norm", "attention", "residual", "concatenation", "embedding",
    "product", "posterior", "optimizer", "fused", "other",
)  # fmt: skip


@dataclass(frozen=True)
class Assumptions:
    """Everything that the model assumes; `why` has the reason and the source of each."""

    name: str = "H100 SXM5"
    bandwidth: float = 3.35e12  # bytes/s of its memory
    achieved: float = 0.80  # share of it that a kernel over large tensors reaches
    peak: dict[str, float] = field(
        default_factory=lambda: {"bf16": 989e12, "fp16": 989e12, "tf32": 494e12, "fp32": 67e12}
    )  # operations/s of dense products
    product_share: float = 0.60  # of the peak, reached by products that fill the device
    attention_share: float = 0.45  # of the peak, reached by flash attention's forward pass
    attention_backward_share: float = 0.35
    triton_share: float = 0.20  # of the peak, reached by products written in Triton
    strided_share: float = 0.45  # of the peak, by gradients and transposes of strided convolutions
    multiprocessors: int = 132
    tiles: tuple[tuple[int, int, float], ...] = (
        (128, 256, 1.0), (128, 128, 0.9), (64, 128, 0.75), (64, 64, 0.6)
    )  # fmt: skip
    split: int = 8  # programs at most that share the sum of one tile of a product
    least: float = 1.5e-6  # s: no kernel ends sooner
    graph_gap: float = 0.7e-6  # s between two kernels of a CUDA graph that depend on each other
    eager_launch: float = 6e-6  # s of the host for a launch from Python
    foreach_tensors: tuple[int, ...] = (0, 110, 64, 48, 36, 30)  # by lists, of one launch
    foreach_chunk: int = 65536  # elements of a block of a multi-tensor kernel
    foreach_blocks: int = 320  # of one launch

    why: ClassVar[dict[str, str]] = {
        "bandwidth": "data sheet",
        "achieved": "copies reach 0.90 to 0.92 in published measurements, coalesced loads 0.78 to "
        "0.84; one share for everybody's kernels, hand-written or generated",
        "peak": "data sheet, dense; fp32 outside the tensor cores",
        "product_share": "cuBLAS and cuDNN reach 0.55 to 0.75 of the data sheet at these sizes, "
        "clocks under load below the boost clock in it",
        "attention_share": "FlashAttention-2's published forward rates on an H100, 0.35 to 0.5",
        "attention_backward_share": "the same source, 0.3 to 0.4",
        "triton_share": "tl.dot on tiles of 64 x 64 without asynchronous copies, a third of "
        "cuBLAS; our own Triton kernels alone, what Inductor writes is given the library's",
        "strided_share": "cuDNN runs them as one product for each phase of the stride: 0.75 of the "
        "others' rate",
        "tiles": "a product's rows and columns are cut into tiles; a wave of them on all "
        "multiprocessors takes as long as a full one. The best tile counts, with what smaller "
        "ones lose",
        "split": "split-K, of cuBLAS and cuDNN alike",
        "least": "start and end of an empty kernel on the device",
        "graph_gap": "0.5 us in NVIDIA's introduction of CUDA graphs, up to 1.3 us measured by "
        "others; the same for every contestant",
        "eager_launch": "4 to 6 us of driver and runtime, and the dispatcher",
        "foreach_tensors": "MultiTensorApply.cuh, depth_to_max_tensors",
        "cache": "the L2 is assumed to keep nothing from one kernel to the next (50 MB against "
        "67 MB a feature map at batch 256), and within a kernel everything: each tensor is read "
        "once. At batch 1 and 16 it would keep much, for all contestants",
    }

    def rate(self, dtype: str, m: int, n: int, k: int, share: float) -> float:
        """Operations/s of an (m, k) x (k, n) product."""
        best = 0.0
        for rows, columns, factor in self.tiles:
            tiles = math.ceil(m / rows) * math.ceil(n / columns)
            split = max(1, min(self.split, self.multiprocessors // tiles, k // 256))
            programs = tiles * split
            waves = math.ceil(programs / self.multiprocessors)
            used = (m * n) / (math.ceil(m / rows) * rows * math.ceil(n / columns) * columns)
            best = max(best, factor * used * programs / (waves * self.multiprocessors))
        return self.peak[dtype] * share * best


@dataclass(frozen=True)
class Kernel:
    """One launch. operations: of products, 2 a multiply-add; product: their (m, n, k)."""

    name: str
    kind: str
    read: int
    written: int
    operations: float = 0.0
    dtype: str = "bf16"
    product: tuple[int, int, int] | None = None
    engine: str = "library"  # "strided", "attention", "attention_backward", "triton"

    @property
    def bytes(self) -> int:
        return self.read + self.written

    def seconds(self, a: Assumptions) -> float:
        shares = {
            "library": a.product_share,
            "attention": a.attention_share,
            "attention_backward": a.attention_backward_share,
            "triton": a.triton_share,
            "strided": a.strided_share,
        }
        moving = self.bytes / (a.bandwidth * a.achieved)
        computing = 0.0
        if self.operations:
            share = shares[self.engine]
            rate = (
                a.rate(self.dtype, *self.product, share)
                if self.product
                else a.peak[self.dtype] * share
            )
            computing = self.operations / rate
        return max(moving, computing, a.least)


@dataclass
class Step:
    """What one step of a contestant launches. graph: all of it by one launch of a CUDA graph;
    waits: times the host waits for the device."""

    who: str
    batch: int
    graph: bool
    kernels: list[Kernel]
    waits: int = 0
    note: str = ""

    def row(self, a: Assumptions) -> dict[str, object]:
        busy = sum(kernel.seconds(a) for kernel in self.kernels)
        launches = len(self.kernels)
        device = busy + launches * a.graph_gap
        seconds = device if self.graph else max(device, launches * a.eager_launch)
        return {
            "who": self.who, "batch": self.batch, "graph": self.graph, "launches": launches,
            "GB": sum(k.bytes for k in self.kernels) / 1e9,
            "ms": 1e3 * seconds, "host waits": self.waits, "kinds": by_kind(self.kernels, a),
            "note": self.note,
        }  # fmt: skip


def by_kind(kernels: Iterable[Kernel], a: Assumptions) -> dict[str, dict[str, float]]:
    """Launches, GB and ms (without gaps) of each kind that there is."""
    sums: dict[str, dict[str, float]] = {}
    for kernel in kernels:
        row = sums.setdefault(kernel.kind, {"launches": 0, "GB": 0.0, "ms": 0.0})
        row["launches"] += 1
        row["GB"] += kernel.bytes / 1e9
        row["ms"] += 1e3 * kernel.seconds(a)
    return {kind: sums[kind] for kind in sorted(sums, key=KINDS.index)}


def assumptions_table(a: Assumptions) -> dict[str, dict[str, object]]:
    values: dict[str, object] = asdict(a)
    return {
        name: {"value": values.get(name, "-"), "why": a.why.get(name, "")}
        for name in dict.fromkeys((*values, *a.why))
    }
