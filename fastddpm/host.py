"""The process that hosts us is not ours: what it has set (grad mode, autocast, modules' modes, the
random state) changes no result of ours and is as it was afterwards. No models here.

Default dtype and default device have no guard here: all that we make says its own."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from fastddpm.wrapped import parts

DEVICES = ("cpu", "cuda", "mps", "xpu")  # that may have an autocast of their own
# More threads than so many may be more than the system gives, which ends the process in OpenMP.
MOST_THREADS = max(256, 4 * (os.cpu_count() or 1))


@contextlib.contextmanager
def own_state(*, grad: bool = False) -> Iterator[None]:
    """A block, or as a decorator a function, that runs in a state of our own, whatever its caller's
    is: gradients on or off, neither inference mode nor autocast. Only the calling thread sees it.

    Raises ValueError where tensors have no values (a FakeTensorMode), inside a transform of
    torch.func, or where threads are too many."""
    check_threads("torch.set_num_threads", torch.get_num_threads())
    if torch._C._are_functorch_transforms_active():
        raise ValueError(
            "a transform of torch.func (vmap, grad, ...) is active, which this can't pass: call it "
            "outside; the ops and the model alone may be transformed"
        )
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(grad))
        for device in filter(torch.is_autocast_enabled, DEVICES):
            stack.enter_context(torch.autocast(device, enabled=False))
        made = type(torch.empty(0, dtype=torch.float32, device="cpu"))
        if made is not torch.Tensor:
            raise ValueError(
                f"tensors made here are of the type {made.__name__}, which has no values: leave "
                "the mode that is active first"
            )
        # Rounded copies of weights live until the outermost autocast ends, be it the host's: past
        # our changes of the weights, and ours past the host's.
        torch.clear_autocast_cache()
        try:
            yield
        finally:
            torch.clear_autocast_cache()


def callers_level() -> int:
    """`warnings.warn`'s stacklevel of the line that called this package, from who calls this."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and _is_inside(frame):
        frame, level = frame.f_back, level + 1
    return level


def _is_inside(frame: FrameType) -> bool:
    """In the package, or in a decorator of ours or of torch's."""
    package = frame.f_globals.get("__name__", "").split(".")[0] == __package__
    return package or Path(frame.f_code.co_filename).name in ("contextlib.py", "_contextlib.py")


def check_threads(name: str, threads: int) -> None:
    if threads < 1:
        raise ValueError(f"{name} must be at least 1; got {threads}")
    if threads > MOST_THREADS:
        raise ValueError(f"{name} must be at most {MOST_THREADS} here; got {threads}")


def plain(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy of one made in inference mode, which no gradient may pass."""
    return x.clone() if x.is_inference() else x


# ---- the random state ----------------------------------------------------------------------------

_seeding = threading.RLock()  # the generators are the process's: one at a time


@contextlib.contextmanager
def seeded(seed: int, *devices: torch.device) -> Iterator[None]:
    """torch's generators of the CPU and of these devices begin with `seed`, then are as they were.
    Those of other devices are not touched."""
    generators = [torch.default_generator]
    if any(device.type == "cuda" for device in devices):
        torch.cuda.init()
        here = torch.cuda.current_device()
        used = {here if d.index is None else d.index for d in devices if d.type == "cuda"}
        generators += [torch.cuda.default_generators[index] for index in sorted(used)]
    with _seeding:
        states = [generator.get_state() for generator in generators]
        try:
            for generator in generators:
                generator.manual_seed(seed)
            yield
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)


# ---- modes of modules ----------------------------------------------------------------------------


@dataclass
class _Held:
    """A module that some threads evaluate."""

    by: int  # of them
    before: bool  # its mode, which the last one gives back


_change = threading.Condition(threading.RLock())
_held: dict[torch.nn.Module, _Held] = {}
_trained: dict[torch.nn.Module, int] = {}  # by the thread of this number


@contextlib.contextmanager
def evaluating(model: object) -> Iterator[None]:
    """The module, or those that a callable refers to, in eval mode, then each part of it back in
    the mode it was.

    Threads may do so with one model at the same time: the last gives the mode back. One that
    another thread trains is waited for until its step is done."""
    around = [model] if isinstance(model, torch.nn.Module) else parts(model)
    whole = [part for part in around if isinstance(part, torch.nn.Module)]
    modules = list(dict.fromkeys(module for part in whole for module in part.modules()))
    with _change:
        _wait_for_other_trainers(modules)
        for module in modules:
            _held.setdefault(module, _Held(0, module.training)).by += 1
        for part in whole:
            part.eval()
    try:
        yield
    finally:
        with _change:
            for module in modules:
                _held[module].by -= 1
                if not _held[module].by:
                    module.training = _held.pop(module).before


@contextlib.contextmanager
def training(model: torch.nn.Module) -> Iterator[None]:
    """The module in training mode for a step, in which it stays; RuntimeError where it is being
    evaluated, which would get its dropout."""
    modules = list(model.modules())
    with _change:
        if any(module in _held for module in modules):
            raise RuntimeError(
                "the model is being sampled or evaluated, in another thread or around this step: "
                "train it afterwards, or sample a copy (Trainer.ema_model())"
            )
        _wait_for_other_trainers(modules)
        nested = any(module in _trained for module in modules)
        if not nested:
            _trained.update(dict.fromkeys(modules, threading.get_ident()))
        model.train()
    try:
        yield
    finally:
        with _change:
            if not nested:
                for module in modules:
                    del _trained[module]
            _change.notify_all()


def _wait_for_other_trainers(modules: list[torch.nn.Module]) -> None:
    me = threading.get_ident()
    _change.wait_for(lambda: all(_trained.get(module, me) == me for module in modules))
