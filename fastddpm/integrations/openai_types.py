"""What improved- and guided-diffusion call the options of a process."""

from __future__ import annotations

import enum
from typing import Any

from fastddpm.options import shown


class ModelMeanType(enum.Enum):
    """What the model predicts."""

    PREVIOUS_X = enum.auto()
    START_X = enum.auto()
    EPSILON = enum.auto()


class ModelVarType(enum.Enum):
    """The variance of p(x_{t-1} | x_t): the model's log sigma^2, beta-tilde, beta, or what the
    model says to lie between these (-1 .. 1).
    """

    LEARNED = enum.auto()
    FIXED_SMALL = enum.auto()
    FIXED_LARGE = enum.auto()
    LEARNED_RANGE = enum.auto()


class LossType(enum.Enum):
    """MSE of the prediction, plus the bound's term for a learned variance (RESCALED: times
    T / 1000); or that term alone (RESCALED: times T).
    """

    MSE = enum.auto()
    RESCALED_MSE = enum.auto()
    KL = enum.auto()
    RESCALED_KL = enum.auto()

    def is_vb(self) -> bool:
        return self in (LossType.KL, LossType.RESCALED_KL)


PREDICTIONS = {"PREVIOUS_X": "mean", "START_X": "x0", "EPSILON": "eps"}  # in ops' words
VARIANCES = {
    "LEARNED": "learned",
    "FIXED_SMALL": "fixed_small",
    "FIXED_LARGE": "fixed_large",
    "LEARNED_RANGE": "learned_range",
}


def member(name: str, choices: type[enum.Enum], value: Any) -> enum.Enum:
    """`value`, if it is a member of `choices` or of their enum of that name."""
    theirs = isinstance(value, enum.Enum) and type(value).__name__ == choices.__name__
    if not theirs or value.name not in choices.__members__:
        allowed = ", ".join(map(str, choices))
        raise ValueError(f"{name} must be one of {allowed}; got {shown(value)}")
    return value
