"""Which networks of other projects are our U-Net under other names: the options that make ours of a
network's names, shapes and settings, and how it is called. Whether ours then computes the same is
whole.py's to find out."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastddpm.accelerated.sources import Source, traced
from fastddpm.integrations import diffusers, openai_unet, port, tqch, w86763777
from fastddpm.integrations.containers import MARKS
from fastddpm.unet import UNet

PROJECTS: dict[str, Any] = {
    "diffusers": diffusers, "port": port, "w86763777": w86763777, "tqch": tqch,
    "openai": openai_unet,
}  # fmt: skip
_HEADS = ("num_heads", "heads", "n_heads")  # what an attention calls them


@dataclass(frozen=True)
class Known:
    """A network that may be computed as a UNet(**options) of the weights `sources`.

    dropouts: the name of each residual block's dropout by that of ours;  arguments: what forward
    calls x, t and y, the last None where it has none"""

    project: str
    options: dict[str, Any]
    sources: dict[str, Source]
    dropouts: dict[str, str]
    arguments: tuple[str, str, str | None]

    @property
    def said(self) -> str:
        return str(PROJECTS[self.project].PROJECT)


def places(model: nn.Module) -> dict[str, str]:
    """Where in a module networks of known projects stand by their tensors' names: the module's name
    -> the project."""
    names = {name for name, _ in model.named_parameters()}
    found: dict[str, str] = {}
    for project in PROJECTS:
        mark, *others = MARKS[project]
        for name in names:
            prefix = name[: len(name) - len(mark)]
            whole = name.endswith(mark) and (not prefix or prefix.endswith("."))
            if whole and all(prefix + each in names for each in others):
                found[prefix.removesuffix(".")] = project
    return found


def known(model: nn.Module, project: str) -> list[Known]:
    """How the network of a project may be one of ours, one way or, where no name or shape says
    which, two; ValueError with the reason why it is none."""
    reader = PROJECTS[project]
    weights = model.state_dict()
    if project == "diffusers":
        options = diffusers.unet_options(dict(getattr(model, "config", {})), "it")
    else:
        told, unsaid = reader.architecture(weights, "it", {})
        options = {**told, **unsaid, **_settings(model, project)}
        if options.get("head_dim"):
            options.pop("num_heads", None)
    for name in ("diffusion", "new_attention_order"):
        options.pop(name, None)
    # How the rows of OpenAI's q, k and v are ordered, which no tensor says.
    orders = [{"new_attention_order": new} for new in (False, True)]
    table = (w86763777.TABLE,) if project == "w86763777" else ()
    found = []
    for order in orders if project == "openai" else [{}]:
        full = {**options, **order}
        convert = functools.partial(reader.convert, source="it", options=full)
        sources = traced(weights, convert, kept=table)
        own = {**options, **_norms(model, sources), "dropout": 0.0}
        _check_names(own, sources)
        dropouts, arguments = _dropouts(model, sources), _arguments(model, own)
        found.append(Known(project, own, sources, dropouts, arguments))
    return found


def _settings(model: nn.Module, project: str) -> dict[str, Any]:
    """What a network of OpenAI's says of its heads by its modules."""
    if project != "openai":
        return {}
    heads, sizes = set(), set()
    for name, module in model.named_modules():
        qkv: Any = getattr(module, "qkv", None)
        number = next((n for n in (getattr(module, h, None) for h in _HEADS) if n), None)
        if isinstance(qkv, nn.Module) and name:
            if not isinstance(number, int):
                raise ValueError(f"{name} does not say its number of heads ({', '.join(_HEADS)})")
            heads.add(number)
            sizes.add(cast(Any, qkv).weight.shape[1] // number)
    if len(heads) == 1:
        return {"num_heads": heads.pop()}
    if len(sizes) == 1:
        return {"head_dim": sizes.pop()}
    raise ValueError(f"its attentions differ in heads ({sorted(heads)}) and in their sizes")


def _norms(model: nn.Module, sources: dict[str, Source]) -> dict[str, Any]:
    """The one epsilon, which hardly shows in a trial, and number of groups of all norms."""
    found = {}
    for name, source in sources.items():
        if ".norm" in f".{name}" and name.endswith(".weight"):
            layer = source.names[0].removesuffix(".weight")
            norm: Any = model.get_submodule(layer)
            found[layer] = float(norm.eps), int(norm.num_groups)
    first = next(iter(found.values()))
    if odd := [layer for layer, each in found.items() if each != first]:
        raise ValueError(f"{odd[0]} has (eps, num_groups) {found[odd[0]]}, others {first}")
    return {"norm_eps": first[0], "num_groups": first[1]}


def empty_unet(options: dict[str, Any]) -> UNet:
    """A UNet without memory. No random numbers are drawn."""
    with torch.device("meta"):
        return UNet(**options)


def _check_names(options: dict[str, Any], sources: dict[str, Source]) -> None:
    own = {name: tuple(x.shape) for name, x in empty_unet(options).state_dict().items()}
    if more := sorted(sources.keys() - own.keys()):
        raise ValueError(f"it has {more[0]}, which the family's networks don't")
    if missing := sorted(own.keys() - sources.keys()):
        raise ValueError(f"it has nothing that is our {missing[0]}")
    for name, shape in own.items():
        if sources[name].shape != shape:
            raise ValueError(f"{sources[name].names[0]} makes {sources[name].shape}, not {shape}")


def _dropouts(model: nn.Module, sources: dict[str, Source]) -> dict[str, str]:
    """The dropout within each residual block of theirs, by our block's name."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.dropout._DropoutNd)
    }
    found: dict[str, str] = {}
    for name, source in sources.items():
        block, second, _ = name.partition(".conv2.weight")
        if not second:
            continue
        first = sources[f"{block}.norm1.weight"].names[0].split(".")
        same = 0
        for a, b in zip(first, source.names[0].split("."), strict=False):
            if a != b:
                break
            same += 1
        prefix = ".".join(first[:same]) + "."
        inside = [each for each in layers if each.startswith(prefix)]
        if len(inside) > 1:
            raise ValueError(f"{prefix[:-1]} has several dropouts: {', '.join(inside)}")
        if inside:
            if type(layers[inside[0]]) is not nn.Dropout:
                raise ValueError(f"{inside[0]} is a {type(layers[inside[0]]).__name__}")
            found[block] = inside[0]
    others = [name for name in layers.keys() - found.values() if layers[name].p]
    if others:
        raise ValueError(f"{min(others)} drops outside of a residual block")
    return found


def _arguments(model: nn.Module, options: dict[str, Any]) -> tuple[str, str, str | None]:
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    labels = next((name for name in names[2:] if name in ("y", "class_labels")), None)
    if len(names) < 2 or (labels is None and options.get("num_classes")):
        raise ValueError(f"its forward takes ({', '.join(names)}), not x, t and what else it needs")
    return names[0], names[1], labels


def sinusoids(model: nn.Module, project: str) -> Callable[[Tensor], Tensor] | None:
    """The network's own sinusoids of steps, in our order; None where it does not hold them."""
    inside: Any = model
    if project == "diffusers":
        return lambda t: inside.time_proj(t)
    if project == "w86763777":

        def looked_up(t: Tensor) -> Tensor:
            rows = inside.time_embedding.timembedding[0](t)
            return torch.cat((rows[:, 0::2], rows[:, 1::2]), dim=1)

        return looked_up
    return None


def image_size(model: nn.Module, project: str) -> tuple[int, int] | None:
    """(H, W) of the images that the network itself says it is for, or None."""
    if project == "diffusers":
        size: Any = model.config.sample_size  # type: ignore[union-attr]
    else:
        size = getattr(model, "image_size", None) or getattr(model, "resolution", None)
    pair = (size, size) if type(size) is int else size
    if not isinstance(pair, (tuple, list)) or [type(side) for side in pair] != [int, int]:
        return None
    return pair[0], pair[1]
