"""What follows from the seconds of a race, as rows, a table and a chart. No clock."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from tabulate import tabulate

from fastddpm.checkpoint import atomic_write

Row = dict[str, Any]


def finish(rows: list[Row], race: ModuleType, ceilings: dict[str, float | None]) -> None:
    """Add what follows from the seconds of an image, and from the memory."""
    for row in rows:
        if "seconds" not in row:
            continue
        seconds, work = statistics.median(row["seconds"]), row["FLOP"] * race.PRODUCTS
        row["ms"] = seconds * 1e3
        row["images/s"] = 1 / (seconds * race.STEPS_AN_IMAGE)
        row["TFLOP/s"] = work / seconds / 1e12
        if rate := ceilings[row["precision"]]:
            row["of ceiling"] = work / seconds / rate
        peers = [
            r
            for r in rows
            if r["name"] in race.PEERS and race.PEERS[r["name"]].same and "seconds" in r
            and (r["batch"], r["precision"]) == (row["batch"], row["precision"])
        ]  # fmt: skip
        if row["name"] in race.OURS and peers:
            best = min(peers, key=lambda r: statistics.median(r["seconds"]))
            row["x best peer"] = statistics.median(best["seconds"]) / seconds
            row["x its memory"] = row["peak bytes"] / best["peak bytes"]


def table(rows: Iterable[Row], race: ModuleType) -> str:
    return tabulate(
        [
            {
                "batch": row["batch"],
                "": row["name"],
                "precision": row["precision"],
                **race.columns(row),
                "TFLOP/s": f"{row['TFLOP/s']:.3g}",
                "of ceiling": f"{row['of ceiling']:.0%}" if "of ceiling" in row else "",
                "x best peer": f"{row['x best peer']:.2f}" if "x best peer" in row else "",
                "peak MB": f"{row['peak bytes'] / 1e6:.0f}",
            }
            for row in rows
            if "seconds" in row
        ],
        headers="keys", tablefmt="simple", disable_numparse=True,
    )  # fmt: skip


def plot(path: Path, rows: list[Row], race: ModuleType, title: str) -> None:
    """Bars of ms an image, a panel a batch size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in rows if "seconds" in row]
    batches = sorted({row["batch"] for row in rows})
    most = max(sum(row["batch"] == batch for row in rows) for batch in batches)
    figure = Figure(figsize=(9, len(batches) * (0.28 * most + 0.9)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(batches), squeeze=False)[:, 0]
    for axes, batch in zip(panels, batches, strict=True):
        shown = sorted((r for r in rows if r["batch"] == batch), key=lambda r: -r["ms"])
        bars = axes.barh(
            [
                f"{r['name']} {r['precision']}" + ", its own network" * r.get("own network", False)
                for r in shown
            ],
            [r["ms"] for r in shown],
            color=["tab:blue" if r["name"] in race.OURS else "0.7" for r in shown],
        )
        axes.bar_label(bars, [f"{r['ms']:.3g}" for r in shown], padding=3, fontsize=8)
        axes.set(title=f"batch {batch}", xlabel=f"ms {race.UNIT}")
        axes.margins(x=0.1)
    figure.suptitle(title, fontsize=10)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
