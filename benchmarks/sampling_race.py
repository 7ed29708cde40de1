"""throughput.py's race of samplers: what is checked before a contestant is timed, and its table."""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path
from typing import Any

import contestants
import torch
import turns
from contestants import OURS, PEERS, Job
from machine import milliseconds
from networks import flop, relative_error
from processes import T_SAMPLED, Remote, implied_eps
from torch import Tensor

from fastddpm import UNet, ops
from fastddpm.checkpoint import read_tensors, write_tensors
from fastddpm.engine.eager import Eager

__all__ = ["EQUAL", "OURS", "PEERS"]

UNIT = "an image-step"
PRODUCTS = 1  # times the forward's
STEPS_AN_IMAGE = T_SAMPLED
BATCHES = [1, 4, 16, 64]
PATIENCE = 300.0
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
IMAGES_CHECKED = 2  # distinct images in the checked batch, over and over

missing, versions = contestants.missing, contestants.versions


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


def race(
    jobs: list[Job], model: UNet, options: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[str]]:
    """turns.race of the contestants of one batch size and precision."""
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
    work = flop(model)

    def compare(runner: Any, job: Job, row: dict[str, Any]) -> str | None:
        error = check(runner, x, truths, Path(job.folder))
        row |= {"error": error, "allowed": allowed, "FLOP": work}
        if theirs:
            row["of PyTorch's error"] = error / theirs
        return None if error <= allowed else f"{error:.2g} of eps, allowed {allowed:.2g}"

    return turns.race(jobs, Remote, compare, options, T // 2)


def columns(row: dict[str, Any]) -> dict[str, str]:
    """A row of the table."""
    return {
        "error": f"{row['error']:.1e}",
        "ms an image-step": milliseconds(row["seconds"]),
        "turns": str(len(row["seconds"])),
        f"images/s, {T_SAMPLED} steps": f"{row['images/s']:.3g}",
    }
