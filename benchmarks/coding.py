"""How small lossless coding makes held-out images: ours, and what else there is.

    pip install imagecodecs brotli
    python benchmarks/coding.py --data PATH [--model fashion-mnist] [--split test] [-n 1000]
        [--steps 50 ...] [--peers PNG ...] [--bound N] [--json FILE] [--chart FILE.png]

A peer codes the images as they are best for it: a file each, or all as one picture, a column or a
square of them; the row says which was smallest. Everything is decoded and compared. Ours says
beside its file the bound of as many steps, of --bound images (bits_per_dim, its own noise), and
the net length of the images that the model codes: the rest is what starting costs, the first few
images that are coded plainly, checksums and container. Seconds are wall time of this process.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import io
import json
import lzma
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the checkout that this file is in
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from machine import environment
from PIL import Image
from tabulate import tabulate

import fastddpm
from fastddpm import codec
from fastddpm.checkpoint import atomic_write
from fastddpm.codec.files import Tensors
from fastddpm.data import WITH_SPLITS, open_dataset

Coder = tuple[Callable[[np.ndarray], bytes], Callable[[bytes], np.ndarray]]


def pictures() -> dict[str, Coder | str]:
    """Coders of a picture (H, W) or (H, W, 3) uint8 at their smallest; or why one is not there."""

    def by_pillow(kind: str, **options) -> Coder:
        def encode(picture: np.ndarray) -> bytes:
            buffer = io.BytesIO()
            Image.fromarray(picture).save(buffer, format=kind, **options)
            return buffer.getvalue()

        def decode(content: bytes) -> np.ndarray:
            with Image.open(io.BytesIO(content)) as image:
                return np.asarray(image)

        return encode, decode

    found: dict[str, Coder | str] = {
        "PNG (optimised)": by_pillow("PNG", optimize=True),
        "WebP (lossless, 6)": by_pillow("WEBP", lossless=True, quality=100, method=6),
    }
    try:
        import imagecodecs
    except ImportError:
        missing = "pip install imagecodecs"
        return found | {"JPEG XL (e9)": missing, "QOI": missing}
    found["JPEG XL (e9)"] = (
        lambda x: imagecodecs.jpegxl_encode(x, lossless=True, effort=9, usecontainer=False),
        lambda content: np.asarray(imagecodecs.jpegxl_decode(content)),
    )
    found["QOI"] = (
        lambda x: imagecodecs.qoi_encode(x if x.ndim == 3 else np.repeat(x[..., None], 3, 2)),
        lambda content: np.asarray(imagecodecs.qoi_decode(content)),
    )
    return found


def streams() -> dict[str, Coder | str]:
    """Coders of the raw bytes of all images."""

    def of(encode, decode) -> Coder:
        return lambda x: encode(x.tobytes()), lambda content: np.frombuffer(decode(content), "u1")

    found: dict[str, Coder | str] = {
        "gzip -9": of(lambda x: gzip.compress(x, 9, mtime=0), gzip.decompress),
        "bzip2 -9": of(lambda x: bz2.compress(x, 9), bz2.decompress),
        "xz -9e": of(lambda x: lzma.compress(x, preset=9 | lzma.PRESET_EXTREME), lzma.decompress),
    }
    try:
        import brotli
    except ImportError:
        return found | {"brotli (11)": "pip install brotli"}
    return found | {"brotli (11)": of(lambda x: brotli.compress(x, lgwin=24), brotli.decompress)}


def arrangements(x: np.ndarray) -> dict[str, list[np.ndarray]]:
    """(N, H, W) or (N, H, W, 3) as pictures: a file each, one column, one square filled up."""
    n, h, w, *rest = x.shape
    side = math.isqrt(n - 1) + 1
    padded = np.concatenate([x, np.zeros((side * side - n, h, w, *rest), np.uint8)])
    square = padded.reshape(side, side, h, w, *rest).swapaxes(1, 2)
    return {
        "a file each": list(x),
        "a column": [x.reshape(n * h, w, *rest)],
        "a square": [square.reshape(side * h, side * w, *rest)],
    }


def race(name: str, coder: Coder, ways: dict[str, list[np.ndarray]]) -> dict:
    """The smallest of the ways, decoded and compared."""
    encode, decode = coder
    rows = []
    for way, parts in ways.items():
        started = time.perf_counter()
        try:
            coded = [encode(part) for part in parts]
        except (ValueError, RuntimeError, OSError):  # WebP has sides of 16383 at the most
            continue
        seconds = time.perf_counter() - started
        for part, content in zip(parts, coded, strict=True):
            found = decode(content)
            if found.shape != part.shape:  # QOI has colours only
                found = found[..., 0] if found.ndim > part.ndim else found.reshape(part.shape)
            if not np.array_equal(found, part):
                raise SystemExit(f"{name} is not lossless here")
        rows.append({"bytes": sum(map(len, coded)), "how": way, "seconds": seconds})
    best = min(rows, key=lambda row: row["bytes"])
    return {"coder": name, **best, "each": rows[0]["bytes"]}


def ours(model: fastddpm.UNet, x: torch.Tensor, steps: int, some: int) -> dict:
    buffer, T = io.BytesIO(), model.diffusion.T
    started = time.perf_counter()
    coded = codec.encode_file(model, Tensors(x), buffer, steps=steps)
    seconds = time.perf_counter() - started
    started = time.perf_counter()
    if not torch.equal(codec.decompress(model, buffer.getvalue()), x):
        raise SystemExit("fastddpm is not lossless here")
    decoding = time.perf_counter() - started
    bound = fastddpm.bits_per_dim(model, x[:some], steps=steps).total
    return {
        "coder": f"fastddpm, {steps} steps" if steps < T else f"fastddpm, all {T} steps",
        "bytes": buffer.tell(), "how": f"{coded.plain} of {coded.images} plainly",
        "seconds": seconds, "decoding": decoding, "net": coded.net,
        "bound": float(bound.mean()), "its error": float(bound.std()) / math.sqrt(len(bound)),
    }  # fmt: skip


def chart(rows: list[dict], values: int, path: Path) -> None:
    import matplotlib.pyplot as plt

    names, sizes = [r["coder"] for r in rows], [8 * r["bytes"] / values for r in rows]
    figure, axes = plt.subplots(figsize=(7, 0.35 * len(rows) + 0.8), layout="constrained")
    colours = ["#2b6cb0" if name.startswith("fastddpm") else "#a0aec0" for name in names]
    bars = axes.barh(names, sizes, color=colours)
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.invert_yaxis()
    axes.set_xlabel("bits/dim")
    axes.set_xlim(0, 1.1 * max(sizes))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", required=True, help="held-out images, or data with such a split")
    parser.add_argument("--model", default="fashion-mnist")
    parser.add_argument("--split", default="test", choices=("train", "test"))
    parser.add_argument("-n", type=int, default=1000, help="the first so many images")
    parser.add_argument("--steps", type=int, nargs="*", default=[50], help="a row of ours each")
    parser.add_argument("--bound", type=int, default=100, help="images whose bound is computed")
    parser.add_argument("--peers", nargs="*", help="names that begin so (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--chart", type=Path, metavar="FILE.png")
    options = parser.parse_args(argv)

    model = fastddpm.UNet.from_pretrained(options.model)
    data = open_dataset(options.data)
    if data.kind in WITH_SPLITS and options.split != "train":
        data = open_dataset(options.data, split=options.split)
    x = data.images(range(min(options.n, len(data))))
    pixels = x.permute(0, 2, 3, 1).contiguous().numpy()
    ways = arrangements(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    raw = {"raw bytes": [pixels]}
    rows = [ours(model, x, steps, options.bound) for steps in options.steps]
    for coders, parts in ((pictures(), ways), (streams(), raw)):
        for name, coder in coders.items():
            if options.peers is not None and not name.startswith(tuple(options.peers) or ("\0",)):
                continue
            if isinstance(coder, str):
                print(f"{name}: not there ({coder})")
                continue
            rows.append(race(name, coder, parts))
    rows.sort(key=lambda row: row["bytes"])
    shown = [
        {
            "coder": row["coder"],
            "bits/dim": 8 * row["bytes"] / x.numel(),
            "net": row.get("net"),
            "bound": row.get("bound"),
            "+-": row.get("its error"),
            "ms an image": 1e3 * row["seconds"] / len(x),
            "decoding": 1e3 * row["decoding"] / len(x) if "decoding" in row else None,
            "how": row["how"],
        }
        for row in rows
    ]
    print(f"\n{len(x):,} images {'x'.join(map(str, x.shape[1:]))} of {options.data}\n")
    print(tabulate(shown, headers="keys", floatfmt=".4g", missingval=""))
    if options.json:
        report = {"environment": environment(), "images": list(x.shape), "rows": rows}
        with atomic_write(options.json) as file:
            file.write(json.dumps(report, indent=1).encode())
    if options.chart:
        chart(rows, x.numel(), options.chart)
    return 0


if __name__ == "__main__":
    sys.exit(main())
