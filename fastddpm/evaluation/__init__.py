"""How good a model is: likelihoods and what is computed from them. No training, no pictures."""

from fastddpm.evaluation.bits import BitsPerDim, bits_per_dim

__all__ = ["BitsPerDim", "bits_per_dim"]
