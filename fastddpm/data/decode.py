"""One encoded image -> (C, H, W) uint8: modes, alpha, orientation and the resize rule. No files, no
datasets.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageChops, ImageFile, UnidentifiedImageError

from fastddpm.data import png
from fastddpm.data.errors import reason
from fastddpm.data.limits import Budget

# Named, since Pillow would try every format it knows on hostile bytes, and runs a program for some.
DECODERS = ("BMP", "DIB", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
EXTENSIONS = (
    *(".apng", ".bmp", ".dib", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pfm", ".pgm"),
    *(".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)
# Of formats that are not read, so that somebody's pictures are not left out without a word.
PICTURES = (
    *(".arw", ".avif", ".avifs", ".cr2", ".cr3", ".cur", ".dcx", ".dds", ".dng", ".exr", ".hdr"),
    *(".heic", ".heif", ".icns", ".ico", ".j2c", ".j2k", ".jng", ".jp2", ".jpc", ".jpf", ".jpx"),
    *(".jxl", ".jxr", ".mng", ".mpo", ".nef", ".orf", ".pam", ".pcx", ".pict", ".psd", ".qoi"),
    *(".ras", ".raw", ".rgb", ".rw2", ".sgi", ".svg", ".tga", ".xbm", ".xcf", ".xpm"),
)
DECODING = Budget(1536 << 20)  # bytes of all images that are decoded at a time
BYTES_A_PIXEL = 16  # of one while it is decoded: four copies of four channels at the most


class Picture(NamedTuple):
    """pixels: (C, H, W) uint8, contiguous; transparent: some of it showed what is behind it."""

    pixels: np.ndarray
    transparent: bool


def decode_image(
    content: bytes | bytearray,
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
    12- and 16-bit grey is scaled to 8 bits, of 16-bit colours the upper 8 are taken; of an
    animation the first frame is.

    Raises ValueError, naming `name`, when there is no such image in `content`, when a checksum in
    it is wrong, for numbers whose range is unknown (floating point, signed, 32 bits), and for more
    than `PIL.Image.MAX_IMAGE_PIXELS` pixels. Raises MemoryError when there is too little.
    """
    if channels not in (None, 1, 3):
        raise ValueError(f"{name}: channels must be None, 1 or 3; got {channels!r}")
    picture = decode(content, check_size(size), channels)
    if isinstance(picture, str):
        raise ValueError(f"{name} can't be read as an image: {picture}")
    return torch.from_numpy(picture.pixels)


def check_size(size: int | Sequence[int] | None, name: str = "size") -> tuple[int, int] | None:
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
        raise ValueError(f"{name} must be a positive integer or two, (H, W); got {size!r}")
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and int(pair[0]) * int(pair[1]) > most:
        raise ValueError(
            f"{name} must be of at most {most:,} pixels (PIL.Image.MAX_IMAGE_PIXELS); got {size!r}"
        )
    return int(pair[0]), int(pair[1])


def decode(
    content: bytes | bytearray, size: tuple[int, int] | None, channels: int | None
) -> Picture | str:
    """`decode_image` on checked options, or the reason why not; 2 and 4 channels keep the alpha."""
    if not content:
        return "0 bytes"
    try:
        if content.startswith(png.SIGNATURE):
            content = png.without_damage(content)
        with (
            Image.open(io.BytesIO(content), formats=DECODERS) as file,
            DECODING.take(_bounded(file) * BYTES_A_PIXEL),
        ):
            picture = _decoded(file, content, size, channels)
            file.close()  # its pixels go with what was taken
        return picture
    except UnidentifiedImageError:
        return f"none of {', '.join(DECODERS)}, or of a kind that Pillow does not read"
    except MemoryError:  # no fault of the image
        raise
    except Exception as error:  # on hostile bytes decoders raise nearly anything
        return reason(error)


def _bounded(file: Image.Image) -> int:
    """The most pixels that the decoder has in hand; ValueError for more than Pillow's limit."""
    tags = _tags(file)
    tile = int(tags.get(322, 1)) * int(tags.get(323, 1))  # TIFF decodes a tile as a whole
    pixels = max(file.width * file.height, tile)
    if Image.MAX_IMAGE_PIXELS is not None and pixels > Image.MAX_IMAGE_PIXELS:
        raise ValueError(
            f"a decompression bomb, or {pixels:,} pixels, more than the "
            f"{Image.MAX_IMAGE_PIXELS:,} of PIL.Image.MAX_IMAGE_PIXELS"
        )
    return pixels


def _decoded(
    file: ImageFile.ImageFile,
    content: bytes | bytearray,
    size: tuple[int, int] | None,
    channels: int | None,
) -> Picture:
    inverted = _is_inverted(file)
    file.load()
    image, grey = _eight_bits(file, content)
    if inverted:
        image = ImageChops.invert(image)
    if (turn := _orientation(file)) is not None:
        image = image.transpose(turn)
    if channels is None:
        channels = 1 if grey else 3
    transparent = False
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        transparent = image.getchannel("A").getextrema() != (255, 255)
        if channels in (1, 3):
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert({1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[channels])
    if size is not None:
        image = _resize(image, size)
    array = np.array(image)
    if array.ndim == 2:
        return Picture(array[np.newaxis], transparent)
    return Picture(np.ascontiguousarray(array.transpose(2, 0, 1)), transparent)


def _eight_bits(file: Image.Image, content: bytes | bytearray) -> tuple[Image.Image, bool]:
    """Samples of 8 bits whose zero is black, and whether they are grey.

    Where Pillow gives numbers as they are stored, the file says what they mean; ValueError where it
    does not.
    """
    tags = _tags(file)
    kinds = set(np.atleast_1d(tags.get(339, 1)).tolist())  # 1 unsigned, 2 signed, 3 float, 4 unsaid
    if file.mode == "F" or 3 in kinds:
        raise ValueError("floating-point pixels, whose range is unknown")
    if 2 in kinds:
        raise ValueError("signed pixels, whose range is unknown")
    if file.mode.startswith("I"):
        return _grey(file, tags), True
    if file.mode in ("La", "RGBa"):
        return file.convert({"La": "LA", "RGBa": "RGBA"}[file.mode]), file.mode == "La"
    grey = file.mode in ("1", "L", "LA")
    if file.format == "PNG":
        depth, colour = png.depth_and_colour(content)
        grey, key = colour in (0, 4), file.info.get("transparency")
        if colour == 2 and depth == 16 and key is not None:
            raise ValueError("a transparent colour of 16 bits, which is not read here")
        if colour == 0 and depth in (2, 4) and isinstance(key, int) and key < 2**depth:
            file.info["transparency"] = key * 255 // (2**depth - 1)  # as Pillow scales the pixels
    return file, grey


def _tags(file: Image.Image) -> Mapping[int, Any]:
    """A TIFF's, by number; {} of other formats."""
    return getattr(file, "tag_v2", {})


def _is_inverted(file: ImageFile.ImageFile) -> bool:
    """True of a TIFF of 16 bits whose zero is white, which Pillow does not turn as it does others.

    Said by the name of its unpacker, which is gone once it is loaded."""
    if file.format != "TIFF" or not file.mode.startswith("I") or _tags(file).get(262, 0) != 0:
        return False
    arguments = file.tile[0][3] or ("",)
    unpacker = arguments if isinstance(arguments, str) else str(arguments[0])
    return unpacker.startswith("I;16") and not unpacker.endswith("I")


def _grey(file: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """Samples of 12 or 16 bits as L, or as LA where the file names a value that is transparent."""
    if file.mode == "I" and file.format == "TIFF":
        raise ValueError("pixels of 32 bits, whose range is unknown")
    full = (1 << int(np.atleast_1d(tags.get(258, 16))[0])) - 1
    values = np.array(file).astype(np.int32)
    if values.min() < 0 or values.max() > full:
        raise ValueError(f"integer pixels outside 0 .. {full}")
    image = Image.fromarray(((values * 510 + full) // (2 * full)).astype(np.uint8))
    key = file.info.get("transparency")
    if isinstance(key, int):
        image.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return image


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(file: Image.Image) -> Image.Transpose | None:
    """How EXIF says to turn the image; a damaged EXIF says nothing, and the pixels stand."""
    try:
        return _TURNS.get(file.getexif().get(0x0112, 1))
    except Exception:  # on hostile bytes the reader of EXIF raises nearly anything
        return None


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
