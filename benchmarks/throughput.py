"""Times sampling, all implementations in turn on the same weights: fastddpm's engines, diffusers,
torch.compile, OpenVINO, ONNX Runtime.

    python benchmarks/throughput.py [--json FILE] [--plot FILE.png] [--batches 1,4,16,64]
        [--model cifar10|fashion-mnist|FOLDER] [--only NAME,...] [--precisions fp32,bf16]
        [--limit SECONDS] [--patience SECONDS] [--device cuda] [--quick]

First each contestant shows that it computes the same: its eps at two steps against the network in
float64. One that computes something else is not timed, and the exit code is 1. Then those of one
batch size and precision take turns, warm: median and range. A contestant whose turns would take
more than --limit seconds together takes fewer of them, at least one: the table says how many. One
that fails, or does not answer for --patience seconds, is left out, and the reason is printed.

TFLOP/s count the products of convolutions and dense layers, twice their multiply-adds, as the
network is written: fewer are needed by Winograd's algorithm, which can pass the ceiling. That is
the rate of multiply-adds from registers on as many threads (on a GPU torch's largest in a matrix
product), measured at the start. No numbers are kept here.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # the checkout that this file is in
sys.path.insert(0, str(Path(__file__).parent))

import contestants
import torch
from contestants import DTYPES, OURS, PEERS, Job
from machine import ceiling, environment, milliseconds
from networks import flop, make_model, relative_error
from processes import T_SAMPLED, Failed, Remote, implied_eps
from tabulate import tabulate
from torch import Tensor

from fastddpm import UNet, ops
from fastddpm.checkpoint import atomic_write, read_tensors, write_tensors
from fastddpm.engine.eager import Eager
from fastddpm.precision import has_fast_bf16

EQUAL = (
    "All contestants have the same weights, start from the same x_T, take the same steps and use "
    "the same number of threads. Each lives in a process of its own and all of a batch size and "
    "precision at the same time, so that they take turns; only one works at a time. Peers are "
    "called in inference mode and take fastddpm's fused posterior step, so that they differ in the "
    "network alone. float32 is float32; torch's switches (TF32, cudnn.benchmark) are left as they "
    "come, as in sample(). Peak memory is the process's largest resident set while it was timed, "
    "the libraries' code in it; on a GPU the most that torch's allocator held."
)
# rms(error) / rms(eps) at most: all may round as they like, but not compute something else. In
# bf16 a multiple of what PyTorch's own network in bfloat16 errs.
ALLOWED = {"fp32": 1e-4}
ALLOWED_OF_TORCH_BF16 = 2.0
PAUSE = 0.05  # seconds before a turn, for the threads of the one before to fall asleep
IMAGES_CHECKED = 2  # distinct images in the checked batch, over and over


# ---- check, then time ----------------------------------------------------------------------------


def torch_eps(model: UNet, dtype: torch.dtype, x: Tensor, i: int) -> Tensor:
    """eps of the network with weights and activations in dtype, on PyTorch's ops."""
    own = copy.deepcopy(model).to(dtype)
    engine = Eager(own, model.diffusion, device=x.device, precision="fp32", clip=False)
    with ops.use_backend("reference"):
        return implied_eps(engine, x, i)


def check(runner: Any, x: Tensor, truths: dict[int, Tensor], folder: Path) -> float:
    """The largest relative error of eps among the chain indices of `truths`."""
    path = folder / "parity.safetensors"
    errors = []
    for i, expected in truths.items():
        write_tensors(path, {"x": x})
        runner.eps(str(path), i)
        errors.append(relative_error(read_tensors(path)[0]["eps"], expected))
    return max(errors)


@dataclass
class Turns:
    """A contestant that has shown its eps: `turns` turns of `steps` steps each."""

    who: str
    row: dict[str, Any]
    runner: Any
    steps: int
    turns: int


def race(jobs: list[Job], model: UNet, options: argparse.Namespace) -> tuple[list[dict], list[str]]:
    """(a row a contestant, with its error and seconds an image-step; who could not take part) of
    the contestants of one batch size and precision.

    A row without "seconds" computed something else."""
    batch, precision, T = jobs[0].batch, jobs[0].precision, model.diffusion.T
    distinct = min(batch, IMAGES_CHECKED)
    x = ops.randn(
        (distinct, *jobs[0].shape), seed=1, step=T_SAMPLED, sample_index=torch.arange(distinct)
    )
    times = -(-batch // distinct)
    checked = (T - 1, T // 2)
    truths = {i: torch_eps(model, torch.float64, x, i) for i in checked}
    allowed, theirs = ALLOWED.get(precision, math.inf), 0.0
    if precision == "bf16":
        theirs = max(
            relative_error(torch_eps(model, torch.bfloat16, x, i), truths[i]) for i in checked
        )
        allowed = ALLOWED_OF_TORCH_BF16 * theirs
        print(f"PyTorch's own network in bf16, batch {batch}: error {theirs:.1e}")
    truths = {i: eps.repeat(times, 1, 1, 1)[:batch] for i, eps in truths.items()}
    x = x.repeat(times, 1, 1, 1)[:batch]

    rows: list[dict[str, Any]] = []
    missing: list[str] = []
    running: list[Turns] = []
    for job in jobs:
        who = f"{job.name} {precision}, batch {batch}"
        row: dict[str, Any] = {"name": job.name, "precision": precision, "batch": batch}
        try:
            runner = Remote(job, options.patience)
            row |= {"error": check(runner, x, truths, Path(job.folder)), "allowed": allowed}
            if not row["error"] <= allowed:
                rows.append(row)
                print(
                    f"{who} is off by {row['error']:.2g} of eps, allowed {allowed:.2g}; not timed",
                    file=sys.stderr,
                )
                runner.close()
                continue
            once = runner.seconds(1)
            if once < options.least:
                once = runner.seconds(1)  # a first step can be slow
            runner.forget_peak()
        except Failed as failure:
            missing.append(f"{who}: {failure}")
            continue
        said = f"{who}: error {row['error']:.1e}"
        if theirs:
            row["of PyTorch's error"] = row["error"] / theirs
            said += f", {row['error'] / theirs:.2f} of PyTorch's own"
        print(said, flush=True)
        steps = max(1, min(math.ceil(options.least / once), T // 2))
        turns = max(1, min(options.repeats, int(options.limit / (steps * once))))
        running.append(Turns(who, row | {"seconds": []}, runner, steps, turns))
    for turn in range(options.repeats):
        for each in list(running):
            if turn >= each.turns:
                continue
            time.sleep(PAUSE)
            try:
                seconds = each.runner.seconds(each.steps)
            except Failed as failure:
                missing.append(f"{each.who}: {failure}")
                running.remove(each)
                continue
            each.row["seconds"].append(seconds / (each.steps * batch))
    for each in running:
        each.row["peak bytes"] = each.runner.memory()
        each.runner.close()
        rows.append(each.row)
    return rows, missing


def finish(rows: list[dict[str, Any]], per_image: int, ceilings: dict[str, float | None]) -> None:
    """Add what follows from the seconds."""
    for row in rows:
        if "seconds" not in row:
            continue
        seconds = statistics.median(row["seconds"])
        row["ms"] = seconds * 1e3
        row["images/s"] = 1 / (seconds * T_SAMPLED)
        row["TFLOP/s"] = per_image / seconds / 1e12
        if rate := ceilings[row["precision"]]:
            row["of ceiling"] = per_image / seconds / rate
        peers = [
            statistics.median(r["seconds"])
            for r in rows
            if r["name"] in PEERS and "seconds" in r
            and (r["batch"], r["precision"]) == (row["batch"], row["precision"])
        ]  # fmt: skip
        if row["name"] in OURS and peers:
            row["x best peer"] = min(peers) / seconds


def table(rows: list[dict[str, Any]]) -> str:
    return tabulate(
        [
            {
                "batch": row["batch"],
                "": row["name"],
                "precision": row["precision"],
                "error": f"{row['error']:.1e}",
                "ms an image-step": milliseconds(row["seconds"]),
                "turns": len(row["seconds"]),
                f"images/s, {T_SAMPLED} steps": f"{row['images/s']:.3g}",
                "TFLOP/s": f"{row['TFLOP/s']:.3g}",
                "of ceiling": f"{row['of ceiling']:.0%}" if "of ceiling" in row else "",
                "x best peer": f"{row['x best peer']:.2f}" if "x best peer" in row else "",
                "peak MB": f"{row['peak bytes'] / 1e6:.0f}",
            }
            for row in rows
            if "seconds" in row
        ],
        headers="keys", tablefmt="simple", disable_numparse=True,
    )  # fmt: skip


def plot(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Bars of ms an image-step, a panel a batch size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in rows if "seconds" in row]
    batches = sorted({row["batch"] for row in rows})
    most = max(sum(row["batch"] == batch for row in rows) for batch in batches)
    figure = Figure(figsize=(9, len(batches) * (0.28 * most + 0.9)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(batches), squeeze=False)[:, 0]
    for axes, batch in zip(panels, batches, strict=True):
        shown = sorted((r for r in rows if r["batch"] == batch), key=lambda r: -r["ms"])
        bars = axes.barh(
            [f"{r['name']} {r['precision']}" for r in shown],
            [r["ms"] for r in shown],
            color=["tab:blue" if r["name"] in OURS else "0.7" for r in shown],
        )
        axes.bar_label(bars, [f"{r['ms']:.3g}" for r in shown], padding=3, fontsize=8)
        axes.set(title=f"batch {batch}", xlabel="ms an image-step")
        axes.margins(x=0.1)
    figure.suptitle(title, fontsize=10)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


def precisions(device: torch.device, asked: str | None) -> tuple[list[str], list[str]]:
    """(those to time, what is left out)."""
    if asked:
        return asked.split(","), []
    if has_fast_bf16(device):
        return ["fp32", "bf16"], []
    return ["fp32"], [
        "all in bf16: this device has no bfloat16 products (--precisions asks anyway)"
    ]


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--json", type=Path, help="write environment and rows to this file")
    parser.add_argument("--plot", type=Path, help="write a bar chart to this .png file")
    parser.add_argument(
        "--batches", type=integers, default=[1, 4, 16, 64], help="default: 1,4,16,64"
    )
    parser.add_argument("--model", default="cifar10", help="cifar10, a bundled name or a folder")
    parser.add_argument("--only", default="", help="names of contestants, or how they start")
    parser.add_argument("--precisions", help="fp32,bf16; default: those the device multiplies")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5, help="turns of each, default 5")
    parser.add_argument(
        "--limit", type=float, default=40.0, help="seconds of all turns of one, default 40"
    )
    parser.add_argument(
        "--patience", type=float, default=300.0, help="seconds without an answer, default 300"
    )
    parser.add_argument("--least", type=float, default=1.0, help="seconds a turn, default 1")
    parser.add_argument("--quick", action="store_true", help="a tiny cifar10, to see that it runs")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    chosen, left_out = precisions(device, options.precisions)
    if unknown := set(chosen) - set(DTYPES):
        parser.error(f"--precisions must be of fp32, bf16; got {', '.join(sorted(unknown))}")
    names = [n for n in (*OURS, *PEERS) if n.startswith(tuple(options.only.split(",")))]
    if not names:
        parser.error(f"--only must name some of: {', '.join((*OURS, *PEERS))}")
    try:
        model = make_model(options.model, options.quick)
    except (OSError, ValueError) as error:
        parser.error(f"--model: {error}")
    entries: dict[str, list[str]] = {precision: [] for precision in chosen}
    for precision, taking_part in entries.items():
        for name in names:
            if reason := contestants.missing(name, precision, device.type):
                left_out.append(f"{name} {precision}: {reason}")
            else:
                taking_part.append(name)

    facts: dict[str, Any] = {**environment(), "device": str(device), "threads": options.threads}
    facts |= contestants.versions()
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
        facts |= contestants.settings(device)
    for name, value in facts.items():
        print(f"{name:<15} {value}")
    ceilings: dict[str, float | None] = {}
    for precision in chosen:
        rate, what = ceiling(DTYPES[precision], device, options.threads, quick=options.quick)
        ceilings[precision] = rate
        known = f"{rate / 1e12:.3g} TFLOP/s" if rate else "unknown"
        print(f"{'ceiling':<15} {known}, {precision}: {what}")

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        shape = (model.in_channels, *model.image_size)
        per_image = flop(model)
        print(f"{'model':<15} {per_image / 1e9:.4g} GFLOP an image-step\n\n{EQUAL}\n")
        for batch, (precision, taking_part) in itertools.product(options.batches, entries.items()):
            jobs = []
            for name in taking_part:
                own = tempfile.mkdtemp(dir=folder)
                jobs.append(Job(
                    name, precision, folder, batch, str(device), options.threads, shape, own
                ))  # fmt: skip
            done, missing = race(jobs, model, options) if jobs else ([], [])
            finish(done, per_image, ceilings)
            rows += done
            left_out += missing
    print("\n" + table(rows))
    for line in left_out:
        print(f"not here: {line}")
    if options.json:
        report = {
            "environment": facts, "model": options.model, "GFLOP an image-step": per_image / 1e9,
            "ceiling TFLOP/s": {name: rate and rate / 1e12 for name, rate in ceilings.items()},
            "equal": EQUAL, "rows": rows, "not here": left_out,
        }  # fmt: skip
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.plot and any("seconds" in row for row in rows):
        plot(options.plot, rows, f"{options.model} on {facts['cpu']}, {options.threads} threads")
    return 0 if all("seconds" in row for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
