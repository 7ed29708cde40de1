"""Whether a network is still what it was when it was accelerated: its parts, their hooks and the
numbers that they compute by. Tensors are not asked: those are read anew in every call."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from fastddpm.unet.parts import OWN

_PLAIN = frozenset((bool, int, float, str, type(None)))
# Modes, which are read in every call; and what holds our own parts.
_MODES = frozenset(("training", "use_checkpoint", "gradient_checkpointing", "forward", "undo",
                    "report"))  # fmt: skip
_CHECKPOINTING = ("use_checkpoint", "gradient_checkpointing")


class StandIn:
    """What stands for the `forward` of a module, in its instance's __dict__: the mark of all that
    accelerate puts into a network. Called with what the module is called with."""

    def __init__(self, module: nn.Module):
        self.module, self.active = module, True

    def put(self) -> None:
        self.module.__dict__["forward"] = self
        self.module.__dict__[_REPLICATE] = Replicas(self.module)

    def steps_aside(self) -> bool:
        """Whether a call is the module's own in any case: after `take_out`, where another wrapped
        what stands here, and where something traces or transforms what runs."""
        return not self.active or watched()

    def own(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        return type(self.module).forward(self.module, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.module).forward.__get__(self.module))


_REPLICATE = "_replicate_for_data_parallel"


class Replicas:
    """DataParallel's copies of a module on other GPUs, with the module's own forward: what stands
    for it is the module's alone, and would compute by its parameters."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self) -> nn.Module:
        replica: nn.Module = type(self.module)._replicate_for_data_parallel(self.module)
        for name in ("forward", _REPLICATE):
            replica.__dict__.pop(name, None)
        return replica


def take_out(module: nn.Module) -> None:
    """Give a module its own forward back."""
    have = module.__dict__
    if isinstance(have.get("forward"), StandIn):
        del have["forward"]
    if isinstance(have.get(_REPLICATE), Replicas):
        del have[_REPLICATE]


def altered(module: nn.Module) -> str | None:
    """What makes a call of the module more than its class's forward or what stands for it here, or
    None."""
    have = module.__dict__
    for name in OWN & have.keys():
        if name != "forward" or not isinstance(have[name], StandIn):
            return f"has a {name} that is not its class's"
    if module._forward_hooks or module._forward_pre_hooks:
        return "has a forward hook"
    if module._backward_hooks or module._backward_pre_hooks:
        return "has a backward hook"
    if "parametrizations" in module._modules:
        return "has a parametrisation"
    return None


Fingerprint = tuple[tuple[Any, ...], ...]


def fingerprint(modules: Sequence[nn.Module]) -> Fingerprint | None:
    """What the modules, all but the first, compute by beside tensors and modes; of the first what
    it holds. None where one has a hook or a forward that is not its class's."""
    found: list[tuple[Any, ...]] = []
    for i, module in enumerate(modules):
        if i and altered(module) is not None:
            return None
        found.append(settings(module))
    return tuple(found)


def settings(module: nn.Module) -> tuple[Any, ...]:
    """The module's class and what it computes by beside tensors and modes."""
    have: list[Any] = [type(module)]
    for name, value in module.__dict__.items():
        if name[0] == "_" or name in _MODES:
            continue
        kind = type(value)
        plain = kind in _PLAIN or (kind is tuple and _all_plain(value))
        have += (name, value if plain else kind)
    return tuple(have)


def _all_plain(values: tuple[Any, ...]) -> bool:
    return all(type(each) in _PLAIN for each in values)


def checkpointing(modules: Sequence[nn.Module]) -> bool:
    """Whether the network computes blocks again in the backward, by the flags that say so."""
    return any(module.__dict__.get(name) is True for module in modules for name in _CHECKPOINTING)


def watched() -> bool:
    """Whether something traces or transforms what runs, or hooks every module: each call is the
    module's own then."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch_module._has_any_global_hook()
    )
