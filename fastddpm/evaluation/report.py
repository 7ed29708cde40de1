"""How good a model is, from one call: Table 1's columns, Table 4 and Figure 5, with a folder of
results in which a run that was stopped goes on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastddpm import ranks
from fastddpm.evaluation.bound import Bound
from fastddpm.evaluation.distances import Figure
from fastddpm.evaluation.plots import rate_distortion_plots
from fastddpm.evaluation.rate_distortion import RateDistortion, rate_distortion
from fastddpm.evaluation.results import Results
from fastddpm.evaluation.tables import evaluation_table, flat_figures
from fastddpm.evaluation.task import AUTO, BITS, CURVE, DISTANCES, SHOWN, Task
from fastddpm.figures import check_output
from fastddpm.host import own_state
from fastddpm.schedule import Sampler
from fastddpm.spacing import Spacing
from fastddpm.unet import UNet


@dataclass(frozen=True)
class Evaluation:
    """What was found of a model.

    bits_per_dim:    a Bound each of the "test" images and, where there are some, the "train" ones
    distances:       figures by the images that samples were compared with; {} without an extractor
    rate_distortion: of the test images, with terms=K of `curve` of them
    results:         all of it as it stands in evaluation.json, part by part
    """

    bits_per_dim: dict[str, Bound]
    distances: dict[str, list[Figure]]
    rate_distortion: RateDistortion
    results: Results = field(repr=False)

    @classmethod
    def of(cls, results: Results) -> Evaluation:
        """Of the parts that are done, the bound of the test images among them."""
        done: dict[str, dict[str, list[Any]]] = {BITS: {}, CURVE: {}, DISTANCES: {}}
        for name in results.parts:
            kind, side = name.split()[:2]
            if (content := results.content(name)) is not None:
                done[kind].setdefault(side, []).append(content)
        bounds = {side: Bound.from_json(parts[0]) for side, parts in done[BITS].items()}
        distances = {
            side: [Figure(**figure) for part in parts for figure in part]
            for side, parts in done[DISTANCES].items()
        }
        whole = [Bound.from_json(part) for part in done[CURVE].get("test", ())]
        curve = rate_distortion((whole or [bounds["test"]])[0])
        return cls(bounds, distances, curve, results)

    def table(self) -> str:
        """Table 1's columns for this model and Table 4, as text."""
        return evaluation_table(self.bits_per_dim, self.distances, self.rate_distortion)

    def figures(self) -> list[dict[str, Any]]:
        """Every number by itself, JSON-ready, with its n and all else that it is a function of."""
        return flat_figures(self.bits_per_dim, self.distances, self.results)

    def save(self, folder: str | os.PathLike) -> None:
        """Write evaluation.json and the plots into `folder`; ValueError where it holds another
        evaluation's."""
        theirs = Results(check_output(folder, kinds=("",)), self.results.about)
        theirs.check(self.results.facts)
        with theirs.locked():
            theirs.check(self.results.facts)
            theirs.parts.update(self.results.parts)
            Evaluation.of(theirs).write()

    def write(self) -> None:
        """The files of the results' own folder, where it has not got them."""
        curve = self.rate_distortion.to_json()
        summary = {"figures": self.figures(), "rate_distortion": curve}
        if self.results.is_written(summary) or self.results.folder is None:
            return
        curves = {"test": self.rate_distortion}
        if (train := self.bits_per_dim.get("train")) is not None and train.sampled is None:
            curves["train"] = rate_distortion(train)
        rate_distortion_plots(self.results.folder, curves)
        self.results.write(summary)


@own_state()
def evaluate(
    model: UNet,
    data: Any,
    *,
    train: Any = None,
    out: str | os.PathLike | None = None,
    n: int = 1000,
    images: int | None = None,
    reference: int | None = None,
    steps: int | str | Sequence[int] | None = None,
    spacing: Spacing = "strided",
    terms: int | None = None,
    curve: int = SHOWN,
    seed: int = 0,
    extractor: str = AUTO,
    weights: str | os.PathLike | None = None,
    sampler: Sampler = "ddpm",
    eta: float = 0.0,
    clip: bool = True,
    resize: bool = False,
    batch_size: int | None = None,
    cache: str | os.PathLike | bool | None = True,
    precision: str = "auto",
    engine: str = "auto",
    progress: bool = True,
) -> Evaluation:
    """Bits/dim of `data`, rate and distortion, and how far the model's samples are from it.

    data, train: test images, and training images where the model is to be judged by them too: a
               path (of kinds with splits the test and the training images), a
               `fastddpm.data.Dataset` or a uint8 tensor (N, C, H, W)
    out:       a folder for evaluation.json, the plots, samples/ and what a run that was stopped
               goes on from; run again, it computes what is missing. None: nothing is written
    n:         samples to compare
    images:    so many images for bits/dim, evenly spaced in their order; None: all
    reference: so many images to compare samples with, likewise
    steps, spacing: of a shorter chain, see Schedule.respace; None: all T
    terms:     K of the T terms of each image, drawn, for an estimate; None: all
    curve:     with `terms`, so many test images get all, for rate and distortion at every step
    extractor: the network whose features are compared, one of `evaluation.extractors`; "auto": the
               first that can be used, Inception before others; "none": no samples are drawn
    weights:   of the extractor, a file
    sampler, eta, clip: of the samples' chain; clip is the bound's too
    resize:    crop and resize pictures to the model's size and colours, as training does
    cache:     a folder where the data's features are kept for later evaluations; True: the user's
               (FASTDDPM_CACHE says where), None: none
    precision: of the samples, and of the bound unless it is "auto", when that is float32

    FID falls with n: compare models by the same n, and below 5,000 samples by KID.

    Where torch.distributed is initialised all ranks must make the call, with an `out`; they share
    images and samples, and rank 0 writes. Raises ValueError, ImportError or OSError, in one line
    and before anything is computed, for images of another shape than the model's, fewer than two of
    them, an extractor that can't be used, options out of range, and an `out` that holds another
    evaluation's results; FloatingPointError where the model gives NaN."""
    with ranks.together():
        task = Task(
            model, data, train, out, n=n, images=images, reference=reference, steps=steps,
            spacing=spacing, terms=terms, curve=curve, seed=seed, extractor=extractor,
            weights=weights, sampler=sampler, eta=eta, clip=clip, resize=resize,
            batch_size=batch_size, cache=cache, precision=precision, engine=engine,
            progress=progress,
        )  # fmt: skip
    ranks.agree("must evaluate the same", about=task.results.about, parts=task.facts)
    results = task.results
    with contextlib.ExitStack() as stack:
        with ranks.together():
            if ranks.place()[0] == 0:
                stack.enter_context(results.locked())
                results.plan(task.facts)
        for name in task.facts:
            if ranks.from_first(results.content(name)) is None:
                task.compute(name)
        results.parts = ranks.from_first(results.parts)
        found = Evaluation.of(results)
        with ranks.together():
            if ranks.place()[0] == 0:
                found.write()
    return found
