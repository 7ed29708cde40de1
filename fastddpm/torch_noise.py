"""Noise of a caller's own torch.Generators, drawn in the order in which a plain loop draws it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Draw = Callable[[], torch.Tensor]


class TorchNoise:
    """Standard normals for the n images of a set, as torch.randn draws them in float32.

    generator: one torch.Generator, each draw being (n, C, H, W), or n of them, each drawing its
               image's (1, C, H, W) (diffusers' rule). On the device of the images, or on the CPU
               and moved.

    Images do not depend on how the set is cut into batches: of one generator each batch draws what
    all n take and keeps its own, so that a set of b batches draws b times as much; n generators
    draw for the images of the batch alone. ValueError for anything else."""

    def __init__(self, generator: Any, n: int, shape: Sequence[int], device: torch.device):
        self._each = isinstance(generator, (list, tuple))
        self._generators: list[torch.Generator] = list(generator) if self._each else [generator]
        for one in self._generators:
            if not isinstance(one, torch.Generator):
                raise ValueError(
                    "generator must be a torch.Generator, or a list of one for each image; got "
                    f"{type(one).__name__}" + " in a list" * self._each
                )
            if one.device.type != "cpu" and one.device != device:
                raise ValueError(
                    f"generator must be on the CPU or on {device}, where the images are; got one "
                    f"on {one.device}"
                )
        if self._each and len(self._generators) != n:
            raise ValueError(
                f"generator must be one torch.Generator, or a list of {n}, one for each image; got "
                f"a list of {len(self._generators)}"
            )
        if len({id(one) for one in self._generators}) < len(self._generators):
            raise ValueError(
                "a list of generators must hold a different one for each image: give the one alone"
            )
        self._n, self._shape, self._device = n, tuple(shape), device
        self._begins: dict[int, torch.Tensor] = {}

    def stream(self, rows: slice) -> Draw:
        """draw() -> (len(rows), C, H, W): the noise of these images, draw after draw, from where
        the generators were before the set."""
        if self._each:
            own = self._generators[rows]
            for k, one in enumerate(own, rows.start):
                self._rewind(k, one)
            return lambda: torch.cat([self._draw(one, 1) for one in own])
        (only,) = self._generators
        self._rewind(0, only)
        return lambda: self._draw(only, self._n)[rows]

    def skip(self, rows: slice, draws: int) -> None:
        """Leave the generators as a process does that draws all images of the set, where this one
        drew those of `rows`."""
        if self._each:
            for one in self._generators[: rows.start] + self._generators[rows.stop :]:
                for _ in range(draws):
                    self._draw(one, 1)
        elif rows.start == rows.stop:
            for _ in range(draws):
                self._draw(self._generators[0], self._n)

    def states(self) -> torch.Tensor:
        """Of all generators: what ranks that draw one set must have in common."""
        return torch.stack([one.get_state() for one in self._generators])

    def _draw(self, generator: torch.Generator, n: int) -> torch.Tensor:
        place = generator.device
        shape = (n, *self._shape)
        noise = torch.randn(shape, generator=generator, dtype=torch.float32, device=place)
        return noise.to(self._device)

    def _rewind(self, k: int, generator: torch.Generator) -> None:
        generator.set_state(self._begins.setdefault(k, generator.get_state()))
