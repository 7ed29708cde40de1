"""The variational bound in bits/dim (DDPM Eq. 5, 13), term by term. No rate-distortion, no FID."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastddpm import arguments
from fastddpm.batching import Batches, batch_size_for
from fastddpm.chain import Steps, named_arguments
from fastddpm.diffusion import Diffusion, Model
from fastddpm.engine import runnable
from fastddpm.given import Given
from fastddpm.host import evaluating, own_state
from fastddpm.networks import check_call
from fastddpm.options import check_flag
from fastddpm.precision import float32_kept
from fastddpm.progress import tqdm
from fastddpm.schedule import check_count
from fastddpm.spacing import Spacing


@dataclass(frozen=True)
class BitsPerDim:
    """The bound of each image and its parts; float32 on the model's device, or on that of the
    images for a callable that has none.

    total (N,) = prior (N,) + terms.sum(1);  terms (N, T): column 0 the decoder L_0, column t the KL
    L_t; mse (N, T): mean squared error of the x0 prediction at t, for images in [-1, 1]. All but
    mse are bits/dim."""

    total: torch.Tensor
    prior: torch.Tensor
    terms: torch.Tensor
    mse: torch.Tensor


@own_state()
def bits_per_dim(
    model: Model,
    x0: torch.Tensor,
    *,
    diffusion: Diffusion | None = None,
    seed: int = 0,
    first_index: int = 0,
    batch_size: int | None = None,
    steps: int | str | Sequence[int] | None = None,
    spacing: Spacing = "strided",
    clip: bool = True,
    model_kwargs: dict[str, Any] | None = None,
    progress: bool = True,
) -> BitsPerDim:
    """An upper bound on -log2 p(x0) / D for each image: L_T + sum of L_t + L_0   (DDPM Eq. 5).

    x0:    (N, C, H, W) uint8; image k's x_t takes the noise randn(step=t) of sample first_index +
           k, one draw a step, so the number is a function of (model, x0, seed)
    steps, spacing: the bound of a shorter chain (None: all T), see Schedule.respace
    clip:  clip the x0 prediction to [-1, 1], as sampling does; without, it is the bound of
           sample(clip=False)
    model_kwargs: what the model gets beside x_t and t, {"y": labels} say: a tensor of as many rows
           as there are images is cut into batches with them, anything else is passed as it is

    Raises ValueError for anything but uint8 images, FloatingPointError when the bound is not
    finite. The prior term is exact, in float64.
    """
    if not isinstance(x0, torch.Tensor):
        raise ValueError(f"x0 must be a tensor (N, C, H, W); got {type(x0).__name__}")
    if x0.dtype != torch.uint8 or x0.dim() != 4 or len(x0) == 0:
        raise ValueError(f"x0 must be (N, C, H, W) uint8, N >= 1; got {tuple(x0.shape)} {x0.dtype}")
    arguments.check_pixels("x0", x0)
    process = Diffusion.of(model, diffusion).respace(steps, spacing=spacing)
    clip = check_flag("clip", clip)
    x0 = x0.to(arguments.device_of(model, None, x0.device))
    seed = arguments.seed(seed)
    index = arguments.sample_indices(len(x0), first_index).to(x0.device)
    named = named_arguments(model_kwargs)
    check_call(model, named)
    given = Given(len(x0), 0, x0.shape[1:], process.T, x0.device, model_kwargs=named)
    if batch_size is None:
        batch_size = min(64, batch_size_for(runnable(model), x0.shape[1:], "fp32", x0.device))
    batches = Batches(check_count("batch_size", batch_size))
    with (
        tqdm(unit="step", desc="bits/dim", disable=not progress) as bar,
        evaluating(model),
        float32_kept("fp32", x0.device),
    ):

        def terms_of(part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return process.vlb_terms(
                model, x0[part], seed=seed, sample_index=index[part], on_step=bar.update, clip=clip,
                model_kwargs=given.kwargs(given.rows(part)),
            )  # fmt: skip

        everything = torch.arange(len(x0), device=x0.device)
        terms, mse = zip(*batches.draw(terms_of, everything, Steps(bar, process.T)), strict=True)
    prior, all_terms = process.prior_kl(x0), torch.cat(terms)
    total = prior + all_terms.sum(dim=1)
    if bad := int((~torch.isfinite(total)).sum()):
        raise FloatingPointError(
            f"the bound of {bad} of {len(x0)} images is not finite: the model returned NaN or inf"
        )
    return BitsPerDim(total, prior, all_terms, torch.cat(mse))
