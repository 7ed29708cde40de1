"""Progressive coding as the paper measures it (DDPM Section 4.3, Table 4, Figure 5): what is known
of an image, and how many bits that took, after each step of the reverse process. No models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tabulate import tabulate

if TYPE_CHECKING:
    from fastddpm.evaluation.bound import Bound

TABLE_ROWS = 10  # of Table 4
LEVELS = 127.5  # of the scale [0, 255] in one of [-1, 1]


@dataclass(frozen=True)
class RateDistortion:
    """Rate and distortion by reverse process time, each (T,) float64, of time 1 .. T.

    At time r = T - t (t 0-based; the paper's T - t + 1) the receiver has x_t of Algorithm 4:

        rate[r - 1]       = L_T + sum of L_s over s = t + 1 .. T - 1, bits/dim
        distortion[r - 1] = 127.5 sqrt(E |x0 - x0_hat(x_t)|^2 / D), RMSE on the scale [0, 255]

    So the rate at time 1 is the prior's term alone, and at time T all but L_0, which is what the
    image itself costs where x_0 is sent after x_1 (the paper's "distortion" half of its bits).

    decoder: L_0, bits/dim; lossless, all of the bound, is rate[-1] + decoder
    n:       images that these are means of"""

    rate: np.ndarray
    distortion: np.ndarray
    decoder: float
    n: int

    @property
    def T(self) -> int:
        return len(self.rate)

    @property
    def time(self) -> np.ndarray:
        """Reverse process time, 1 .. T."""
        return np.arange(1, self.T + 1)

    @property
    def lossless(self) -> float:
        return float(self.rate[-1]) + self.decoder

    def rows(self, count: int = TABLE_ROWS) -> list[tuple[int, float, float]]:
        """(reverse process time, rate, distortion), the last time first, as the paper prints them:
        of 1000 steps the times 1000, 900 .. 100, and as evenly of another number."""
        count = min(count, self.T)
        times = [self.T * k // count for k in range(count, 0, -1)]
        return [(r, float(self.rate[r - 1]), float(self.distortion[r - 1])) for r in times]

    def table(self) -> str:
        """Table 4."""
        lines = [(str(r), f"{rate:.5f}", f"{rmse:.5f}") for r, rate, rmse in self.rows()]
        headers = ("reverse process time (T - t)", "rate (bits/dim)", "distortion (RMSE, 0..255)")
        return tabulate(lines, headers=headers, disable_numparse=True, stralign="right")

    def to_json(self) -> dict[str, Any]:
        """The curves, and Table 4's rows as the paper prints them."""
        names = ("reverse process time", "rate", "distortion")
        return {
            "n": self.n,
            "units": {"rate": "bits/dim", "distortion": "RMSE on the scale [0, 255]"},
            "table": [dict(zip(names, row, strict=True)) for row in self.rows()],
            "rate": self.rate.tolist(),
            "distortion": self.distortion.tolist(),
            "decoder": self.decoder,
            "lossless": self.lossless,
        }


def rate_distortion(bound: Bound) -> RateDistortion:
    """Table 4 and Figure 5 of a data set's bound: means over its images; the distortion is the root
    of the mean squared error of all their pixels.

    ValueError for a bound of some terms: an image's error at a step that it was not asked for is
    not known."""
    if bound.sampled is not None:
        raise ValueError(
            f"of {bound.sampled} of {bound.T} terms there is no distortion at every step: give all"
        )
    terms, mse = (np.asarray(values, np.float64) for values in (bound.terms, bound.mse))
    if terms.shape != (bound.T,) or mse.shape != (bound.T,):
        got = f"{terms.shape}, {mse.shape}"
        raise ValueError(f"terms and mse must be (T,) = ({bound.T},); got {got}")
    received = np.concatenate(([float(bound.prior)], terms[:0:-1]))  # L_T, L_{T-1} .. L_1
    distortion = LEVELS * np.sqrt(mse[::-1])
    return RateDistortion(np.cumsum(received), distortion, float(terms[0]), bound.n)
