"""Times people's trainers as they are and with one line of ours, in turn on the same weights and
the same noise: a step of their sampling and a whole step of their training.

    python benchmarks/drop_in.py [--only NAME,...] [--sampling 1,8,16] [--training 4,16,64]
        [--scheduler 1,16,64] [--precisions fp32,bf16] [--code FOLDER,...]
        [--json FILE [--add]] [--repeats N] [--least SECONDS] [--width 128]

Each trainer is there three times: theirs, theirs in channels_last, and theirs with our line. All
three take torch's fused Adam and clipping by foreach, whatever the project takes. Before any of
them is timed, ours must give theirs: the network's output and x_{t-1} at two steps, or the loss and
all gradients of a step; what errs by more is not timed, and the exit code is 1. bf16 is their loop
under torch.autocast. Then they take turns, warm: median and range, and how many times as fast ours
is as the faster of theirs. --scheduler is diffusers' DDPMScheduler alone, its tables float64 on our
side. --code: where projects' own code is; one whose code is not found is built from what is
published of it (tests/peers.py), and left out where that does not say. --add keeps the rows of the
file that this run does not make anew. No numbers are kept here.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # the checkout that this file is in
sys.path.insert(0, str(Path(__file__).parent))

import torch
import trainers
from clocks import WallClock
from machine import environment, milliseconds
from networks import relative_error
from tabulate import tabulate
from torch import Tensor, nn
from trainers import SHAPE, TRAINERS, T, Trainer
from turns import race

THEIRS, LAST, OURS = "theirs", "theirs, channels_last", "with our line"
ALLOWED = {"fp32": 1e-4, "bf16": 3e-2}  # rms(error) / rms(theirs)
STEPS = (T - 1, T // 2)  # of the chain, that are compared
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A trainer in one of its forms, or a call of a scheduler, at one batch size."""

    name: str
    precision: str
    batch: int
    form: str


class Steps:
    """A trainer that steps, from the weights that it was made with: what turns.race times."""

    def __init__(self, trainer: Trainer, what: str, precision: str, batch: int):
        self.trainer, self.what, self.bf16 = trainer, what, precision == "bf16"
        trainer.reset()
        x = torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(1))
        self.x = x.clamp(-1, 1) if what == "training" else x

    def __call__(self) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            if self.what == "training":
                return self.trainer.training_step(self.x)
            return self.trainer.sample(self.x, STEPS[-1])

    def results(self) -> list[Tensor]:
        """What must be equal, from the same random numbers."""
        network = self.trainer.network
        if self.what == "training":
            torch.manual_seed(2)
            loss = self()
            gradients = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
            return [loss.reshape(1), torch.cat(gradients)]
        found: list[Tensor] = []
        inner = network.model if hasattr(network, "num_timesteps") else network

        def keep(module: nn.Module, given: Any, output: Any) -> None:
            found.append(getattr(output, "sample", output).float())

        hook = inner.register_forward_hook(keep)  # type: ignore[union-attr, operator]
        for i in STEPS:
            torch.manual_seed(2)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                found.append(self.trainer.sample(self.x, i))
        hook.remove()
        return found

    def seconds(self, steps: int) -> float:
        return WallClock()(self, steps)

    def forget_peak(self) -> None:
        """Nothing: all forms share a process."""

    def memory(self) -> None:
        return None

    def close(self) -> None:
        del self.trainer


class Calls(Steps):
    """A call of a scheduler."""

    def __init__(self, call: Callable[[], Tensor]):
        self.call = call

    def __call__(self) -> Tensor:
        return self.call()

    def results(self) -> list[Tensor]:
        torch.manual_seed(2)
        return [self.call()]

    def close(self) -> None:
        del self.call


def contest(
    jobs: list[Job], start: Callable[[Job, float], Any], options: argparse.Namespace, row: Row
) -> tuple[Row, list[str]]:
    """(the row with the seconds an image of each form and the errors, who could not take part) of a
    race of forms of one trainer; the first is the one to which the others must be equal."""
    expected: list[Tensor] = []

    def check(runner: Any, job: Job, its: Row) -> str | None:
        found = runner.results()
        if not expected:
            expected.extend(found)
        its["form"] = job.form
        its["error"] = max(map(relative_error, found, expected))
        allowed = ALLOWED[job.precision]
        right = its["error"] <= allowed
        return None if right else f"{its['error']:.2g} of theirs, allowed {allowed:.2g}"

    made, missing = race(jobs, start, check, options, options.most)
    by_form = {its["form"]: its for its in made}
    row["error"] = by_form[OURS]["error"] if OURS in by_form else None
    row["seconds"] = {form: its["seconds"] for form, its in by_form.items() if "seconds" in its}
    medians = {form: statistics.median(s) for form, s in row["seconds"].items()}
    others = [seconds for form, seconds in medians.items() if form != OURS]
    if OURS in medians and others:
        row["x theirs"] = medians[THEIRS] / medians[OURS]
        row["x best of theirs"] = min(others) / medians[OURS]
    return row, missing


def forms(name: str, width: int) -> dict[str, Trainer]:
    """The trainer in its three forms, of the same weights."""
    theirs = TRAINERS[name].build(width)
    made = {THEIRS: theirs, LAST: copy.deepcopy(theirs), OURS: copy.deepcopy(theirs)}
    made[LAST].network.to(memory_format=torch.channels_last)  # which all results then follow
    made[OURS].put_in()
    return made


def trainer_rows(name: str, options: argparse.Namespace) -> tuple[list[Row], list[str]]:
    entry = TRAINERS[name]
    if reason := entry.missing():
        return [], [f"{name}: {reason}"]
    rows, missing = [], []
    made = forms(name, options.width)
    batches = {"sampling": options.sampling, "training": options.training}
    for precision, what in itertools.product(options.precisions, batches):
        for batch in batches[what]:
            jobs = [Job(f"{name}, {what}, {form}", precision, batch, form) for form in made]

            def start(job: Job, patience: float, what: str = what) -> Steps:
                return Steps(made[job.form], what, job.precision, job.batch)

            row: Row = {
                "name": name, "line": entry.build.line, "network": entry.network(), "what": what,
                "precision": precision, "batch": batch,
            }  # fmt: skip
            row, absent = contest(jobs, start, options, row)
            rows.append(row)
            missing += absent
    return rows, missing


def start_call(call: dict[str, Callable[[], Tensor]], job: Job, patience: float) -> Calls:
    return Calls(call[job.form])


def scheduler_rows(options: argparse.Namespace) -> tuple[list[Row], list[str]]:
    if reason := TRAINERS["diffusers"].missing():
        return [], [f"diffusers' scheduler: {reason}"]
    rows, missing = [], []
    for batch in options.scheduler:
        for name, theirs, ours in trainers.scheduler_calls(batch):
            call = {THEIRS: theirs, OURS: ours}
            who = f"DDPMScheduler.{name}"
            jobs = [Job(f"{who}, {form}", "fp32", batch, form) for form in call]
            row: Row = {
                "name": who, "line": "from fastddpm.integrations.diffusers import DDPMScheduler",
                "network": None, "what": "alone", "precision": "fp32", "batch": batch,
            }  # fmt: skip
            row, absent = contest(jobs, partial(start_call, call), options, row)
            rows.append(row)
            missing += absent
    return rows, missing


def key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("name", "what", "precision", "batch"))


def table(rows: list[Row]) -> str:
    return tabulate(
        [
            {
                "": row["name"],
                "what": row["what"] if row["precision"] == "fp32" else f"{row['what']}, bf16",
                "batch": row["batch"],
                "error": f"{row['error']:.1e}",
                **{
                    f"ms an image, {form}": milliseconds(row["seconds"][form])
                    if form in row["seconds"]
                    else ""
                    for form in (THEIRS, LAST, OURS)
                },
                "x theirs": f"{row['x theirs']:.2f}",
                "x best of theirs": f"{row['x best of theirs']:.2f}",
            }
            for row in rows
            if "x theirs" in row
        ],
        headers="keys", tablefmt="simple", disable_numparse=True,
    )  # fmt: skip


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def read(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    add = parser.add_argument
    add("--only", default="", help="names of trainers, or how they start; none: --only none")
    add("--sampling", type=integers, default=[1, 8, 16], help="batches; default 1,8,16")
    add("--training", type=integers, default=[4, 16, 64], help="batches; default 4,16,64")
    add("--scheduler", type=integers, default=[1, 16, 64], help="batches; default 1,16,64")
    add("--precisions", default="fp32", help="of fp32, bf16 (autocast); default fp32")
    add("--code", default="", help="folders with projects' own code, with commas between")
    add("--width", type=int, default=128, help="channels; default 128, CIFAR-10's")
    add("--json", type=Path, help="write environment and rows to this file")
    add("--add", action="store_true", help="keep the other rows of that file")
    add("--repeats", type=int, default=5, help="turns of each, default 5")
    add("--least", type=float, default=0.5, help="seconds a turn, default 0.5")
    add("--limit", type=float, default=40.0, help="seconds of all turns of one, default 40")
    options = parser.parse_args(arguments)
    options.patience, options.most = 0.0, 10000
    options.precisions = options.precisions.split(",")
    if unknown := set(options.precisions) - set(ALLOWED):
        parser.error(f"--precisions must be of fp32, bf16; got {', '.join(sorted(unknown))}")
    starts = tuple(options.only.split(","))
    options.names = [name for name in TRAINERS if name.startswith(starts)]
    if not options.names and options.only != "none":
        parser.error(f"--only must name some of {', '.join(TRAINERS)}, or none")
    for folder in filter(None, options.code.split(",")):
        if not Path(folder).is_dir():
            parser.error(f"--code: {folder} is no folder")
        sys.path.append(folder)
    return options


def main(arguments: list[str] | None = None) -> int:
    options = read(arguments)
    facts = {**environment(), **trainers.versions()}
    for name, value in facts.items():
        print(f"{name:<28} {value}")
    rows: list[Row] = []
    left_out: list[str] = []
    for name in options.names:
        made, missing = trainer_rows(name, options)
        rows, left_out = rows + made, left_out + missing
    made, missing = scheduler_rows(options)
    rows, left_out = rows + made, left_out + missing
    print("\n" + table(rows))
    for line in left_out:
        print(f"not here: {line}")
    if options.json:
        before: list[Row] = []
        if options.add:
            with contextlib.suppress(FileNotFoundError):
                before = json.loads(options.json.read_text(encoding="utf-8"))["rows"]
        made_now = set(map(key, rows))
        kept = [row for row in before if key(row) not in made_now]
        report = {"environment": facts, "rows": kept + rows, "not here": left_out}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0 if all("x theirs" in row for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
