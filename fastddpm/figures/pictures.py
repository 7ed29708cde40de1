"""Images as pictures: pixels in [-1, 1] or 0 .. 255 as Pillow's images, in grids, and back from
files. No labels, no models.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from PIL import Image

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # of pictures, by their channels


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """[-1, 1] -> 0 .. 255, rounded and clipped; uint8 as it is."""
    if images.dtype == torch.uint8:
        return images
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def check_channels(channels: int) -> int:
    """The count, if a .png can show it; ValueError before anything is computed."""
    if channels not in MODES:
        raise ValueError(
            f"images of {channels} channels can't be a .png, which has 1 (grey), 2 (grey and "
            "alpha), 3 (RGB) or 4 (RGB and alpha): write them into .npz files"
        )
    return channels


def to_pil(image: torch.Tensor) -> Image.Image:
    """(C, H, W) of one of MODES -> an image; ValueError for other counts of channels."""
    check_channels(len(image))
    array = to_uint8(image).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array[:, :, 0] if len(image) == 1 else array)


def grid(
    images: torch.Tensor, columns: int | None = None, *, padding: int = 2, min_width: int = 600
) -> Image.Image:
    """(n, C, H, W) of one of MODES -> one picture, row by row, on opaque white; small pictures are
    enlarged by a whole factor.
    """
    n, channels, h, w = images.shape
    mode = MODES[check_channels(channels)]
    columns = min(n, columns or math.ceil(math.sqrt(n)))
    rows = math.ceil(n / columns)
    canvas = Image.new(
        mode,
        (columns * (w + padding) + padding, rows * (h + padding) + padding),
        "white",
    )
    for k, image in enumerate(images):
        row, column = divmod(k, columns)
        canvas.paste(
            to_pil(image), (padding + column * (w + padding), padding + row * (h + padding))
        )
    factor = whole_factor(canvas.width, min_width)
    return canvas.resize((canvas.width * factor, canvas.height * factor), Image.Resampling.NEAREST)


def whole_factor(width: int, min_width: int) -> int:
    """By which a picture is enlarged to about `min_width` pixels: whole, and 8 at most."""
    return max(1, min(8, round(min_width / width)))


def read_image(path: str | os.PathLike, size: Sequence[int], channels: int | None) -> torch.Tensor:
    """An image file as (C, H, W) uint8 by the resize rule of `fastddpm.data`; ValueError names the
    file.

    channels: one of MODES; 2 and 4 keep the alpha, which 1 and 3 put onto white
    """
    from fastddpm.data.decode import decode
    from fastddpm.data.errors import reading
    from fastddpm.data.sources import read_encoded

    if channels is not None:
        check_channels(channels)
    with reading(path, "an image"):
        picture = decode(read_encoded(path), (size[0], size[1]), channels)
    if isinstance(picture, str):
        raise ValueError(f"{path} can't be read as an image: {picture}")
    return torch.from_numpy(picture.pixels)
