"""What ranks do together, for test_ranks.py: run by torchrun, each rank writes what it saw into the
folder that is given."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from toy import SCHEDULE, images, tiny_unet, wave

import fastddpm
from fastddpm import Diffusion, ranks
from fastddpm.data.arrays import ArrayDataset
from fastddpm.data.dataset import Dataset
from fastddpm.evaluation.bound import bound
from fastddpm.training import Trainer, fit


def draw(n=5, model=wave, **options) -> torch.Tensor:
    defaults = {"shape": (2, 3, 5), "diffusion": Diffusion(SCHEDULE), "progress": False}
    return fastddpm.sample(model, n, **{**defaults, **options})


def given(device: torch.device, **options) -> torch.Tensor:
    """Images noised and drawn again, each told its number."""
    x0 = images(5, 2, 3, 5)
    told = {"init": x0, "start": 7, "model_kwargs": {"y": torch.arange(5)}}
    return draw(5, numbered, device=device, batch_size=2, **told, **options).cpu()


def measured(device: torch.device | str = "cpu", n: int = 40, **options) -> str:
    """The bound of n images, as JSON."""
    model = tiny_unet().to(device)
    return json.dumps(bound(model, images(n, 1, 8, 8), progress=False, **options).to_json())


def numbered(x, t, y):
    return wave(x + y[:, None, None, None] / 5, t)


def enough(i, x, x0):
    raise ZeroDivisionError("enough was seen")


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
        seen["given"] = given(own)
        one = torch.Generator().manual_seed(5)
        seen["generator"] = drawn(5, generator=one, batch_size=2)
        seen["none to draw"] = drawn(1, generator=one)  # of the second rank
        seen["state"] = one.get_state()
        each = [torch.Generator().manual_seed(k) for k in range(5)]
        seen["generators"] = drawn(5, generator=each)
        seen["states"] = [one.get_state() for one in each]
        seen["alone"] = drawn(rank + 1, distributed=False)
        for name, options in {
            "failing": {"model": failing},
            "seeds": {"seed": rank},
            "bad": {"steps": 0 if rank else None},
            "x_T": {"x_T": torch.full((5, 2, 3, 5), float(rank))},
            "generator state": {"generator": torch.Generator().manual_seed(rank)},
            "on_step": {"on_step": enough if rank else None},
        }.items():
            with contextlib.suppress(ValueError, ZeroDivisionError, ranks.RankError):
                try:
                    drawn(**options)
                except Exception as error:
                    seen[name] = f"{type(error).__name__}: {error}"
                    raise
        seen["bound"] = measured(own, folder=out / "bits")
        seen["bound again"] = measured(own, folder=out / "bits")
        seen["bound of some terms"] = measured(own, terms=6)
        with contextlib.suppress(ranks.RankError):
            try:
                measured(own, n=40 - rank)
            except ranks.RankError as error:
                seen["bound of others"] = str(error)
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


# ---- training together ---------------------------------------------------------------------------

MANY = {"precision": "fp32", "warmup": 20, "lr": 1e-3, "ema_decay": 0.9, "seed": 3}
FIT = {"batch_size": 7, "save_every": 2, "sample_every": 0, "progress": False}
# (accumulate, images a step): shares that are equal, are not, and one that is empty
WAYS = {"even": (1, 4), "odd": (1, 7), "pieces": (2, 7), "empty": (3, 1)}


def one(accumulate: int = 1, device: torch.device | str = "cpu", **options) -> Trainer:
    return Trainer(
        tiny_unet(dropout=0.1).to(device), **{**MANY, "accumulate": accumulate, **options}
    )


def few_images() -> Dataset:
    """Fewer than a batch of FIT has."""
    return ArrayDataset(Path("few.npz"), "npz", images(5, 1, 8, 8, seed=9).numpy())


def steps(run: Trainer, way: str, count: int) -> list[float]:
    """The losses of so many steps, each rank's with its part of each."""
    _, n = WAYS[way]
    rank, world = run.replicas.rank, run.replicas.world
    start, stop = ranks.share(n, rank, world)
    losses = []
    for k in range(count):
        x0 = images(n, 1, 8, 8, seed=100 + k)
        x0 = x0[start:stop] if stop > start else x0[:1]
        losses.append(run.step(x0, part=(start, stop, n)).item())
    return losses


def weights_of(run: Trainer) -> dict[str, torch.Tensor]:
    return {k: v.detach().cpu().clone() for k, v in run.ema_weights().items()}


def error_of(call) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


class Sick(torch.nn.Module):
    factor = 1.0

    def __init__(self):
        super().__init__()
        self.one = torch.nn.Conv2d(1, 1, 1)

    def forward(self, x, t):
        return self.factor * self.one(x)


def train(out: Path, device: torch.device) -> None:
    seen: dict[str, object] = {}
    with contextlib.suppress(OSError, ranks.RankError), ranks.launched(device) as own:
        rank = ranks.place()[0]
        torch.backends.cudnn.allow_tf32 = False
        wrapped = Trainer(DistributedDataParallel(tiny_unet().to(own)), **RECIPE)
        seen["loss"] = wrapped.step(batch(rank)).cpu()
        seen["gradients"] = gradients(wrapped)
        seen["weights"] = {k: p.detach().cpu() for k, p in wrapped.weights.parameters.items()}
        for way, (accumulate, _) in WAYS.items():
            run = one(accumulate, own)
            run.replicate()
            seen[way] = steps(run, way, 50 if way == "odd" else 3)
            seen[f"weights {way}"] = weights_of(run)

        x0 = images(4, 1, 8, 8)
        for name, part in {"overlap": (0, 4, 8), "sum": (rank * 4, rank * 4 + 4, 9)}.items():
            seen[name] = error_of(lambda part=part: run.step(x0, part=part))
        seen["sizes"] = error_of(lambda: run.step(x0[: 3 + rank]))
        wrong = torch.full((2, 1, 8, 8), 7.0 if rank else 0.5)
        seen["range"] = error_of(lambda: run.step(wrong))
        seen["after errors"] = [run.step_count, run.example_count, *steps(run, "even", 1)]

        sick = Trainer(Sick().to(own), diffusion=Diffusion(SCHEDULE), **MANY)
        sick.replicate()
        sick.network.factor = torch.nan if rank else 1.0
        losses = [sick.step(x0).item() for _ in range(9)]
        seen["skipped"] = [sick.skipped, sum(map(math.isnan, losses))]
        seen["tenth"] = error_of(lambda: sick.step(x0))

        dataset = few_images()
        run = one(2, own)
        fit(run, dataset, out / "run", steps=4, **FIT)
        seen["fit"] = weights_of(run)
        again = one(1, own, flip=rank == 0)
        seen["recipes"] = error_of(
            lambda: fit(again, dataset, out / "run", steps=5, resume=True, **FIT)
        )
        again = one(1, own)
        again.save = full
        seen["full"] = error_of(
            lambda: fit(again, dataset, out / "run", steps=6, resume=True, **FIT)
        )
        if rank:
            dataset.images = gone
        try:
            fit(one(1, own), dataset, out / "other", steps=6, **FIT)
        except Exception as error:
            seen["gone"] = f"{type(error).__name__}: {error}"
            raise
    torch.save(seen, out / f"{rank}.pt")


def full(*_):
    raise OSError(28, "No space left on device")


def gone(*_):
    raise OSError("the disk is gone")


if __name__ == "__main__":
    {"sample": sample, "train": train}[sys.argv[1]](Path(sys.argv[2]), torch.device(sys.argv[3]))
