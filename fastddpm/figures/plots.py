"""Curves as .png files, by matplotlib. No pictures of images."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from fastddpm.checkpoint import atomic_write


def loss_plot(
    path: str | os.PathLike,
    steps: Sequence[int],
    losses: Sequence[float],
    ylabel: str,
    held_out: Sequence[tuple[int, float]] = (),
) -> None:
    """Write the plot of a training run's loss.

    held_out: (step, bits/dim) of held-out images, as a second curve; the lowest is marked
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(steps, losses, linewidth=1, label="training loss")
    axes.set(xlabel="step", ylabel=ylabel, title="training loss")
    if len(losses) > 1 and min(filter(math.isfinite, losses), default=0) > 0:
        axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    if held_out:
        at, bits = zip(*held_out, strict=True)
        best = min(range(len(bits)), key=bits.__getitem__)
        right = axes.twinx()
        right.plot(at, bits, "C1o-", linewidth=1.5, markersize=3, label="held-out images")
        right.plot(at[best], bits[best], "C3o", label=f"best: {bits[best]:.4f}, step {at[best]:,}")
        right.set_ylabel("bits/dim of held-out images")
        axes.set_title("training loss, and bits/dim of held-out images")
        lines = [*axes.get_lines(), *right.get_lines()]
        figure.legend(handles=lines, loc="outside lower center", ncols=len(lines))
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


def quality_plot(
    times: Sequence[int], T: int, curves: Mapping[str, Sequence[float]]
) -> Image.Image:
    """Quality against time, as Figure 10 has it: each curve over the steps taken, T - t.

    times: t at which x0 was predicted from x_t;  curves: values there, by what they measure
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(curves) + 1, 3.75), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    steps = [T - t for t in times]
    for axes, (label, values) in zip(figure.subplots(1, len(curves), squeeze=False)[0],
                                     curves.items(), strict=True):  # fmt: skip
        axes.plot(steps, values, "o-", linewidth=1.5, markersize=4)
        axes.set(xlabel="reverse process steps (T - t)", ylabel=label, xlim=(0, T))
        axes.grid(alpha=0.3)
    figure.set_dpi(120)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
