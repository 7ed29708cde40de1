"""Training checkpoints: the sets of weights that a file holds, which network each is of, and the
choice between the averaged (EMA) and the raw ones. Nothing of how a network's layers are named.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch

from fastddpm.checkpoint import is_state_dict
from fastddpm.options import shown
from fastddpm.schedule import check_choice
from fastddpm.weights import Tensors, rename

Weights = Literal["ema", "raw"]

# Words in the names of a checkpoint's parts: ema_model, modelEMA, model_avg, net_model, ...
EMA = frozenset(("ema", "shadow", "averaged", "average", "avg", "swa", "polyak"))
RAW = frozenset(("model", "net", "network", "unet"))
COUNTER = "n_averaged"  # of torch's AveragedModel, beside its `module`
DEEPEST = 4  # of parts within parts
MOST_PARTS = 64

# Keys that only one project's network has; several, so that a file that lacks one is named by it.
MARKS = {
    "port": ("temb.dense.0.weight", "temb.dense.1.weight", "down.0.block.0.temb_proj.weight"),
    "w86763777": (
        "time_embedding.timembedding.1.weight", "time_embedding.timembedding.3.weight",
        "downblocks.0.temb_proj.1.weight",
    ),
    "tqch": ("in_conv.weight", "out_conv.2.weight", "middle.0.fc.weight"),
    "openai": ("time_embed.0.weight", "time_embed.2.weight", "input_blocks.0.0.weight"),
    "diffusers": ("time_embedding.linear_1.weight", "time_embedding.linear_2.weight"),
    "lucidrains": ("time_mlp.1.weight", "init_conv.weight"),
    "edm": ("map_layer0.weight", "map_layer1.weight"),
}  # fmt: skip
# DataParallel's, DistributedDataParallel's and torch.compile's, wherever they stand in a name.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod)\.")


@dataclass(frozen=True)
class Found:
    """A network's weights in a file."""

    project: str  # of MARKS
    weights: Tensors  # under its own names
    role: Weights | None  # None: the file does not say
    where: str  # its place in the file; "" for a file of nothing else
    beside: tuple[str, ...]  # the other keys of the same state dict
    average: str | None = None  # one of them that is of an average under other names
    one_of: int = 1  # of how many it was chosen

    @property
    def said(self) -> str:
        """What was taken, for people."""
        what = {"ema": "EMA weights", "raw": "raw weights", None: "the weights"}[self.role]
        return f"{what} ({self.where})" if self.where else what


def check_weights_choice(weights: Any) -> None:
    """ValueError unless it is one of Weights or None."""
    if weights is not None:
        check_choice("weights", weights, get_args(Weights))


def find(content: Any, source: str | os.PathLike, weights: Weights | None = None) -> Found:
    """The network in a file's content, a state dict or a dictionary or list of such.

    weights: "ema" or "raw"; None: the EMA's where there are some. Raises ValueError where those are
    not there, are several, or where no network is known."""
    check_weights_choice(weights)
    states, nameless = [], []
    for where, role, state in _parts(content):
        if state is None:
            nameless.append(where)
        else:
            states.append((where, role, state))
    if len(states) > MOST_PARTS:
        raise ValueError(f"{source} holds {len(states)} state dicts; {MOST_PARTS} are the most")
    if not states:
        parts = ", ".join(map(shown, content)) if isinstance(content, dict) else ""
        raise ValueError(
            f"{source} holds no state dict of tensors, nor one under a name such as model, "
            f"state_dict or ema{': its parts are ' + parts if parts else ''}"
        )
    found = [each for part in states for each in _networks(*part, source)]
    if not found:
        raise _unknown(states, source)
    ema = [each for each in found if each.role == "ema"]
    nameless += [where for where, role, _ in states if role == "ema" and not ema]
    nameless += [each.average for each in found if each.average is not None]
    raw = [each for each in found if each.role != "ema"]
    if len(raw) > 1:  # an average that carries a copy of its model
        raw = [each for each in raw if "online_model" not in each.where] or raw[:1]
    unsaid = len(raw) == 1 and raw[0].role is None and not ema
    if nameless and not ema and weights != "raw":
        raise ValueError(
            f"{source}: its EMA, {nameless[0]}, holds no network under the names of its layers, "
            "and is not read: pass weights='raw' for the other weights"
        )
    if weights == "ema" and not ema and not unsaid:
        raise ValueError(f"{source} holds no EMA weights, only {_places(raw)}")
    if weights == "raw" and not raw:
        raise ValueError(f"{source} holds EMA weights alone, {_places(ema)}")
    pool = (ema or raw) if weights is None else (raw if weights == "raw" else ema or raw)
    if len(pool) > 1:
        raise ValueError(
            f"{source} holds several networks, {_places(pool)}: save the one that is meant alone"
        )
    (one,) = pool
    return replace(one, one_of=len(ema) + len(raw))


def _parts(
    content: Any,
    where: str = "",
    role: Weights | None = None,
    depth: int = 0,
    seen: set[int] | None = None,
) -> Iterator[tuple[str, Weights | None, Tensors | None]]:
    """(place, role, state dict) of every one in a checkpoint; None for an average that is another
    thing, a list in the order of the model's parameters maybe. `seen` are the ids of dictionaries
    that were looked into, which a file may name often."""
    seen = set() if seen is None else seen
    if is_state_dict(content):
        yield where, role, content
    elif isinstance(content, (list, tuple)):
        # [model, optimizer, ..., EMA]: the first is the model's, the last the average's.
        places = [i for i, each in enumerate(content) if is_state_dict(each)]
        for i in dict.fromkeys((*places[:1], *places[-1:])):
            of: Weights | None = None if len(places) < 2 else "ema" if i == places[-1] else "raw"
            yield f"{where}[{i}]", of or role, content[i]
    elif isinstance(content, dict) and depth < DEEPEST and id(content) not in seen:
        seen.add(id(content))
        for name, part in content.items():
            place, words = f"{where}.{name}" if where else str(name), _words(str(name))
            if EMA.intersection(words):
                parts = list(_parts(part, place, "ema", depth + 1, seen))
                yield from parts or ([(place, "ema", None)] if _has_tensors(part) else [])
            elif RAW.intersection(words) or name == "state_dict":
                yield from _parts(part, place, role or "raw", depth + 1, seen)


def _words(name: str) -> list[str]:
    """The words of a name in small letters: of modelEMA_0 model, ema, 0."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]+", name)]


def _has_tensors(part: Any, depth: int = 0) -> bool:
    """Whether it is a container with tensors in it, some levels deep."""
    if isinstance(part, torch.Tensor):
        return depth > 0
    if not isinstance(part, (dict, list, tuple)) or depth > DEEPEST:
        return False
    inside = itertools.islice(part.values() if isinstance(part, dict) else part, MOST_PARTS)
    return any(_has_tensors(each, depth + 1) for each in inside)


def _networks(
    where: str, role: Weights | None, state: Tensors, source: str | os.PathLike
) -> Iterator[Found]:
    """The networks of a state dict, each under a prefix of its own or none."""
    state = rename(state, lambda name: _WRAPPERS.sub("", name), source)
    marked: dict[str, list[str]] = {}
    for name in state:
        for project, marks in MARKS.items():
            for mark in marks:
                if name == mark or name.endswith("." + mark):
                    marked.setdefault(name[: -len(mark)], []).append(project)
    parts: dict[str, Tensors] = {prefix: {} for prefix in marked}
    beside = []
    longest = sorted(marked, key=len, reverse=True)
    for name, tensor in state.items():
        prefix = next((each for each in longest if name.startswith(each)), None)
        if prefix is None or name == COUNTER:
            beside.append(name)
        else:
            parts[prefix][name[len(prefix) :]] = tensor
    averages = (name for name in beside if state[name].dim() and EMA.intersection(_words(name)))
    average = next(averages, None)
    for prefix, projects in marked.items():
        place = ".".join(filter(None, (where, prefix.removesuffix("."))))
        words = _words(prefix)
        of: Weights | None = "ema" if "ema" in words else "raw" if "online" in words else role
        project = max(projects, key=projects.count)
        yield Found(project, parts[prefix], of, place, tuple(beside), average)


def _places(found: Iterable[Found]) -> str:
    return ", ".join(each.where or "its state dict" for each in found)


def _unknown(states: list[Any], source: str | os.PathLike) -> ValueError:
    keys = ", ".join(shown(name) for name in list(states[0][2])[:3])
    return ValueError(
        f"{source} is no model of the PyTorch port of DDPM (down.*, temb.*), of "
        "w86763777/pytorch-ddpm (downblocks.*), of tqch/ddpm-torch (downsamples.*) nor OpenAI's "
        f"UNetModel (input_blocks.*); its keys are {keys}, ..."
    )
