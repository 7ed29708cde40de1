"""Whether what is given as a model is one: a function of (x_t, t), and of what else it will be
given. No network of its own."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn

from fastddpm.wrapped import unwrap

# lucidrains' names of what a network predicts, and ours.
_OBJECTIVES = {"pred_noise": "eps", "pred_x0": "x0", "pred_v": "v"}


def check_is_network(model: Any) -> None:
    """ValueError, with what to pass instead, for what is known to be more than a network: a
    pipeline, a scheduler, or a process with the network inside it."""
    for part in (model, unwrap(model), getattr(model, "ema_model", None)):
        if isinstance(part, type):
            continue
        name = type(part).__name__
        if _has(part, "unet", "scheduler"):
            raise ValueError(
                f"a {name} is a pipeline and not a network (x_t, t) -> output: pass its network, "
                ".unet, with diffusion=... for what its scheduler says, or read its folder with "
                "fastddpm.UNet.from_pretrained(folder)"
            )
        if _has(part, "p_sample_loop") or _has(part, "p_losses", "q_sample"):
            raise ValueError(f"a {name} is a process and not a network (x_t, t) -> output: pass "
                             f"{_instead(part)}")  # fmt: skip
        if _has(part, "add_noise", "step", "set_timesteps"):
            raise ValueError(
                f"a {name} is a scheduler and not a network (x_t, t) -> output: pass the network, "
                "and what the scheduler says as diffusion=..."
            )


def _instead(whole: Any) -> str:
    inside = isinstance(getattr(whole, "model", None), nn.Module)
    network = "the network inside it, .model," if inside else "the network that it is called with,"
    objective = _OBJECTIVES.get(str(getattr(whole, "objective", None)))
    process = "fastddpm.Schedule(betas)" + (f", prediction={objective!r}" if objective else "")
    return f"{network} and its betas as diffusion=fastddpm.Diffusion({process})"


def _has(part: Any, *names: str) -> bool:
    return all(hasattr(part, name) for name in names)


def check_call(model: Any, model_kwargs: Iterable[str] = (), self_condition: bool = False) -> None:
    """ValueError where model(x_t, t, **model_kwargs), or with self_condition model(x_t, t, x0,
    **model_kwargs), is no call that its signature takes."""
    network = unwrap(model)
    own = getattr(network, "self_condition", None)
    if isinstance(own, bool) and own != self_condition:
        raise ValueError(
            f"the model's self_condition is {own}: pass self_condition={own}, as it was trained"
        )
    given = ("x", "t", *["x0"] * self_condition)
    said = ", ".join((*given, *(f"{name}=..." for name in model_kwargs)))
    called = network.forward if isinstance(network, nn.Module) else network
    try:
        signature = inspect.signature(called, follow_wrapped=False)
    except (TypeError, ValueError):  # of what is not written in Python
        return
    try:
        signature.bind(*given, **dict.fromkeys(model_kwargs))
    except TypeError as error:
        raise ValueError(
            f"the model can't be called as model({said}): {error}; what it needs beside x and t is "
            "passed as model_kwargs={name: value}"
        ) from None
