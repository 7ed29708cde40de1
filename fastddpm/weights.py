"""Weights on their way from files into a model: names and shapes first, from the files' headers;
memory is taken, and values are read, only when all of them fit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from fastddpm.checkpoint import check_weights, last_state_dict, load_weights, read_weights
from fastddpm.memory import check_fits

Tensors = dict[str, torch.Tensor]
Module = TypeVar("Module", bound=torch.nn.Module)


def load(
    make: Callable[[Tensors], Module],
    files: Sequence[str | os.PathLike],
    *,
    convert: Callable[[Tensors], Tensors] = dict,
    allow_pickle: bool = False,
    pick: Callable[[Any], Tensors] = last_state_dict,
    source: str | os.PathLike,
) -> Module:
    """The model of `make`, float32 on the CPU, with the weights that are spread over `files`.

    convert: from the files' names and shapes to the model's; given meta tensors first, and the
             real ones when those fit
    make:    the model for the converted weights; called with meta tensors, on the meta device, so
             that a network that its weights file does not hold costs nothing
    pick:    which weights are meant of what a file holds, see `read_weights`

    No random numbers are drawn. Raises FileNotFoundError or ValueError naming what is wrong: a key
    that is missing, unknown, there twice or of another shape, or a model beyond this machine's
    memory."""

    def weights(shapes_only: bool) -> Tensors:
        merged: Tensors = {}
        for path in files:
            part = read_weights(path, allow_pickle=allow_pickle, shapes_only=shapes_only, pick=pick)
            merged = merge(merged, part, path)
        return convert(merged)

    shapes = weights(shapes_only=True)
    with torch.inference_mode(False), torch.no_grad():  # whatever the caller is in
        with torch.device("meta"):
            model = make(shapes).to(torch.float32)
        own = model.state_dict()
        check_weights(own, shapes, source)
        check_fits(f"the model of {source}", 4 * sum(tensor.numel() for tensor in own.values()))
        model.to_empty(device="cpu")
        load_weights(model, weights(shapes_only=False), source)
    return model


def merge(first: Tensors, second: Tensors, source: str | os.PathLike) -> Tensors:
    """Both; ValueError names a key that both have."""
    if twice := sorted(first.keys() & second.keys()):
        raise ValueError(f"{source} has the key {twice[0]}, which another file has too")
    return {**first, **second}


def rename(weights: Tensors, name_of: Callable[[str], str], source: str | os.PathLike) -> Tensors:
    """The weights under the names that `name_of` makes of theirs; ValueError names two that become
    one.
    """
    renamed: dict[str, str] = {}
    for name in weights:
        if (other := renamed.setdefault(name_of(name), name)) != name:
            raise ValueError(f"{source} has both {other} and {name}, which are one here")
    return {new: weights[name] for new, name in renamed.items()}
