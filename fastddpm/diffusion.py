"""The diffusion process of a model: q (fixed) and p (learned) of the paper, its losses; no loops,
no files.

Every formula is an op or a line over the schedule's table. `model` is any callable (x_t, t) ->
output."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch

from fastddpm import ops, reference
from fastddpm.host import callers_level
from fastddpm.loss_weights import GAMMA, LossWeight, check_loss_weight, weights
from fastddpm.networks import check_is_network
from fastddpm.options import check_flag
from fastddpm.schedule import COLUMNS, Sampler, Schedule, Variance, check_choice
from fastddpm.spacing import Spacing
from fastddpm.wrapped import parts, unwrap

Prediction = Literal["eps", "x0", "mean", "v"]
Loss = Literal["simple", "vlb", "hybrid"]
LEARNED = ("learned", "learned_range")  # variances that the model gives
Model = Callable[..., torch.Tensor]  # (x_t, t), and what a model takes beside


class Diffusion:
    """A schedule together with what the model predicts, its variance and its objective (DDPM Table
    2).

    prediction: "eps" (Eq. 11), "x0" (Eq. 8 through Eq. 7), "v" (sqrt(abar) eps - sqrt(1 - abar) x0)
                or "mean" (the posterior mean mu-tilde)
    variance:   "fixed_large" (sigma^2 = beta), "fixed_small" (beta-tilde) or a diagonal, whose
                model has twice the channels: "learned", the second half is log sigma^2, or
                "learned_range", it is -1 for log beta-tilde, 1 for log beta, and any number for
                what lies between and beyond (Nichol & Dhariwal 2021, Eq. 15)
    loss:       "simple" (Eq. 14, mean squared error of the prediction), "vlb" (a term of Eq. 5,
                bits/dim), or "hybrid", the former plus T / 1000 times the latter, of which only
                the variance learns (improved-diffusion's rescaled)
    loss_weight: what the simple loss is multiplied with: "min_snr" with its min_snr_gamma, or (T,)
                numbers, one for each step; None: 1
    rescale_timesteps: the model gets t * 1000 / T as float32, T that of its training, not t

    A mean and a learned variance speak of one step of the chain that the model was trained with.
    For the steps of a shorter chain the mean is solved for x0 in that one, at the model's own t,
    and goes on as any x0, clipped if asked; log sigma^2 keeps its fraction of the way from
    log beta-tilde to log beta. A learned range says that fraction itself, of the shorter chain's
    own bounds, as in improved-diffusion.

    Raises ValueError for an option that is not among these, and where such a step's coefficients
    are not known: see Schedule.trained.
    """

    _warned_of_the_end = False

    def __init__(
        self,
        schedule: Schedule | None = None,
        prediction: Prediction = "eps",
        variance: Variance = "fixed_large",
        loss: Loss = "simple",
        loss_weight: LossWeight = None,
        min_snr_gamma: float = GAMMA,
        rescale_timesteps: bool = False,
    ):
        check_choice("prediction", prediction, get_args(Prediction))
        check_choice("variance", variance, get_args(Variance))
        check_choice("loss", loss, get_args(Loss))
        learned = variance in LEARNED
        if learned and loss == "simple":
            raise ValueError(
                f"variance={variance!r} needs loss='vlb' or 'hybrid': the simple loss has no "
                "gradient for it"
            )
        if loss == "hybrid" and not learned:
            raise ValueError(
                f"loss='hybrid' needs a variance that is learned, {' or '.join(map(repr, LEARNED))}"
                f": its bound teaches nothing else; got variance={variance!r}"
            )
        if not isinstance(schedule, (Schedule, type(None))):
            raise ValueError(f"schedule must be a fastddpm.Schedule; got {type(schedule).__name__}")
        self.schedule = Schedule.linear() if schedule is None else schedule
        self.prediction: Prediction = prediction
        self.variance: Variance = variance
        self.objective: Loss = loss
        self.loss_weight, self.min_snr_gamma = check_loss_weight(
            loss_weight, min_snr_gamma, self.T, prediction, loss
        )
        self.rescale_timesteps = check_flag("rescale_timesteps", rescale_timesteps)
        self._tables: dict[str, torch.Tensor] = {}
        if prediction == "mean" or variance == "learned":
            _ = self.schedule.trained

    @property
    def T(self) -> int:
        return self.schedule.T

    @property
    def learns_variance(self) -> bool:
        """Whether the model gives the variance, in as many channels again."""
        return self.variance in LEARNED

    @property
    def learned_range(self) -> bool:
        """Whether it gives it as ops.posterior_step's learned_range."""
        return self.variance == "learned_range"

    @classmethod
    def of(cls, model: Model, diffusion: Diffusion | None = None) -> Diffusion:
        """`diffusion`, else the model's own or its wrapper's network's, else the paper's.

        ValueError names what is neither a model nor a process, a model that calls one with another
        process than the paper's (what it makes of its outputs is not known), and a traced one,
        which has lost what it had.
        """
        check_is_network(model)
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

    def respace(
        self, steps: int | str | Sequence[int] | None, *, spacing: Spacing = "strided"
    ) -> Diffusion:
        """The same process over `steps` of its steps (None: all); see Schedule.respace. The noise
        of a step and what the model gets stay those of the model's own t.
        """
        schedule = self.schedule.respace(self.T if steps is None else steps, spacing=spacing)
        if schedule is self.schedule:
            return self
        weight = self.loss_weight
        if isinstance(weight, np.ndarray):
            weight = weight[np.searchsorted(self.schedule.timesteps, schedule.timesteps)]
        short = Diffusion(
            schedule, self.prediction, self.variance, self.objective,
            weight, self.min_snr_gamma, self.rescale_timesteps,
        )  # fmt: skip
        if schedule.timesteps[-1] == self.schedule.timesteps[-1]:  # it starts where this one does
            short._warned_of_the_end = self._warned_of_the_end
        return short

    def table(
        self,
        device: torch.device | str | None = None,
        *,
        sampler: Sampler = "ddpm",
        eta: float = 0.0,
    ) -> torch.Tensor:
        """The schedule's [T, K] float32 table, kept on each device it was asked for."""
        schedule, variance = self.schedule, self.variance
        return self._kept(
            f"{device} {sampler} {eta!r}",
            lambda: schedule.table(variance, sampler=sampler, eta=eta, device=device),
        )

    def warn_of_the_end(self) -> None:
        """Say once if much of the image is left in x_T, where samples start from N(0, I) alone.

        A tenth of its power is much, and a hundredth where the betas are no larger than the paper's
        for 1000 steps: these were left as they are over fewer. A chain that was made shorter is as
        good as the full one where it keeps its end. Trainers and samplers ask; a bound needs no
        word, its L_T is exact.
        """
        chain = self.schedule.full or self.schedule
        ab = float(self.schedule.alphas_cumprod[-1])
        if self._warned_of_the_end or ab <= (0.01 if chain.betas.max() <= 0.02 else 0.1):
            return
        self._warned_of_the_end = True
        warnings.warn(
            f"abar_T is {ab:.2g}: that share of an image's power is left in x_T, where sampling "
            "starts from pure noise (the paper's schedule leaves 4e-5). " + self._what_helps(chain),
            stacklevel=callers_level(),
        )

    def _what_helps(self, chain: Schedule) -> str:
        if self.schedule.timesteps[-1] != chain.timesteps[-1]:
            return f"Take a last step nearer to the model's own, {chain.timesteps[-1]}"
        return "Train with more steps, larger betas or Schedule.linear(T, scaled=True)"

    def model_t(self, t: torch.Tensor) -> torch.Tensor:
        """The step that the model was trained with for each chain index t."""
        if self.schedule.is_full:
            return t
        steps = self.schedule.timesteps
        return self._kept(
            f"{t.device} timesteps", lambda: torch.from_numpy(steps.copy()).to(t.device)
        )[t]

    def model_time(self, t: torch.Tensor) -> torch.Tensor:
        """What the model gets for each chain index t: its own step, or that times 1000 / T as
        float32 where its timesteps are rescaled (improved-diffusion's arithmetic, to the bit).
        """
        own = self.model_t(t)
        return own.float() * (1000.0 / self.schedule.full_steps) if self.rescale_timesteps else own

    def model_output(
        self, model: Callable[..., Any], xt: torch.Tensor, t: torch.Tensor, /, **model_kwargs: Any
    ) -> torch.Tensor:
        """model(x_t, its own time, **model_kwargs) at the chain indices t: (N, C, H, W) float32, or
        2C channels for a learned variance.

        diffusers' outputs are taken too: their `sample` is the tensor. Raises ValueError for any
        other shape, which could broadcast unnoticed, and for another device."""
        output = model(xt, self.model_time(t), **model_kwargs)
        output = getattr(output, "sample", output)
        channels = xt.shape[1] * (2 if self.learns_variance else 1)
        expected = (xt.shape[0], channels, *xt.shape[2:])
        if not isinstance(output, torch.Tensor) or output.shape != expected:
            got = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
            why = self._why(xt.shape, got)
            raise ValueError(
                f"the model must return a tensor of shape {expected} here; got {got}{why}"
            )
        if output.device != xt.device:
            raise ValueError(f"the model must return a tensor on {xt.device}, where x_t is; got "
                             f"one on {output.device}")  # fmt: skip
        if output.is_complex():
            raise ValueError(f"the model must return real numbers; got {output.dtype}")
        return output.float()

    def _why(self, image: torch.Size, got: Any) -> str:
        """What an output of another shape means, where only its channels are not as they should
        be."""
        n, channels, *size = image
        if got == (n, 2 * channels, *size):
            return (
                ": twice the channels are those of a learned variance, for which "
                "diffusion=fastddpm.Diffusion(..., variance='learned_range', loss='hybrid') is "
                "passed (OpenAI's networks), or variance='learned' of one that says log sigma^2"
            )
        if got == tuple(image):
            return f": with variance={self.variance!r} the model returns twice the channels"
        return ""

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
        """The model's output as (prediction, its word on the variance or None): log sigma^2, or
        where that lies in a learned range.
        """
        if not self.learns_variance:
            return output, None
        if output.shape[1] % 2:
            raise ValueError(
                f"variance={self.variance!r} needs an even number of output channels; got "
                f"{output.shape[1]}"
            )
        prediction, log_variance = output.chunk(2, dim=1)
        return prediction, log_variance

    def predict_x0(
        self, xt: torch.Tensor, output: torch.Tensor, t: torch.Tensor, *, clip: bool = True
    ) -> torch.Tensor:
        """x0 as the model sees it at x_t   (DDPM Eq. 15 for eps)."""
        mean = self.prediction == "mean"
        table = self._trained_table(xt.device) if mean else self.table(xt.device)
        prediction = self.split(output)[0]
        return reference.predict_x0(xt, prediction, t, table, prediction=self.prediction, clip=clip)

    def takes_output(self, sampler: Sampler = "ddpm") -> bool:
        """Whether ops.posterior_step takes the model's output as it is, and not as p_step has to
        translate it for another step than the one that it speaks of.
        """
        if sampler == "ddim":  # no step of any trained chain; it has a variance of its own
            return self.prediction != "mean"
        of_a_step = self.prediction == "mean" or self.variance == "learned"
        return self.schedule.is_full or not of_a_step

    def p_mean_variance(
        self, xt: torch.Tensor, output: torch.Tensor, t: torch.Tensor, *, clip: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance of p(x_{t-1} | x_t)   (DDPM Eq. 11 as Eq. 15 then Eq. 7).

        prediction="mean" over all steps: the mean is the output itself, which clipping does not
        touch.
        """
        prediction, log_variance = self.split(output)
        c = self._at(t, xt)
        if log_variance is None:
            log_variance = c["log_variance"].expand_as(xt)
        elif self.learned_range:
            log_variance = self._within_range(log_variance.float(), t)
        elif not self.takes_output():
            log_variance = self._translate(log_variance, t)
        if self.prediction == "mean" and self.takes_output():
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
        if sampler == "ddim":
            log_variance = None
        if not self.takes_output(sampler):
            if kind == "mean":
                prediction, kind = self.predict_x0(xt, output, t, clip=clip), "x0"
            if log_variance is not None and not self.learned_range:
                log_variance = self._translate(log_variance, t)
        table = self.table(xt.device, sampler=sampler, eta=eta)
        if "z" not in noise:
            noise.setdefault("step", self.model_t(t))
        return ops.posterior_step(
            xt, prediction, t, table, clip=clip, prediction=kind, log_variance=log_variance,
            learned_range=self.learned_range and log_variance is not None, **noise,
        )  # fmt: skip

    # ---- objectives -----------------------------------------------------------------------------

    def loss(
        self,
        model: Model,
        x0: torch.Tensor,
        *,
        t: torch.Tensor,
        flip: torch.Tensor | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        **noise: Any,
    ) -> torch.Tensor:
        """The objective for each image, (N,) float32: Eq. 14, the term L_{t} of Eq. 5 in bits/dim,
        or their hybrid.

        x0: (N, C, H, W) uint8 or float in [-1, 1];  t: (N,) int64;  noise: eps=..., or seed=... and
            sample_index=...;  model_kwargs: what the model takes beside x_t and t, {"y": classes}
        """
        table = self.table(x0.device)
        xt, eps = ops.noise(x0, t, table, flip=flip, dtype=torch.float32, **noise)
        output = self.model_output(model, xt, t, **(model_kwargs or {}))
        if self.objective == "simple" and self.prediction == "eps":
            return self._weighted(ops.squared_error(output, eps), t)
        x0 = reference.to_unit(x0) if x0.dtype == torch.uint8 else x0
        if flip is not None:
            x0 = torch.where(flip[:, None, None, None], x0.flip(-1), x0)
        if self.objective == "vlb":
            return self.vlb_term(x0, xt, output, t, clip=False)
        prediction, variance = self.split(output)
        target = self._target(x0, xt, eps, t)
        simple = self._weighted(ops.squared_error(prediction, target), t)
        if self.objective == "simple":
            return simple
        assert variance is not None
        of_variance = torch.cat((prediction.detach(), variance), dim=1)
        return simple + self.T / 1000 * self.vlb_term(x0, xt, of_variance, t, clip=False)

    def _target(
        self, x0: torch.Tensor, xt: torch.Tensor, eps: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        """What the model is to predict at x_t."""
        if self.prediction == "eps":
            return eps
        if self.prediction == "x0":
            return x0
        if self.prediction == "v":
            c = _rows(self.table(x0.device), COLUMNS, t)
            return c["sqrt_ab"] * eps - c["sqrt_1m_ab"] * x0
        # q_posterior's, over the chain that the model speaks of
        c = _rows(self._trained_table(x0.device), COLUMNS, t)
        return c["mean_x0"] * x0 + c["mean_xt"] * xt

    def _weighted(self, loss: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The simple loss (N,) times the weights of its steps."""
        if self.loss_weight is None:
            return loss

        def make() -> torch.Tensor:
            given = weights(self.loss_weight, self.min_snr_gamma, self.schedule, self.prediction)
            return torch.tensor(given, dtype=torch.float32, device=loss.device)

        return loss * self._kept(f"{loss.device} loss_weight {self.prediction}", make)[t]

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
        kl = gaussian_kl(true_mean, true_log_variance, mean, log_variance)
        nll = -ops.discretized_log_likelihood(x0, mean, 0.5 * log_variance)
        term = torch.where(t.eq(0)[:, None, None, None], nll, kl)
        return term.mean(dim=(1, 2, 3)) / math.log(2)

    @torch.no_grad()
    def bound_term(
        self,
        x0: torch.Tensor,
        xt: torch.Tensor,
        output: torch.Tensor,
        t: torch.Tensor,
        *,
        clip: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(vlb_term, the mse of the x0 prediction), (N,) float32, in one pass and in float64: what
        likelihoods are made of. No gradients. x0: uint8 or float in [-1, 1]; see ops.vlb_term.
        """
        prediction, log_variance = self.split(output)
        kind, learned_range = self.prediction, self.learned_range
        if not self.takes_output():
            if kind == "mean":
                prediction, kind = self.predict_x0(xt, output, t, clip=clip), "x0"
            if log_variance is not None and not learned_range:
                log_variance = self._translate(log_variance, t)
        return ops.vlb_term(
            x0, xt, prediction, t, self.table(x0.device), self._log_ratio(x0.device),
            clip=clip, prediction=kind, log_variance=log_variance, learned_range=learned_range,
        )  # fmt: skip

    def vlb_terms(
        self,
        model: Model,
        x0: torch.Tensor,
        *,
        seed: int = 0,
        sample_index: torch.Tensor | None = None,
        on_step: Callable[[], object] | None = None,
        clip: bool = True,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Every L_{t} of Eq. 5, one draw of x_t each: (N, T) bits/dim, column 0 the decoder, and
        the (N, T) mse of x0, which is clipped or not.
        """
        n, device = x0.shape[0], x0.device
        if sample_index is None:
            sample_index = torch.arange(n, device=device)
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
                    keep_eps=False,
                )
                output = self.model_output(model, xt, t, **(model_kwargs or {}))
                terms[:, i], mse[:, i] = self.bound_term(x0, xt, output, t, clip=clip)
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
        """The table's columns at t by name, and log beta-tilde: (N, 1, 1, 1) float32."""

        def make() -> torch.Tensor:
            column = torch.from_numpy(self.schedule.posterior_log_variance)[:, None]
            return torch.cat((self.table(x.device), column.to(x.device, torch.float32)), dim=1)

        rows = self._kept(f"{x.device} posterior_log_variance", make)
        return _rows(rows, (*COLUMNS, "posterior_log_variance"), t)

    def _log_ratio(self, device: torch.device) -> torch.Tensor:
        """(T,) float32, see Schedule.log_variance_ratio."""
        ratio = self.schedule.log_variance_ratio
        return self._kept(
            f"{device} log_ratio",
            lambda: torch.from_numpy(ratio(self.variance)).to(device, torch.float32),
        )

    def _trained_table(self, device: torch.device) -> torch.Tensor:
        """The table of the chain that the model was trained with, at the steps of this one."""
        if self.schedule.is_full:
            return self.table(device)
        full, steps = self.schedule.trained, self.schedule.timesteps
        return self._kept(
            f"{device} trained",
            lambda: torch.from_numpy(full.table(self.variance).numpy()[steps]).to(device),
        )

    def _translate(self, log_variance: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """log sigma^2 of this chain's step, at the fraction of the way between its bounds at which
        the model's is between those of its own step: see Schedule.learned_variance.

        What the model's is beyond a bound is added as it is, not as a fraction. For most t the
        bounds lie closer (1e-6 to 0.01) than a network is exact, and this chain's up to a hundred
        times farther apart: an error of 0.01 would become any variance.
        """
        device, learned_variance = log_variance.device, self.schedule.learned_variance
        table = self._kept(
            f"{device} learned",
            lambda: torch.from_numpy(learned_variance()).to(device, torch.float32),
        )
        first, way, lower, scale = _rows(table, ("first", "way", "lower", "scale"), t).values()
        between = torch.maximum(torch.minimum(log_variance, first + way), first)
        return lower + scale * (between - first) + (log_variance - between)

    def _within_range(self, word: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """log sigma^2 = f log beta + (1 - f) log beta-tilde, f = (word + 1) / 2, of this chain; log
        beta-tilde copies t = 1 at t = 0.
        """
        table = self._kept(
            f"{word.device} range",
            lambda: torch.from_numpy(np.stack(self.schedule.log_variance_bounds(), axis=1)).to(
                word.device, torch.float32
            ),
        )
        lower, way = _rows(table, ("lower", "way"), t).values()
        return lower + (0.5 * word + 0.5) * way

    def _kept(self, key: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """make(), called once a key: a tensor that later gradients can go through, whatever the
        mode of the first call.
        """
        if key not in self._tables:
            with torch.inference_mode(False):
                self._tables[key] = make()
        return self._tables[key]

    def _is_like(self, other: Diffusion) -> bool:
        """True for the same formulas, whatever made them."""
        mine, others = self.schedule, other.schedule
        return (
            np.array_equal(mine.betas, others.betas)
            and np.array_equal(mine.timesteps, others.timesteps)
            and np.array_equal(self.loss_weight, other.loss_weight)  # type: ignore[arg-type]
            and (self.prediction, self.variance, self.objective, mine.full_steps)
            == (other.prediction, other.variance, other.objective, others.full_steps)
            and (self.min_snr_gamma, self.rescale_timesteps)
            == (other.min_snr_gamma, other.rescale_timesteps)
        )

    # ---- files ----------------------------------------------------------------------------------

    def to_config(self) -> dict[str, Any]:
        """JSON-ready, for `from_config`; what few processes have stands there if this one has."""
        config: dict[str, Any] = {
            "schedule": self.schedule.to_config(),
            "prediction": self.prediction,
            "variance": self.variance,
            "loss": self.objective,
        }
        if self.loss_weight is not None:
            if isinstance(self.loss_weight, str):
                config["loss_weight"] = self.loss_weight
                config["min_snr_gamma"] = self.min_snr_gamma
            else:
                config["loss_weight"] = self.loss_weight.tolist()
        if self.rescale_timesteps:
            config["rescale_timesteps"] = True
        return config

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


def _rows(table: torch.Tensor, names: tuple[str, ...], t: torch.Tensor) -> dict[str, torch.Tensor]:
    """The columns at t by name, (N, 1, 1, 1)."""
    return dict(zip(names, table[t][:, :, None, None, None].unbind(1), strict=True))


def gaussian_kl(
    mean: torch.Tensor,
    log_variance: torch.Tensor,
    other_mean: torch.Tensor,
    other_log_variance: torch.Tensor,
) -> torch.Tensor:
    """KL(N(mean, exp(log_variance)) || the other), elementwise, nats."""
    return 0.5 * (
        other_log_variance
        - log_variance
        + torch.expm1(log_variance - other_log_variance)
        + (mean - other_mean).square() * torch.exp(-other_log_variance)
    )
