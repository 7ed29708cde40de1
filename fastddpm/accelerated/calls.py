"""Chains of GroupNorm, SiLU and convolution that are calls within a module's forward,
conv(silu(norm(x))), found by torch.fx.

Tracing runs a forward once and keeps what it saw, so it is right only for one that does the same in
every call. Traced are therefore forwards of straight code alone: no branch, loop, nested function
or attribute but layers, tensors' own and torch's functions."""

from __future__ import annotations

import dis
import inspect
from types import CodeType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastddpm.accelerated.layers import chain, run
from fastddpm.accelerated.likeness import is_norm, is_silu
from fastddpm.accelerated.state import StandIn

_IDLE = (nn.Dropout, nn.Identity)
# What a traced forward may call: no random numbers, no modes, nothing in place.
_FUNCTIONS = frozenset(
    (F.silu, F.relu, F.gelu, F.interpolate, F.avg_pool2d, F.pad, torch.cat, torch.sigmoid,
     torch.add, torch.mul, torch.flatten, torch.chunk, torch.split)
)  # fmt: skip
_METHODS = frozenset(
    ("view", "reshape", "flatten", "chunk", "split", "unsqueeze", "squeeze", "permute", "transpose",
     "float", "to", "type", "contiguous", "sigmoid", "add", "mul", "mean", "shape", "dtype",
     "expand")
)  # fmt: skip


class Calls(StandIn):
    """A forward with chains in its code."""

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self._graph: Any = None
        self._parts: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_graph": None, "_parts": None}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.steps_aside():
            return self.own(*args, **kwargs)
        parts = (type(self.module).forward, *self.module.modules())
        if self._parts != parts:
            self._graph, self._parts = fused(self.module), parts
        return self.own(*args, **kwargs) if self._graph is None else self._graph(*args, **kwargs)


class Chain(nn.Module):
    """Layers that a graph calls as one."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = layers  # a tuple, so that they are parts of the network alone

    def forward(self, x: Tensor) -> Any:
        return run(self.layers, x)


def fused(module: nn.Module) -> fx.GraphModule | None:
    """The module's forward with its chains as one call each; None where there are none, or where
    `untraceable` says why."""
    if untraceable(module) is not None:
        return None
    try:
        graph = _Tracer().trace(module)
    except Exception:  # torch.fx's own and whatever a Proxy meets in a forward
        return None
    parts = dict(module.named_modules())
    added: dict[str, nn.Module] = {}
    for node in list(graph.nodes):
        layers, last = _chain_from(node, parts)
        if last is None:
            continue
        name = f"chain_{len(added)}"
        added[name] = Chain(*layers)
        with graph.inserting_before(last):
            one = graph.call_module(name, node.args)
        last.replace_all_uses_with(one)
        for dead in (last, *_between(node, last)):
            graph.erase_node(dead)
    if not added:
        return None
    root = nn.Module()
    for name, part in {**dict(module.named_children()), **added}.items():
        root.add_module(name, part)
    return fx.GraphModule(root, graph)


def untraceable(module: nn.Module) -> str | None:
    """Why a module's forward is not traced, or None."""
    forward = type(module).forward
    if not isinstance(forward, FunctionType):
        return "its forward is no plain function"
    if module._parameters or module._buffers:
        return "its forward has tensors of its own"  # a graph would keep them
    code = forward.__code__
    if code.co_freevars or any(isinstance(c, CodeType) for c in code.co_consts):
        return "its forward has functions in it"
    kinds = {p.kind for p in inspect.signature(forward).parameters.values()}
    if kinds - {inspect.Parameter.POSITIONAL_OR_KEYWORD} or forward.__defaults__:
        return "its forward has optional arguments"
    for step in dis.get_instructions(code):
        if "JUMP" in step.opname or "FOR_ITER" in step.opname or step.opname.startswith("STORE_A"):
            return "its forward branches, loops or sets attributes"
        if step.opname in ("STORE_SUBSCR", "DELETE_SUBSCR", "STORE_GLOBAL", "IMPORT_NAME"):
            return "its forward writes into what it is given"
        if step.opname.startswith("INPLACE") or (
            step.opname == "BINARY_OP" and "=" in step.argrepr
        ):
            return "its forward works in place"
        if step.opname == "LOAD_GLOBAL":
            value = forward.__globals__.get(step.argval)
            if not any(value is each for each in (torch, F, nn)) and not _is_allowed(value):
                return f"its forward uses {step.argval}"
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            name = step.argval
            own = name in module.__dict__ or any(
                name in vars(kind) for kind in type(module).__mro__ if kind is not nn.Module
            )
            if name not in module._modules and (own or not (name in _METHODS or _of_torch(name))):
                return f"its forward uses {name}"
    return None


def _is_allowed(value: Any) -> bool:
    try:
        return value in _FUNCTIONS
    except TypeError:
        return False


def _of_torch(name: str) -> bool:
    if name in ("nn", "functional"):
        return True
    return any(_is_allowed(getattr(place, name, None)) for place in (torch, F))


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _chain_from(node: fx.Node, parts: dict[str, Any]) -> tuple[list[Any], fx.Node | None]:
    """The layers from a norm's call on that are one op, and the last one's call."""
    norm = _called(node, parts)
    if norm is None or not is_norm(norm):
        return [], None
    layers, at = [norm], node
    while len(at.users) == 1:
        at = next(iter(at.users))
        silu = len(layers) == 1 and at.op == "call_function" and at.target is F.silu
        layer = nn.SiLU() if silu and _of_one(at, inplace=True) else _called(at, parts)
        if layer is None:
            break
        layers.append(layer)
        if chain(layers):
            return layers, at
        if not (len(layers) == 2 and is_silu(layer)) and type(layer) not in _IDLE:
            break
    return [], None


def _between(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    """The calls before the last one, from behind, the first included."""
    found: list[fx.Node] = []
    at: Any = last.args[0]
    while at is not first:
        found.append(at)
        at = at.args[0]
    return [*found, first]


def _called(node: fx.Node, parts: dict[str, Any]) -> Any:
    if node.op != "call_module" or not _of_one(node):
        return None
    return parts.get(str(node.target))


def _of_one(node: fx.Node, inplace: bool = False) -> bool:
    """Whether it is a call of one tensor and nothing else."""
    extra = {} if not inplace else {k: v for k, v in node.kwargs.items() if k != "inplace" or v}
    return len(node.args) == 1 and not (extra if inplace else node.kwargs)
