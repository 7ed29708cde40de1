"""throughput.py's race of training steps: what is checked before a contestant is timed, and its
table."""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path
from typing import Any

import torch
import training_contestants
import training_profile
import turns
from contestants import Job
from machine import copy_bandwidth, milliseconds
from networks import flop
from torch import Tensor
from training_contestants import ADAM_EPS, CLIP, EMA_DECAY, LR, OURS, PEERS, Draws, clipped
from training_profile import SWEPT_BYTES
from training_runner import TrainingRemote

from fastddpm import UNet, ops
from fastddpm.checkpoint import read_tensors, write_tensors
from fastddpm.integrations.diffusers import to_diffusers
from fastddpm.precision import autocast
from fastddpm.training.step import CHOICES_STEP

__all__ = ["OURS", "PEERS"]

UNIT = "an image"
PRODUCTS = 3  # times the forward's: itself, the data gradient, the weight gradient
STEPS_AN_IMAGE = 1
BATCHES = [16, 64]
PATIENCE = 1200.0  # torch.compile takes minutes
EQUAL = (
    "All contestants train from the same weights, on the same uint8 batches, with the same number "
    f"of threads: Adam of rate {LR:g}, gradients clipped to norm {CLIP:g}, an average of the "
    f"weights with decay {EMA_DECAY:g}, half of the images mirrored, the same dropout; float32 "
    "weights, and in bf16 products under autocast; float32 is float32, on a GPU too unless torch "
    "is told to take TF32 in products. Each lives in a process of its own and all of a batch size "
    "and precision at the same time, so that they take turns; only one works at a time. Nobody "
    "reads files. Before any time the first step of each, without dropout, on the same "
    "(x_0, t, flip, eps): its loss and all its clipped gradients against those of float64, its "
    "weights and their average against what Adam and the decay make of these gradients. lucidrains "
    "trains a U-Net of its own architecture of the same widths: its step is checked against its "
    "own network in float64, only its images/s and TFLOP/s compare, and it is nobody's best peer; "
    "it averages each tenth step. TFLOP/s count 3 times the products of the forward as each "
    "network is written: forward, data gradient, weight gradient. Peak memory is how far the "
    "process's resident set rose, while it was timed, over what it was when the libraries were "
    "loaded and nothing else; on a GPU the same of torch's allocator."
)
# At most: of the loss, relative; of each gradient, its `distance`; of a weight's step, over the
# rate; of the weights' share in their average, relative. In bf16 the gradients' is a multiple of
# what PyTorch's own network errs under autocast.
ALLOWED = {
    "fp32": {"loss": 1e-5, "gradient": 1e-4, "weight": 0.02, "average": 0.05},
    "bf16": {"loss": 2e-3, "gradient": math.inf, "weight": 0.02, "average": 0.05},
}
ALLOWED_OF_TORCH_BF16 = 2.0
FLOOR = 0.1  # see `distance`
SMALL = 2.0**-5  # weights whose average can be seen to move in float32
CHUNK = 4  # images that the float64 network computes at a time

missing, versions = training_contestants.missing, training_contestants.versions


# ---- what is right -------------------------------------------------------------------------------


def first_batch(model: UNet, batch: int, shape: tuple[int, int, int]) -> tuple[Tensor, Draws]:
    """x_0, uint8, and what a Trainer of seed 0 draws for its first step on it."""
    random = torch.Generator().manual_seed(1)
    x0 = torch.randint(0, 256, (batch, *shape), dtype=torch.uint8, generator=random)
    index = torch.arange(batch)
    diffusion = model.diffusion
    t, flip = ops.choices(index, seed=0, step=CHOICES_STEP, levels=diffusion.T)
    table = diffusion.table(torch.device("cpu"))
    _, eps = ops.noise(x0, t, table, seed=0, sample_index=index, flip=flip, dtype=torch.float32)
    return x0, Draws(t, flip, eps)


def torch_step(
    model: UNet, x0: Tensor, draws: Draws, dtype: torch.dtype, precision: str
) -> dict[str, Tensor]:
    """loss, gradient.NAME (clipped) of the first step on PyTorch's ops, with weights in dtype and
    products in `precision`.
    """
    own = copy.deepcopy(model).to(dtype).eval()  # which drops nothing
    ab = torch.as_tensor(model.diffusion.schedule.alphas_cumprod)[draws.t][:, None, None, None]
    x0 = torch.where(draws.flip[:, None, None, None], x0.flip(-1), x0)
    xt = (ab.sqrt() * (x0.double() / 127.5 - 1) + (1 - ab).sqrt() * draws.eps.double()).to(dtype)
    loss = torch.zeros((), dtype=torch.float64)
    for part in torch.arange(len(x0)).split(CHUNK):
        with ops.use_backend("reference"), autocast(precision, x0.device):
            output = own(xt[part], draws.t[part])
        error = (output.to(dtype) - draws.eps[part].to(dtype)).square().sum() / x0.numel()
        error.backward()
        loss += error.detach()
    names, parameters = zip(*own.named_parameters(), strict=True)
    gradients = clipped([p.grad.double() for p in parameters], CLIP)
    return {"loss": loss, **{f"gradient.{n}": g for n, g in zip(names, gradients, strict=True)}}


def as_theirs(model: UNet, tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The tensors of kind.NAME by the names that diffusers has for them."""
    own = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in own.named_parameters():
            p.copy_(tensors[f"{kind}.{name}"])
    return {f"{kind}.{name}": p.detach() for name, p in to_diffusers(own).named_parameters()}


def distance(got: Tensor | None, truth: Tensor, typical: float) -> float:
    """|got - truth| / (|truth| + FLOOR times that of as many gradients of typical size): some are
    zero but for rounding, as of the bias of attention's keys. inf where it is another shape.
    """
    if got is None or got.shape != truth.shape:
        return math.inf
    scale = truth.double().norm() + FLOOR * typical * truth.numel() ** 0.5
    return ((got.double() - truth.double()).norm() / scale).item()


def distances(got: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """The distance of each gradient, by its name."""
    gradients = {k: v for k, v in truth.items() if k.startswith("gradient.")}
    size = torch.stack([g.double().norm() for g in gradients.values()]).norm()
    typical = size.item() / sum(g.numel() for g in gradients.values()) ** 0.5
    found = {name: distance(got.get(name), g, typical) for name, g in gradients.items()}
    return {name: math.inf if math.isnan(d) else d for name, d in found.items()}


def errors(got: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """The errors of the loss and of the worst gradient."""
    loss = abs(got["loss"].double() / truth["loss"].double() - 1)
    return {"loss": loss.item(), "gradient": max(distances(got, truth).values())}


def optimiser_errors(got: dict[str, Tensor], start: dict[str, Tensor]) -> dict[str, float]:
    """How far the weights and their average are from what Adam's first step and the decay make of
    the gradients: of the worst weight, over the rate, and of the average's share.
    """
    worst, moved, followed = 0.0, 0.0, 0.0
    averaged = any(name.startswith("average.") for name in got)
    for name, before in start.items():
        before, leaf = before.double(), name.removeprefix("start.")
        if not {f"gradient.{leaf}", f"weight.{leaf}"} <= got.keys():
            return {"weight": math.inf}
        g, weight = (got[f"{kind}.{leaf}"].double() for kind in ("gradient", "weight"))
        step = weight - before
        off = ((step + LR * g / (g.abs() + ADAM_EPS)).abs().max() / LR).item()
        worst = max(worst, math.inf if math.isnan(off) else off)
        if averaged:
            small = before.abs() < SMALL
            moved += (step[small] ** 2).sum().item()
            followed += (step * (got[f"average.{leaf}"].double() - before))[small].sum().item()
    found = {"weight": worst}
    if averaged:
        share = followed / moved if moved else math.nan
        found["average"] = abs(share / (1 - EMA_DECAY) - 1)
    return found


# ---- check, then time ----------------------------------------------------------------------------


def race(
    jobs: list[Job], model: UNet, options: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[str]]:
    """turns.race of the contestants of one batch size and precision."""
    batch, precision, shape = jobs[0].batch, jobs[0].precision, jobs[0].shape
    x0, draws = first_batch(model, batch, shape)
    truth = torch_step(model, x0, draws, torch.float64, "fp32")
    start = {f"start.{name}": p.detach() for name, p in model.named_parameters()}
    limits, theirs = dict(ALLOWED[precision]), math.nan
    if precision == "bf16":
        own = torch_step(model, x0, draws, torch.float32, "bf16")
        theirs = errors(own, truth)["gradient"]
        limits["gradient"] = ALLOWED_OF_TORCH_BF16 * theirs
        print(f"PyTorch's own network in bf16, batch {batch}: error {theirs:.1e}")
    own_work = flop(model)

    def compare(runner: Any, job: Job, row: dict[str, Any]) -> str | None:
        path = Path(job.folder) / "parity.safetensors"
        write_tensors(path, {"x0": x0, "t": draws.t, "flip": draws.flip, "eps": draws.eps})
        runner.first_step(str(path))
        got = read_tensors(path)[0]
        same = job.name in OURS or PEERS[job.name].same
        if job.name in OURS:
            right, before = truth, start
        elif same:
            right = {"loss": truth["loss"], **as_theirs(model, truth, "gradient")}
            before = as_theirs(model, start, "start")
        else:
            exact = {k.removeprefix("exact."): v for k, v in got.items() if k.startswith("exact.")}
            right, before = exact, {k: v for k, v in exact.items() if k.startswith("start.")}
        found = errors(got, right) | optimiser_errors(got, before)
        row |= {"error": found["gradient"], "errors": found, "allowed": limits["gradient"]}
        row |= {"FLOP": own_work if same else runner.flop(), "own network": not same}
        if same and precision == "bf16":
            row["of PyTorch's error"] = found["gradient"] / theirs
        wrong = [k for k, error in found.items() if not error <= limits[k]]
        said = [f"{found[k]:.2g} of the {k}, allowed {limits[k]:.2g}" for k in wrong]
        if "gradient" in wrong:
            off = [k for k, d in distances(got, right).items() if d > limits["gradient"]]
            worst = off[0].removeprefix("gradient.")
            said.append(f"{len(off)} of {len(distances(got, right))} gradients, {worst} the first")
        return "; ".join(said) or None

    def ask(runner: Any, row: dict[str, Any]) -> None:
        if options.profile and (row["name"] in OURS or PEERS[row["name"]].same):
            row["parts"] = runner.parts(options.repeats)

    return turns.race(jobs, TrainingRemote, compare, options, 10**6, ask)


def more(
    rows: list[dict[str, Any]], model: UNet, options: argparse.Namespace, precision: str
) -> dict[str, Any]:
    """Print where the time of a step goes, if it is asked for; JSON-ready."""
    if not options.profile:
        return {}
    copied = copy_bandwidth(torch.device(options.device), options.threads)
    count = sum(p.numel() for p in model.parameters())
    waited = training_profile.fitted(model, options.batches[0], options.device, precision)
    print("\n" + training_profile.table(rows, count, copied))
    print(
        f"a copy moves {copied / 1e9:.3g} GB/s, reads and writes; what follows the gradients moves "
        f"{SWEPT_BYTES} bytes a parameter at least\nfit, {precision}, batch {options.batches[0]}: "
        f"waited for images {waited['waited'] / waited['seconds']:.2%} of {waited['seconds']:.3g} s"
    )
    return {"copy GB/s": copied / 1e9, "fit": waited}


def columns(row: dict[str, Any]) -> dict[str, str]:
    """A row of the table."""
    return {
        "error": f"{row['error']:.1e}",
        "ms an image": milliseconds(row["seconds"]),
        "turns": str(len(row["seconds"])),
        "images/s": f"{row['images/s']:.3g}",
        "x its memory": f"{row['x its memory']:.2f}" if "x its memory" in row else "",
    }
