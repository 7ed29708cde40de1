"""Emoji as a data set: every one of Noto Color Emoji that is a single code point, 32x32 on white.

    apt-get install fonts-noto-color-emoji
    python make_data.py [--font NotoColorEmoji.ttf] OUT

writes OUT/train.npz and OUT/test.npz: `images` (N, 32, 32, 3) uint8 and `code_points` (N,). In the
order of the code points, every tenth is held out. The same font gives the same bytes.

The font (SIL Open Font License 1.1) holds a PNG of 136x128 for each glyph, 4 columns of which are
empty on either side. Without them, the mean of 4x4 pixels on white is a pixel.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
SIZE, MARGIN, FACTOR = (136, 128), 4, 4
HELD_OUT = 10  # one of so many
FIRST, LAST = 0xA9, 0x1FAFF  # below are digits, above are tags and private copies of flags
PARTS = {0x200D, 0x20E3, *range(0x1F1E6, 0x1F200)}  # joiner, keycap, letters of flags: of sequences


def emoji(font: str) -> dict[int, np.ndarray]:
    """Code point: (32, 32, 3) uint8, in order."""
    with TTFont(font) as tables:
        names, (pictures, *_) = tables.getBestCmap(), tables["CBDT"].strikeData
        wanted = [c for c in sorted(names) if FIRST <= c <= LAST and c not in PARTS]
        return {c: small(pictures[names[c]].imageData) for c in wanted}


def small(png: bytes) -> np.ndarray:
    picture = Image.open(io.BytesIO(png))
    if picture.size != SIZE:
        raise ValueError(f"a glyph of {picture.size} pixels; expected {SIZE}")
    rgba = np.asarray(picture.convert("RGBA"), dtype=np.float64)[:, MARGIN:-MARGIN]
    alpha = rgba[..., 3:] / 255
    on_white = rgba[..., :3] * alpha + 255 * (1 - alpha)
    side = len(on_white) // FACTOR
    tiles = on_white.reshape(side, FACTOR, side, FACTOR, 3)
    return tiles.mean(axis=(1, 3)).round().astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--font", default=FONT)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    pictures = emoji(arguments.font)
    code_points = np.array(list(pictures), dtype=np.int32)
    images = np.stack(list(pictures.values()))
    held_out = np.arange(len(images)) % HELD_OUT == HELD_OUT - 1
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, part in {"train": ~held_out, "test": held_out}.items():
        path = arguments.out / f"{name}.npz"
        np.savez(path, images=images[part], code_points=code_points[part])
        print(f"{path}: {part.sum()} images of {images.shape[1]}x{images.shape[2]}")


if __name__ == "__main__":
    main()
