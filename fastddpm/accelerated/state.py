"""Whether a network is still what it was when it was accelerated: its parts, their hooks and the
numbers that they compute by. Tensors are not asked: those are read anew in every call."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable, Sequence
from types import CodeType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from fastddpm.unet.parts import OWN

_PLAIN = frozenset((bool, int, float, str, type(None)))
# Of a module's attributes: torch's own; modes, which are read in every call; how blocks are
# computed again; and what holds our own parts.
_ELSEWHERE = frozenset((
    *nn.Module().__dict__, "use_checkpoint", "gradient_checkpointing", "forward", "undo", "report",
    "_gradient_checkpointing_func", "_compiled_call_impl", "_fastddpm",
    "_replicate_for_data_parallel",
))  # fmt: skip
_CHECKPOINTING = ("use_checkpoint", "gradient_checkpointing")


class StandIn:
    """What stands for the `forward` of a module, in its instance's __dict__: the mark of all that
    accelerate puts into a network. Called with what the module is called with."""

    def __init__(self, module: nn.Module):
        self.module, self.active = module, True

    def put(self) -> None:
        self.module.__dict__["forward"] = self
        self.module.__dict__[_REPLICATE] = Replicas(self.module)

    def retire(self) -> None:
        """As it is no longer there: a call is the module's own, and no memory is kept."""
        self.active = False

    def steps_aside(self) -> bool:
        """Whether a call is the module's own in any case: after `take_out`, where another wrapped
        what stands here, and where something traces or transforms what runs."""
        return not self.active or watched()

    def own(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        return type(self.module).forward(self.module, *args, **kwargs)

    @property
    def __code__(self) -> CodeType:
        """Of the forward that a tracer is to follow: the module's own."""
        code: CodeType = type(self.module).forward.__code__
        return code

    @property
    def __globals__(self) -> dict[str, Any]:
        raise AttributeError(
            "what fastddpm.accelerate put there can't be scripted: torch.jit.script takes a "
            "network after .undo()"
        )

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
    """The module's class and what it computes by beside parameters' values and modes: its
    attributes, private ones too, its buffers' values and the names of its parts."""
    have: list[Any] = [type(module), *module._modules]
    have += [name for name, p in module._parameters.items() if p is not None]
    for name, value in module.__dict__.items():
        if name not in _ELSEWHERE:
            have += (name, value if type(value) in _PLAIN else _seen(value))
    for name, buffer in module._buffers.items():
        if buffer is not None:
            have += (name, _Values(buffer))
    return tuple(have)


def _seen(value: Any) -> Any:
    """What shows whether a value is still the same: containers of plain ones may be changed in
    place, others are known by themselves."""
    kind = type(value)
    if kind is tuple and _PLAIN.issuperset(map(type, value)):
        return value
    if kind in (list, tuple, set, frozenset, dict):
        inside = value.items() if kind is dict else value
        return (kind, *(each if type(each) in _PLAIN else _seen(each) for each in inside))
    return _Values(value) if isinstance(value, Tensor) else _Itself(value)


class _Itself:
    """An object, equal to nothing but that very one."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Itself):
            return False
        a, b = self.value, other.value
        return a is b or (type(a) is MethodType and bool(a == b))

    __hash__ = None  # type: ignore[assignment]


class _Values:
    """A tensor's values as they are now."""

    def __init__(self, tensor: Tensor):
        with torch.inference_mode(False), torch.no_grad():
            self.values = tensor.detach().clone()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Values):
            return False
        a, b = self.values, other.values
        return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)

    __hash__ = None  # type: ignore[assignment]


def code(modules: Iterable[nn.Module]) -> list[Any]:
    """What the modules' classes hold now, methods and attributes: objects that are theirs until
    somebody replaces them for all of a class."""
    kinds = dict.fromkeys(kind for module in modules for kind in type(module).__mro__)
    found: list[Any] = []
    for kind in kinds:
        if kind is nn.Module:  # what calls a module
            found += (kind.__call__, kind._call_impl)
        elif kind is not object:
            found += [v for name, v in vars(kind).items() if name[:2] != "__" or name in _CALLED]
    return found


_CALLED = ("__call__", "__getattr__", "__getattribute__")


def same_code(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(map(operator.is_, one, other))


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
