"""A coder of images by a model: lossless by bits back along the chain. Public names only.

The file is described in container.py, a group of images in group.py, the order in which bits are
taken and given back in bits_back.py, the masses in csrc/codec/gaussian.h.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch

from fastddpm.codec import files
from fastddpm.codec.files import Decoder, encode_file
from fastddpm.diffusion import Diffusion, Model
from fastddpm.spacing import Spacing

__all__ = ["Decoder", "compress", "decompress", "encode_file"]


def compress(
    model: Model,
    x: torch.Tensor,
    *,
    diffusion: Diffusion | None = None,
    steps: int | str | Sequence[int] | None = None,
    spacing: Spacing = "strided",
    batch_size: int | None = None,
    precision: str = "fp32",
    progress: bool = True,
) -> bytes:
    """The images as a file, as many bits as the model's own bound and little more.

    x:              (N, C, H, W) uint8. Bits back needs bits to begin with: the first few images are
                    coded plainly, as a PNG's are, and a single image is no smaller than that
    steps, spacing: of a shorter chain, see Schedule.respace: faster, and the file is
                    longer by what the shorter chain's bound is: much, evenly strided. None: all T
    batch_size:     images at a time, once enough bits are on the stack; None: what memory holds
    precision:      the network's arithmetic. "fp32", the CPU's native plan: decoded by the same
                    instruction set, which the file names

    Raises ValueError for anything but such images, a model that is no fastddpm.UNet on the CPU, one
    with classes, FloatingPointError where the model returns NaN or inf.
    """
    images, out = files.check_images(x), io.BytesIO()
    encode_file(
        model, images, out, diffusion=diffusion, steps=steps, spacing=spacing,
        batch_size=batch_size, precision=precision, progress=progress,
    )  # fmt: skip
    return out.getvalue()


def decompress(
    model: Model,
    data: bytes,
    *,
    diffusion: Diffusion | None = None,
    progress: bool = True,
) -> torch.Tensor:
    """The images (N, C, H, W) uint8 of a file by `compress`, each pixel as it was.

    Raises ValueError, in one line, for a file that is cut off, damaged or foreign, and for one of
    another model, chain or arithmetic: never are other pixels returned.
    """
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise ValueError(f"data must be bytes; got {type(data).__name__}")
    return files.decoded(model, io.BytesIO(data), "the data", diffusion, progress=progress)
