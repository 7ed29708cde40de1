"""Images into a file of coded images and out of it, group by group. No command line."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

import torch

from fastddpm import arguments
from fastddpm.batching import batch_size_for
from fastddpm.chain import visits
from fastddpm.codec import group
from fastddpm.codec.container import MOST_PIXELS, SIGNATURE, Head, Reader, write_chunk
from fastddpm.codec.grid import Grids
from fastddpm.codec.network import CPU, Network, coded_unet
from fastddpm.diffusion import Diffusion, Model
from fastddpm.host import own_state
from fastddpm.options import check_count
from fastddpm.progress import tqdm
from fastddpm.shards import fingerprint
from fastddpm.spacing import Spacing


@dataclass(frozen=True)
class Coded:
    """images: how many;  plain: of them without the model;  net: bits/dim of the others on the
    stack, None where there are none"""

    images: int
    plain: int
    net: float | None


class Images(Protocol):
    """Images of one shape by index: fastddpm.data's sets, and `Tensors`."""

    shape: tuple[int, int, int]

    def __len__(self) -> int: ...

    def images(self, indices: Any) -> torch.Tensor: ...


class Tensors:
    """A tensor (N, C, H, W) as Images."""

    def __init__(self, x: torch.Tensor):
        self.x, self.shape = x, (x.shape[1], x.shape[2], x.shape[3])

    def __len__(self) -> int:
        return len(self.x)

    def images(self, indices: Sequence[int]) -> torch.Tensor:
        return self.x[list(indices)].to(CPU)


@own_state()
def encode_file(
    model: Model,
    images: Images,
    file: BinaryIO,
    *,
    diffusion: Diffusion | None = None,
    steps: int | str | Sequence[int] | None = None,
    spacing: Spacing = "strided",
    batch_size: int | None = None,
    precision: str = "fp32",
    progress: bool = True,
) -> Coded:
    """Write all images; see `fastddpm.codec.compress`."""
    unet = coded_unet(model)
    full = Diffusion.of(model, diffusion)
    process = full.respace(steps, spacing=spacing)
    shape, dims = images.shape, math.prod(images.shape)
    if dims > MOST_PIXELS:
        raise ValueError(f"images must have at most 2^26 values; these are {_size(shape)}")
    if batch_size is None:
        batch_size = min(64, batch_size_for(unet, shape, "fp32", CPU))
    most = min(check_count("batch_size", batch_size), group.LARGEST_BATCH)
    most = max(1, min(most, group.PIXELS // dims))
    grids, network = Grids(process), Network(unet, process, shape, precision)
    chain = visits(full.schedule, process.schedule)
    head = Head(
        len(images), shape, fingerprint(unet, full), chain, grids.digest, network.facts,
        torch.__version__,
    )  # fmt: skip
    file.write(SIGNATURE)
    write_chunk(file, b"HEAD", head.to_bytes())
    together, plain, bits = group.images_of_a_group(dims), 0, 0.0
    with _bar("compress", len(images), process.T, progress) as on_step:
        for start in range(0, len(images), together):
            part = images.images(range(start, min(start + together, len(images))))
            payload, some, more = group.encode(part, grids, network, most, on_step)
            write_chunk(file, b"GRUP", payload)
            plain, bits = plain + some, bits + more
    write_chunk(file, b"DONE", b"")
    backed = len(images) - plain
    return Coded(len(images), plain, bits / (backed * dims) if backed else None)


class Decoder:
    """A file that is read: `head` at once, images as they are asked for.

    name: how messages call the file
    Raises ValueError, in one line, for a file that is cut off, damaged or of another kind, for one
    of another model, chain or arithmetic than is at hand, and where pixels are not those coded.
    """

    @own_state()
    def __init__(self, model: Model, file: BinaryIO, name: str, diffusion: Diffusion | None = None):
        self._unet, self._name = coded_unet(model), name
        self._reader = Reader(file, name)
        self.head = head = self._reader.head
        full = Diffusion.of(model, diffusion)
        if (mine := fingerprint(self._unet, full)) != head.model:
            raise ValueError(
                f"{name} was coded with another model: its fingerprint is {head.model}, and that "
                f"of the model given is {mine}"
            )
        try:
            self._process = full.respace(head.steps)
        except ValueError as error:
            raise ValueError(f"{name} is damaged: {error}") from None
        self._grids = Grids(self._process)
        if self._grids.digest != head.tables:
            raise ValueError(
                f"{name} was coded with other tables of the chain: their digest is {head.tables}, "
                f"and here {self._grids.digest}"
            )

    def images(self, *, progress: bool = True) -> Iterator[torch.Tensor]:
        """(N, C, H, W) uint8 of one group after the other, all of them checked."""
        head, done = self.head, 0
        network: list[Network] = []

        def made() -> Network:
            if not network:
                network.append(Network.of(head.arithmetic, head.torch, self._unet, self._process,
                                          head.shape))  # fmt: skip
            return network[0]

        with _bar("decompress", head.images, self._process.T, progress) as on_step:
            for payload in self._reader.groups():
                with own_state():
                    try:
                        x = group.decode(payload, head.shape, self._grids, made, on_step)
                    except ValueError as error:
                        raise ValueError(f"{self._name}: {error}") from None
                done += len(x)
                if done > head.images:
                    break
                yield x
        if done != head.images:
            raise ValueError(
                f"{self._name} is damaged: HEAD says {head.images:,} images, and its groups hold "
                f"{'more' if done > head.images else f'{done:,}'}"
            )


@own_state()
def decoded(
    model: Model, file: BinaryIO, name: str, diffusion: Diffusion | None, *, progress: bool
) -> torch.Tensor:
    """All images of a file, (N, C, H, W) uint8."""
    return torch.cat(list(Decoder(model, file, name, diffusion).images(progress=progress)))


@contextlib.contextmanager
def _bar(what: str, images: int, T: int, progress: bool) -> Iterator[Any]:
    """A bar over the steps of all images, each of which takes one of the network."""
    with tqdm(
        total=images * T, desc=f"{what} {images:,} images", unit="step", unit_scale=True,
        disable=not progress,
    ) as shown:  # fmt: skip
        yield shown.update


def check_images(x: Any) -> Tensors:
    """ValueError for anything but (N, C, H, W) uint8, N at least 1."""
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"x must be a tensor (N, C, H, W); got {type(x).__name__}")
    if x.dtype != torch.uint8 or x.dim() != 4 or x.numel() == 0:
        raise ValueError(f"x must be (N, C, H, W) uint8, N >= 1; got {tuple(x.shape)} {x.dtype}")
    arguments.check_pixels("x", x)
    return Tensors(x)


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
