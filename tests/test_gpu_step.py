"""benchmarks/gpu_step.py: what it counts of ops whose launches are known, its model of time, and
that torch.compile's generated code can be read; in processes of their own, as it pretends a GPU."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None
    or torch.version.cuda is not None
    or importlib.util.find_spec("triton") is None,
    reason="it counts where g++ and triton are, with a torch that is not built for CUDA",
)


@pytest.fixture(scope="module")
def model():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import gpu_model
    finally:
        sys.path.remove(str(BENCHMARKS))
    return gpu_model


COUNT = """
import sys
sys.path.insert(0, sys.argv[1])
import absent_gpu
absent_gpu.pretend()
import json
import torch
import torch.nn.functional as F
import our_kernels
from gpu_count import Counter
from fastddpm import ops

def count(step):
    counter = Counter(4)
    with our_kernels.written_down(counter), counter:
        step()
    rows = [[k.name, k.kind, k.read, k.written, k.operations] for k in counter.kernels]
    return rows, counter.waits

def made(*shape, dtype=torch.bfloat16):
    x = torch.empty(shape, dtype=dtype, device="cuda")
    return x.to(memory_format=torch.channels_last) if len(shape) == 4 else x

with absent_gpu.mode():
    x, y, w, b = made(4, 64, 8, 8), made(4, 64, 8, 8), made(32, 64, 3, 3), made(32)
    line, other, row = made(64), made(64), made(4, 64)
    twice, large, kernel = made(128), made(1, 64, 256, 256), made(64, 32, 4, 4)
    index = torch.zeros(1, dtype=torch.int64, device="cuda")
    q, k, v = (made(4, 1, 64, 32).contiguous() for _ in range(3))
    nchw, skip = x.contiguous(), made(4, 64, 8, 8)
    weights = made(192, 64), made(192), made(64, 64), made(64)
    steps = {
        "view": lambda: x.permute(0, 2, 3, 1).reshape(-1, 64).t(),
        "convolution": lambda: F.conv2d(x, w, padding=1),
        "with a bias": lambda: F.conv2d(x, w, b, padding=1),
        "of NCHW": lambda: F.conv2d(nchw, w, padding=1),
        "doubling": lambda: F.conv_transpose2d(x, kernel, stride=2, padding=1),
        "sum": lambda: x + y,
        "sum in place": lambda: x.add_(y),
        "of a row": lambda: x + row[:, :, None, None],
        "cat": lambda: torch.cat((x, y), 1),
        "row of a table": lambda: twice.view(64, 2).index_select(0, index),
        "expanded": lambda: row[:, :1].expand(4, 64).clone(),
        "dense": lambda: F.linear(row, weights[2][:32], b),
        "attention": lambda: F.scaled_dot_product_attention(q, k, v),
        "norm": lambda: ops.group_norm_silu(x, 32, line, other),
        "norm with all": lambda: ops.group_norm_silu(
            x, 32, twice, None, before=row, residual=y, x2=skip
        ),
        "large norm": lambda: ops.group_norm_silu(large, 32, line, other),
        "residual_sum": lambda: ops.residual_sum(x, y, line),
        "block": lambda: ops.attention_block(x, 32, line, other, *weights),
        "wait": lambda: bool(torch.isfinite(row).all()),
    }
    print(json.dumps({name: count(step) for name, step in steps.items()}))
"""


@pytest.fixture(scope="module")
def counted():
    done = subprocess.run(
        [sys.executable, "-c", COUNT, str(BENCHMARKS)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


X, ROW = 4 * 64 * 8 * 8 * 2, 4 * 64 * 2  # bytes of an image and of a value per sample and channel
W = 32 * 64 * 9 * 2


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ("view", []),
        ("convolution", [(X + W, X // 2)]),
        ("with a bias", [(X + W, X // 2), (X // 2 + 64, X // 2)]),  # cuDNN's kernel of its own
        ("doubling", [(X + 64 * 32 * 16 * 2, 4 * X // 2)]),
        ("sum", [(2 * X, X)]),
        ("sum in place", [(2 * X, X)]),
        ("of a row", [(X + ROW, X)]),
        ("cat", [(2 * X, 2 * X)]),
        ("row of a table", [(4 + 8, 4)]),
        ("expanded", [(4 * 2, ROW)]),
        ("dense", [(ROW + 32 * 64 * 2 + 64, ROW // 2)]),
        ("attention", [(3 * X // 2, X // 2 + 4 * 64 * 4)]),  # the log sum of each row beside it
        ("norm", [(X + 2 * 128, X)]),
        ("residual_sum", [(2 * X + 128, X)]),
    ],
)
def test_launches_and_bytes(counted, step, expected):
    kernels, waits = counted[step]
    assert len(kernels) == len(expected)
    for (_, _, *moved, _), own in zip(kernels, expected, strict=True):
        assert moved == pytest.approx(own, abs=16)  # beside it a workspace of one number
    assert waits == 0


def test_operations(counted):
    assert counted["convolution"][0][0][4] == 2 * 4 * 64 * 32 * 64 * 9
    assert counted["doubling"][0][0][4] == 2 * 4 * 64 * 64 * 32 * 16  # a quarter of the outputs'
    assert counted["dense"][0][0][4] == 2 * 4 * 32 * 64
    assert counted["attention"][0][0][4] == 4 * 4 * 64 * 64 * 32


def test_what_stands_before_a_norm_is_one_launch(counted):
    ((name, kind, read, written, _),) = counted["norm with all"][0]
    assert (name, kind) == ("group_norm_silu", "norm")
    assert written == pytest.approx(3 * X, abs=16)  # y of both sources, u
    assert read == pytest.approx(3 * X + ROW + 256, abs=16)


def test_a_slab_past_shared_memory_is_read_twice(counted):
    kernels = counted["large norm"][0]
    assert len(kernels) == 2
    size = 64 * 256 * 256 * 2
    assert sum(read for _, _, read, _, _ in kernels) == pytest.approx(2 * size, rel=1e-3)


def test_the_attention_block_is_norm_products_and_attention(counted):
    kinds = {kind for _, kind, _, _, _ in counted["block"][0]}
    names = [name for name, _, _, _, _ in counted["block"][0]]
    assert kinds == {"attention"}
    assert names[:4] == ["group_norm_silu", "addmm", "flash attention", "addmm"]
    assert len(names) == 5


def test_layouts_and_waits_are_counted(counted):
    assert [name for name, *_ in counted["of NCHW"][0]][-2:] == [
        "layout of a convolution's operand", "convolution",
    ]  # fmt: skip
    assert counted["wait"][1] == 1


# ---- the model of time ---------------------------------------------------------------------------


def test_a_kernel_takes_what_binds_it(model):
    a = model.Assumptions()
    moving = model.Kernel("copy", "other", 10**9, 10**9)
    assert moving.seconds(a) == pytest.approx(2e9 / (a.bandwidth * a.achieved))
    size = 16384
    work = {"operations": 2.0 * size**3, "product": (size, size, size)}
    product = model.Kernel("mm", "product", 3 * size * size * 2, 0, **work)
    least = 2.0 * size**3 / (a.peak["bf16"] * a.product_share)
    assert least <= product.seconds(a) <= 1.1 * least
    assert model.Kernel("tiny", "other", 4, 4).seconds(a) == a.least
    few = model.Kernel("mm", "product", 0, 0, operations=2.0 * 64**3, product=(64, 64, 64))
    full = a.peak["bf16"] * a.product_share
    assert few.seconds(a) >= 2.0 * 64**3 / full  # one tile leaves most of the device idle


def test_launches_bind_the_host_in_eager_alone(model):
    a = model.Assumptions()
    kernels = [model.Kernel("tiny", "other", 4, 4)] * 100
    eager = model.Step("x", 1, False, kernels).row(a)
    graph = model.Step("x", 1, True, kernels).row(a)
    assert eager["ms"] == pytest.approx(100 * a.eager_launch * 1e3)
    assert graph["ms"] == pytest.approx(100 * (a.least + a.graph_gap) * 1e3)


def test_every_assumption_has_its_reason(model):
    a = model.Assumptions()
    for name, entry in model.assumptions_table(a).items():
        assert entry["why"] or name in (
            "name",
            "multiprocessors",
            "foreach_chunk",
            "foreach_blocks",
        )


# ---- the whole ----------------------------------------------------------------------------------


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / "gpu_step.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_our_engines(tmp_path):
    """A small U-Net, without torch.compile: a table, a file, the assumptions."""
    pytest.importorskip("diffusers")
    file = tmp_path / "step.json"
    only = (
        "--only=fastddpm cuda_graph,fastddpm cuda_plan,fastddpm by modules,diffusers channels_last"
    )
    done = run("--quick", "--batches=2", "--train=0", f"--json={file}", only)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Modelled, not measured" in done.stdout
    assert "not counted" not in done.stdout
    report = json.loads(file.read_text(encoding="utf-8"))
    rows = {row["who"]: row for row in report["sampling"]}
    assert rows["fastddpm cuda_graph"]["launches"] < rows["diffusers channels_last"]["launches"]
    for row in rows.values():
        assert row["launches"] == sum(kind["launches"] for kind in row["kinds"].values())
        assert row["GB"] == pytest.approx(sum(kind["GB"] for kind in row["kinds"].values()))
        assert row["host waits"] == 0
        assert row["who"] in done.stdout
    assert report["assumptions"]["bandwidth"]["value"] == 3.35e12


@pytest.mark.slow
def test_torch_compile_and_training(tmp_path):
    """Inductor's code of forward and backward is read; no contestant is left out."""
    pytest.importorskip("diffusers")
    file = tmp_path / "step.json"
    done = run("--quick", "--batches=2", "--train=2", f"--json={file}")
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(file.read_text(encoding="utf-8"))
    assert report["not counted"] == []
    rows = {row["who"]: row for row in report["sampling"]}
    eager, default, best = (
        rows[name] for name in ("diffusers channels_last", "torch.compile", "torch.compile best")
    )
    convolutions = [row["kinds"]["convolution"]["launches"] for row in (eager, default)]
    assert convolutions[0] == convolutions[1]
    assert "bias" not in default["kinds"]  # fused into the generated kernels
    assert best["launches"] < default["launches"] < eager["launches"]
    assert best["GB"] < default["GB"] < eager["GB"]
    assert {row["who"] for row in report["training"]} == {
        "fastddpm Trainer", "diffusers channels_last", "torch.compile",
    }  # fmt: skip


def test_a_process_with_torch_in_it_is_refused():
    code = "import torch, sys; sys.path.insert(0, sys.argv[1]); import absent_gpu\n"
    code += "try: absent_gpu.pretend()\nexcept absent_gpu.Unavailable as e: print(e)"
    command = [sys.executable, "-c", code, str(BENCHMARKS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "torch is imported already\n"
