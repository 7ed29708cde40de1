"""What ranks do together, for test_ranks.py: run by torchrun, each rank writes what it saw into the
folder that is given."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from toy import SCHEDULE, images, tiny_unet, wave

import fastddpm
from fastddpm import Diffusion, ranks
from fastddpm.training import Trainer


def draw(n=5, model=wave, **options) -> torch.Tensor:
    defaults = {"shape": (2, 3, 5), "diffusion": Diffusion(SCHEDULE), "progress": False}
    return fastddpm.sample(model, n, **{**defaults, **options})


def sample(out: Path, device: torch.device) -> None:
    seen: dict[str, object] = {}
    with ranks.launched(device) as own:
        rank, world = ranks.place()
        sizes = []

        def watched(x, t):
            sizes.append(len(x))
            return wave(x, t)

        def failing(x, t):
            if rank == 1:
                raise ZeroDivisionError("rank 1 has had enough")
            return wave(x, t)

        def drawn(*arguments, **options):
            return draw(*arguments, device=own, **options).cpu()

        seen["world"] = world
        seen["images"] = drawn(5, watched, first_index=2, batch_size=2)
        seen["sizes"] = sizes
        seen["one image"] = drawn(1)
        seen["alone"] = drawn(rank + 1, distributed=False)
        for name, options in {
            "failing": {"model": failing},
            "seeds": {"seed": rank},
            "bad": {"steps": 0 if rank else None},
        }.items():
            with contextlib.suppress(ValueError, ZeroDivisionError, ranks.RankError):
                try:
                    drawn(**options)
                except Exception as error:
                    seen[name] = f"{type(error).__name__}: {error}"
                    raise
        seen["still there"] = drawn(3)
    seen["closed"] = not dist.is_initialized()
    torch.save(seen, out / f"{rank}.pt")


RECIPE = {"precision": "fp32", "warmup": 0, "grad_clip": 1e9}


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Those of the first step: Adam's first moment is a tenth of them."""
    masters = trainer.weights.masters
    return {k: trainer.optimizer.state[m]["exp_avg"].cpu() * 10 for k, m in masters.items()}


def batch(rank: int) -> torch.Tensor:
    return images(4, 1, 8, 8, seed=rank)


def train(out: Path, device: torch.device) -> None:
    rank, cuda = int(os.environ["RANK"]), device.type == "cuda"
    if cuda:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False
    dist.init_process_group("nccl" if cuda else "gloo")
    trainer = Trainer(DistributedDataParallel(tiny_unet().to(device)), **RECIPE)
    loss = trainer.step(batch(rank)).cpu()
    weights = {k: p.detach().cpu() for k, p in trainer.weights.parameters.items()}
    torch.save(
        {"loss": loss, "gradients": gradients(trainer), "weights": weights}, out / f"{rank}.pt"
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    {"sample": sample, "train": train}[sys.argv[1]](Path(sys.argv[2]), torch.device(sys.argv[3]))
