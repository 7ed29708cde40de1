"""Which configs of diffusers' schedulers a DDPMScheduler can be made of. It reads what it knows
from any dict: of another process' config, it would sample another model's images.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from typing import Any

import diffusers

from fastddpm.host import callers_level
from fastddpm.integrations.schedulers import FREE
from fastddpm.options import shown

# The classes that have the same process, and only another way to sample from it. EDMEulerScheduler
# is compatible by name alone: it has no betas.
CLASSES = tuple(
    dict.fromkeys(
        [name for name in diffusers.DDPMScheduler._compatibles if name != "EDMEulerScheduler"]
        + ["DDPMParallelScheduler", "DDIMParallelScheduler", "DDIMInverseScheduler",
           "DPMSolverMultistepInverseScheduler"]
    )
)  # fmt: skip
# Options that make another process of such a class, and the only value they may have.
FIXED = {
    "use_flow_sigmas": (False, "flow matching is another process"),
    "timestep_type": ("discrete", "its network is told log sigma, and not t"),
    "predict_epsilon": (True, "say prediction_type='sample' in its place"),
}
PROCESS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
    "prediction_type", "rescale_betas_zero_snr",
)  # fmt: skip


def check_process(cls: type, config: dict[str, Any], given: dict[str, Any]) -> None:
    """ValueError for a config whose class, or an option of it, is of another process than cls's or
    not known; `given` takes the place of what the config says.

    A scheduler's own defaults are not taken over, in diffusers neither: UserWarning where one is of
    the process and not the default here, or of one in `given` that is no option.
    """
    kind = config.get("_class_name")
    # A scheduler that was made and not read tells no name, but all its options. (Betas that are
    # none follow a sine in IPNDMScheduler, and a cosine in UnCLIPScheduler.)
    if kind is None and "_use_default_values" in config and "beta_start" not in config:
        options = ", ".join(sorted(name for name in config if name[:1] != "_"))
        raise ValueError(
            f"a scheduler whose options are {options} is no DDPM, DDIM or the like, which have a "
            f"beta_start: a {cls.__name__} can't be made of it"
        )
    if unknown := [name for name in given if name not in _known(cls)]:
        warnings.warn(
            f"{unknown[0]} is no option of {cls.__name__}, and is left out",
            stacklevel=callers_level(),
        )
    if kind is not None and kind not in (allowed := (cls.__name__, *CLASSES)):
        raise ValueError(
            f"a {cls.__name__} can be made of the config of {', '.join(sorted(set(allowed)))}; got "
            f"that of {shown(kind)}, which is another process"
        )
    for name, value in config.items():
        if name in FIXED:
            expected, why = FIXED[name]
            if value is not None and value != expected:
                raise ValueError(f"{name} must be {expected!r} here; got {shown(value)}: {why}")
        elif name not in _known(cls) and name[:1] != "_" and not (value is None or value is False):
            raise ValueError(f"the option {name} is not known here; got {shown(value)}")
    defaults = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    for name in set(PROCESS) & set(config.get("_use_default_values", ())) - set(given):
        if (value := config.get(name)) != (ours := defaults[name].default):
            warnings.warn(
                f"{name} is {ours!r}, {cls.__name__}'s default, not {value!r}, which is that of "
                f"{kind or 'the other scheduler'}: it was not given there, so it is not taken "
                f"over. Pass {name}=...",
                stacklevel=callers_level(),
            )


@functools.cache
def _known(cls: type) -> set[str]:
    """Every option of the classes that are read."""
    classes = [cls, *(getattr(diffusers, name) for name in CLASSES if hasattr(diffusers, name))]
    return {"noise_sampler_seed", *FREE}.union(
        *(inspect.signature(each.__init__).parameters for each in classes)
    )
