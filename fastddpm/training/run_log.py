"""The log of a training run: log.csv and the plot of it. No training."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import NamedTuple

from fastddpm.checkpoint import atomic_write
from fastddpm.data.files import RegularFile
from fastddpm.figures import loss_plot
from fastddpm.training.run_folder import LOG, PLOT

LONGEST_LOG = 2**26  # bytes: some two million rows


class Row(NamedTuple):
    """The steps since the row before, up to `step`. What was not measured is None.

    loss:              mean of the steps'
    images_per_second: of all ranks together
    waiting:           share of the time in which a step waited for its images, 0 .. 1
    skipped:           steps of the run so far that changed nothing, not being finite
    bits_per_dim:      of the averaged model after `step`, on held-out images: see held_out.py
    """

    step: int
    loss: float
    images_per_second: float
    waiting: float | None = None
    skipped: int | None = None
    bits_per_dim: float | None = None


FORMATS = {
    "step": "d", "loss": ".6f", "images_per_second": ".1f", "waiting": ".4f", "skipped": "d",
    "bits_per_dim": ".6f",
}  # fmt: skip
COLUMNS = list(FORMATS)
NEEDED = COLUMNS[:3]  # the others are written where a row has them


UNITS = {
    "simple": "mean squared error",
    "vlb": "bits/dim",
    "hybrid": "mean squared error + T/1000 bits/dim",
}  # of a loss


class Log:
    """log.csv and loss.png of a run, up to the step that its checkpoint holds."""

    def __init__(self, out: Path, step: int, objective: str):
        self.out, self.unit = out, UNITS[objective]
        self.rows: list[Row] = []
        if step and (out / LOG).exists():
            self.rows = [row for row in read_log(out / LOG) if row.step <= step]

    def add(self, row: Row) -> None:
        self.rows.append(row)

    def write(self) -> None:
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        columns = [
            name for name in COLUMNS
            if name in NEEDED or any(getattr(row, name) is not None for row in self.rows)
        ]  # fmt: skip
        writer.writerow(columns)
        writer.writerows([_text(row, name) for name in columns] for row in self.rows)
        with atomic_write(self.out / LOG) as file:
            file.write(text.getvalue().encode())
        if self.rows:
            held_out = [
                (row.step, row.bits_per_dim) for row in self.rows
                if row.bits_per_dim is not None and math.isfinite(row.bits_per_dim)
            ]  # fmt: skip
            steps, losses = [row.step for row in self.rows], [row.loss for row in self.rows]
            loss_plot(self.out / PLOT, steps, losses, self.unit, held_out)


def _text(row: Row, name: str) -> str:
    value = getattr(row, name)
    return "" if value is None else format(value, FORMATS[name])


def read_log(path: Path) -> list[Row]:
    """The rows of a log.csv; ValueError names the file and the line that is none."""
    line = 1
    try:
        with RegularFile(path) as file:
            if file.length > LONGEST_LOG:
                raise ValueError(f"it is longer than {LONGEST_LOG} bytes")
            text = file.read(file.length, 0).decode("utf-8")
        rows = csv.reader(io.StringIO(text, newline=""))
        header = next(rows, [])
        more = header[len(NEEDED) :]
        if header[: len(NEEDED)] != NEEDED or more != [name for name in COLUMNS if name in more]:
            raise ValueError(
                f"it must be {','.join(NEEDED)}, and then may come "
                f"{', '.join(COLUMNS[len(NEEDED) :])}"
            )
        read = []
        for cells in rows:
            line = rows.line_num
            if len(cells) != len(header):
                raise ValueError(f"it has {len(cells)} columns, of {len(header)}")
            named = dict(zip(header, cells, strict=True))
            values = {
                name: int(cell) if FORMATS[name] == "d" else float(cell)
                for name, cell in named.items()
                if cell or name in NEEDED
            }
            read.append(Row(**values))  # type: ignore[arg-type]
        return read
    except (ValueError, OSError, csv.Error) as error:
        raise ValueError(
            f"{path} can't be read near line {line}: {error}; mend the file, or remove it and the "
            "run goes on without"
        ) from None
