"""What the examples share: their options, batches of real images, another project's code, and the
picture at the end. No trainer and no network.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastddpm import console, figures
from fastddpm.data import Dataset, open_dataset
from fastddpm.options import check_count
from fastddpm.progress import tqdm

GROUPS = 32  # of every norm in the examples' networks, which divides --width


class Missing(ImportError):
    """Another project's code is not there."""


class Run:
    """One run of an example, as its command line asks for it.

    size, width, T, steps, batch, n, out: the options of the same names;  data: the images;
    code: of the other project, as it was found
    """

    def __init__(self, a: argparse.Namespace, project: str):
        self.project, self.code = project, a.code
        for name in ("size", "width", "timesteps", "steps", "batch", "images"):
            check_count(f"--{name}", getattr(a, name))
        if a.size % 8:
            raise ValueError(
                f"--size must be a multiple of 8, which is halved thrice; got {a.size}"
            )
        if a.width % GROUPS:
            raise ValueError(f"--width must be a multiple of {GROUPS}; got {a.width}")
        self.size, self.width, self.T = a.size, a.width, a.timesteps
        self.steps, self.batch, self.n = a.steps, a.batch, a.images
        self.out = figures.check_output(a.out, kinds=(".png",), channels=3)
        torch.manual_seed(a.seed)
        self.data: Dataset = open_dataset(a.data, size=a.size if _encoded(a.data) else None)
        if self.data.shape[0] not in (1, 3):
            raise ValueError(f"{a.data} has images of {self.data.shape[0]} channels, not 1 or 3")

    def theirs(self, module: str, *names: str) -> list[Any]:
        """Those names of a module of the other project; Missing says how it gets here."""
        if self.code is not None and self.code not in sys.path:
            if not Path(self.code).is_dir():
                raise FileNotFoundError(f"--code {self.code} is no folder")
            sys.path.insert(0, self.code)
        try:
            found = importlib.import_module(module)
            return [getattr(found, name) for name in names]
        except (ImportError, AttributeError) as error:
            raise Missing(f"{self.project}; here: {error}") from error

    def pixels(self, n: int | None = None) -> Tensor:
        """(n, 3, size, size) uint8 images of the data, drawn at random; n: None for a batch."""
        n = self.batch if n is None else n
        return self._framed(self.data.images(torch.randint(len(self.data), (n,))))

    def batches(self, bar: bool = True) -> Iterator[Tensor]:
        """A batch in [-1, 1] for each step of training."""
        for _ in tqdm(range(self.steps), desc="training", disable=not bar):
            yield self.pixels().float() / 127.5 - 1

    @contextlib.contextmanager
    def counted(self, model: nn.Module) -> Iterator[None]:
        """A bar over the T calls of the model that a sampler without one makes."""
        with tqdm(total=self.T, desc="drawing") as bar:
            hook = model.register_forward_hook(lambda *_: bar.update() and None)
            yield
            hook.remove()

    def save(self, drawn: Tensor | np.ndarray) -> None:
        """A picture of images of the data and, below, of those that were drawn: a tensor in
        [-1, 1], or a pipeline's array in [0, 1] with the channels last."""
        if isinstance(drawn, np.ndarray):
            drawn = torch.from_numpy(drawn).permute(0, 3, 1, 2) * 2 - 1
        both = (self.pixels(len(drawn)), self._framed(figures.to_uint8(drawn.detach())))
        figures.save_samples(torch.cat(both), self.out, columns=len(drawn))
        console.say(f"{self.out}: images of {self.data.path} above, drawn ones below")

    def _framed(self, x: Tensor) -> Tensor:
        """(N, 1 or 3, H, W) uint8 as (N, 3, size, size): smaller ones with a black margin, larger
        ones averaged."""
        height, width = x.shape[2:]
        if max(height, width) > self.size:
            x = F.interpolate(x.float(), (self.size, self.size), mode="area").round().byte()
        else:
            down, right = self.size - height, self.size - width
            x = F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))
        return x.expand(-1, 3, -1, -1).contiguous()


def main(example: Callable[[Run], None], project: str, argv: list[str] | None = None) -> int:
    """Run an example; a mistake is one line on stderr and exit code 2. project: what it needs, for
    who has not got it."""
    name = example.__module__.rpartition(".")[2]
    name = Path(sys.argv[0]).stem if name == "__main__" else name
    parser = argparse.ArgumentParser(prog=f"python -m fastddpm.examples.{name}")
    add = parser.add_argument
    add("--data", required=True, metavar="PATH", help="images, as fastddpm train reads them")
    add("--code", metavar="FOLDER", help=f"where the other project's code is: {project}")
    add("--steps", type=int, default=20, help="of training (20)")
    add("--batch", type=int, default=16, help="images a step (16)")
    add("--timesteps", type=int, default=1000, metavar="T", help="steps of the chain (1000)")
    add("--width", type=int, default=32, help="channels of the network (32; the paper's are 128)")
    add("--size", type=int, default=32, help="of the images (32)")
    add("--images", type=int, default=8, help="to draw at the end (8)")
    add("--seed", type=int, default=0)
    add("--out", default=f"{name}.png", help=f"({name}.png)")
    try:
        example(Run(parser.parse_args(argv), project))
    except (ImportError, OSError, ValueError) as error:
        console.complain(f"{name}: error: {' '.join(str(error).split())}")
        return 2
    return 0


def _encoded(path: str) -> bool:
    """Whether images of the path have sizes of their own, which --size is asked of."""
    at = Path(path)
    return at.suffix.lower() == ".zip" or (at.is_dir() and not any(at.glob("*idx3-ubyte*")))
