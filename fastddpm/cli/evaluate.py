"""`fastddpm evaluate`: its options, one call of the library, and its report."""

from __future__ import annotations

import argparse
import time

from tabulate import tabulate

import fastddpm
from fastddpm import console, ranks
from fastddpm.cli.arguments import path, timeout
from fastddpm.doctor import what_runs
from fastddpm.evaluation.plots import PLOTS
from fastddpm.evaluation.results import FILE
from fastddpm.evaluation.task import SHOWN
from fastddpm.figures import check_output
from fastddpm.unet import UNet

OPTIONS = (
    "train", "out", "n", "images", "reference", "steps", "terms", "curve", "seed", "extractor",
    "weights", "sampler", "eta", "resize", "batch_size", "precision", "engine",
)  # fmt: skip


def run(a: argparse.Namespace) -> None:
    with ranks.launched(a.device, a.timeout) as device:
        out = check_output(a.out, kinds=("",))
        model = UNet.from_pretrained(a.model).to(device)
        options = {name: getattr(a, name) for name in OPTIONS}
        started = time.perf_counter()
        found = fastddpm.evaluate(
            model, a.data, clip=not a.no_clip, progress=not a.quiet, **options
        )
        seconds = time.perf_counter() - started
        if ranks.place()[0] != 0:
            return
        rows = {
            "model": f"{a.model}, {found.results.about['model']}",
            "chain": f"{a.sampler}, {found.results.about['steps']} steps, seed {a.seed}",
            "wrote": f"{out / FILE}, {', '.join(PLOTS)}",
            "time": f"{seconds:.1f} s",
            "ran": what_runs(model, a.engine, a.precision),
        }
        text = tabulate(rows.items(), tablefmt="plain", disable_numparse=True)
        console.say(f"{found.table()}\n\n{text}", wanted=True)


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", type=path, required=True, metavar="D",
        help="test images: a folder, a file, or data whose test split is taken")  # fmt: skip
    add("--train", type=path, metavar="D2",
        help="training images, to judge the model by them as well; may be the same path of data "
        "with splits")  # fmt: skip
    add("-n", "--n", type=int, default=1000, help="samples to compare (default: 1000)")
    add("--images", type=int, metavar="N",
        help="images for bits/dim, evenly spaced in their order (default: all)")  # fmt: skip
    add("--reference", type=int, metavar="N",
        help="images to compare samples with, likewise (default: all)")  # fmt: skip
    add("--terms", type=int, metavar="K",
        help="terms of each image's bound, drawn, for an estimate (default: all)")  # fmt: skip
    add("--curve", type=int, default=SHOWN, metavar="N",
        help="test images that get all terms with --terms, for rate and distortion at every step "
        f"(default: {SHOWN})")  # fmt: skip
    add("--steps", type=int, help="a shorter chain of evenly strided steps (default: all)")
    add("--extractor", default="auto", metavar="NAME",
        help="inception (FID), efficientnet-lite0 (FD-EffLite0), none: no samples, or auto: the "
        "first that can be used (default: auto)")  # fmt: skip
    add("--weights", type=path, metavar="FILE", help="Inception's, which are not downloaded")
    add("--resize", action="store_true",
        help="crop and resize pictures to the model's size and colours, as training does"
    )  # fmt: skip
    add("--batch-size", type=int, help="images at a time (default: what memory holds)")
    timeout(add)
    add("--out", type=path, default="evaluation",
        help="a folder for evaluation.json, the plots and the samples; run again, it goes on "
        "(default: evaluation)")  # fmt: skip
