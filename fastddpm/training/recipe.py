"""The options of a training run, each with its type, its place in a recipe file and its word on the
command line, and how a preset, a file and a command line are laid over one another. Nothing is
built here.

A recipe file is TOML or JSON: sections [data], [model], [diffusion], [training] and [run], and
before them `preset`, whose values are those that the file does not give. A run writes all of its
own as recipe.json."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_args

from fastddpm.cli.arguments import integers, path, size
from fastddpm.data.files import RegularFile
from fastddpm.diffusion import Loss, Prediction
from fastddpm.loss_weights import GAMMA
from fastddpm.options import shown
from fastddpm.precision import Precision
from fastddpm.schedule import KINDS as SCHEDULES
from fastddpm.schedule import Schedule, Variance
from fastddpm.training.presets import preset
from fastddpm.training.run_folder import WRITER
from fastddpm.unet import UNet

LONGEST = 2**20  # bytes of a file
NUMBERS_OF_SCHEDULES = (
    "beta_start", "beta_end", "scaled", "beta", "s", "beta_max", "start", "end", "tau",
)  # fmt: skip
# What Diffusion.to_config leaves out where it is so.
PLAIN = {"loss_weight": "none", "min_snr_gamma": GAMMA, "rescale_timesteps": False}
OF_THE_DATA = ("image_size", "in_channels", "out_channels")  # of a model, which follow the images


class Kind(NamedTuple):
    """A type of values: what it is called, whether a file's value is one, a word as one."""

    what: str
    ok: Callable[[Any], bool]
    parse: Callable[[str], Any]
    choices: tuple[str, ...] | None = None


def _number(word: str) -> float:
    try:
        return int(word)
    except ValueError:
        return float(word)


def _integer_or_none(word: str) -> int | str:
    return word if word == "none" else int(word)


def _integers_or_none(word: str) -> list[int]:
    return [] if word == "none" else integers(word)


def _is_integers(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int for v in value)


def _is_path(value: Any) -> bool:
    try:
        return isinstance(value, str) and value != "" and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _choice(choices: tuple[str, ...]) -> Kind:
    what = f"one of {', '.join(map(repr, choices))}"
    return Kind(what, lambda value: isinstance(value, str) and value in choices, str, choices)


INTEGER = Kind("an integer", lambda value: type(value) is int, int)
NUMBER = Kind("a number", lambda value: type(value) in (int, float), _number)
FLAG = Kind("true or false", lambda value: type(value) is bool, bool)
INTEGERS = Kind("a list of integers", _is_integers, integers)
LEVELS = Kind("a list of integers", _is_integers, _integers_or_none)
SIZE = Kind(
    "an integer or [height, width]",
    lambda value: type(value) is int or (_is_integers(value) and len(value) == 2),
    size,
)
PATH = Kind("a path", _is_path, path)
HEADS = Kind(
    "an integer, or 'none'",
    lambda value: type(value) is int or value in (None, "none"),
    _integer_or_none,
)


class Option(NamedTuple):
    """section and name: its place in a file; word: that on the command line, None: `name`'s."""

    section: str
    name: str
    kind: Kind
    help: str
    default: Any = None  # where no preset has one
    word: str | None = None

    @property
    def flag(self) -> str:
        return "--" + (self.word or self.name.replace("_", "-"))

    @property
    def key(self) -> str:
        return f"{self.section}.{self.name}"

    def value(self, given: Any) -> Any:
        """What a file or a word gives, as the library takes it."""
        return None if given == "none" and self.kind is HEADS else given


OF_THE_PRESET = "(default: the preset's)"
OPTIONS = (
    Option("data", "path", PATH, "a folder of images, idx, npz or npy arrays, CIFAR-10's archive, "
           "a zip, an lmdb", word="data"),
    Option("data", "image_size", SIZE, "resize images of a folder to it: 64, or 64x48 for height x "
           f"width {OF_THE_PRESET}"),
    Option("data", "channels", INTEGER, "grey or colour (default: colour if any is)"),
    Option("data", "held_out", PATH, "images to judge the model by as it trains: a path like "
           "--data's, or `test`, the test split of data that have one (default: none)"),
    Option("model", "channels", INTEGER, f"channels of the first level {OF_THE_PRESET}",
           word="model-channels"),
    Option("model", "channel_mult", INTEGERS, "channels of each level, times those of the first: "
           f"1,2,2,2 {OF_THE_PRESET}"),
    Option("model", "num_res_blocks", INTEGER, f"residual blocks a level {OF_THE_PRESET}"),
    Option("model", "attention_levels", LEVELS, "levels with attention, 0 the widest: 1 or 1,2 or "
           f"none {OF_THE_PRESET}"),
    Option("model", "head_dim", HEADS, "channels an attention head; none: one head "
           f"{OF_THE_PRESET}"),
    Option("model", "num_heads", HEADS, "heads of every attention, in place of --head-dim "
           f"{OF_THE_PRESET}"),
    Option("model", "num_groups", INTEGER, f"groups of every GroupNorm {OF_THE_PRESET}"),
    Option("model", "norm_eps", NUMBER, f"epsilon of every GroupNorm {OF_THE_PRESET}"),
    Option("model", "dropout", NUMBER, f"before each block's second convolution {OF_THE_PRESET}"),
    Option("model", "downsample_padding", INTEGER, "zeros before the first row and column: 0 (the "
           "paper) or 1"),
    Option("model", "freq_shift", NUMBER, "of the time embedding: 1 (the paper) or 0"),
    Option("model", "flip_sin_to_cos", FLAG, "the time embedding's cosines come first"),
    Option("model", "scale_shift_norm", FLAG, "the time embedding scales and shifts each block's "
           "second norm"),
    Option("model", "resblock_updown", FLAG, "residual blocks halve and double, not convolutions"),
    Option("diffusion", "schedule", _choice(SCHEDULES), "betas (default: linear)", "linear"),
    Option("diffusion", "T", INTEGER, "steps of the chain (default: 1000)"),
    Option("diffusion", "beta_start", NUMBER, "of linear, quadratic and sigmoid_betas (default: "
           "1e-4)"),
    Option("diffusion", "beta_end", NUMBER, "of linear, quadratic and sigmoid_betas (default: "
           "0.02)"),
    Option("diffusion", "scaled", FLAG, "linear betas times 1000 / T"),
    Option("diffusion", "beta", NUMBER, "of constant (default: 0.01)"),
    Option("diffusion", "s", NUMBER, "of cosine (default: 0.008)", word="cosine-s"),
    Option("diffusion", "beta_max", NUMBER, "of cosine and sigmoid (default: 0.999)"),
    Option("diffusion", "start", NUMBER, "of sigmoid (default: -3)", word="sigmoid-start"),
    Option("diffusion", "end", NUMBER, "of sigmoid (default: 3)", word="sigmoid-end"),
    Option("diffusion", "tau", NUMBER, "of sigmoid (default: 1)", word="sigmoid-tau"),
    Option("diffusion", "prediction", _choice(get_args(Prediction)), "(default: eps)", "eps"),
    Option("diffusion", "variance", _choice(get_args(Variance)), OF_THE_PRESET),
    Option("diffusion", "loss", _choice(get_args(Loss)), "(default: simple)", "simple"),
    Option("diffusion", "loss_weight", _choice(("none", "min_snr")), "of the simple loss at each "
           "step (default: none)", PLAIN["loss_weight"]),
    Option("diffusion", "min_snr_gamma", NUMBER, "the largest SNR that min_snr counts (default: "
           "5)", PLAIN["min_snr_gamma"]),
    Option("diffusion", "rescale_timesteps", FLAG, "the model gets t * 1000 / T",
           PLAIN["rescale_timesteps"]),
    Option("training", "steps", INTEGER, f"optimiser steps in all {OF_THE_PRESET}"),
    Option("training", "batch_size", INTEGER, OF_THE_PRESET),
    Option("training", "accumulate", INTEGER, "pieces of a batch, computed one after the other for "
           "less memory (default: 1)", 1),
    Option("training", "checkpoint_blocks", FLAG, "compute each block again on the way back: less "
           "memory for a longer step, the same bits", False),
    Option("training", "lr", NUMBER, f"learning rate {OF_THE_PRESET}"),
    Option("training", "warmup", INTEGER, f"steps to reach it {OF_THE_PRESET}"),
    Option("training", "ema_decay", NUMBER, f"of the averaged weights {OF_THE_PRESET}"),
    Option("training", "ema_warmup", FLAG, f"average over the first steps with less "
           f"{OF_THE_PRESET}"),
    Option("training", "grad_clip", NUMBER, f"largest norm of the gradient {OF_THE_PRESET}"),
    Option("training", "flip", FLAG, f"mirror half of the images {OF_THE_PRESET}"),
    Option("training", "precision", _choice(get_args(Precision)), "(default: auto)", "auto"),
    Option("training", "seed", INTEGER, "(default: 0)", 0),
    Option("run", "save_every", INTEGER, "steps between checkpoints (default: 1000)", 1000),
    Option("run", "sample_every", INTEGER, "steps between sample grids, 0: none (default: 5000)",
           5000),
    Option("run", "evaluate_every", INTEGER, "steps between two looks at the held-out images "
           "(default: 5000)", 5000),
    Option("run", "evaluate_images", INTEGER, "how many of them, evenly spaced in their order "
           "(default: 256)", 256),
    Option("run", "evaluate_steps", INTEGER, "of the chain, whose bound in bits/dim is the number "
           "(default: 50)", 50),
    Option("run", "tensorboard", FLAG, "write TensorBoard's files, too, which needs "
           "fastddpm[tensorboard]", False),
)  # fmt: skip
BY_KEY = {option.key: option for option in OPTIONS}
SECTIONS = tuple(dict.fromkeys(option.section for option in OPTIONS))


@dataclass
class Recipe:
    """A value for every option, None where there is none; `origins` says which file gave it."""

    preset: str
    values: dict[str, Any]
    origins: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of_preset(cls, name: str) -> Recipe:
        """The preset's values, and the defaults of what it does not speak of."""
        chosen = preset(name)
        of_unet = inspect.signature(UNet).parameters
        values = {}
        for option in OPTIONS:
            value = option.default
            if option.section == "model":
                value = chosen.model.get(option.name, of_unet[option.name].default)
            elif hasattr(chosen, option.name):
                value = getattr(chosen, option.name)
            values[option.key] = list(value) if isinstance(value, tuple) else value
        values["data.image_size"] = chosen.model["image_size"]
        return cls(name, values)

    def lay_over(self, layer: Mapping[str, Any], origin: str | None = None) -> None:
        """Take what `layer` gives, of options by key. Another schedule does not keep the numbers of
        the one before; T it does."""
        kind = "diffusion.schedule"
        if layer.get(kind, self.values[kind]) != self.values[kind]:
            self.values |= {f"diffusion.{name}": None for name in NUMBERS_OF_SCHEDULES}
        self.values |= layer
        for key in layer:
            self.origins.pop(key, None)
            if origin is not None:
                self.origins[key] = origin

    def section(self, name: str) -> dict[str, Any]:
        return {o.name: self.values[o.key] for o in OPTIONS if o.section == name}

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def schedule(self) -> Schedule:
        """ValueError names a number that is not of this schedule."""
        kind = self["diffusion.schedule"]
        make = getattr(Schedule, kind)
        allowed = inspect.signature(make).parameters
        numbers = {
            name: value
            for name in ("T", *NUMBERS_OF_SCHEDULES)
            if (value := self[f"diffusion.{name}"]) is not None
        }
        for name in numbers:
            if name not in allowed:
                raise ValueError(
                    f"{name} is none of the numbers of the schedule {kind!r}, which are "
                    f"{', '.join(allowed)}"
                )
        return make(**numbers)

    def process(self) -> dict[str, Any]:
        """Diffusion's options but the schedule."""
        names = ("prediction", "variance", "loss", *PLAIN)
        process = {name: self[f"diffusion.{name}"] for name in names}
        return {k: None if v == "none" else v for k, v in process.items()}

    @contextlib.contextmanager
    def blamed(self) -> Iterator[None]:
        """A ValueError of the block that begins with an option's name says which file gave it."""
        try:
            yield
        except ValueError as error:
            first = re.match(r"\w+", str(error))
            for key, origin in self.origins.items():
                if first and BY_KEY[key].name == first[0]:
                    raise ValueError(f"{origin}: [{BY_KEY[key].section}] {error}") from None
            raise

    def to_json(self, version: str) -> dict[str, Any]:
        """What `read_recipe` reads back."""
        content: dict[str, Any] = {WRITER: version, "preset": self.preset}
        for name in SECTIONS:
            content[name] = {k: v for k, v in self.section(name).items() if v is not None}
        return content


# ---- files ---------------------------------------------------------------------------------------


class Given(NamedTuple):
    """What a file holds: its preset or None, and values by the options' keys.

    whole: a run wrote it, and it has a value for everything
    """

    preset: str | None
    values: dict[str, Any]
    whole: bool


def read_recipe(path: str | os.PathLike) -> Given:
    """A recipe file, .toml or .json; ValueError names the file and the key that can't be, and says
    what is allowed there.
    """
    path = Path(path)
    try:
        readers = {".toml": _toml, ".json": _json}
        if (suffix := path.suffix.lower()) not in readers:
            raise ValueError("a recipe is a .toml or a .json file")
        with RegularFile(path) as file:
            if file.length > LONGEST:
                raise ValueError(f"it is longer than {LONGEST} bytes")
            content = readers[suffix](file.read(file.length, 0).decode("utf-8-sig"))
        return _checked(content)
    except FileNotFoundError:
        raise FileNotFoundError(f"no such file: {path}") from None
    except RecursionError:
        raise ValueError(f"{path}: it is nested too deep") from None
    except (ValueError, OSError) as error:  # TOML's, JSON's and UTF-8's are ValueErrors
        raise ValueError(f"{path}: {error}") from None


def _toml(text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        at = re.search(r"\(at line (\d+)", str(error))
        lines = text.rstrip().splitlines() or [""]
        line = lines[int(at[1]) - 1 if at else -1].strip()  # else it is the last one
        twice = re.search("overwrite|twice", str(error))
        why = f"{line:.80} stands there twice" if twice else f"{line:.80} is no TOML"
        raise ValueError(f"{why}: {error}") from None


def _json(text: str) -> dict[str, Any]:
    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name} stands there twice")
        return dict(pairs)

    content = json.loads(text, object_pairs_hook=object_of)
    if not isinstance(content, dict):
        raise ValueError(f"it must be an object of {', '.join(SECTIONS)}; got {shown(content)}")
    return content


def _checked(content: dict[str, Any]) -> Given:
    named, values = None, {}
    for section, options in content.items():
        if section in ("preset", WRITER):
            if not isinstance(options, str):
                raise ValueError(f"{section} must be a name in quotes; got {shown(options)}")
            if section == "preset":
                preset(named := options)
            continue
        if section not in SECTIONS:
            places = [f"[{o.section}]" for o in OPTIONS if o.name == section]
            raise ValueError(
                f"{shown(section)} is no section; a recipe has preset, "
                f"{', '.join(f'[{s}]' for s in SECTIONS)}"
                + (f", and {section} stands in {' or '.join(places)}" if places else "")
            )
        if not isinstance(options, dict):
            raise ValueError(f"{section} must be a section [{section}]; got {shown(options)}")
        for name, value in options.items():
            option = BY_KEY.get(f"{section}.{name}")
            if option is None:
                raise ValueError(_unknown(section, name))
            if not option.kind.ok(value):
                raise ValueError(
                    f"[{section}] {name} must be {option.kind.what}; got {shown(value)}"
                )
            values[option.key] = option.value(value)
    return Given(named, values, WRITER in content)


def _unknown(section: str, name: str) -> str:
    places = [f"[{o.section}]" for o in OPTIONS if o.name == name]
    if section == "model" and name in OF_THE_DATA:
        more = "; the images have it: [data] image_size and channels choose"
    elif section == "model" and name == "num_classes":
        more = "; data have no labels here: Trainer.step(x0, y) trains a model with classes"
    else:
        more = f"; {name} stands in {' or '.join(places)}" if places else ""
    allowed = ", ".join(o.name for o in OPTIONS if o.section == section)
    return f"[{section}] has no {shown(name)}{more}; it may have {allowed}"
