"""The numbers of a diffusers DDPM scheduler: its betas, its timesteps, and what a step of a chain
is made of. Nothing of diffusers is needed here.

All is computed in one dtype: float64, or float32 in diffusers' own order of operations, whose
1 - abar_t has three digits where t is small. What the ops read is rounded once, from either.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from fastddpm.diffusion import LEARNED
from fastddpm.integrations.diffusers_arguments import table_dtype
from fastddpm.schedule import COLUMNS, check_choice
from fastddpm.spacing import Spacing, spaced

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
VARIANCE_TYPES = (
    "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range",
)  # fmt: skip
SPACINGS = ("linspace", "leading", "trailing")

BETA_MAX = 0.999  # of the schedules that are given by abar
LEAST_VARIANCE = 1e-20  # of beta-tilde, whose logarithm is taken


# ---- the process ---------------------------------------------------------------------------------


def betas(
    kind: str, T: int, beta_start: float, beta_end: float, dtype: torch.dtype
) -> torch.Tensor:
    """(T,) betas of one of BETA_SCHEDULES, on the CPU; ValueError for another name."""
    check_choice("beta_schedule", kind, BETA_SCHEDULES)
    if kind in ("squaredcos_cap_v2", "laplace"):
        ab = [(_cosine if kind == "squaredcos_cap_v2" else _laplace)(i / T) for i in range(T + 1)]
        values = [min(1 - ab[i + 1] / ab[i], BETA_MAX) for i in range(T)]
        return torch.tensor(values, dtype=dtype, device="cpu")

    def line(start: float, end: float) -> torch.Tensor:
        return torch.linspace(start, end, T, dtype=dtype, device="cpu")

    if kind == "linear":
        return line(beta_start, beta_end)
    if kind == "scaled_linear":
        return line(beta_start**0.5, beta_end**0.5) ** 2
    return torch.sigmoid(line(-6, 6)) * (beta_end - beta_start) + beta_start


def _cosine(u: float) -> float:
    """abar at u = t / T: Nichol & Dhariwal 2021, Eq. 17, not yet divided by its value at 0."""
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace(u: float) -> float:
    """sqrt(snr / (1 + snr)) of a signal-to-noise ratio whose logarithm is Laplace distributed."""
    side = math.copysign(1, 0.5 - u)
    snr = math.exp(-0.5 * side * math.log(1 - 2 * abs(0.5 - u) + 1e-6))
    return math.sqrt(snr / (1 + snr))


def with_zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """The betas for which sqrt(abar), shifted and scaled, ends at 0 and begins where it did
    (Lin et al. 2024, Algorithm 1).
    """
    root = torch.cumprod(1 - betas, 0).sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    ab = root**2
    return 1 - torch.cat((ab[:1], ab[1:] / ab[:-1]))


def timesteps(T: int, steps: int, spacing: Spacing, offset: int) -> np.ndarray:
    """The `steps` of T that a chain visits, descending; int64 (Lin et al. 2024, Table 2).

    offset is added to those of "leading" alone. ValueError where it leads out of 0 .. T - 1.
    """
    check_choice("timestep_spacing", spacing, SPACINGS)
    chain = spaced(T, steps, spacing)[::-1] + (offset if spacing == "leading" else 0)
    if chain[0] >= T or chain[-1] < 0:
        raise ValueError(
            f"{steps} leading timesteps of {T} with steps_offset {offset} are {chain[-1]} .. "
            f"{chain[0]}, outside 0 .. {T - 1}: take fewer steps or another steps_offset"
        )
    return chain


def forward_table(ab: torch.Tensor, *, velocity: bool = False) -> torch.Tensor:
    """(T, 8) for ops.noise in the dtype of ab: x_t = sqrt(abar) x0 + sqrt(1 - abar) eps, or of
    eps and x0 in turn v = sqrt(abar) eps - sqrt(1 - abar) x0.
    """
    table = ab.new_zeros(len(ab), len(COLUMNS))
    table[:, COLUMNS.index("sqrt_ab")] = ab.sqrt()
    table[:, COLUMNS.index("sqrt_1m_ab")] = (1 - ab).sqrt() * (-1 if velocity else 1)
    return table


# ---- a chain's steps -----------------------------------------------------------------------------


class Chain:
    """The steps t -> t' of a chain, and the coefficients that each of them needs.

    ab:         (T,) abar_t, whose dtype all else is computed in
    steps:      the t of the chain in its order; the last goes to x_0, t' = -1
    bound:      of the x0 prediction, which is clipped to [-bound, bound]; None: it is not
    threshold:  x0 goes through a function that is no clip, so a step is not one pass

    The x0 prediction is linear in x_t and the model's output, x0 = A x_t - B output, for every
    prediction type: a row of the ops' table that holds A and B where it has those of Eq. 15 makes
    one fused step of them all. Divided by the bound, with the mean's weight of x0 times it, the
    fused clip to [-1, 1] is one to [-bound, bound].
    """

    def __init__(
        self,
        ab: torch.Tensor,
        steps: list[int],
        *,
        prediction: str,
        variance: str,
        bound: float | None,
        threshold: bool,
    ):
        check_choice("prediction_type", prediction, PREDICTION_TYPES)
        self.steps, self.previous = steps, [*steps[1:], -1]
        self.prediction, self.variance = prediction, variance
        self.bound, self.threshold = bound, threshold
        self._place = {t: i for i, t in reversed(list(enumerate(steps)))}  # the first of equals
        self._tables: dict[Any, torch.Tensor] = {}

        T = len(ab)
        t, before = torch.tensor(steps, device="cpu"), torch.tensor(self.previous, device="cpu")
        self.ab = ab[t.clamp(0, T - 1)]
        self.ab_before = torch.where(before >= 0, ab[before.clamp(0, T - 1)], 1)
        rest, rest_before = 1 - self.ab, 1 - self.ab_before
        alpha = self.ab / self.ab_before
        self.beta = 1 - alpha
        self.variances = (rest_before / rest * self.beta).clamp(min=LEAST_VARIANCE)
        self.known = (
            (t >= 0) & (t < T) & (before < T) & (self.ab >= 0) & (self.ab < 1)
            & (self.ab_before > 0) & (self.ab_before <= 1) & (alpha <= 1)
        ).tolist()  # fmt: skip

        self.root, self.root_rest = self.ab.sqrt(), rest.sqrt()
        root, root_rest = self.root.double(), self.root_rest.double()
        if prediction == "epsilon":
            self.of_xt, self.of_output = 1 / root, root_rest / root
        elif prediction == "v_prediction":
            self.of_xt, self.of_output = root, root_rest
        else:
            self.of_xt, self.of_output = torch.zeros_like(root), -torch.ones_like(root)
        self.mean_x0 = (self.ab_before.sqrt() * self.beta / rest).double()
        self.mean_xt = (alpha.sqrt() * rest_before / rest).double()
        sigma = (self.beta if variance.startswith("fixed_large") else self.variances).sqrt()
        self.sigma = torch.where(t > 0, sigma, 0).double()

        scale = 1.0 if bound is None else bound
        # abar_t = 0, or so small that float32 has no A or B, is for a formula with the quotient.
        finite = (self.of_xt / scale).float().isfinite() & (
            self.of_output / scale
        ).float().isfinite()
        self.linear = finite.tolist()
        self.fused = (finite & (not threshold)).tolist()
        self._scale = torch.where(finite & (not threshold), scale, 1.0).double()

    def index(self, t: int) -> int:
        """The place of step t in the chain. ValueError where it has none, or where the betas at it
        are no variances.
        """
        i = self._place.get(t)
        if i is None:
            raise ValueError(f"timestep must be one of the chain's {_listed(self.steps)}; got {t}")
        if not self.known[i]:
            raise ValueError(
                f"there is no step from t = {t} to {self.previous[i]}: it needs abar_t in [0, 1) "
                f"and no more than abar of the step after it; they are {self.ab[i]:.4g} and "
                f"{self.ab_before[i]:.4g}"
            )
        return i

    def row(self, i: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """(1, 8) for ops.posterior_step, scaled by the bound where the step is fused."""
        key = (device, dtype)
        if key not in self._tables:
            with torch.inference_mode(False):
                self._tables[key] = self._table().to(dtype).to(device)
        return self._tables[key][i : i + 1]

    def _table(self) -> torch.Tensor:
        columns = dict.fromkeys(COLUMNS, torch.zeros_like(self.of_xt)) | {
            "inv_sqrt_ab": self.of_xt / self._scale,
            "sqrt_inv_ab_m1": self.of_output / self._scale,
            "mean_x0": self.mean_x0 * self._scale,
            "mean_xt": self.mean_xt,
            "sigma": self.sigma,
        }
        return torch.stack(list(columns.values()), dim=1)

    def log_variance(
        self, i: int, spread: torch.Tensor | None, kind: str | None = None
    ) -> torch.Tensor | None:
        """log sigma^2 of step i where the model gives it, None where the table does.

        spread: what the model says of the variance: sigma^2 ("learned"), or the way from
                log beta-tilde at -1 to log beta at 1 ("learned_range")
        kind:   the chain's variance type unless given; ValueError lists those that there are
        """
        kind = kind or self.variance
        check_choice("variance_type", kind, VARIANCE_TYPES)
        if kind not in LEARNED:
            return None
        if spread is None:
            raise ValueError(
                f"variance_type {kind!r} needs a model_output of twice the sample's channels; "
                "it has as many"
            )
        spread = spread.to(table_dtype(spread.dtype))
        if kind == "learned":
            return spread.log()
        low = math.log(self.variances[i])
        high = math.log(max(float(self.beta[i]), LEAST_VARIANCE))
        return spread * (0.5 * (high - low)) + 0.5 * (high + low)


def _listed(steps: list[int]) -> str:
    if len(steps) <= 8:
        return f"timesteps {', '.join(map(str, steps))}"
    return f"{len(steps)} timesteps {steps[0]}, {steps[1]}, ... {steps[-1]}"
