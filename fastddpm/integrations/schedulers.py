"""diffusers' scheduler_config.json as the process of a model, and back.

A scheduler there is two things: the process that the network was trained for, which is read here,
and a way to sample from it, which is `fastddpm.sample`'s to choose. Whatever is of the process, or
changes every sample, is done or refused by its name. What only picks the steps of a shorter chain
(timestep_spacing) or is of a solver's own (solver_order, skip_prk_steps, ...) is not: `steps` and
`sampler` say that here."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, get_args

import numpy as np

from fastddpm.checkpoint import read_json
from fastddpm.diffusion import LEARNED, Diffusion, Loss
from fastddpm.host import callers_level
from fastddpm.schedule import Schedule, check_count, check_number

SCHEDULER = "scheduler_config.json"
INDEX = "model_index.json"  # of a pipeline
LOSS = (
    "_fastddpm_loss"  # the objective has no name there; what begins with _ diffusers leaves alone
)

CLASSES = (
    "DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler", "DDIMParallelScheduler",
    "PNDMScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
)  # fmt: skip
# What else has none: the keys of Diffusion.to_config that few processes have.
OWN = {f"_fastddpm_{name}": name for name in ("loss_weight", "min_snr_gamma")}

BETAS = {
    "linear": "linear", "scaled_linear": "quadratic", "squaredcos_cap_v2": "cosine",
    "sigmoid": "sigmoid_betas",
}  # fmt: skip
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
# The _log names are of how diffusers writes the same number down.
VARIANCES = {
    "fixed_small": "fixed_small", "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large", "fixed_large_log": "fixed_large",
    "learned_range": "learned_range",
}  # fmt: skip
WHY_NOT = {
    "flow_prediction": "flow matching is another process",
    "learned": "the model's second half is sigma^2 there, and log sigma^2 here",
    "rescale_betas_zero_snr": "with abar_T = 0, x_T says nothing of x0 and eps nothing of either",
    "thresholding": "x0 is clipped to [-1, 1] here, not to a quantile of its values",
    "clip_sample": "x0 is clipped here unless sample(clip=False) is asked for",
    "clip_sample_range": "x0 is clipped to [-1, 1] here",
    "set_alpha_to_one": "the last step ends at abar = 1 here",
    "use_flow_sigmas": "flow matching is another process",
}
# What must have one value, where a class has it at all; and what may have any.
FIXED = {
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "thresholding": False,
    "rescale_betas_zero_snr": False,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "use_flow_sigmas": False,
    "timestep_values": None,
}
FREE = (
    "dynamic_thresholding_ratio", "sample_max_value",             # of thresholding
    "skip_prk_steps", "solver_order", "algorithm_type", "solver_type", "lower_order_final",
    "euler_at_final", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas",
    "use_lu_lambdas", "final_sigmas_type", "lambda_min_clipped",  # of solvers
    "flow_shift", "use_dynamic_shifting", "time_shift_type",      # of use_flow_sigmas
    "tensor_format",                                              # of the oldest files
)  # fmt: skip
READ = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
    "prediction_type", "predict_epsilon", "variance_type", "timestep_spacing",
)  # fmt: skip


def load_process(folder: Path) -> Diffusion:
    """The process of the scheduler_config.json in `folder` or in ../scheduler; the paper's where
    there is none, with a warning where a pipeline names one. ValueError where it has two that
    differ.
    """
    there = process_files(folder)
    if not there:
        _warn_of_one_that_is_named(folder)
        return Diffusion()
    first = process(read_json(there[0]), there[0])
    if len(there) > 1 and folder.name == "unet":
        second = process(read_json(there[1]), there[1])
        same = np.array_equal(first.schedule.betas, second.schedule.betas)
        if not same or first.prediction != second.prediction:
            raise ValueError(
                f"{there[0]} and {there[1]} are of different processes: remove the one that the "
                "network was not trained for, or pass diffusion=..."
            )
    return first


def process_files(folder: Path) -> list[Path]:
    """The scheduler_config.json of `folder` and the one in ../scheduler, where they are."""
    places = (folder / SCHEDULER, folder.parent / "scheduler" / SCHEDULER)
    return [place for place in places if os.path.lexists(place)]  # links of a cleared cache too


def _warn_of_one_that_is_named(folder: Path) -> None:
    indices = [folder / INDEX, folder.parent / INDEX] if folder.name == "unet" else [folder / INDEX]
    for index in filter(Path.is_file, indices):
        part = read_json(index).get("scheduler")
        if isinstance(part, list) and any(part):  # [null, null] is a part that was left out
            warnings.warn(
                f"{index} names a scheduler, but there is no {SCHEDULER}: the paper's process is "
                "taken; to say another, bring the file along or pass diffusion=...",
                stacklevel=callers_level(),
            )


def process(config: dict[str, Any], source: object) -> Diffusion:
    """The process of a DDPM, DDIM, PNDM or DPMSolver scheduler's config. ValueError names a class,
    an option or a value that is not this process, and the way around it.
    """

    def refuse(name: str, allowed: str, key: str) -> ValueError:
        why = f" ({WHY_NOT[key]})" if key in WHY_NOT else ""
        return ValueError(
            f"{source}: {name} must be {allowed}; got {config[name]!r:.80}{why}. To load the model "
            "with a process of your own, pass diffusion=..."
        )

    def choice(name: str, default: str, choices: dict[str, str]) -> str:
        value = config.get(name)
        value = default if value is None else value
        if not isinstance(value, str) or value not in choices:
            raise refuse(name, f"one of {', '.join(map(repr, choices))}", str(value))
        return choices[value]

    kind = choice("_class_name", CLASSES[0], {name: name for name in CLASSES})
    for name, value in config.items():
        if name in FIXED:
            free = name == "set_alpha_to_one" and kind == "PNDMScheduler"  # its solver's last step
            free = free or (name == "clip_sample_range" and config.get("clip_sample") is False)
            expected = FIXED[name]
            same = value == expected and isinstance(value, bool) == isinstance(expected, bool)
            if not free and value is not None and not same:
                raise refuse(name, repr(expected).lower(), name)
        elif not (name in (*FREE, *READ) or name[:1] == "_" or value is None or value is False):
            raise ValueError(
                f"{source}: the option {name} is not known here; got {value!r:.80}. To load the "
                "model with a process of your own, pass diffusion=..."
            )
    choice("timestep_spacing", "leading", dict.fromkeys(("leading", "linspace", "trailing"), ""))
    prediction = choice("prediction_type", "epsilon", PREDICTIONS)
    if (old := config.get("predict_epsilon")) is not None:  # what the oldest files say in its place
        if not isinstance(old, bool):
            raise refuse("predict_epsilon", "true or false", "predict_epsilon")
        if config.get("prediction_type") is not None and old != (prediction == "eps"):
            said = f"{str(prediction == 'eps').lower()}, as prediction_type says"
            raise refuse("predict_epsilon", said, "predict_epsilon")
        prediction = "eps" if old else "x0"
    variance = choice("variance_type", "fixed_small", VARIANCES)
    choice("beta_schedule", "linear", BETAS)
    default = "hybrid" if variance in LEARNED else "simple"
    loss = choice(LOSS, default, {name: name for name in get_args(Loss)})
    own = {name: config[key] for key, name in OWN.items() if config.get(key) is not None}
    try:
        return Diffusion(_schedule(config), prediction, variance, loss, **own)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _schedule(config: dict[str, Any]) -> Schedule:
    """The schedule of a config whose choices were checked; trained_betas come before all else."""
    T = check_count("num_train_timesteps", _given(config, "num_train_timesteps", 1000))
    if (betas := config.get("trained_betas")) is not None:
        if not isinstance(betas, list):
            raise ValueError(f"trained_betas must be a list of numbers; got {betas!r:.80}")
        if "num_train_timesteps" in config and len(betas) > T:
            raise ValueError(f"trained_betas are {len(betas)}, but num_train_timesteps is {T}")
        return Schedule(np.array([check_number("trained_betas", beta, 0, 1) for beta in betas]))
    kind = BETAS[_given(config, "beta_schedule", "linear")]
    if kind == "cosine":
        return Schedule.cosine(T)
    ends = (_given(config, "beta_start", 1e-4), _given(config, "beta_end", 0.02))
    return getattr(Schedule, kind)(T, *ends)


def _given(config: dict[str, Any], name: str, default: Any) -> Any:
    value = config.get(name)
    return default if value is None else value


def scheduler_config(diffusion: Diffusion) -> dict[str, Any]:
    """The DDPMScheduler's config of a process, for `process` and for diffusers; a schedule that has
    no name there as its betas. ValueError where no DDPMScheduler is this process.
    """
    full = diffusion.to_config()  # refuses a respaced chain
    predictions = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    if diffusion.prediction not in predictions:
        raise ValueError(
            f"diffusers has no scheduler for prediction {diffusion.prediction!r}; it has "
            f"{', '.join(map(repr, predictions))}"
        )
    if diffusion.variance not in VARIANCES:
        raise ValueError(
            "diffusers has no scheduler for variance 'learned', whose model says log sigma^2; it "
            "has 'fixed_small', 'fixed_large' and 'learned_range'"
        )
    if diffusion.rescale_timesteps:
        raise ValueError(
            "diffusers has no scheduler that gives the model rescaled timesteps: it would get t, "
            "not t * 1000 / T"
        )
    schedule = diffusion.schedule
    config: dict[str, Any] = {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": schedule.T,
        "prediction_type": predictions[diffusion.prediction],
        "variance_type": diffusion.variance,
        "clip_sample": True,
        LOSS: diffusion.objective,
        **{key: full[name] for key, name in OWN.items() if name in full},
    }
    recipe = full["schedule"]
    names = {ours: theirs for theirs, ours in BETAS.items()}
    if recipe["kind"] in names:
        ends = {name: recipe[name] for name in ("beta_start", "beta_end") if name in recipe}
        named = {"beta_schedule": names[recipe["kind"]], **ends}
        if np.array_equal(_schedule({**config, **named}).betas, schedule.betas):
            return {**config, **named}
    return {**config, "trained_betas": schedule.betas.tolist()}
