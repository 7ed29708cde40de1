"""Algorithm 2 and what the paper draws with it: samples, progressive samples, shared latents,
interpolations.

Sample k of a seed is a function of (model, seed, k): its noise does not depend on n, batch_size or
the rest."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fastddpm import arguments, ops, ranks, reference
from fastddpm.arguments import indices, sample_indices
from fastddpm.chain import Chain, bar, finite
from fastddpm.diffusion import Diffusion, Model
from fastddpm.engine.eager import OnStep
from fastddpm.engine.guided import check_callable
from fastddpm.given import BATCHES, BEGINNING, count, own_noise, own_shape, refuse
from fastddpm.host import own_state
from fastddpm.schedule import Sampler, check_count
from fastddpm.spacing import Spacing


@own_state()
def sample(
    model: Model,
    n: int | None = None,
    *,
    seed: int = 0,
    first_index: int = 0,
    shape: Sequence[int] | None = None,
    diffusion: Diffusion | None = None,
    steps: int | str | Sequence[int] | None = None,
    sampler: Sampler = "ddpm",
    eta: float = 0.0,
    clip: bool = True,
    batch_size: int | None = None,
    precision: str = "auto",
    engine: str = "auto",
    device: torch.device | str | None = None,
    progress: bool = True,
    distributed: bool = True,
    spacing: Spacing = "strided",
    x_T: torch.Tensor | None = None,
    init: torch.Tensor | None = None,
    start: int | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    on_step: OnStep | None = None,
    denoised_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
    cond_fn: Callable[..., torch.Tensor] | None = None,
    self_condition: bool = False,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> torch.Tensor:
    """Draw n images by the reverse process (DDPM Algorithm 2); (n, C, H, W) float32 in about [-1,
    1], on `device`.

    model:       a UNet or any callable (x_t, t) -> output of what `diffusion` says it predicts
    n:           None: as many as x_T or init has, else 256
    first_index: draws samples first_index .. first_index + n - 1 of this seed, so that a set can be
                 continued
    shape:       (C, H, W) of one image; None: the model's own
    steps:       a shorter chain: so many steps by the rule `spacing`, or those that a sequence or
                 OpenAI's words name; see Schedule.respace. None: all T
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
        n, first_index = indices(count(n, 256, x_T=x_T, init=init), first_index)
        seed = arguments.seed(seed)
        check_callable("on_step", on_step)
        chain = Chain(
            model, own_shape(shape, x_T=x_T, init=init), diffusion, steps, sampler, eta, clip,
            precision, engine, device, spacing=spacing, model_kwargs=model_kwargs,
            denoised_fn=denoised_fn, cond_fn=cond_fn, self_condition=self_condition,
            own_noise=own_noise(generator, seed, first_index),
        )  # fmt: skip
        given = chain.given(n, first_index, x_T=x_T, init=init, start=start, generator=generator)
        batches = chain.batches(batch_size)
    if world > 1:
        ranks.agree(n=n, seed=seed, first_index=first_index, **chain.facts, **given.facts())
    first, last = ranks.share(n, rank, world)
    mine = torch.empty(0, *chain.shape, dtype=torch.float32, device=chain.device)
    with together():
        given.check_batches(batches.sizes(last - first))
        with bar(n, given.start, progress and rank == 0, on_step=on_step) as steps_bar:
            index = torch.arange(first_index + first, first_index + last, device="cpu")
            parts = chain.draw(seed, index, batches, steps_bar, given=given)
        mine = finite(torch.cat([mine, *parts]))
        if given.noise is not None:
            given.noise.skip(slice(first, last), chain.draws(given))
    return ranks.gather(mine, n) if world > 1 else mine


@own_state()
def sample_progressive(
    model: Model,
    n: int | None = None,
    *,
    frames: int = 10,
    seed: int = 0,
    first_index: int = 0,
    progress: bool = True,
    **options,
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Samples and how they came to be: the x0 predictions over time (DDPM Fig. 6, Section 4.3).

    Returns (samples (n, C, H, W), x0 predictions (frames, n, C, H, W), the model's steps t they
    were made at), evenly spaced from T - 1, or from `start` - 1, to 0. n: None: as many as x_T or
    init has, else 8. options: those of `sample` but batch_size and distributed."""
    frames, seed = check_count("frames", frames), arguments.seed(seed)
    refuse("sample_progressive", options, BATCHES)
    each = {name: options.pop(name, None) for name in BEGINNING}
    on_step, x_T, init = each.pop("on_step"), each["x_T"], each["init"]
    check_callable("on_step", on_step)
    index = sample_indices(count(n, 8, x_T=x_T, init=init), first_index)
    first = int(index[0])
    options["shape"] = own_shape(options.get("shape"), x_T=x_T, init=init)
    options["own_noise"] = own_noise(each["generator"], seed, first)
    chain = Chain(model, **options)
    given = chain.given(len(index), first, **each)
    keep = {round(k) for k in np.linspace(given.start - 1, 0, min(frames, given.start))}
    with bar(len(index), given.start, progress, on_step=on_step) as tick:

        def draw(part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            shown: list[torch.Tensor] = []

            def keep_some(i, x, x0):
                tick(i, x, x0)
                if i in keep:
                    shown.append(x0())

            return chain.draw_batch(seed, part, keep_some, given), torch.stack(shown)

        images, predictions = zip(*chain.batches(None).draw(draw, index, tick), strict=True)
    times = [int(chain.diffusion.schedule.timesteps[i]) for i in sorted(keep, reverse=True)]
    return finite(torch.cat(images)), torch.cat(predictions, dim=1), times


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
           the way to the sample `first_index`, whose own noise the first draw of each row follows.
    options: those of `sample` that say no beginning, batch or order of the noise; of model_kwargs,
    n images long, x_t takes the first.
    """
    return draw_shared_latent(
        model, n, t=t, seed=seed, first_index=first_index, progress=progress, **options
    )[0]


@own_state()
def draw_shared_latent(
    model: Model,
    n: int = 8,
    *,
    t: int | Sequence[int] = (1000, 750, 500, 250),
    seed: int = 0,
    first_index: int = 0,
    progress: bool = True,
    **options,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sample_shared_latent`, and the x_t of each row, which Fig. 7 shows beside its samples:
    (len(t), n, C, H, W) and (len(t), C, H, W)."""
    index, seed = sample_indices(n, first_index), arguments.seed(seed)
    n = len(index)
    refuse("sample_shared_latent", options, (*BATCHES, *BEGINNING, "self_condition"))
    chain = Chain(model, **options)
    given = chain.given(n, int(index[0]))
    first, every = given.kwargs(slice(0, 1)), given.kwargs(slice(0, n))
    levels, index = arguments.levels(t, 1, chain.T), index.to(chain.device)
    rows: dict[int, torch.Tensor] = {}
    latents: dict[int, torch.Tensor] = {}
    x, at = chain.prior(seed, index[:1]), chain.T
    total = chain.T - min(levels) + sum(set(levels))
    with bar(n * len(levels), chain.T, progress, total) as tick:
        for level in sorted(set(levels), reverse=True):
            x = chain.run(x, seed, index[:1], tick, first, start=at, stop=level)
            at = level
            latents[level] = x[0].clone()
            shared = x.expand(n, -1, -1, -1)
            rows[level] = chain.run(shared, seed, index, tick, every, start=level)
    images = finite(torch.stack([rows[level] for level in levels]))
    return images, torch.stack([latents[level] for level in levels])


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
    All mixtures share the noise of the way up and of the way down. options: those of `sample` that
    say no beginning, batch or order of the noise; model_kwargs are the mixtures'. Returns (n, C, H,
    W), or (len(t), n, C, H, W) for several t.
    """
    n, seed = check_count("n", n), arguments.seed(seed)
    a, b = arguments.image_pair(a, b)
    refuse("interpolate", options, (*BATCHES, *BEGINNING))
    chain = Chain(model, **{"shape": tuple(a.shape), **options})
    model_kwargs = chain.given(n, 0).kwargs(slice(0, n))
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
            rows.append(chain.run(mixed, seed, shared, tick, model_kwargs, start=level))
    images = finite(torch.stack(rows))
    return images if arguments.several(t) else images[0]
