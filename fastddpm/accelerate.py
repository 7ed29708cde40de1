"""One line for a network that stays what it is: its forward by our blocks where it is known, its
layers by our ops where they are faster."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fastddpm.accelerated import layers, likeness, rules
from fastddpm.accelerated.calls import Calls, Chain, fused, untraceable
from fastddpm.accelerated.known import known, places
from fastddpm.accelerated.layers import Alike, Convolution, Layers, is_convolution
from fastddpm.accelerated.state import StandIn, altered, take_out
from fastddpm.accelerated.whole import WholeNetwork, difference
from fastddpm.host import callers_level
from fastddpm.integrations import lucidrains
from fastddpm.networks import check_is_network
from fastddpm.options import shown
from fastddpm.unet import UNet

_FORWARD = "has a forward that is not its class's"
_NAMES = ("undo", "report")  # what a model gets beside its own attributes


def accelerate(model: Any) -> Any:
    """The model itself, faster, in place; `.undo()` takes it back, `.report()` says what was done.

    A network of diffusers' UNet2DModel family, the PyTorch port of DDPM, w86763777/pytorch-ddpm,
    tqch/ddpm-torch or OpenAI's UNetModel, found by its tensors' names anywhere in the model and
    tried against ours on random weights, is computed by our U-Net's blocks on its own parameters,
    and `fastddpm.sample` runs it by the engines of a UNet (in float32 unless told otherwise). Its
    calls that record no gradients are run by such an engine's plan, which holds packed copies of
    the weights, about twice their memory, that are made anew where any value has changed: at once
    for the first weights, later or after a step of training (which frees them) in the eighth call
    of the same; `.undo()` frees them, and `.report()` says how much they take. Of any other network
    the 3x3 convolutions are ours where those are the faster ones by shape, with the GroupNorm and
    SiLU before them. A GaussianDiffusion of denoising_diffusion_pytorch, the model itself or within
    it, gets fused steps and a fused loss, too: see `fastddpm.integrations.lucidrains`. All else is
    left as it is, and so are all calls that were not measured: on a GPU, in another dtype than
    float32.

    Parameters, buffers, state_dict, hooks of the model, its class and its signature stay; results
    are float32's to 1e-5 of the largest. A layer that is changed later, by a hook, say, or a call
    that torch.compile traces is computed as it was before. Copies and pickles of the model are
    accelerated, too, and need this package. Where nothing is replaced a warning says so.

    Raises TypeError for what is no torch.nn.Module, ValueError for a pipeline or a scheduler."""
    if not isinstance(model, nn.Module):
        if not isinstance(model, type):
            check_is_network(model)
        parts = [
            f".{n}" for n in ("model", "ema") if isinstance(getattr(model, n, None), nn.Module)
        ]
        has = f", such as its {' and its '.join(parts)}" if parts else ""
        raise TypeError(f"accelerate takes a torch.nn.Module{has}; got {shown(model)}")
    with torch.inference_mode(False):  # what is kept takes part in steps of training
        return _accelerated(undo(model))


def _accelerated(model: nn.Module) -> nn.Module:
    done = Accelerated(model)
    if why := _unready(model):
        done.left["the model"] = why
    else:
        _whole_networks(done)
        _layers(done)
        _processes(done)
    model.__dict__["_fastddpm"] = done
    for name in _NAMES:
        if not _has(model, name) or lucidrains.report(model):  # whose class has both
            model.__dict__[name] = getattr(done, name)
    if not done.replaced:
        what = "; ".join(f"{name or 'the model'} {why}" for name, why in done.left.items())
        warnings.warn(
            f"accelerate replaced nothing in a {type(model).__name__}"
            + (f": {what:.400}" if what else ": it has no layer that ours are faster for"),
            stacklevel=callers_level(),
        )
    return model


def _unready(model: nn.Module) -> str | None:
    """Why nothing of a model can be looked at, or None."""
    if isinstance(model, torch.jit.ScriptModule):
        return "is compiled by torch.jit: give the network that it was made of"
    if any(is_lazy(p) for p in model.parameters()):
        return "has lazy layers, which get their parameters in the first call: call it before"
    if any(p.is_meta for p in model.parameters()):
        return "has parameters on the meta device, whose values are to come"
    return None


def _has(model: nn.Module, name: str) -> bool:
    """Whether the model has an attribute of that name, none of which is asked for."""
    held = (vars(model), model._parameters, model._buffers, model._modules)
    return any(name in vars(kind) for kind in type(model).__mro__) or any(name in x for x in held)


def undo(model: nn.Module) -> nn.Module:
    """Take all that `accelerate` put into the model out again; returns the model."""
    for module in model.modules():
        have = module.__dict__
        take_out(module)
        lucidrains.undo(module)
        for name in _NAMES:
            if isinstance(getattr(have.get(name), "__self__", None), Accelerated):
                del have[name]
        done = have.pop("_fastddpm", None)
        for stands in () if done is None else done.stands:
            stands.retire()
    return model


def report(model: nn.Module) -> Accelerated:
    """What `accelerate` did to the model; ValueError for one that it was not given."""
    done = model.__dict__.get("_fastddpm")
    if not isinstance(done, Accelerated):
        raise ValueError(f"accelerate was not called with this {type(model).__name__}")
    return done


class Accelerated:
    """What was done to a model. replaced: what stands for the forward of each part, by the part's
    name ("" for the model itself);  left: why the others that might have been are not."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.replaced: dict[str, str] = {}
        self.left: dict[str, str] = {}
        self.stands: list[StandIn] = []

    def put(self, name: str, stands: StandIn, what: str) -> None:
        stands.put()
        self.stands.append(stands)
        self.replaced[name] = what

    @property
    def plan_bytes(self) -> int:
        """Memory of all copies of weights that are kept for calls without gradients, now."""
        whole = [stands for stands in self.stands if isinstance(stands, WholeNetwork)]
        return sum(each.plan.bytes for each in whole if each.plan is not None)

    def undo(self) -> nn.Module:
        return undo(self.model)

    def report(self) -> Accelerated:
        return self

    def __str__(self) -> str:
        lines = []
        for title, parts in (("replaced", self.replaced), ("left", self.left)):
            by_reason: dict[str, list[str]] = {}
            for name, why in parts.items():
                by_reason.setdefault(why, []).append(name or "the model")
            lines.append(f"{title}: {len(parts)}")
            lines += [f"  {', '.join(names)}: {why}" for why, names in by_reason.items()]
        lines.append(f"plans: {self.plan_bytes / 2**20:.0f} MiB of weights' copies now")
        return "\n".join(lines)


def _whole_networks(done: Accelerated) -> None:
    for prefix, project in places(done.model).items():
        module = done.model.get_submodule(prefix)
        if isinstance(module, UNet):
            continue
        found, why = _recognised(module, project)
        if found is None:
            done.left[prefix] = why
        else:
            what = f"{found.known.said}'s network, by the blocks of fastddpm.UNet"
            done.put(prefix, found, f"{what}; without gradients by a plan, of packed copies")


def _processes(done: Accelerated) -> None:
    """Fuse the steps of lucidrains' processes, around networks that are done."""
    for name, module in list(done.model.named_modules()):
        if not lucidrains.is_process(module):
            continue
        try:
            lucidrains.accelerate(module)
        except ValueError as error:
            done.left[name] = str(error)
            continue
        found = lucidrains.report(module)
        steps = [step for step, what in found.items() if what == "replaced"]
        done.replaced[name] = f"{', '.join(steps)} of denoising_diffusion_pytorch, fused"
        at = f"{name}." if name else ""
        done.left |= {at + step: why for step, why in found.items() if step not in steps}


def _recognised(module: nn.Module, project: str) -> tuple[WholeNetwork | None, str]:
    """What stands for a network of a known project, or why nothing can."""
    for name, part in module.named_modules():
        # Hooks of the network itself are called around what stands for its forward.
        what = altered(part) if name else _FORWARD if "forward" in module.__dict__ else None
        if what is not None:
            return None, f"is not replaced as a whole: {name or 'it'} {what}"
    why = ""
    try:
        for way in known(module, project):
            differs, only = difference(module, way)
            if differs is None:
                return WholeNetwork(module, way, only), ""
            why = differs
    except Exception as error:  # whatever names that mislead lead to
        why = str(error) if isinstance(error, ValueError) else repr(error)
    return None, f"is not replaced as a whole: {why}"


def _layers(done: Accelerated) -> None:
    """Replace what is faster in all that is not a whole network."""
    whole = [
        name
        for name, module in done.model.named_modules()
        if isinstance(module, UNet) or isinstance(module.__dict__.get("forward"), WholeNetwork)
    ]
    parts = {
        name: module
        for name, module in done.model.named_modules()
        if not any(not at or name == at or name.startswith(at + ".") for at in whole)
        and not isinstance(module, torch.jit.ScriptModule)
    }
    for name in whole:
        if isinstance(done.model.get_submodule(name), UNet):
            done.left[name] = "is a fastddpm.UNet already"
    reached: set[int] = set()  # norms in a chain
    for name, module in parts.items():
        if altered(module) is not None or isinstance(module.__dict__.get("forward"), StandIn):
            continue
        chained = _chained(module)
        if chained is None:
            continue
        stands, norms = chained
        done.put(name, stands, "GroupNorm, SiLU and 3x3 convolution as one op")
        reached |= norms
    for name, module in parts.items():
        alike = likeness.looks_like_convolution(module)
        if alike or isinstance(module, (nn.Conv2d, nn.GroupNorm)) or likeness.unlike(module):
            if what := altered(module):
                done.left[name] = what
            elif alike:
                _alike(done, name, module)
            elif isinstance(module, nn.Conv2d):
                _convolution(done, name, module)
            elif id(module) not in reached:
                done.left[name] = likeness.unlike(module) or _lone(module, parts)


def _chained(module: nn.Module) -> tuple[StandIn, set[int]] | None:
    """What runs the chains of a module, and the norms in them."""
    if type(module) is nn.Sequential:
        own = tuple(module)
        starts = [own[i] for i in range(len(own)) if layers.chain(own[i:])]
        return (Layers(module), set(map(id, starts))) if starts else None
    if not any(likeness.is_norm(child) for child in module.children()):
        return None
    graph = fused(module)
    if graph is None:
        return None
    norms = {id(part.layers[0]) for part in graph.children() if isinstance(part, Chain)}
    return Calls(module), norms


def _alike(done: Accelerated, name: str, layer: nn.Module) -> None:
    channels, outputs = cast(Any, layer).weight.shape[1::-1]
    if why := likeness.unlike_convolution(layer):
        done.left[name] = why
    elif min(channels, outputs) < rules.NARROWEST:
        done.left[name] = f"torch's is faster below {rules.NARROWEST} channels"
    else:
        done.put(name, Alike(layer), "3x3 convolution, in the calls where ours is faster")


def _convolution(done: Accelerated, name: str, conv: nn.Conv2d) -> None:
    if not is_convolution(conv):
        kind = type(conv).__name__
        done.left[name] = layers.not_ours(conv) or f"is a {kind}, not torch's own Conv2d"
    elif min(conv.in_channels, conv.out_channels) < rules.NARROWEST:
        done.left[name] = f"torch's is faster below {rules.NARROWEST} channels"
    else:
        done.put(name, Convolution(conv), "3x3 convolution, in the calls where ours is faster")


def _lone(norm: nn.Module, parts: dict[str, nn.Module]) -> str:
    """Why a norm is in no chain."""
    over = (p for p in parts.values() if any(norm is child for child in p.children()))
    parent = next(over, None)
    if parent is None:
        return "torch's is faster alone"
    if type(parent) is not nn.Sequential and (why := untraceable(parent)) is not None:
        return f"torch's is faster alone, and what follows it can't be traced: {why}"
    return "torch's is faster, as no SiLU and 3x3 convolution follow it in one way alone"
