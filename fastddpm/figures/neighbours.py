"""The images of a set that are nearest to samples (DDPM Fig. 12, 15), exactly: in pixels, or in the
features of a network that is given. No pictures.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch

from fastddpm import arguments
from fastddpm.data import Dataset
from fastddpm.figures.pictures import to_uint8
from fastddpm.host import own_state
from fastddpm.options import check_count
from fastddpm.progress import tqdm

Features = Callable[[torch.Tensor], Any]  # (n, C, H, W) uint8 -> (n, width)

BYTES = 1 << 26  # of a chunk of the set, as float64 pixels
MOST = 256  # images a chunk: a network's own memory is not known


class Sliced(Protocol):
    """Images of one shape that are read as they are asked for.

    shape: (C, H, W);  a slice: (m, C, H, W) uint8"""

    shape: Any

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice) -> torch.Tensor: ...


@own_state()
def nearest(
    samples: torch.Tensor,
    data: Dataset | Sliced | torch.Tensor,
    *,
    k: int = 8,
    features: Features | None = None,
    progress: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k images of `data` nearest to each sample: (n, k) int64 indices, (n, k) float64 Euclidean
    distances, the nearest first; of equal ones the lower index.

    samples:  (n, C, H, W) uint8, or float in about [-1, 1]
    data:     a set of `fastddpm.data`, (N, C, H, W) uint8, or what has slices that are such
    features: (m, C, H, W) uint8 -> (m, width) numbers, such as an extractor of
              fastddpm.evaluation; None: distances are of pixels on the 0 .. 255 scale

    Every image of the set is compared, a chunk at a time, in float64: for pixels every sum is of
    whole numbers, without rounding. Memory is bounded whatever the size of the set. Raises
    ValueError for another shape, k larger than the set, and features that are not finite, naming
    the image.
    """
    if not isinstance(samples, torch.Tensor) or samples.dim() != 4 or not len(samples):
        what = tuple(samples.shape) if isinstance(samples, torch.Tensor) else type(samples).__name__
        raise ValueError(f"samples must be a tensor (n, C, H, W), n >= 1; got {what}")
    arguments.check_pixels("samples", samples)
    read, N, shape = _reader(data)
    if tuple(samples.shape[1:]) != shape:
        raise ValueError(
            f"samples and data must be images of one shape; got {tuple(samples.shape[1:])} and "
            f"{shape}"
        )
    k = check_count("k", k)
    if k > N:
        raise ValueError(f"k must be at most the {N} image{'s' * (N > 1)} of data; got {k}")
    parts = to_uint8(samples).cpu().split(MOST)
    found = torch.cat([_values(x, features, "sample", k * MOST) for k, x in enumerate(parts)])
    n = len(found)
    distances = torch.full((n, 0), math.inf, dtype=torch.float64)
    indices = torch.full((n, 0), -1, dtype=torch.int64)
    many = max(1, BYTES // (8 * math.prod(shape)))
    if features is not None:
        many = min(many, MOST)
    with tqdm(total=N, unit="image", desc="nearest", disable=not progress) as bar:
        for start in range(0, N, many):
            chunk = read(range(start, min(start + many, N)))
            values = _values(chunk, features, "image", start)
            if values.shape[1] != found.shape[1]:
                raise ValueError(
                    f"features must be of one width; got {found.shape[1]} and {values.shape[1]}"
                )
            # Not by a matrix product, in which what two images have in common would cancel.
            here = torch.cdist(found, values, compute_mode="donot_use_mm_for_euclid_dist")
            numbers = torch.arange(start, start + len(values)).expand(n, -1)
            joined = torch.cat((distances, here), dim=1)
            distances, order = (x[:, :k] for x in joined.sort(dim=1, stable=True))
            indices = torch.cat((indices, numbers), dim=1).gather(1, order)
            bar.update(len(values))
    return indices, distances


def _reader(data: Any) -> tuple[Callable[[range], torch.Tensor], int, tuple[int, ...]]:
    """(images of a range of numbers, how many there are, their shape)."""
    if isinstance(data, Dataset):
        return data.images, len(data), tuple(data.shape)
    shape = tuple(getattr(data, "shape", ()))
    if isinstance(data, torch.Tensor):
        shape = tuple(data.shape[1:]) if data.dtype == torch.uint8 else ()
    if len(shape) != 3 or not hasattr(data, "__getitem__"):
        what = f"{tuple(data.shape)} {data.dtype}" if isinstance(data, torch.Tensor) else type(data)
        raise ValueError(f"data must be a Dataset, or a tensor (N, C, H, W) uint8; got {what}")
    if not len(data):
        raise ValueError("data must have at least one image; got none")
    return lambda part: data[part.start : part.stop].cpu(), len(data), shape


def _values(
    images: torch.Tensor, features: Features | None, what: str, first: int = 0
) -> torch.Tensor:
    """(m, width) float64 by which images are compared."""
    if features is None:
        return images.flatten(1).to(torch.float64)
    found = torch.from_numpy(np.asarray(_dense(features(images)), dtype=np.float64))
    if found.dim() != 2 or len(found) != len(images):
        raise ValueError(
            f"features of {len(images)} images must be (n, width); got {tuple(found.shape)}"
        )
    finite = torch.isfinite(found).all(dim=1)
    if not finite.all():
        bad = first + int((~finite).nonzero()[0])
        raise ValueError(f"the features of {what} {bad} are not finite")
    return found


def _dense(values: Any) -> Any:
    return values.detach().cpu().double().numpy() if isinstance(values, torch.Tensor) else values
