"""Weights of the simple loss by step: what a loss is multiplied with at each t of a chain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from fastddpm.options import check_number, shown
from fastddpm.schedule import Schedule

LossWeight = Literal["min_snr"] | Sequence[float] | np.ndarray | torch.Tensor | None
Checked = Literal["min_snr"] | np.ndarray | None
GAMMA = 5.0  # of min-SNR, the authors' choice


def check_loss_weight(
    given: Any, gamma: Any, T: int, prediction: str, loss: str
) -> tuple[Checked, float]:
    """(None, "min_snr" or (T,) float64; gamma), if they are such and fit what is predicted;
    ValueError names what is not.
    """
    gamma = check_number("min_snr_gamma", gamma, lambda x: 0 < x < np.inf, "above 0")
    named = isinstance(given, str)
    if named and given != "min_snr":
        raise ValueError(
            f"loss_weight must be None, 'min_snr' or a number for each step; got {shown(given)}"
        )
    if gamma != GAMMA and not named:
        raise ValueError(
            f"min_snr_gamma is of loss_weight='min_snr'; got loss_weight {shown(given)}"
        )
    if given is None:
        return None, gamma
    if loss == "vlb":
        raise ValueError("loss_weight is of the simple loss, which loss='vlb' has no part of")
    if named:
        if prediction == "mean":
            raise ValueError(
                "loss_weight='min_snr' is not defined for prediction='mean': it is for 'eps', "
                "'x0' and 'v'"
            )
        return "min_snr", gamma
    if isinstance(given, torch.Tensor):
        given = given.detach().cpu().double().numpy()
    try:
        weights = np.array(given)
    except (TypeError, ValueError) as error:  # ragged
        raise ValueError(f"loss_weight must be ({T},) numbers: {error}") from None
    if weights.shape != (T,) or weights.dtype.kind not in "iuf":
        raise ValueError(
            f"loss_weight must be None, 'min_snr' or ({T},) numbers, one for each step; got "
            f"{weights.dtype} of shape {weights.shape}"
        )
    weights = weights.astype(np.float64)
    if not np.all(np.isfinite(weights)) or weights.min() < 0:
        raise ValueError(
            f"loss_weight must be finite and at least 0; got {weights.min()} .. {weights.max()}"
        )
    weights.setflags(write=False)
    return weights, gamma


def weights(
    loss_weight: Checked, gamma: float, schedule: Schedule, prediction: str
) -> np.ndarray | None:
    """(T,) float64, what the simple loss is multiplied with at each step; None: 1.

    "min_snr" (Hang et al. 2023): min(SNR, gamma) in terms of x0, SNR = abar / (1 - abar); of eps
    over SNR, of v over SNR + 1.
    """
    if not isinstance(loss_weight, str):
        return loss_weight
    ab = schedule.alphas_cumprod
    snr = ab / (1 - ab)
    clipped = np.minimum(snr, gamma)
    return {"x0": clipped, "eps": clipped / snr, "v": clipped / (snr + 1)}[prediction]
