"""Algorithm 2 and what the paper draws with it: samples, progressive samples, shared latents,
interpolations.

Sample k of a seed is a function of (model, seed, k): its noise does not depend on n, batch_size or
the rest."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from fastddpm import arguments, ops, ranks, reference
from fastddpm.arguments import indices, sample_indices
from fastddpm.batching import Batches, batch_size_for
from fastddpm.diffusion import Diffusion, Model
from fastddpm.engine import make_engine, runnable
from fastddpm.engine.eager import Eager, OnStep
from fastddpm.host import own_state
from fastddpm.options import check_flag, check_number
from fastddpm.progress import tqdm
from fastddpm.schedule import Sampler, check_count
from fastddpm.wrapped import unwrap


@own_state()
def sample(
    model: Model,
    n: int = 256,
    *,
    seed: int = 0,
    first_index: int = 0,
    shape: Sequence[int] | None = None,
    diffusion: Diffusion | None = None,
    steps: int | None = None,
    sampler: Sampler = "ddpm",
    eta: float = 0.0,
    clip: bool = True,
    batch_size: int | None = None,
    precision: str = "auto",
    engine: str = "auto",
    device: torch.device | str | None = None,
    progress: bool = True,
    distributed: bool = True,
) -> torch.Tensor:
    """Draw n images by the reverse process (DDPM Algorithm 2); (n, C, H, W) float32 in about [-1,
    1], on `device`.

    model:       a UNet or any callable (x_t, t) -> output of what `diffusion` says it predicts
    first_index: draws samples first_index .. first_index + n - 1 of this seed, so that a set can be
                 continued
    shape:       (C, H, W) of one image; None: the model's own
    steps:       a shorter chain of evenly strided steps (None: all T)
    sampler:     "ddpm", or "ddim" with noise eta (0: deterministic given x_T); same seed, same x_T
                 for both
    clip:        clip the x0 prediction to [-1, 1] in every step, as the paper does
    batch_size:  images at a time; None: as many as memory holds, see `fastddpm.batching`
    precision:   "fp32", "bf16" or "auto", whatever autocast the caller is under
    engine:      "cpu_plan", "cuda_plan", "cuda_graph", "eager" or "auto", the fastest
    distributed: where torch.distributed is initialised, each rank draws its own range of the n
                 samples and gets all n images: every rank must make the call. False: this process
                 draws alone

    Raises ValueError for anything that does not fit, FloatingPointError when a sample is not
    finite, ranks.RankError when another rank raised."""
    rank, world = ranks.place() if distributed else (0, 1)
    together = ranks.together if world > 1 else contextlib.nullcontext
    with together():
        n, first_index = indices(n, first_index)
        seed = arguments.seed(seed)
        chain = Chain(model, shape, diffusion, steps, sampler, eta, clip, precision, engine, device)
        batches = chain.batches(batch_size)
    if world > 1:
        ranks.agree(n=n, seed=seed, first_index=first_index, **chain.facts)
    start, stop = ranks.share(n, rank, world)
    mine = torch.empty(0, *chain.shape, dtype=torch.float32, device=chain.device)
    with together():
        with bar(n, chain.T, progress and rank == 0) as steps_bar:
            index = torch.arange(first_index + start, first_index + stop, device="cpu")
            parts = chain.draw(seed, index, batches, steps_bar)
        mine = finite(torch.cat([mine, *parts]))
    return ranks.gather(mine, n) if world > 1 else mine


@own_state()
def sample_progressive(
    model: Model,
    n: int = 8,
    *,
    frames: int = 10,
    seed: int = 0,
    first_index: int = 0,
    progress: bool = True,
    **options,
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Samples and how they came to be: the x0 predictions over time (DDPM Fig. 6, Section 4.3).

    Returns (samples (n, C, H, W), x0 predictions (frames, n, C, H, W), the model's steps t they
    were made at), evenly spaced from T - 1 to 0. options: those of `sample` but batch_size."""
    frames, seed = check_count("frames", frames), arguments.seed(seed)
    chain = Chain(model, **options)
    keep = {round(k) for k in np.linspace(chain.T - 1, 0, min(frames, chain.T))}
    index = sample_indices(n, first_index)
    with bar(len(index), chain.T, progress) as tick:

        def draw(part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            shown: list[torch.Tensor] = []

            def on_step(i, x, x0):
                tick(i, x, x0)
                if i in keep:
                    shown.append(x0())

            return chain.draw_batch(seed, part, on_step=on_step), torch.stack(shown)

        images, predictions = zip(*chain.batches(None).draw(draw, index, tick), strict=True)
    times = [int(chain.diffusion.schedule.timesteps[i]) for i in sorted(keep, reverse=True)]
    return finite(torch.cat(images)), torch.cat(predictions, dim=1), times


@own_state()
def sample_shared_latent(
    model: Model,
    n: int = 8,
    *,
    t: int | Sequence[int] = (1000, 750, 500, 250),
    seed: int = 0,
    first_index: int = 0,
    progress: bool = True,
    **options,
) -> torch.Tensor:
    """Samples that share x_t and differ below it (DDPM Fig. 7); (len(t), n, C, H, W).

    Row k: n draws of p(x_0 | x_t) at the paper's t[k] (t = T shares only x_T), where x_t lies on
           the way to
    the sample `first_index`, whose own noise the first draw of each row follows.
    """
    index, seed = sample_indices(n, first_index), arguments.seed(seed)
    n = len(index)
    chain = Chain(model, **options)
    levels, index = arguments.levels(t, 1, chain.T), index.to(chain.device)
    rows: dict[int, torch.Tensor] = {}
    x, at = chain.prior(seed, index[:1]), chain.T
    total = chain.T - min(levels) + sum(set(levels))
    with bar(n * len(levels), chain.T, progress, total) as tick:
        run = chain.engine.run
        for level in sorted(set(levels), reverse=True):
            x = run(x, seed=seed, sample_index=index[:1], start=at, stop=level, on_step=tick)
            at = level
            shared = x.expand(n, -1, -1, -1)
            rows[level] = run(shared, seed=seed, sample_index=index, start=level, on_step=tick)
    return finite(torch.stack([rows[level] for level in levels]))


@own_state()
def interpolate(
    model: Model,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    n: int = 9,
    t: int | Sequence[int] = 500,
    seed: int = 0,
    progress: bool = True,
    **options,
) -> torch.Tensor:
    """Decode mixtures (1 - l) x_t + l x'_t of two images' latents, l = 0 .. 1 (DDPM Section 4.4,
    Fig. 8, 9).

    a, b: (C, H, W) uint8 or float in [-1, 1];  t: the paper's step count of the latents, or several
          for Fig. 9.
    All mixtures share the noise of the way up and of the way down. Returns (n, C, H, W), or
    (len(t), n, C, H, W) for several t.
    """
    n, seed = check_count("n", n), arguments.seed(seed)
    a, b = arguments.image_pair(a, b)
    chain = Chain(model, **{"shape": tuple(a.shape), **options})
    levels = arguments.levels(t, 0, chain.T)
    x0 = torch.stack((a, b)).to(chain.device)
    x0 = reference.to_unit(x0) if x0.dtype == torch.uint8 else x0.float()
    pair = torch.arange(2, device=chain.device)
    weight = torch.linspace(0, 1, n, dtype=torch.float32, device=chain.device)[:, None, None, None]
    shared = torch.full((n,), 2, dtype=torch.int64, device=chain.device)
    rows = []
    with bar(n * len(levels), chain.T, progress, sum(levels)) as tick:
        for level in levels:
            xt = x0
            if level:
                at = torch.full((2,), level - 1, dtype=torch.int64, device=chain.device)
                eps = ops.randn(
                    x0.shape, seed=seed, step=chain.diffusion.model_t(at), sample_index=pair
                )
                xt = chain.diffusion.q_sample(x0, at, eps)
            mixed = (1 - weight) * xt[0] + weight * xt[1]
            rows.append(
                chain.engine.run(mixed, seed=seed, sample_index=shared, start=level, on_step=tick)
            )
    images = finite(torch.stack(rows))
    return images if arguments.several(t) else images[0]


class Chain:
    """What every function above needs: the engine, the process over `steps` steps, the device and
    the shape.
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
    ):
        full, model = Diffusion.of(model, diffusion), runnable(model)
        self.device = arguments.device_of(model, device)
        self.model, self.shape = model, arguments.image_shape(unwrap(model), shape)
        eta = check_number("eta", eta, lambda x: x >= 0, "at least 0")
        clip = check_flag("clip", clip)
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
        )

    def prior(self, seed: int, index: torch.Tensor) -> torch.Tensor:
        """x_T ~ N(0, I), the same for every chain length and sampler."""
        step = self.diffusion.schedule.full_steps
        return ops.randn((len(index), *self.shape), seed=seed, step=step, sample_index=index)

    def draw_batch(self, seed: int, index: torch.Tensor, on_step: OnStep) -> torch.Tensor:
        """x_0 of the samples `index`, all of them at a time."""
        index = index.to(self.device)
        return self.engine.run(
            self.prior(seed, index), seed=seed, sample_index=index, on_step=on_step
        )

    def batches(self, size: int | None) -> Batches:
        """Of `size` images, or of what memory holds."""
        if size is not None:
            return Batches(size)
        most = batch_size_for(self.model, self.shape, self.engine.precision, self.device)
        return Batches(most, even=True)

    def draw(
        self, seed: int, index: torch.Tensor, batches: Batches, steps: Steps, later: int = 0
    ) -> list[torch.Tensor]:
        """x_0 of the samples `index`, a tensor a batch."""
        draw = functools.partial(self.draw_batch, seed, on_step=steps)
        return batches.draw(draw, index, steps, later)

    @property
    def facts(self) -> dict[str, Any]:
        """What a set of samples has in common, beside model and seed."""
        return {"shape": list(self.shape), "steps": self.T, **self._options}


class Steps:
    """The steps of all batches, on a progress bar; an OnStep, and batching's Progress."""

    reads_x0 = False  # no x0 prediction has to be at hand

    def __init__(self, bar: tqdm, T: int):
        self._bar, self._T, self._done = bar, T, 0

    def __call__(self, i: int, x: torch.Tensor, x0: object) -> None:
        self._bar.update()

    def begin(self, batches: int) -> None:
        self._bar.n, self._bar.total = self._done, self._done + batches * self._T

    def end(self) -> None:
        self._done = self._bar.n


@contextlib.contextmanager
def bar(images: int, T: int, progress: bool, total: int | None = None) -> Iterator[Steps]:
    """A progress bar over the steps of the chains, `total` if that is known from the start."""
    with tqdm(total=total, desc=f"{images} images", unit="step", disable=not progress) as shown:
        yield Steps(shown, T)


def finite(images: torch.Tensor) -> torch.Tensor:
    if not torch.isfinite(images).all():
        bad = int((~torch.isfinite(images)).flatten(1).any(dim=1).sum())
        raise FloatingPointError(
            f"{bad} of {len(images)} images are not finite: the model returned NaN or inf"
        )
    return images
