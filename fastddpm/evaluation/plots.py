"""Figure 5: distortion against time, rate against time, distortion against rate. No models."""

from __future__ import annotations

import os
from collections.abc import Mapping

from fastddpm.checkpoint import atomic_write
from fastddpm.evaluation.rate_distortion import RateDistortion

PLOTS = ("distortion-time.png", "rate-time.png", "distortion-rate.png")
_AXES = {"distortion": "distortion (RMSE on [0, 255])", "rate": "rate (bits/dim)",
         "time": "reverse process steps (T - t)"}  # fmt: skip


def rate_distortion_plots(
    folder: str | os.PathLike, curves: Mapping[str, RateDistortion], title: str = ""
) -> None:
    """Write PLOTS into `folder`, each atomically: a curve for each set of images, by its name.

    title: of each picture, what the curves are of
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    for name in PLOTS:
        y, x = name.removesuffix(".png").split("-")
        figure = Figure(figsize=(6, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for label, curve in curves.items():
            axes.plot(getattr(curve, x), getattr(curve, y), linewidth=1.5, label=label)
        axes.set(xlabel=_AXES[x], ylabel=_AXES[y], title=title)
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        if x == "time":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if len(curves) > 1:
            axes.legend()
        with atomic_write(os.path.join(folder, name)) as file:
            figure.savefig(file, format="png", dpi=120)
