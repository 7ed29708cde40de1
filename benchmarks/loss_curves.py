"""Draws the loss of training in fp32 and in bf16, step by step on the same batches with the same
draws, in one plot.

    python benchmarks/loss_curves.py FILE.png [--data PATH] [--preset NAME] [--steps 2000]
        [--batch-size N] [--seed 0] [--threads N] [--device cuda]

The recipe is a preset's. At each step both networks, which began with the same weights, see the
same images with the same t, eps and flips, and each goes on from its own weights. Prints the mean
loss of each tenth of the run; FILE.json, beside the plot, has every loss.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the checkout that this file is in
sys.path.insert(0, str(Path(__file__).parent))

import torch
from machine import environment
from tabulate import tabulate

from fastddpm import Diffusion, Trainer, UNet
from fastddpm.checkpoint import atomic_write
from fastddpm.data import batch_indices, open_dataset
from fastddpm.training.presets import preset

PRECISIONS = ("fp32", "bf16")
DATA = "/usr/share/datasets/fashion-mnist"
SMOOTHED = 50  # steps that a point of the thick line averages over


def losses(options: argparse.Namespace) -> dict[str, list[float]]:
    """The loss of every step in each precision."""
    recipe = preset(options.preset)
    dataset = open_dataset(options.data, progress=False)
    batch_size = options.batch_size or recipe.batch_size
    torch.manual_seed(options.seed)
    model = UNet(**recipe.model, diffusion=Diffusion(variance=recipe.variance))
    trainers = {
        precision: Trainer(
            copy.deepcopy(model).to(options.device), precision=precision, lr=recipe.lr,
            warmup=recipe.warmup, ema_decay=recipe.ema_decay, ema_warmup=recipe.ema_warmup,
            grad_clip=recipe.grad_clip, flip=recipe.flip, seed=options.seed,
        )
        for precision in PRECISIONS
    }  # fmt: skip
    found: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
    for step in range(options.steps):
        images = dataset.images(batch_indices(len(dataset), batch_size, step, seed=options.seed))
        for precision, trainer in trainers.items():
            found[precision].append(trainer.step(images).item())
    return found


def smooth(values: list[float]) -> list[float]:
    """The mean of the last SMOOTHED values at each step, of as many as there are."""
    starts = (max(0, i + 1 - SMOOTHED) for i in range(len(values)))
    return [statistics.fmean(values[start : i + 1]) for i, start in enumerate(starts)]


def plot(path: Path, found: dict[str, list[float]], title: str) -> None:
    """Both curves on one pair of axes, their difference below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    smoothed = {precision: smooth(values) for precision, values in found.items()}
    styles = {"fp32": ("tab:blue", "-", 2.5), "bf16": ("tab:orange", "--", 1.5)}
    for precision, (colour, line, width) in styles.items():
        top.plot(found[precision], color=colour, alpha=0.15, linewidth=0.5)
        top.plot(smoothed[precision], color=colour, linestyle=line, linewidth=width,
                 label=precision)  # fmt: skip
    top.set(ylabel="mean squared error", yscale="log", title=title)
    top.legend()
    pairs = zip(smoothed["bf16"], smoothed["fp32"], strict=True)
    bottom.plot([100 * (b / a - 1) for b, a in pairs], color="0.3", linewidth=1)
    bottom.set(xlabel="step", ylabel="bf16 over fp32, %")
    for axes in (top, bottom):
        axes.grid(alpha=0.3, which="both")
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


def tenths(found: dict[str, list[float]]) -> list[dict[str, str]]:
    """Rows of the table: the mean loss of each tenth."""
    n = len(found["fp32"])
    edges = sorted({round(n * i / 10) for i in range(11)})
    rows = []
    for a, b in itertools.pairwise(edges):
        means = {p: statistics.fmean(found[p][a:b]) for p in PRECISIONS}
        rows.append(
            {
                "steps": f"{a + 1} .. {b}",
                **{p: f"{mean:.5f}" for p, mean in means.items()},
                "bf16 over fp32": f"{100 * (means['bf16'] / means['fp32'] - 1):+.2f} %",
            }
        )
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("out", type=Path, help="the plot, a .png file")
    parser.add_argument("--data", default=DATA, help=f"default {DATA}")
    parser.add_argument("--preset", default="fashion-mnist")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, help="default: the preset's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps must be at least 1; got {options.steps}")
    if options.out.suffix != ".png":
        parser.error(f"the plot must be a .png file; got {options.out}")
    torch.set_num_threads(options.threads)
    try:
        found = losses(options)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    plot(options.out, found, f"{options.preset}, {options.steps} steps, same batches and draws")
    facts = {
        **environment(), "preset": options.preset, "seed": options.seed,
        "batch size": options.batch_size or preset(options.preset).batch_size,
    }  # fmt: skip
    report = json.dumps({"environment": facts, "loss": found}) + "\n"
    options.out.with_suffix(".json").write_text(report, encoding="utf-8")
    print(tabulate(tenths(found), headers="keys", tablefmt="simple", disable_numparse=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
