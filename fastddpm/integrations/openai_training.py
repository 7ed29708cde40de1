"""The losses and the bound of improved- and guided-diffusion's GaussianDiffusion."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastddpm import ops
from fastddpm.diffusion import gaussian_kl
from fastddpm.integrations.images import compute_dtype
from fastddpm.integrations.openai_process import Process


class Training(Process):
    """Their training_losses and calc_bpd_loop, and what these are made of. Bits are per dimension:
    means over an image's elements.
    """

    def training_losses(
        self,
        model: Callable[..., Any],
        x_start: Tensor,
        t: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """ "loss" of each image, (N,), and the parts it is the sum of, "mse" and "vb".

        x_start: (N, C, ...) in [-1, 1];  noise: like x_start, by default torch.randn_like of it
        """
        t = self._t(t, x_start, "x_start")
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise=noise)
        kind, T = self.loss_type.name, self.num_timesteps
        if kind in ("KL", "RESCALED_KL"):
            bound = self._vb_terms_bpd(
                model, x_start, x_t, t, clip_denoised=False, model_kwargs=model_kwargs
            )["output"]
            return {"loss": bound * T if kind == "RESCALED_KL" else bound}
        output, word = self._output(model, x_t, t, model_kwargs)
        terms = {}
        if word is not None:  # the bound teaches the variance alone
            said = torch.cat((output.detach(), word), dim=1)
            bound = self._vb_terms_bpd(lambda *_, **__: said, x_start, x_t, t, clip_denoised=False)[
                "output"
            ]
            terms["vb"] = bound * (T / 1000) if kind == "RESCALED_MSE" else bound
        target = {
            "eps": lambda: noise,
            "x0": lambda: x_start,
            "mean": lambda: self.q_posterior_mean_variance(x_start, x_t, t)[0],
        }[self._prediction]()
        dtype = compute_dtype(output, target)
        if dtype == torch.float64:
            output, target = output.double(), target.double()
        terms["mse"] = ops.squared_error(output, target)
        terms["loss"] = terms["mse"] + terms["vb"] if "vb" in terms else terms["mse"]
        return terms

    def _vb_terms_bpd(
        self,
        model: Callable[..., Any],
        x_start: Tensor,
        x_t: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """ "output": L_{t-1} of Eq. 5, or the decoder's L_0 at t = 0, (N,) bits; "pred_xstart"."""
        t = self._t(t, x_t, "x_t")
        mean, _, log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        out = self.p_mean_variance(
            model, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs
        )
        kl = gaussian_kl(mean, log_variance, out["mean"], out["log_variance"])
        nll = -self._log_likelihood(x_start, out["mean"], 0.5 * out["log_variance"])
        bits = torch.where(t.eq(0), _bits(nll), _bits(kl))
        return {"output": bits, "pred_xstart": out["pred_xstart"]}

    def _log_likelihood(self, x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
        if self.likelihood == "exact":
            return ops.discretized_log_likelihood(x, mean, log_scale)
        return _tanh_log_likelihood(x, mean, log_scale)

    def _prior_bpd(self, x_start: Tensor) -> Tensor:
        """L_T = KL(q(x_T | x_0) || N(0, I)) in bits, (N,)."""
        t = torch.full(
            x_start.shape[:1], self.num_timesteps - 1, dtype=torch.int64, device=x_start.device
        )
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        zero = torch.zeros_like(log_variance)
        return _bits(gaussian_kl(mean, log_variance, zero, zero))

    def calc_bpd_loop(
        self,
        model: Callable[..., Any],
        x_start: Tensor,
        clip_denoised: bool = True,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """The whole bound in bits: "total_bpd" and "prior_bpd" (N,), "vb" (N, T), and the squared
        errors of x0 and eps, "xstart_mse" and "mse" (N, T). Columns go from t = T - 1 down to 0.
        """
        columns: dict[str, list[Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
        with torch.no_grad():
            for i in range(self.num_timesteps - 1, -1, -1):
                t = torch.full(x_start.shape[:1], i, dtype=torch.int64, device=x_start.device)
                noise = torch.randn_like(x_start)
                x_t = self.q_sample(x_start, t, noise=noise)
                out = self._vb_terms_bpd(
                    model, x_start, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs
                )
                x0 = out["pred_xstart"]
                eps = self._predict_eps_from_xstart(x_t, t, x0)
                columns["vb"].append(out["output"])
                columns["xstart_mse"].append(_squared_error(x0, x_start))
                columns["mse"].append(_squared_error(eps, noise))
            tables = {name: torch.stack(column, dim=1) for name, column in columns.items()}
            prior = self._prior_bpd(x_start)
        return {"total_bpd": tables["vb"].sum(dim=1) + prior, "prior_bpd": prior, **tables}


def _bits(nats: Tensor) -> Tensor:
    """The mean over each image's elements, in bits."""
    return nats.flatten(1).mean(dim=1) / math.log(2)


def _squared_error(x: Tensor, y: Tensor) -> Tensor:
    dtype = compute_dtype(x, y)
    return ops.squared_error(x.to(dtype), y.to(dtype))


def _tanh_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Eq. 13 with the normal's distribution function as (1 + tanh(sqrt(2 / pi) (u + 0.044715
    u^3))) / 2 and no mass below 1e-12, which is what their numbers and the paper's code hold.
    """
    dtype = compute_dtype(x, mean)
    distance, scale = x.to(dtype) - mean, torch.exp(-log_scale)

    def below(edge: float) -> Tensor:
        u = scale * (distance + edge)
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))

    upper, lower = below(1 / 255), below(-1 / 255)
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()
