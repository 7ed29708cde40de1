"""How good a model is: likelihoods and what is computed from them, and how far its samples are from
data. No training."""

from fastddpm.evaluation.bits import BitsPerDim, bits_per_dim
from fastddpm.evaluation.report import Evaluation, evaluate

__all__ = ["BitsPerDim", "Evaluation", "bits_per_dim", "evaluate"]
