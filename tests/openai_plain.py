"""improved- and guided-diffusion's process as plain float64 formulas: the oracle of its tests."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


class Plain:
    """mean: "PREVIOUS_X", "START_X", "EPSILON"; variance and loss: names of their enums. steps, T:
    the model's own steps of a shorter chain. Noise is drawn in float32, all else float64.
    """

    def __init__(self, betas, mean, variance, loss, *, rescale=False, steps=None, T=None, cdf=None):
        self.mean, self.variance, self.loss, self.rescale = mean, variance, loss, rescale
        self.beta = torch.tensor(np.asarray(betas), dtype=torch.float64)
        self.T, self.steps, self.own_T = len(self.beta), steps, T or len(self.beta)
        self.ab = torch.cumprod(1 - self.beta, 0)
        self.prev = torch.cat((torch.ones(1).double(), self.ab[:-1]))
        self.next = torch.cat((self.ab[1:], torch.zeros(1).double()))
        self.tilde = self.beta * (1 - self.prev) / (1 - self.ab)
        self.log_tilde = torch.log(torch.cat((self.tilde[1:2], self.tilde[1:])))
        self.cdf = cdf or (lambda u: 0.5 * torch.special.erfc(-u / math.sqrt(2)))

    def time(self, t: Tensor) -> Tensor:
        own = t if self.steps is None else torch.tensor(self.steps)[t]
        return own.float() * (1000.0 / self.own_T) if self.rescale else own

    def call(self, model, x, t, kwargs):
        return model(x.float(), self.time(t), **kwargs).double()

    def q(self, x0, t, noise):
        ab = at(self.ab, t, x0)
        return ab.sqrt() * x0.double() + (1 - ab).sqrt() * noise.double()

    def posterior(self, x0, xt, t):
        ab, prev, beta = (at(v, t, xt) for v in (self.ab, self.prev, self.beta))
        left = (1 - prev) * (1 - beta).sqrt() / (1 - ab)
        return beta * prev.sqrt() / (1 - ab) * x0.double() + left * xt.double()

    def p(self, model, x, t, clip=True, denoised_fn=None, kwargs=None):
        x = x.double()
        output = self.call(model, x, t, kwargs or {})
        log_beta, log_tilde = at(self.beta.log(), t, x), at(self.log_tilde, t, x)
        if self.variance.startswith("LEARNED"):
            output, word = output.chunk(2, 1)
            f = (word + 1) / 2
            ranged = f * log_beta + (1 - f) * log_tilde
            log_variance = word if self.variance == "LEARNED" else ranged
            variance = log_variance.exp()
        elif self.variance == "FIXED_LARGE":
            log_variance = torch.where(at(torch.arange(self.T), t, x) == 0, log_tilde, log_beta)
            variance = log_variance.exp()
        else:
            log_variance, variance = log_tilde, at(self.tilde, t, x)
        ab = at(self.ab, t, x)
        if self.mean == "EPSILON":
            x0 = (x - (1 - ab).sqrt() * output) / ab.sqrt()
        elif self.mean == "START_X":
            x0 = output
        else:  # the mean is c1 x0 + c2 x
            unit, none = torch.ones_like(x), torch.zeros_like(x)
            c1, c2 = self.posterior(unit, none, t), self.posterior(none, unit, t)
            x0 = (output - c2 * x) / c1
        x0 = x0 if denoised_fn is None else denoised_fn(x0)
        x0 = x0.clamp(-1, 1) if clip else x0
        mean = output if self.mean == "PREVIOUS_X" else self.posterior(x0, x, t)
        return {
            "mean": mean, "variance": variance.expand_as(x),
            "log_variance": log_variance.expand_as(x), "pred_xstart": x0,
        }  # fmt: skip

    def eps(self, x0, xt, t):
        ab = at(self.ab, t, xt)
        return (xt - ab.sqrt() * x0) / (1 - ab).sqrt()

    def step(self, model, x, t, *, clip=True, denoised_fn=None, cond_fn=None, kwargs=None):
        out = self.p(model, x, t, clip, denoised_fn, kwargs)
        z, mean = torch.randn_like(x.float()).double(), out["mean"]
        if cond_fn is not None:
            gradient = cond_fn(x.float(), self.time(t), **(kwargs or {})).double()
            mean = mean + out["variance"] * gradient
        noisy = at(torch.arange(self.T) > 0, t, x)
        return mean + noisy * (0.5 * out["log_variance"]).exp() * z, out["pred_xstart"]

    def ddim(self, model, x, t, *, clip=True, denoised_fn=None, cond_fn=None, kwargs=None, eta=0.0):
        x0 = self.p(model, x, t, clip, denoised_fn, kwargs)["pred_xstart"]
        ab, prev = at(self.ab, t, x), at(self.prev, t, x)
        eps = self.eps(x0, x, t)
        if cond_fn is not None:
            gradient = cond_fn(x.float(), self.time(t), **(kwargs or {})).double()
            eps = eps - (1 - ab).sqrt() * gradient
            x0 = (x - (1 - ab).sqrt() * eps) / ab.sqrt()
        sigma = eta * ((1 - prev) / (1 - ab)).sqrt() * (1 - ab / prev).sqrt()
        z = torch.randn_like(x.float()).double()
        return prev.sqrt() * x0 + (1 - prev - sigma**2).sqrt() * eps + sigma * z, x0

    def reverse(self, model, x, t, **options):
        x0 = self.p(model, x, t, **options)["pred_xstart"]
        after = at(self.next, t, x)
        return after.sqrt() * x0 + (1 - after).sqrt() * self.eps(x0, x, t), x0

    def chain(self, step, model, shape, **options):
        x = torch.randn(shape).double()
        for i in reversed(range(self.T)):
            x, _ = step(model, x, torch.full(shape[:1], i), **options)
        return x

    def bound(self, model, x0, xt, t, clip=True, kwargs=None):
        out = self.p(model, xt, t, clip, kwargs=kwargs)
        mean, log_variance = out["mean"], out["log_variance"]
        true, log_true = self.posterior(x0, xt, t), at(self.log_tilde, t, xt)
        off = (true - mean) ** 2 * (-log_variance).exp()
        kl = 0.5 * (log_variance - log_true - 1 + (log_true - log_variance).exp() + off)
        x, s = x0.double(), (-0.5 * log_variance).exp()
        upper, lower = self.cdf(s * (x - mean + 1 / 255)), self.cdf(s * (x - mean - 1 / 255))
        upper, lower = torch.where(x > 0.999, 1, upper), torch.where(x < -0.999, 0, lower)
        nll = -(upper - lower).clamp(min=1e-12).log()
        first = at(torch.arange(self.T) == 0, t, xt)
        bits = flat(torch.where(first, nll, kl)) / math.log(2)
        return bits, out["pred_xstart"]

    def losses(self, model, x0, t, noise, kwargs=None):
        kwargs = kwargs or {}
        xt = self.q(x0, t, noise)
        if self.loss.endswith("KL"):
            bits = self.bound(model, x0, xt, t, clip=False, kwargs=kwargs)[0]
            return {"loss": bits * (self.T if self.loss == "RESCALED_KL" else 1)}
        terms, output = {}, self.call(model, xt, t, kwargs)
        if self.variance.startswith("LEARNED"):
            output, word = output.chunk(2, 1)
            said = torch.cat((output.detach(), word), 1)
            bits = self.bound(lambda *_: said, x0, xt, t, clip=False)[0]
            terms["vb"] = bits * (self.T / 1000 if self.loss == "RESCALED_MSE" else 1)
        target = {"EPSILON": noise, "START_X": x0, "PREVIOUS_X": self.posterior(x0, xt, t)}
        terms["mse"] = flat((output - target[self.mean].double()) ** 2)
        terms["loss"] = terms["mse"] + terms.get("vb", 0)
        return terms

    def bpd(self, model, x0, clip=True, kwargs=None):
        rows = []
        for i in reversed(range(self.T)):
            t, noise = torch.full(x0.shape[:1], i), torch.randn_like(x0)
            xt = self.q(x0, t, noise)
            bits, x = self.bound(model, x0, xt, t, clip, kwargs)
            rows.append((bits, flat((x - x0) ** 2), flat((self.eps(x, xt, t) - noise) ** 2)))
        vb, xstart_mse, mse = (torch.stack(column, 1) for column in zip(*rows, strict=True))
        ab = self.ab[-1]
        prior = flat(0.5 * (ab * x0.double() ** 2 - ab - torch.log1p(-ab))) / math.log(2)
        return {
            "total_bpd": vb.sum(1) + prior, "prior_bpd": prior,
            "vb": vb, "xstart_mse": xstart_mse, "mse": mse,
        }  # fmt: skip


def at(values: Tensor, t: Tensor, x: Tensor) -> Tensor:
    return values[t].reshape(-1, *[1] * (x.dim() - 1))


def flat(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)


def tanh_cdf(u: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
