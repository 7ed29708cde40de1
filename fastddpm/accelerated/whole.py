"""A whole network of another project, computed by our U-Net on its very parameters, and the trial
that finds out whether that is the same function."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastddpm.accelerated import rules, state
from fastddpm.accelerated.known import Known, empty_unet, image_size, sinusoids
from fastddpm.accelerated.plans import Plans, UNetPlan
from fastddpm.unet import UNet

LARGE = 30.0  # times, in the trial
TOLERANCE = 2e-4  # of the largest output, in the trial; another function errs by 1e-2 at least


class WholeNetwork(state.StandIn):
    """What stands for a network's `forward`: a UNet with the network's tensors in its place, which
    are looked up in every call.

    Calls that record no gradients, in float32 on the CPU and without dropout, are run by a plan
    (plans.py), whose packed copies of the weights take about twice the parameters' memory; it is
    made anew when those change, dropped by a step of training and by undo, and in no copy or
    pickle.

    Calls that ours does not take (another device than the CPU, another dtype than float32, other
    sizes or arguments), that something traces or transforms, and all calls of a network that was
    changed since, are the network's own."""

    def __init__(self, model: nn.Module, known: Known, only: Sequence[int] | None = None):
        """only: the one size (H, W) of images that the network takes, or None"""
        super().__init__(model)
        self.known = known
        modules = list(model.modules())
        self.was = self._settings(modules)
        self.only = only
        self.autocast: torch.dtype | None = None  # of results under autocast, when one was seen
        self._code: Any = state.code(modules)
        self.numbers = {name: i for i, (name, _) in enumerate(model.named_modules())}
        self.places = {
            f"{prefix}.{name}" if prefix else name: (i, name)
            for i, (prefix, part) in enumerate(model.named_modules())
            for name in part._parameters
        }
        self._unet: tuple[int, UNet] | None = None  # of the thread that made it
        self._used = sorted(_used(known))
        self._plans = Plans()

    @property
    def plan(self) -> UNetPlan | None:
        """What ran the last call, if that was one without gradients and had one."""
        return self._plans.plan

    def retire(self) -> None:
        super().retire()
        self._plans = Plans(self._plans.steady)

    def __getstate__(self) -> dict[str, Any]:
        """What is found anew where it is loaded stays behind: the classes may be others there."""
        plans = Plans(self._plans.steady)
        return {**self.__dict__, "_unet": None, "_code": None, "_plans": plans}

    def __deepcopy__(self, memo: dict[int, Any]) -> WholeNetwork:
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        made._code = self._code
        return made

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.steps_aside():
            return self.own(*args, **kwargs)
        call = self._taken(args, kwargs)
        if call is None:
            return self.own(*args, **kwargs)
        x, t, y, wrap = call
        modules = list(self.module.modules())
        gradient = False
        if torch.is_grad_enabled():
            trains = any(
                p.requires_grad for m in modules for p in m._parameters.values() if p is not None
            )
            gradient = trains or x.requires_grad or t.requires_grad
            if trains:
                self._plans.forget()
        small = x.dim() != 4 or x.numel() == 0 or not rules.whole(x, gradient)
        if small or self._unlike(x) or self.changed(modules):
            return self.own(*args, **kwargs)
        autocast = torch.is_autocast_enabled(x.device.type)
        if autocast and self.autocast is None:  # the network's own result says of which dtype it is
            result = self.own(*args, **kwargs)
            self.autocast = getattr(_tensor(result), "dtype", None)
            return result
        if not gradient and not autocast and (out := self._planned(modules, x, t, y)) is not None:
            return wrap(out)
        again = gradient and state.checkpointing(modules)
        unet = self._own_unet(again)
        if not self._bind(unet, modules, gradient) or not _fits(unet, unet.conv_in.weight, x, t, y):
            return self.own(*args, **kwargs)
        out = unet(x, t, y) if y is not None else unet(x, t)
        return wrap((out.to(self.autocast) if autocast else out).contiguous())

    def _planned(
        self, modules: Sequence[nn.Module], x: Tensor, t: Tensor, y: Tensor | None
    ) -> Tensor | None:
        """The output of a call without gradients by a plan, or None where the walk takes it."""
        unet = self._own_unet(False)
        drops = any(modules[i].training and modules[i].p for _, i in unet.__dict__["dropouts"])
        tensors = self._tensors(modules)
        if drops or tensors is None or not _fits(unet, tensors[0], x, t, y):
            return None
        sinusoids = unet.sinusoids(t)
        if sinusoids.requires_grad or sinusoids.dtype != torch.float32:
            return None
        bound = functools.partial(self._bound, unet, modules)
        plan = self._plans.of(tensors, (x.shape[2], x.shape[3]), bound)
        return None if plan is None else plan(x, sinusoids, y)

    def _bound(self, unet: UNet, modules: Sequence[nn.Module]) -> UNet | None:
        return unet if self._bind(unet, modules, False) else None

    def _unlike(self, x: Tensor) -> bool:
        return self.only is not None and tuple(x.shape[2:]) != tuple(self.only)

    def _own_unet(self, again: bool) -> UNet:
        """One for the call: the thread's, or where a backward computes blocks again from what is
        in it, the call's."""
        if again:
            return self._empty().checkpoint_blocks()
        thread, kept = threading.get_ident(), self._unet  # read once: others may put theirs there
        if kept is None or kept[0] != thread:
            self._unet = kept = thread, self._empty()
        return kept[1]

    def unet(self) -> UNet | None:
        """A UNet of the network's weights as they are now, on their device, for an engine; None
        for a network that was changed since or is not float32."""
        modules = list(self.module.modules())
        if self.changed(modules):
            return None
        with torch.no_grad():
            unet = self._empty()
            if not self._bind(unet, modules, False):
                return None
        unet.image_size = cast(Any, image_size(self.module, self.known.project))
        unet.__dict__["stands_in"] = True
        return unet

    def changed(self, modules: Sequence[nn.Module]) -> bool:
        """Whether the network is another than the one that was tried. One out of a pickle is tried
        again."""
        if self.was is None or self._settings(modules) != self.was:
            return True
        if self._code is None:
            if difference(self.module, self.known)[0] is not None:
                self.was = None
                return True
            self._code = state.code(modules)
        return not state.same_code(self._code, state.code(modules))

    def _settings(self, modules: Sequence[nn.Module]) -> Any:
        found = state.fingerprint(modules)
        return None if found is None else (*found, repr(getattr(modules[0], "config", None)))

    # ---- our U-Net ------------------------------------------------------------------------------

    def _empty(self) -> UNet:
        unet = empty_unet(self.known.options)
        if (own := sinusoids(self.module, self.known.project)) is not None:
            unet.__dict__["sinusoids"] = own
        unet.__dict__["dropouts"] = [
            (unet.get_submodule(name)._modules, self.numbers[theirs])
            for name, theirs in self.known.dropouts.items()
        ]
        unet.__dict__["slots"] = [
            (module._parameters, name, self.known.sources[f"{prefix}.{name}"])
            for prefix, module in unet.named_modules()
            for name in module._parameters
        ]
        return unet

    def _tensors(self, modules: Sequence[nn.Module]) -> list[Tensor] | None:
        """All tensors of the network that ours is made of; None where one is none it can take."""
        tensors: list[Tensor] = []
        for name in self._used:
            i, own = self.places[name]
            tensor = modules[i]._parameters.get(own)
            if tensor is None or type(tensor) not in _PLAIN or tensor.dtype != torch.float32:
                return None
            tensors.append(tensor)
        return tensors

    def _bind(self, unet: UNet, modules: Sequence[nn.Module], gradient: bool) -> bool:
        """Put the network's tensors and dropouts, of its modules, in the place of the U-Net's;
        False where they are none that it can take."""
        for parts, i in unet.__dict__["dropouts"]:
            parts["dropout"] = modules[i]
        tensors = self._tensors(modules)
        if tensors is None:
            return False
        named = dict(zip(self._used, tensors, strict=True))
        for parameters, name, source in unet.__dict__["slots"]:
            value = source.of([named[each] for each in source.names])
            if gradient and value.dim() == 4:
                # As the gradients' sums are made. Without gradients a packed copy is kept by the
                # tensor, which must then be the network's own.
                value = value.contiguous(memory_format=torch.channels_last)
            parameters[name] = value
        return len({x.device for p, name, _ in unet.__dict__["slots"] for x in (p[name],)}) == 1

    # ---- how it is called -----------------------------------------------------------------------

    def _taken(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor | None, Callable[[Tensor], Any]] | None:
        """(x, t, y, what makes the result of ours) of a call, or None for one that is not ours."""
        try:
            given = self.__signature__.bind(*args, **kwargs).arguments
        except TypeError:
            return None
        x_name, t_name, y_name = self.known.arguments
        x, t = given.pop(x_name, None), given.pop(t_name, None)
        y = given.pop(y_name, None) if y_name else None
        wrap: Callable[[Tensor], Any] = _itself
        if self.known.project == "diffusers":
            wrap = _in_a_dataclass if given.pop("return_dict", True) else _in_a_tuple
            if isinstance(x, Tensor) and x.dim() == 4:
                if not isinstance(t, Tensor):
                    t = torch.tensor([t], dtype=torch.long, device=x.device)
                if t.dim() <= 1 and t.numel() == 1:
                    t = t.to(x.device).reshape(1).expand(x.shape[0])
        if any(value is not None for value in given.values()) or not isinstance(x, Tensor):
            return None
        if not isinstance(t, Tensor) or not isinstance(y, (Tensor, type(None))):
            return None
        if self.known.project == "w86763777" and t.is_floating_point():
            return None
        return x, t, y, wrap


_PLAIN = (Tensor, nn.Parameter)


def _fits(unet: UNet, weight: Tensor, x: Tensor, t: Tensor, y: Tensor | None) -> bool:
    """Whether the U-Net with weights like this one takes these without a word; else the network
    says what it says to them."""
    same = {x.device, t.device, *(() if y is None else (y.device,))} == {weight.device}
    if not same or type(x) not in _PLAIN:
        return False
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        return False
    try:
        unet.check_input(x, t)
        unet.check_labels(y, len(x))
    except ValueError:
        return False
    return True


def _tensor(result: Any) -> Any:
    """What the network computed, of its result."""
    return result[0] if isinstance(result, tuple) else getattr(result, "sample", result)


def _itself(x: Tensor) -> Tensor:
    return x


def _in_a_tuple(x: Tensor) -> tuple[Tensor]:
    return (x,)


def _in_a_dataclass(x: Tensor) -> Any:
    from diffusers.models.unets.unet_2d import UNet2DOutput

    return UNet2DOutput(sample=x)


# ---- the trial -----------------------------------------------------------------------------------


def difference(model: nn.Module, known: Known) -> tuple[str | None, Sequence[int] | None]:
    """What our U-Net computes otherwise than the network, or None: both on a copy of it with random
    weights (a new network's last layers are zeros), in eval mode and in training, a dropout as a
    known function. And the one size of images that the network takes, if it takes no other."""
    theirs = nn.Module.to(copy.deepcopy(model), "cpu", torch.float32)  # no override with a warning
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if p.requires_grad or name in _used(known):
                spread = 0.3 if p.dim() < 2 else p[0].numel() ** -0.5
                noise = torch.randn(p.shape, generator=random, dtype=torch.float32, device="cpu")
                p.copy_(noise * spread + 0.3 * (p.dim() < 2))
    for name in known.dropouts.values():
        theirs.get_submodule(name).__dict__["forward"] = _dropped
    ours = WholeNetwork(theirs, known)
    unet = ours._empty()
    halvings = 2 ** (len(known.options["channel_mult"]) - 1)
    why, only, own = "", None, image_size(theirs, known.project)
    for size in ((2 * halvings, 2 * halvings), own or tuple(unet.image_size)):
        x = torch.randn(
            2, unet.in_channels, *size, generator=random, dtype=torch.float32, device="cpu"
        )
        t = torch.tensor([3, _last(known, theirs)], device="cpu")
        classes = known.options.get("num_classes")
        y = None if classes is None else torch.tensor([0, classes - 1], device="cpu")
        try:
            why = _compared(ours, unet, x, t, y)
            only = size if only is not None else None
            break
        except Exception as error:  # what a network of any kind says to a size that it can't take
            why, only = f"its forward can't be tried: {type(error).__name__}: {error}", size
    return why or None, only


def _used(known: Known) -> set[str]:
    return {name for source in known.sources.values() for name in source.names}


def _last(known: Known, model: nn.Module) -> int:
    if known.project == "w86763777":
        return len(cast(Any, model).time_embedding.timembedding[0].weight) - 1
    return 999


def _dropped(x: Tensor) -> Tensor:
    return 0.7 * x + 0.1


def _compared(ours: WholeNetwork, unet: UNet, x: Tensor, t: Tensor, y: Tensor | None) -> str:
    given = (x, t) if y is None else (x, t, y)
    last = [ours.module.get_parameter(each) for each in ours.known.sources["conv_out.weight"].names]
    with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        for mode in ("in eval mode", "in training mode", "for large values"):
            ours.module.train(mode == "in training mode")
            if mode == "for large values":  # which a limit of theirs would show in
                given = (LARGE * x, *given[1:])
                for p in last:
                    p.mul_(LARGE)
            if not ours._bind(unet, list(ours.module.modules()), False):
                return "its parameters are not plain tensors of one device"
            expected, found = ours.own(*given), unet(*given)
            if ours.known.project == "diffusers":
                if type(expected) is not type(_in_a_dataclass(found)):
                    return f"its result is a {type(expected).__name__}, and no UNet2DOutput"
                expected = expected.sample
            if type(expected) is not Tensor or expected.shape != found.shape:
                return f"its result is a {type(expected).__name__} of another shape or kind"
            error = float((found - expected).abs().max() / expected.abs().max())
            if not error <= TOLERANCE:
                return (
                    "its names are the family's, but its forward computes something else "
                    f"({mode}, by {error:.1g} of its largest output)"
                )
    return ""
