"""The gallery: the paper's figures of a model in one folder, and index.html, which shows them. What
is there is kept, and another's is never written over. What the figures show is paper.py's.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import fastddpm
from fastddpm import arguments
from fastddpm.chain import Chain
from fastddpm.checkpoint import read_json
from fastddpm.data import Dataset, open_dataset
from fastddpm.data.errors import reading
from fastddpm.diffusion import Diffusion
from fastddpm.evaluation import extractors
from fastddpm.evaluation.images import Images
from fastddpm.evaluation.plots import PLOTS
from fastddpm.figures.job import Job
from fastddpm.figures.output import check_output
from fastddpm.figures.page import Section, page
from fastddpm.figures.paper import FIGURES, cost
from fastddpm.figures.pictures import check_channels
from fastddpm.figures.store import INDEX, Shown, Store
from fastddpm.kept import check_apart
from fastddpm.options import check_choice, check_count, shown
from fastddpm.progress import Whole
from fastddpm.schedule import Sampler
from fastddpm.shards import fingerprint
from fastddpm.unet import UNet
from fastddpm.wrapped import unwrap

RESULTS = "evaluation.json"  # of `fastddpm.evaluate`
N, ROWS, FRAMES, K = 64, 8, 10, 8
NEEDED = {
    "data": "--data, the images that the model was trained on",
    "extractor": "--extractor, a network whose features are compared",
    "evaluation": "--evaluation, a folder of fastddpm evaluate",
}


@dataclass(frozen=True)
class Gallery:
    """index: the page;  shown: its pictures;  left_out: other figures, and what each needs"""

    index: Path
    shown: list[Shown]
    left_out: dict[str, str]


def gallery(
    model: UNet,
    data: Dataset | torch.Tensor | str | os.PathLike | None,
    out: str | os.PathLike,
    *,
    only: Sequence[str] | None = None,
    n: int | None = None,
    rows: int | None = None,
    frames: int = FRAMES,
    k: int | None = None,
    search: int | None = None,
    seed: int = 0,
    steps: int | None = None,
    sampler: Sampler = "ddpm",
    eta: float = 0.0,
    clip: bool = True,
    precision: str = "auto",
    engine: str = "auto",
    extractor: extractors.Extractor | str | None = None,
    weights: str | os.PathLike | None = None,
    evaluation: str | os.PathLike | None = None,
    title: str | None = None,
    command: str | None = None,
    progress: bool = True,
) -> Gallery:
    """Draw the paper's figures of `model` into the folder `out`, and index.html, which a browser
    opens without a network.

    data:       the images that it was trained on, or a path of them: samples are compared with
                them, and they are mixed; None: without the figures that need some
    only:       names of FIGURES; None: all for which what they need is given
    n:          uncurated samples (64);  rows: images of the other figures (8);  frames: x0
                predictions of each over time
    k:          nearest neighbours of each (8), of `search` images evenly spaced (None: all)
    extractor:  an Extractor of `fastddpm.evaluation` or the name of one, for neighbours and
                quality over time in its features;  weights: the file that a named one may need
    evaluation: the folder of an evaluation of this model, for its plots of rate and distortion
    title, command: of the page: what the model is called, and what draws this gallery

    The samples of figures that show some are the same, and are drawn once. Run again after whatever
    ended it, it goes on: pictures of the same model, data and options are kept, and index.html
    shows all that are there. Raises ValueError, naming what differs, where the folder holds another
    model's, data's or options'; and for whatever does not fit, before anything is computed.
    """
    out = check_output(out, kinds=("",))
    model = unwrap(model)
    if not isinstance(model, UNet):
        raise ValueError(
            "pictures name their model by its fingerprint: model must be a fastddpm.UNet; got "
            f"{type(model).__name__}"
        )
    if (classes := model.config["num_classes"]) is not None:
        raise ValueError(f"the model has {classes} classes, and the gallery draws none")
    check_channels(model.in_channels)
    given = {"data": data is not None, "extractor": extractor is not None,
             "evaluation": evaluation is not None}  # fmt: skip
    wanted, left_out = _wanted(only, given)
    seed, frames = arguments.seed(seed), check_count("frames", frames)
    n = check_count("n", N if n is None else n)
    rows = min(n, ROWS) if rows is None else check_count("rows", rows)
    if rows > n:
        raise ValueError(f"rows must be at most n, the {n} samples; got {rows}")
    options = {"steps": steps, "sampler": sampler, "eta": eta, "clip": clip,
               "precision": precision, "engine": engine}  # fmt: skip
    chain = Chain(model, **options)  # type: ignore[arg-type]
    images = None if data is None else _images(data, model, out)
    searched = None if images is None else Images(images.data, search)
    if images is not None and len(images) < 2 and {"interpolation", "coarse-to-fine"} & {*wanted}:
        raise ValueError(
            f"{images.source} has one image, and interpolations mix two: give other data, or by "
            "only the figures that are wanted"
        )
    if searched is not None:
        k = min(K, len(searched)) if k is None else check_count("k", k)
        if k > len(searched):
            raise ValueError(f"k must be at most the {len(searched)} images searched; got {k}")
    network = _extractor(extractor, weights, model)
    if "quality-features" in wanted and images is not None and min(n, len(images)) < 2:
        raise ValueError(
            f"quality in features compares two sets, of 2 images at the least; got {n} samples and "
            f"{len(images)} images"
        )
    model_is = fingerprint(model, Diffusion.of(model))
    base = {"model": model_is, "seed": seed, **chain.facts, "precision": chain.engine.precision}
    facts: dict[str, Any] = {"n": n, "rows": rows, "frames": frames}
    if evaluation is not None:
        evaluation = Path(evaluation)
        facts["evaluation"] = _evaluation(evaluation, model_is)
    if network is not None:
        facts["extractor"] = network.fingerprint
    if images is not None and searched is not None:
        facts |= {"k": k, "search": len(searched), "data": images.fingerprint(progress)}
    store = Store(out, base, facts)
    store.read()  # another's is an error before anything is written

    with store.locked():
        there = store.read()
        todo = [name for name in wanted if name not in there]
        said = {
            "model": f"{title} ({model_is})" if title else model_is,
            "chain": f"{sampler}, {chain.T:,} of {chain.diffusion.schedule.full_steps:,} steps",
            "seed": str(seed),
            "data": "none" if images is None else images.describe(),
            "precision": chain.engine.precision,
            "version": f"fastddpm {fastddpm.__version__}",
        }
        heading = f"Gallery of {title}" if title else "Gallery"
        command = command or f"fastddpm figures --seed {seed} --out {shlex.quote(str(out))}"

        def write_page() -> None:
            sections = [_section(x, command) for x in there.values()]
            lacking = {FIGURES[x].title: why for x, why in left_out.items() if x not in there}
            store.write_page(page(heading, said, command, sections, lacking))

        with Whole(desc="figures", disable=not progress or not todo, bar_format=BAR) as whole:
            job = Job(
                model, options, chain.diffusion.schedule, images, searched, n, rows, frames,
                k or K, seed, network, evaluation, whole, store.drawn if todo else None,
            )  # fmt: skip
            whole.total = cost(job, todo)
            for name in todo:
                whole.set_description(name)
                began = time.perf_counter()
                picture = FIGURES[name].draw(job)
                if job.progression is not None:
                    store.keep(job.progression)
                there[name] = store.write(name, picture, time.perf_counter() - began)
                there = {name: there[name] for name in FIGURES if name in there}
                write_page()
        write_page()
    return Gallery(out / INDEX, list(there.values()), left_out)


BAR = "{desc}{percentage:3.0f}%|{bar}| {elapsed}, {remaining} left"


def _wanted(only: Sequence[str] | None, given: dict[str, bool]) -> tuple[list[str], dict[str, str]]:
    """(the figures to draw, the others by what they need)."""
    if isinstance(only, str):
        only = [only]
    for name in only or ():
        check_choice("only", name, tuple(FIGURES))
    lacking = {
        name: next((NEEDED[use] for use in figure.uses if not given[use]), None)
        for name, figure in FIGURES.items()
    }
    for name in only or ():
        if (why := lacking[name]) is not None:
            raise ValueError(f"the figure {name!r} needs {why}")
    wanted = [name for name in FIGURES if (only is None or name in only) and lacking[name] is None]
    if not wanted:
        raise ValueError(f"no figure is asked for; give some of {', '.join(FIGURES)}")
    return wanted, {name: f"needs {why}" for name, why in lacking.items() if why is not None}


def _images(data: Any, model: UNet, out: Path) -> Images:
    """All images of the data; ValueError if they are not the model's kind."""
    shape = (model.in_channels, *model.image_size)
    with warnings.catch_warnings(record=True) as said:  # of another size too, which is an error
        warnings.simplefilter("always")
        if isinstance(data, (str, os.PathLike)):
            _check_apart(data, out)
            data = open_dataset(data, size=shape[1:], channels=shape[0])
        images = Images(data)
    if tuple(images.shape) != shape:
        raise ValueError(
            f"{images.source} has images of shape {tuple(images.shape)}; the model draws {shape}"
        )
    if not len(images):
        raise ValueError(f"{images.source} has no images")
    for warning in said:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return images


def _check_apart(data: str | os.PathLike, out: Path) -> None:
    check_apart(
        data, out, f"the gallery {out} would lie among its data {data}, and its pictures be among "
        "the images: give another --out",
    )  # fmt: skip


def _extractor(extractor: Any, weights: Any, model: UNet) -> extractors.Extractor | None:
    if weights is not None and not isinstance(extractor, str):
        raise ValueError("weights are those of an extractor that is named: give its name too")
    if extractor is None:
        return None
    if model.in_channels not in (1, 3):
        raise ValueError(
            f"a network's features are of grey or RGB images; the model's have {model.in_channels} "
            "channels"
        )
    found = extractor
    if isinstance(extractor, str):
        found = extractors.extractor(extractor, weights=weights)
    if not isinstance(found, extractors.Extractor):
        allowed = ", ".join(extractors.available())
        raise ValueError(
            f"extractor must be one of {allowed}, or an Extractor; got {shown(extractor)}"
        )
    return found


def _evaluation(folder: Path, model_is: str) -> str:
    """The digest of an evaluation's results, if they are this model's and their plots are there."""
    if not (folder / RESULTS).is_file():
        raise FileNotFoundError(
            f"no such file: {folder / RESULTS}; give a folder of fastddpm evaluate"
        )
    about = read_json(folder / RESULTS).get("about")
    theirs = about.get("model") if isinstance(about, dict) else None
    if theirs != model_is:
        raise ValueError(
            f"{folder / RESULTS} is of another model: its fingerprint is {theirs!r}, and here "
            f"{model_is!r}"
        )
    for name in PLOTS:
        with reading(folder / name, "a plot of that evaluation"), Image.open(folder / name) as plot:
            plot.load()
    return hashlib.sha256((folder / RESULTS).read_bytes()).hexdigest()


def _section(x: Shown, command: str) -> Section:
    return Section(
        x.name, x.title, x.numbers, x.path.name, x.size, x.caption, x.alt,
        f"{command} --only {x.name}",
    )  # fmt: skip
