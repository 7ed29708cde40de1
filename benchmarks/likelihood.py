"""Bits/dim at speed: fastddpm.bits_per_dim against the loop of guided-diffusion's evaluation.

    python benchmarks/likelihood.py [--model fashion-mnist] [--batch 32] [--repeats 5]
        [--peers eager,compile] [--threads N] [--json FILE]

Both have the same weights, images, chain and number of threads; the peer's network is diffusers'
UNet2DModel in channels_last, eager or under torch.compile. Its loop is GaussianDiffusion's
calc_bpd_loop as guided-diffusion publishes it, in our words: for each t, noise, the network, both
Gaussians' means and variances, their KL, the decoder's likelihood by their tanh approximation of
the normal's distribution, and the errors of x0 and of eps. First both are shown to find the same
on the same noise, at steps over the whole chain; but for L_0, whose approximation is theirs, and
which is compared with the exact distribution in its place; their formulas in float64. Then they
take turns, each drawing its own noise as it does.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # the checkout that this file is in
sys.path.insert(0, str(Path(__file__).parent))

import contestants
import torch
from contestants import Job
from machine import environment, milliseconds
from networks import make_model
from tabulate import tabulate
from torch import Tensor

from fastddpm import Diffusion, ops
from fastddpm.checkpoint import atomic_write
from fastddpm.evaluation.bits import Likelihood
from fastddpm.options import check_count

PAUSE = 0.05  # seconds before a turn, for the threads of the one before to fall asleep
ALLOWED = 1e-5  # of a term, relative, and in bits/dim where a term is less
PEERS = {"eager": contestants.eager_nhwc, "compile": contestants.compiled}
Cdf = Callable[[Tensor], Tensor]


def tanh_cdf(x: Tensor) -> Tensor:
    """What they take for the normal's distribution."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


class Loop:
    """calc_bpd_loop of a model that predicts eps with one of their two fixed variances."""

    def __init__(
        self, diffusion: Diffusion, network: Callable, cdf: Cdf = tanh_cdf, dtype=torch.float32
    ):
        schedule = diffusion.schedule
        self.network, self.cdf, self.dtype = network, cdf, dtype
        betas, ab, before = schedule.betas, schedule.alphas_cumprod, schedule.alphas_cumprod_prev
        posterior = schedule.posterior_log_variance
        self.values = {
            "sqrt_ab": ab**0.5,
            "sqrt_1m_ab": (1 - ab) ** 0.5,
            "recip": (1 / ab) ** 0.5,
            "recip_m1": (1 / ab - 1) ** 0.5,
            "coef1": betas * before**0.5 / (1 - ab),
            "coef2": (1 - before) * (1 - betas) ** 0.5 / (1 - ab),
            "posterior": posterior,
            "log_variance": schedule.log_variance(diffusion.variance),
        }

    def extract(self, name: str, t: Tensor, x: Tensor) -> Tensor:
        values = torch.from_numpy(self.values[name]).to(t.device)[t].to(self.dtype)
        return values[:, None, None, None].expand(x.shape)

    def step(self, x0: Tensor, t: int, noise: Tensor) -> tuple[Tensor, Tensor]:
        """One t of the loop: (term, mse of x0)."""
        steps = torch.tensor([t] * len(x0))
        xt = self.extract("sqrt_ab", steps, x0) * x0 + self.extract("sqrt_1m_ab", steps, x0) * noise
        with torch.no_grad():
            true_mean = self.mean(x0, xt, steps)
            true_log_variance = self.extract("posterior", steps, x0)
            eps = self.network(xt.float(), steps).to(self.dtype)
            log_variance = self.extract("log_variance", steps, x0)
            predicted = self.extract("recip", steps, x0) * xt
            predicted = (predicted - self.extract("recip_m1", steps, x0) * eps).clamp(-1, 1)
            mean = self.mean(predicted, xt, steps)
            kl = 0.5 * (
                -1.0 + log_variance - true_log_variance
                + torch.exp(true_log_variance - log_variance)
                + (true_mean - mean) ** 2 * torch.exp(-log_variance)
            )  # fmt: skip
            kl = kl.mean(dim=(1, 2, 3)) / math.log(2.0)
            nll = -self.decoder(x0, mean, 0.5 * log_variance)
            nll = nll.mean(dim=(1, 2, 3)) / math.log(2.0)
            term = torch.where(steps == 0, nll, kl)
            mse = (predicted - x0).square().mean(dim=(1, 2, 3))
            back = (self.extract("recip", steps, x0) * xt - predicted) / self.extract(
                "recip_m1", steps, x0
            )
            (back - noise).square().mean(dim=(1, 2, 3))  # which they return as well
        return term, mse

    def mean(self, x0: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        return self.extract("coef1", t, xt) * x0 + self.extract("coef2", t, xt) * xt

    def decoder(self, x: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
        centered, inv_stdv = x - means, torch.exp(-log_scales)
        plus = self.cdf(inv_stdv * (centered + 1.0 / 255.0))
        minus = self.cdf(inv_stdv * (centered - 1.0 / 255.0))
        return torch.where(
            x < -0.999, torch.log(plus.clamp(min=1e-12)),
            torch.where(
                x > 0.999, torch.log((1.0 - minus).clamp(min=1e-12)),
                torch.log((plus - minus).clamp(min=1e-12)),
            ),
        )  # fmt: skip

    def seconds(self, x0: Tensor, steps: list[int]) -> float:
        start = time.perf_counter()
        for t in steps:
            self.step(x0, t, torch.randn_like(x0))
        return time.perf_counter() - start


class Ours:
    """bits_per_dim's loop over some of the steps."""

    def __init__(self, model: Any, shape: tuple[int, ...], n: int, precision: str):
        cpu = torch.device("cpu")
        self.likelihood = Likelihood(model, n, shape, cpu, precision=precision)
        self.index = torch.arange(n)

    @torch.no_grad()
    def terms(self, images: Tensor, steps: list[int]) -> tuple[Tensor, Tensor]:
        return self.likelihood._run(images, self.index, steps, lambda: None)

    def seconds(self, images: Tensor, steps: list[int]) -> float:
        start = time.perf_counter()
        self.terms(images, steps)
        return time.perf_counter() - start


def parity(ours: Ours, loop: Loop, images: Tensor, steps: list[int]) -> float:
    """The largest error of a term or an mse, in units of what is allowed."""
    x0 = images.double() / 127.5 - 1
    got = ours.terms(images, steps)
    worst = 0.0
    for k, t in enumerate(steps):
        eps = ops.randn(x0.shape, seed=0, step=t).double()
        for mine, theirs in zip(got, loop.step(x0, t, eps), strict=True):
            scale = ALLOWED * theirs.abs().clamp(min=1.0)
            worst = max(worst, ((mine[:, k] - theirs).abs() / scale).max().item())
    return worst


def test_images(shape: tuple[int, ...], n: int) -> Tensor:
    """Images with structure: waves of random phase, 256 levels."""
    c, h, w = shape
    y, x = torch.linspace(0, 3, h)[:, None], torch.linspace(0, 3, w)
    random = torch.Generator().manual_seed(0)
    phase = torch.rand(n, c, 1, 1, generator=random) * 6
    return ((torch.sin(3 * (x + y) + phase) + 1) * 127.5).round().to(torch.uint8)


def read(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="fashion-mnist", help="a bundled name, a folder, cifar10"
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5, help="turns of each")
    parser.add_argument("--steps", type=int, default=8, help="steps of a turn, evenly spaced")
    parser.add_argument("--peers", default="eager,compile", help="networks of the peer's loop")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="a small network, for tests")
    options = parser.parse_args(arguments)
    options.peers = options.peers.split(",")
    if unknown := set(options.peers) - set(PEERS):
        parser.error(f"--peers must be of {', '.join(PEERS)}; got {', '.join(sorted(unknown))}")
    try:
        for name in ("batch", "repeats", "steps", "threads"):
            check_count(f"--{name}", getattr(options, name))
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: list[str] | None = None) -> int:
    options = read(arguments)
    torch.set_num_threads(options.threads)
    model = make_model(options.model, options.quick)
    process, shape = model.diffusion, (model.in_channels, *model.image_size)
    if process.prediction != "eps" or process.learns_variance:
        print("their loop is written for eps with a fixed variance here", file=sys.stderr)
        return 1
    images, T = test_images(shape, options.batch), process.T
    checked = sorted({0, 1, T // 3, T - 1})
    turn = [T * (2 * k + 1) // (2 * options.steps) for k in range(options.steps)]
    facts = {**environment(), "threads": options.threads, **contestants.versions()}
    for name, value in facts.items():
        print(f"{name:<15} {value}")
    print()
    rows: list[dict[str, Any]] = []
    running: list[tuple[dict[str, Any], Callable[[], float]]] = []
    exact = Ours(model, shape, options.batch, "fp32")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        job = Job("", "fp32", folder, options.batch, "cpu", options.threads, shape, folder)
        for name in options.peers:
            network = PEERS[name](job)
            loop = Loop(process, network)
            error = parity(
                exact, Loop(process, network, torch.special.ndtr, torch.float64), images, checked
            )
            row = {"who": f"their loop, {name}", "error": error * ALLOWED}
            if error > 1:
                print(f"{row['who']} is off by {error * ALLOWED:.2g}; not timed", file=sys.stderr)
                return 1
            x0 = images.float() / 127.5 - 1
            running.append((row, lambda loop=loop, x0=x0: loop.seconds(x0, turn)))
        for precision in ("fp32", "bf16"):
            ours = exact if precision == "fp32" else Ours(model, shape, options.batch, precision)
            row = {"who": f"fastddpm {precision}", "error": 0.0}
            if precision == "bf16":
                apart = [
                    (a - b).abs().max().item()
                    for a, b in zip(
                        ours.terms(images, checked), exact.terms(images, checked), strict=True
                    )
                ]
                row["error"] = max(apart)
            running.append((row, lambda ours=ours: ours.seconds(images, turn)))
        for row, seconds in running:
            seconds()  # warm
            row["seconds"] = []
        for _ in range(options.repeats):
            for row, seconds in running:
                time.sleep(PAUSE)
                row["seconds"].append(seconds() / (len(turn) * options.batch))
    peer = min(
        statistics.median(row["seconds"]) for row, _ in running if row["who"].startswith("their")
    )
    for row, _ in running:
        middle = statistics.median(row["seconds"])
        row |= {"ms": middle * 1e3, "images/s, all steps": 1 / (middle * T), "x": peer / middle}
        rows.append(row)
    shown = [
        {
            "": row["who"],
            "error": f"{row['error']:.1e}",
            "ms an image-step": milliseconds(row["seconds"]),
            f"images/s, {T} steps": f"{row['images/s, all steps']:.3g}",
            "x the best loop of theirs": f"{row['x']:.2f}",
        }
        for row in rows
    ]
    print(tabulate(shown, headers="keys", tablefmt="github", disable_numparse=True))
    if options.json:
        report = {
            "environment": facts, "model": options.model, "batch": options.batch, "steps": turn,
            "rows": rows,
        }  # fmt: skip
        with atomic_write(options.json) as file:
            file.write((json.dumps(report, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
