"""What every way of sampling is made of: a chain of a model's steps on a device, its batches, the
bar over its steps and the last look at the images."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from fastddpm import arguments, ops
from fastddpm.batching import Batches, batch_size_for
from fastddpm.diffusion import Diffusion, Model
from fastddpm.engine import make_engine, runnable
from fastddpm.engine.eager import Eager, OnStep
from fastddpm.engine.guided import Guide, Hooks, adds_noise
from fastddpm.given import Given
from fastddpm.networks import check_call
from fastddpm.options import check_flag, check_number
from fastddpm.progress import tqdm
from fastddpm.schedule import Sampler
from fastddpm.torch_noise import Draw
from fastddpm.unet import UNet
from fastddpm.wrapped import unwrap


class Chain:
    """What every function that samples needs: the engine, the process over `steps` steps, the
    device and the shape.

    model_kwargs: what the model will be given beside x_t and t, by name
    own_noise:    whether the caller's generators draw the noise, which decides on the engine
    """

    def __init__(
        self,
        model: Model,
        shape: Sequence[int] | None = None,
        diffusion: Diffusion | None = None,
        steps: int | None = None,
        sampler: Sampler = "ddpm",
        eta: float = 0.0,
        clip: bool = True,
        precision: str = "auto",
        engine: str = "auto",
        device: torch.device | str | None = None,
        *,
        model_kwargs: Mapping[str, Any] | None = None,
        denoised_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
        cond_fn: Callable[..., torch.Tensor] | None = None,
        self_condition: bool = False,
        own_noise: bool = False,
    ):
        full, model = Diffusion.of(model, diffusion), runnable(model)
        self.hooks = Hooks(denoised_fn, cond_fn, self_condition)
        self.model_kwargs = named_arguments(model_kwargs)
        self.device = arguments.device_of(model, device)
        self.model, self.shape = model, arguments.image_shape(unwrap(model), shape)
        eta = check_number("eta", eta, lambda x: x >= 0, "at least 0")
        clip = check_flag("clip", clip)
        if self_condition and isinstance(model, UNet):
            raise ValueError("self_condition is for a model (x, t, x0); a fastddpm.UNet sees no x0")
        check_call(model, self.model_kwargs, self.hooks.self_condition)
        full.warn_of_the_end()
        self.diffusion = full.respace(steps)
        self.diffusion.warn_of_the_end()  # a list of steps may leave out the last
        self.T = self.diffusion.T
        self.diffusion.table(self.device, sampler=sampler, eta=eta)
        self._options = {"sampler": sampler, "eta": eta, "clip": clip}
        self.engine: Eager = make_engine(
            engine,
            model,
            self.diffusion,
            device=self.device,
            precision=precision,
            sampler=sampler,
            eta=eta,
            clip=clip,
            guided=(*self.hooks.named, *["generator"] * own_noise),
            model_kwargs=self.model_kwargs,
        )

    def given(self, n: int, first: int, **each: Any) -> Given:
        """What the caller gives for the n images first ... of a set; see Given."""
        kwargs = self.model_kwargs
        if isinstance(self.model, UNet):
            self.model.check_labels(kwargs.get("y"), n, wait=True)
        return Given(n, first, self.shape, self.T, self.device, model_kwargs=kwargs, **each)

    def prior(self, seed: int, index: torch.Tensor) -> torch.Tensor:
        """x_T ~ N(0, I), the same for every chain length and sampler."""
        step = self.diffusion.schedule.full_steps
        return ops.randn((len(index), *self.shape), seed=seed, step=step, sample_index=index)

    def draws(self, given: Given) -> int:
        """How often a generator is asked for the noise of one batch."""
        options = self.engine.step_options
        noisy = adds_noise(self.diffusion, options["sampler"], options["eta"])
        return (given.x_T is None) + sum(noisy[: given.start])

    def draw_batch(
        self, seed: int, index: torch.Tensor, on_step: OnStep, given: Given | None = None
    ) -> torch.Tensor:
        """x_0 of the samples `index`, all of them at a time."""
        given = given or self.given(len(index), int(index[0]))
        rows = given.rows(index)
        draw, model_kwargs, index = given.stream(rows), given.kwargs(rows), index.to(self.device)
        x = self._begin(given, rows, seed, index, draw)
        return self.run(x, seed, index, on_step, model_kwargs, draw, start=given.start)

    def run(
        self,
        x: torch.Tensor,
        seed: int,
        index: torch.Tensor,
        on_step: OnStep,
        model_kwargs: Mapping[str, Any],
        draw: Draw | None = None,
        *,
        start: int,
        stop: int = 0,
    ) -> torch.Tensor:
        """x of the samples `index`, from chain index `start` to `stop`; draw: their noise, where no
        seed says it."""
        guided = self.hooks.named or draw is not None
        return self.engine.run(
            x,
            seed=seed,
            sample_index=index,
            start=start,
            stop=stop,
            on_step=on_step,
            model_kwargs=model_kwargs,
            guide=Guide(self.hooks, draw) if guided else None,
        )

    def _begin(
        self, given: Given, rows: slice, seed: int, index: torch.Tensor, draw: Draw | None
    ) -> torch.Tensor:
        """x_t at the chain index where these images begin. Images given are noised by what would
        else be their x_T, which no step draws."""
        x_T, init = given.begin(rows)
        if x_T is not None:
            return x_T
        noise = self.prior(seed, index) if draw is None else draw()
        if init is None:
            return noise
        t = torch.full((len(index),), given.start - 1, dtype=torch.int64, device=self.device)
        return self.diffusion.q_sample(init, t, noise)

    def batches(self, size: int | None) -> Batches:
        """Of `size` images, or of what memory holds."""
        if size is not None:
            return Batches(size)
        most = batch_size_for(self.model, self.shape, self.engine.precision, self.device)
        return Batches(most, even=True)

    def draw(
        self,
        seed: int,
        index: torch.Tensor,
        batches: Batches,
        steps: Steps,
        later: int = 0,
        given: Given | None = None,
    ) -> list[torch.Tensor]:
        """x_0 of the samples `index`, a tensor a batch."""
        draw = functools.partial(self.draw_batch, seed, on_step=steps, given=given)
        return batches.draw(draw, index, steps, later)

    @property
    def facts(self) -> dict[str, Any]:
        """What a set of samples has in common, beside model and seed."""
        return {"shape": list(self.shape), "steps": self.T, **self._options}


def named_arguments(model_kwargs: Any) -> dict[str, Any]:
    if model_kwargs is None:
        return {}
    if not isinstance(model_kwargs, Mapping) or not all(isinstance(k, str) for k in model_kwargs):
        raise ValueError(
            "model_kwargs must be a dict {name: value} of the model's keyword arguments; got "
            f"{type(model_kwargs).__name__}"
        )
    return dict(model_kwargs)


class Steps:
    """The steps of all batches, on a progress bar; an OnStep, and batching's Progress.

    on_step: the caller's, which gets copies: engines write x_{t-1} over x_t"""

    def __init__(self, bar: tqdm, T: int, on_step: OnStep | None = None):
        self._bar, self._T, self._done, self._on_step = bar, T, 0, on_step
        self.reads_x0 = on_step is not None  # else no x0 prediction has to be at hand

    def __call__(self, i: int, x: torch.Tensor, x0: Callable[[], torch.Tensor]) -> None:
        self._bar.update()
        if self._on_step is not None:
            self._on_step(i, x.clone(), x0)

    def begin(self, batches: int) -> None:
        self._bar.n, self._bar.total = self._done, self._done + batches * self._T

    def end(self) -> None:
        self._done = self._bar.n


@contextlib.contextmanager
def bar(
    images: int, T: int, progress: bool, total: int | None = None, on_step: OnStep | None = None
) -> Iterator[Steps]:
    """A progress bar over the steps of the chains, `total` if that is known from the start."""
    with tqdm(total=total, desc=f"{images} images", unit="step", disable=not progress) as shown:
        yield Steps(shown, T, on_step)


def finite(images: torch.Tensor) -> torch.Tensor:
    if not torch.isfinite(images).all():
        bad = int((~torch.isfinite(images)).flatten(1).any(dim=1).sum())
        raise FloatingPointError(
            f"{bad} of {len(images)} images are not finite: the model returned NaN or inf"
        )
    return images
