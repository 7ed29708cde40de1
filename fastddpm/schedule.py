"""Noise schedules: float64 tables of q(x_{1:T} | x_0), and nothing that knows a model or a tensor
on a device.

Indices are 0-based: `t` here is the paper's t minus one, so `t = 0` is the first noising step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch

Variance = Literal["fixed_large", "fixed_small", "learned"]
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


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise the ValueError that lists what `name` may be."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def check_count(name: str, value: int, largest: int | None = None) -> int:
    """`value` as an int, if it is an integer in 1 .. largest; else the ValueError that says so."""
    integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not integer or value < 1 or (largest is not None and value > largest):
        allowed = "of at least 1" if largest is None else f"in 1 .. {largest}"
        raise ValueError(f"{name} must be an integer {allowed}; got {value!r}")
    return int(value)


@dataclass(frozen=True, eq=False)
class Schedule:
    """The variances beta_1 .. beta_T of the forward process, and everything that follows from them.

    betas:      (T,) float64 in (0, 1), DDPM Eq. 2
    timesteps:  (T,) int64: the t that the model was trained with at each index. 0 .. T-1, except in
                a chain made by `respace`, where index i stands for the original step timesteps[i].
    full_steps: T of the chain that the model was trained with (the step word of the x_T draw)
    recipe:     the named constructor and its arguments, for `to_config`; None when betas were given

    Raises ValueError unless betas is 1-D, finite and inside (0, 1).
    """

    betas: np.ndarray
    timesteps: np.ndarray = None  # type: ignore[assignment]
    full_steps: int = None  # type: ignore[assignment]
    recipe: dict | None = None

    def __post_init__(self) -> None:
        betas = np.array(self.betas, dtype=np.float64)
        if betas.ndim != 1 or betas.size == 0:
            raise ValueError(
                f"betas must be a 1-D array of at least one step; got shape {betas.shape}"
            )
        if not np.all(np.isfinite(betas)) or betas.min() <= 0 or betas.max() >= 1:
            raise ValueError(
                f"every beta must lie inside (0, 1); got {betas.min()} .. {betas.max()}"
            )
        betas.setflags(write=False)
        timesteps = np.arange(betas.size) if self.timesteps is None else self.timesteps
        object.__setattr__(self, "betas", betas)
        object.__setattr__(self, "timesteps", np.array(timesteps, dtype=np.int64))
        object.__setattr__(self, "full_steps", self.full_steps or betas.size)

    # ---- the schedules of the paper's sweep, and the cosine -------------------------------------

    @classmethod
    def linear(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
        """beta_t linear from beta_start to beta_end: the paper's choice (Section 4)."""
        betas = np.linspace(beta_start, beta_end, check_count("T", T))
        recipe = {"kind": "linear", "T": T, "beta_start": beta_start, "beta_end": beta_end}
        return cls(betas, recipe=recipe)

    @classmethod
    def quadratic(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
        """sqrt(beta_t) linear: the quadratic schedule of the paper's sweep (Appendix B)."""
        betas = np.linspace(beta_start**0.5, beta_end**0.5, check_count("T", T)) ** 2
        recipe = {"kind": "quadratic", "T": T, "beta_start": beta_start, "beta_end": beta_end}
        return cls(betas, recipe=recipe)

    @classmethod
    def constant(cls, T: int = 1000, beta: float = 0.01) -> Schedule:
        """beta_t = beta (Appendix B). The default's abar_T equals the linear schedule's within 8
        %.
        """
        return cls(
            np.full(check_count("T", T), beta), recipe={"kind": "constant", "T": T, "beta": beta}
        )

    @classmethod
    def cosine(cls, T: int = 1000, s: float = 0.008, beta_max: float = 0.999) -> Schedule:
        """abar_t = f(t) / f(0), f(t) = cos^2((t/T + s) / (1 + s) pi/2)   (Nichol & Dhariwal 2021,
        Eq. 17).
        """
        f = np.cos((np.arange(check_count("T", T) + 1) / T + s) / (1 + s) * np.pi / 2) ** 2
        recipe = {"kind": "cosine", "T": T, "s": s, "beta_max": beta_max}
        return cls(np.minimum(1 - f[1:] / f[:-1], beta_max), recipe=recipe)

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
        """
        check_choice("variance", variance, get_args(Variance))
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
            sigma = np.exp(0.5 * log_variance)
        else:
            # DDIM Eq. 12 with eps = (x_t - sqrt(ab) x0) / sqrt(1 - ab) put in: it is linear in x0
            # and x_t too, so one posterior step serves both samplers.
            if not eta >= 0:
                raise ValueError(f"eta must be at least 0; got {eta}")
            sigma = eta * np.sqrt(self.posterior_variance)
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
        1 is fixed_small's).
        """
        columns = self.columns(variance, sampler=sampler, eta=eta)
        return torch.from_numpy(np.stack(list(columns.values()), axis=1)).to(device, dtype)

    # ---- shorter chains -------------------------------------------------------------------------

    def respace(self, steps: int) -> Schedule:
        """The chain that visits `steps` evenly strided steps of this one, first and last included.

        Its betas are 1 - abar_i / abar_{i-1} over the kept steps, so q(x_t | x_0) at a kept step is
        unchanged and no second sampler is needed. Raises ValueError unless 1 <= steps <= T.
        """
        if check_count("steps", steps, self.T) == self.T:
            return self
        # A single step has to be the last: only there is x_t pure noise.
        keep = np.round(np.linspace(self.T - 1, 0, steps)).astype(np.int64)[::-1]
        ab = self.alphas_cumprod[keep]
        return Schedule(1 - ab / np.append(1.0, ab[:-1]), self.timesteps[keep], self.full_steps)

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
        check_choice("schedule kind", kind, ("linear", "quadratic", "constant", "cosine", "custom"))
        try:
            return cls(**arguments) if kind == "custom" else getattr(cls, kind)(**arguments)
        except TypeError as error:
            raise ValueError(f"schedule {kind!r}: {error}") from None
