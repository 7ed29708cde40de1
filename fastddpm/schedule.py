"""Noise schedules: float64 tables of q(x_{1:T} | x_0), and nothing that knows a model or a tensor
on a device.

Indices are 0-based: `t` here is the paper's t minus one, so `t = 0` is the first noising step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch

from fastddpm import options
from fastddpm.options import check_choice, check_count
from fastddpm.spacing import Spacing, chosen_steps

Variance = Literal["fixed_large", "fixed_small", "learned", "learned_range"]
Sampler = Literal["ddpm", "ddim"]

# Columns of the [T, K] float32 table that every op indexes by t. csrc/math.h names the same order.
COLUMNS = (
    "sqrt_ab",          # sqrt(abar_t)                                   Eq. 4
    "sqrt_1m_ab",       # sqrt(1 - abar_t)                               Eq. 4
    "inv_sqrt_ab",      # 1 / sqrt(abar_t)                               Eq. 15
    "sqrt_inv_ab_m1",   # sqrt(1 / abar_t - 1)                           Eq. 15
    "mean_x0",          # sqrt(abar_{t-1}) beta_t / (1 - abar_t)         Eq. 7
    "mean_xt",          # sqrt(alpha_t) (1 - abar_{t-1}) / (1 - abar_t)  Eq. 7
    "sigma",            # standard deviation of the sampling noise, 0 at t = 0
    "log_variance",     # log sigma_t^2 for likelihoods, finite at t = 0
)  # fmt: skip
K = len(COLUMNS)

KINDS = ("linear", "quadratic", "constant", "cosine", "sigmoid", "sigmoid_betas")
MAX_STEPS = 1_000_000  # of a chain: a longer one is a slip, and gigabytes of tables
MAX_FULL_STEPS = 2**32 - 1  # it is the step word of the x_T draw
MIN_ABAR = 1e-76  # float32 holds 1 / sqrt(abar) down to here
BELOW_ONE = float(np.nextafter(1.0, 0.0))  # the largest beta


def check_number(
    name: str, value: float, low: float, high: float = math.inf, *, inside: bool = False
) -> float:
    """`value` as a float, if it is a finite number in low .. high, the ends excluded if `inside`;
    else the ValueError that says so.
    """
    if high == math.inf:
        allowed = f"at least {low}"
    else:
        allowed = f"a number inside ({low}, {high})" if inside else f"a number in {low} .. {high}"

    def ok(x: float) -> bool:
        return (low < x < high if inside else low <= x <= high) and math.isfinite(x)

    return options.check_number(name, value, ok, allowed)


@dataclass(frozen=True, eq=False)
class Schedule:
    """The variances beta_1 .. beta_T of the forward process, and everything that follows from them.

    betas:      (T,) float64 in (0, 1), DDPM Eq. 2
    timesteps:  (T,) int64: the t that the model was trained with at each index. 0 .. T-1, except in
                a chain made by `respace`, where index i stands for the original step timesteps[i].
    full_steps: T of the chain that the model was trained with (the step word of the x_T draw)
    recipe:     the named constructor and its arguments, for `to_config`; None when betas were given
    full:       in a chain made by `respace`, the chain that it visits; else None

    Raises ValueError unless betas is 1-D and inside (0, 1), with 1 - beta_1 < 1 and abar_T >=
    1e-76, which is what the tables can hold, and timesteps are (T,) integers that increase within
    0 .. full_steps - 1.
    """

    betas: np.ndarray
    timesteps: np.ndarray = None  # type: ignore[assignment]
    full_steps: int = None  # type: ignore[assignment]
    recipe: dict | None = None
    full: Schedule | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        betas = _numbers("betas", self.betas, "iuf", "numbers").astype(np.float64)
        if betas.ndim != 1 or betas.size == 0:
            raise ValueError(
                f"betas must be a 1-D array of at least one step; got shape {betas.shape}"
            )
        if not np.all(np.isfinite(betas)) or betas.min() <= 0 or betas.max() >= 1:
            raise ValueError(
                f"every beta must lie inside (0, 1); got {betas.min()} .. {betas.max()}"
            )
        _check_length("betas", betas.size)
        object.__setattr__(self, "betas", betas)
        ab = self.alphas_cumprod
        if ab[0] == 1:
            raise ValueError(f"betas[0] = {betas[0]} is too small: 1 - beta is 1 in float64")
        if ab[-1] < MIN_ABAR:
            raise ValueError(
                f"abar_T, the product of 1 - beta over all {betas.size} steps, is {ab[-1]:.3g}; "
                f"it must be at least {MIN_ABAR}: take fewer steps or smaller betas"
            )
        full_steps = betas.size if self.full_steps is None else self.full_steps
        full_steps = check_count("full_steps", full_steps, MAX_FULL_STEPS)
        timesteps = _timesteps(self.timesteps, betas.size, full_steps)
        for array in (betas, timesteps):
            array.setflags(write=False)
        object.__setattr__(self, "timesteps", timesteps)
        object.__setattr__(self, "full_steps", full_steps)

    # ---- the schedules of the paper's sweep, and the cosine -------------------------------------

    @classmethod
    def linear(
        cls,
        T: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        *,
        scaled: bool = False,
    ) -> Schedule:
        """beta_t linear from beta_start to beta_end: the paper's choice (Section 4).

        scaled: times 1000 / T, so that a chain of any T ends as near to N(0, I) as the paper's of
        1000 does (improved-diffusion's rule); T must be above 1000 beta_end then.
        """
        recipe = _recipe("linear", T, beta_start=beta_start, beta_end=beta_end)
        T, start, end = recipe["T"], recipe["beta_start"], recipe["beta_end"]
        if options.check_flag("scaled", scaled):
            start, end = 1000 / T * start, 1000 / T * end
            if max(start, end) >= 1:
                raise ValueError(
                    f"scaled betas must lie inside (0, 1), but 1000 / T times "
                    f"{max(beta_start, beta_end)} is {max(start, end):.4g} for T = {T}; "
                    "take more steps or smaller betas"
                )
            recipe["scaled"] = True
        return cls(np.linspace(start, end, T), recipe=recipe)

    @classmethod
    def quadratic(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
        """sqrt(beta_t) linear: the quadratic schedule of the paper's sweep (Appendix B)."""
        recipe = _recipe("quadratic", T, beta_start=beta_start, beta_end=beta_end)
        T, start, end = recipe["T"], recipe["beta_start"], recipe["beta_end"]
        return cls(np.linspace(start**0.5, end**0.5, T) ** 2, recipe=recipe)

    @classmethod
    def constant(cls, T: int = 1000, beta: float = 0.01) -> Schedule:
        """beta_t = beta (Appendix B). The default's abar_T equals the linear schedule's within 8
        %.
        """
        recipe = _recipe("constant", T, beta=beta)
        return cls(np.full(recipe["T"], recipe["beta"]), recipe=recipe)

    @classmethod
    def cosine(cls, T: int = 1000, s: float = 0.008, beta_max: float = 0.999) -> Schedule:
        """abar_t = f(t) / f(0), f(t) = cos^2((t/T + s) / (1 + s) pi/2)   (Nichol & Dhariwal 2021,
        Eq. 17); s in 0 .. 1.
        """
        recipe = _recipe("cosine", T, s=s, beta_max=beta_max)
        T, s = recipe["T"], recipe["s"]
        f = np.cos((np.arange(T + 1) / T + s) / (1 + s) * np.pi / 2) ** 2
        return cls(np.minimum(1 - f[1:] / f[:-1], recipe["beta_max"]), recipe=recipe)

    @classmethod
    def sigmoid(
        cls,
        T: int = 1000,
        start: float = -3,
        end: float = 3,
        tau: float = 1,
        *,
        beta_max: float = 0.999,
    ) -> Schedule:
        """abar_t = (s(1) - s(t/T)) / (s(1) - s(0)), s(u) = sigmoid((start + (end - start) u) / tau)
        (Jabri, Fleet & Chen 2022, Algorithm 1); start below end, tau above 0.
        """
        recipe = _recipe("sigmoid", T, beta_max=beta_max)
        T = recipe["T"]
        start = options.check_number("start", start, math.isfinite, "a finite number")
        end = options.check_number("end", end, lambda x: start < x < math.inf, "above start")
        tau = options.check_number("tau", tau, lambda x: 0 < x < math.inf, "above 0")
        if max(-start, end, end - start) / tau > 700:
            raise ValueError(
                f"start / tau, end / tau and their difference must lie within -700 .. 700; got "
                f"start {start}, end {end} and tau {tau}"
            )
        # sigmoid(b) - sigmoid(a) = sinh((b - a)/2) / (2 cosh(a/2) cosh(b/2)), and in 1 - abar_t /
        # abar_{t-1} the sums of two such products share a term: nothing cancels.
        at = (start + (end - start) * np.arange(T + 1) / T) / tau
        fallen = np.cosh(at[-1] / 2) * np.sinh((end - start) / tau / T / 2)
        betas = fallen / (np.sinh((at[-1] - at[:-1]) / 2) * np.cosh(at[1:] / 2))
        recipe = {**recipe, "start": start, "end": end, "tau": tau}
        return cls(np.minimum(betas, recipe["beta_max"]), recipe=recipe)

    @classmethod
    def sigmoid_betas(
        cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> Schedule:
        """beta_t = beta_start + (beta_end - beta_start) sigmoid(u), u from -6 to 6: what diffusers
        calls "sigmoid" (GeoDiff's).
        """
        recipe = _recipe("sigmoid_betas", T, beta_start=beta_start, beta_end=beta_end)
        T, start, end = recipe["T"], recipe["beta_start"], recipe["beta_end"]
        betas = start + (end - start) / (1 + np.exp(-np.linspace(-6, 6, T)))
        return cls(betas, recipe=recipe)

    # ---- calculations for q(x_t | x_0) and q(x_{t-1} | x_t, x_0) --------------------------------

    @property
    def T(self) -> int:
        return self.betas.size

    @property
    def alphas(self) -> np.ndarray:
        return 1 - self.betas

    @property
    def alphas_cumprod(self) -> np.ndarray:
        """abar_t, DDPM Eq. 4."""
        return np.cumprod(self.alphas)

    @property
    def alphas_cumprod_prev(self) -> np.ndarray:
        """abar_{t-1}, with abar_0 = 1 before the first step."""
        return np.append(1.0, self.alphas_cumprod[:-1])

    @property
    def posterior_variance(self) -> np.ndarray:
        """beta-tilde_t, DDPM Eq. 7; 0 at t = 0, where x_0 is known."""
        return self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @property
    def posterior_log_variance(self) -> np.ndarray:
        """log beta-tilde_t, where t = 0 takes the value of t = 1 ("t = 0 copies t = 1")."""
        variance = self.posterior_variance
        first = variance[1] if self.T > 1 else self.betas[0]
        return np.log(np.append(first, variance[1:]))

    def log_variance(self, variance: Variance) -> np.ndarray:
        """log sigma_t^2 of p(x_{t-1} | x_t), finite everywhere.

        fixed_small: log beta-tilde_t.  fixed_large: log beta_t. Both take log beta-tilde_1 at t =
                     0, the
        rule of the paper's CIFAR-10 run: with it the decoder's L_0 has a sigma that fits a pixel
        bin.
        learned: the model gives it; the table holds fixed_small's as what a new model starts from.
        learned_range: the model says where between log beta-tilde_t and log beta_t it is; the table
                     holds the latter, at t = 0 too.
        """
        check_choice("variance", variance, get_args(Variance))
        if variance == "learned_range":
            return np.log(self.betas)
        log_variance = self.posterior_log_variance
        if variance == "fixed_large":
            log_variance[1:] = np.log(self.betas[1:])
        return log_variance

    def columns(
        self, variance: Variance = "fixed_large", *, sampler: Sampler = "ddpm", eta: float = 0.0
    ) -> dict[str, np.ndarray]:
        """The table's columns in float64, by name; see COLUMNS and `table`."""
        check_choice("sampler", sampler, get_args(Sampler))
        ab, ab_prev, beta = self.alphas_cumprod, self.alphas_cumprod_prev, self.betas
        log_variance = self.log_variance(variance)
        if sampler == "ddpm":
            mean_x0 = np.sqrt(ab_prev) * beta / (1 - ab)
            mean_xt = np.sqrt(self.alphas) * (1 - ab_prev) / (1 - ab)
            least = self.posterior_log_variance if variance == "learned_range" else log_variance
            sigma = np.exp(0.5 * least)
        else:
            # DDIM Eq. 12 with eps = (x_t - sqrt(ab) x0) / sqrt(1 - ab) put in: it is linear in x0
            # and x_t too, so one posterior step serves both samplers.
            sigma = check_number("eta", eta, 0) * np.sqrt(self.posterior_variance)
            if np.any(sigma**2 > 1 - ab_prev + 1e-12):
                raise ValueError(f"eta = {eta} asks for more noise than x_(t-1) has; use eta <= 1")
            direction = np.sqrt(np.maximum(1 - ab_prev - sigma**2, 0))
            mean_xt = direction / np.sqrt(1 - ab)
            mean_x0 = np.sqrt(ab_prev) - mean_xt * np.sqrt(ab)
        sigma = np.append(0.0, sigma[1:])
        values = (
            np.sqrt(ab),
            np.sqrt(1 - ab),
            1 / np.sqrt(ab),
            np.sqrt(1 / ab - 1),
            mean_x0,
            mean_xt,
            sigma,
            log_variance,
        )
        return dict(zip(COLUMNS, values, strict=True))

    def table(
        self,
        variance: Variance = "fixed_large",
        *,
        sampler: Sampler = "ddpm",
        eta: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """[T, K] coefficients that the ops index by t, computed in float64 and rounded once to
        `dtype`.

        sampler="ddim" changes only mean_x0, mean_xt and sigma (eta scales the noise: 0 is none,
        1 is fixed_small's). variance="learned_range": sigma is sqrt(beta-tilde) and log_variance is
        log beta, the ends between which the model's word lies.
        """
        columns = self.columns(variance, sampler=sampler, eta=eta)
        return torch.from_numpy(np.stack(list(columns.values()), axis=1)).to(device, dtype)

    # ---- shorter chains -------------------------------------------------------------------------

    def respace(
        self, steps: int | str | Sequence[int], *, spacing: Spacing = "strided"
    ) -> Schedule:
        """The chain that visits some steps of this one.

        steps:   how many; or OpenAI's words for them, "ddim50" (an integer stride that gives 50)
                 or "10,15,20" (so many of each of three equal sections); or they themselves, a
                 sequence of indices 0 .. T - 1 that rises or falls
        spacing: of a number of steps: "strided", evenly with the first and the last; or diffusers'
                 "linspace", "leading" (multiples of T // steps) or "trailing"

        Its betas are 1 - abar_i / abar_{i-1} over the kept steps, so q(x_t | x_0) at a kept step is
        unchanged and no second sampler is needed. Raises ValueError for what is no such choice.
        """
        keep = chosen_steps(self.T, steps, spacing)
        if len(keep) == self.T:
            return self
        ab = self.alphas_cumprod[keep]
        # Of an abar that falls by more than float64 can tell from 1 - beta = 0, 1e-16 is left.
        betas = np.minimum(1 - ab / np.append(1.0, ab[:-1]), BELOW_ONE)
        short = Schedule(betas, self.timesteps[keep], self.full_steps)
        object.__setattr__(short, "full", self if self.is_full else self.full)
        return short

    @property
    def is_full(self) -> bool:
        """Whether a step of this chain is a step of the one that the model was trained with."""
        return self.full_steps == self.T

    @property
    def trained(self) -> Schedule:
        """The chain that the model was trained with; ValueError where only its length is known."""
        chain = self if self.is_full else self.full
        if chain is None:
            raise ValueError(
                f"a chain of {self.T} of {self.full_steps} steps, given by its betas and timesteps,"
                " does not know the betas of all steps: make it with Schedule.respace"
            )
        return chain

    def log_variance_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """(log beta-tilde_t, log beta_t - log beta-tilde_t): what the variance of p(x_{t-1} | x_t)
        lies between (Section 3.2). log beta-tilde copies t = 1 at t = 0, see above.

        The difference is -log(1 - abar_{t-1} beta_t / (1 - abar_t)): exact where it is small.
        """
        lower, ab = self.posterior_log_variance, self.alphas_cumprod
        way = -np.log1p(-self.alphas_cumprod_prev[1:] * self.betas[1:] / (1 - ab[1:]))
        return lower, np.append(np.log(self.betas[0]) - lower[0], way)

    def log_variance_ratio(self, variance: Variance = "fixed_large") -> np.ndarray:
        """log_variance(variance) - log beta-tilde_t, (T,) float64: what the table's two logarithms
        differ by, exact where that is little; 0 where the table holds log beta-tilde itself.
        """
        check_choice("variance", variance, get_args(Variance))
        if variance in ("fixed_small", "learned"):
            return np.zeros(self.T)
        ratio = self.log_variance_bounds()[1]
        if variance == "fixed_large":
            ratio[0] = 0.0
        return ratio

    def learned_variance(self) -> np.ndarray:
        """(T, 4) float64: what makes log sigma_t^2 of a step of the trained chain that of a step of
        this one.

        A row (first, way, lower, scale) says: log sigma^2 = first + f way, f between 0 (log
        beta-tilde) and 1 (log beta), becomes lower + f scale way.

        A step that both chains take keeps the model's word (scale 1, lower = first); so does t = 0,
        whose beta-tilde is 0 and its f a convention. Where float32 can't tell the trained chain's
        two bounds apart there is no f to be read, and scale is 0.
        """
        (first, way), (lower, own_way) = (
            chain.log_variance_bounds() for chain in (self.trained, self)
        )
        first, way = first[self.timesteps], way[self.timesteps]
        told = way >= 8 * np.finfo(np.float32).eps * np.abs(first)
        scale = np.divide(own_way, way, out=np.zeros(self.T), where=told)
        shared = np.diff(self.timesteps, prepend=-1) == 1
        lower, scale = np.where(shared, first, lower), np.where(shared, 1.0, scale)
        return np.stack((first, way, lower, scale), axis=1)

    # ---- files ----------------------------------------------------------------------------------

    def to_config(self) -> dict:
        """JSON-ready, for `from_config`: the named constructor and its arguments, or the betas."""
        if self.recipe is not None:
            return dict(self.recipe)
        if self.full_steps != self.T:
            raise ValueError(
                "a respaced schedule is not saved: save the full one and respace it again"
            )
        return {"kind": "custom", "betas": self.betas.tolist()}

    @classmethod
    def from_config(cls, config: dict) -> Schedule:
        """The schedule that `to_config` described; ValueError names an unknown kind or argument."""
        arguments = dict(config)
        kind = arguments.pop("kind", None)
        check_choice("schedule kind", kind, (*KINDS, "custom"))
        make = _custom if kind == "custom" else getattr(cls, kind)
        try:
            return make(**arguments)
        except TypeError as error:
            raise ValueError(f"schedule {kind!r}: {error}") from None


def _custom(betas: Any, timesteps: Any = None, full_steps: Any = None) -> Schedule:
    """What a file may say of a custom schedule."""
    return Schedule(betas, timesteps, full_steps)


def _recipe(kind: str, T: int, **given: float) -> dict[str, Any]:
    """The recipe of a named schedule, JSON-ready: T and its numbers checked, a beta inside (0, 1),
    s in 0 .. 1.
    """
    T = check_count("T", T)
    _check_length("T", T)
    checked = {
        name: check_number(name, value, 0, 1, inside=name != "s") for name, value in given.items()
    }
    return {"kind": kind, "T": T, **checked}


def _check_length(name: str, T: int) -> None:
    if T > MAX_STEPS:
        raise ValueError(f"{name} must be at most {MAX_STEPS} steps; got {T}")


def _numbers(name: str, values: Any, kinds: str, what: str) -> np.ndarray:
    """`values` as an array, if their dtype is one of the `kinds`; else the ValueError."""
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged, or a tensor on a GPU
        raise ValueError(f"{name} must be a 1-D array of {what}: {error}") from None
    if array.dtype.kind not in kinds and array.size:
        raise ValueError(f"{name} must be a 1-D array of {what}; got {array.dtype}")
    return array


def _timesteps(given: Any, T: int, full_steps: int) -> np.ndarray:
    """(T,) int64, if `given` increases within 0 .. full_steps - 1; None: 0 .. T - 1, all steps."""
    if given is None:
        if full_steps != T:
            raise ValueError(
                f"timesteps must be given where full_steps is not the number of betas, {T}; "
                f"got full_steps {full_steps}"
            )
        return np.arange(T)
    array = _numbers("timesteps", given, "iu", "integers")
    if array.shape != (T,):
        raise ValueError(f"timesteps must have shape ({T},), one for each beta; got {array.shape}")
    if array[0] < 0 or array[-1] >= full_steps or np.any(array[1:] <= array[:-1]):
        raise ValueError(f"timesteps must increase within 0 .. {full_steps - 1}; got {given!r}")
    return array.astype(np.int64)
