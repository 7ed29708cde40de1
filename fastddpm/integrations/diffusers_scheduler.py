"""diffusers' DDPMScheduler on our ops: the same names, options and random numbers, one fused pass a
step. Needs diffusers; `fastddpm.integrations.diffusers` gives the class without importing it before
it is asked for.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers import scheduling_ddpm
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from fastddpm import ops
from fastddpm.integrations import diffusers_arguments as checks
from fastddpm.integrations import diffusers_chain as numbers
from fastddpm.integrations.diffusers_chain import VARIANCE_TYPES, Chain
from fastddpm.integrations.diffusers_config import CLASSES, check_process
from fastddpm.integrations.diffusers_output import StepOutput, StepTuple, later
from fastddpm.integrations.images import as_images
from fastddpm.options import check_flag, check_integer, shown
from fastddpm.schedule import MAX_STEPS, check_choice, check_count, check_number

# Where a pipeline that was saved looks for how a class is loaded: by a base's name, beside it.
__all__ = ["DDPMScheduler", "SchedulerMixin"]

MAX_BOUND = 1e30  # of x0: what is divided by it is float32


class DDPMScheduler(scheduling_ddpm.DDPMScheduler):
    """diffusers' DDPMScheduler: config, attributes and methods are its, steps are one fused pass.

    Beside its options, whose defaults are the same:

    exact_tables: True: betas, abar and what follows from them in float64, rounded once. False: in
        float32 as diffusers has them, where 1 - abar_t has three digits at small t: for the
        pictures that it drew. The config says it where it is False.

    With the same generator results are diffusers' within float32's rounding (with exact_tables=
    False), in half precision nearer to float64: only what is stored is rounded. step's x0
    prediction is computed when it is first looked at. Three things are mended: variance_type
    "fixed_large_log" draws with sigma = sqrt(beta) (NaN there); "trailing" chains have the number
    of steps that was asked for (some end with a step -1 there); t < 0 is an error.

    Raises ValueError, naming the option, for what neither can do; a variance_type that there is not
    is named by the first step that draws with it.
    """

    _compatibles = list(CLASSES)  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        exact_tables: bool = True,
    ):
        T = check_count("num_train_timesteps", num_train_timesteps, MAX_STEPS)
        exact = check_flag("exact_tables", exact_tables)
        check_choice("prediction_type", prediction_type, numbers.PREDICTION_TYPES)
        check_choice("timestep_spacing", timestep_spacing, numbers.SPACINGS)
        check_number("dynamic_thresholding_ratio", dynamic_thresholding_ratio, 0, 1)
        check_number("sample_max_value", sample_max_value, 0, MAX_BOUND, inside=True)
        dtype = torch.float64 if exact else torch.float32
        with torch.inference_mode(False):
            if trained_betas is not None:
                betas = checks.trained_betas(trained_betas, dtype)
            else:
                ends = (
                    check_number("beta_start", beta_start, 0),
                    check_number("beta_end", beta_end, 0),
                )
                betas = numbers.betas(beta_schedule, T, *ends, dtype)
            if rescale_betas_zero_snr:
                betas = numbers.with_zero_terminal_snr(betas)
            # abar is what all steps read; the attributes are float32, as theirs.
            self._ab = torch.cumprod(1 - betas, 0)
            self.betas = betas.float()
            self.alphas = (1 - betas).float()
            self.alphas_cumprod = self._ab.float()
            self.one = torch.tensor(1.0, dtype=torch.float32, device="cpu")
            self.timesteps = torch.arange(T - 1, -1, -1, dtype=torch.int64, device="cpu")
        self.init_noise_sigma = 1.0
        self.custom_timesteps = False
        self.num_inference_steps: int | None = None  # type: ignore[assignment]
        self._kept: dict[Any, Any] = {}  # what was computed of all these, by name
        self._bound()

    # ---- config ---------------------------------------------------------------------------------

    def register_to_config(self, **options: Any) -> None:
        """As theirs; exact_tables is written down where it is False alone, so that diffusers' own
        classes know every option of a config.
        """
        if options.get("exact_tables") in (True,):
            del options["exact_tables"]
            defaults = [n for n in options.pop("_use_default_values", []) if n != "exact_tables"]
            options |= {"_use_default_values": defaults} if defaults else {}
        super().register_to_config(**options)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
        """Of every config that is read: as theirs, but what is of another process is an error."""
        check_process(cls, config_dict, options)
        return super().extract_init_dict(config_dict, **options)

    @property
    def variance_type(self) -> Any:
        """The config's; setting it sets the config's."""
        return self.config["variance_type"]

    @variance_type.setter
    def variance_type(self, name: str) -> None:
        self.register_to_config(variance_type=name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}

    # ---- timesteps ------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """The chain that step() follows: num_inference_steps of the T in the config's spacing, or
        `timesteps` themselves, descending in 0 .. T - 1. device: where scheduler.timesteps will be.
        """
        T = self.config["num_train_timesteps"]
        if (num_inference_steps is None) == (timesteps is None):
            got = "neither" if timesteps is None else "both"
            raise ValueError(f"give one of num_inference_steps and timesteps; got {got}")
        if timesteps is not None:
            chain = np.array(checks.custom_timesteps(timesteps, T), dtype=np.int64)
            self.custom_timesteps = True
        else:
            steps = check_count("num_inference_steps", num_inference_steps, T)  # type: ignore[arg-type]
            offset = check_integer("steps_offset", self.config["steps_offset"], -T)
            chain = numbers.timesteps(T, steps, self.config["timestep_spacing"], offset)
            self.num_inference_steps, self.custom_timesteps = steps, False
        self.timesteps = torch.from_numpy(chain.copy()).to("cpu" if device is None else device)

    def previous_timestep(self, timestep: int | torch.Tensor) -> Any:
        """The step after this one, nearer to x_0; -1 at the end. A tensor where a chain was set."""
        if not (self.custom_timesteps or self.num_inference_steps):
            return timestep - 1
        place = (self.timesteps == timestep).nonzero()
        if len(place) == 0:
            raise ValueError(f"timestep must be one of the chain's; got {shown(timestep)}")
        if place[0] == len(self.timesteps) - 1:
            return torch.tensor(-1, device="cpu")
        return self.timesteps[place[0, 0] + 1]

    def scale_model_input(self, sample: torch.Tensor, timestep: int | None = None) -> torch.Tensor:
        """The sample: x_t is the network's input as it is."""
        return sample

    # ---- q --------------------------------------------------------------------------------------

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, one pass; gradients for both.

        original_samples, noise: (N, ...) float;  timesteps: (N,) or (1,) integers in 0 .. T - 1
        """
        return self._mixed(original_samples, noise, timesteps, velocity=False)

    def get_velocity(
        self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """v = sqrt(abar_t) noise - sqrt(1 - abar_t) sample, of the sample x_0."""
        return self._mixed(noise, sample, timesteps, velocity=True)

    def _mixed(
        self, first: torch.Tensor, second: torch.Tensor, timesteps: Any, *, velocity: bool
    ) -> torch.Tensor:
        """The forward table's mixture of the two, broadcast against each other and t."""
        t = checks.several_steps(timesteps, first.device)
        for name, x in (("samples", first), ("noise", second)):
            if not x.is_floating_point() or x.dim() == 0:
                raise TypeError(f"{name} must be (N, ...) of a float dtype; got {x.dtype}")
        shape = first.shape
        if second.shape != shape or len(t) != shape[0]:
            shape = checks.common_shape(first, second, t)
            first, second, t = first.expand(shape), second.expand(shape), t.expand(shape[0])
        dtype = torch.promote_types(first.dtype, second.dtype)
        if dtype == torch.float64:
            first, second = first.double(), second.double()
        table = self._forward(velocity, t, checks.table_dtype(dtype))
        x = ops.noise(as_images(first), t, table, eps=as_images(second), dtype=dtype)[0]
        return x if x.dim() == len(shape) else x.reshape(shape)

    # ---- p --------------------------------------------------------------------------------------

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """x_{t-1} ~ p(x_{t-1} | x_t), DDPM Algorithm 2 line 4: one pass over x_t, the output and
        the noise, unless thresholding is on.

        model_output: (N, C, ...) float, or 2C channels where the variance is learned: "learned" has
            sigma^2 in the second half, "learned_range" the way from log beta-tilde to log beta
        timestep: an integer of the chain;  sample: (N, C, ...) float, x_t
        generator: of the noise, drawn as torch.randn of the output's shape and dtype, at all t > 0;
            a list has one for each sample
        returns .prev_sample and .pred_original_sample, or a tuple of the two. The latter is
            computed when it is looked at: before sample or model_output is written to.
        """
        chain = self._chain()
        t = checks.step_number(timestep)
        i = chain.index(t)
        xt, output, spread = checks.split_output(model_output, sample, chain.variance)
        generator = checks.generators(generator, len(xt))
        z, log_variance = xt.detach(), None  # no z passes at t = 0: the table's sigma is 0 there
        if t > 0:
            log_variance = chain.log_variance(i, spread)
            z = randn_tensor(output.shape, generator, output.device, output.dtype)
        dtype = torch.promote_types(xt.dtype, output.dtype)
        xt = xt.to(dtype)
        if dtype == torch.float64:
            output, z = output.double(), z.double()
            log_variance = None if log_variance is None else log_variance.double()

        def x0(dtype: torch.dtype = dtype) -> torch.Tensor:
            return self._x0(chain, i, xt, output, dtype)

        n, fused = len(xt), chain.fused[i]
        row = chain.row(i, xt.device, checks.table_dtype(dtype))
        if not fused:
            prediction = x0(checks.table_dtype(dtype))
        x = ops.posterior_step(
            as_images(xt),
            as_images(output if fused else prediction),
            torch.zeros(n, dtype=torch.int64, device=xt.device),
            row,
            z=as_images(z),
            clip=fused and chain.bound is not None,
            prediction="eps" if fused else "x0",
            log_variance=None if log_variance is None else as_images(log_variance),
        ).reshape(xt.shape)
        then = later(x0, xt, output) if fused else lambda: prediction.to(dtype)
        return StepOutput.of(x, then) if return_dict else StepTuple(x, then)

    def _x0(
        self, chain: Chain, i: int, xt: torch.Tensor, output: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """The x0 prediction of step i, clipped or thresholded."""
        if chain.prediction == "sample":
            x0 = output.to(dtype)
        elif chain.linear[i]:
            compute = checks.table_dtype(dtype)
            a, b = float(chain.of_xt[i]), float(chain.of_output[i])
            x0 = torch.add(a * xt.to(compute), output.to(compute), alpha=-b).to(dtype)
        elif chain.bound is None and not chain.threshold:
            raise ValueError(
                f"at t = {chain.steps[i]} abar_t is {chain.ab[i]:.3g}: a prediction of eps says "
                "nothing of x0 there; clip the sample, or take a model that predicts v or x0"
            )
        else:
            root, rest = float(chain.root[i]), float(chain.root_rest[i])
            x0 = (xt.to(dtype) - rest * output.to(dtype)) / root
        if chain.threshold:
            return self._threshold_sample(x0)
        return x0 if chain.bound is None else x0.clamp(-chain.bound, chain.bound)

    def _threshold_sample(self, sample: torch.Tensor) -> torch.Tensor:
        """x0 clipped to [-s, s] and divided by s, s the quantile of a sample's magnitudes, in
        1 .. sample_max_value (Saharia et al. 2022, Section 2.3).
        """
        flat = sample.to(checks.table_dtype(sample.dtype)).flatten(1)
        s = torch.quantile(
            flat.abs(), self.config["dynamic_thresholding_ratio"], dim=1, keepdim=True
        )
        s = s.clamp(min=1, max=self.config["sample_max_value"])
        return (flat.clamp(-s, s) / s).reshape(sample.shape).to(sample.dtype)

    def _get_variance(
        self,
        t: int,
        predicted_variance: torch.Tensor | None = None,
        variance_type: str | None = None,
    ) -> Any:
        """What diffusers' method of this name says of step t: sigma^2, sigma ("fixed_small_log")
        or log sigma^2 ("fixed_large_log", "learned_range").
        """
        chain = self._chain()
        i = chain.index(checks.step_number(t))
        kind = variance_type or chain.variance
        check_choice("variance_type", kind, VARIANCE_TYPES)
        if kind == "learned":
            return predicted_variance
        if kind == "learned_range":
            return chain.log_variance(i, predicted_variance, kind)
        variance, beta = chain.variances[i].float(), chain.beta[i].float()
        return {
            "fixed_small": variance,
            "fixed_small_log": variance.sqrt(),
            "fixed_large": beta,
            "fixed_large_log": beta.log(),
        }[kind]

    # ---- tables ---------------------------------------------------------------------------------

    def _bound(self) -> float | None:
        """Where the x0 prediction is clipped."""
        c = self.config
        if c["thresholding"] or not c["clip_sample"]:
            return None
        bound = c["clip_sample_range"]
        return check_number("clip_sample_range", bound, 0, MAX_BOUND, inside=True)

    def _follow(self) -> None:
        """Take over an alphas_cumprod that was set or written to from outside, as training scripts
        do: other values are abar from here on, moving it changes nothing.
        """
        ab = self.alphas_cumprod
        seen = self._kept.get("ab")
        if seen is not None and seen[0] is ab and seen[1] == checks.writes(ab):
            return
        with torch.inference_mode(False):
            self._ab = self._followed(ab)
            unknown = torch.cumsum((self._ab < 0) | (self._ab > 1), 0) > 0  # from the first one on
        self._kept = {"ab": (ab, checks.writes(ab)), "unknown": unknown if unknown.any() else None}

    def _followed(self, ab: torch.Tensor) -> torch.Tensor:
        """abar as _ab has it, with what differs in an `ab` of float32 from it."""
        given = ab.detach().to("cpu", self._ab.dtype, copy=True)
        if given.shape != self._ab.shape:
            return given
        return torch.where(given.float() == self._ab.float(), self._ab, given)

    def _forward(self, velocity: bool, t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The forward table on the device of t, whose steps' betas have to be some."""
        device = t.device
        if torch.compiler.is_compiling():  # a graph keeps nothing: it makes the table each time
            ab = self._followed(self.alphas_cumprod)
            return numbers.forward_table(ab, velocity=velocity).to(device, dtype)
        self._follow()
        bad = self._kept["unknown"]
        if bad is not None and bad.to(device)[t.clamp(0, len(bad) - 1)].any():
            raise ValueError("timesteps must be such that 0 <= abar_t <= 1; some are beyond")
        key = (velocity, device, dtype)
        if key not in self._kept:
            with torch.inference_mode(False):
                table = numbers.forward_table(self._ab, velocity=velocity)
                self._kept[key] = table.to(dtype).to(device)
        return self._kept[key]

    def _chain(self) -> Chain:
        """The chain of the present timesteps and config, made when one of them has changed."""
        self._follow()
        set_here = bool(self.custom_timesteps or self.num_inference_steps)
        of = (self.config, self.timesteps)  # a changed config is another dict
        facts = (checks.writes(self.timesteps), set_here)
        kept = self._kept.get("chain")
        if kept is None or kept[1] != facts or any(map(operator.is_not, kept[0], of)):
            T = self.config["num_train_timesteps"]
            with torch.inference_mode(False):
                chain = Chain(
                    self._ab,
                    self.timesteps.tolist() if set_here else list(range(T - 1, -1, -1)),
                    prediction=self.config["prediction_type"],
                    variance=self.variance_type or "fixed_small",
                    bound=self._bound(),
                    threshold=bool(self.config["thresholding"]),
                )
            self._kept["chain"] = kept = (of, facts, chain)
        return kept[2]
