"""Which terms of the bound an image is asked for where not all are: strata of equal weight over the
steps, after the weights of a pilot. No models."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fastddpm import ops
from fastddpm.options import check_integer, shown

LEAST = 3  # L_0 and two strata, which an error bar needs
PILOT_IMAGES, PILOT_TERMS = 8, 32
SHARED = 0.1  # of the draws that fall evenly on all steps, whatever the pilot saw
WORDS = 2**31 - 1  # that a uniform number is one of
LAST_STEP = 2**32 - 1  # of the RNG contract: no chain is as long, so that no noise has these words


def check_terms(terms: object, T: int) -> int | None:
    """K, or None for all T; ValueError for a number that can't be."""
    if terms is None:
        return None
    if T < LEAST:
        raise ValueError(f"terms needs a chain of {LEAST} steps or more; got {shown(terms)} of {T}")
    if check_integer("terms", terms, LEAST) > T:
        raise ValueError(f"terms must be in {LEAST} .. {T}, the steps of the chain; got {terms}")
    return int(terms)  # type: ignore[call-overload]


def pilot_terms(T: int) -> np.ndarray:
    """The chain indices that a pilot looks at: evenly spaced in log(t + 1)."""
    at = np.exp(np.linspace(0, np.log(T), min(PILOT_TERMS, T))) - 1
    return np.unique(np.clip(np.rint(at), 0, T - 1).astype(np.int64))


def pilot_images(n: int) -> np.ndarray:
    """The images of n that it looks at."""
    count = min(PILOT_IMAGES, n)
    return np.arange(count) * n // count


def weights(grid: np.ndarray, terms: np.ndarray, T: int) -> np.ndarray:
    """sqrt(E L_t^2) at each step, (T,), from the terms (images, len(grid)) of a pilot: a straight
    line between two of its steps, of logarithms against log(t + 1)."""
    seen = np.sqrt(np.square(terms.astype(np.float64)).mean(axis=0))
    seen = np.log(np.maximum(seen, 1e-12))
    return np.exp(np.interp(np.log1p(np.arange(T)), np.log1p(grid), seen))


@dataclass(frozen=True)
class Strata:
    """K of T terms for each image.

    certain: chain indices that every image is asked for: 0, and those of which even shares of the
             weight would ask once or more
    others:  the rest, of which `draws` are drawn with probabilities p, one a stratum
    """

    T: int
    certain: np.ndarray
    others: np.ndarray
    p: np.ndarray
    draws: int

    @classmethod
    def of(cls, weights: np.ndarray, K: int) -> Strata:
        T = len(weights)
        certain = np.zeros(T, dtype=bool)
        certain[0] = True
        while True:
            draws, others = K - int(certain.sum()), np.flatnonzero(~certain)
            if draws >= len(others):
                every = np.arange(T)
                return cls(T, every, every[:0], np.zeros(0), 0)
            share = weights[others] / weights[others].sum()
            p = (1 - SHARED) * share + SHARED / len(others)
            more = others[draws * p >= 1]
            more = more[: draws - 2]  # two strata are left for the error bar
            if not len(more):
                return cls(T, np.flatnonzero(certain), others, p / p.sum(), draws)
            certain[more] = True

    def drawn(self, seed: int, index: torch.Tensor) -> torch.Tensor:
        """The chain indices of the images `index`, (N, draws) int64: u = (k + U) / draws in the
        k-th stratum of the distribution, U of the RNG contract: (seed, index, k) say which."""
        edges = torch.from_numpy(np.cumsum(self.p)[:-1]).to(index.device)
        others = torch.from_numpy(self.others).to(index.device)
        steps = []
        for k in range(self.draws):
            word, _ = ops.choices(index, seed=seed, step=LAST_STEP - k, levels=WORDS)
            u = (k + (word.double() + 0.5) / WORDS) / self.draws
            steps.append(others[torch.searchsorted(edges, u, right=True)])
        return torch.stack(steps, dim=1) if steps else index.new_empty((len(index), 0))

    def estimate(
        self, certain: torch.Tensor, drawn: torch.Tensor, steps: torch.Tensor
    ) -> torch.Tensor:
        """An unbiased estimate of all columns, (N, T) float64, from those that are certain and what
        was drawn at `steps` (N, draws): each of it over its expected number of draws."""
        n = len(certain)
        all_columns = certain.new_zeros((n, self.T), dtype=torch.float64)
        all_columns[:, torch.from_numpy(self.certain)] = certain.double()
        if self.draws:
            all_columns.scatter_add_(1, steps, self.expanded(drawn, steps) / self.draws)
        return all_columns

    def expanded(self, drawn: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """What was drawn over its probability: each row an estimate of the sum over `others`."""
        p = np.ones(self.T)
        p[self.others] = self.p
        return drawn.double() / torch.from_numpy(p).to(drawn.device)[steps]

    def error(self, drawn: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """The standard error of each image's sum over the draw of its steps, (N,) float64: strata
        two by two, of an odd number the last three, by g / (g - 1) times their squared distances
        from their mean. What strata differ by is counted in: it is too large rather than too small.
        """
        x = self.expanded(drawn, steps) / max(self.draws, 1)
        total = x.new_zeros(len(x))
        first = 0
        while first < self.draws:
            g = 3 if self.draws - first == 3 else 2
            group = x[:, first : first + g]
            total += g / (g - 1) * (group - group.mean(1, keepdim=True)).square().sum(1)
            first += g
        return total.sqrt()
