"""An evaluation as text, Table 1's columns and Table 4, and as a list of numbers. None is made
here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

if TYPE_CHECKING:
    from fastddpm.evaluation.bound import Bound
    from fastddpm.evaluation.distances import Figure
    from fastddpm.evaluation.rate_distortion import RateDistortion
    from fastddpm.evaluation.results import Results


def evaluation_table(
    bounds: Mapping[str, Bound],
    distances: Mapping[str, Sequence[Figure]],
    curve: RateDistortion | None,
) -> str:
    """Table 1 for one model: a row a figure, a column each for test and training images, and of how
    many each is; below it Table 4."""
    sides = [side for side in ("test", "train") if side in bounds or side in distances]
    rows: list[list[str]] = []
    if bounds:
        rows.append(["bits/dim, at most"] + [_bits(bounds.get(side)) for side in sides])
        rows[-1].append(_of_bits(bounds))
    for name in dict.fromkeys(f.name for figures in distances.values() for f in figures):
        found = {side: _named(distances.get(side, ()), name) for side in sides}
        rows.append([name] + [_value(found[side]) for side in sides] + [_of_distances(found)])
    parts = [tabulate(rows, headers=["", *sides, "of"], disable_numparse=True)]
    if curve is not None:
        parts.append(f"{curve.table()}\nmeans of {curve.n:,} test images")
    return "\n\n".join(parts)


def _bits(bound: Bound | None) -> str:
    return "" if bound is None else f"{bound.mean:.4f} +- {bound.stderr:.4f}"


def _of_bits(bounds: Mapping[str, Bound]) -> str:
    counts = " and ".join(dict.fromkeys(f"{bound.n:,}" for bound in bounds.values()))
    some = next(iter(bounds.values()))
    terms = f"all {some.T}" if some.sampled is None else f"{some.sampled} of {some.T}"
    return f"{counts} images, {terms} terms"


def _named(figures: Sequence[Figure], name: str) -> Figure | None:
    return next((figure for figure in figures if figure.name == name), None)


def _value(figure: Figure | None) -> str:
    if figure is None:
        return ""
    spread = "" if figure.spread is None else f" +- {figure.spread:.3g}"
    return f"{figure.value:.5g}{spread}"


def _of_distances(found: Mapping[str, Figure | None]) -> str:
    there = [figure for figure in found.values() if figure is not None]
    real = " and ".join(dict.fromkeys(f"{figure.n_real:,}" for figure in there if figure.n_real))
    return f"{there[0].n_generated:,} samples" + f", {real} images" * bool(real)


def flat_figures(
    bounds: Mapping[str, Bound], distances: Mapping[str, Sequence[Figure]], results: Results
) -> list[dict[str, Any]]:
    """Every number by itself with all that it is a function of, and what computed it."""
    rows = []
    for name, part in results.parts.items():
        kind, side = name.split()[:2]
        if part["content"] is None:
            continue
        said = {"images of": side, **results.about, **part["facts"], "ran": part["ran"]}
        if kind == "curve":
            continue
        if kind == "bits_per_dim":
            bound = bounds[side]
            values = {
                "name": "bits/dim",
                "value": bound.mean,
                "standard error": bound.stderr,
                "n": bound.n,
            }
            rows.append({**values, **said})
        else:
            rows += [{**figure, **said} for figure in part["content"]]
    return rows
