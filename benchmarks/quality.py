"""How good models are beside real images: bits/dim of held-out images, and the distance of samples
from them in the features of EfficientNet-Lite0, by fastddpm.evaluation.

    pip install 'fastddpm[evaluation]'
    python benchmarks/quality.py MODEL [MODEL ...] --test PATH --train PATH [-n 512]
        [--bits 128] [--steps N] [--seed 0] [--nearest FILE.png] [--json FILE]

Samples and, in a row of their own, as many training images are compared with the held-out ones:
what real images get is what a perfect model would.

FD and KID in these features are neither FID nor comparable with it. FD falls with the number of
images: compare rows of one n. KID is of 100 subsets of half of the smaller set, 1,000 at most. At
most 2,000 held-out images are compared with, evenly spaced in their order. --nearest draws samples
beside those of as many training images that are nearest to them in these features.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the checkout that this file is in
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from machine import environment
from tabulate import tabulate

import fastddpm
from fastddpm import figures
from fastddpm.checkpoint import atomic_write
from fastddpm.data import WITH_SPLITS, open_dataset
from fastddpm.evaluation.distances import compare, features
from fastddpm.evaluation.extractors import EFFICIENTNET, Extractor, extractor
from fastddpm.evaluation.samples import samples

REAL = 2_000  # images of either set, at most
SHOWN = (8, 5)  # samples of --nearest, and training images beside each


def bits(model: fastddpm.UNet, images: torch.Tensor, seed: int) -> tuple[float, float]:
    """The bound of Eq. 5 over all steps, and its standard error over the images."""
    total = fastddpm.bits_per_dim(model, images, seed=seed).total
    return float(total.mean()), float(total.std()) / math.sqrt(len(total))


def evenly(dataset: fastddpm.data.Dataset, n: int) -> torch.Tensor:
    """n of the images, evenly spaced in their order; all, where there are no more."""
    n = min(n, len(dataset))
    return dataset.images(np.arange(n) * len(dataset) // n)


def draw_nearest(
    path: Path, samples: torch.Tensor, train: torch.Tensor, found: np.ndarray, known: np.ndarray
) -> None:
    """A row a sample: it, and the training images nearest to it in the features."""
    rows, beside = min(SHOWN[0], len(samples)), min(SHOWN[1], len(train))
    squares = ((found[:rows, None] - known[None]) ** 2).sum(-1)
    nearest = np.argsort(squares, axis=1)[:, :beside]
    images = [i for k in range(rows) for i in (samples[k], *train[nearest[k]])]
    figures.save_image(figures.grid(torch.stack(images), 1 + beside), path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--test", required=True, help="held-out images, or data with such a split")
    parser.add_argument("--train", required=True, help="training images")
    parser.add_argument("-n", type=int, default=512, help="samples of a model")
    parser.add_argument("--bits", type=int, default=128, help="held-out images for bits/dim")
    parser.add_argument("--steps", type=int, help="of a chain (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--nearest", type=Path, metavar="FILE.png")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(argv)

    network = extractor(EFFICIENTNET)
    train, test = open_dataset(options.train), open_dataset(options.test)
    if test.kind in WITH_SPLITS:
        test = open_dataset(options.test, split="test")
    models = {name: fastddpm.UNet.from_pretrained(name) for name in options.models}
    for name, shape in [(train.path, train.shape), *((k, shape_of(m)) for k, m in models.items())]:
        if shape != test.shape:
            raise ValueError(f"images of {name} are {shape}; the held-out ones {test.shape}")
    goal = features(evenly(test, REAL), network)
    known_images = evenly(train, REAL)
    known = features(known_images, network)
    pick = np.random.default_rng(options.seed).choice(len(known), min(options.n, len(known)), False)

    real = distances(known[pick], goal, network, options.seed)
    rows = [{"images": "training images", "n": len(pick), **real}]
    for name, model in models.items():
        bound, error = bits(model, evenly(test, options.bits), options.seed)
        drawn = torch.cat(list(samples(model, options.n, seed=options.seed, steps=options.steps)))
        found = features(drawn, network)
        figure = distances(found, goal, network, options.seed)
        row = {"images": name, "n": len(drawn), **figure, "bits/dim": bound, "its error": error}
        rows.append(row)
        if options.nearest:
            draw_nearest(options.nearest, drawn, known_images, found, known)
    print(
        f"\n{network.name}, against {len(goal):,} held-out images; bits/dim of "
        f"{min(options.bits, len(test))} of them\n"
    )
    print(tabulate(rows, headers="keys", floatfmt=".4g", missingval=""))
    if options.json:
        report = {"environment": environment(), "extractor": network.name, "rows": rows}
        with atomic_write(options.json) as file:
            file.write(json.dumps(report, indent=1).encode())
    return 0


def distances(
    found: np.ndarray, goal: np.ndarray, network: Extractor, seed: int
) -> dict[str, float | None]:
    fd, kid = compare(found, goal, network, seed=seed)[:2]
    return {"FD": fd.value, "KID": kid.value, "+-": kid.spread}


def shape_of(model: fastddpm.UNet) -> tuple[int, ...]:
    return (model.in_channels, *model.image_size)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"quality.py: {error}")
