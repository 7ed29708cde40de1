"""improved- and guided-diffusion's processes on our ops: their names, arguments, attributes and
random numbers, one fused pass a step. A trainer's `gaussian_diffusion`, `respace` and the factory
of its `script_util` are here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from fastddpm.integrations.openai_sampling import Sampling
from fastddpm.integrations.openai_training import Training
from fastddpm.integrations.openai_types import LossType, ModelMeanType, ModelVarType
from fastddpm.options import check_count, check_integer, shown
from fastddpm.schedule import Schedule, check_choice
from fastddpm.spacing import chosen_steps

__all__ = [
    "GaussianDiffusion",
    "LossType",
    "ModelMeanType",
    "ModelVarType",
    "SpacedDiffusion",
    "betas_for_alpha_bar",
    "create_gaussian_diffusion",
    "get_named_beta_schedule",
    "space_timesteps",
]


class GaussianDiffusion(Sampling, Training):
    """Their GaussianDiffusion: constructor, attributes and methods are its; see Process, Sampling
    and Training.
    """


class SpacedDiffusion(GaussianDiffusion):
    """Their SpacedDiffusion: the chain that visits some of a chain's steps.

    use_timesteps: the steps to keep, a set or sequence of 0 .. T - 1
    options:       of GaussianDiffusion, the betas being those of all T steps

    The model gets the steps of the T, rescaled by that T where they are rescaled. What it says of
    x_{t-1} or of a learned variance is taken for this chain's own step, as theirs takes it.
    Attributes: use_timesteps, timestep_map, original_num_steps.
    """

    def __init__(self, use_timesteps: Collection[int], **options: Any):
        full = Schedule(_betas(options.get("betas")))
        short = full.respace(sorted(_steps(use_timesteps)))
        self.use_timesteps = set(short.timesteps.tolist())
        self.timestep_map: list[int] = short.timesteps.tolist()
        self.original_num_steps = full.T
        super().__init__(**{**options, "betas": short.betas})

    def _model_steps(self) -> tuple[np.ndarray, int]:
        return np.array(self.timestep_map, dtype=np.int64), self.original_num_steps


def _betas(betas: Any) -> Any:
    if betas is None:
        raise ValueError("betas must be given, (T,) numbers in (0, 1)")
    return betas


def _steps(use_timesteps: Any) -> list[Any]:
    if isinstance(use_timesteps, (str, bytes)) or not isinstance(
        use_timesteps, (Collection, np.ndarray)
    ):
        raise ValueError(
            "use_timesteps must be a set or sequence of steps, as space_timesteps gives it; got "
            f"{shown(use_timesteps)}"
        )
    return list(use_timesteps)


def space_timesteps(num_timesteps: int, section_counts: str | Sequence[int]) -> set[int]:
    """The steps of a shorter chain: "ddimN" for an integer stride that gives N, else a number for
    each of equal sections, "10,15,20" or [10, 15, 20]. ValueError for what does not fit.
    """
    T = check_count("num_timesteps", num_timesteps)
    if not isinstance(section_counts, str):
        counts = [check_integer("a section's count", n, 0) for n in _steps(section_counts)]
        section_counts = ",".join(map(str, counts))
    return set(chosen_steps(T, section_counts, "strided").tolist())


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> np.ndarray:
    """(T,) float64: "linear" (the paper's, scaled by 1000 / T) or "cosine"."""
    check_choice("schedule_name", schedule_name, ("linear", "cosine"))
    if schedule_name == "linear":
        return Schedule.linear(num_diffusion_timesteps, scaled=True).betas.copy()
    return Schedule.cosine(num_diffusion_timesteps).betas.copy()


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> np.ndarray:
    """(T,) float64: 1 - abar((t + 1) / T) / abar(t / T), at most max_beta, for abar of 0 .. 1."""
    T = check_count("num_diffusion_timesteps", num_diffusion_timesteps)
    ab = np.array([alpha_bar(i / T) for i in range(T + 1)], dtype=np.float64)
    return np.minimum(1 - ab[1:] / ab[:-1], max_beta)


def create_gaussian_diffusion(
    *,
    steps: int = 1000,
    learn_sigma: bool = False,
    sigma_small: bool = False,
    noise_schedule: str = "linear",
    use_kl: bool = False,
    predict_xstart: bool = False,
    rescale_timesteps: bool = False,
    rescale_learned_sigmas: bool = False,
    timestep_respacing: str | Sequence[int] = "",
) -> SpacedDiffusion:
    """script_util's factory, with its defaults in guided-diffusion (improved-diffusion rescales
    timesteps and learned sigmas by default: say so).
    """
    mean_type = ModelMeanType.START_X if predict_xstart else ModelMeanType.EPSILON
    if learn_sigma:
        var_type = ModelVarType.LEARNED_RANGE
    else:
        var_type = ModelVarType.FIXED_SMALL if sigma_small else ModelVarType.FIXED_LARGE
    if use_kl:
        loss_type = LossType.RESCALED_KL
    else:
        loss_type = LossType.RESCALED_MSE if rescale_learned_sigmas else LossType.MSE
    return SpacedDiffusion(
        use_timesteps=space_timesteps(steps, timestep_respacing or [steps]),
        betas=get_named_beta_schedule(noise_schedule, steps),
        model_mean_type=mean_type,
        model_var_type=var_type,
        loss_type=loss_type,
        rescale_timesteps=rescale_timesteps,
    )
