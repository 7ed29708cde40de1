"""The grids that latents are coded on, and the distributions of a chain as the coder takes them. No
coding, no network.

Latent x_t lies on the points k 2^e_t, the widest with 16 points or more to each standard deviation
that it is coded with: sqrt(beta_t) when it is drawn, sqrt(beta-tilde_{t+1}) when it is predicted.
All that is computed here is computed by IEEE additions, products, quotients and square roots, of
tables whose digest a file names: the same bits on every machine."""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
import torch

from fastddpm import _native
from fastddpm.diffusion import Diffusion
from fastddpm.schedule import COLUMNS

FINENESS = 16.0  # points to a standard deviation, at the least
FINEST = -20  # exponent: |x| < 16 is exact in float32
LOG_VARIANCE = COLUMNS.index("log_variance")
GAUSSIAN_BITS = 0.5 * math.log2(2 * math.pi * math.e)  # of N(0, 1)


class Grids:
    """A chain for the coder.

    exponents: e_t of each latent;  T: their number
    digest:    of all tables that a coded bit depends on
    """

    def __init__(self, diffusion: Diffusion):
        self.diffusion, self.T = diffusion, diffusion.T
        schedule = diffusion.schedule
        self.exponents = exponents(schedule.betas, schedule.posterior_variance)
        self._decay = torch.from_numpy(np.sqrt(schedule.alphas).astype(np.float32))
        self._log_beta = np.log(schedule.betas).astype(np.float32)
        self._log_variance = diffusion.table("cpu")[:, LOG_VARIANCE].tolist()

    def forward(self, previous: torch.Tensor, i: int) -> tuple[torch.Tensor, float]:
        """Mean and log-variance of q(x_t | x_{t-1}), Eq. 2, at chain index i."""
        return previous * self._decay[i], float(self._log_beta[i])

    def reverse(
        self, xt: torch.Tensor, output: torch.Tensor, i: int
    ) -> tuple[torch.Tensor, torch.Tensor | float]:
        """The same of p(x_{t-1} | x_t), Eq. 11, of what the model said of x_t: the clipped one that
        `bits_per_dim` measures."""
        t = torch.full((len(xt),), i, dtype=torch.int64, device="cpu")
        mean, log_variance = self.diffusion.p_mean_variance(xt, output, t)
        if self.diffusion.learns_variance:
            return mean, log_variance
        return mean, self._log_variance[i]

    @property
    def bits_in_flight(self) -> float:
        """An upper estimate of the bits that a dimension takes from the stack before it has given
        back as many: what is drawn less what is predicted, for predictions that cost nothing."""
        beta, variance = self.diffusion.schedule.betas, np.exp(self._log_variance)
        drawn = 0.5 * np.log2(beta) - self.exponents + GAUSSIAN_BITS
        given = 0.5 * np.log2(variance[1:]) - self.exponents[:-1] + GAUSSIAN_BITS
        in_flight = np.cumsum(drawn) - np.concatenate(([0.0], np.cumsum(given)))
        return max(1.0, float(np.max(in_flight)))

    @property
    def digest(self) -> str:
        diffusion, native = self.diffusion, _native.C
        assert native is not None
        schedule = diffusion.schedule
        said = [diffusion.prediction, diffusion.variance, diffusion.rescale_timesteps]
        digest = hashlib.sha256(json.dumps([said, self.exponents]).encode())
        tables = [schedule.timesteps, self._decay.numpy(), self._log_beta]
        tables.append(diffusion.table("cpu").numpy())
        if diffusion.learns_variance:
            tables += [x.astype(np.float32) for x in schedule.log_variance_bounds()]
        if diffusion.variance == "learned":
            tables.append(schedule.learned_variance().astype(np.float32))
        if diffusion.prediction == "mean":
            trained = schedule.trained.table(diffusion.variance)
            tables.append(trained.numpy()[schedule.timesteps])
        for table in tables:
            digest.update(np.ascontiguousarray(table).tobytes())
        digest.update(native.codec.tail_table())
        return digest.hexdigest()[:12]


def exponents(betas: np.ndarray, posterior_variance: np.ndarray) -> list[int]:
    """e_t = floor(log2(sigma / 16)), sigma = min(sqrt(beta_t), sqrt(beta-tilde_{t+1})), -20 at the
    least. x_T is predicted by N(0, 1), which is wider."""
    sigma = np.sqrt(np.minimum(betas, np.append(posterior_variance[1:], 1.0)))
    return [max(FINEST, math.frexp(s / FINENESS)[1] - 1) for s in sigma.tolist()]
