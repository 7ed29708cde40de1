"""fastddpm: denoising diffusion probabilistic models, fast and exact. Public names only; no logic
here.
"""

__version__ = "0.1.0"

from fastddpm import codec, ops, reference
from fastddpm.accelerate import accelerate
from fastddpm.diffusion import Diffusion
from fastddpm.doctor import doctor
from fastddpm.evaluation import bits_per_dim, evaluate
from fastddpm.ops import use_backend
from fastddpm.sampling import interpolate, sample, sample_progressive, sample_shared_latent
from fastddpm.schedule import Schedule
from fastddpm.shards import sample_to_folder
from fastddpm.training import Trainer
from fastddpm.unet import UNet

__all__ = [
    "Diffusion",
    "Schedule",
    "Trainer",
    "UNet",
    "accelerate",
    "bits_per_dim",
    "codec",
    "doctor",
    "evaluate",
    "interpolate",
    "ops",
    "reference",
    "sample",
    "sample_progressive",
    "sample_shared_latent",
    "sample_to_folder",
    "use_backend",
]
