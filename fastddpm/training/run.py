"""Training runs: `fit`, which runs Algorithm 1 with data, files and pictures; the Trainer of one
step at a time is trainer.py's, recipes are presets.py's."""

from __future__ import annotations

import contextlib
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastddpm import ranks
from fastddpm.checkpoint import named, write_json
from fastddpm.data import Dataset
from fastddpm.data.limits import check_memory
from fastddpm.figures import check_channels, labelled_grid, save_image
from fastddpm.host import own_state
from fastddpm.options import check_integer
from fastddpm.pretrained import WEIGHTS
from fastddpm.progress import tqdm
from fastddpm.sampling import sample
from fastddpm.training.board import Board, check_board
from fastddpm.training.feed import AHEAD, Feed
from fastddpm.training.held_out import HeldOut
from fastddpm.training.presets import PRESETS, Preset, preset
from fastddpm.training.run_folder import (
    RECIPE,
    SAMPLES,
    STATE,
    check_apart,
    check_kinds,
    check_new,
    locked,
)
from fastddpm.training.run_log import Log, Row
from fastddpm.training.step import CHOICES_STEP
from fastddpm.training.trainer import Trainer
from fastddpm.unet import UNet

__all__ = ["CHOICES_STEP", "PRESETS", "STATE", "Log", "Preset", "Trainer", "fit", "preset"]

LOG_EVERY = 50  # steps that a row of log.csv averages over
DDIM_STEPS = 50  # of the samples that a run draws as it goes
BYTES_A_VALUE = AHEAD + 4  # of a batch, at the least: as bytes, read ahead, and as float32


class Ran(NamedTuple):
    """What `fit` did: steps, in how many seconds, and in how many of those a step waited for its
    images; the rows that it added to the log."""

    steps: int
    seconds: float
    waited: float
    rows: list[Row]

    @property
    def share_waited(self) -> float:
        return self.waited / self.seconds if self.seconds else 0.0


@own_state()
def fit(
    trainer: Trainer,
    dataset: Dataset,
    out: str | Path,
    *,
    steps: int,
    batch_size: int = 128,
    save_every: int = 1000,
    sample_every: int = 5000,
    held_out: HeldOut | None = None,
    tensorboard: bool = False,
    record: dict[str, Any] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Ran:
    """Train until step `steps` on `dataset`, and keep in the folder `out` what a person and a
    restart need.

    config.json and model.safetensors (the averaged model), trainer.safetensors (the state for
    resume), log.csv, loss.png, samples/step_*.png (DDIM, 50 steps). All but the samples are written
    every `save_every` steps. resume: go on from trainer.safetensors; the steps are those that an
    uninterrupted run takes.

    held_out:    images to judge the averaged model by: see HeldOut. Their bits/dim are a column of
                 log.csv and a curve of loss.png, and the best model by them is kept in best/, as
                 `UNet.from_pretrained` takes it
    tensorboard: write TensorBoard's files into tensorboard/
    record:      what recipe.json is to hold, JSON-ready; None: it is not written

    A run has one folder, which is locked while it lasts, and one set of images: the state names the
    pixels' digest, and only the same set goes on.

    Where torch.distributed is initialised all ranks must make the call, and take each step
    together: batch_size is that of all, of which each computes its share, in trainer.accumulate
    pieces. Examples, t, noise, flips and a UNet's dropout are the same for any number of ranks and
    pieces, a step is the same but for rounding, and a run may go on with other numbers. Rank 0
    writes, and all must see the folder and the data. What ends one rank ends all, in RankError.

    Raises FileExistsError when `out` holds a run and resume is not asked for, or a model alone,
    FileNotFoundError the other way round, BlockingIOError while another process trains into it,
    ValueError for what does not fit, ImportError where TensorBoard is missing, all before anything
    is written."""
    rank, world = ranks.place()
    progress = progress and rank == 0
    with ranks.together():
        steps, batch_size = (
            check_integer("steps", steps, 1),
            check_integer("batch_size", batch_size, 1),
        )
        save_every = check_integer("save_every", save_every, 1)
        sample_every = check_integer("sample_every", sample_every, 0)
        if isinstance(trainer.network, UNet):
            if (classes := trainer.network.config["num_classes"]) is not None:
                raise ValueError(
                    f"the model has num_classes={classes}, and the data of a run have no labels: "
                    "train it by Trainer.step(x0, y)"
                )
            if sample_every:
                check_channels(trainer.network.in_channels)
            _check_fits(dataset, trainer.network)
        out = named(out)
        check_apart(dataset.path, out)
        check_kinds(out)
        if held_out is not None:
            check_apart(held_out.dataset.path, out)
            held_out.check(dataset)
        if tensorboard:
            check_board()
        if not resume:
            check_new(out)
        elif not (out / STATE).is_file():
            raise FileNotFoundError(f"no such file: {out / STATE}")
        recipe = trainer.recipe()  # what can't be saved is an error now, not at a checkpoint
        check_memory(-(-batch_size // world) * math.prod(dataset.shape) * BYTES_A_VALUE)
        run = identity(dataset, progress)
    ranks.agree(
        "must train alike", steps=steps, batch_size=batch_size, save_every=save_every,
        sample_every=sample_every, resume=resume, **run, **recipe,
        held_out=held_out and (held_out.every, held_out.steps, len(held_out.indices)),
    )  # fmt: skip
    if world > 1:
        trainer.replicate()
        if trainer.replicas.world != world:
            raise ValueError(
                f"the model's DistributedDataParallel has {trainer.replicas.world} ranks, and the "
                f"run {world}: make it over all of them"
            )
    with contextlib.ExitStack() as stack:
        with ranks.together():
            if rank == 0:
                out.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(out))
                if not resume:
                    check_new(out)  # once more: another run may have ended meanwhile
        with ranks.together():
            if resume:
                _resume(trainer, out, run, batch_size, steps)
            log = Log(out, trainer.step_count, trainer.diffusion.objective)
            if held_out is not None and resume:
                held_out.resume(out, trainer.diffusion.T)
            board = None
            if rank == 0:
                if tensorboard:
                    board = stack.enter_context(contextlib.closing(Board(out, trainer.step_count)))
                if record is not None:
                    write_json(out / RECIPE, record)
                if resume and not (out / WEIGHTS).exists():
                    trainer.save_model(out)  # it was killed between its first state and model
                (out / SAMPLES).mkdir(exist_ok=True)
        ranks.agree("must have one state", step_count=trainer.step_count,
                    example_count=trainer.example_count)  # fmt: skip
        return _run(
            trainer, dataset, out, run, log, board, held_out, steps, batch_size, save_every,
            sample_every, progress,
        )  # fmt: skip


def _check_fits(dataset: Dataset, network: UNet) -> None:
    one = torch.empty(1, *dataset.shape, dtype=torch.float32, device="meta")
    try:
        network.check_input(one, torch.empty(1, dtype=torch.int64, device="meta"))
    except ValueError as error:
        raise ValueError(f"{dataset.path} does not fit the model: {error}") from None


def identity(dataset: Dataset, progress: bool = False) -> dict[str, Any]:
    """What tells a run's data from others: see Dataset.fingerprint. JSON-ready."""
    return {
        "data": {
            "images": len(dataset),
            "shape": list(dataset.shape),
            "sha256 of the pixels": dataset.fingerprint(progress),
        }
    }


def _resume(trainer: Trainer, out: Path, run: dict[str, Any], batch_size: int, steps: int) -> None:
    """The trainer where the run was stopped."""
    trainer.load(out, run)
    if trainer.step_count > steps:
        raise ValueError(
            f"steps must be at least {trainer.step_count}, which the run in {out} has taken; got "
            f"{steps}"
        )
    if trainer.example_count != trainer.step_count * batch_size:
        before = trainer.example_count // max(trainer.step_count, 1)
        raise ValueError(f"{out / STATE} has batches of {before}; got batch_size {batch_size}")


def _run(
    trainer: Trainer,
    dataset: Dataset,
    out: Path,
    run: dict[str, Any],
    log: Log,
    board: Board | None,
    held_out: HeldOut | None,
    steps: int,
    batch_size: int,
    save_every: int,
    sample_every: int,
    progress: bool,
) -> Ran:
    rank, world = ranks.place()
    first = trainer.step_count
    feed = Feed(
        dataset, batch_size, range(first, steps), seed=trainer.seed, device=trainer.device,
        place=(rank, world),
    )  # fmt: skip
    of_many: dict[str, Any] = {"part": feed.part} if world > 1 else {}
    began = time.perf_counter()
    with (
        contextlib.closing(iter(feed)) as batches,
        tqdm(total=steps, initial=first, unit="step", desc="training", disable=not progress) as bar,
    ):
        losses: list[torch.Tensor] = []
        mark = _Mark(began, 0.0, first)
        for images in batches:
            losses.append(trainer.step(images, **of_many))
            bar.update()
            done = trainer.step_count
            judged = held_out is not None and held_out.is_due(done, steps)
            if done % LOG_EVERY == 0 or done == steps or judged:
                trainer.check_finite()  # so that a row is of steps that are done and count
                now = _Mark(time.perf_counter(), feed.waited, done)
                seconds = now.at - mark.at
                rate = (done - mark.step) * batch_size / seconds
                waiting = (now.waited - mark.waited) / seconds
                bits = _judge(held_out, trainer, out) if held_out is not None and judged else None
                row = Row(done, _mean(losses), rate, waiting, trainer.skipped, bits)
                log.add(row)
                if board is not None:
                    board.add_row(row, trainer.optimizer.param_groups[0]["lr"])
                bar.set_postfix_str(
                    f"loss {row.loss:.4f}, {rate:.0f} images/s, {waiting:.1%} waiting for data"
                    + f", {row.skipped} skipped" * bool(row.skipped)
                )
                losses, mark = [], now._replace(at=time.perf_counter())
            if done % save_every == 0 or done == steps:
                trainer.check_finite()  # on every rank
                with ranks.together():
                    if rank == 0:
                        # First: rows after the state that is resumed are dropped, not missed.
                        log.write()
                        if board is not None:
                            board.flush()
                        trainer.save(out, run)
            if (
                sample_every
                and isinstance(trainer.network, UNet)
                and (done % sample_every == 0 or done == steps)
            ):
                with ranks.together():
                    if rank == 0:
                        images = _sample(trainer)
                        title = f"step {done:,}: DDIM, {min(DDIM_STEPS, trainer.diffusion.T)} steps"
                        picture = labelled_grid(images, title=title)
                        save_image(picture, out / SAMPLES / f"step_{done:06d}.png")
                        if board is not None:
                            board.add_samples(images, done)
    rows = [row for row in log.rows if row.step > first]
    return Ran(trainer.step_count - first, time.perf_counter() - began, feed.waited, rows)


class _Mark(NamedTuple):
    """Where a row of the log ends: the time, the seconds waited by then, the step."""

    at: float
    waited: float
    step: int


def _mean(losses: list[torch.Tensor]) -> float:
    """Of the steps that count; nan where none does."""
    loss = torch.stack(losses)
    return loss[loss.isfinite()].mean().item()


def _judge(held_out: HeldOut, trainer: Trainer, out: Path) -> float:
    bits = held_out.measure(trainer)
    with ranks.together():
        if ranks.place()[0] == 0:
            held_out.keep(trainer, out, bits)
    return bits


def _sample(trainer: Trainer) -> torch.Tensor:
    return sample(
        trainer.ema_model(), 36, steps=min(DDIM_STEPS, trainer.diffusion.T), sampler="ddim",
        diffusion=trainer.diffusion, distributed=False, progress=False,
    )  # fmt: skip
