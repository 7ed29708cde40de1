"""What people look at and where it goes: image grids, the loss plot, samples as png or npz. No
models, and no sets in folders: shards.py.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastddpm.checkpoint import atomic_write, locked_temporary, named

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # of pictures, by their channels
FORMATS = (
    "a .png file (a grid), a .npz file (uint8 array `images`, NHWC) or a folder (one .png an image)"
)


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
    factor = max(1, min(8, round(min_width / canvas.width)))
    return canvas.resize((canvas.width * factor, canvas.height * factor), Image.Resampling.NEAREST)


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


def loss_plot(
    path: str | os.PathLike,
    steps: Sequence[int],
    losses: Sequence[float],
    ylabel: str,
    held_out: Sequence[tuple[int, float]] = (),
) -> None:
    """Write the plot of a training run's loss.

    held_out: (step, bits/dim) of held-out images, as a second curve; the lowest is marked
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(steps, losses, linewidth=1, label="training loss")
    axes.set(xlabel="step", ylabel=ylabel, title="training loss")
    if len(losses) > 1 and min(filter(math.isfinite, losses), default=0) > 0:
        axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    if held_out:
        at, bits = zip(*held_out, strict=True)
        best = min(range(len(bits)), key=bits.__getitem__)
        right = axes.twinx()
        right.plot(at, bits, "C1o-", linewidth=1.5, markersize=3, label="held-out images")
        right.plot(at[best], bits[best], "C3o", label=f"best: {bits[best]:.4f}, step {at[best]:,}")
        right.set_ylabel("bits/dim of held-out images")
        axes.set_title("training loss, and bits/dim of held-out images")
        lines = [*axes.get_lines(), *right.get_lines()]
        figure.legend(handles=lines, loc="outside lower center", ncols=len(lines))
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


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
