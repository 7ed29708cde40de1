"""A race: contestants show that they compute the same, then take turns, warm. No table."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from contestants import Job
from processes import Failed

PAUSE = 0.05  # seconds before a turn, for the threads of the one before to fall asleep

Row = dict[str, Any]
Check = Callable[[Any, Job, Row], str | None]


@dataclass
class Turns:
    """A contestant that has passed: `turns` turns of `steps` steps each."""

    who: str
    row: Row
    runner: Any
    steps: int
    turns: int


def race(
    jobs: list[Job],
    start: Callable[[Job, float], Any],
    check: Check,
    options: argparse.Namespace,
    most: int,
) -> tuple[list[Row], list[str]]:
    """(a row a contestant, with what its check found and its seconds an image of a step; who could
    not take part) of the contestants of one batch size and precision.

    start: makes a job's runner;  check: writes into the row, and returns what is wrong or None;
    most: steps a turn at most.  A row without "seconds" computed something else."""
    rows: list[Row] = []
    missing: list[str] = []
    running: list[Turns] = []
    for job in jobs:
        who = f"{job.name} {job.precision}, batch {job.batch}"
        row: Row = {"name": job.name, "precision": job.precision, "batch": job.batch}
        try:
            runner = start(job, options.patience)
            if wrong := check(runner, job, row):
                rows.append(row)
                print(f"{who} is off by {wrong}; not timed", file=sys.stderr)
                runner.close()
                continue
            once = runner.seconds(1)
            if once < options.least:
                once = runner.seconds(1)  # a first step can be slow
            runner.forget_peak()
        except Failed as failure:
            missing.append(f"{who}: {failure}")
            continue
        said = f"{who}: error {row['error']:.1e}"
        if times := row.get("of PyTorch's error"):
            said += f", {times:.2f} of PyTorch's own"
        print(said, flush=True)
        steps = max(1, min(math.ceil(options.least / once), most))
        turns = max(1, min(options.repeats, int(options.limit / (steps * once))))
        running.append(Turns(who, row | {"seconds": []}, runner, steps, turns))
    for turn in range(options.repeats):
        for each in list(running):
            if turn >= each.turns:
                continue
            time.sleep(PAUSE)
            try:
                seconds = each.runner.seconds(each.steps)
            except Failed as failure:
                missing.append(f"{each.who}: {failure}")
                running.remove(each)
                continue
            each.row["seconds"].append(seconds / (each.steps * each.row["batch"]))
    for each in running:
        each.row["peak bytes"] = each.runner.memory()
        each.runner.close()
        rows.append(each.row)
    return rows, missing
