"""What a caller puts between the network and the step: a word on the x0 prediction, the gradient of
a classifier, the last prediction for the network to see, noise of the caller's own. The chain is
eager.py's; the step itself is the diffusion's."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fastddpm.diffusion import Diffusion
from fastddpm.options import check_flag
from fastddpm.schedule import COLUMNS

if TYPE_CHECKING:
    from fastddpm.engine.eager import Eager

Draw = Callable[[], torch.Tensor]
SQRT_1M_AB, SQRT_INV_AB_M1, SIGMA = map(COLUMNS.index, ("sqrt_1m_ab", "sqrt_inv_ab_m1", "sigma"))


@dataclass(frozen=True)
class Hooks:
    """What is done in each step.

    denoised_fn(x0) -> x0:          takes the place of the prediction, before it is clipped
    cond_fn(x, t, **kw) -> (N, C, H, W), the gradient of log p(y | x) at x_t: "ddpm" adds sigma^2
                                    times it to the mean (Dhariwal & Nichol 2021, Algorithm 1), and
                                    "ddim" takes sqrt(1 - abar) times it off eps (Algorithm 2)
    self_condition:                 the model is called (x, t, the x0 predicted one step before),
                                    zeros at the first (Chen et al. 2022)

    ValueError for what can't be called."""

    denoised_fn: Callable[[torch.Tensor], torch.Tensor] | None = None
    cond_fn: Callable[..., torch.Tensor] | None = None
    self_condition: bool = False

    def __post_init__(self) -> None:
        for name in ("denoised_fn", "cond_fn"):
            check_callable(name, getattr(self, name))
        check_flag("self_condition", self.self_condition)

    @property
    def named(self) -> tuple[str, ...]:
        """The options that are used."""
        every = ("denoised_fn", "cond_fn", "self_condition")
        return tuple(name for name in every if getattr(self, name) not in (None, False))


def check_callable(name: str, value: Any) -> None:
    if value is not None and not callable(value):
        raise ValueError(f"{name} must be a function or None; got {type(value).__name__}")


class Guide:
    """The steps of one run with such hooks.

    draw: z of each step that adds noise, (N, C, H, W); None: seed and sample index say it"""

    def __init__(self, hooks: Hooks, draw: Draw | None = None):
        self.hooks, self._draw = hooks, draw
        self._last: torch.Tensor | None = None

    def step(
        self,
        engine: Eager,
        xt: torch.Tensor,
        i: int,
        t: torch.Tensor,
        seed: int,
        sample_index: torch.Tensor,
        model_kwargs: Mapping[str, Any],
    ) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
        """(x_{t-1}, a function for the x0 it was made from) at chain index i.

        FloatingPointError where a hook returns NaN or inf, which clipping would hide."""
        diffusion, options, hooks = engine.diffusion, engine.step_options, self.hooks
        output = self._output(engine, xt, t, i, model_kwargs)
        gradient = None
        if hooks.cond_fn is not None:
            gradient = hooks.cond_fn(xt.clone(), diffusion.model_time(t), **model_kwargs)
            gradient = _checked("cond_fn", gradient, xt, i)
        score = gradient if options["sampler"] == "ddim" else None
        noise = self._noise(diffusion, xt, i, seed, sample_index, options)
        if hooks.denoised_fn is None and score is None:
            predict = functools.partial(
                diffusion.predict_x0, xt, output, t, clip=bool(options["clip"])
            )
            if hooks.self_condition:
                self._last = predict().clone()  # what is shown may be written to
            x = diffusion.p_step(xt, output, t, **noise, **options)
        else:
            x0, seen = self._predictions(diffusion, xt, output, t, i, options)
            self._last = seen
            if score is not None:
                x0 = seen = x0 + _of_score(diffusion, t) * score
            process, options = _predicting_x0(diffusion), {**options, "clip": False}
            x = process.p_step(xt, _with(diffusion, output, x0), t, **noise, **options)
            predict = functools.partial(torch.Tensor.clone, seen)
        if gradient is not None and score is None:
            x = x + _variance(diffusion, xt, output, t, i) * gradient
        return x, predict

    def _output(
        self, engine: Eager, xt: torch.Tensor, t: torch.Tensor, i: int, kwargs: Mapping[str, Any]
    ) -> torch.Tensor:
        if not self.hooks.self_condition:
            return engine.output(xt, i, t, **kwargs)
        last = torch.zeros_like(xt) if self._last is None else self._last
        return engine.output_after(xt, t, last, **kwargs)

    def _predictions(
        self,
        diffusion: Diffusion,
        xt: torch.Tensor,
        output: torch.Tensor,
        t: torch.Tensor,
        i: int,
        options: Mapping[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x0 as the step takes it, and as it is shown: the mean of a chain's own step is one that
        clipping does not touch, see Diffusion.p_mean_variance."""
        x0 = diffusion.predict_x0(xt, output, t, clip=False)
        if self.hooks.denoised_fn is not None:
            x0 = _checked("denoised_fn", self.hooks.denoised_fn(x0), xt, i)
        seen = x0.clamp(-1, 1) if options["clip"] else x0
        is_mean = diffusion.prediction == "mean" and diffusion.takes_output(options["sampler"])
        return (x0 if is_mean else seen), seen

    def _noise(
        self,
        diffusion: Diffusion,
        xt: torch.Tensor,
        i: int,
        seed: int,
        sample_index: torch.Tensor,
        options: Mapping[str, Any],
    ) -> dict[str, Any]:
        if self._draw is None:
            return {"seed": seed, "sample_index": sample_index}
        noisy = adds_noise(diffusion, options["sampler"], options["eta"])[i]
        return {"z": self._draw() if noisy else torch.zeros_like(xt)}


def adds_noise(diffusion: Diffusion, sampler: Any, eta: float) -> list[bool]:
    """Whether the step at each chain index adds noise: none does at 0, nor ddim's with eta = 0."""
    table = diffusion.table("cpu", sampler=sampler, eta=eta)
    return (table[:, SIGMA] > 0).tolist()


def _of_score(diffusion: Diffusion, t: torch.Tensor) -> torch.Tensor:
    """(1 - abar) / sqrt(abar): how far x0 moves where eps moves by -sqrt(1 - abar)."""
    table = diffusion.table(t.device)[t]
    return (table[:, SQRT_1M_AB] * table[:, SQRT_INV_AB_M1])[:, None, None, None]


def _variance(
    diffusion: Diffusion, xt: torch.Tensor, output: torch.Tensor, t: torch.Tensor, i: int
) -> torch.Tensor:
    """sigma^2 of p(x_{t-1} | x_t); beta-tilde, where it is that, is 0 at the last step."""
    if i == 0 and diffusion.variance == "fixed_small":
        return torch.zeros_like(xt)
    return diffusion.p_mean_variance(xt, output, t)[1].exp()


def _predicting_x0(diffusion: Diffusion) -> Diffusion:
    """The same process of a model that predicts x0."""
    process = copy.copy(diffusion)
    process.prediction = "x0"
    return process


def _with(diffusion: Diffusion, output: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
    """The model's output with x0 in place of its prediction."""
    variance = diffusion.split(output)[1]
    return x0 if variance is None else torch.cat((x0, variance), dim=1)


def _checked(name: str, value: Any, xt: torch.Tensor, i: int) -> torch.Tensor:
    """What a hook returned as float32, if it is an image for each of x_t."""
    if not isinstance(value, torch.Tensor) or value.shape != xt.shape:
        got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"{name} must return a tensor of shape {tuple(xt.shape)} here; got {got}")
    if value.device != xt.device or value.is_complex():
        raise ValueError(
            f"{name} must return real numbers on {xt.device}, where x_t is; got {value.dtype} on "
            f"{value.device}"
        )
    value = value.detach().float()
    if not bool(torch.isfinite(value).all()):
        raise FloatingPointError(f"{name} returned NaN or inf at the chain's step {i}")
    return value
