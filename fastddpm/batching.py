"""How many images go through a model at a time: what memory is good for, and fewer when it runs
out. No sampling of its own."""

from __future__ import annotations

import contextlib
import errno
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from fastddpm import ranks
from fastddpm.diffusion import Model
from fastddpm.host import callers_level
from fastddpm.presence import first_line
from fastddpm.schedule import check_count
from fastddpm.unet import UNet

Drawn = TypeVar("Drawn")
MOST = {"cpu": 64, "cuda": 256}  # larger batches gain nothing
SHARE = 0.5  # of the free memory


def batch_size_for(model: Model, shape: Sequence[int], precision: str, device: torch.device) -> int:
    """Images a batch: MOST, or what half of the free memory holds by `step_bytes` if that is less.

    Of a model that is no UNet nothing is known: MOST, and `Batches` for when it does not fit."""
    most = MOST.get(device.type, MOST["cpu"])
    free = free_bytes(device)
    if free is None or not isinstance(model, UNet):
        return most
    return max(1, min(most, int(SHARE * free) // step_bytes(model, shape, precision)))


def step_bytes(model: UNet, shape: Sequence[int], precision: str) -> int:
    """An upper estimate of what one image needs beside the weights while the U-Net runs: all of
    the skips, and four times the widest input of a block, for its copies on their way through."""
    c = model.config
    widths = [c["channels"] * m for m in c["channel_mult"]]
    skips, widest, previous = c["channels"] * 1.0, 0.0, c["channels"]
    for level, width in enumerate(widths):
        share = 0.25**level  # of the pixels
        skips += c["num_res_blocks"] * width * share
        if level < len(widths) - 1:
            skips += width * share / 4
        above = widths[min(level + 1, len(widths) - 1)]
        widest = max(widest, (max(width, above) + max(width, previous)) * share)
        previous = width
    values = (skips + 4 * widest) * shape[1] * shape[2]
    return int(values * {"fp32": 4, "bf16": 2}[precision])


def free_bytes(device: torch.device) -> int | None:
    """What this process may still take on the device; None where nobody says.

    On a CPU the ranks of one machine share it."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    known = [free for free in (_free_of_system(), _free_of_group()) if free is not None]
    return min(known) // ranks.environment("LOCAL_WORLD_SIZE", 1) if known else None


def _free_of_system() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None


def _free_of_group(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> int | None:
    """What the tightest limit of this process's control groups leaves, by either version of them.

    Files that are cached count as used there, and are given up when memory is asked for."""
    left = []
    for folder in _groups(root, own):
        used = _number(folder / "memory.current", folder / "memory.usage_in_bytes")
        limits = [_number(folder / f"memory.{name}") for name in ("max", "high", "limit_in_bytes")]
        if used is not None:
            cached = min(used, _cached(folder / "memory.stat"))
            left += [limit - (used - cached) for limit in limits if limit is not None]
    return max(0, min(left)) if left else None


def _groups(root: Path, own: Path) -> list[Path]:
    """The folders of this process's groups and of those around them, up to each root."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    folders = {root, root / "memory"}
    for line in lines:
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "memory" if controllers else root
        below = [part for part in path.split("/") if part]
        if ".." not in below:  # of a group outside of what this process is shown
            folders |= {base.joinpath(*below[:depth]) for depth in range(len(below) + 1)}
    return [folder for folder in folders if folder.is_dir()]


def _cached(stat: Path) -> int:
    """Bytes of a group's files in memory, those of the groups within it among them."""
    try:
        values = dict(line.split()[:2] for line in stat.read_text(encoding="ascii").splitlines())
        prefix = "total_" if "total_inactive_file" in values else ""  # version 1
        return sum(int(values.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
    except (OSError, ValueError):
        return 0


def _number(*files: Path) -> int | None:
    """The number in the first of the files that is there; None for "max"."""
    for file in files:
        with contextlib.suppress(OSError, ValueError):
            return int(file.read_text(encoding="ascii"))
    return None


# In lower case: torch's allocators, C++, oneDNN (which says no more), cuDNN and cuBLAS, the system.
OUT_OF_MEMORY = (
    "out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory",
    "unable to allocate", "failed to allocate", "allocation failed", "alloc_failed",
    "bad_alloc", "bad allocation", "could not create a primitive", "could not create a memory",
)  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """True for what torch, its libraries, C++, Python and the system raise when memory runs out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error).lower()
    if not isinstance(error, RuntimeError):
        return False
    if "capture" in text and isinstance(error.__context__, RuntimeError):
        return is_out_of_memory(error.__context__)  # the end of a recording that failed before
    return any(words in text for words in OUT_OF_MEMORY)


class Progress(Protocol):
    """Who is told of each batch."""

    def begin(self, batches: int) -> None:
        """A batch begins, the first of `batches`; one that began before and did not end failed."""

    def end(self) -> None:
        """It is done."""


class Batches:
    """Draws samples in batches of `size`, and in smaller ones from where memory ran out.

    even: of that at most, as few as may be and all alike: a last, small batch costs an engine that
    records one size as much as a whole one
    Images do not depend on it: each is a function of its index."""

    def __init__(self, size: int, *, even: bool = False):
        self.size, self._even = check_count("batch_size", size), even
        self._told = False

    def draw(
        self,
        draw: Callable[[torch.Tensor], Drawn],
        index: torch.Tensor,
        progress: Progress,
        later: int = 0,
    ) -> list[Drawn]:
        """draw(part) of each part of `index`, in order. later: images that further calls draw.

        Raises what `draw` does, its out-of-memory error if one image is too much."""
        images: list[Drawn] = []
        while len(index):
            left = -(-len(index) // self.size)  # batches
            part = index[: self._next(len(index))]
            progress.begin(left - (-later // self.size))
            why = None
            try:
                images.append(draw(part))
            except (RuntimeError, MemoryError, OSError) as error:
                if not is_out_of_memory(error) or len(part) == 1:
                    raise
                why = first_line(error)
            if why is None:
                index = index[len(part) :]
                progress.end()
            else:  # and not above, where the error still holds what the batch took
                self._halve(len(part), why)
        return images

    def sizes(self, n: int) -> set[int]:
        """Of the batches in which n images are drawn, while memory lasts."""
        found = set()
        while n:
            found.add(part := self._next(n))
            n -= part
        return found

    def _next(self, n: int) -> int:
        """Images of the next batch, where n are left."""
        return -(-n // -(-n // self.size)) if self._even else min(self.size, n)

    def _halve(self, failed: int, why: str) -> None:
        self.size = -(-failed // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if not self._told:
            self._told = True
            warnings.warn(
                f"memory is too small for batches of {failed} images ({why}): "
                f"fastddpm goes on with half as many, or less; batch_size={self.size} asks for it",
                RuntimeWarning,
                stacklevel=callers_level(),
            )
