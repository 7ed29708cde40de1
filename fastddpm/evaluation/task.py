"""The parts of an evaluation: what each is a function of, checked before any is computed, and how
it is computed."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from typing import Any, get_args

import numpy as np

from fastddpm import arguments, ranks
from fastddpm.diffusion import Diffusion
from fastddpm.engine import choose
from fastddpm.evaluation import distances, extractors
from fastddpm.evaluation.bound import bound
from fastddpm.evaluation.extractors import Extractor
from fastddpm.evaluation.images import Images, check_apart, opened
from fastddpm.evaluation.results import Results, versions
from fastddpm.evaluation.samples import samples
from fastddpm.figures import check_output
from fastddpm.host import callers_level
from fastddpm.options import check_choice, check_count, check_flag, check_integer, check_number
from fastddpm.schedule import Sampler
from fastddpm.shards import fingerprint
from fastddpm.unet import UNet
from fastddpm.wrapped import unwrap

SIDES = ("test", "train")
# Kinds of parts, which are named "bits_per_dim test", "distances test FID".
BITS, CURVE, DISTANCES = "bits_per_dim", "curve", "distances"
SHOWN = 64  # images of a curve
SAMPLES, FEATURES = "samples", "features"  # folders in that of the results
AUTO, NONE = "auto", "none"  # as an extractor
ONE = "needs at least 2 images: of one there is no standard error and no distance"


class Task:
    """What `evaluate` was asked for, checked.

    facts:   of each part by its name, in the order that they are computed in
    results: what is there, and is to be
    """

    def __init__(
        self, model: UNet, data: Any, train: Any, out: str | os.PathLike | None, **options: Any
    ):
        network = unwrap(model)
        if not isinstance(network, UNet):
            raise ValueError(
                "results name their model by its fingerprint: model must be a fastddpm.UNet; got "
                f"{type(model).__name__}"
            )
        if (classes := network.config.get("num_classes")) is not None:
            raise ValueError(
                f"the model has {classes} classes, and the images that it is judged by have no "
                "labels: fastddpm.bits_per_dim takes them, model_kwargs={'y': labels}"
            )
        self.model, self.options = network, options
        o = options
        device = arguments.device_of(network, None)
        process = Diffusion.of(network).respace(o["steps"], spacing=o["spacing"])
        _check(o, process.T)
        if ranks.place()[1] > 1 and out is None:
            raise ValueError("several ranks meet in a folder: out is needed")
        self.folder = None if out is None else check_output(out, kinds=("",))
        self.sampled, self.bound = (choose(o["engine"], network, device, p) for p in _precisions(o))
        self._drawn, self._generated = False, np.empty(0)
        self.images: dict[str, Images] = {}
        self.reference: dict[str, Images] = {}
        self.shown: dict[str, Images] = {}  # of CURVE
        for side, given in zip(SIDES, (data, train), strict=True):
            if given is not None:
                self._take(side, given)
        self.extractor = _extractor(o["extractor"], o["weights"], device, self.shape[0])
        about = {"model": fingerprint(network), "seed": o["seed"], "steps": process.T}
        about["clip"] = o["clip"]
        if not process.schedule.is_full:
            about["timesteps"] = process.schedule.timesteps.tolist()
        self.facts = self._facts()
        self.results = Results(self.folder, about)
        self.results.check(self.facts)

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.model.in_channels, *self.model.image_size)

    def _take(self, side: str, given: Any) -> None:
        """The images of a side, for bits/dim and to compare samples with."""
        o, name = self.options, "data" if side == "test" else side
        if self.folder is not None:
            check_apart(given, self.folder)
        data = opened(given, name, self.shape if o["resize"] else None, test=side == "test")
        everything = Images(data, name=name)
        if everything.shape != self.shape:
            raise ValueError(
                f"{everything.source} has images of shape {everything.shape}; the model takes "
                f"{self.shape}"
            )
        if len(everything) < 2:
            raise ValueError(f"{everything.source} has {len(everything)}: an evaluation {ONE}")
        kinds = ((self.images, "images"), (self.reference, "reference"), (self.shown, "curve"))
        for kept, option in kinds:
            taken = Images(data, o[option], name=name)
            kept[side] = everything if len(taken) == len(everything) else taken

    def _facts(self) -> dict[str, dict[str, Any]]:
        o, facts = self.options, {}
        for side, taken in self.images.items():
            facts[f"{BITS} {side}"] = {
                "data": taken.fingerprint(o["progress"]),
                "images": len(taken),
                "terms": o["terms"],
                "precision": self.bound[1],
            }
        digests = [part["data"] for part in facts.values()]
        if len(set(digests)) < len(digests):
            raise ValueError("train has the same images as data: give images that differ")
        if o["terms"] is not None:
            taken = self.shown["test"]
            facts[f"{CURVE} test"] = {
                "data": taken.fingerprint(o["progress"]),
                "images": len(taken),
                "precision": self.bound[1],
            }
        if self.extractor is None:
            return facts
        for side, taken in self.reference.items():
            facts[f"{DISTANCES} {side} {self.extractor.label}"] = {
                "data": taken.fingerprint(o["progress"]),
                "images": len(taken),
                "samples": o["n"],
                "sampler": [o["sampler"], o["eta"]],
                "precision": self.sampled[1],
                "extractor": [self.extractor.name, self.extractor.fingerprint],
            }
        return facts

    def compute(self, name: str) -> None:
        """Compute a part and keep it. A collective."""
        kind, side = name.split()[:2]
        content: Any = self._distances(side) if kind == DISTANCES else self._bound(kind, side)
        ran = self.sampled if kind == DISTANCES else self.bound
        with ranks.together():
            if ranks.place()[0] == 0:
                device = str(arguments.device_of(self.model, None))
                said = {"engine": ran[0].name, "device": device, **versions()}
                self.results.keep(name, said, content)

    def _bound(self, kind: str, side: str) -> dict[str, Any]:
        o = self.options
        images, terms = (self.images, o["terms"]) if kind == BITS else (self.shown, None)
        found = bound(
            self.model, images[side], seed=o["seed"], batch_size=o["batch_size"],
            steps=o["steps"], spacing=o["spacing"], terms=terms, clip=o["clip"],
            precision=self.bound[1], engine=o["engine"],
            folder=None if self.folder is None else self.folder / kind / side,
            progress=o["progress"],
        )  # fmt: skip
        return found.to_json()

    def _distances(self, side: str) -> list[dict[str, Any]]:
        """Of the samples, all of which are drawn first. Rank 0 compares them."""
        o, extractor = self.options, self.extractor
        assert extractor is not None
        if not self._drawn:
            drawn = samples(
                self.model, o["n"], seed=o["seed"], steps=o["steps"], spacing=o["spacing"],
                sampler=o["sampler"], eta=o["eta"], clip=o["clip"], batch_size=o["batch_size"],
                precision=self.sampled[1], engine=o["engine"], progress=o["progress"],
                folder=None if self.folder is None else self.folder / SAMPLES,
            )  # fmt: skip
            kept = None if self.folder is None else self.folder / FEATURES
            with ranks.together():
                if ranks.place()[0] == 0:
                    self._generated = distances.features(
                        drawn, extractor, cache=kept, progress=o["progress"]
                    )
            self._drawn = True
        with ranks.together():
            if ranks.place()[0] != 0:
                return []
            real = distances.features(
                self.reference[side], extractor, cache=o["cache"], progress=o["progress"]
            )
            found = distances.compare(
                self._generated, real, extractor, seed=o["seed"], progress=o["progress"]
            )
        return [dataclasses.asdict(figure) for figure in found]


def _check(o: dict[str, Any], T: int) -> None:
    """ValueError for an option out of range; numbers become Python's."""
    o["n"] = check_integer("n", o["n"], 2)
    o["seed"] = arguments.seed(o["seed"])
    for name in ("terms", "images", "reference", "curve", "batch_size"):
        if o[name] is not None:
            o[name] = check_count(name, o[name], T if name == "terms" else None)
    for name in ("images", "reference", "curve"):
        if o[name] == 1:
            raise ValueError(f"{name} is 1: an evaluation {ONE}")
    check_choice("sampler", o["sampler"], get_args(Sampler))
    o["eta"] = check_number("eta", o["eta"], lambda x: 0 <= x < math.inf, "at least 0")
    for name in ("clip", "resize", "progress"):
        o[name] = check_flag(name, o[name])


def _precisions(o: dict[str, Any]) -> tuple[str, str]:
    """Of samples, and of the bound."""
    return o["precision"], "fp32" if o["precision"] == "auto" else o["precision"]


def _extractor(name: str, weights: Any, device: Any, channels: int) -> Extractor | None:
    """The network of that name, ready; None where none is asked for, or "auto" finds none, which a
    warning says."""
    known = extractors.available()
    check_choice("extractor", name, (AUTO, NONE, *known))
    if name == NONE:
        return None
    why = {key: reason for key, reason in known.items() if reason is not None}
    if channels not in (1, 3):
        said = f"networks see images of 1 or 3 channels, and the model has {channels}"
        if name != AUTO:
            raise ValueError(f"extractor {name!r}: {said}")
        why = dict.fromkeys(known, said)
    if name == AUTO and weights is not None:
        name = extractors.INCEPTION
    if name == AUTO:
        order = sorted(known, key=lambda key: key != extractors.INCEPTION)
        name = next((key for key in order if key not in why), NONE)
    if name == NONE:
        reasons = "; ".join(f"{key}: {reason}" for key, reason in why.items())
        warnings.warn(
            f"samples are not compared with the data, no extractor can be used ({reasons})",
            stacklevel=callers_level(),
        )
        return None
    return extractors.extractor(name, weights=weights, device=device)
