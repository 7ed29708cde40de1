"""q and p of improved- and guided-diffusion's GaussianDiffusion: what its steps and losses are made
of.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastddpm import ops
from fastddpm.diffusion import LEARNED
from fastddpm.integrations.images import as_images, compute_dtype, laid_out_as
from fastddpm.integrations.openai_types import (
    PREDICTIONS,
    VARIANCES,
    LossType,
    ModelMeanType,
    ModelVarType,
    member,
)
from fastddpm.options import check_flag
from fastddpm.schedule import Sampler, Schedule, check_choice

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Process:
    """Their constructor, arrays and distributions.

    betas:           (T,) numbers in (0, 1)
    model_mean_type: a ModelMeanType, model_var_type a ModelVarType, loss_type a LossType: ours or
                     those of their own package
    rescale_timesteps: the model gets t * 1000 / T as float32
    likelihood:      of a decoder's bin: "exact", or "tanh", the approximation of the normal's
                     distribution function that their numbers hold

    Attributes: betas, alphas_cumprod and all that follow from them, (T,) float64, not to be written
    to; num_timesteps. Images are (N, C, ...) float, t is (N,) integers of 0 .. T - 1; results are
    float32, or float64 for float64. ValueError or TypeError names what is not so.
    """

    def __init__(
        self,
        *,
        betas: Any,
        model_mean_type: enum.Enum,
        model_var_type: enum.Enum,
        loss_type: enum.Enum,
        rescale_timesteps: bool = False,
        likelihood: str = "exact",
    ):
        self.model_mean_type = member("model_mean_type", ModelMeanType, model_mean_type)
        self.model_var_type = member("model_var_type", ModelVarType, model_var_type)
        self.loss_type = member("loss_type", LossType, loss_type)
        self.rescale_timesteps = check_flag("rescale_timesteps", rescale_timesteps)
        check_choice("likelihood", likelihood, ("exact", "tanh"))
        self.likelihood = likelihood
        self._schedule = schedule = Schedule(betas)
        self.num_timesteps = schedule.T
        ab, ab_prev = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
        self.betas = schedule.betas
        self.alphas_cumprod = ab
        self.alphas_cumprod_prev = ab_prev
        self.alphas_cumprod_next = np.append(ab[1:], 0.0)
        self.sqrt_alphas_cumprod = np.sqrt(ab)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1 - ab)
        self.log_one_minus_alphas_cumprod = np.log(1 - ab)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1 / ab)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1 / ab - 1)
        self.posterior_variance = schedule.posterior_variance
        self.posterior_log_variance_clipped = schedule.posterior_log_variance
        columns = schedule.columns()
        self.posterior_mean_coef1, self.posterior_mean_coef2 = (
            columns["mean_x0"],
            columns["mean_xt"],
        )
        for array in vars(self).values():
            if isinstance(array, np.ndarray):
                array.setflags(write=False)
        self._tables: dict[str, Tensor] = {}

    # ---- q ---------------------------------------------------------------------------------------

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log variance of q(x_t | x_0), each of x_start's shape   (Eq. 4)."""
        t = self._t(t, x_start, "x_start")
        mean = self._at("sqrt_ab", self.sqrt_alphas_cumprod, t, x_start) * x_start
        variance = self._at("1m_ab", 1 - self.alphas_cumprod, t, x_start)
        log_variance = self._at("log_1m_ab", self.log_one_minus_alphas_cumprod, t, x_start)
        return mean, variance, log_variance

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t ~ q(x_t | x_0); noise: like x_start, by default torch.randn_like of it."""
        t = self._t(t, x_start, "x_start")
        noise = torch.randn_like(x_start) if noise is None else noise
        return self._mixture("q", x_start, noise, t, ("x_start", "noise"))

    def q_posterior_mean_variance(
        self, x_start: Tensor, x_t: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log variance of q(x_{t-1} | x_t, x_0)   (Eq. 7)."""
        t = self._t(t, x_t, "x_t")
        mean = self._mixture("posterior", x_start, x_t, t, ("x_start", "x_t"))
        variance = self._at("posterior_variance", self.posterior_variance, t, x_t)
        return mean, variance, self._posterior_log_variance(t, x_t)

    # ---- p ---------------------------------------------------------------------------------------

    def p_mean_variance(
        self,
        model: Callable[..., Any],
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """p(x_{t-1} | x_t): "mean", "variance", "log_variance" and "pred_xstart".

        denoised_fn: of the x0 prediction, before it is clipped to [-1, 1] if clip_denoised
        model_kwargs: what the model takes beside x and t
        """
        t = self._t(t, x)
        output, word = self._output(model, x, t, model_kwargs)
        x0 = self._predicted(output, x, t, clip_denoised, denoised_fn)
        if self._prediction == "mean":
            mean = output.to(compute_dtype(output, x))
        else:
            mean, _, _ = self.q_posterior_mean_variance(x0, x, t)
        variance, log_variance = self._variances(word, x, t)
        return {
            "mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": x0
        }  # fmt: skip

    def condition_mean(
        self,
        cond_fn: Callable[..., Tensor],
        p_mean_var: Mapping[str, Tensor],
        x: Tensor,
        t: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """The mean moved by variance times cond_fn(x, t, **model_kwargs), the gradient of
        log p(y | x) (Dhariwal & Nichol 2021, Algorithm 1).
        """
        gradient = self._gradient(cond_fn, x, t, model_kwargs)
        mean = p_mean_var["mean"]
        return torch.addcmul(mean, p_mean_var["variance"], gradient.to(mean.dtype))

    def condition_score(
        self,
        cond_fn: Callable[..., Tensor],
        p_mean_var: Mapping[str, Tensor],
        x: Tensor,
        t: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """p_mean_var with sqrt(1 - abar) times that gradient taken off eps (Algorithm 2)."""
        gradient = self._gradient(cond_fn, x, t, model_kwargs)
        t = self._t(t, x)
        x0 = self._mixture("score", p_mean_var["pred_xstart"], gradient, t, ("x0", "cond_fn"))
        x0 = laid_out_as(x0, x)  # theirs is made of x and eps, in this order
        mean, _, _ = self.q_posterior_mean_variance(x0, x, t)
        return {**p_mean_var, "pred_xstart": x0, "mean": mean}

    def _gradient(
        self,
        cond_fn: Callable[..., Tensor],
        x: Tensor,
        t: Tensor,
        model_kwargs: Mapping[str, Any] | None,
    ) -> Tensor:
        gradient = cond_fn(x, self._scale_timesteps(self._t(t, x)), **(model_kwargs or {}))
        if not isinstance(gradient, Tensor) or gradient.shape != x.shape:
            raise ValueError(f"cond_fn must return {tuple(x.shape)} here; got {_kind(gradient)}")
        return gradient

    def _predict_xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        return self._mixture("x0_of_eps", x_t, eps, self._t(t, x_t, "x_t"), ("x_t", "eps"))

    def _predict_xstart_from_xprev(self, x_t: Tensor, t: Tensor, xprev: Tensor) -> Tensor:
        return self._mixture("x0_of_mean", xprev, x_t, self._t(t, x_t, "x_t"), ("xprev", "x_t"))

    def _predict_eps_from_xstart(self, x_t: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        return self._mixture(
            "eps_of_x0", x_t, pred_xstart, self._t(t, x_t, "x_t"), ("x_t", "pred_xstart")
        )

    def _predicted(
        self,
        output: Tensor,
        x: Tensor,
        t: Tensor,
        clip: bool,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """x0 as the model sees it."""
        if self._prediction == "eps":
            x0 = self._predict_xstart_from_eps(x, t, output)
        elif self._prediction == "mean":
            x0 = self._predict_xstart_from_xprev(x, t, output)
        else:
            x0 = output.to(compute_dtype(output, x))
        if denoised_fn is not None:
            x0 = denoised_fn(x0)
            if not isinstance(x0, Tensor) or x0.shape != x.shape:
                raise ValueError(f"denoised_fn must return {tuple(x.shape)} here; got {_kind(x0)}")
        return x0.clamp(-1, 1) if clip else x0

    def _variances(self, word: Tensor | None, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(sigma^2, its log) of x's shape; word: the model's."""
        schedule, kind = self._schedule, self._variance
        if kind == "fixed_small":
            variance = self._at("posterior_variance", self.posterior_variance, t, x)
            return variance, self._posterior_log_variance(t, x)
        if kind == "fixed_large":
            log_variance = self._at("log_large", schedule.log_variance(kind), t, x)
            return log_variance.exp(), log_variance
        assert word is not None
        log_variance = word.to(compute_dtype(word, x))
        if kind == "learned_range":
            lower, way = schedule.log_variance_bounds()
            low, between = self._at("lower", lower, t, x), self._at("way", way, t, x)
            log_variance = torch.addcmul(low, 0.5 * log_variance + 0.5, between)
        return log_variance.exp(), log_variance

    # ---- the model -------------------------------------------------------------------------------

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        """What the model gets for the chain indices t."""
        steps, T = self._model_steps()
        if len(steps) != T:
            t = self._kept(f"{t.device} steps", lambda: torch.from_numpy(steps).to(t.device))[t]
        return t.float() * (1000.0 / T) if self.rescale_timesteps else t

    def _model_steps(self) -> tuple[np.ndarray, int]:
        """The model's own step at each chain index, and how many it was trained with."""
        return np.arange(self.num_timesteps), self.num_timesteps

    def _output(
        self,
        model: Callable[..., Any],
        x: Tensor,
        t: Tensor,
        model_kwargs: Mapping[str, Any] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The model's prediction, and its word on the variance where that is learned."""
        output = model(x, self._scale_timesteps(t), **(model_kwargs or {}))
        n, channels, *size = x.shape
        learned = self._variance in LEARNED
        expected = (n, channels * (2 if learned else 1), *size)
        if not isinstance(output, Tensor) or output.shape != expected:
            raise ValueError(
                f"with {self.model_var_type} the model must return {expected} here; got "
                f"{_kind(output)}"
            )
        if not learned:
            return output, None
        prediction, word = output.chunk(2, dim=1)
        return prediction, word

    @property
    def _prediction(self) -> str:
        return PREDICTIONS[self.model_mean_type.name]

    @property
    def _variance(self) -> Any:
        return VARIANCES[self.model_var_type.name]

    # ---- coefficients ----------------------------------------------------------------------------

    def _coefficients(self, name: str) -> tuple[Any, Any]:
        """(a, b) of the mixture a x + b y, (T,) float64 each."""
        c1, c2 = self.posterior_mean_coef1, self.posterior_mean_coef2
        recip, recipm1 = self.sqrt_recip_alphas_cumprod, self.sqrt_recipm1_alphas_cumprod
        rest, after = self.sqrt_one_minus_alphas_cumprod, self.alphas_cumprod_next
        root_after, rest_after = np.sqrt(after), np.sqrt(1 - after)
        return {
            "q": (self.sqrt_alphas_cumprod, rest),
            "posterior": (c1, c2),
            "x0_of_eps": (recip, -recipm1),
            "x0_of_mean": (1 / c1, -c2 / c1),
            "eps_of_x0": (recip / recipm1, -1 / recipm1),
            "score": (np.ones_like(rest), recipm1 * rest),
            "reverse": (root_after - rest_after / recipm1, rest_after / rest),
        }[name]

    def _mixture(self, name: str, x: Tensor, y: Tensor, t: Tensor, of: tuple[str, str]) -> Tensor:
        """a_t x + b_t y in one pass; of: the names of the two in errors."""
        for each, tensor in zip(of, (x, y), strict=True):
            _check_floating(each, tensor)
        if x.shape != y.shape:
            raise ValueError(
                f"{of[1]} must have the shape of {of[0]}, {tuple(x.shape)}; got {tuple(y.shape)}"
            )
        dtype = compute_dtype(x, y)
        if dtype == torch.float64:
            x, y = x.double(), y.double()

        def make() -> Tensor:
            a, b = self._coefficients(name)
            table = np.zeros((self.num_timesteps, 8))
            table[:, 0], table[:, 1] = a, b
            return torch.from_numpy(table).to(x.device, dtype)

        table = self._kept(f"{x.device} {dtype} {name}", make)
        mixed, _ = ops.noise(as_images(x), t, table, eps=as_images(y), dtype=dtype)
        return laid_out_as(mixed.reshape(x.shape), x)

    def _step_table(self, x: Tensor, sampler: Sampler = "ddpm", eta: float = 0.0) -> Tensor:
        """ops.posterior_step's for x's dtype."""
        dtype = compute_dtype(x)
        return self._kept(
            f"{x.device} {dtype} {sampler} {eta!r}",
            lambda: self._schedule.table(
                self._variance, sampler=sampler, eta=eta, device=x.device, dtype=dtype
            ),
        )

    def _posterior_log_variance(self, t: Tensor, x: Tensor) -> Tensor:
        return self._at("posterior_log", self.posterior_log_variance_clipped, t, x)

    def _at(self, name: str, values: np.ndarray, t: Tensor, x: Tensor) -> Tensor:
        """values[t], of the shape of x."""
        dtype = compute_dtype(x)
        rows = self._kept(
            f"{x.device} {dtype} rows {name}",
            lambda: torch.from_numpy(values.copy()).to(x.device, dtype),
        )[t]
        return rows.reshape(-1, *[1] * (x.dim() - 1)).expand(x.shape)

    def _t(self, t: Tensor, x: Tensor, name: str = "x") -> Tensor:
        """t as (N,) int64 on the device of x, images called `name`; out of 0 .. T - 1 is an error
        where it can be read.
        """
        _check_floating(name, x)
        if not isinstance(t, Tensor) or t.dtype not in INTEGERS:
            raise TypeError(f"t must be a tensor of integers; got {_kind(t)}")
        if t.shape != x.shape[:1] or t.device != x.device:
            raise ValueError(
                f"t must have shape {tuple(x.shape[:1])} on {x.device}; got {tuple(t.shape)} on "
                f"{t.device}"
            )
        t = t.to(torch.int64)
        if (
            t.device.type == "cpu"
            and t.numel()
            and not 0 <= t.min() <= t.max() < self.num_timesteps
        ):
            raise ValueError(
                f"t must lie in 0 .. {self.num_timesteps - 1}; got {int(t.min())} .. {int(t.max())}"
            )
        return t

    def _kept(self, key: str, make: Callable[[], Tensor]) -> Tensor:
        if key not in self._tables:
            with torch.inference_mode(False):
                self._tables[key] = make()
        return self._tables[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}}


def _check_floating(name: str, x: Any) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name} must be a tensor of floats; got {_kind(x)}")
    if x.dim() < 2:
        raise ValueError(f"{name} must be (N, C, ...); got {tuple(x.shape)}")


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return type(value).__name__
