"""A set of samples in a folder, in files that say what drew them: what is there is kept, what is
missing is drawn, by one process or several. Algorithm 2 is sampling.py's.

    000123.png                      sample 123
    00000256-00000512.npz           samples 256 .. 511: uint8 array `images`, NHWC

Files appear whole or not at all. Each holds, in a text chunk or as the array `about`, JSON of the
model's fingerprint, the seed, the chain and the classes `y`, if it has some; a folder holds one
set."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fastddpm import arguments, kept, ranks
from fastddpm.chain import Chain, bar, finite
from fastddpm.checkpoint import atomic_write, remove_abandoned
from fastddpm.diffusion import Diffusion
from fastddpm.figures import check_channels, check_output, to_pil, to_uint8
from fastddpm.given import BEGINNING, HOOKS, refuse
from fastddpm.host import own_state
from fastddpm.unet import UNet
from fastddpm.wrapped import unwrap

PICTURES = 1000  # up to so many images a folder has one file an image
SHARD = 256  # images a file from there on

NOT_SAID = ("distributed", *BEGINNING, *HOOKS)  # options that no file speaks of

Range = tuple[int, int]  # of sample indices: from, and up to but without


@own_state()
def sample_to_folder(
    model: UNet,
    folder: str | Path,
    n: int,
    *,
    seed: int = 0,
    first_index: int = 0,
    shard_size: int | None = None,
    batch_size: int | None = None,
    progress: bool = True,
    **options: Any,
) -> int:
    """Draw the samples first_index .. first_index + n - 1 that `folder` lacks; how many it lacked.

    shard_size: images a .npz file; 0: a .png an image; None: 0 for up to PICTURES, else SHARD
    options:    those of `fastddpm.sample` that a file can say: no hooks, beginnings or generators.
                Of a model with classes model_kwargs={"y": (n,) int64}, sample by sample

    Run again after whatever ended it, it goes on: whole files stay as they are, damaged and
    half-written ones are drawn again. Where torch.distributed is initialised the ranks share the
    files that are missing, and all must make the call. Raises ValueError for a folder that holds
    other samples, naming the file and what differs."""
    rank, world = ranks.place()
    model = unwrap(model)
    with ranks.together():
        folder = check_output(folder, kinds=("",))
        if not isinstance(model, UNet):
            raise ValueError(
                "a folder's files name their model by its fingerprint: model must be a "
                f"fastddpm.UNet; got {type(model).__name__}"
            )
        seed = arguments.seed(seed)
        n, first_index = arguments.indices(n, first_index)
        if shard_size is None:
            shard_size = 0 if n <= PICTURES else SHARD
        else:
            shard_size = arguments.integer("shard_size", shard_size, 0, 2**63 - 1, "at least 0")
        refuse("sample_to_folder", options, NOT_SAID)
        chain = Chain(model, **options)
        given = chain.given(n, first_index)
        labels = _labels(chain.model_kwargs.get("y"), first_index)
        if shard_size == 0:
            check_channels(chain.shape[0])
        batches = chain.batches(batch_size)
        process = Diffusion.of(model, options.get("diffusion"))
        about = {"model": fingerprint(model, process), "seed": seed, **chain.facts}
        about |= {"precision": chain.engine.precision}
    said = {**about, "model_kwargs": given.facts()["model_kwargs"]}
    ranks.agree(n=n, first_index=first_index, shard_size=shard_size, **said)
    pieces: list[Range] = []
    with ranks.together():
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            gaps = missing((first_index, first_index + n), present(folder, about, labels))
            pieces = cut(gaps, shard_size or _pictures_a_piece(gaps, batches.size, world))
            remove_abandoned(folder, lambda name: _overlaps(_indices(name), gaps))
    pieces = ranks.from_first(pieces)
    mine = pieces[rank::world]
    left = sum(stop - start for start, stop in mine)
    with ranks.together(), bar(left, chain.T, progress and rank == 0) as steps:
        for start, stop in mine:
            left -= stop - start
            index = torch.arange(start, stop, device="cpu")
            drawn = chain.draw(seed, index, batches, steps, later=left, given=given)
            images, one_file = finite(torch.cat(drawn)), shard_size > 0
            write(folder, start, images, about, one_file=one_file, labels=labels)
    return sum(stop - start for start, stop in pieces)


def fingerprint(model: UNet, diffusion: Diffusion | None = None) -> str:
    """Of configuration, process (None: the model's own) and weights: 16 hexadecimal digits of their
    SHA-256.
    """
    process = _of_process(model.diffusion if diffusion is None else diffusion)
    digest = hashlib.sha256(json.dumps([model.config, process]).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        values = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _of_process(diffusion: Diffusion) -> dict[str, Any]:
    """What tells a process from others, JSON-ready; of a shorter chain, which has no file, both its
    own steps and those that its model speaks of."""
    if (chain := diffusion.schedule).is_full:
        return diffusion.to_config()
    trained = [] if chain.full is None else chain.full.betas.tolist()
    return {
        "betas": [chain.betas.tolist(), trained],
        "timesteps": [chain.timesteps.tolist(), chain.full_steps],
        "outputs": [diffusion.prediction, diffusion.variance],
        **({"rescale_timesteps": True} if diffusion.rescale_timesteps else {}),
    }


# ---- ranges of sample indices --------------------------------------------------------------------


def missing(wanted: Range, there: Iterable[Range]) -> list[Range]:
    """The parts of `wanted` that no range of `there` covers, in order."""
    gaps, (at, stop) = [], wanted
    for first, last in sorted(there):
        if at < min(first, stop):
            gaps.append((at, min(first, stop)))
        at = max(at, last)
    return gaps + [(at, stop)] * (at < stop)


def cut(ranges: Iterable[Range], size: int) -> list[Range]:
    """The ranges in pieces that end at multiples of `size`."""
    pieces = []
    for start, stop in ranges:
        ends = [*range(start - start % size + size, stop, size), stop]
        pieces += list(zip([start, *ends[:-1]], ends, strict=True))
    return pieces


def _pictures_a_piece(gaps: Iterable[Range], most: int, world: int) -> int:
    """So that every rank has some to draw. Not for shards: where a set is cut must be the same when
    it is gone on with, and by how many."""
    lacking = sum(stop - start for start, stop in gaps)
    return min(most, max(1, -(-lacking // world)))


# ---- files ---------------------------------------------------------------------------------------


def _labels(y: torch.Tensor | None, first: int) -> dict[int, int]:
    """The class of each sample, by its number."""
    return {} if y is None else dict(enumerate(y.tolist(), first))


def present(
    folder: Path, about: dict[str, Any], labels: Mapping[int, int] = MappingProxyType({})
) -> list[Range]:
    """The ranges whose whole files lie in the folder; ValueError for a file of another set."""
    ranges = []
    for path in sorted(folder.iterdir()):
        if (indices := _indices(path.name)) is None:
            continue
        theirs = _about(path, indices[1] - indices[0])
        if theirs is not None:
            _check_same_set(path, theirs, about)
            _check_same_labels(path, theirs.get("y"), range(*indices), labels)
            ranges.append(indices)
    return ranges


def _indices(name: str) -> Range | None:
    """Of the samples in a file of this name."""
    if match := re.fullmatch(r"(\d{6,})\.png", name):
        return int(match[1]), int(match[1]) + 1
    if match := re.fullmatch(r"(\d{8,})-(\d{8,})\.npz", name):
        return int(match[1]), int(match[2])
    return None


def _overlaps(indices: Range | None, ranges: Iterable[Range]) -> bool:
    return indices is not None and any(
        start < indices[1] and indices[0] < stop for start, stop in ranges
    )


def _about(path: Path, count: int) -> dict[str, Any] | None:
    """What a whole file says of its set, {} if it says nothing; None if it is damaged.

    Raises ValueError for what is no file: it could not be replaced, or would be waited for."""
    kept.check_regular(path)

    def content() -> dict[str, Any]:
        said = json.loads(_text(path, count))
        return said if isinstance(said, dict) else {}

    return kept.if_whole(content)


def _text(path: Path, count: int) -> str:
    """The JSON in a file whose images were read whole."""
    if path.suffix == ".png":
        return kept.png_text(path)
    with np.load(path, allow_pickle=False) as file:
        text = str(file["about"]) if "about" in file else "{}"
        if len(file["images"]) != count:
            raise ValueError(f"{len(file['images'])} images")
    return text


def _check_same_set(path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    if not theirs:
        raise ValueError(f"{path} does not say what drew it: give another folder")
    kept.check_same(path, "a sample of another set", theirs, ours)


def _check_same_labels(path: Path, theirs: Any, samples: range, labels: Mapping[int, int]) -> None:
    if not labels:
        return
    if not isinstance(theirs, list) or len(theirs) != len(samples):
        raise ValueError(f"{path} does not say the classes of its samples: give another folder")
    for sample, y in zip(samples, theirs, strict=True):
        if labels.get(sample, y) != y:
            raise ValueError(
                f"{path} is a sample of another set: y of sample {sample} is {y!r} and here "
                f"{labels[sample]}; give another folder"
            )


def read(folder: str | Path, first: int, n: int) -> Iterator[torch.Tensor]:
    """The samples first .. first + n - 1 that lie in the folder, in order, (k, C, H, W) uint8: of a
    file at a time. Whose they are was asked before, see `present`; a damaged file counts as none.

    Raises ValueError for a sample that is not there."""
    folder, at, stop = Path(folder), first, first + n
    there = [(*found, path) for path in folder.iterdir() if (found := _indices(path.name))]
    damaged = ""
    for start, end, path in sorted(there):
        if start <= at < min(end, stop):
            images = _images(path)
            if images is None or len(images) != end - start:
                damaged = f": {path} is damaged"
                continue
            yield images[at - start : stop - start]
            at = end
    if at < stop:
        raise ValueError(f"sample {at} is not in {folder}{damaged}")


def _images(path: Path) -> torch.Tensor | None:
    """(k, C, H, W) of a file; None if it is damaged."""

    def pixels() -> torch.Tensor:
        if path.suffix == ".png":
            with Image.open(path, formats=("PNG",)) as image:
                array = np.atleast_3d(np.asarray(image))[None]
        else:
            with np.load(path, allow_pickle=False) as file:
                array = file["images"]
        return torch.from_numpy(array.transpose(0, 3, 1, 2).copy())

    return kept.if_whole(pixels)


def write(
    folder: Path,
    first: int,
    images: torch.Tensor,
    about: dict[str, Any],
    *,
    one_file: bool,
    labels: Mapping[int, int] = MappingProxyType({}),
) -> None:
    """Images in [-1, 1] from sample `first` on as one shard, or each as a picture."""
    for name, content in _files(first, images, about, one_file, labels):
        with atomic_write(folder / name) as file:
            file.write(content)


def _files(
    first: int,
    images: torch.Tensor,
    about: dict[str, Any],
    one_file: bool,
    labels: Mapping[int, int],
) -> Iterator[tuple[str, bytes]]:
    def said(samples: range) -> str:
        return json.dumps({**about, "y": [labels[k] for k in samples]} if labels else about)

    buffer = io.BytesIO()
    if one_file:
        pixels = to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()
        np.savez(buffer, images=pixels, about=np.array(said(range(first, first + len(images)))))
        yield f"{first:08d}-{first + len(images):08d}.npz", buffer.getvalue()
        return
    for k, image in enumerate(images):
        text = PngInfo()
        text.add_text(kept.KEY, said(range(first + k, first + k + 1)))
        buffer = io.BytesIO()
        to_pil(image).save(buffer, format="PNG", pnginfo=text)
        yield f"{first + k:06d}.png", buffer.getvalue()
