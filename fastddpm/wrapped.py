"""Networks inside wrappers: DistributedDataParallel, DataParallel, torch.compile and the like. No
network of its own, and no diffusion."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

DEPTH = 4  # of `parts`: a lambda over an object with a wrapped network, and one to spare


def unwrap(model: Any) -> Any:
    """The network that a wrapper passes everything on to, through any number of them; `model`
    itself where there is none.

    A wrapper is torch.compile's module, a module that takes (*args) for its one part `module` and
    has no parameters beside that part's (DistributedDataParallel, DataParallel, AveragedModel and
    those of other projects), a network's own bound `forward`, or a functools.partial of nothing.
    A module that names its arguments may change what the network says: it is left alone, see
    `parts`.
    """
    while (inner := _inside(model)) is not None:
        model = inner
    return model


def _inside(model: Any) -> Any:
    if isinstance(model, functools.partial) and not model.args and not model.keywords:
        return model.func
    calls = ("forward", "_wrapped_call_impl", "_call_impl")  # __call__ is one of the latter
    if inspect.ismethod(model) and isinstance(model.__self__, nn.Module):
        return model.__self__ if model.__name__ in calls else None
    if not isinstance(model, nn.Module):
        return None
    compiled = getattr(model, "_orig_mod", None)
    if isinstance(compiled, nn.Module):
        return compiled
    inner = getattr(model, "module", None)
    if not isinstance(inner, nn.Module) or is_sharded(model) or not _passes_on(model):
        return None
    own = {id(p) for p in model.parameters()} - {id(p) for p in inner.parameters()}
    return inner if not own else None


def _passes_on(wrapper: nn.Module) -> bool:
    kinds = [p.kind for p in inspect.signature(wrapper.forward).parameters.values()]
    return inspect.Parameter.VAR_POSITIONAL in kinds


def is_sharded(model: nn.Module) -> bool:
    """True where this process holds but a part of each parameter (FSDP, tensor parallelism)."""
    wrapped = any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules())
    return wrapped or any(hasattr(p, "placements") for p in model.parameters())


def parts(model: Any) -> Iterator[Any]:
    """What a callable may call, itself first: the modules of a module, the attributes of an object,
    what a function refers to and what a partial holds, some levels deep."""
    seen: set[int] = set()

    def walk(part: Any, depth: int) -> Iterator[Any]:
        if id(part) in seen or depth > DEPTH:
            return
        seen.add(id(part))
        yield part
        for inner in _held(part):
            if isinstance(inner, nn.Module) or callable(inner):
                yield from walk(inner, depth + 1)

    return walk(model, 0)


def _held(part: Any) -> list[Any]:
    if isinstance(part, functools.partial):
        return [part.func, *part.args, *part.keywords.values()]
    if inspect.ismethod(part):
        return [part.__self__]
    if inspect.isfunction(part):
        try:
            referred = inspect.getclosurevars(part)
        except (TypeError, ValueError):  # a cell that is still empty
            return []
        return [*referred.nonlocals.values(), *referred.globals.values()]
    if isinstance(part, (type, torch.Tensor)) or inspect.isbuiltin(part):
        return []
    held = list(vars(part).values()) if hasattr(part, "__dict__") else []
    return [*part.modules(), *held] if isinstance(part, nn.Module) else held
