"""The diffusion process of a model: q (fixed) and p (learned) of the paper, its losses; no loops,
no files.

Every formula is an op or a line over the schedule's table. `model` is any callable (x_t, t) ->
output."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
import torch

from fastddpm import ops, reference
from fastddpm.schedule import COLUMNS, Sampler, Schedule, Variance, check_choice
from fastddpm.wrapped import parts, unwrap

Prediction = Literal["eps", "x0", "mean"]
Loss = Literal["simple", "vlb"]
Model = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Diffusion:
    """A schedule together with what the model predicts, its variance and its objective (DDPM Table
    2).

    prediction: "eps" (Eq. 11), "x0" (Eq. 8 through Eq. 7) or "mean" (the posterior mean mu-tilde)
    variance:   "fixed_large" (sigma^2 = beta), "fixed_small" (beta-tilde) or "learned" (a diagonal:
                the model has twice the channels, the second half is log sigma^2)
    loss:       "simple" (Eq. 14, mean squared error of the prediction) or "vlb" (a term of Eq. 5,
                bits/dim)
    """

    def __init__(
        self,
        schedule: Schedule | None = None,
        prediction: Prediction = "eps",
        variance: Variance = "fixed_large",
        loss: Loss = "simple",
    ):
        check_choice("prediction", prediction, get_args(Prediction))
        check_choice("variance", variance, get_args(Variance))
        check_choice("loss", loss, get_args(Loss))
        if variance == "learned" and loss == "simple":
            raise ValueError(
                "variance='learned' needs loss='vlb': the simple loss has no gradient for it"
            )
        self.schedule = Schedule.linear() if schedule is None else schedule
        self.prediction: Prediction = prediction
        self.variance: Variance = variance
        self.objective: Loss = loss
        self._tables: dict[tuple, torch.Tensor] = {}

    @property
    def T(self) -> int:
        return self.schedule.T

    @classmethod
    def of(cls, model: Model, diffusion: Diffusion | None = None) -> Diffusion:
        """`diffusion`, else the model's own or its wrapper's network's, else the paper's.

        ValueError names what is neither a model nor a process, a model that calls one with another
        process than the paper's (what it makes of its outputs is not known), and a traced one,
        which has lost what it had.
        """
        if not callable(model):
            raise ValueError(
                f"model must be a callable (x_t, t) -> output; got {type(model).__name__}"
            )
        process = getattr(unwrap(model), "diffusion", None) if diffusion is None else diffusion
        if process is None:
            paper = cls()
            for part in parts(model):
                if isinstance(part, (torch.jit.ScriptModule, torch.fx.GraphModule)):
                    raise ValueError(
                        f"a {type(part).__name__} does not hold the process that its network was "
                        "trained for: pass diffusion=..."
                    )
                inner = getattr(part, "diffusion", None)
                if isinstance(inner, cls) and not inner._is_like(paper):
                    raise ValueError(
                        f"a {type(part).__name__} inside this {type(model).__name__} has a process "
                        "of its own, and whether it is the whole model's too is not known: pass "
                        "diffusion=..."
                    )
            return paper
        if not isinstance(process, cls):
            raise ValueError(
                f"diffusion must be a fastddpm.Diffusion; got {type(process).__name__}"
            )
        return process

    def respace(self, steps: int | None) -> Diffusion:
        """The same process over `steps` of its steps (None: all); see Schedule.respace."""
        if steps is None:
            return self
        return Diffusion(
            self.schedule.respace(steps), self.prediction, self.variance, self.objective
        )

    def table(
        self,
        device: torch.device | str | None = None,
        *,
        sampler: Sampler = "ddpm",
        eta: float = 0.0,
    ) -> torch.Tensor:
        """The schedule's [T, K] float32 table, kept on each device it was asked for."""
        key = (str(device), sampler, eta)
        if key not in self._tables:
            self._tables[key] = self.schedule.table(
                self.variance, sampler=sampler, eta=eta, device=device
            )
        return self._tables[key]

    def model_t(self, t: torch.Tensor) -> torch.Tensor:
        """The step that the model was trained with for each chain index t."""
        if self.schedule.full_steps == self.T:
            return t
        key = (str(t.device), "timesteps", 0.0)
        if key not in self._tables:
            self._tables[key] = torch.from_numpy(self.schedule.timesteps).to(t.device)
        return self._tables[key][t]

    def model_output(self, model: Model, xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """model(x_t, its own step) at the chain indices t: (N, C, H, W) float32, or 2C channels for
        a learned variance.

        diffusers' outputs are taken too: their `sample` is the tensor. Raises ValueError for any
        other shape, which could broadcast unnoticed."""
        output = model(xt, self.model_t(t))
        output = getattr(output, "sample", output)
        channels = xt.shape[1] * (2 if self.variance == "learned" else 1)
        expected = (xt.shape[0], channels, *xt.shape[2:])
        if not isinstance(output, torch.Tensor) or output.shape != expected:
            got = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
            raise ValueError(f"the model must return a tensor of shape {expected} here; got {got}")
        return output.float()

    # ---- q: the forward process -----------------------------------------------------------------

    def q_sample(self, x0: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps   (DDPM Eq. 4). x0 is uint8 or in [-1,
        1].
        """
        return ops.noise(x0, t, self.table(x0.device), eps=eps)[0]

    def q_posterior(
        self, x0: torch.Tensor, xt: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance of q(x_{t-1} | x_t, x_0)   (DDPM Eq. 6, 7); see
        posterior_log_variance for t = 0.
        """
        c = self._at(t, xt)
        return c["mean_x0"] * x0 + c["mean_xt"] * xt, c["posterior_log_variance"].expand_as(xt)

    # ---- p: the reverse process -----------------------------------------------------------------

    def split(self, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The model's output as (prediction, log sigma^2 or None)."""
        if self.variance != "learned":
            return output, None
        if output.shape[1] % 2:
            raise ValueError(
                f"variance='learned' needs an even number of output channels; got {output.shape[1]}"
            )
        prediction, log_variance = output.chunk(2, dim=1)
        return prediction, log_variance

    def predict_x0(
        self, xt: torch.Tensor, output: torch.Tensor, t: torch.Tensor, *, clip: bool = True
    ) -> torch.Tensor:
        """x0 as the model sees it at x_t   (DDPM Eq. 15 for eps)."""
        return reference.predict_x0(
            xt,
            self.split(output)[0],
            t,
            self.table(xt.device),
            prediction=self.prediction,
            clip=clip,
        )

    def p_mean_variance(
        self, xt: torch.Tensor, output: torch.Tensor, t: torch.Tensor, *, clip: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance of p(x_{t-1} | x_t)   (DDPM Eq. 11 as Eq. 15 then Eq. 7).

        prediction="mean": the mean is the output itself, which clipping does not touch.
        """
        prediction, log_variance = self.split(output)
        c = self._at(t, xt)
        if log_variance is None:
            log_variance = c["log_variance"].expand_as(xt)
        if self.prediction == "mean":
            return prediction.float(), log_variance.float()
        x0 = self.predict_x0(xt, output, t, clip=clip)
        return c["mean_x0"] * x0 + c["mean_xt"] * xt, log_variance.float()

    def p_step(
        self,
        xt: torch.Tensor,
        output: torch.Tensor,
        t: torch.Tensor,
        *,
        sampler: Sampler = "ddpm",
        eta: float = 0.0,
        clip: bool = True,
        **noise: Any,
    ) -> torch.Tensor:
        """x_{t-1} ~ p(x_{t-1} | x_t), Algorithm 2 line 4. noise: z=..., or seed=... and
        sample_index=...
        """
        prediction, log_variance = self.split(output)
        kind = self.prediction
        if sampler == "ddim" and kind == "mean":
            # DDIM mixes x0 and x_t with other weights than the posterior mean's: go through x0.
            x0 = self.predict_x0(xt, output, t, clip=clip)
            prediction, kind = x0, "x0"
        if sampler == "ddim":
            log_variance = None
        table = self.table(xt.device, sampler=sampler, eta=eta)
        if "z" not in noise:
            noise.setdefault("step", self.model_t(t))
        return ops.posterior_step(
            xt, prediction, t, table, clip=clip, prediction=kind, log_variance=log_variance, **noise
        )

    # ---- objectives -----------------------------------------------------------------------------

    def loss(
        self,
        model: Model,
        x0: torch.Tensor,
        *,
        t: torch.Tensor,
        flip: torch.Tensor | None = None,
        **noise: Any,
    ) -> torch.Tensor:
        """The objective for each image, (N,) float32: Eq. 14, or the term L_{t} of Eq. 5 in
        bits/dim.

        x0: (N, C, H, W) uint8 or float in [-1, 1];  t: (N,) int64;  noise: eps=..., or seed=... and
            sample_index=...
        """
        table = self.table(x0.device)
        xt, eps = ops.noise(x0, t, table, flip=flip, dtype=torch.float32, **noise)
        output = self.model_output(model, xt, t)
        if self.objective == "simple" and self.prediction == "eps":
            return (output - eps).square().mean(dim=(1, 2, 3))
        x0 = reference.to_unit(x0) if x0.dtype == torch.uint8 else x0
        if flip is not None:
            x0 = torch.where(flip[:, None, None, None], x0.flip(-1), x0)
        if self.objective == "vlb":
            return self.vlb_term(x0, xt, output, t, clip=False)
        target = x0 if self.prediction == "x0" else self.q_posterior(x0, xt, t)[0]
        return (output - target).square().mean(dim=(1, 2, 3))

    def vlb_term(
        self,
        x0: torch.Tensor,
        xt: torch.Tensor,
        output: torch.Tensor,
        t: torch.Tensor,
        *,
        clip: bool = True,
    ) -> torch.Tensor:
        """L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), or L_0 at t = 0   (DDPM Eq. 5,
        13); (N,) bits/dim.
        """
        true_mean, true_log_variance = self.q_posterior(x0, xt, t)
        mean, log_variance = self.p_mean_variance(xt, output, t, clip=clip)
        kl = 0.5 * (
            log_variance
            - true_log_variance
            + torch.expm1(true_log_variance - log_variance)
            + (true_mean - mean).square() * torch.exp(-log_variance)
        )
        nll = -ops.discretized_log_likelihood(x0, mean, 0.5 * log_variance)
        term = torch.where(t.eq(0)[:, None, None, None], nll, kl)
        return term.mean(dim=(1, 2, 3)) / math.log(2)

    def vlb_terms(
        self,
        model: Model,
        x0: torch.Tensor,
        *,
        seed: int = 0,
        sample_index: torch.Tensor | None = None,
        on_step: Callable[[], object] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Every L_{t} of Eq. 5, one draw of x_t each: (N, T) bits/dim, column 0 the decoder, and
        the (N, T) mse of x0.
        """
        n, device = x0.shape[0], x0.device
        if sample_index is None:
            sample_index = torch.arange(n, device=device)
        x0 = reference.to_unit(x0) if x0.dtype == torch.uint8 else x0
        terms = torch.empty(n, self.T, dtype=torch.float32, device=device)
        mse = torch.empty_like(terms)
        with torch.no_grad():
            for i in range(self.T):
                t = torch.full((n,), i, dtype=torch.int64, device=device)
                xt, _ = ops.noise(
                    x0,
                    t,
                    self.table(device),
                    seed=seed,
                    sample_index=sample_index,
                    step=self.model_t(t),
                )
                output = self.model_output(model, xt, t)
                terms[:, i] = self.vlb_term(x0, xt, output, t)
                mse[:, i] = (self.predict_x0(xt, output, t) - x0).square().mean(dim=(1, 2, 3))
                if on_step is not None:
                    on_step()
        return terms, mse

    def prior_kl(self, x0: torch.Tensor) -> torch.Tensor:
        """L_T = KL(q(x_T | x_0) || N(0, I))   (DDPM Eq. 5); (N,) bits/dim."""
        x0 = reference.to_unit(x0) if x0.dtype == torch.uint8 else x0
        ab = float(self.schedule.alphas_cumprod[-1])
        kl = 0.5 * (ab * x0.double().square() - ab - math.log1p(-ab))
        return (kl.mean(dim=(1, 2, 3)) / math.log(2)).float()

    # ---- helpers --------------------------------------------------------------------------------

    def _at(self, t: torch.Tensor, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """The table's columns at t by name, (N, 1, 1, 1) float32."""
        key = (str(x.device), "posterior_log_variance", 0.0)
        if key not in self._tables:
            column = torch.from_numpy(self.schedule.posterior_log_variance)
            self._tables[key] = column.to(x.device, torch.float32)
        rows = torch.cat((self.table(x.device)[t], self._tables[key][t, None]), dim=1)
        names = (*COLUMNS, "posterior_log_variance")
        return dict(zip(names, rows[:, :, None, None, None].unbind(1), strict=True))

    def _is_like(self, other: Diffusion) -> bool:
        """True for the same formulas, whatever made them."""
        mine, others = self.schedule, other.schedule
        return (
            np.array_equal(mine.betas, others.betas)
            and np.array_equal(mine.timesteps, others.timesteps)
            and (self.prediction, self.variance, self.objective, mine.full_steps)
            == (other.prediction, other.variance, other.objective, others.full_steps)
        )

    # ---- files ----------------------------------------------------------------------------------

    def to_config(self) -> dict[str, Any]:
        """JSON-ready, for `from_config`."""
        return {
            "schedule": self.schedule.to_config(),
            "prediction": self.prediction,
            "variance": self.variance,
            "loss": self.objective,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Diffusion:
        """The process that `to_config` described."""
        options = dict(config)
        if not isinstance(options.get("schedule"), dict):
            raise ValueError("diffusion: the object 'schedule' is missing")
        schedule = Schedule.from_config(options.pop("schedule"))
        try:
            return cls(schedule, **options)
        except TypeError as error:
            raise ValueError(f"diffusion: {error}") from None
