"""The variational bound in bits/dim (DDPM Eq. 5, 13), term by term. No rate-distortion, no FID."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastddpm import arguments
from fastddpm.batching import Batches, batch_size_for
from fastddpm.chain import Steps
from fastddpm.diffusion import Diffusion, Model
from fastddpm.engine import runnable
from fastddpm.host import evaluating, own_state
from fastddpm.precision import float32_kept
from fastddpm.progress import tqdm
from fastddpm.schedule import check_count


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
    steps: int | None = None,
    progress: bool = True,
) -> BitsPerDim:
    """An upper bound on -log2 p(x0) / D for each image: L_T + sum of L_t + L_0   (DDPM Eq. 5).

    x0:    (N, C, H, W) uint8; image k's x_t takes the noise randn(step=t) of sample first_index +
           k, one draw a step, so the number is a function of (model, x0, seed)
    steps: the bound of a chain of so many steps (None: all T)

    Raises ValueError for anything but uint8 images, FloatingPointError when the bound is not
    finite. The prior term is exact, in float64.
    """
    if not isinstance(x0, torch.Tensor):
        raise ValueError(f"x0 must be a tensor (N, C, H, W); got {type(x0).__name__}")
    if x0.dtype != torch.uint8 or x0.dim() != 4 or len(x0) == 0:
        raise ValueError(f"x0 must be (N, C, H, W) uint8, N >= 1; got {tuple(x0.shape)} {x0.dtype}")
    arguments.check_pixels("x0", x0)
    process = Diffusion.of(model, diffusion).respace(steps)
    x0 = x0.to(arguments.device_of(model, None, x0.device))
    seed = arguments.seed(seed)
    index = arguments.sample_indices(len(x0), first_index).to(x0.device)
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
                model, x0[part], seed=seed, sample_index=index[part], on_step=bar.update
            )

        everything = torch.arange(len(x0), device=x0.device)
        terms, mse = zip(*batches.draw(terms_of, everything, Steps(bar, process.T)), strict=True)
    prior, all_terms = process.prior_kl(x0), torch.cat(terms)
    total = prior + all_terms.sum(dim=1)
    if bad := int((~torch.isfinite(total)).sum()):
        raise FloatingPointError(
            f"the bound of {bad} of {len(x0)} images is not finite: the model returned NaN or inf"
        )
    return BitsPerDim(total, prior, all_terms, torch.cat(mse))
