"""One encoded image -> (C, H, W) uint8: modes, alpha, orientation and the resize rule. No files, no
datasets.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from fastddpm.data.errors import reason

# Named, since Pillow would try every format it knows on hostile bytes, and runs a program for some.
DECODERS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
EXTENSIONS = (
    *(".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tif", ".tiff", ".webp"),
)


def decode_image(
    content: bytes,
    name: str,
    *,
    size: int | Sequence[int] | None = None,
    channels: int | None = None,
) -> torch.Tensor:
    """An encoded image as (C, H, W) uint8.

    size: pixels, one number or (H, W). The image is cropped about its centre to the target's aspect
          ratio (the crop rounded to whole pixels, the odd one lost at the right or bottom), then
          shrunk with Pillow's box filter (the mean of the area) or enlarged with its bicubic one.
          None: as it is
    channels: 1 (ITU-R 601 luma) or 3; None: 1 for grey modes, else 3, palettes included

    The EXIF orientation is applied and alpha is composited onto white, before anything else;
    16-bit grey is scaled to 8 bits; of an animation the first frame is taken.

    Raises ValueError, naming `name`, when there is no such image in `content`.
    """
    if channels not in (None, 1, 3):
        raise ValueError(f"{name}: channels must be None, 1 or 3; got {channels!r}")
    image = decode(content, check_size(size), channels)
    if isinstance(image, str):
        raise ValueError(f"{name} can't be read as an image: {image}")
    return torch.from_numpy(image)


def check_size(size: int | Sequence[int] | None) -> tuple[int, int] | None:
    """(H, W) from one number or two; ValueError for anything but positive integers."""
    if size is None:
        return None
    pair = (size, size) if isinstance(size, (int, np.integer)) else size
    if (
        not isinstance(pair, Sequence)
        or len(pair) != 2
        or any(isinstance(v, bool) or not isinstance(v, (int, np.integer)) for v in pair)
        or min(pair) < 1
    ):
        raise ValueError(f"size must be a positive integer or two, (H, W); got {size!r}")
    return int(pair[0]), int(pair[1])


def decode(content: bytes, size: tuple[int, int] | None, channels: int | None) -> np.ndarray | str:
    """`decode_image` on checked options: a contiguous (C, H, W) array, or the reason why not."""
    if not content:
        return "0 bytes"
    try:
        with Image.open(io.BytesIO(content), formats=DECODERS) as file:
            file.load()
            image = ImageOps.exif_transpose(file)
        if channels is None:
            channels = 1 if image.mode in ("1", "L", "LA") or image.mode.startswith("I") else 3
        image = _opaque(image).convert("L" if channels == 1 else "RGB")
        if size is not None:
            image = _resize(image, size)
        array = np.array(image)
    except UnidentifiedImageError:
        return f"none of {', '.join(DECODERS)}"
    except Exception as error:  # on hostile bytes decoders raise nearly anything
        return reason(error)
    if array.ndim == 2:
        return array[np.newaxis]
    return np.ascontiguousarray(array.transpose(2, 0, 1))


def _opaque(image: Image.Image) -> Image.Image:
    """8 bits without alpha: 16-bit grey scaled, transparency composited onto white."""
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is unknown")
    if image.mode.startswith("I"):
        grey = np.array(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("integer pixels outside 0 .. 65535")
        if isinstance(key := image.info.get("transparency"), int):
            grey[grey == key] = 65535
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    (H, W), (h, w) = size, (image.height, image.width)
    if w * H > h * W:
        crop_h, crop_w = h, max(1, round(h * W / H))
    else:
        crop_h, crop_w = max(1, round(w * H / W)), w
    left, top = (w - crop_w) // 2, (h - crop_h) // 2
    image = image.crop((left, top, left + crop_w, top + crop_h))
    if (crop_h, crop_w) == (H, W):
        return image
    shrink = crop_h > H or crop_w > W
    return image.resize((W, H), Image.Resampling.BOX if shrink else Image.Resampling.BICUBIC)
