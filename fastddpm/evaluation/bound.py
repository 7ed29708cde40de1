"""The variational bound of a whole data set: batch by batch, by one process or several, in a folder
from which it goes on when it was stopped. The bound of a batch is bits.py's."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastddpm import kept, ranks
from fastddpm.batching import Batches
from fastddpm.chain import visits
from fastddpm.checkpoint import atomic_write, named, read_json, remove_abandoned, write_json
from fastddpm.data import Dataset
from fastddpm.diffusion import Diffusion, Model
from fastddpm.engine import runnable
from fastddpm.evaluation.bits import BitsPerDim, Likelihood, Passes
from fastddpm.evaluation.images import Images
from fastddpm.evaluation.strata import Strata
from fastddpm.folder_lock import locked
from fastddpm.host import own_state
from fastddpm.shards import cut, fingerprint, missing
from fastddpm.spacing import Spacing
from fastddpm.unet import UNet
from fastddpm.wrapped import unwrap

PIECE = 16  # images whose terms are kept as one sum: the same sums however a set is cut and shared
PILOT = "pilot.json"

Range = tuple[int, int]  # of images: from, and up to but without


@dataclass(frozen=True)
class Bound:
    """The bound of a data set, bits/dim but for mse.

    n, T, dims: images, steps of the chain, and C H W
    total: (n,) float64, of each image, in the data set's order
    prior: L_T, the mean over the images
    terms: (T,) float64, means over the images: terms[0] the decoder L_0, terms[t] the KL L_t
    mse:   (T,) float64, mean squared error of the x0 prediction at t, for images in [-1, 1]
    sampled: K where each image had K of T terms, see bits_per_dim; None: all

    mean = prior + terms.sum(), to rounding."""

    n: int
    T: int
    dims: int
    total: np.ndarray
    prior: float
    terms: np.ndarray
    mse: np.ndarray
    sampled: int | None = None

    @property
    def mean(self) -> float:
        return float(self.total.mean())

    @property
    def stderr(self) -> float:
        """Of the mean, over the draw of the images and, with `sampled`, of their terms; NaN for one
        image."""
        return float(self.total.std(ddof=1) / math.sqrt(self.n)) if self.n > 1 else math.nan

    def to_json(self) -> dict[str, Any]:
        """JSON-ready, for `from_json`."""
        arrays = {name: getattr(self, name).tolist() for name in ("total", "terms", "mse")}
        numbers = {name: getattr(self, name) for name in ("n", "T", "dims", "prior", "sampled")}
        return {**numbers, **arrays}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Bound:
        """What `to_json` gave; ValueError for anything else."""
        try:
            lists = ("total", "terms", "mse")
            arrays = {name: np.array(content[name], dtype=np.float64) for name in lists}
            n, T, dims = (int(content[name]) for name in ("n", "T", "dims"))
            sampled = content["sampled"]
            whole = cls(
                n=n, T=T, dims=dims, prior=float(content["prior"]),
                sampled=None if sampled is None else int(sampled), **arrays,
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"this is no bound of a data set: {error!r}") from None
        shapes = [whole.total.shape, whole.terms.shape, whole.mse.shape]
        if shapes != [(n,), (T,), (T,)]:
            raise ValueError(f"this is no bound of {n} images and {T} steps: its lists differ")
        return whole


@own_state()
def bound(
    model: Model,
    images: Dataset | Images | torch.Tensor,
    *,
    diffusion: Diffusion | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    steps: int | str | Sequence[int] | None = None,
    spacing: Spacing = "strided",
    terms: int | None = None,
    clip: bool = True,
    model_kwargs: dict[str, Any] | None = None,
    precision: str = "fp32",
    engine: str = "auto",
    folder: str | os.PathLike | None = None,
    progress: bool = True,
) -> Bound:
    """The bound of all `images` (DDPM Eq. 5), image k with the noise of sample k of the seed.

    images: a fastddpm.data.Dataset, (N, C, H, W) uint8, or an evaluation.Images: never all in
            memory as floats
    folder: what was found so far, in files that say of what: run again it goes on from there. None:
            nothing is written. model must be a UNet then, which has a fingerprint
    others: as bits_per_dim's

    Where torch.distributed is initialised the ranks share the images, all must make the call, and
    each gets the whole; they share the folder. The numbers are the same for any batch size and
    number of ranks, and wherever a run was cut: to the bit on the engine "cpu_plan", on others to
    the rounding of their network.

    Raises ValueError for images of another shape than the model's, for what else does not fit, and
    for a folder of another model, data set, chain or seed, naming what differs: nothing is written
    there. FloatingPointError names the image and the step at which a term is not finite."""
    rank, world = ranks.place()
    with ranks.together():
        data = images if isinstance(images, Images) else Images(images, name="images")
        n, shape = len(data), tuple(data.shape)
        if n == 0:
            raise ValueError("images: none")
        _check_shape(model, shape)
        device = images.device if isinstance(images, torch.Tensor) else torch.device("cpu")
        likelihood = Likelihood(
            model, n, shape, device, diffusion=diffusion, seed=seed, steps=steps, spacing=spacing,
            terms=terms, clip=clip, model_kwargs=model_kwargs, precision=precision, engine=engine,
        )  # fmt: skip
        batches = likelihood.batches(batch_size)
        about = _about(likelihood, model, data, folder is not None, progress and rank == 0)
    ranks.agree("must find the bound of the same images", **about)
    store = _Store(None if folder is None else named(folder), about)
    with contextlib.ExitStack() as stack:
        there: dict[Range, _Part] = {}
        strata: Strata | None = None
        with ranks.together():
            if rank == 0:
                stack.enter_context(store.opened())
                there = store.read(n)
        there = ranks.from_first(there)
        gaps = missing((0, n), there)
        mine = cut(gaps, _at_a_time(gaps, batches, world))[rank::world]
        found = {}
        with ranks.together(), Passes(progress and rank == 0) as passes:
            if gaps:
                strata = store.strata(likelihood, data, passes)
            passes.expect(sum(stop - start for start, stop in mine) * likelihood.passes)
            for start, stop in mine:
                found[start, stop] = _find(likelihood, data, start, stop, strata, batches, passes)
                store.write((start, stop), found[start, stop])
        for others in ranks.everyone(found):
            there |= others
    return _joined(there, n, likelihood)


def _check_shape(model: Model, shape: tuple[int, ...]) -> None:
    """ValueError unless the images are what a model says that it was made for."""
    network = unwrap(runnable(model))
    if not isinstance(network, UNet):
        return
    size = network.image_size
    sides = (size, size) if isinstance(size, int) else tuple(size)
    expected = (network.in_channels, *sides)
    if shape != expected:
        raise ValueError(
            f"the images are {'x'.join(map(str, shape))}, the model's "
            f"{'x'.join(map(str, expected))} (channels, rows, columns): give images of that shape"
        )


def _about(
    likelihood: Likelihood, model: Model, data: Images, stored: bool, progress: bool
) -> dict[str, Any]:
    """What tells one bound from another, JSON-ready; unless it is stored, what costs nothing."""
    process, whole = likelihood.process, likelihood.whole
    about: dict[str, Any] = {
        "images": len(data),
        "shape": list(likelihood.shape),
        "chain": visits(whole.schedule, process.schedule),
        "terms": likelihood.K,
        "seed": likelihood.seed,
        "clip": likelihood.clip,
        "precision": likelihood.engine.precision,
        "model_kwargs": likelihood.given.facts()["model_kwargs"],
    }
    if not stored:
        return about
    network = runnable(model)
    if not isinstance(network, UNet):
        raise ValueError(
            "a folder's files name their model by its fingerprint: model must be a fastddpm.UNet; "
            f"got {type(unwrap(model)).__name__}; folder=None keeps nothing"
        )
    # What JSON reads back is what later runs compare with.
    about |= {"model": fingerprint(network, whole), "data": data.fingerprint(progress)}
    return json.loads(json.dumps(about))


def _at_a_time(gaps: list[Range], batches: Batches, world: int) -> int:
    """Images that are found and written at once: a batch or more, in whole pieces, so that every
    rank has some."""
    lacking = sum(stop - start for start, stop in gaps)
    most = min(batches.size, -(-lacking // world))
    return max(1, -(-most // PIECE)) * PIECE


# ---- parts of a set ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """Some images that follow one another: total and prior (n,), terms and mse (pieces, T), each
    the sum over the images of a piece; float64."""

    total: np.ndarray
    prior: np.ndarray
    terms: np.ndarray
    mse: np.ndarray


_FIELDS = ("total", "prior", "terms", "mse")


def _find(
    likelihood: Likelihood,
    data: Images,
    start: int,
    stop: int,
    strata: Strata | None,
    batches: Batches,
    passes: Passes,
) -> _Part:
    def draw(part: torch.Tensor) -> BitsPerDim:
        first = int(part[0])
        return likelihood.of(data[first : first + len(part)], part, strata, passes)

    index = torch.arange(start, stop, device="cpu")
    drawn = batches.draw(draw, index, passes)
    rows = {
        name: torch.cat([getattr(part, name) for part in drawn]).double().cpu().numpy()
        for name in _FIELDS
    }
    pieces = range(0, stop - start, PIECE)
    for name in ("terms", "mse"):
        rows[name] = np.stack([rows[name][k : k + PIECE].sum(axis=0) for k in pieces])
    return _Part(**rows)


def _joined(parts: dict[Range, _Part], n: int, likelihood: Likelihood) -> Bound:
    ordered = [parts[key] for key in sorted(parts)]
    total, prior = (np.concatenate([getattr(p, name) for p in ordered]) for name in _FIELDS[:2])
    terms, mse = (
        np.concatenate([getattr(p, name) for p in ordered]).sum(axis=0) / n for name in _FIELDS[2:]
    )
    return Bound(
        n=n, T=likelihood.process.T, dims=math.prod(likelihood.shape), total=total,
        prior=float(prior.mean()), terms=terms, mse=mse, sampled=likelihood.K,
    )  # fmt: skip


# ---- the folder ----------------------------------------------------------------------------------


class _Store:
    """Parts as files 00000064-00000128.npz, each with what it is of; without a folder, nothing."""

    def __init__(self, folder: Path | None, about: dict[str, Any]):
        self.folder, self._about = folder, about

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """For this process alone, until the block ends. ValueError, before anything is written, for
        a folder of another bound."""
        if self.folder is None:
            yield
            return
        if os.path.lexists(self.folder) and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is no folder: give another name")
        self._check()
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder, "bound"):
            self._check()
            remove_abandoned(self.folder, lambda name: bool(_range(name)) or name == PILOT)
            yield

    def _check(self) -> None:
        if self.folder is None or not self.folder.is_dir():
            return
        for path in sorted(self.folder.iterdir()):
            if _range(path.name) is None:
                continue
            kept.check_regular(path)
            said = _content(path)
            if said is not None:
                self._same(path, said[0])
        pilot = self._pilot()
        if pilot is not None:
            self._same(self.folder / PILOT, pilot.get("about", {}))

    def _same(self, path: Path, theirs: Any) -> None:
        said = theirs if isinstance(theirs, dict) else {}
        kept.check_same(path, "of another bound", said, self._about)

    def read(self, n: int) -> dict[Range, _Part]:
        """The parts whose whole files are there, none of an image twice; damaged ones are left
        out, and found again."""
        parts: dict[Range, _Part] = {}
        if self.folder is None:
            return parts
        at = 0
        for path in sorted(self.folder.iterdir()):
            here = _range(path.name)
            if here is None or not at <= here[0] < here[1] <= n:
                continue
            if here[0] % PIECE or (here[1] % PIECE and here[1] != n):
                continue  # its sums would be of other pieces
            content = _content(path)
            if content is not None and content[1] is not None:
                parts[here], at = content[1], here[1]
        return parts

    def write(self, here: Range, part: _Part) -> None:
        if self.folder is None:
            return
        buffer = io.BytesIO()
        arrays = {name: getattr(part, name) for name in _FIELDS}
        np.savez(buffer, about=np.array(json.dumps(self._about)), **arrays)
        with atomic_write(self.folder / f"{here[0]:08d}-{here[1]:08d}.npz") as file:
            file.write(buffer.getvalue())

    def _pilot(self) -> dict[str, Any] | None:
        assert self.folder is not None
        if not (self.folder / PILOT).is_file():
            return None
        try:
            return read_json(self.folder / PILOT)
        except ValueError:
            return None  # damaged

    def strata(self, likelihood: Likelihood, data: Images, passes: Passes) -> Strata | None:
        """Which terms the images get: by the folder's pilot, or a new one, by rank 0's."""
        if likelihood.K is None:
            return None
        weights = None
        with ranks.together():
            if ranks.place()[0] == 0:
                weights = self._weights(likelihood, data, passes)
        return Strata.of(np.array(ranks.from_first(weights)), likelihood.K)

    def _weights(self, likelihood: Likelihood, data: Images, passes: Passes) -> list[float]:
        T = likelihood.process.T
        if self.folder is not None and (pilot := self._pilot()) is not None:
            weights = pilot.get("weights")
            if isinstance(weights, list) and len(weights) == T:
                return weights

        def images(places: np.ndarray) -> torch.Tensor:
            return torch.cat([data[k : k + 1] for k in places.tolist()])

        weights = likelihood.pilot(images, passes).tolist()
        if self.folder is not None:
            write_json(self.folder / PILOT, {"about": self._about, "weights": weights})
        return weights


def _range(name: str) -> Range | None:
    match = re.fullmatch(r"(\d{8,})-(\d{8,})\.npz", name)
    return (int(match[1]), int(match[2])) if match else None


def _content(path: Path) -> tuple[Any, _Part | None] | None:
    """What a whole file says that it is of, and what it holds, if that is a part; None: damaged."""

    def content() -> tuple[Any, dict[str, np.ndarray]]:
        with np.load(path, allow_pickle=False) as file:
            return json.loads(str(file["about"])), {name: file[name] for name in _FIELDS}

    found = kept.if_whole(content)
    if found is None:
        return None
    about, arrays = found
    start, stop = _range(path.name) or (0, 0)
    pieces = -(-(stop - start) // PIECE)
    T = arrays["terms"].shape[-1] if arrays["terms"].ndim == 2 else -1
    shapes = {
        "total": (stop - start,), "prior": (stop - start,), "terms": (pieces, T), "mse": (pieces, T)
    }  # fmt: skip
    fits = all(
        x.dtype == np.float64 and x.shape == shapes[name] and np.isfinite(x).all()
        for name, x in arrays.items()
    )
    return about, _Part(**arrays) if fits else None
