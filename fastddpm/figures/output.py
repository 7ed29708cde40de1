"""Where samples and pictures go: into .png and .npz files, whole or not at all. Sets in folders are
shards.py's.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastddpm.checkpoint import atomic_write, locked_temporary, named
from fastddpm.figures.pictures import check_channels, grid, to_uint8

FORMATS = (
    "a .png file (a grid), a .npz file (uint8 array `images`, NHWC) or a folder (one .png an image)"
)


def save_image(image: Image.Image, path: str | os.PathLike) -> None:
    """Write a .png atomically."""
    with atomic_write(path) as file:
        image.save(file, format="PNG")


def check_output(
    path: str | os.PathLike,
    *,
    kinds: Sequence[str] = (".png", ".npz", ""),
    channels: int | None = None,
) -> Path:
    """The path, if samples can be written there; ValueError or OSError before anything is computed.

    channels: of the samples, where they are known. What a folder takes is shards.py's to say.
    Nothing is left behind. A path without a suffix, or an existing folder, is a folder; where
    nothing but a folder will do, any path is.
    """
    path = named(path)
    suffix = "" if path.is_dir() or tuple(kinds) == ("",) else path.suffix.lower()
    if suffix not in kinds:
        allowed = FORMATS if "" in kinds else " or ".join(kinds)
        raise ValueError(f"output {str(path)!r}: give {allowed}")
    if suffix == ".png" and channels is not None:
        check_channels(channels)
    folder = path if suffix == "" else path.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(f"output {str(path)!r}: {folder} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"output {str(path)!r}: {folder} can't be written to")
    if suffix:  # the name may be too long, the folder one where none may make a file (/proc)
        try:
            handle, temporary = locked_temporary(folder / path.name)
            os.close(handle)
            os.unlink(temporary)
        except OSError as error:
            raise type(error)(
                f"output {str(path)!r}: {folder} can't be written to ({error.strerror})"
            ) from None
    return path


def save_samples(
    images: torch.Tensor, path: str | os.PathLike, *, columns: int | None = None
) -> Path:
    """Write images into one file, .png or .npz, as FORMATS says; whole or not at all."""
    path = check_output(path, kinds=(".png", ".npz"), channels=images.shape[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".png":
        save_image(grid(images, columns), path)
    else:
        buffer = io.BytesIO()
        np.savez(buffer, images=to_uint8(images).permute(0, 2, 3, 1).cpu().numpy())
        with atomic_write(path) as file:
            file.write(buffer.getvalue())
    return path
