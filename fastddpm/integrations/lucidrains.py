"""denoising_diffusion_pytorch's GaussianDiffusion on our ops, in place: its steps and its loss,
with its random numbers. Its network is left as it is, and the package is not needed to import this.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import random
from typing import Any

import torch
from torch import Tensor, nn

from fastddpm.integrations.lucidrains_steps import OBJECTIVES, STEPS
from fastddpm.options import shown

BUFFERS = (
    "betas", "alphas_cumprod", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_log_variance_clipped",
    "posterior_mean_coef1", "posterior_mean_coef2",
)  # fmt: skip
ATTRIBUTES = ("model", "channels", "self_condition", "num_timesteps")
_REPORT = "_fastddpm_report"
TOLERANCE = 1e-4  # of what a probe's two results may differ in


def accelerate(diffusion: nn.Module) -> nn.Module:
    """`diffusion` itself, whose q_sample, p_sample, ddim_sample and p_losses are fused passes
    around the network; its loops, its Trainer and copies of it use them.

    A method is replaced where it has its published arguments, and where both versions give the same
    numbers on a small probe, a wave in place of the network; others are left. Its state_dict and
    its buffers stay, and are what the steps read. `.undo()` gives the object its class back;
    `.report()` says what was replaced, and why the rest was not: {name: "replaced" or the reason}.

    Raises ValueError for what is no GaussianDiffusion of denoising_diffusion_pytorch's, and where
    nothing can be replaced.
    """
    if reason := _is_no_process(diffusion):
        raise ValueError(reason)
    if _REPORT in vars(diffusion):
        return diffusion
    base: Any = type(diffusion)
    left = {name: _why_left(diffusion, name) for name in STEPS}
    if None not in left.values():
        reasons = "; ".join(f"{name}: {why}" for name, why in left.items())
        raise ValueError(f"nothing of this {base.__name__} can be replaced: {reasons}")
    replaced = tuple(name for name, why in left.items() if why is None)
    diffusion.__class__ = _fused(base, replaced)
    vars(diffusion)[_REPORT] = {name: why or "replaced" for name, why in left.items()}
    return diffusion


def is_process(model: Any) -> bool:
    """Whether `model` is a GaussianDiffusion as `accelerate` takes it."""
    return _is_no_process(model) is None


def undo(diffusion: nn.Module) -> nn.Module:
    """The object as it was before `accelerate`; as it is, if it is not accelerated."""
    if vars(diffusion).pop(_REPORT, None) is not None:
        diffusion.__class__ = type(diffusion).__bases__[0]
    return diffusion


def report(diffusion: nn.Module) -> dict[str, str]:
    """What `accelerate` replaced, and why it left the rest; {} if it is not accelerated."""
    return dict(vars(diffusion).get(_REPORT, {}))


def _reduce(diffusion: nn.Module, protocol: Any) -> Any:
    """Copies and pickles by the class that can be imported; the state is the object's own."""
    kind = type(diffusion)
    replaced = tuple(name for name in STEPS if name in vars(kind))
    return _rebuilt, (kind.__bases__[0], replaced), vars(diffusion)


def _rebuilt(base: Any, replaced: tuple[str, ...]) -> nn.Module:
    kind = _fused(base, replaced)
    return kind.__new__(kind)


@functools.cache
def _fused(base: Any, replaced: tuple[str, ...]) -> Any:
    """A subclass of the same name that has some of our steps."""
    members: dict[str, Any] = {name: STEPS[name] for name in replaced}
    members |= {"undo": undo, "report": report, "__reduce_ex__": _reduce}
    members |= {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(base.__name__, (base,), members)


def _is_no_process(diffusion: Any) -> str | None:
    """What the object lacks to be such a process; None for nothing."""
    kind = type(diffusion).__name__
    if not isinstance(diffusion, nn.Module):
        return f"diffusion must be a GaussianDiffusion, a torch module; got {kind}"
    buffers = dict(diffusion.named_buffers(recurse=False))
    lacks = [name for name in BUFFERS if name not in buffers]
    lacks += [name for name in ATTRIBUTES if not hasattr(diffusion, name)]
    if lacks:
        return (
            f"diffusion must be denoising_diffusion_pytorch's GaussianDiffusion; this {kind} has "
            f"no {lacks[0]}"
        )
    objective = getattr(diffusion, "objective", None)
    if str(objective) not in OBJECTIVES:
        allowed = ", ".join(map(repr, OBJECTIVES))
        return f"objective must be one of {allowed}; got {shown(objective)}"
    return None


def _why_left(diffusion: Any, name: str) -> str | None:
    """Why the method can't be replaced; None where it can."""
    base: Any = type(diffusion)
    theirs = getattr(base, name, None)
    if not callable(theirs):
        return "there is no such method"
    if own := [key for key in vars(diffusion) if key != "forward" and _is_method(base, key)]:
        return f"{own[0]} was set on this object"
    arguments, known = map(_arguments, (theirs, STEPS[name]))
    if arguments != known:
        return f"its arguments are {arguments[1:]} and not {known[1:]}"
    try:
        results = [_probed(diffusion, kind, name) for kind in (base, _fused(base, (name,)))]
    except Exception as error:  # of any kind: it is what another's code does with a probe
        return f"a probe of it failed: {type(error).__name__}: {error}"
    for one, two in zip(*results, strict=True):
        if one.shape != two.shape or one.dtype != two.dtype:
            return "its results have another shape or dtype than the published one's"
        if not torch.allclose(one, two, rtol=TOLERANCE, atol=TOLERANCE):
            return "its numbers are not those of the published one"
    return None


def _arguments(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def _is_method(kind: type, name: str) -> bool:
    return inspect.isfunction(getattr(kind, name, None))


def _probed(diffusion: Any, kind: Any, name: str) -> list[Tensor]:
    """What the method of that class says of small images, with a wave as the network."""
    probe = kind.__new__(kind)
    vars(probe).update(vars(diffusion))
    vars(probe).update(_modules={}, model=_wave, sampling_timesteps=2)
    device, T = diffusion.betas.device, int(diffusion.num_timesteps)
    state = random.getstate()
    results: list[Tensor] = []
    try:
        # Its bars go nowhere.
        with torch.random.fork_rng(), contextlib.redirect_stderr(io.StringIO()):
            torch.manual_seed(0)
            random.seed(0)
            shape = (4, int(diffusion.channels), 2, 3)
            x = torch.randn(shape, dtype=torch.float32, device=device)
            t = torch.tensor([0, T // 3, T // 2, T - 1], device=device)
            method = getattr(probe, name)
            if name == "q_sample":
                results += [method(x, t), method(x_start=x, t=t, noise=x.sin())]
            elif name == "p_losses":
                results += [method(x.sin(), t) for _ in range(3)]
            elif name == "p_sample":
                results += [y for i in set(t.tolist()) for y in method(x, i)]
            else:
                results += [method(tuple(x.shape)), method(tuple(x.shape), True)]
            results.append(torch.rand(1))  # both drew as much
    finally:
        random.setstate(state)
    return results


def _wave(x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
    seen = 0 if x_self_cond is None else 0.1 * x_self_cond
    return torch.sin(2 * x + 0.01 * t.reshape(-1, *[1] * (x.dim() - 1))) + seen
