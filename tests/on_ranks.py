"""What two ranks do together, for test_ranks.py: run by torchrun, each rank writes what it saw into
the folder that is given."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from toy import SCHEDULE, wave

import fastddpm
from fastddpm import Diffusion, ranks


def draw(n=5, model=wave, **options) -> torch.Tensor:
    defaults = {"shape": (2, 3, 5), "diffusion": Diffusion(SCHEDULE), "progress": False}
    return fastddpm.sample(model, n, **{**defaults, **options})


def main(out: Path) -> None:
    seen: dict[str, object] = {}
    with ranks.launched(torch.device("cpu")):
        rank, world = ranks.place()
        sizes = []

        def watched(x, t):
            sizes.append(len(x))
            return wave(x, t)

        def failing(x, t):
            if rank == 1:
                raise ZeroDivisionError("rank 1 has had enough")
            return wave(x, t)

        seen["world"] = world
        seen["images"] = draw(5, watched, first_index=2, batch_size=2)
        seen["sizes"] = sizes
        seen["one image"] = draw(1)
        seen["alone"] = draw(rank + 1, distributed=False)
        for name, options in {
            "failing": {"model": failing},
            "seeds": {"seed": rank},
            "bad": {"steps": 0 if rank else None},
        }.items():
            with contextlib.suppress(ValueError, ZeroDivisionError, ranks.RankError):
                try:
                    draw(**options)
                except Exception as error:
                    seen[name] = f"{type(error).__name__}: {error}"
                    raise
        seen["still there"] = draw(3)
    seen["closed"] = not dist.is_initialized()
    torch.save(seen, out / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
