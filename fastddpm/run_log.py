"""The log of a training run: log.csv and the plot of it. No training."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from fastddpm.checkpoint import atomic_write
from fastddpm.data.files import RegularFile
from fastddpm.figures import loss_plot
from fastddpm.run_folder import LOG, PLOT

LONGEST_LOG = 2**26  # bytes: some two million rows
COLUMNS = ["step", "loss", "images_per_second"]


class Log:
    """log.csv and loss.png of a run, up to the step that its checkpoint holds."""

    def __init__(self, out: Path, step: int, objective: str):
        self.out, self.unit = out, "mean squared error" if objective == "simple" else "bits/dim"
        self.rows: list[tuple[int, float, float]] = []
        if step and (out / LOG).exists():
            self.rows = [row for row in read_log(out / LOG) if row[0] <= step]

    def add(self, step: int, loss: float, rate: float) -> None:
        self.rows.append((step, loss, rate))

    def write(self) -> None:
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(COLUMNS)
        writer.writerows((s, f"{loss:.6f}", f"{rate:.1f}") for s, loss, rate in self.rows)
        with atomic_write(self.out / LOG) as file:
            file.write(text.getvalue().encode())
        if self.rows:
            steps, losses, _ = zip(*self.rows, strict=True)
            loss_plot(self.out / PLOT, steps, losses, self.unit)


def read_log(path: Path) -> list[tuple[int, float, float]]:
    """The rows of a log.csv; ValueError names the file and the line that is none."""
    line = 1
    try:
        with RegularFile(path) as file:
            if file.length > LONGEST_LOG:
                raise ValueError(f"it is longer than {LONGEST_LOG} bytes")
            text = file.read(file.length, 0).decode("utf-8")
        rows = csv.reader(io.StringIO(text, newline=""))
        if next(rows, None) != COLUMNS:
            raise ValueError(f"it must be {','.join(COLUMNS)}")
        read = []
        for step, loss, rate in rows:
            line = rows.line_num
            read.append((int(step), float(loss), float(rate)))
        return read
    except (ValueError, OSError, csv.Error) as error:
        raise ValueError(
            f"{path} can't be read near line {line}: {error}; mend the file, or remove it and the "
            "run goes on without"
        ) from None
