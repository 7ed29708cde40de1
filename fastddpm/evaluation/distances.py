"""How far two sets of images are apart in the features of a network: FID where that is Inception,
KID, IS, precision and recall. The networks are extractors.py's.

All of it is float64 on the CPU, and what torch-fidelity computes of the same features, seed and
subsets, but for its float32 in KID, precision and recall: see each function.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from fastddpm import arguments
from fastddpm.data import Dataset
from fastddpm.evaluation.extractors import BATCH, Extractor, check_images
from fastddpm.evaluation.feature_cache import FeatureCache, user_cache
from fastddpm.host import own_state
from fastddpm.options import check_count
from fastddpm.progress import tqdm

CHUNK = 16 * BATCH  # images whose features are kept in one file
SUBSETS, SUBSET_SIZE = 100, 1000  # of KID; as torch-fidelity has them, as the splits of IS
SPLITS = 10
NEIGHBOUR = 3  # of precision and recall
ROWS = 512  # of a matrix of distances, at a time


class Sliced(Protocol):
    """Images that slices give, as tensors."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> torch.Tensor: ...


Images = Dataset | torch.Tensor | Sliced | Iterable[torch.Tensor]


@dataclass(frozen=True)
class Figure:
    """A number that two sets of features have.

    spread: standard deviation over KID's subsets or IS's splits; None where there are none
    note:   what has to be known to read it, or ""
    """

    name: str
    value: float
    spread: float | None
    n_generated: int
    n_real: int
    note: str = ""


class Bar(Protocol):
    def update(self) -> Any: ...


# ---- features ------------------------------------------------------------------------------------


def features(
    images: Images,
    extractor: Extractor,
    *,
    cache: str | os.PathLike | bool | None = None,
    progress: bool = True,
) -> np.ndarray:
    """(N, width) float32: the features of all images, in their order.

    images: a data set, (N, C, H, W) uint8 or what gives such by slices, or an iterable of parts; C
            is 1 or 3. No more than CHUNK of a data set are in memory at a time
    cache:  a folder where features are kept, CHUNK images a file, and found again by the pixels and
            the extractor: an interrupted call goes on, another set with the same images has them.
            True: `user_cache()`. None: none

    Raises ValueError for images of another kind or of several sizes, FloatingPointError naming the
    image whose features are not finite.
    """
    if cache is True:
        cache = user_cache()
    kept = None if cache is None or cache is False else FeatureCache(cache, extractor)
    found: list[torch.Tensor] = []
    with tqdm(
        total=_count(images), desc=f"{extractor.name}", unit="image", disable=not progress
    ) as bar:
        for chunk in _chunks(images):
            part = None if kept is None else kept.read(chunk)
            if part is None:
                part = _computed(chunk, extractor, sum(map(len, found)), bar)
                if kept is not None:
                    kept.write(chunk, part)
            else:
                bar.update(len(part))
            found.append(part)
    if not found:
        raise ValueError("there are no images to compute features of")
    return torch.cat(found).numpy()


def _computed(chunk: torch.Tensor, extractor: Extractor, first: int, bar: tqdm) -> torch.Tensor:
    parts: list[torch.Tensor] = []
    for start, images in zip(range(0, len(chunk), BATCH), chunk.split(BATCH), strict=True):
        part = extractor(images)
        if len(bad := (~torch.isfinite(part).all(dim=1)).nonzero()):
            at = first + start + int(bad[0])
            raise FloatingPointError(
                f"the features of image {at} by {extractor.name} are not finite"
            )
        parts.append(part)
        bar.update(len(part))
    return torch.cat(parts)


def _count(images: Images) -> int | None:
    return len(images) if isinstance(images, Sized) and not isinstance(images, list) else None


def _chunks(images: Images) -> Iterator[torch.Tensor]:
    """CHUNK checked images at a time, as many in the last one as are left, all of one shape."""
    shape, waiting = None, torch.empty(0)
    for part in _parts(images):
        check_images(part)
        if shape is not None and part.shape[1:] != shape:
            raise ValueError(
                f"images of {_size(part.shape[1:])} follow such of {_size(shape)}: all must have "
                "one size and as many channels"
            )
        shape = part.shape[1:]
        waiting = torch.cat([waiting, part]) if len(waiting) else part
        while len(waiting) >= CHUNK:
            yield waiting[:CHUNK]
            waiting = waiting[CHUNK:]
    if len(waiting):
        yield waiting


def _parts(images: Any) -> Iterator[torch.Tensor]:
    if isinstance(images, Dataset):
        for start in range(0, len(images), CHUNK):
            yield images.images(range(start, min(start + CHUNK, len(images))))
    elif isinstance(images, torch.Tensor) or not isinstance(images, Iterable):
        if not isinstance(images, torch.Tensor) and not hasattr(images, "__getitem__"):
            check_images(images)  # which says what they must be
        for start in range(0, len(images), CHUNK):
            yield images[start : start + CHUNK]
    elif isinstance(images, (np.ndarray, str, bytes)):
        check_images(images)
    else:
        yield from images


def _size(shape: torch.Size) -> str:
    return "x".join(map(str, shape))


# ---- figures -------------------------------------------------------------------------------------


@own_state()
def compare(
    generated: np.ndarray,
    real: np.ndarray,
    extractor: Extractor,
    *,
    kid_subsets: int = SUBSETS,
    kid_subset_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[Figure]:
    """What is known of two sets by their features, (n, width) each, from `features`, n >= 2.

    FID or FD-...: the Fréchet distance of the two Gaussians; falls with the number of images, so
                   only such of one n are compared
    KID:           kernel_distance; unbiased at any n, to be preferred below 5,000 images
    IS:            inception_score, where the extractor has classes; of the generated alone
    precision, recall: precision_recall, where either set has more than NEIGHBOUR images

    kid_subset_size: images a subset; None: SUBSET_SIZE, or half of the smaller set if that is less
    seed:            of KID's subsets and IS's splits, as torch-fidelity draws them from its own

    Names of figures end in the extractor's suffix. ValueError for features of another shape, or of
    fewer than two images; FloatingPointError where one is not finite."""
    generated = _checked("generated", generated, extractor)
    real = _checked("real", real, extractor)
    seed, few = arguments.seed(seed), min(len(generated), len(real))
    kid_subsets = check_count("kid_subsets", kid_subsets)
    if kid_subset_size is None:
        kid_subset_size = max(2, min(SUBSET_SIZE, few // 2))
    elif check_count("kid_subset_size", kid_subset_size, few) < 2:
        raise ValueError("kid_subset_size must be at least 2; got 1")

    def figure(name: str, value: float, spread: float | None = None, note: str = "") -> Figure:
        name = name if name == extractor.label else f"{name}{extractor.suffix}"
        return Figure(name, value, spread, len(generated), len(real), note)

    parts = sum(-(-len(x) // ROWS) for x in (generated, real, generated))  # of precision_recall
    total = kid_subsets + parts * (few > NEIGHBOUR) + 1
    with tqdm(total=total, desc="distances", unit="part", delay=2, disable=not progress) as bar:
        kid, deviation = kernel_distance(
            generated, real, subsets=kid_subsets, size=kid_subset_size, seed=seed, bar=bar
        )
        found = [figure("KID", kid, deviation, f"{kid_subsets} subsets of {kid_subset_size:,}")]
        logits = extractor.logits(torch.from_numpy(generated))
        if logits is not None:
            found.append(figure("IS", *inception_score(logits.numpy(), seed=seed)))
        if few > NEIGHBOUR:
            precision, recall = precision_recall(generated, real, bar=bar)
            found += [figure("precision", precision), figure("recall", recall)]
        distance = frechet_distance(generated, real)  # last: a long part without an end in sight
        bar.update()
    note = _rank(few, extractor.width) if few <= extractor.width else ""
    return [figure(extractor.label, distance, note=note), *found]


def _rank(n: int, width: int) -> str:
    return (
        f"{n:,} images do not determine the covariance of {width:,} features: it has rank {n - 1:,}"
    )


def _checked(name: str, found: Any, extractor: Extractor) -> np.ndarray:
    found = found.numpy(force=True) if isinstance(found, torch.Tensor) else found
    if not isinstance(found, np.ndarray) or found.dtype.kind != "f" or found.ndim != 2:
        got = getattr(found, "shape", None), getattr(found, "dtype", type(found).__name__)
        raise ValueError(
            f"{name} must be features, (n, {extractor.width}) float, as distances.features gives "
            f"them of images; got {got[0]} {got[1]}"
        )
    if found.shape[1] != extractor.width:
        raise ValueError(
            f"{name} has {found.shape[1]} features of each image; {extractor.name} has "
            f"{extractor.width}"
        )
    if len(found) < 2:
        raise ValueError(
            f"{name} has {len(found)} image{'s' * (len(found) != 1)}: how a set is spread is seen "
            "from 2 on"
        )
    if not np.isfinite(found).all():
        at = int(np.flatnonzero(~np.isfinite(found).all(axis=1))[0])
        raise FloatingPointError(f"the features of {name} image {at} are not finite")
    return found


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)), the means and covariances of two sets of features.

    tr (S S')^(1/2) is the sum of the singular values of R R'^T for any S = R^T R, S' = R'^T R':
    centred features over sqrt(n - 1), or their triangular factor where n is larger than the width.
    So no root of a product is taken, which rounding makes complex or negative where there are fewer
    images than features, and sets that are the same are 0 apart."""
    x, y = (torch.from_numpy(f).double() for f in (a, b))
    difference = x.mean(dim=0) - y.mean(dim=0)
    r, s = _root(x), _root(y)
    traces = float(r.square().sum() + s.square().sum())
    distance = float(difference.square().sum()) + traces
    distance -= 2 * float(torch.linalg.svdvals(r @ s.T).sum())
    return distance if distance > 1e-12 * traces else 0.0


def _root(x: torch.Tensor) -> torch.Tensor:
    """R with R^T R the covariance of the rows of x."""
    centred = (x - x.mean(dim=0)) / (len(x) - 1) ** 0.5
    return torch.linalg.qr(centred, mode="r").R if len(x) > x.shape[1] else centred


def kernel_distance(
    a: np.ndarray,
    b: np.ndarray,
    *,
    subsets: int = SUBSETS,
    size: int = SUBSET_SIZE,
    seed: int = 0,
    bar: Bar | None = None,
) -> tuple[float, float]:
    """KID: the unbiased squared MMD of the kernel (f . f' / width + 1)^3, mean and standard
    deviation over random subsets of `size` of either set. Below 0 by chance where they are alike.

    torch-fidelity multiplies float32 features in float32, some 1e-6 of the kernel's values off."""
    random = _random(seed)
    found = np.empty(subsets)
    for k in range(subsets):
        x, y = (f[random.choice(len(f), size, replace=False)].astype(np.float64) for f in (a, b))
        xx, yy, xy = ((u @ v.T / x.shape[1] + 1) ** 3 for u, v in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (size * (size - 1))
        found[k] = within - 2 * xy.mean()
        if bar is not None:
            bar.update()
    return float(found.mean()), float(found.std())


def inception_score(logits: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """IS: exp of the mean KL divergence of p(class | image) from its mean, mean and standard
    deviation over SPLITS parts of the shuffled images; over fewer, of two each, below 2 SPLITS."""
    log_p = torch.from_numpy(logits[_random(seed).permutation(len(logits))]).double()
    log_p = log_p.log_softmax(dim=1)
    n, splits = len(log_p), max(1, min(SPLITS, len(log_p) // 2))
    found = []
    for k in range(splits):
        part = log_p[k * n // splits : (k + 1) * n // splits]
        p = part.exp()
        terms = (p * (part - p.mean(dim=0).log())).where(p > 0, 0.0)  # 0 log 0 is 0
        found.append(float(terms.sum(dim=1).mean().exp()))
    return float(np.mean(found)), float(np.std(found))


def precision_recall(
    generated: np.ndarray, real: np.ndarray, *, k: int = NEIGHBOUR, bar: Bar | None = None
) -> tuple[float, float]:
    """The share of generated images that lie within the distance of some real one to its k-th
    nearest real neighbour; and the other way round (Kynkäänniemi et al. 2019; their features are of
    VGG-16).

    torch-fidelity's distances are float32: images at a ball's border may fall to its other side."""
    x, y = (torch.from_numpy(f).double() for f in (generated, real))
    centre = y.mean(dim=0)  # distances stay, and less of them is lost in |x|^2 + |y|^2 - 2 x . y
    x, y = x - centre, y - centre
    of_x, of_y = _radii(x, k, bar), _radii(y, k, bar)
    precise, recalled = [], torch.zeros(len(y), dtype=torch.bool)
    for part, radii in zip(_squares(x, y, bar), of_x.split(ROWS), strict=True):
        precise.append((part <= of_y).any(dim=1))
        recalled |= (part <= radii[:, None]).any(dim=0)
    return float(torch.cat(precise).double().mean()), float(recalled.double().mean())


def _radii(x: torch.Tensor, k: int, bar: Bar | None) -> torch.Tensor:
    """The square of each row's distance to its k-th nearest other."""
    return torch.cat([part.kthvalue(k + 1).values for part in _squares(x, x, bar)])


def _squares(x: torch.Tensor, y: torch.Tensor, bar: Bar | None) -> Iterator[torch.Tensor]:
    """Squared distances of ROWS rows of x at a time to all of y; of rows that are the same, 0."""
    lengths = y.square().sum(dim=1)
    for part in x.split(ROWS):
        sums = part.square().sum(dim=1, keepdim=True) + lengths
        squares = sums - 2 * part @ y.T
        yield squares.where(squares > 1e-12 * sums, 0.0)
        if bar is not None:
            bar.update()


def _random(seed: int) -> np.random.RandomState:
    """torch-fidelity's generator, whose draws NumPy promises not to change."""
    words = seed if seed < 2**32 else [seed & 0xFFFFFFFF, seed >> 32]
    return np.random.RandomState(words)
