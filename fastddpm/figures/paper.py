"""The paper's figures of a Job, each as a picture with its caption. No files."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from PIL import Image

from fastddpm.evaluation.distances import compare, features
from fastddpm.evaluation.images import Images
from fastddpm.evaluation.plots import PLOTS
from fastddpm.figures.job import NO_DATA, Job
from fastddpm.figures.labels import LAMBDA, labelled_grid
from fastddpm.figures.neighbours import Features, nearest
from fastddpm.figures.pictures import to_uint8
from fastddpm.figures.plots import quality_plot
from fastddpm.sampling import draw_shared_latent, interpolate

WIDTH = 900  # of a grid of small images, about
MIXTURES = 11  # lambda = 0, 0.1 .. 1
SHARED = (1, 0.75, 0.5, 0.25)  # of the chain, where the samples of a row part
MIXED = 0.5  # of the chain, where Figure 8 mixes
FINE = [k / 8 for k in range(9)]  # of the chain, where Figure 9 mixes: 0 is pixels


# What an image that is compared takes, in steps of an image of the chain: for the bar alone.
PIXELS, FEATURES = 1 / 40, 20.0
REAL = 2_000  # images of the data that samples are compared with over time, at most
CURVES = ("KID", "IS")  # FD falls with the number of images, of which there are few


class Picture(NamedTuple):
    """alt: what is to be seen, for who does not see it"""

    image: Image.Image
    caption: str
    alt: str


# ---- figures -------------------------------------------------------------------------------------


def samples(job: Job) -> Picture:
    drawn = job.drawn()
    image = labelled_grid(drawn.images, title=f"{job.n} samples: {job.said}", min_width=WIDTH)
    return Picture(
        image,
        f"{job.n} samples, none chosen: those of the numbers 0 to {job.n - 1} of the seed.",
        f"A grid of {job.n} images drawn from the model.",
    )


def progressive(job: Job) -> Picture:
    drawn = job.drawn()
    shown = torch.cat((drawn.predictions, drawn.images[None, : job.rows]))
    image = labelled_grid(
        shown.transpose(0, 1).flatten(0, 1),
        columns=[*map(str, drawn.times), "sample"],
        corner="t",
        title=f"x0 predicted from x_t: {job.said}",
        apart=(len(drawn.times),),
        min_width=WIDTH,
    )
    return Picture(
        image,
        "A row an image: x0 as the model predicts it from x_t, at the t over the column, and the "
        "sample that it becomes. What is large is settled first, details last.",
        f"{job.rows} rows of images that go from blurred at t = {drawn.times[0]} to sharp samples.",
    )


def quality(job: Job) -> Picture:
    drawn = job.drawn()
    label = "RMSE to the sample on [0, 255]"
    image = quality_plot(drawn.times, job.schedule.full_steps, {label: drawn.rmse})
    return Picture(
        image,
        f"How far the x0 predicted from x_t is from the sample that it becomes, over the steps "
        f"taken: root of the mean squared error over {job.n} samples. (The paper plots "
        "Inception score and FID.)",
        f"A falling curve, from {drawn.rmse[0]:.1f} at the first step to {drawn.rmse[-1]:.1f} at "
        "the last.",
    )


def quality_features(job: Job) -> Picture:
    assert job.extractor is not None, NO_DATA
    assert job.data is not None, NO_DATA
    drawn, real = job.drawn(every=True), Images(job.data.data, REAL)
    assert drawn.every is not None
    count = len(real) + job.n * len(drawn.times)
    with job.whole.part(count * FEATURES, count):
        goal = features(real, job.extractor, progress=False)
        found = [features(x, job.extractor, progress=False) for x in drawn.every]
    curves: dict[str, list[float]] = {}
    for x in found:
        for figure in compare(x, goal, job.extractor, seed=job.seed, progress=False):
            if figure.name.startswith(CURVES):
                curves.setdefault(figure.name, []).append(figure.value)
    image = quality_plot(drawn.times, job.schedule.full_steps, curves)
    ends = ", ".join(f"{name} from {v[0]:.3g} to {v[-1]:.3g}" for name, v in curves.items())
    return Picture(
        image,
        f"{' and '.join(curves)} of the x0 predicted from x_t, over the steps taken, in the "
        f"features of {job.extractor.name}: {job.n} samples, compared with {len(real):,} of "
        f"{job.data.of:,} images of the data. Few samples: numbers of other n are others.",
        f"Curves over the steps: {ends}.",
    )


def shared_latent(job: Job) -> Picture:
    levels = job.levels(SHARED, 1)
    with job.whole.part(_shared_cost(job), sum(levels) + job.T - min(levels)):
        images, latents = draw_shared_latent(
            job.model, job.rows, t=levels, seed=job.seed, progress=False, **job.options
        )
    shown = torch.cat((latents[:, None], images), dim=1)
    image = labelled_grid(
        to_uint8(shown.flatten(0, 1)),
        rows=[str(job.paper_t(level)) for level in levels],
        columns=["x_t", "samples", *[""] * (job.rows - 1)],
        corner="t",
        title=f"Samples of p(x0 | x_t): {job.said}",
        apart=(1,),
        min_width=WIDTH,
    )
    return Picture(
        image,
        "The samples of a row share the x_t at their left, at the t of the row, and differ in the "
        "noise of the steps from there on: the smaller t, the more they have in common.",
        f"{len(levels)} rows, each a noisy image x_t and {job.rows} samples that begin at it.",
    )


def _shared_cost(job: Job) -> float:
    return job.rows * sum(job.levels(SHARED, 1))


def interpolation(job: Job) -> Picture:
    pairs, level = job.pairs(), job.levels((MIXED,), 1)[0]
    mixed = []
    for a, b in pairs:
        with job.whole.part(_interpolation_cost(job) / len(pairs), level):
            mixed.append(_mixtures(job, a, b, [level]))
    t = job.paper_t(level)
    image = _mixture_grid(torch.cat(mixed), [str(t)] * len(pairs), f"Interpolation: {job.said}")
    return Picture(
        image,
        f"Two images of the data at the ends of a row, noised to t = {t}, mixed as (1 - {LAMBDA}) "
        f"x_t + {LAMBDA} x'_t and denoised; {LAMBDA} = 0 and 1 are their reconstructions. All "
        "mixtures share their noise.",
        f"{len(pairs)} rows of {MIXTURES} images that go from one source image to another.",
    )


def _interpolation_cost(job: Job) -> float:
    return MIXTURES * job.levels((MIXED,), 1)[0] * len(job.pairs())


def coarse_to_fine(job: Job) -> Picture:
    a, b = job.pairs()[0]
    levels = job.levels(FINE, 0)
    with job.whole.part(_coarse_cost(job), sum(levels)):
        mixed = _mixtures(job, a, b, levels)
    rows = [str(job.paper_t(level)) for level in levels]
    return Picture(
        _mixture_grid(mixed, rows, f"Coarse to fine interpolation: {job.said}"),
        "The same two images, mixed after t steps of noise, a row each: large t changes what is "
        f"large, small t details, and t = 0 mixes pixels. {LAMBDA} over the columns.",
        f"{len(rows)} rows of {MIXTURES} mixtures of two images, by the steps of noise before it.",
    )


def _coarse_cost(job: Job) -> float:
    return MIXTURES * sum(job.levels(FINE, 0))


def _mixtures(job: Job, a: torch.Tensor, b: torch.Tensor, levels: list[int]) -> torch.Tensor:
    """(len(levels), MIXTURES + 2, C, H, W) uint8: the sources at the ends."""
    mixed = interpolate(
        job.model, a, b, n=MIXTURES, t=levels, seed=job.seed, progress=False, **job.options
    )
    ends = [x.expand(len(levels), 1, *x.shape) for x in (a, b)]
    return torch.cat((ends[0], to_uint8(mixed).cpu(), ends[1]), dim=1)


def _mixture_grid(mixed: torch.Tensor, rows: list[str], title: str) -> Image.Image:
    weights = [f"{k / (MIXTURES - 1):g}" for k in range(MIXTURES)]
    return labelled_grid(
        mixed.flatten(0, 1),
        rows=rows,
        columns=["source", *weights, "source"],
        corner=f"t \\ {LAMBDA}",
        title=title,
        apart=(1, MIXTURES + 1),
        min_width=WIDTH,
    )


def nearest_pixels(job: Job) -> Picture:
    def rmse(distance: float) -> str:
        return f"{distance / math.prod(job.model_shape) ** 0.5:.1f}"

    return _neighbours(job, None, PIXELS, where="in pixels", corner="RMSE", said=rmse)


def nearest_features(job: Job) -> Picture:
    assert job.extractor is not None, NO_DATA
    return _neighbours(
        job, job.extractor, FEATURES, where=f"in features of {job.extractor.name}",
        corner="distance", said=lambda distance: f"{distance:.3g}",
    )  # fmt: skip


def _neighbours(
    job: Job,
    network: Features | None,
    cost: float,
    *,
    where: str,
    corner: str,
    said: Callable[[float], str],
) -> Picture:
    assert job.searched is not None, NO_DATA
    data, drawn = job.searched, job.drawn().images[: job.rows]
    with job.whole.part(len(data) * cost, len(data)):
        indices, distances = nearest(drawn, data, k=job.k, features=network, progress=False)
    rows = []
    for sample, found in zip(drawn, indices.tolist(), strict=True):
        rows += [sample, *(data[k : k + 1][0] for k in found)]
    searched = f"{len(data):,}" + f" of {data.of:,}" * (len(data) < data.of)
    image = labelled_grid(
        torch.stack(rows),
        rows=[said(distance) for distance in distances[:, 0].tolist()],
        columns=["sample", *map(str, range(1, job.k + 1))],
        corner=corner,
        title=f"Nearest of {searched} images {where}: {job.said}",
        apart=(1,),
        min_width=WIDTH,
    )
    return Picture(
        image,
        f"Samples at the left, and beside each the {job.k} images of the data that are nearest to "
        f"it {where}, of {searched} that were compared. The number is the distance of the first. "
        "Were a sample a copy of an image that was trained on, it would be seen here.",
        f"{len(drawn)} samples, each with the {job.k} images of the data nearest to it.",
    )


def rate_distortion(job: Job) -> Picture:
    assert job.evaluation is not None
    plots = []
    for name in PLOTS:
        with Image.open(job.evaluation / name) as plot:
            plots.append(plot.convert("RGB"))
    image = Image.new(
        "RGB", (sum(plot.width for plot in plots), max(plot.height for plot in plots)), "white"
    )
    x = 0
    for each in plots:
        image.paste(each, (x, 0))
        x += each.width
    return Picture(
        image,
        "Distortion and rate over the steps taken, and distortion by rate, as fastddpm evaluate "
        "measured them.",
        "Three curves: distortion falls with time, rate grows, and distortion falls with rate.",
    )


# ---- what there is -------------------------------------------------------------------------------


class Figure(NamedTuple):
    """Of the gallery.

    numbers: of the paper's figures
    depends: names of what it is a function of, beside model, chain and seed
    uses:    what must be given for it
    samples: whether it shows some of Job.drawn
    cost:    in steps of an image, without those
    """

    title: str
    numbers: str
    draw: Callable[[Job], Picture]
    depends: tuple[str, ...]
    uses: tuple[str, ...] = ()
    samples: bool = False
    cost: Callable[[Job], float] = lambda job: 0.0


def _quality_cost(job: Job) -> float:
    return FEATURES * (job.n * job.frames + min(REAL, len(job.data or ())))


def _search_cost(each: float) -> Callable[[Job], float]:
    return lambda job: each * len(job.searched or ())


FIGURES: dict[str, Figure] = {
    "samples": Figure(
        "Uncurated samples", "Figures 11 and 13", samples, ("n",), samples=True
    ),
    "progressive": Figure(
        "Progressive generation", "Figures 6 and 14", progressive, ("rows", "frames"), samples=True
    ),
    "quality": Figure(
        "Quality over time", "Figure 10", quality, ("n", "frames"), samples=True
    ),
    "quality-features": Figure(
        "Quality over time in features",
        "Figure 10",
        quality_features,
        ("n", "frames", "data", "extractor"),
        ("data", "extractor"),
        samples=True,
        cost=_quality_cost,
    ),
    "shared-latent": Figure(
        "Shared latents", "Figure 7", shared_latent, ("rows",), cost=_shared_cost
    ),
    "interpolation": Figure(
        "Interpolation", "Figure 8", interpolation, ("rows", "data"), ("data",),
        cost=_interpolation_cost,
    ),
    "coarse-to-fine": Figure(
        "Coarse to fine interpolation", "Figure 9", coarse_to_fine, ("data",), ("data",),
        cost=_coarse_cost,
    ),
    "nearest-pixels": Figure(
        "Nearest neighbours in pixels", "Figures 12a and 15a", nearest_pixels,
        ("rows", "k", "data", "search"), ("data",), samples=True, cost=_search_cost(PIXELS),
    ),
    "nearest-features": Figure(
        "Nearest neighbours in features", "Figures 12b and 15b", nearest_features,
        ("rows", "k", "data", "search", "extractor"), ("data", "extractor"), samples=True,
        cost=_search_cost(FEATURES),
    ),
    "rate-distortion": Figure(
        "Rate and distortion", "Figure 5", rate_distortion, ("evaluation",), ("evaluation",)
    ),
}  # fmt: skip


def cost(job: Job, names: Sequence[str]) -> float:
    """Of these figures, in steps of an image: the whole bar's total."""
    lacks_every = job.progression is None or job.progression.every is None
    draws = lacks_every and "quality-features" in names
    draws |= job.progression is None and any(FIGURES[name].samples for name in names)
    return job.n * job.T * draws + sum(FIGURES[name].cost(job) for name in names)
