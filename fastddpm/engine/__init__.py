"""Engines: how the reverse chain is run for a model on a device. They know a model and ops, not
what is sampled.

An engine records what one step needs and replays it: `run` takes x at the start of the chain and
returns x at its end."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import torch

from fastddpm.diffusion import Diffusion, Model
from fastddpm.engine import cpu_plan, cuda_graph, cuda_plan
from fastddpm.engine.cpu_plan import CpuPlan
from fastddpm.engine.cuda_graph import CudaGraph
from fastddpm.engine.cuda_plan import CudaPlan
from fastddpm.engine.eager import Eager
from fastddpm.ops import dispatch
from fastddpm.precision import resolve_precision
from fastddpm.schedule import Sampler, check_choice
from fastddpm.unet import UNet
from fastddpm.wrapped import unwrap

EngineName = Literal["auto", "cpu_plan", "cuda_plan", "cuda_graph", "eager"]


def make_engine(
    name: str,
    model: Model,
    diffusion: Diffusion,
    *,
    device: torch.device,
    precision: str = "auto",
    sampler: Sampler = "ddpm",
    eta: float = 0.0,
    clip: bool = True,
    guided: Sequence[str] = (),
    model_kwargs: Iterable[str] = (),
) -> Eager:
    """The engine called `name`, or the fastest that can run this model; ValueError lists the
    choices, or says why the engine asked for can't run it.

    guided: the caller's options that need a Guide;  model_kwargs: names of what the model gets
    """
    model = runnable(model)
    engine, precision = choose(name, model, device, precision, guided, model_kwargs)
    options: dict[str, Any] = {"sampler": sampler, "eta": eta, "clip": clip}
    return engine(model, diffusion, device=device, precision=precision, **options)


def runnable(model: Model) -> Model:
    """A U-Net out of its wrappers, which the engines stand in for, and the U-Net of an accelerated
    network; any other model as it is."""
    network = unwrap(model)
    if isinstance(network, UNet):
        return network
    stands: Any = getattr(network, "__dict__", {}).get("forward")  # what accelerate put there
    unet = stands.unet() if hasattr(stands, "unet") else None
    return model if unet is None else unet


def choose(
    name: str,
    model: Model,
    device: torch.device,
    precision: str,
    guided: Sequence[str] = (),
    model_kwargs: Iterable[str] = (),
) -> tuple[type[Eager], str]:
    """The engine's class and the precision that `make_engine` would take."""
    check_choice("engine", name, get_args(EngineName))
    classes: dict[str, type[Eager]] = {
        engine.name: engine for engine in (CpuPlan, CudaPlan, CudaGraph, Eager)
    }
    lacking = {key: _lacks(engine, guided, model_kwargs) for key, engine in classes.items()}
    if name != "auto" and (reason := lacking[name]):
        raise ValueError(f"engine {name!r} can't run here: {reason}")
    engine, precision = _fastest(name, model, device, precision)
    if lacking[engine.name] is None:
        return engine, precision
    return Eager, resolve_precision(precision, device)


def _lacks(engine: type[Eager], guided: Sequence[str], model_kwargs: Iterable[str]) -> str | None:
    """What a caller asks for that the engine can't do, or None."""
    if guided and not engine.guided:
        return f"{guided[0]} is at work in each step, which it records: engine='eager' takes it"
    others = [] if engine.takes is None else [x for x in model_kwargs if x not in engine.takes]
    if others:
        return f"it passes no {others[0]} on to the model: engine='eager' does"
    return None


def _fastest(
    name: str, model: Model, device: torch.device, precision: str
) -> tuple[type[Eager], str]:
    """The engine's class and precision for a model that is asked for its output alone."""
    refused = cpu_plan.unsupported(model, device)
    planned = name == "cpu_plan" or (name == "auto" and refused is None)
    if precision == "auto":
        if "stands_in" in getattr(model, "__dict__", {}):  # for a network in float32
            precision = "fp32"
        elif planned:
            precision = cpu_plan.best_precision()
        elif not isinstance(model, UNet):
            precision = "fp32"
    precision = resolve_precision(precision, device)
    if planned:
        return CpuPlan, precision
    if name == "cuda_plan":
        if reason := cuda_plan.unsupported(model, device):
            raise ValueError(f"engine 'cuda_plan' can't run here: {reason}")
        return CudaPlan, precision
    if name == "cuda_graph":
        if reason := cuda_graph.unsupported(device):
            raise ValueError(f"engine 'cuda_graph' can't run here: {reason}")
        return CudaGraph, precision
    if name == "auto" and isinstance(model, UNet):
        if device.type == "cuda":
            refused = cuda_plan.unsupported(model, device)
            if refused is None:
                return CudaPlan, precision
            _report_fallback("cuda_graph", "cuda_plan", refused)
            return CudaGraph, precision
        if device.type == "cpu" and dispatch.forced() in ("auto", "cpu"):
            _report_fallback("eager", "cpu_plan", str(refused))
    return Eager, precision


@functools.cache
def _report_fallback(engine: str, expected: str, reason: str) -> None:
    """Say once that a U-Net that should run as a plan does not."""
    dispatch.report_slower(
        f"fastddpm samples with the engine {engine!r}, not {expected!r}: {reason}"
    )
