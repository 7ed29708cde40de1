"""A run's numbers and pictures as TensorBoard has them, in the folder tensorboard/ of the run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from fastddpm.figures import grid
from fastddpm.training.run_folder import BOARD
from fastddpm.training.run_log import COLUMNS, Row


def check_board() -> None:
    """ImportError that says what to install, where TensorBoard's writer is not there."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"TensorBoard's files need its package ({error}): pip install 'fastddpm[tensorboard]'"
        ) from None


class Board:
    """Scalars of each row of the log, under its names, and the learning rate; grids of samples.

    step: that of the checkpoint that the run goes on from. TensorBoard shows nothing that an
          earlier writer of the folder said of later steps, which will be said again
    """

    def __init__(self, out: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(out / BOARD), purge_step=step + 1)

    def add_row(self, row: Row, lr: float) -> None:
        for name in COLUMNS[1:]:
            if (value := getattr(row, name)) is not None:
                self.writer.add_scalar(name, value, row.step)
        self.writer.add_scalar("lr", lr, row.step)

    def add_samples(self, images: torch.Tensor, step: int) -> None:
        """(n, C, H, W) in [-1, 1]."""
        picture = np.asarray(grid(images).convert("RGB"))
        self.writer.add_image("samples", picture, step, dataformats="HWC")

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
