"""fastddpm: denoising diffusion probabilistic models, fast and exact. Public names only; no logic
here.
"""

__version__ = "0.1.0"

from fastddpm import ops, reference
from fastddpm.diffusion import Diffusion
from fastddpm.evaluation import bits_per_dim
from fastddpm.sampling import interpolate, sample, sample_progressive, sample_shared_latent
from fastddpm.schedule import Schedule
from fastddpm.unet import UNet

__all__ = [
    "Diffusion",
    "Schedule",
    "UNet",
    "bits_per_dim",
    "interpolate",
    "ops",
    "reference",
    "sample",
    "sample_progressive",
    "sample_shared_latent",
]
