"""Training (DDPM Algorithm 1): a step and its state, a run with its files, its recipe."""

from fastddpm.training.run import fit
from fastddpm.training.trainer import Trainer

__all__ = ["Trainer", "fit"]
