"""What the readers of other projects' networks have in common: the questions that they ask of the
names and shapes in a file, and their layers' names as ours.
"""

from __future__ import annotations

import os
import re
from typing import Any

import torch

from fastddpm.weights import Tensors, rename


class Keys:
    """The names and shapes of a network in the file `source`, in the layout of `project`, whose
    name errors say. Every question raises the ValueError that names the key that answers it, where
    that is missing or of another shape."""

    def __init__(self, weights: Tensors, source: str | os.PathLike, project: str):
        self.weights, self.source, self.project = weights, source, project

    def __contains__(self, name: str) -> bool:
        return name in self.weights

    def wrong(self, why: str) -> ValueError:
        return ValueError(f"{self.source} is no model of {self.project}: {why}")

    def lacks(self, key: str) -> ValueError:
        return self.wrong(f"it lacks the key {key}")

    def numbers(self, prefix: str, before: str = "") -> set[str]:
        """Those that follow the prefix in the keys."""
        pattern = re.compile(re.escape(f"{prefix}.{before}") + r"([0-9]+)\.")
        return {m[1] for name in self.weights if (m := pattern.match(name))}

    def count(self, prefix: str, before: str = "") -> int:
        """How many numbers follow the prefix in the keys: 0, 1, ... without a gap."""
        found = self.numbers(prefix, before)
        if odd := sorted(found - {str(i) for i in range(len(found))}):
            raise self.wrong(
                f"it has the key {prefix}.{before}{odd[0][:40]}.*, but its {len(found)} of "
                f"{prefix}.* must be numbered from 0 to {len(found) - 1}"
            )
        if not found:
            raise self.lacks(f"{prefix}.*")
        return len(found)

    def shape(self, name: str, dims: int = 4) -> torch.Size:
        """Of a convolution's weight, or with dims=2 of a matrix."""
        if name not in self.weights:
            raise self.lacks(name)
        if self.weights[name].dim() != dims:
            what = {2: "a matrix", 4: "a convolution's"}[dims]
            raise ValueError(
                f"{self.source}: {name} must be {what}; got shape {tuple(self.weights[name].shape)}"
            )
        return self.weights[name].shape

    def multiples(self, widths: list[int], channels: int) -> list[int]:
        """Each level's width in units of the first convolution's."""
        if bad := [width for width in widths if width % channels]:
            raise ValueError(
                f"{self.source}: width {bad[0]} is no multiple of the first, {channels}"
            )
        return [width // channels for width in widths]

    def same(self, what: str, values: list[Any]) -> Any:
        """The one value that all levels have."""
        if any(value != values[0] for value in values):
            raise self.wrong(f"{what} must be the same at every level; got {values}")
        return values[0]


def smallest_side(image_size: Any) -> int:
    """Of an image_size that UNet checks later, an integer or (H, W); 0 for what can't be one."""
    sides = image_size if isinstance(image_size, (list, tuple)) else [image_size]
    return min(sides, default=0) if all(isinstance(side, int) for side in sides) else 0


def renamed(
    weights: Tensors, layers: dict[str, str], inner: dict[str, str], source: str | os.PathLike
) -> Tensors:
    """The weights under our names: `layers` names blocks and lone layers, `inner` the layers of a
    block. One that is in neither keeps its name, which is no key of ours."""

    def name_of(name: str) -> str:
        layer, _, kind = name.rpartition(".")
        if kind not in ("weight", "bias"):
            return name
        if layer in layers:
            return f"{layers[layer]}.{kind}"
        block, rest = layer, ""
        while block:
            block, _, part = block.rpartition(".")
            rest = f"{part}.{rest}" if rest else part
            if block in layers and rest in inner:
                return f"{layers[block]}.{inner[rest]}.{kind}"
        return name

    return rename(weights, name_of, source)
